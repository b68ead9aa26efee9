"""Equal parameters: what the sparse attention saves goes into a wider feed-forward, as in the paper."""

from __future__ import annotations

import copy

import torch

from tulle.models.scaling_transformer.configuration import ScalingTransformerConfig
from tulle.models.scaling_transformer.modeling import ScalingTransformerForCausalLM


def parameter_count(config: ScalingTransformerConfig) -> int:
    """Parameters of the model, a tied head counted once; no memory is used."""
    with torch.device("meta"):
        model = ScalingTransformerForCausalLM(config)
    if config.tie_word_embeddings:
        model.tie_weights()
    return sum(p.numel() for p in model.parameters())


def matching_intermediate_size(config: ScalingTransformerConfig, dense: ScalingTransformerConfig) -> int:
    """The d_ff, a multiple of N and at least N, with which ``config`` comes closest to ``dense`` in parameters."""
    block = config.ff_block or 1
    one, two = (parameter_count(_with_d_ff(config, size)) for size in (block, 2 * block))
    per_block = two - one  # the count is affine in d_ff
    return max(1, 1 + round((parameter_count(dense) - one) / per_block)) * block


def _with_d_ff(config: ScalingTransformerConfig, size: int) -> ScalingTransformerConfig:
    changed = copy.deepcopy(config)
    changed.intermediate_size = size
    return changed

"""Scaling Transformers: a decoder whose feed-forward, attention projections and head are sparse by construction.

Jaszczur et al. 2021, "Sparse is Enough in Scaling Transformers". ``import tulle.hf`` registers the model with
transformers.
"""

from tulle.models.scaling_transformer.attention import Multiplicative
from tulle.models.scaling_transformer.choices import record_choices
from tulle.models.scaling_transformer.configuration import ScalingTransformerConfig
from tulle.models.scaling_transformer.feed_forward import SparseFeedForward, training_mask
from tulle.models.scaling_transformer.modeling import ScalingTransformerForCausalLM, ScalingTransformerModel
from tulle.models.scaling_transformer.sizing import matching_intermediate_size, parameter_count

__all__ = [
    "Multiplicative",
    "ScalingTransformerConfig",
    "ScalingTransformerForCausalLM",
    "ScalingTransformerModel",
    "SparseFeedForward",
    "matching_intermediate_size",
    "parameter_count",
    "record_choices",
    "training_mask",
]

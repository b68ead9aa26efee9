"""Nemotron-H and Nemotron 3: every layer is Mamba-2, attention without positions, or a feed-forward of squared ReLU
without gate, or experts of such. NVIDIA 2025."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tulle.models.config_keys import ConfigKeys
from tulle.models.description import ACTIVATIONS, Absent, Attention, Decoder, Mamba2, Mixture, Norm, PlainMLP
from tulle.models.families._parts import EARLIER, Norms, build_decoder, expert_count, head_sizes, router

NAME = "mixer"
"""Of what a layer is, whatever it is."""
LETTERS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
"""Of ``hybrid_override_pattern``, in older files."""
OLDER = {
    "mamba_n_groups": "n_groups", "mamba_d_conv": "conv_kernel", "mamba_conv_bias": "use_conv_bias",
    "mamba_dt_min": "time_step_min",
}  # fmt: skip
"""Keys that older files may have in the place of others."""
UNREAD = (
    "chunk_size", "mamba_chunk_size", "expand", "mamba_expand", "use_mamba_kernels", "mamba_ssm_cache_dtype",
    "residual_in_fp32", "rescale_prenorm_residual", "hidden_dropout", "time_step_max", "time_step_limit",
    "time_step_floor", "mamba_dt_max", "mamba_dt_limit", "mamba_dt_init_floor", "num_logits_to_keep",
    "moe_shared_expert_overlap", "num_nextn_predict_layers", "mtp_layers_block_type", "mtp_hybrid_override_pattern",
    "mamba_proj_bias", "rope_parameters", "rope_theta", "partial_rotary_factor", "num_hidden_layers",
    "norm_eps", "sliding_window",
)  # fmt: skip
"""How the work is cut or stored, what is set before training, heads for several tokens, which are left out, and what
transformers does not read."""


def describe(config: Mapping[str, Any]) -> Decoder:
    keys = ConfigKeys({OLDER.get(key, key): value for key, value in config.items()})
    for key in UNREAD:
        keys.raw(key)
    hidden, eps = keys.size("hidden_size", 4096), keys.number("layer_norm_epsilon", 1e-5)
    heads, kv_heads, head_dim = head_sizes(keys, hidden, 32, 8, 128)
    kinds, bias = layer_kinds(keys), keys.flag("attention_bias", False)
    parts = {
        "full_attention": Attention(heads, kv_heads, head_dim, NAME, rotary=None),
        "linear_attention": mamba(keys, eps),
        "mlp": PlainMLP(keys.size("intermediate_size", 21504), activation(keys), NAME),
        "moe": mixture(keys, hidden),
    }
    mixers = [parts[kind] for kind in kinds]
    return build_decoder(
        keys,
        hidden=hidden,
        attention=[one if isinstance(one, Attention | Mamba2) else Absent() for one in mixers],
        feed_forward=[one if isinstance(one, PlainMLP | Mixture) else Absent() for one in mixers],
        norms=Norms(Norm("norm", eps), Norm("norm", eps)),
        final_norm=Norm("model.norm_f", eps),
        rotary={},
        context=keys.size("max_position_embeddings", 4096),
        vocabulary=keys.size("vocab_size", 131072),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=keys.flag("mlp_bias", False),
        expert_bias=False,
        embedding="model.embeddings.weight",
    )


def layer_kinds(keys: ConfigKeys) -> list[str]:
    pattern = keys.raw("hybrid_override_pattern")
    spelled = list(pattern) if isinstance(pattern, str) else ["M", "E", "*", "-"]
    default = [LETTERS.get(letter, letter) for letter in spelled]
    found = keys.raw("layers_block_type")
    beside = keys.raw("layer_types")
    found = found or beside or default
    if not isinstance(found, list):
        raise keys.refused("layers_block_type", "a list of types", found)
    found = [EARLIER.get(one, one) if isinstance(one, str) else one for one in found]
    for one in found:
        if one not in LETTERS.values():
            raise keys.refused("layers_block_type", f"one of {', '.join(LETTERS.values())}", one)
    return found


def activation(keys: ConfigKeys) -> str:
    return keys.choice("mlp_hidden_act", "relu2", ACTIVATIONS)


def mamba(keys: ConfigKeys, eps: float) -> Mamba2:
    heads, groups = keys.size("mamba_num_heads", 128), keys.size("n_groups", 8)
    if heads % groups:
        raise keys.refused("n_groups", f"a divisor of mamba_num_heads ({heads})", groups)
    return Mamba2(
        heads, keys.size("mamba_head_dim", 64), groups, keys.size("ssm_state_size", 128), keys.size("conv_kernel", 4),
        eps, keys.choice("mamba_hidden_act", "silu", ACTIVATIONS),
        bias=keys.flag("use_bias", False),
        convolution_bias=keys.flag("use_conv_bias", True),
        step_limits=(keys.number("time_step_min", 0.001), math.inf),
        name=NAME,
    )  # fmt: skip


def mixture(keys: ConfigKeys, hidden: int) -> Mixture:
    keys.only("n_shared_experts", 1)
    keys.only("moe_latent_size", None)
    routing = router(
        keys, f"{NAME}.gate", hidden, expert_count(keys, 8), keys.size("num_experts_per_tok", 2),
        score="sigmoid", normalise=keys.flag("norm_topk_prob", True),
        scale=keys.number("routed_scaling_factor", 1.0), correction=f"{NAME}.gate.e_score_correction_bias",
        groups=keys.size("n_group", 1), chosen_groups=keys.size("topk_group", 1), group_best=2,
    )  # fmt: skip
    own, shared = keys.size("moe_intermediate_size", 7688), keys.size("moe_shared_expert_intermediate_size", 7688)
    return Mixture(
        routing,
        PlainMLP(own, activation(keys), f"{NAME}.experts"),
        PlainMLP(shared, activation(keys), f"{NAME}.shared_experts"),
    )

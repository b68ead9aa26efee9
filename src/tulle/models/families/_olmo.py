"""What OLMo 2 and 3 share: norms on outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tulle.models.config_keys import ConfigKeys
from tulle.models.description import Attention, Decoder, Norm, Rotary
from tulle.models.families._parts import build_decoder, gated, norms_after


def query_norms(eps: float) -> dict[str, Any]:
    """Of all queries and of all keys at once."""
    return {"q_norm": Norm("self_attn.q_norm", eps), "k_norm": Norm("self_attn.k_norm", eps), "norm_width": "all"}


def olmo_decoder(
    keys: ConfigKeys,
    *,
    hidden: int,
    attention: list[Attention],
    rotary: Mapping[str, Rotary],
    context: int,
    eps: float,
) -> Decoder:
    bias = keys.flag("attention_bias", False)
    return build_decoder(
        keys,
        hidden=hidden,
        attention=attention,
        feed_forward=gated(keys, keys.size("intermediate_size", 11008)),
        norms=norms_after(eps),
        final_norm=Norm("model.norm", eps),
        rotary=rotary,
        context=context,
        vocabulary=keys.size("vocab_size", 50304),
        qkv_bias=bias,
        o_bias=bias,
    )

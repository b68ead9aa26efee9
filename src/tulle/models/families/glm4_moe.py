"""GLM-4.5 to 4.7: the first layers dense, then experts and a shared one, routed as by DeepSeek-V3. Zeng et al. 2025."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tulle.models.config_keys import ConfigKeys
from tulle.models.description import Attention, Decoder, Norm
from tulle.models.families._deepseek import feed_forwards
from tulle.models.families._parts import build_decoder, head_sizes, llama_norms, read_rotary


def describe(config: Mapping[str, Any]) -> Decoder:
    keys = ConfigKeys(config)
    hidden = keys.size("hidden_size", 4096)
    heads, kv_heads, head_dim = head_sizes(keys, hidden, 96, 8)
    context, eps = keys.size("max_position_embeddings", 131072), keys.number("rms_norm_eps", 1e-5)
    layers = keys.size("num_hidden_layers", 46)
    for key in ("num_mtp_layers", "num_nextn_predict_layers"):
        keys.raw(key)  # heads for several tokens, which are left out
    attention = Attention(heads, kv_heads, head_dim)
    if keys.flag("use_qk_norm", False):
        attention = replace(attention, q_norm=Norm("self_attn.q_norm", eps), k_norm=Norm("self_attn.k_norm", eps))
    return build_decoder(
        keys,
        hidden=hidden,
        attention=[attention] * layers,
        feed_forward=feed_forwards(
            keys, hidden, layers, 10944, 1408, experts=128, shared=1, chosen=8, dense=1, groups=(1, 1),
            score="sigmoid", group_best=2, correction=True, normalise=keys.flag("norm_topk_prob", True),
            scale=keys.number("routed_scaling_factor", 1.0),
        ),
        norms=llama_norms(eps),
        final_norm=Norm("model.norm", eps),
        rotary={"default": read_rotary(keys, head_dim, context, partial=0.5)},
        context=context,
        vocabulary=keys.size("vocab_size", 151552),
        qkv_bias=keys.flag("attention_bias", False),
    )  # fmt: skip

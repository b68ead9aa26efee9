"""What Gemma's generations share: four norms of 1 + w per layer, embeddings scaled by √d."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from tulle.models.config_keys import ConfigKeys
from tulle.models.description import ACTIVATIONS, Attention, Decoder, GatedMLP, Norm, Rotary
from tulle.models.families._parts import Norms, build_decoder


def gemma_decoder(
    keys: ConfigKeys,
    *,
    attention: Attention,
    windows: Sequence[int | None],
    tables: Sequence[str],
    rotary: Mapping[str, Rotary],
    activation: str,
    context: int,
    vocabulary: int,
    logit_soft_cap: float | None,
) -> Decoder:
    """A layer has the window and the rotary table of its place in ``windows`` and ``tables``."""
    hidden, eps = keys.size("hidden_size", 2304), keys.number("rms_norm_eps", 1e-6)
    keys.only("use_bidirectional_attention", False, None)
    names = ("input", "pre_feedforward", "post_attention", "post_feedforward")
    bias = keys.flag("attention_bias", False)
    return build_decoder(
        keys,
        hidden=hidden,
        attention=[
            replace(attention, window=window, rotary=table) for window, table in zip(windows, tables, strict=True)
        ],
        feed_forward=GatedMLP(keys.size("intermediate_size", 9216), activation),
        norms=Norms(*(Norm(f"{name}_layernorm", eps, offset=1.0) for name in names)),
        final_norm=Norm("model.norm", eps, offset=1.0),
        rotary=rotary,
        context=context,
        vocabulary=vocabulary,
        qkv_bias=bias,
        o_bias=bias,
        tied=True,
        embedding_scale=hidden**0.5,
        logit_soft_cap=logit_soft_cap,
    )


def activation(keys: ConfigKeys) -> str:
    """The gate's function; ``hidden_act`` is an older key that transformers does not read."""
    keys.only("hidden_act", "gelu", "gelu_pytorch_tanh")
    return keys.choice("hidden_activation", "gelu_pytorch_tanh", ACTIVATIONS)


def soft_cap(keys: ConfigKeys, key: str, default: float | None) -> float | None:
    return None if keys.raw(key, default) is None else keys.number(key, default or 1.0)

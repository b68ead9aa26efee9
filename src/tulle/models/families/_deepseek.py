"""What DeepSeek's families and those after them share: latent attention; first layers dense, then experts in groups and
a shared one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tulle.models.config_keys import ConfigKeys
from tulle.models.description import Decoder, GatedMLP, LatentAttention, Mixture, Norm, Rotary
from tulle.models.families._parts import build_decoder, expert_count, gated, llama_norms, read_rotary, router

NARROW_EPS = 1e-6
"""Of the norms of latent attention, whatever that of others is."""


def latent_decoder(
    keys: ConfigKeys,
    *,
    hidden: int,
    layers: int,
    heads: int,
    context: int,
    vocabulary: int,
    feed_forward: Callable[[int, int], list[GatedMLP | Mixture]],
    interleaved: bool,
    eps: float = 1e-6,
    ranks: tuple[int, int] = (1536, 512),
    dims: tuple[int, int, int] = (128, 64, 128),
    mlp_bias: bool = False,
) -> Decoder:
    """Numbers are the family's defaults; ``ranks``: of queries, of keys and values; ``dims``: a head's channels without
    a position, with one, and of values; ``feed_forward`` is given the width and the number of layers."""
    hidden, count = keys.size("hidden_size", hidden), keys.size("num_attention_heads", heads)
    eps, context = keys.number("rms_norm_eps", eps), keys.size("max_position_embeddings", context)
    plain, turned = keys.size("qk_nope_head_dim", dims[0]), keys.size("qk_rope_head_dim", dims[1])
    bias, layers = keys.flag("attention_bias", False), keys.size("num_hidden_layers", layers)
    keys.only("num_key_value_heads", None, count)
    keys.only("head_dim", None, turned)
    keys.only("moe_layer_freq", 1)
    for key in ("num_mtp_layers", "num_nextn_predict_layers", "ep_size", "seq_aux", "aux_loss_alpha", "qk_head_dim"):
        keys.raw(key)  # heads for several tokens, which are left out; of training; what the other sizes say
    rotary = read_rotary(keys, turned, context, interleaved=interleaved)
    rank = keys.size_or_none("q_lora_rank", ranks[0])
    attention = LatentAttention(
        count,
        rank,
        keys.size("kv_lora_rank", ranks[1]),
        plain,
        turned,
        keys.size("v_head_dim", dims[2]),
        (plain + turned) ** -0.5 * _stretched(rotary) ** 2,
        None if rank is None else Norm("self_attn.q_a_layernorm", NARROW_EPS),
        Norm("self_attn.kv_a_layernorm", NARROW_EPS),
    )
    return build_decoder(
        keys,
        hidden=hidden,
        attention=[attention] * layers,
        feed_forward=feed_forward(hidden, layers),
        norms=llama_norms(eps),
        final_norm=Norm("model.norm", eps),
        rotary={"default": rotary},
        context=context,
        vocabulary=keys.size("vocab_size", vocabulary),
        qkv_bias=bias,
        mlp_bias=mlp_bias,
    )


def _stretched(rotary: Rotary) -> float:
    """What queries and keys are multiplied with, besides what the rotary table does, where positions are stretched
    (Peng et al. 2023, section 3.4)."""
    if rotary.kind == "default" or not rotary.mscale_all_dim or rotary.factor is None or rotary.factor <= 1:
        return 1.0
    return 0.1 * rotary.mscale_all_dim * math.log(rotary.factor) + 1.0


def feed_forwards(
    keys: ConfigKeys,
    hidden: int,
    layers: int,
    intermediate: int,
    own: int,
    *,
    experts: int,
    shared: int,
    chosen: int | None,
    dense: int,
    groups: tuple[int | None, int | None] | None,
    correction: bool,
    group_best: int,
    **settings: Any,
) -> list[GatedMLP | Mixture]:
    """Of all layers. Numbers are the family's defaults: of a dense layer's width, of an expert's ``own``, and of
    experts, shared ones (all one wide expert here), first layers that are ``dense``, groups and chosen groups (None:
    one group; a number that is None has to be given); ``settings``: of :class:`tulle.models.description.Router`."""
    plain = gated(keys, keys.size("intermediate_size", intermediate))
    width = keys.size("moe_intermediate_size", own)
    routing = router(
        keys, "mlp.gate", hidden, expert_count(keys, experts), keys.size("num_experts_per_tok", chosen),
        groups=1 if groups is None else keys.size("n_group", groups[0]),
        chosen_groups=1 if groups is None else keys.size("topk_group", groups[1]),
        group_best=group_best, correction="mlp.gate.e_score_correction_bias" if correction else None, **settings,
    )  # fmt: skip
    mixture = Mixture(
        routing,
        replace(plain, intermediate=width, name="mlp.experts"),
        replace(plain, intermediate=width * keys.size("n_shared_experts", shared), name="mlp.shared_experts"),
    )
    first = keys.raw("first_k_dense_replace", dense)
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise keys.refused("first_k_dense_replace", "a whole number of layers", first)
    return [plain if index < first else mixture for index in range(layers)]

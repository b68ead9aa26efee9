"""What a model has beyond Llama's plain decoder, by name, so that every reader can refuse what it does not do."""

from __future__ import annotations

from collections.abc import Collection

from tulle.errors import UserError
from tulle.models.description import (
    Absent,
    Attention,
    Decoder,
    FeedForward,
    GatedMLP,
    LatentAttention,
    Layer,
    Mamba2,
    Mixture,
    Norm,
    PlainMLP,
    ShortConvolution,
)

GATED = frozenset({"silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2"})


def features(decoder: Decoder) -> dict[str, object]:
    """Names of what is special, each with a value to show."""
    found: dict[str, object] = {}
    if decoder.embedding_scale != 1:
        found["scale of the embedding"] = decoder.embedding_scale
    if decoder.logit_scale != 1:
        found["scale of the logits"] = decoder.logit_scale
    if decoder.logit_soft_cap is not None:
        found["soft cap of the logits"] = decoder.logit_soft_cap
    if decoder.per_layer is not None:
        found["inputs of every layer's own"] = decoder.per_layer.width
    if decoder.head_bias:
        found["bias of the head"] = True
    if len(decoder.rotary) > 1:
        found["several rotary tables"] = ", ".join(decoder.rotary)
    if any(table.interleaved for table in decoder.rotary.values()):
        found["rotary embeddings of neighbouring channels"] = True
    found |= _of_norm(decoder.final_norm)
    for layer in decoder.layers:
        found |= _of_layer(decoder, layer) | _of_attention(decoder, layer) | _of_feed_forward(layer)
        for norm, _ in layer.norms():
            found |= _of_norm(norm)
            if norm.eps != decoder.final_norm.eps:
                found["norms of several eps"] = norm.eps
    return found


def require(decoder: Decoder, known: Collection[str], reader: str, instead: str) -> None:
    """Raises ``UserError`` for what is special about a model and not among ``known``. ``instead``: what to try."""
    for name, value in features(decoder).items():
        if name not in known:
            raise UserError(
                f"expected a model that {reader} can take, found {name} ({value}) in {decoder.model_type}; {instead}"
            )


def _of_norm(norm: Norm) -> dict[str, object]:
    found: dict[str, object] = {}
    if norm.kind != "rms":
        found["layer norms"] = norm.name
    if norm.offset:
        found["norms with an offset"] = norm.offset
    if norm.bias:
        found["norms with a bias"] = norm.name
    return found


def _of_layer(decoder: Decoder, layer: Layer) -> dict[str, object]:
    found: dict[str, object] = {}
    after = layer.mixer_norm_after or layer.feed_forward_norm_after
    if after is not None:
        found["norms after attention and feed-forward"] = after.name
    if isinstance(layer.mixer, Absent) or isinstance(layer.feed_forward, Absent):
        found["layers of a mixer or a feed-forward alone"] = layer.index
    elif layer.mixer_norm is None or layer.feed_forward_norm is None and not layer.parallel:
        found["no norms before attention and feed-forward"] = True
    if layer.output_scale is not None:
        found["scale of the layers' outputs"] = layer.output_scale
    if layer.residual_scale != 1:
        found["scale of what is added to the residual stream"] = layer.residual_scale
    if layer.parallel:
        found["attention and feed-forward side by side"] = True
    parts = [one.feed_forward for one in decoder.layers if not isinstance(one.feed_forward, Absent)]
    if not isinstance(layer.feed_forward, Absent) and layer.feed_forward != parts[0]:
        found["feed-forwards that differ between layers"] = layer.feed_forward
    if isinstance(layer.mixer, Attention):
        first = next(other.mixer for other in decoder.layers if isinstance(other.mixer, Attention))
        for key in ("heads", "kv_heads", "head_dim"):
            if getattr(layer.mixer, key) != getattr(first, key):
                found[f"{key} that differ between layers"] = getattr(layer.mixer, key)
    return found


def _of_attention(decoder: Decoder, layer: Layer) -> dict[str, object]:
    mixer = layer.mixer
    found: dict[str, object] = {}
    if isinstance(mixer, LatentAttention):
        return {"latent attention": mixer.kv_rank}
    if isinstance(mixer, Absent):
        return found
    if isinstance(mixer, Mamba2):
        return {"Mamba-2": layer.index}
    if isinstance(mixer, ShortConvolution):
        return {"gated short convolutions": layer.index}
    if not isinstance(mixer, Attention):
        found["gated delta nets"] = layer.index
        if mixer.fused:
            found["heads of delta nets side by side"] = layer.index
        return found
    if mixer.rotary is None:
        found["attention without positions"] = layer.index
    elif decoder.rotary[mixer.rotary].dim != mixer.head_dim:
        found["heads of which only a part is rotated"] = decoder.rotary[mixer.rotary].dim
    for name, value in (
        ("scale of attention", mixer.scale),
        ("soft cap of attention", mixer.soft_cap),
        ("scale of queries by position", mixer.position_scale),
        ("norm of the heads' outputs", mixer.output_norm and mixer.output_norm.name),
        ("norm of values", mixer.value_eps),
        ("keys and values of an earlier layer", mixer.kv_from),
    ):
        if value is not None:
            found[name] = value
    for name, flag in (
        ("attention sinks", mixer.sinks),
        ("output gate of attention", mixer.output_gate),
        ("norms of queries and keys over all heads", mixer.norm_width == "all" and mixer.q_norm is not None),
        ("norms of queries and keys after the rotation", mixer.norm_after_rotary and mixer.q_norm is not None),
        ("keys that are the values", mixer.value_is_key),
        ("queries, keys and values in one tensor", mixer.kv_from is None and len(layer.group("qkv").linears) == 1),
    ):
        if flag:
            found[name] = True
    return found


def _of_feed_forward(layer: Layer) -> dict[str, object]:
    found: dict[str, object] = {}
    feed_forward: FeedForward = layer.feed_forward
    if isinstance(feed_forward, Absent):
        return found
    if isinstance(feed_forward, Mixture):
        found["experts"] = f"{feed_forward.router.chosen} of {feed_forward.router.experts}"
        if feed_forward.stream_norms():
            found["norms of experts"] = feed_forward.stream_norms()[0].name
        if feed_forward.router.input_scale is not None or feed_forward.router.expert_scale is not None:
            found["scales of a router's inputs or of experts"] = feed_forward.router.linear.name
        feed_forward = feed_forward.expert
        if isinstance(feed_forward, PlainMLP):
            found["experts without gates"] = feed_forward.activation
    elif isinstance(feed_forward, PlainMLP):
        found["a feed-forward without gate"] = feed_forward.activation
    elif len(layer.group("gate_up").linears) == 1:
        found["gate and up in one tensor"] = True
    if isinstance(feed_forward, GatedMLP) and feed_forward.limit is not None:
        found["gates with a limit"] = feed_forward.limit
    if feed_forward.inner_norm is not None:
        found["norm inside the feed-forward"] = feed_forward.inner_norm.name
    if feed_forward.activation not in GATED:
        found[f"activation {feed_forward.activation}"] = True
    return found

"""What a GGUF file says of a model besides its tokenizer: keys, and tensors of rotary factors.

The keys are read back as :mod:`tulle.models.gguf.config` reads any file's, before a tensor is written. What comes out
must be the model's own description: so whatever llama.cpp does otherwise in a family, and no key changes, is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from tulle.errors import UserError
from tulle.models.description import Attention, Decoder, Mixture, Rotary, describe
from tulle.models.gguf import names
from tulle.models.gguf.config import config_of, suggested_attention
from tulle.models.gguf.families import WRITTEN, Family
from tulle.models.rotary import frequencies

INSTEAD = "export it as dense or compressed-tensors"
NOT_COMPARED = ("model_type", "context", "index", "prefix", "max_positions")
"""Fields of descriptions that may differ: a file's context may end with the window."""


@dataclass
class Written:
    """Metadata and tensors of rotary factors, by GGUF's names."""

    family: Family
    keys: dict[str, Any] = field(default_factory=dict)
    """``bool``, ``int``, ``float``, ``str`` or a list of one of them."""
    factors: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def add_key(writer: gguf.GGUFWriter, key: str, value: bool | int | float | str | Sequence[Any]) -> None:
    """Whole numbers become uint32, others float32; arrays have the type of their elements."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def metadata_of(model: Decoder) -> Written:
    """Raises ``UserError`` for a family that llama.cpp does not have, and for what its files of the family cannot
    say."""
    family = WRITTEN.get(model.model_type)
    if family is None:
        raise UserError(
            f"expected a family of {', '.join(sorted(WRITTEN))} for --to gguf, found {model.model_type}; use --to dense"
        )
    found = Written(family)
    prefix, mixer, rotary = f"{family.architecture}.", model.layers[0].attention, _table(model)
    wide = mixer.heads * mixer.head_dim
    if family.square and wide != model.hidden:
        raise UserError(
            f"expected heads of {model.hidden} channels in all, as llama.cpp reads {family.architecture}, found "
            f"{wide}; {INSTEAD}"
        )
    if family.head == "own" and model.tied:
        raise UserError(
            f"expected a head of its own, as llama.cpp reads {family.architecture}, found the embedding's table; "
            + INSTEAD
        )
    keys: dict[str, Any] = {
        "block_count": len(model.layers), "embedding_length": model.hidden,
        "feed_forward_length": model.layers[0].feed_forward.intermediate, "attention.head_count": mixer.heads,
        "attention.head_count_kv": mixer.kv_heads, "attention.key_length": mixer.head_dim,
        "attention.value_length": mixer.head_dim, family.eps[0]: float(model.final_norm.eps),
        "vocab_size": model.vocabulary, "rope.dimension_count": rotary.dim, "rope.freq_base": float(rotary.theta),
    }  # fmt: skip
    for number in family.numbers:
        value = number.of(model)
        if value:
            keys[number.key] = float(value)
    keys |= _experts(model, family)
    local = model.rotary.get("sliding_attention")
    if family.tables is not None and family.tables.used and local is not None:
        keys["rope.freq_base_swa"] = float(local.theta)
    keys |= _windows(model, family, found.notes)
    keys |= _stretched(model, family, rotary, found.factors)
    if family.yarn and rotary.kind == "yarn":
        found.notes.append(f"llama.cpp rounds the ends of yarn's ramp for {family.architecture}; the model does not")
    if any(layer.parallel for layer in model.layers):
        keys["use_parallel_residual"] = True
    found.keys = {prefix + key: value for key, value in keys.items()}
    _check(model, found)
    return found


def _experts(model: Decoder, family: Family) -> dict[str, Any]:
    """How many there are, how many a token goes to, and their channels."""
    mixture = model.layers[0].feed_forward
    if family.experts is None or not isinstance(mixture, Mixture):
        return {}
    keys = {"expert_count": mixture.router.experts, "expert_used_count": mixture.router.chosen}
    if family.experts.width is not None:
        keys["expert_feed_forward_length"] = mixture.expert.intermediate
    if family.experts.shared is not None and mixture.shared is not None:
        keys["expert_shared_feed_forward_length"] = mixture.shared.intermediate
    return keys


def stored_names(model: Decoder, family: Family) -> dict[str, str]:
    """GGUF's names of all tensors that the file holds, by their own; those of a layer's experts share one. Raises
    ``UserError`` for a tensor that llama.cpp does not read in the family."""
    found = {}
    per_layer = {layer.prefix + name for layer in model.layers for name in family.per_layer.values()}
    for name in tensors_of(model):
        theirs, stack = family.tensors.theirs(name), family.tensors.stack(name)
        if stack is not None:
            found[name] = stack[0]
        elif theirs is not None:
            found[name] = theirs
        elif name not in per_layer:
            raise UserError(
                f"expected tensors that llama.cpp reads in files of {family.architecture}, found {name}; {INSTEAD}"
            )
    return found


def tensors_of(model: Decoder) -> list[str]:
    found = list(model.outer_tensors())
    return found + [layer.prefix + name for layer in model.layers for name in layer.tensors()]


def require_same(model: Decoder, again: Decoder, architecture: str) -> None:
    """Raises ``UserError`` where the description that a file gives is not the model's."""
    off = _difference("", *(_within_context(one, again.context) for one in (model, again)))
    if off is not None:
        place, mine, theirs = off
        raise UserError(
            f"expected {theirs!s:.60} for {place}, as files of {architecture} have it, found {mine!s:.60} in "
            f"{model.model_type}; {INSTEAD}"
        )


def _check(model: Decoder, written: Written) -> None:
    arrays = {key: np.array(value) if isinstance(value, list) else value for key, value in written.keys.items()}
    metadata = {"general.architecture": written.family.architecture, **arrays}
    stored = set(stored_names(model, written.family).values())
    config = config_of(metadata, model.vocabulary, stored, written.factors)
    require_same(model, describe(config), written.family.architecture)


def _table(model: Decoder) -> Rotary:
    """The rotary table that most of the keys tell of."""
    return model.rotary.get("full_attention") or model.rotary["default"]


def _windows(model: Decoder, family: Family, notes: list[str]) -> dict[str, Any]:
    """The context, and what there is of windows."""
    found = [layer.attention.window for layer in model.layers]
    sizes = [window for window in found if window is not None]
    if family.windows is not None and sizes:
        keys: dict[str, Any] = {"context_length": model.context, "attention.sliding_window": min(sizes)}
        if not family.windows.used:
            notes.append(
                f"llama.cpp applies no sliding window for {family.architecture}, although the file tells of it"
            )
        every = family.windows.every
        pattern = [window is not None for window in found]
        if every and pattern != [(index + 1) % every != 0 for index in range(len(found))]:
            keys["attention.sliding_window_pattern"] = pattern
        return keys
    if sizes and min(sizes) < model.context:
        notes.append(
            f"llama.cpp knows no sliding window for {family.architecture}: the file's context is {min(sizes)} tokens, "
            "within which there is none"
        )
        return {"context_length": min(sizes)}
    return {"context_length": model.context}


def _stretched(
    model: Decoder, family: Family, rotary: Rotary, factors: dict[str, NDArray[np.float32]]
) -> dict[str, Any]:
    """Keys of stretched positions; tensors go to ``factors``."""
    if rotary.kind == "default":
        return {}
    if rotary.kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rotary.factor or 1)}
    if rotary.kind == "llama3" and family.ratios:
        plain, _ = frequencies(replace(rotary, kind="default", factor=None), model.context)
        stretched, _ = frequencies(rotary, model.context)
        factors[names.ROPE] = (plain / stretched).astype(np.float32)
        return {}
    _, attention = frequencies(rotary, 1)
    original = rotary.original_max_positions or model.context
    if rotary.kind == "yarn":
        factor = rotary.factor if rotary.factor is not None else rotary.max_positions / original
        keys = {"type": "yarn", "factor": float(factor), "original_context_length": original}
        if family.mscale:
            keys |= {"yarn_beta_fast": rotary.beta_fast, "yarn_beta_slow": rotary.beta_slow}
        if not math.isclose(attention, suggested_attention(factor), rel_tol=1e-6):
            keys["attn_factor"] = attention / suggested_attention(factor)
    elif rotary.kind == "longrope" and family.longrope:
        factors[names.LONG] = np.array(rotary.long_factor, np.float32)
        factors[names.SHORT] = np.array(rotary.short_factor, np.float32)
        keys = {"original_context_length": original, "attn_factor": attention}
    else:
        raise UserError(
            f"expected rotary embeddings that llama.cpp has for {family.architecture}, found {rotary.kind}; {INSTEAD}"
        )
    return {f"rope.scaling.{key}": value for key, value in keys.items()}


def _within_context(model: Decoder, context: int) -> Decoder:
    """Without windows that no text of the context reaches."""
    layers = []
    for layer in model.layers:
        mixer = layer.mixer
        if isinstance(mixer, Attention) and mixer.window is not None and mixer.window >= context:
            layer = replace(layer, mixer=replace(mixer, window=None))
        layers.append(layer)
    return replace(model, layers=tuple(layers))


def _difference(place: str, mine: Any, theirs: Any) -> tuple[str, Any, Any] | None:
    """Where two descriptions differ first, beyond what float32 rounds."""
    if isinstance(mine, Rotary) and isinstance(theirs, Rotary):
        return None if _same_tables(mine, theirs) else (place, mine, theirs)
    pairs: list[tuple[str, Any, Any]] = []
    if is_dataclass(mine) and type(mine) is type(theirs):
        pairs = [(f.name, getattr(mine, f.name), getattr(theirs, f.name)) for f in fields(mine)]
    elif isinstance(mine, Mapping) and isinstance(theirs, Mapping) and mine.keys() == theirs.keys():
        pairs = [(key, mine[key], theirs[key]) for key in mine]
    elif isinstance(mine, tuple) and isinstance(theirs, tuple) and len(mine) == len(theirs):
        pairs = [(str(index), a, b) for index, (a, b) in enumerate(zip(mine, theirs, strict=True))]
    elif isinstance(mine, float) and isinstance(theirs, float):
        return None if math.isclose(mine, theirs, rel_tol=1e-6) else (place, mine, theirs)
    elif mine != theirs:
        return place, mine, theirs
    for name, a, b in pairs:
        if name not in NOT_COMPARED:
            found = _difference(f"{place}.{name}" if place else name, a, b)
            if found is not None:
                return found
    return None


def _same_tables(mine: Rotary, theirs: Rotary) -> bool:
    """Whether two tables rotate alike, in short texts and long ones."""
    if (mine.dim, mine.interleaved) != (theirs.dim, theirs.interleaved):
        return False
    longest = (mine.original_max_positions or 0) + 1
    if mine.kind == "longrope" and mine.original_max_positions != theirs.original_max_positions:
        return False
    for length in (1, longest):
        (f, scale), (again, scale_again) = frequencies(mine, length), frequencies(theirs, length)
        if not np.allclose(f, again, rtol=1e-5, atol=0) or not math.isclose(scale, scale_again, rel_tol=1e-6):
            return False
    return True

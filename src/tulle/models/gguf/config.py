"""What a GGUF file's metadata says of the model, as a ``config.json`` would say it.

The family's file in ``tulle.models.families`` reads that config like any other: there is one description of a family.
Every key under the architecture's name is read here, or known to change nothing, or refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tulle.errors import UserError
from tulle.models.config_keys import DEEPEST, same
from tulle.models.description import Rotary
from tulle.models.gguf import gemma4, names
from tulle.models.gguf.families import Experts, Family, Windows, family_of
from tulle.models.rotary import frequencies

HARMLESS = {
    "vocab_size": "the embedding's shape says it",
    "attention.layer_norm_epsilon": "of another kind of norm than the family has",
    "attention.layer_norm_rms_epsilon": "of another kind of norm than the family has",
    "rope.scaling.finetuned": "how the model was trained",
    "tensor_data_layout": "how an early converter ordered tensors",
    "use_parallel_residual": "llama.cpp looks whether a norm is missing",
    "attention.causal": "every model here is",
    "pooling_type": "for embeddings of texts",
}
"""Keys under the architecture's name that change nothing, and why."""

SIGMOID = 2
"""``expert_gating_func``, as llama.cpp numbers them."""
FURTHER_HEADS = "nextn_predict_layers"
NOTHING = (
    "expert_count", "expert_used_count", "attention.scale", "attention.sliding_window",
    "rope.scaling.yarn_log_multiplier",
)  # fmt: skip
"""Keys that say nothing where they are 0."""

LLAMA3 = {"original_max_position_embeddings": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
"""Llama 3.1 to 3.3 all stretch their frequencies by these; GGUF stores the stretched frequencies' ratios alone."""


@dataclass
class _Keys:
    """Metadata under the architecture's name; what has been read is remembered."""

    architecture: str
    metadata: Mapping[str, Any]
    read: set[str] = field(default_factory=set)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def size(self, key: str, default: int | None = None, also_zero: bool = False) -> int:
        """A positive whole number; of a list (one per layer), the number that all of it is, but for ``also_zero``."""
        value = self.get(key, default)
        if isinstance(value, np.ndarray) and value.dtype.kind in "iu":
            numbers = set(value.tolist()) - ({0} if also_zero else set())
            if len(numbers) != 1:
                raise self.refused(key, "one number for all layers", sorted(numbers))
            value = numbers.pop()
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.refused(key, "a positive whole number", value)
        return value

    def number(self, key: str, default: float) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refused(key, "a number", value)
        return shortest(value)

    def text(self, key: str, default: str) -> str:
        value = self.get(key, default)
        if not isinstance(value, str):
            raise self.refused(key, "a text", value)
        return value

    def refused(self, key: str, expected: str, found: object) -> UserError:
        return UserError(
            f"expected {expected} for {self.architecture}.{key} in the GGUF file, found {found!r:.80}; convert it again"
        )

    def finish(self) -> None:
        """Raises ``UserError`` for keys that nothing has read."""
        prefix = f"{self.architecture}."
        for key, value in self.metadata.items():
            name = key.removeprefix(prefix)
            if not key.startswith(prefix) or name in self.read or name in HARMLESS:
                continue
            if name in NOTHING and isinstance(value, int | float) and not isinstance(value, bool) and value == 0:
                continue
            raise UserError(
                f"expected GGUF keys that tulle knows for {self.architecture}, found {key} ({str(value)[:40]}); the "
                "model does something that tulle does not compute"
            )


def shortest(value: float) -> float:
    """The shortest decimal number that is this float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def config_of(
    metadata: Mapping[str, Any],
    vocabulary: int,
    stored: Container[str],
    rope: Mapping[str, NDArray[np.float32]] | None = None,
) -> dict[str, Any]:
    """The config of a model. ``stored``: the names of its tensors; ``rope``: those that hold rotary factors."""
    family = family_of(metadata)
    keys = _Keys(family.architecture, metadata)
    heads, hidden = keys.size("attention.head_count"), keys.size("embedding_length")
    head_dim = keys.size("attention.key_length", max(hidden // heads, 1))
    if keys.size("attention.value_length", head_dim) != head_dim:
        raise keys.refused("attention.value_length", f"{head_dim}, as many channels as a key has",
                           keys.get("attention.value_length"))  # fmt: skip
    rotated = keys.size("rope.dimension_count", head_dim)
    if rotated != head_dim and not (family.partial and rotated < head_dim):
        raise keys.refused("rope.dimension_count", f"{head_dim}, as many channels as a head has", rotated)
    context, layers = keys.size("context_length"), keys.size("block_count") - len(further_layers(metadata, family))
    if layers > DEEPEST:
        raise keys.refused("block_count", f"a number up to {DEEPEST}", layers)
    eps, eps_key = family.eps
    config: dict[str, Any] = {
        "architectures": [family.class_name],
        "model_type": family.model_type,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": head_dim,
        "max_position_embeddings": context,
        eps_key: keys.number(eps, 1e-5),
        "vocab_size": vocabulary,
        "tie_word_embeddings": "output.weight" not in stored,
        "rope_theta": keys.number("rope.freq_base", 10000.0),
        **family.fixed,
    }
    if not family.differing:
        some = family.convolution is not None
        config["num_key_value_heads"] = keys.size("attention.head_count_kv", heads, also_zero=some)
    if not family.differing and (family.experts is None or not family.experts.alone):
        config["intermediate_size"] = keys.size("feed_forward_length")
    keys.read.add("feed_forward_length")  # of dense layers, where there are none
    for key, value in family.required.items():
        if not same(keys.get(key, value), value):
            raise keys.refused(key, str(value), keys.get(key))
    for flag, module in family.flags.items():
        config[flag] = f"blk.0.{module}.bias" in stored
    for flag, module in family.absent.items():
        config[flag] = f"blk.0.{module}.weight" not in stored
    for flag, module in family.present.items():
        config[flag] = f"blk.0.{module}.weight" in stored
    if family.partial:
        config["partial_rotary_factor"] = _share(rotated, head_dim)
    config |= _experts(keys, family.experts)
    if family.convolution is not None:
        config |= _convolutions(keys, family.convolution, layers)
    if family.delta_net:
        config |= _delta_net(keys, layers)
    config |= _windows(keys, family.windows, layers)
    if family.differing:
        config |= gemma4.layers_differ(keys, config, stored, rope or {})
        del config["rope_theta"]  # of tables of their own
    else:
        config |= _rotary(keys, family, config, rotated, rope or {})
    for number in family.numbers:
        found = keys.number(number.key, 0.0) or number.default
        into = config["rope_parameters"] if number.rotary else config
        into[number.config] = found(config) if callable(found) else found
    config |= {key: value(config) for key, value in family.derived.items()}
    keys.finish()
    # Classes of transformers have pad tokens of their own, which may lie beyond a small vocabulary.
    return config | {"pad_token_id": None} | token_ids(metadata)


def _share(part: int, whole: int) -> float:
    """A share of ``whole`` that gives ``part`` again when it is cut to a whole number."""
    share = part / whole
    return share if int(whole * share) == part else float(np.nextafter(share, 2))


def _experts(keys: _Keys, experts: Experts | None) -> dict[str, Any]:
    """How many experts there are, how many a token goes to, and their channels."""
    if experts is None:
        return {}
    found = {experts.count: keys.size("expert_count"), experts.chosen: keys.size("expert_used_count")}
    for ours, key in ((experts.width, "expert_feed_forward_length"),
                      (experts.shared, "expert_shared_feed_forward_length")):  # fmt: skip
        if ours is not None:
            found[ours] = keys.size(key)
    return found | (_counted(keys) if experts.counted else {})


def _counted(keys: _Keys) -> dict[str, Any]:
    """Shared experts, dense first layers, and how experts' weights are made of sigmoids."""
    keys.read.add(FURTHER_HEADS)
    if keys.get("expert_gating_func", SIGMOID) not in (0, SIGMOID):
        raise keys.refused("expert_gating_func", f"{SIGMOID} (sigmoids)", keys.get("expert_gating_func"))
    normalise, dense = keys.get("expert_weights_norm", False), keys.get("leading_dense_block_count", 0)
    if not isinstance(normalise, bool):
        raise keys.refused("expert_weights_norm", "true or false", normalise)
    return {
        "n_shared_experts": keys.size("expert_shared_count"),
        "first_k_dense_replace": keys.size("leading_dense_block_count") if dense else 0,
        "norm_topk_prob": normalise,
        "routed_scaling_factor": keys.number("expert_weights_scale", 0.0) or 1.0,
    }


def further_layers(metadata: Mapping[str, Any], family: Family) -> range:
    """The last layers that are heads for several tokens, which nobody reads."""
    layers, count = (metadata.get(f"{family.architecture}.{key}", 0) for key in ("block_count", FURTHER_HEADS))
    if not family.further or not all(type(one) is int and one > 0 for one in (layers, count)):
        return range(0)
    return range(layers - count, layers)


def _delta_net(keys: _Keys, layers: int) -> dict[str, Any]:
    """Sizes of gated delta nets, and which layers are such."""
    heads, inner = keys.size("ssm.time_step_rank"), keys.size("ssm.inner_size")
    if inner % heads:
        raise keys.refused("ssm.inner_size", f"a multiple of {heads} heads", inner)
    keys.read |= {"rope.dimension_sections", FURTHER_HEADS}  # positions in pictures; see further_layers
    usual = _every(keys.size("full_attention_interval", 4), layers)
    recurrent = keys.get("attention.recurrent_layers", usual)
    recurrent = recurrent.tolist() if isinstance(recurrent, np.ndarray) else recurrent
    if not isinstance(recurrent, list) or len(recurrent) < layers or not all(one in (0, 1) for one in recurrent):
        raise keys.refused("attention.recurrent_layers", f"true or false for {layers} layers", recurrent)
    return {
        "linear_num_key_heads": keys.size("ssm.group_count"),
        "linear_num_value_heads": heads,
        "linear_key_head_dim": keys.size("ssm.state_size"),
        "linear_value_head_dim": inner // heads,
        "linear_conv_kernel_dim": keys.size("ssm.conv_kernel"),
        "layer_types": ["linear_attention" if one else "full_attention" for one in recurrent[:layers]],
    }


def _convolutions(keys: _Keys, key: str, layers: int) -> dict[str, Any]:
    """Which layers are gated short convolutions, and how many tokens they see."""
    counts = keys.get("attention.head_count_kv")
    if not isinstance(counts, np.ndarray) or len(counts) != layers:
        raise keys.refused("attention.head_count_kv", f"a number for each of {layers} layers", counts)
    kinds = ["full_attention" if count else "conv" for count in counts.tolist()]
    return {"conv_L_cache": keys.size(key), "layer_types": kinds}


def _windows(keys: _Keys, windows: Windows | None, layers: int) -> dict[str, Any]:
    """``sliding_window`` and, where layers may differ, ``layer_types``."""
    if windows is None:
        return {}
    default = windows.default if windows.layers in (None, layers) else None
    window = keys.number("attention.sliding_window", default or 0)
    if windows.layers not in (None, layers) and window:
        raise keys.refused("attention.sliding_window", f"none without {windows.layers} layers", window)
    found: dict[str, Any] = {"sliding_window": keys.size("attention.sliding_window", default) if window else None}
    if not windows.every:
        return found
    pattern = keys.get("attention.sliding_window_pattern", windows.every)
    pattern = pattern.tolist() if isinstance(pattern, np.ndarray) else pattern
    usual = _every(windows.every, layers)
    if windows.fixed and pattern not in (windows.every, usual):
        raise keys.refused("attention.sliding_window_pattern", f"{windows.every}", pattern)
    if isinstance(pattern, int) and not isinstance(pattern, bool) and pattern > 0:
        pattern = _every(pattern, layers)
    if not isinstance(pattern, list) or len(pattern) != layers or not all(one in (0, 1) for one in pattern):
        raise keys.refused("attention.sliding_window_pattern", f"true or false for {layers} layers", pattern)
    kinds = ["sliding_attention" if one and window else "full_attention" for one in pattern]
    return found | {"layer_types": kinds}


def _every(number: int, layers: int) -> list[bool]:
    """Whether a layer has a window (or a state), where every so many layers one has none."""
    return [(index + 1) % number != 0 for index in range(layers)]


def _rotary(
    keys: _Keys, family: Family, config: Mapping[str, Any], rotated: int, rope: Mapping[str, NDArray[np.float32]]
) -> dict[str, Any]:
    """``rope_scaling``, or ``rope_parameters`` where the family keeps more there than one table."""
    theta = config["rope_theta"]
    scaling = _rope_scaling(keys, family, config["max_position_embeddings"], rotated, theta, rope)
    original = scaling.get("original_max_position_embeddings", config["max_position_embeddings"])
    if family.tables is not None:
        local = keys.number("rope.freq_base_swa", family.tables.theta or theta)
        return {"rope_parameters": {
            "full_attention": {"rope_type": "default"} | scaling | {"rope_theta": theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        }}  # fmt: skip
    if any(number.rotary for number in family.numbers):
        inside = {"rope_type": "default", "original_max_position_embeddings": original} | scaling
        return {"rope_parameters": inside | {"rope_theta": theta}}
    found: dict[str, Any] = {"rope_scaling": scaling} if scaling else {}
    if scaling.get("rope_type") == "longrope":
        found["original_max_position_embeddings"] = scaling.pop("original_max_position_embeddings")
    return found


def _rope_scaling(
    keys: _Keys,
    family: Family,
    context: int,
    rotated: int,
    theta: float,
    rope: Mapping[str, NDArray[np.float32]],
) -> dict[str, Any]:
    """Empty where nothing is stretched."""
    kind = keys.text("rope.scaling.type", "")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0))
    kind = kind or ("linear" if factor != 1 else "none")
    original = keys.size("rope.scaling.original_context_length", context)
    attention = keys.number("rope.scaling.attn_factor", 1.0)
    if names.LONG in rope or names.SHORT in rope:
        return _longrope(keys, rope, rotated, kind, original, attention)
    if kind != "yarn" and attention != 1:
        raise keys.refused("rope.scaling.attn_factor", "no factor of attention", attention)
    if names.ROPE in rope:
        if kind not in ("none", "linear") or kind == "linear" and factor != 1:
            raise keys.refused("rope.scaling.type", "none beside a tensor rope_freqs", kind)
        return _llama3(context, rotated, theta, rope[names.ROPE])
    if kind == "none" or kind == "linear" and factor == 1:
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise keys.refused("rope.scaling.type", "none, linear or yarn", kind)
    found = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, **family.yarn}
    for key, ours in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow"),
                      ("yarn_attn_factor", "attention_factor")):  # fmt: skip
        if keys.get(f"rope.scaling.{key}") is not None:
            found[ours] = keys.number(f"rope.scaling.{key}", 0.0)
    multiplier = keys.number("rope.scaling.yarn_log_multiplier", 0.0) if family.mscale else 0.0
    if multiplier:
        found |= {"mscale": 1.0, "mscale_all_dim": multiplier}
    if attention != 1:
        # llama.cpp multiplies what the paper suggests by this.
        if multiplier:
            raise keys.refused("rope.scaling.attn_factor", "1 beside yarn_log_multiplier", attention)
        found["attention_factor"] = attention * suggested_attention(factor)
    return found


def suggested_attention(factor: float) -> float:
    """yarn's factor of cosines and sines, as the paper suggests it."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(
    keys: _Keys, rope: Mapping[str, NDArray[np.float32]], rotated: int, kind: str, original: int, attention: float
) -> dict[str, Any]:
    if kind not in ("none", "longrope"):
        raise keys.refused("rope.scaling.type", "longrope beside tensors of its factors", kind)
    found: dict[str, Any] = {"rope_type": "longrope", "original_max_position_embeddings": original,
                             "attention_factor": attention}  # fmt: skip
    for name, ours in ((names.LONG, "long_factor"), (names.SHORT, "short_factor")):
        if name not in rope or len(rope[name]) != rotated // 2:
            raise UserError(
                f"expected {rotated // 2} numbers in the tensor {name}, found others; convert the file again"
            )
        found[ours] = [float(number) for number in rope[name]]
    return found


def _llama3(context: int, rotated: int, theta: float, ratios: NDArray[np.float32]) -> dict[str, Any]:
    """The parameters of Llama 3's stretched frequencies that give these ratios ``[rotated / 2]``."""
    if np.all(ratios == 1):
        return {}
    if len(ratios) != rotated // 2:
        raise UserError(f"expected {rotated // 2} numbers in rope_freqs.weight, found {len(ratios)}; convert it again")
    plain, _ = frequencies(Rotary(rotated, theta), context)
    factor = shortest(float(ratios.max(initial=1.0)))
    candidate = Rotary(
        rotated, theta, "llama3", context, factor, int(LLAMA3["original_max_position_embeddings"]),
        low_freq_factor=LLAMA3["low_freq_factor"], high_freq_factor=LLAMA3["high_freq_factor"],
    )  # fmt: skip
    stretched, _ = frequencies(candidate, context)
    if ratios.shape != plain.shape or not np.allclose(plain, stretched * ratios, rtol=1e-5, atol=0):
        raise UserError(
            "expected the tensor rope_freqs.weight as Llama 3.1's parameters give it, found other frequencies; give "
            "the Hugging Face folder"
        )
    return {"rope_type": "llama3", "factor": factor} | LLAMA3


def token_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """``bos_token_id``, ``eos_token_id`` (a list where a turn ends in another way than a text) and ``pad_token_id``."""
    found: dict[str, Any] = {}
    for key, ours in (("bos", "bos_token_id"), ("padding", "pad_token_id")):
        value = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(value, int):
            found[ours] = value
    ends = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(e for e in ends if isinstance(e, int)))
    if ends:
        found["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    return found

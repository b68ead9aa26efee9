"""What a GGUF file's metadata says of the model, as a ``config.json`` would say it.

The family's file in ``tulle.models.families`` reads that config like any other: there is one description of a family.
Every key under the architecture's name is read here, or known to change nothing, or refused by name.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tulle.errors import UserError
from tulle.models.description import Rotary
from tulle.models.gguf.names import GEMMA
from tulle.models.rotary import frequencies


@dataclass(frozen=True)
class Family:
    """How a GGUF architecture is called and stored."""

    model_type: str
    """Of ``config.json``."""
    class_name: str
    permuted: bool = False
    """Rows of q and k are stored so that neighbouring channels are rotated together (ggml's "norm" rope)."""
    head_norms: bool = False
    """Norms of queries and keys."""
    always_biased: bool = False
    """q, k and v have biases that no key tells of."""
    optional_bias: bool = False
    """``attention_bias`` and ``mlp_bias`` follow from the tensors that are there."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Modules that are called otherwise than in :data:`tulle.models.gguf.names.LAYER`."""
    norm_offset: float = 0.0
    """Added to the weights of norms in the file."""
    window_every: int = 0
    """Every so many layers one has no window; 0: windows are refused."""
    wide_layers: int = 0
    """Layers of the one size whose scores are scaled by √(width/heads) instead of √head_dim; the file does not say."""
    soft_caps: bool = False
    rotary_tables: bool = False
    """Layers with a window have a rotary table of their own, of θ = 10,000."""
    exported: bool = True
    """Whether :mod:`tulle.export.gguf` writes it."""


FAMILIES = {
    "llama": Family("llama", "LlamaForCausalLM", permuted=True, optional_bias=True),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", always_biased=True),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", head_norms=True),
    "gemma2": Family("gemma2", "Gemma2ForCausalLM", names=GEMMA, norm_offset=1.0, window_every=2, wide_layers=46,
                     soft_caps=True, exported=False),
    "gemma3": Family("gemma3_text", "Gemma3ForCausalLM", head_norms=True, names=GEMMA, norm_offset=1.0, window_every=6,
                     wide_layers=62, rotary_tables=True, exported=False),
}  # fmt: skip
"""By ``general.architecture``. Mistral's files say llama: without its window they are one function, and llama.cpp runs
them so. A new family is a line here, and what its tensors are called in ``names.py``."""

HARMLESS = {
    "vocab_size": "the embedding's shape says it",
    "attention.layer_norm_epsilon": "of another kind of norm than these families have",
    "rope.scaling.finetuned": "how the model was trained",
    "tensor_data_layout": "how an early converter ordered tensors",
    "use_parallel_residual": "these families have none",
    "attention.causal": "every model here is",
    "pooling_type": "for embeddings of texts",
}
"""Keys under the architecture's name that change nothing, and why."""

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

    def size(self, key: str, default: int | None = None) -> int:
        """A positive whole number; of a list (one per layer), the number that all of it is."""
        value = self.get(key, default)
        if isinstance(value, np.ndarray) and value.dtype.kind in "iu":
            numbers = set(value.tolist())
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
            raise UserError(
                f"expected GGUF keys that tulle knows for {self.architecture}, found {key} ({str(value)[:40]}); the "
                "model does something that tulle does not compute"
            )


def shortest(value: float) -> float:
    """The shortest decimal number that is this float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def family_of(metadata: Mapping[str, Any]) -> Family:
    """Raises ``UserError`` for an architecture that is not known, by its name."""
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        raise UserError(f"expected a GGUF architecture of {', '.join(FAMILIES)}, found {architecture!r}")
    return FAMILIES[architecture]


def config_of(
    metadata: Mapping[str, Any], vocabulary: int, stored: Container[str], rope: NDArray[np.float32] | None
) -> dict[str, Any]:
    """The config of a model. ``stored``: the names of its tensors; ``rope``: the tensor ``rope_freqs.weight``."""
    family = family_of(metadata)
    keys = _Keys(str(metadata["general.architecture"]), metadata)
    heads, hidden = keys.size("attention.head_count"), keys.size("embedding_length")
    head_dim = keys.size("attention.key_length", max(hidden // heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.size(key, head_dim) != head_dim:
            raise keys.refused(key, f"{head_dim}, as many channels as a head has", keys.get(key))
    for key in ("expert_count", "expert_used_count"):
        if keys.number(key, 0) != 0:
            raise keys.refused(key, "0 (no experts)", keys.get(key))
    window = keys.number("attention.sliding_window", 0)
    if window != 0 and not family.window_every:
        raise keys.refused("attention.sliding_window", "none", window)
    if keys.number("attention.scale", 0.0) != 0.0:
        raise keys.refused("attention.scale", "none", keys.get("attention.scale"))
    context = keys.size("context_length")
    config: dict[str, Any] = {
        "architectures": [family.class_name],
        "model_type": family.model_type,
        "hidden_size": hidden,
        "intermediate_size": keys.size("feed_forward_length"),
        "num_hidden_layers": keys.size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon", 1e-5),
        "vocab_size": vocabulary,
        "tie_word_embeddings": "output.weight" not in stored,
        "rope_theta": keys.number("rope.freq_base", 10000.0),
    }
    scaling = _rope_scaling(keys, context, head_dim, config["rope_theta"], rope)
    if scaling:
        config["rope_scaling"] = scaling
    if family.window_every:
        _make_gemma(config, keys, family)
    if family.optional_bias:
        config["attention_bias"] = "blk.0.attn_q.bias" in stored
        config["mlp_bias"] = "blk.0.ffn_down.bias" in stored
    keys.finish()
    return config | token_ids(metadata)


def _make_gemma(config: dict[str, Any], keys: _Keys, family: Family) -> None:
    """What Gemma's configs have and others do not. llama.cpp knows windows' places and the scale by the family."""
    hidden, heads, layers = config["hidden_size"], config["num_attention_heads"], config["num_hidden_layers"]
    del config["hidden_act"]
    every = keys.get("attention.sliding_window_pattern", family.window_every)
    expected = [index % family.window_every < family.window_every - 1 for index in range(layers)]
    if (every.tolist() if isinstance(every, np.ndarray) else every) not in (family.window_every, expected):
        raise keys.refused("attention.sliding_window_pattern", f"{family.window_every}", every)
    config |= {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": hidden // heads if layers == family.wide_layers else config["head_dim"],
        "sliding_window": keys.size("attention.sliding_window"),
        "layer_types": ["sliding_attention" if slides else "full_attention" for slides in expected],
        "attention_bias": False,
    }
    if family.soft_caps:
        config["attn_logit_softcapping"] = keys.number("attn_logit_softcapping", 50.0)
    cap = keys.number("final_logit_softcapping", 30.0 if family.soft_caps else 0.0)
    config["final_logit_softcapping"] = cap or None
    if family.rotary_tables:
        full = {"rope_type": "default"} | (config.pop("rope_scaling", None) or {})
        local = keys.number("rope.freq_base_swa", 10000.0)
        config["rope_parameters"] = {
            "full_attention": full | {"rope_theta": config.pop("rope_theta")},
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        }


def _rope_scaling(
    keys: _Keys, context: int, head_dim: int, theta: float, ratios: NDArray[np.float32] | None
) -> dict[str, Any] | None:
    kind = keys.text("rope.scaling.type", "none")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0))
    if kind == "none" and "rope.scale_linear" in keys.read and factor != 1:
        kind = "linear"
    original = keys.size("rope.scaling.original_context_length", context)
    attention = keys.number("rope.scaling.attn_factor", 1.0)
    log_multiplier = keys.number("rope.scaling.yarn_log_multiplier", 0.0)
    if kind != "yarn" and attention != 1 or log_multiplier != 0:
        raise keys.refused("rope.scaling", "no factor of attention", attention if attention != 1 else log_multiplier)
    if ratios is not None:
        if kind not in ("none", "linear") or kind == "linear" and factor != 1:
            raise keys.refused("rope.scaling.type", "none beside a tensor rope_freqs", kind)
        return _llama3(context, head_dim, theta, ratios)
    if kind == "none" or kind == "linear" and factor == 1:
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise keys.refused("rope.scaling.type", "none, linear or yarn", kind)
    found = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    for key, ours in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
        if keys.get(f"rope.scaling.{key}") is not None:
            found[ours] = keys.number(f"rope.scaling.{key}", 0.0)
    if attention != 1:
        # llama.cpp multiplies what the paper suggests by this.
        found["attention_factor"] = attention * (0.1 * float(np.log(factor)) + 1.0)
    return found


def _llama3(context: int, head_dim: int, theta: float, ratios: NDArray[np.float32]) -> dict[str, Any] | None:
    """The parameters of Llama 3's stretched frequencies that give these ratios ``[head_dim / 2]``."""
    if np.all(ratios == 1):
        return None
    if len(ratios) != head_dim // 2:
        raise UserError(f"expected {head_dim // 2} numbers in rope_freqs.weight, found {len(ratios)}; convert it again")
    plain, _ = frequencies(Rotary(head_dim, theta), context)
    factor = shortest(float(ratios.max(initial=1.0)))
    candidate = Rotary(
        head_dim, theta, "llama3", context, factor, int(LLAMA3["original_max_position_embeddings"]),
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

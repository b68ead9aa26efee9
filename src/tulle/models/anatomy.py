"""The anatomy table: the only file that knows Hugging Face module names.

A *row* is a group of linears that share one input: which norm feeds them, which linears produce that input, and which
residual stream their output is added to. A new architecture is a new entry of ``ARCHITECTURES``, not a fork.
"""

from __future__ import annotations

import difflib
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from tulle.errors import UserError

ROLES = ("qkv", "o", "gate_up", "down")


@dataclass(frozen=True)
class Row:
    """Linears of one decoder block that read the same input. Names are relative to the block."""

    role: str
    linears: tuple[str, ...]
    norm: str | None
    """The norm whose output they read, or None."""
    producers: tuple[str, ...]
    """The linears whose output channels become their input channels (v → o, up and gate → down)."""
    residual: str | None
    """The norm whose *input* is the residual stream that their output is added to, or None."""


LLAMA_ROWS = (
    Row("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm", (), None),
    Row("o", ("self_attn.o_proj",), None, ("self_attn.v_proj",), "input_layernorm"),
    Row("gate_up", ("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm", (), None),
    Row("down", ("mlp.down_proj",), None, ("mlp.up_proj", "mlp.gate_proj"), "post_attention_layernorm"),
)
QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")


@dataclass(frozen=True)
class Architecture:
    """One entry of the table: module names and the optional parts of a block."""

    rows: tuple[Row, ...] = LLAMA_ROWS
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens.weight"
    attention: str = "self_attn"
    final_norm: str = "model.norm.weight"
    head: str = "lm_head.weight"
    qkv_bias: bool | None = False
    """True: q, k, v always have biases; None: the config's ``attention_bias`` decides (for o as well)."""
    qk_norm: bool = False
    """RMSNorm over head_dim on q and k before RoPE."""


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(qkv_bias=None),
    "mistral": Architecture(),
    "qwen2": Architecture(qkv_bias=True),
    "qwen3": Architecture(qkv_bias=None, qk_norm=True),
}


@dataclass(frozen=True)
class Anatomy:
    """An architecture with the sizes of one config: every name and shape of the checkpoint."""

    architecture: Architecture
    model_type: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    attention_bias: bool
    mlp_bias: bool

    @property
    def rows(self) -> tuple[Row, ...]:
        return self.architecture.rows

    def row(self, role: str) -> Row:
        return next(row for row in self.rows if row.role == role)

    def embedding_name(self, stored: Container[str]) -> str:
        """The name under which the embedding is stored: a tied model may hold only one of the two."""
        embedding, head = self.architecture.embedding, self.architecture.head
        return head if embedding not in stored and self.tied and head in stored else embedding

    @property
    def query_key_norms(self) -> tuple[str, str] | None:
        """The RMSNorms over head_dim on q and on k, or None."""
        return QK_NORMS if self.architecture.qk_norm else None

    def query_heads(self, kv_head: int) -> range:
        """The query heads that share a KV head."""
        shared = self.heads // self.kv_heads
        return range(kv_head * shared, (kv_head + 1) * shared)

    @property
    def attention(self) -> str:
        """Name of a block's attention module."""
        return self.architecture.attention

    def block_prefix(self, block: int) -> str:
        return f"{self.architecture.blocks}.{block}."

    def linears(self, block: int) -> list[str]:
        """Full names of the block's linears, row by row."""
        return [self.block_prefix(block) + name for row in self.rows for name in row.linears]

    def role_of(self, name: str) -> str | None:
        """Role of a linear given by full or relative name; None for anything else."""
        for row in self.rows:
            if any(name == relative or name.endswith("." + relative) for relative in row.linears):
                return row.role
        return None

    def linear_shape(self, relative: str) -> tuple[int, int]:
        """``(C_out, C_in)`` of a linear of the block."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes = {
            "q_proj": (q, self.hidden),
            "k_proj": (kv, self.hidden),
            "v_proj": (kv, self.hidden),
            "o_proj": (self.hidden, q),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }
        return shapes[relative.rsplit(".", 1)[-1]]

    def block_tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of one block with its shape, names relative to the block."""
        shapes: dict[str, tuple[int, ...]] = {}
        for row in self.rows:
            if row.norm:
                shapes[f"{row.norm}.weight"] = (self.hidden,)
            for name in row.linears:
                shape = self.linear_shape(name)
                shapes[f"{name}.weight"] = shape
                if self._has_bias(row.role):
                    shapes[f"{name}.bias"] = (shape[0],)
        for name in self.query_key_norms or ():
            shapes[f"{name}.weight"] = (self.head_dim,)
        return shapes

    def outer_tensors(self) -> dict[str, tuple[int, ...]]:
        """Embedding, final norm and, unless tied, head, with their shapes."""
        table = (self.vocabulary, self.hidden)
        shapes: dict[str, tuple[int, ...]] = {self.architecture.embedding: table}
        shapes[self.architecture.final_norm] = (self.hidden,)
        if not self.tied:
            shapes[self.architecture.head] = table
        return shapes

    def _has_bias(self, role: str) -> bool:
        if role in ("gate_up", "down"):
            return self.mlp_bias
        if role == "qkv" and self.architecture.qkv_bias is not None:
            return self.architecture.qkv_bias
        return self.attention_bias and self.architecture.qkv_bias is None


def anatomy(config: Mapping[str, Any]) -> Anatomy:
    """The anatomy of a model from its ``config.json``.

    Raises ``UserError`` for an architecture that is not in the table and for missing or senseless sizes.
    """
    model_type = config.get("model_type")
    if model_type not in ARCHITECTURES:
        near = difflib.get_close_matches(str(model_type), ARCHITECTURES, n=1)
        hint = f"; did you mean {near[0]}?" if near else "; add a row to tulle/models/anatomy.py"
        raise UserError(f"expected model_type {', '.join(ARCHITECTURES)}, found {model_type!r}{hint}")
    heads = _size(config, "num_attention_heads")
    hidden = _size(config, "hidden_size")
    return Anatomy(
        architecture=ARCHITECTURES[model_type],
        model_type=model_type,
        hidden=hidden,
        intermediate=_size(config, "intermediate_size"),
        layers=_size(config, "num_hidden_layers"),
        heads=heads,
        kv_heads=_size(config, "num_key_value_heads", heads),
        head_dim=_size(config, "head_dim", 128 if model_type == "qwen3" else hidden // heads),
        vocabulary=_size(config, "vocab_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
        attention_bias=bool(config.get("attention_bias", False)),
        mlp_bias=bool(config.get("mlp_bias", False)),
    )


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or value < 1:
        raise UserError(
            f"expected a positive whole number for {key} in config.json, found {value!r}; repair the config"
        )
    return value

"""The configuration: one model, in which each dense part can be replaced by its sparse one."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from tulle.errors import UserError

POSITIONS = ("rope", "none")


@strict
class ScalingTransformerConfig(PreTrainedConfig):
    """Defaults are the paper's 800M shape. ``None`` for ``ff_block``, ``qkv_modules`` and ``loss_modules`` is the dense
    part; the rest of the model stays as it is, so that variants are one setting apart.

    Raises ``UserError`` for sizes that do not divide.
    """

    model_type = "scaling_transformer"
    keys_to_ignore_at_inference = ["past_key_values"]
    default_theta = 10_000.0

    vocab_size: int = 32_000
    hidden_size: int = 1024
    """d"""
    intermediate_size: int = 6144
    """d_ff"""
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    """Standard deviation of the embedding; other weights follow the paper's code (see modeling.py)."""
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True
    rope_parameters: RopeParameters | dict | None = None
    position_embedding: str = "rope"
    """``rope``, or ``none``: order is then seen by the causal mask and the convolutions alone."""
    attention_bias: bool = True
    attention_dropout: int | float | None = 0.0
    ff_block: int | None = 64
    """N: one unit in every N of the feed-forward may be non-zero."""
    ff_lowrank: int | None = None
    """d_lowrank of the controller; None: d/N, as in the paper."""
    ff_temperature: float = 0.1
    """Factor on the Gumbel noise in training."""
    ff_hard_probability: float = 0.3
    """Share of training passes in which a layer uses the one-hot choice (straight-through) instead of the softmax."""
    qkv_modules: int | None = 16
    """S: modules of size M = d/S of the multiplicative layer and the convolutions."""
    loss_modules: int | None = None
    """S of a multiplicative layer in place of the head (the paper's sparse loss layer)."""
    layer_types: list[str] | None = None
    """Follows from ``qkv_modules``: tells transformers' caches to hold the convolutions' inputs beside keys, values."""

    def __post_init__(self, **kwargs: Any) -> None:
        self.layer_types = ["full_attention" if self.qkv_modules is None else "hybrid"] * self.num_hidden_layers
        super().__post_init__(**kwargs)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def controller_rank(self) -> int:
        """d_lowrank."""
        return self.ff_lowrank or max(1, self.hidden_size // (self.ff_block or 1))

    def validate_architecture(self) -> None:
        """Called by transformers when a config is made or saved."""
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            _positive(name, getattr(self, name))
        for name in ("ff_block", "ff_lowrank", "qkv_modules", "loss_modules"):
            if getattr(self, name) is not None:
                _positive(name, getattr(self, name))
        _divides("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        _divides("intermediate_size", self.intermediate_size, "ff_block", self.ff_block)
        _divides("hidden_size", self.hidden_size, "qkv_modules", self.qkv_modules)
        _divides("vocab_size", self.vocab_size, "loss_modules", self.loss_modules)
        if self.position_embedding not in POSITIONS:
            raise UserError(
                f"expected position_embedding {' or '.join(POSITIONS)}, found {self.position_embedding!r}; try rope"
            )
        if self.position_embedding == "rope" and self.head_dim % 2:
            raise UserError(
                f"expected an even head size for RoPE, found {self.hidden_size}/{self.num_attention_heads} = "
                f"{self.head_dim}; try another num_attention_heads or position_embedding none"
            )
        if not 0 <= self.ff_hard_probability <= 1:
            raise UserError(
                f"expected ff_hard_probability from 0 to 1, found {self.ff_hard_probability}; the paper has 0.3"
            )
        if self.ff_temperature < 0:
            raise UserError(f"expected ff_temperature of at least 0, found {self.ff_temperature}; the paper has 0.1")
        if self.loss_modules is not None and self.tie_word_embeddings:
            raise UserError(
                "expected tie_word_embeddings false with loss_modules, found true; a multiplicative head has no matrix "
                "that the embedding could share: set one of the two"
            )


def _positive(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise UserError(
            f"expected a whole number of at least 1 for {name}, found {value!r}; leave it out for the default"
        )


def _divides(name: str, size: int, divisor_name: str, divisor: int | None) -> None:
    if divisor is not None and size % divisor:
        below = size // divisor * divisor
        raise UserError(
            f"expected {name} to be a multiple of {divisor_name}, found {size} and {divisor}; "
            f"try {name} {below or divisor} or {below + divisor}"
        )

"""The shape of a new model, as a training recipe says it.

A Llama needs no type. Any other architecture that transformers knows is named by its ``model_type``::

    model: {hidden_size: 512, intermediate_size: 1408, num_hidden_layers: 8, …}
    model: {model_type: scaling_transformer, hidden_size: 128, ff_block: 64, qkv_modules: 8, …}

Keys are those of the architecture's config. Vocabulary, context and special tokens come from the rest of the recipe.
"""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tulle.errors import UserError

GIVEN = frozenset({"vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"})
"""What the recipe's other parts decide."""


class Llama(BaseModel):
    """A Llama: the names are transformers' ``LlamaConfig``'s."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    hidden_size: int = Field(gt=0)
    """d, channels of the residual stream."""
    intermediate_size: int = Field(gt=0)
    """Channels between gate, up and down."""
    num_hidden_layers: int = Field(gt=0)
    """Decoder blocks."""
    num_attention_heads: int = Field(gt=0)
    """Query heads."""
    num_key_value_heads: int = Field(gt=0)
    """KV heads; they divide the query heads."""
    head_dim: int = Field(gt=0)
    """Channels of a head."""
    rope_theta: float = Field(default=10_000.0, gt=0)
    """Base θ of the rotary position embedding."""
    tie_word_embeddings: bool = True
    """Whether embedding and output head are one matrix."""

    @model_validator(mode="after")
    def _grouped(self) -> Llama:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
        return self

    def build(self, vocab_size: int, context: int) -> PreTrainedModel:
        """A freshly initialised float32 model, by transformers' own initialisation and torch's generator."""
        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            tie_word_embeddings=self.tie_word_embeddings,
            max_position_embeddings=context,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            bos_token_id=0,  # <|endoftext|> is the first entry of our vocabularies
            eos_token_id=0,
            pad_token_id=None,
        )
        return LlamaForCausalLM(config)


class OtherModel(BaseModel):
    """``model_type`` and settings of its config."""

    model_config = ConfigDict(extra="allow", frozen=True)
    model_type: str

    def make_config(self, vocab_size: int, context: int) -> Any:
        """The transformers config. Raises ``UserError`` for an unknown type, unknown settings and impossible ones."""
        from transformers import CONFIG_MAPPING, AutoConfig

        import tulle.hf  # noqa: F401 (registers the architectures that are ours)

        if self.model_type not in CONFIG_MAPPING:
            near = difflib.get_close_matches(self.model_type, CONFIG_MAPPING.keys(), n=1)
            advice = f"did you mean {near[0]!r}?" if near else "try scaling_transformer"
            raise UserError(f"expected a model_type that transformers knows, found {self.model_type!r}; {advice}")
        settings = dict(self.__pydantic_extra__ or {})
        known = {field.name for field in fields(CONFIG_MAPPING[self.model_type])} - GIVEN
        for key in settings:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
                advice = f"did you mean '{near[0]}'?" if near else "see the config of that architecture"
                raise UserError(f"unknown key 'model.{key}'; {advice}")
        settings |= {"vocab_size": vocab_size, "max_position_embeddings": context}
        settings |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}  # <|endoftext|> is our first entry
        try:
            return AutoConfig.for_model(self.model_type, **settings)
        except (ValueError, TypeError) as error:
            raise UserError(
                f"expected settings that {self.model_type} takes, found: {' '.join(str(error).split())}; mend 'model'"
            ) from None

    def build(self, vocab_size: int, context: int) -> PreTrainedModel:
        """A freshly initialised float32 model. Raises ``UserError`` as :meth:`make_config` does."""
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            self.make_config(vocab_size, context), dtype=torch.float32
        )
        return model


def kind(value: Any) -> str:
    """``other`` for a model that says its type, else ``llama``."""
    typed = "model_type" in value if isinstance(value, dict) else isinstance(value, OtherModel)
    return "other" if typed else "llama"


TAGS = ("llama", "other")
"""What pydantic puts into the location of an error beside the keys of the recipe."""
AnyModel = Annotated[Annotated[Llama, Tag("llama")] | Annotated[OtherModel, Tag("other")], Discriminator(kind)]

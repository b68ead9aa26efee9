"""A new model of any architecture that transformers knows, as a training recipe says it::

    model: {model_type: scaling_transformer, hidden_size: 128, ff_block: 64, qkv_modules: 8, …}

Keys are those of the architecture's config; vocabulary, context and special tokens come from the rest of the recipe.
"""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Any

from pydantic import BaseModel, ConfigDict

from tulle.errors import UserError

GIVEN = frozenset({"vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"})
"""What the recipe's other parts decide."""


class OtherModel(BaseModel):
    """``model_type`` and settings of its config."""

    model_config = ConfigDict(extra="allow", frozen=True)
    model_type: str

    def make_config(self, vocab_size: int, context: int) -> Any:
        """The transformers config. Raises ``UserError`` for an unknown type, unknown settings and impossible ones."""
        from transformers import CONFIG_MAPPING, AutoConfig

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


def kind(value: Any) -> str:
    """``other`` for a model that says its type, else ``llama``."""
    typed = "model_type" in value if isinstance(value, dict) else isinstance(value, OtherModel)
    return "other" if typed else "llama"

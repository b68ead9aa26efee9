"""Tools and calls of them for tests of formats, and a tokenizer whose tokens are bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tulle.text.tokenizer import ModelTokenizer
from tulle.text.tool_formats import Delta, Parser, ToolFormat, joined
from tulle.text.tool_formats.detection import FORMATS

POINT = {
    "type": "object",
    "properties": {"x": {"type": "number"}, "y": {"anyOf": [{"type": "boolean"}, {"type": "null"}]}},
    "required": ["x"],
    "additionalProperties": False,
}
PARAMETERS: dict[str, dict[str, Any]] = {
    "weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "unit": {"type": "string", "enum": ["c", "celsius"]},
            "days": {"type": "integer", "minimum": 0, "maximum": 14},
        },
        "required": ["city"],
        "additionalProperties": False,
    },
    "plot": {
        "type": "object",
        "$defs": {"Point": POINT},
        "properties": {
            "points": {"type": "array", "items": {"$ref": "#/$defs/Point"}, "minItems": 1, "maxItems": 3},
            "label": {"type": "string", "minLength": 1, "maxLength": 5},
        },
        "required": ["points", "label"],
        "additionalProperties": False,
    },
    "now": {"type": "object", "properties": {}, "additionalProperties": False},
}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": f"Does {name}.", "parameters": schema}}
    for name, schema in PARAMETERS.items()
]
END_OF_TEXT = "<end>"


def byte_tokenizer(added: Sequence[str] = (), **options: Any) -> ModelTokenizer:
    """A token per byte, and the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT, *added])
    return ModelTokenizer(tokenizer, **options)


def format_named(name: str, **options: Any) -> ToolFormat:
    return next(kind for kind in FORMATS if kind.name == name)(**options)


def numbered(parser: Parser, pieces: Sequence[str]) -> list[Delta]:
    """The joined deltas of a text in pieces; no piece is empty."""
    deltas = [delta for piece in pieces for delta in parser.push(piece)] + parser.end()
    assert all(getattr(delta, "text", "x") for delta in deltas)
    return joined(deltas)

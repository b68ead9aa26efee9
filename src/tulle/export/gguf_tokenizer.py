"""A folder's tokenizer in a GGUF file's words: tables for llama.cpp, or the whole ``tokenizer.json``.

llama.cpp knows two kinds that the ``tokenizers`` library's files can be: byte-level BPE whose cutting of texts has a
name (``tulle.models.gguf.tokenizer.PRE``), and SentencePiece's BPE. What fits neither travels as
``tokenizer.huggingface.json``, with ``tokenizer.ggml.model`` no_vocab: Tulle reads that, llama.cpp runs the model on
token ids alone. Which it is, is tried: the tables are made, read again, and have to cut texts like the original.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
from tokenizers import Tokenizer

from tulle.errors import UserError
from tulle.export.gguf_metadata import add_key
from tulle.models.checkpoint import Checkpoint
from tulle.models.gguf.tokenizer import (
    BYTE,
    CONTROL,
    GPT2,
    NORMAL,
    PRE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    WHOLE,
    tokenizer_of,
)

SAMPLES = (
    "The quick brown fox doesn't jump over 12,345 lazy dogs; it's 3.14159 metres (2024-11-29).",
    "def f(x):\n    return x ** 2  # a comment\n\n\n\tif  x:\r\n  pass",
    " leading and trailing spaces   ", "ALLCAPS CamelCase snake_case WE'LL don't",
    "naïve café Ελληνικά русский 日本語テスト 한국어 ไทย हिन्दी العربية 😀👩‍👩‍👧", "e\u0301 ﬁ ½ ² Ⅷ １２３",
    "", "\n", "a", "…—“quoted”",
)  # fmt: skip
"""Texts that a tokenizer and its copy must cut alike."""


def write_tokenizer(writer: gguf.GGUFWriter, checkpoint: Checkpoint, vocabulary: int, notes: list[str]) -> None:
    """Adds tokenizer, special tokens and chat template to a file. A folder without tokenizer gets a note."""
    folder = checkpoint.source.tokenizer
    file = folder / "tokenizer.json"
    if not file.is_file():
        writer.add_tokenizer_model("no_vocab")
        notes.append("the model has no tokenizer.json: the file holds no tokenizer")
        return
    text = file.read_text(encoding="utf-8")
    try:
        tokenizer, data = Tokenizer.from_str(text), json.loads(text)
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"expected a tokenizer in {file}, found: {error}; save it again with transformers") from None
    settings = _settings(folder)
    special = _special_ids(checkpoint.config, settings, tokenizer)
    tables, why = None, "llama.cpp knows no such kind of tokenizer"
    for made in (_byte_level(data), _sentencepiece(data)):
        if made is None:
            continue
        candidate = made | _tokens(data, tokenizer, vocabulary, made) | special | _edges(tokenizer, special)
        difference = _difference(tokenizer, candidate, data.get("normalizer") == NFC)
        if difference is None:
            tables = candidate
            if data.get("normalizer") == NFC:
                notes.append("the tokenizer composes texts (NFC), which GGUF cannot say: give composed texts")
            break
        why = f"made for llama.cpp it would cut {difference!r} in another way"
    if tables is None:
        tables = {"tokenizer.ggml.model": "no_vocab", WHOLE: text} | special
        notes.append(
            f"{why}: the file holds the whole tokenizer.json, which Tulle reads; llama.cpp takes token ids only"
        )
    for key, value in tables.items():
        add_key(writer, key, value)
    _add_templates(writer, folder, settings)


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError:
        found = {}
    return found if isinstance(found, dict) else {}


def _special_ids(config: Mapping[str, Any], settings: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, int]:
    """Ids of BOS, EOS, what ends a turn, padding, unknown."""
    found: dict[str, int] = {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        named = settings.get(f"{role}_token")
        named = named.get("content") if isinstance(named, dict) else named
        number = tokenizer.token_to_id(named) if isinstance(named, str) else None
        stated = config.get(f"{role}_token_id")
        if number is None and isinstance(stated, int) and not isinstance(stated, bool):
            number = stated
        if number is not None:
            found[f"tokenizer.ggml.{key}_token_id"] = number
    ends = config.get("eos_token_id")
    more = [e for e in ends if e != found.get("tokenizer.ggml.eos_token_id")] if isinstance(ends, list) else []
    for key, number in zip(("eot", "eom"), more, strict=False):
        found[f"tokenizer.ggml.{key}_token_id"] = number
    return found


def _edges(tokenizer: Tokenizer, special: Mapping[str, int]) -> dict[str, bool]:
    """Whether texts begin with BOS and end with EOS."""
    around = tokenizer.encode("a").ids
    bos, eos = (special.get(f"tokenizer.ggml.{role}_token_id") for role in ("bos", "eos"))
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    return {
        "tokenizer.ggml.add_bos_token": around[:1] == [bos] and plain[:1] != [bos],
        "tokenizer.ggml.add_eos_token": around[-1:] == [eos] and plain[-1:] != [eos],
    }


def _tokens(data: Mapping[str, Any], tokenizer: Tokenizer, vocabulary: int, made: Mapping[str, Any]) -> dict[str, Any]:
    """Tokens in the order of their ids, and of what type each is; rows of the embedding without a token are unused."""
    names = {number: token for token, number in tokenizer.get_vocab(with_added_tokens=True).items()}
    added = {entry["id"]: entry for entry in data.get("added_tokens") or ()}
    unknown = data["model"].get("unk_token")
    bytes_too = bool(data["model"].get("byte_fallback"))
    tokens, kinds = [], []
    for number in range(max(vocabulary, max(names, default=-1) + 1)):
        token = names.get(number)
        kind = NORMAL
        if token is None:
            token, kind = f"[PAD{number}]", UNUSED
        elif token == unknown and made["tokenizer.ggml.model"] == "llama":
            kind = UNKNOWN
        elif number in added:
            kind = CONTROL if added[number].get("special") else USER_DEFINED
        elif bytes_too and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            kind = BYTE
        tokens.append(token)
        kinds.append(kind)
    found: dict[str, Any] = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    if made["tokenizer.ggml.model"] == "llama":
        ranks: dict[str, int] = {}
        for rank, (left, right) in enumerate(_pairs(data)):
            ranks.setdefault(left + right, rank)
        last = float(len(ranks) + 1)
        found["tokenizer.ggml.scores"] = [-float(ranks.get(token, last)) for token in tokens]
    return found


def _pairs(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Merges, which older files write as one string."""
    found = (m.split(" ", 1) if isinstance(m, str) else m for m in data["model"].get("merges") or ())
    return [(left, right) for left, right in found]


def _byte_level(data: Mapping[str, Any]) -> dict[str, Any] | None:
    """The kind gpt2, where the way in which texts are cut has a name."""
    model = data["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback") or data.get("normalizer") not in (None, NFC):
        return None
    cuts = _cuts(data.get("pre_tokenizer"))
    for name, pre in PRE.items():
        if cuts == pre.cuts and bool(model.get("ignore_merges")) == pre.ignore_merges:
            merges = [f"{left} {right}" for left, right in _pairs(data)]
            return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name, "tokenizer.ggml.merges": merges}
    return None


NFC = {"type": "NFC"}


def _cuts(pre: Mapping[str, Any] | None) -> tuple[str, ...] | None:
    """The regular expressions of a byte-level pre-tokenizer; None for another one."""
    steps = pre.get("pretokenizers", [pre]) if pre else []
    found = []
    for step in steps:
        kind = step.get("type")
        if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            found.append(step["pattern"].get("Regex"))
        elif kind == "Digits" and step.get("individual_digits"):
            found.append(r"\p{N}")
        elif kind == "ByteLevel" and not step.get("add_prefix_space"):
            if step.get("use_regex", True):
                found.append(GPT2)
            return tuple(found)
        else:
            return None
    return None


def _sentencepiece(data: Mapping[str, Any]) -> dict[str, Any] | None:
    """The kind llama."""
    model = data["model"]
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        return None
    text = json.dumps([data.get("normalizer"), data.get("pre_tokenizer")])
    prefix = '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text
    return {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", "tokenizer.ggml.add_space_prefix": prefix}


def _difference(tokenizer: Tokenizer, tables: Mapping[str, Any], composed: bool) -> str | None:
    """A text that the tables cut in another way; None where there is none among the samples. ``composed``: compared
    are texts in Unicode's composed form, since llama.cpp never composes."""
    made = tokenizer_of(tables).tokenizer
    for sample in SAMPLES:
        text = unicodedata.normalize("NFC", sample) if composed else sample
        for special in (False, True):
            mine = tokenizer.encode(text, add_special_tokens=special).ids
            if mine != made.encode(text, add_special_tokens=special).ids:
                return text
    return None


def _add_templates(writer: gguf.GGUFWriter, folder: Path, settings: Mapping[str, Any]) -> None:
    """The chat template; of several the one named default, and all under their names."""
    file = folder / "chat_template.jinja"
    template = file.read_text(encoding="utf-8") if file.is_file() else settings.get("chat_template")
    more = folder / "additional_chat_templates"
    named = [{"name": f.stem, "template": f.read_text(encoding="utf-8")} for f in sorted(more.glob("*.jinja"))]
    if named and isinstance(template, str):
        template = [{"name": "default", "template": template}, *named]
    if template:
        writer.add_chat_template(template)

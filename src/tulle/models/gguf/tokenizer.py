"""The tokenizer that a GGUF file holds, for the ``tokenizers`` library.

* ``tokenizer.ggml.model`` **gpt2**: byte-level BPE. How a text is cut before the merges is not in the file, only its
  name (``tokenizer.ggml.pre``): :data:`PRE` has the regular expressions.
* **llama**: SentencePiece's BPE, with scores instead of merges, and bytes for what has no token. The pair whose token
  has the highest score is merged first; so merges in falling order of scores do the same.
* **gemma4**: the same with merges of its own, and nothing put before a text.

Control tokens are special, user-defined ones are found in the text before anything else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from tulle.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""``tokenizer.ggml.token_type``."""

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _words(digits: str, other_end: str = r"[\r\n]*", marks: str = "") -> str:
    """Llama 3's expression and its relatives': words with one character before them, ``digits``, punctuation, space.
    ``marks``: a class of characters that are parts of words, too."""
    letter = rf"[\p{{L}}{marks}]" if marks else r"\p{L}"
    return (
        CONTRACTIONS + rf"|[^\r\n\p{{L}}\p{{N}}]?{letter}+|{digits}| ?[^\s\p{{L}}{marks}\p{{N}}]+{other_end}"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


def _cased(contractions: str, digits: str) -> str:
    """Tekken's and GPT-4o's: words end where lower case is followed by upper case."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    start = r"[^\r\n\p{L}\p{N}]?"
    return (
        f"{start}{upper}*{lower}+{contractions}|{start}{upper}+{lower}*{contractions}|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


@dataclass(frozen=True)
class Pre:
    """How a text is cut before merges."""

    cuts: tuple[str, ...]
    """Regular expressions, one after the other: what matches is cut out."""
    ignore_merges: bool = False
    """A piece that is a token is taken whole, whatever the merges."""
    bos: bool = False
    """Texts begin with BOS where the file does not say."""


PRE = {
    "gpt-2": Pre((GPT2,)),
    "smollm": Pre((r"\p{N}", GPT2)),
    "starcoder": Pre((r"\p{N}", GPT2)),
    "qwen2": Pre((_words(r"\p{N}"),)),
    "qwen35": Pre((_words(r"\p{N}", marks=r"\p{M}"),)),
    "llama-bpe": Pre((_words(r"\p{N}{1,3}"),), ignore_merges=True, bos=True),
    "dbrx": Pre((_words(r"\p{N}{1,3}"),)),
    "tekken": Pre((_cased("", r"\p{N}"),), ignore_merges=True, bos=True),
    "gpt-4o": Pre((_cased(CONTRACTIONS + "?", r"\p{N}{1,3}"),)),
}  # fmt: skip
"""By ``tokenizer.ggml.pre``."""
SAME = {
    "phi-2": "gpt-2", "jina-es": "gpt-2", "jina-de": "gpt-2", "gigachat": "gpt-2", "olmo": "gpt-2", "mpt": "gpt-2",
    "refact": "starcoder", "command-r": "starcoder", "codeshell": "starcoder", "exaone": "starcoder",
    "llama3": "llama-bpe", "llama-v3": "llama-bpe", "lfm2": "llama-bpe", "smaug-bpe": "dbrx",
    "deepseek-r1-qwen": "qwen2", "stablelm2": "qwen2", "megrez": "qwen2", "llama4": "gpt-4o",
}  # fmt: skip
"""Names of what another one does."""


WITHOUT = ("no_vocab", "none")
"""``tokenizer.ggml.model`` of files that hold no tokenizer for llama.cpp."""
WHOLE = "tokenizer.huggingface.json"
"""A whole ``tokenizer.json``: how Tulle exports what llama.cpp has no name for."""


@dataclass(frozen=True)
class GgufTokenizer:
    """A tokenizer, and what its ``tokenizer_config.json`` says."""

    tokenizer: Tokenizer
    settings: dict[str, Any]


def tokenizer_of(metadata: Mapping[str, Any]) -> GgufTokenizer:
    """The tokenizer of a file's metadata. Raises ``UserError`` for a kind or a ``pre`` that is not known, by its name,
    and for tables that do not fit each other."""
    model = metadata.get("tokenizer.ggml.model")
    if not isinstance(model, str):
        raise UserError(f"expected a name as tokenizer.ggml.model in the GGUF file, found {model!r:.80}")
    if model in WITHOUT and isinstance(whole := metadata.get(WHOLE), str):
        return _whole(metadata, whole)
    try:
        tokens, kinds = _tokens(metadata)
        if model == "gpt2":
            tokenizer, bos = _byte_level(metadata, tokens)
        elif model == "llama":
            tokenizer, bos = _sentencepiece(metadata, tokens, kinds)
        elif model == "gemma4":
            tokenizer, bos = _with_spaces(tokens, kinds, _merges(metadata), prefix=False), True
        else:
            raise UserError(f"expected a GGUF tokenizer of the model gpt2, llama or gemma4, found {model!r}")
        added = [
            AddedToken(token, special=kind == CONTROL, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (CONTROL, USER_DEFINED) and token
        ]
        tokenizer.add_tokens(added)
    except UserError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"expected a GGUF tokenizer whose tables fit each other, found: {error}") from None
    names = _roles(metadata, dict(enumerate(tokens)))
    starts = _flag(metadata, "add_bos_token", bos) and "bos" in names
    ends = _flag(metadata, "add_eos_token", False) and "eos" in names
    _surround(tokenizer, names["bos"] if starts else None, names["eos"] if ends else None)
    return GgufTokenizer(tokenizer, _settings(metadata, names, starts, ends))


def _flag(metadata: Mapping[str, Any], key: str, default: bool) -> bool:
    found = metadata.get(f"tokenizer.ggml.{key}", default)
    if not isinstance(found, bool):
        raise UserError(f"expected true or false for tokenizer.ggml.{key} in the GGUF file, found {found!r:.80}")
    return found


def _whole(metadata: Mapping[str, Any], text: str) -> GgufTokenizer:
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"expected a tokenizer.json in {WHOLE} of the GGUF file, found: {error}") from None
    names = _roles(metadata, {number: token for token, number in tokenizer.get_vocab().items()})
    around = tokenizer.encode("").ids
    edges = {role: tokenizer.token_to_id(names[role]) in around if role in names else False for role in ("bos", "eos")}
    return GgufTokenizer(tokenizer, _settings(metadata, names, edges["bos"], edges["eos"]))


def _roles(metadata: Mapping[str, Any], tokens: Mapping[int, str]) -> dict[str, str]:
    """Which tokens begin and end texts, stand for what is unknown, and pad."""
    found = {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(number, int) and number in tokens:
            found[role] = tokens[number]
    return found


def _settings(metadata: Mapping[str, Any], names: Mapping[str, str], starts: bool, ends: bool) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**9,
        "add_bos_token": starts,
        "add_eos_token": ends,
    }
    settings |= {f"{role}_token": token for role, token in names.items()}
    template = chat_template(metadata)
    if template is not None:
        settings["chat_template"] = template
    return settings


def chat_template(metadata: Mapping[str, Any]) -> str | list[dict[str, str]] | None:
    """The chat template, or a list of named ones where the file has several."""
    first = metadata.get("tokenizer.chat_template")
    named = metadata.get("tokenizer.chat_templates")
    found = [{"name": "default", "template": first}] if isinstance(first, str) else []
    for name in named if isinstance(named, list) else ():
        template = metadata.get(f"tokenizer.chat_template.{name}")
        if isinstance(template, str):
            found.append({"name": str(name), "template": template})
    if len(found) == 1 and found[0]["name"] == "default":
        return found[0]["template"]
    return found or None


def _tokens(metadata: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(t, str) for t in tokens):
        raise UserError("expected tokenizer.ggml.tokens in the GGUF file, found none; the file holds no tokenizer")
    found = metadata.get("tokenizer.ggml.token_type")
    if found is not None and not (
        isinstance(found, np.ndarray | list) and all(isinstance(kind, int | np.integer) for kind in found)
    ):
        raise UserError(f"expected whole numbers as tokenizer.ggml.token_type, found {found!r:.80}")
    kinds = [NORMAL] * len(tokens) if found is None else [int(kind) for kind in found]
    if len(kinds) != len(tokens):
        raise UserError(f"expected a type for each of {len(tokens)} tokens, found {len(kinds)}; convert the file again")
    return tokens, kinds


def _vocabulary(tokens: list[str]) -> dict[str, int]:
    """The first of equal tokens counts."""
    found: dict[str, int] = {}
    for number, token in enumerate(tokens):
        found.setdefault(token, number)
    return found


def _byte_level(metadata: Mapping[str, Any], tokens: list[str]) -> tuple[Tokenizer, bool]:
    """The tokenizer, and whether texts begin with BOS where the file does not say."""
    name = metadata.get("tokenizer.ggml.pre")
    if name is None:
        raise UserError(
            "expected tokenizer.ggml.pre beside a gpt2 tokenizer in the GGUF file, found none; the file is older than "
            "May 2024, when texts were cut wrongly: convert it again"
        )
    pre = PRE.get(SAME.get(str(name), str(name)))
    if pre is None:
        known = ", ".join(sorted({*PRE, *SAME}))
        raise UserError(f"expected tokenizer.ggml.pre of {known}, found {name!r}; give the Hugging Face folder")
    model = models.BPE(_vocabulary(tokens), _merges(metadata), ignore_merges=pre.ignore_merges)
    tokenizer = Tokenizer(model)
    cuts = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in pre.cuts]
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, bytes_of])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre.bos


def _merges(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise UserError("expected tokenizer.ggml.merges in the GGUF file, found none; convert it again")
    parts = (str(merge).partition(" ") for merge in merges)
    return [(left, right) for left, _, right in parts]


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], kinds: list[int]) -> tuple[Tokenizer, bool]:
    """The tokenizer, and whether texts begin with BOS where the file does not say."""
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray | list) or len(scores) != len(tokens):
        raise UserError(f"expected tokenizer.ggml.scores of {len(tokens)} tokens, found none; convert the file again")
    if _flag(metadata, "remove_extra_whitespaces", False):
        raise UserError("expected a llama tokenizer that keeps white space, found remove_extra_whitespaces")
    merged = [n for n, kind in enumerate(kinds) if kind in (NORMAL, USER_DEFINED, UNUSED)]
    known = {tokens[n] for n in merged}
    ranked = sorted((-float(scores[n]), n) for n in merged)
    pairs = [
        (token[:cut], token[cut:])
        for _, n in ranked
        for token in (tokens[n],)
        for cut in range(1, len(token))
        if token[:cut] in known and token[cut:] in known
    ]
    return _with_spaces(tokens, kinds, pairs, _flag(metadata, "add_space_prefix", True)), True


def _with_spaces(tokens: list[str], kinds: list[int], pairs: list[tuple[str, str]], prefix: bool) -> Tokenizer:
    """BPE of whole texts in which ▁ stands for a space; ``prefix``: one is put before the text."""
    unknown = next((token for token, kind in zip(tokens, kinds, strict=True) if kind == UNKNOWN), None)
    bytes_too = BYTE in kinds
    model = models.BPE(_vocabulary(tokens), pairs, unk_token=unknown, fuse_unk=True, byte_fallback=bytes_too)
    tokenizer = Tokenizer(model)
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def _surround(tokenizer: Tokenizer, bos: str | None, eos: str | None) -> None:
    """Makes texts begin with BOS and end with EOS, where they are given."""
    if bos is None and eos is None:
        return
    single = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
    pair = [*single, *(f"{part}:1" for part in ([*([bos] if bos else []), "$B", *([eos] if eos else [])]))]
    special = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys((bos, eos)) if token]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)

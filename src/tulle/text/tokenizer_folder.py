"""The tokenizer of a model folder, read as transformers 5 reads it.

A folder spreads its tokenizer over many files: ``tokenizer.json``, ``tokenizer_config.json``,
``special_tokens_map.json``, ``added_tokens.json``, ``chat_template.jinja``, ``additional_chat_templates/``; or it has a
SentencePiece ``tokenizer.model``, or ``vocab.json`` with ``merges.txt``. What each file may say, and which wins, is
transformers' rule: tests compare token ids with ``AutoTokenizer``.

Some of transformers' classes replace parts of what ``tokenizer.json`` says by their own (:data:`CLASSES`). They are
replaced here in the same way, so that every command sees the same tokens.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from tulle import cache
from tulle.errors import UserError
from tulle.text import sentencepiece
from tulle.text.charsmap import check_charsmap
from tulle.text.chat_template import DEFAULT
from tulle.text.sentencepiece import SPACE
from tulle.text.tokenizer import ModelTokenizer

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Special tokens that every model may have."""
GENERIC = "TokenizersBackend"
"""The class that takes ``tokenizer.json`` as it is."""
CONVERSION = 1
"""Counts changes of the conversion."""

Parts = tuple[Any, Any, Any]
"""Normalizer, pre-tokenizer, decoder."""


@dataclass(frozen=True)
class TokenizerClass:
    """What a class of transformers puts in the place of what ``tokenizer.json`` says."""

    parts: Callable[[Mapping[str, Any]], Parts]
    """From ``tokenizer_config.json``."""
    special: Mapping[str, str | None]
    """Special tokens where the configuration does not name them."""
    fuse_unknown: bool = False
    byte_fallback: bool = False
    unknown: bool = False
    """Characters without a token become the unknown token; else they vanish."""
    add_bos: bool | None = None
    """Whether it decides over BOS itself, whatever ``tokenizer.json`` says, and adds one."""


def _spaces_marked(prefix: str, strip: bool) -> Parts:
    return None, pre_tokenizers.Metaspace(SPACE, prefix, split=False), sentencepiece.decoder_of(strip)


def _llama(settings: Mapping[str, Any]) -> Parts:
    if settings.get("add_prefix_space") is False:
        return _spaces_marked("never", False)
    return _spaces_marked("always" if settings.get("legacy") else "first", True)


def _code_llama(settings: Mapping[str, Any]) -> Parts:
    return _spaces_marked("never" if settings.get("add_prefix_space") is False else "first", True)


def _gemma(settings: Mapping[str, Any]) -> Parts:
    pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return normalizers.Replace(" ", SPACE), pre_tokenizer, sentencepiece.decoder_of(False)


def _bytes(normalizer: Any, *before: Any) -> Callable[[Mapping[str, Any]], Parts]:
    """Byte-level BPE with GPT-2's pieces, after other cuts."""

    def parts(settings: Mapping[str, Any]) -> Parts:
        last = pre_tokenizers.ByteLevel(add_prefix_space=bool(settings.get("add_prefix_space")))
        return normalizer, pre_tokenizers.Sequence([*before, last]) if before else last, decoders.ByteLevel()

    return parts


def _qwen(letter: str, other: str) -> Callable[[Mapping[str, Any]], Parts]:
    """Byte-level BPE with Qwen's pieces: ``letter`` and ``other`` are classes of characters."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?" + letter + r"+|\p{N}| ?" + other + r"+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )

    def parts(settings: Mapping[str, Any]) -> Parts:
        cut = pre_tokenizers.Split(Regex(pattern), "isolated")
        prefix = bool(settings.get("add_prefix_space"))
        last = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
        return normalizers.NFC(), pre_tokenizers.Sequence([cut, last]), decoders.ByteLevel()

    return parts


_SENTENCE_PIECE = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_INFILLING = {"prefix_token": "▁<PRE>", "middle_token": "▁<MID>", "suffix_token": "▁<SUF>"}
_INFILLING |= {"eot_token": "▁<EOT>", "fill_token": "<FILL_ME>"}
_END_OF_TEXT = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
_QWEN = dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")
CLASSES = {
    "LlamaTokenizer": TokenizerClass(_llama, _SENTENCE_PIECE, fuse_unknown=True, byte_fallback=True),
    "CodeLlamaTokenizer": TokenizerClass(
        _code_llama, _SENTENCE_PIECE | _INFILLING, fuse_unknown=True, byte_fallback=True, unknown=True, add_bos=True
    ),
    "GemmaTokenizer": TokenizerClass(
        _gemma,
        {
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "unk_token": "<unk>",
            "pad_token": "<pad>",
            "mask_token": "<mask>",
        },
        fuse_unknown=True,
        byte_fallback=True,
        unknown=True,
    ),
    "GPT2Tokenizer": TokenizerClass(_bytes(None), _END_OF_TEXT),
    "GPTNeoXTokenizer": TokenizerClass(
        _bytes(normalizers.NFC()), _END_OF_TEXT | {"pad_token": "<|padding|>"}, add_bos=False
    ),
    "Qwen2Tokenizer": TokenizerClass(_qwen(r"\p{L}", r"[^\s\p{L}\p{N}]"), _QWEN),
    "Qwen3_5Tokenizer": TokenizerClass(_qwen(r"[\p{L}\p{M}]", r"[^\s\p{L}\p{M}\p{N}]"), _QWEN),
}
"""Classes of transformers 5 that rebuild a byte-pair encoding; all others here take ``tokenizer.json`` as it is."""
CLASS_OF_TYPE = {
    name: kind
    for kind, names in {
        GENERIC: (
            "ernie4_5", "ernie4_5_moe", "flex_olmo", "glm", "glm4", "glm4_moe", "gpt_bigcode", "granite", "granitemoe",
            "granitemoehybrid", "granitemoeshared", "internlm2", "internlm3", "jamba", "minicpm3", "minimax_m2",
            "ministral", "ministral3", "mistral", "mistral3", "mixtral", "nemotron", "olmo2", "olmo3", "olmo_hybrid",
            "persimmon", "phi3", "phimoe", "stablelm",
        ),
        "GPT2Tokenizer": ("codegen", "dbrx", "gpt2", "gpt_neo", "gptj", "opt", "phi", "starcoder2"),
        "GPTNeoXTokenizer": ("falcon_mamba", "gpt_neox", "mamba", "mamba2", "mpt", "olmo", "olmoe"),
        "GemmaTokenizer": ("gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "recurrent_gemma"),
        "Qwen2Tokenizer": ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next"),
        "Qwen3_5Tokenizer": ("qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text"),
    }.items()
    for name in names
}  # fmt: skip
"""The class that transformers registers for a ``model_type``, where it registers one."""
CLASS_WINS = ("qwen2", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text")
"""Model types whose class is taken whatever ``tokenizer_config.json`` says."""


def tokenizer_class(settings: Mapping[str, Any], config: Mapping[str, Any], byte_level: bool) -> str:
    """The class that ``AutoTokenizer`` takes; ``byte_level``: ``tokenizer.json`` speaks of bytes."""
    model_type = config.get("model_type")
    registered = CLASS_OF_TYPE.get(model_type) if isinstance(model_type, str) else None
    named = settings.get("tokenizer_class") or config.get("tokenizer_class")
    if not isinstance(named, str):
        return registered or GENERIC
    named = named.removesuffix("Fast")
    if named == "LlamaTokenizer" and byte_level and registered != GENERIC and model_type not in CLASS_WINS:
        return GENERIC  # Llama 3 and its like
    if registered is None or registered == named:
        return named
    if registered == GENERIC:
        return GENERIC
    return registered if model_type in CLASS_WINS else named


@dataclass
class _Tokens:
    """Special and added tokens of a folder."""

    special: dict[str, str | AddedToken] = field(default_factory=dict)
    extra: list[str | AddedToken] = field(default_factory=list)
    added: dict[int, AddedToken] = field(default_factory=dict)


def read_tokenizer(folder: Path) -> ModelTokenizer:
    """The tokenizer of a model folder. Raises ``UserError`` where there is none, or a file of it is broken."""
    try:
        return _read_tokenizer(folder)
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError) as error:
        # Half a dozen files that may nest anything: what is a list where a text should be is not looked for everywhere.
        raise UserError(
            f"expected tokenizer files of the kinds that transformers writes in {folder}, found {error}; save the "
            "tokenizer again"
        ) from error


def _read_tokenizer(folder: Path) -> ModelTokenizer:
    settings, config = read_object(folder / "tokenizer_config.json"), read_object(folder / "config.json")
    file = folder / "tokenizer.json"
    content = _bytes_of(file) if file.exists() else None
    name = tokenizer_class(settings, config, content is not None and b'"ByteLevel"' in content)
    found = CLASSES.get(name)
    if content is not None:
        tokenizer = _from_json(content, folder)
    else:
        tokenizer, found = _from_other_files(folder, settings, found)
    stored = tokenizer
    if found is not None and isinstance(tokenizer.model, models.BPE):
        tokenizer = _rebuilt(tokenizer, found, settings)
    else:
        found = None
    tokens = _tokens(folder, settings, stored, content is not None, {} if found is None else found.special)
    _add(tokenizer, tokens)
    if name in ("Qwen2Tokenizer",) and found is not None:
        tokenizer.add_tokens([AddedToken(str(t), special=True) for t in [*tokens.special.values(), *tokens.extra]])
    _set_ends(tokenizer, tokens, found, {} if content is not None else settings)
    tokenizer.encode_special_tokens = bool(settings.get("split_special_tokens"))
    special = {key: str(token) for key, token in tokens.special.items()}
    cleans = settings.get("clean_up_tokenization_spaces") and (
        not isinstance(tokenizer.model, models.BPE)
        or settings.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output")
    )
    return ModelTokenizer(
        tokenizer, special, _end_tokens(folder, config, tokenizer, special), _templates(folder, settings), bool(cleans)
    )


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or nothing where there is no such file. Raises ``UserError`` for another content."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"expected JSON in {path}, found it unreadable ({error}); copy the file again") from None
    if not isinstance(found, dict):
        raise UserError(f"expected a JSON object in {path}, found {type(found).__name__}; copy the file again")
    return found


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"expected a readable {path}, found {error.strerror}; check its permissions") from None


def _from_json(content: bytes, folder: Path) -> Tokenizer:
    try:
        # Not from_buffer: it ends the process where an error message holds bytes that are no UTF-8.
        text = content.decode("utf-8")
        content_of = json.loads(text)
        _check_merges(content_of)
        _check_normalizer(content_of.get("normalizer") if isinstance(content_of, dict) else None)
        return Tokenizer.from_str(text)
    except BaseException as error:  # the library raises plain Exception, and a panic of its own
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(
            f"expected a tokenizer.json in {folder}, found none that can be read ({error}); save it with transformers' "
            "save_pretrained"
        ) from None


def _check_merges(tokenizer: Any) -> None:
    """Raises ``ValueError`` for merges of BPE that make no token, or that lack ``continuing_subword_prefix``.

    The library joins both sides in a buffer as long as the longest token, and cuts as many bytes as the prefix has off
    the right one. Where that does not fit, or cuts a character in two, it panics or ends the process.
    """
    model = tokenizer.get("model") if isinstance(tokenizer, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        return
    vocabulary, prefix = model["vocab"], model.get("continuing_subword_prefix") or ""
    if not isinstance(prefix, str):
        return
    cut = len(prefix)
    for merge in model.get("merges") or []:
        sides = merge.split(" ", 1) if isinstance(merge, str) else merge
        if not (isinstance(sides, list) and len(sides) == 2 and all(isinstance(side, str) for side in sides)):
            raise ValueError(f"the merge {merge!r} is no pair of tokens")
        left, right = sides
        if not right.startswith(prefix):
            raise ValueError(f"the merge {merge!r} does not continue with the prefix {prefix!r}")
        if left + right[cut:] not in vocabulary:
            raise ValueError(f"the merge {merge!r} makes no token of the vocabulary")


def _check_normalizer(normalizer: Any) -> None:
    """Raises ``ValueError`` where one of its parts is a table of characters that is broken."""
    waiting = [normalizer]
    while waiting:
        part = waiting.pop()
        if not isinstance(part, dict):
            continue
        table = part.get("precompiled_charsmap")
        if isinstance(table, str):
            check_charsmap(base64.b64decode(table, validate=True))
        inner = part.get("normalizers")
        waiting += inner if isinstance(inner, list) else []


def _from_other_files(
    folder: Path, settings: Mapping[str, Any], found: TokenizerClass | None
) -> tuple[Tokenizer, TokenizerClass | None]:
    """A tokenizer without ``tokenizer.json``, and the class that still has to rebuild it."""
    model, vocabulary, merges = folder / "tokenizer.model", folder / "vocab.json", folder / "merges.txt"
    if model.exists():
        return _converted(model), found
    if vocabulary.exists() and merges.exists():
        try:
            bpe = models.BPE.from_file(str(vocabulary), str(merges))
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"expected {vocabulary} and {merges.name}, found {error}; copy them again") from None
        return Tokenizer(bpe), found or CLASSES["GPT2Tokenizer"]
    if (folder / "tekken.json").exists():
        raise UserError(
            f"expected a tokenizer.json in {folder}, found Mistral's tekken.json; save it with transformers' "
            "save_pretrained (pip install mistral-common)"
        )
    raise UserError(
        f"expected a tokenizer.json in {folder}, found neither that nor a tokenizer.model; save it with transformers' "
        "save_pretrained"
    )


def _converted(path: Path) -> Tokenizer:
    """A SentencePiece model, converted once: beside the model, under a name that its content decides."""
    content = _bytes_of(path)
    file = path.parent / cache.FOLDER / f"tokenizer-{CONVERSION}-{hashlib.sha256(content).hexdigest()[:32]}.json"
    try:
        return Tokenizer.from_file(str(file))
    except Exception:  # the library raises plain Exception; there is none, or a broken one
        tokenizer = sentencepiece.tokenizer_of(sentencepiece.parse(content))
    temporary = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        file.parent.mkdir(exist_ok=True)
        temporary.write_text(tokenizer.to_str(), encoding="utf-8")
        os.replace(temporary, file)
    except OSError:  # a folder that cannot be written to: convert again next time
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return tokenizer


def _rebuilt(tokenizer: Tokenizer, found: TokenizerClass, settings: Mapping[str, Any]) -> Tokenizer:
    """The vocabulary, the merges and the post-processor; all else as the class has it."""
    new = Tokenizer(tokenizer.model)
    unknown = settings.get("unk_token", found.special.get("unk_token"))
    new.model.unk_token = _text(unknown) if found.unknown and unknown else None
    new.model.fuse_unk, new.model.byte_fallback = found.fuse_unknown, found.byte_fallback
    new.model.dropout, new.model.ignore_merges = None, False
    normalizer, new.pre_tokenizer, new.decoder = found.parts(settings)
    if normalizer is not None:
        new.normalizer = normalizer
    if tokenizer.post_processor is not None:
        new.post_processor = tokenizer.post_processor
    return new


def _text(token: object) -> str:
    return str(token.get("content", "")) if isinstance(token, dict) else str(token)


def _token(value: object, **more: bool) -> str | AddedToken:
    """A token as a string, or with its properties where the file gives them."""
    if not isinstance(value, dict):
        return str(value)
    known = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    try:
        return AddedToken(**({key: value[key] for key in known if key in value} | more))
    except TypeError as error:
        raise UserError(
            f"expected a token's content and properties, found {value!r} ({error}); mend the file"
        ) from None


def _tokens(
    folder: Path, settings: Mapping[str, Any], stored: Tokenizer, has_file: bool, defaults: Mapping[str, str | None]
) -> _Tokens:
    """Which tokens are special and which are added, by all files that say so."""
    given: dict[str, Any] = dict(settings)
    if "additional_special_tokens" in given and not given.get("extra_special_tokens"):
        given["extra_special_tokens"] = given.pop("additional_special_tokens")
    own = {key: value for key, value in given.items() if key.endswith("_token") and key not in NAMED}
    named: dict[str, Any] = {key: value for key, value in own.items() if isinstance(value, str) or _typed(value)}
    if isinstance(given.get("extra_special_tokens"), dict):
        named |= given.pop("extra_special_tokens")
    found = _Tokens()
    decoder = settings.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        for number, value in decoder.items():
            found.added[_whole(number)] = _added(value)
    else:
        special_map = read_object(folder / "special_tokens_map.json")
        for key, value in special_map.items():
            if key == "extra_special_tokens" and isinstance(value, list):
                value = _joined(given.get(key), value)
            elif key == "extra_special_tokens" and isinstance(value, dict):
                named |= value
                continue
            elif isinstance(value, dict):
                value = value | {"special": True}
            given[key] = value
        words = {_text(given[key]) for key in NAMED if given.get(key)}
        words |= {_text(token) for token in given.get("extra_special_tokens") or ()}
        for text, number in read_object(folder / "added_tokens.json").items():
            special = text in words
            found.added[_whole(number)] = AddedToken(text, normalized=not special, special=special)
        if has_file:
            found.added |= stored.get_added_tokens_decoder()
    if "additional_special_tokens" in given:  # the older name
        given.setdefault("extra_special_tokens", given.pop("additional_special_tokens"))
    by_text = {token.content: token for token in found.added.values()}
    if not has_file and "extra_special_tokens" not in given:
        given["extra_special_tokens"] = list(stored.get_added_tokens_decoder().values())
    if stored.padding is not None:
        defaults = {"pad_token": stored.padding["pad_token"]} | dict(defaults)
    names = dict.fromkeys([*NAMED, *defaults])
    values = {key: given[key] if key in given else defaults.get(key) for key in names} | named
    for key, value in values.items():
        if value is not None:
            token = value if isinstance(value, AddedToken) else _token(value)
            found.special[key] = by_text.get(str(token), token)
    found.extra = [t if isinstance(t, AddedToken) else _token(t) for t in given.get("extra_special_tokens") or ()]
    return found


def _typed(value: object) -> bool:
    return isinstance(value, dict) and "content" in value


def _joined(first: object, second: list[Any]) -> list[Any]:
    kept = list(first) if isinstance(first, list) else []
    return kept + [t if isinstance(t, str) else {**t, "special": True} for t in second if t not in kept]


def _added(value: object) -> AddedToken:
    if isinstance(value, AddedToken):
        return value
    if not _typed(value):
        raise UserError(f"expected tokens in added_tokens_decoder of tokenizer_config.json, found {value!r}; mend it")
    token = _token(value)
    return token if isinstance(token, AddedToken) else AddedToken(token)


def _whole(number: object) -> int:
    try:
        return int(str(number))
    except ValueError:
        raise UserError(f"expected ids of added tokens, found {number!r}; mend the tokenizer's files") from None


def _add(tokenizer: Tokenizer, tokens: _Tokens) -> None:
    """Adds the tokens to the vocabulary, in transformers' order; those without an id get the next one."""
    adding: list[str | AddedToken] = [token for _, token in sorted(tokens.added.items())]
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()} | {str(t) for t in adding}
    for token in [*tokens.special.values(), *tokens.extra]:
        if str(token) not in known and token not in adding:
            adding.append(token)
    named = {str(token) for token in tokens.special.values()}
    made = []
    for token in adding:
        if isinstance(token, str):
            token = AddedToken(token, special=True)
        elif not token.special and token.content in named:
            token.special = True
        made.append(token)
    if made:
        tokenizer.add_tokens(made)


def _set_ends(tokenizer: Tokenizer, tokens: _Tokens, found: TokenizerClass | None, settings: Mapping[str, Any]) -> None:
    """BOS and EOS around a text: what ``tokenizer.json`` says, or without it ``add_bos_token`` and
    ``add_eos_token``."""
    decides = found is not None and found.add_bos is not None
    explicit = "add_bos_token" in settings or "add_eos_token" in settings
    if tokenizer.post_processor is not None and not decides and not explicit:
        return
    bos, eos = tokens.special.get("bos_token"), tokens.special.get("eos_token")
    default = bool(found.add_bos) if found is not None else False
    first = [str(bos)] if bos is not None and settings.get("add_bos_token", default) else []
    last = [str(eos)] if eos is not None and settings.get("add_eos_token") else []
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*(f"{t}:0" for t in first), "$A:0", *(f"{t}:0" for t in last)],
        pair=[f"{part}:{i}" for i, text in enumerate(("$A", "$B")) for part in (*first, text, *last)],
        special_tokens=[(t, tokenizer.token_to_id(t)) for t in dict.fromkeys([*first, *last])],
    )


def _end_tokens(
    folder: Path, config: Mapping[str, Any], tokenizer: Tokenizer, special: Mapping[str, str]
) -> frozenset[int]:
    """Ids that end a text: of ``generation_config.json``, else of ``config.json``, and the tokenizer's end of sequence
    and of turn, which some generation settings forget."""
    generation = read_object(folder / "generation_config.json")
    stop = generation.get("eos_token_id", config.get("eos_token_id"))
    ends = {stop} if isinstance(stop, int) else set(stop) if isinstance(stop, list) else set()
    ends |= {tokenizer.token_to_id(special[key]) for key in ("eos_token", "eot_token") if key in special}
    return frozenset(t for t in ends if isinstance(t, int))


def _templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name. Files win over ``tokenizer_config.json``."""
    files = {f.name.removesuffix(".jinja"): f for f in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").exists():
        files = {DEFAULT: folder / "chat_template.jinja"} | files
    if files:
        return {name: _template_file(file) for name, file in files.items()}
    given = settings.get("chat_template")
    if isinstance(given, str):
        return {DEFAULT: given}
    if isinstance(given, dict):
        named = given
    elif isinstance(given, list) and all(isinstance(t, dict) and {"name", "template"} <= set(t) for t in given):
        named = {t["name"]: t["template"] for t in given}
    elif given is None:
        return {}
    else:
        raise UserError("expected a chat_template that is a text or a list of named ones, found another; mend it")
    return {str(name): str(template) for name, template in named.items()}


def _template_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"expected a chat template in {path}, found it unreadable ({error}); copy it again") from None

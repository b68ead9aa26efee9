"""Structured output: what a grammar lets a sequence say next, as masks over the vocabulary. By llguidance.

llguidance runs a lexer and an Earley parser over the tokens' bytes. It gives the GIL back while it computes a mask, so
that masks are computed in a thread beside the forward pass.

Grammars come from strangers. What is known to take long is refused before it is compiled (:data:`LIMITS` and below);
what still takes longer than :data:`SECONDS` is refused without waiting for its end. A keyword of JSON Schema that
llguidance cannot hold is refused by name.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal, get_args

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray
from tokenizers import Tokenizer

from tulle.engine.gbnf import lark_of_gbnf
from tulle.errors import UserError
from tulle.text.detokenizer import special_ids, token_bytes
from tulle.text.tokenizer import ModelTokenizer

Kind = Literal["json_schema", "json_object", "regex", "lark", "gbnf", "choice"]

SECONDS = 0.8
"""Within which a grammar is accepted or refused."""
AT_ONCE = 2
"""Grammars that are compiled at the same time."""
LONGEST, LONGEST_CHOICE = 1 << 17, 1 << 20
"""Characters of a grammar, and of a list of choices."""
DEEPEST = 200
"""Groups in each other."""
LONGEST_STRING = 4096
"""Characters of a constant."""
MOST = {
    "properties of one object": 1000,
    "properties": 5000,
    "values of enum": 10_000,
    "lists and objects in values of enum and const": 2000,
    "alternatives": 1000,
    "combinations of alternatives in one allOf": 100,
}
"""Of a JSON schema."""
LARGEST_MULTIPLE = 20_000
"""What the ``multipleOf`` of a schema may be, without their decimal points, all together: states of the lexer."""
MOST_RULES, MOST_ALTERNATIVES = 1000, 4000
"""Of a Lark grammar."""
MOST_CHOICES = 20_000
JSON_OPTIONS = {"lenient": False, "whitespace_flexible": True, "whitespace_pattern": r"[ \t\r\n]{1,32}"}
"""Keywords that llguidance does not know are refused; white space ends, which some models do not by themselves."""
LIMITS = LLParserLimits(max_items_in_row=12_000, initial_lexer_fuel=100_000, verbose_errors=False)
KNOWN, KNOWN_CHARACTERS = 64, 1 << 21
"""Compiled grammars that are kept, and characters of them together."""
STACK = 1 << 26
"""Bytes: the library recurses along chains of rules."""


@dataclass(frozen=True)
class Grammar:
    """What a text must be. Raises ``UserError`` for an unknown kind and a text too long.

    ``json_schema``: JSON that a schema describes; ``json_object``: any JSON object (``text`` is empty); ``regex``: the
    syntax of Rust's regex crate; ``lark``: llguidance's dialect; ``gbnf``: llama.cpp's; ``choice``: one of a JSON list
    of strings.
    """

    kind: Kind
    text: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UserError(f"expected a grammar of kind {', '.join(get_args(Kind))}, found {self.kind!r}")
        if not isinstance(self.text, str):
            raise UserError(f"expected a grammar as text, found {type(self.text).__name__}")
        longest = LONGEST_CHOICE if self.kind == "choice" else LONGEST
        if len(self.text) > longest:
            raise UserError(f"expected a grammar of at most {longest} characters, found {len(self.text)}")
        try:
            self.text.encode()
        except UnicodeEncodeError:
            raise UserError("expected a grammar in UTF-8, found surrogates; write them as characters") from None


class Matcher:
    """A grammar's state along one sequence: a :class:`tulle.engine.request.Constraint`."""

    def __init__(self, matcher: LLMatcher, vocabulary: int, size: int):
        self._matcher, self._vocabulary, self._size = matcher, vocabulary, size

    def mask(self) -> NDArray[np.uint32]:
        """Allowed tokens, a bit each, ``[(V + 31) / 32]``: end tokens where the text may end, no padding.

        Raises ``UserError`` where a step is beyond the limits.
        """
        words = np.zeros((self._size + 31) // 32, np.uint32)
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        self._check()
        if self._size == self._vocabulary:
            return words
        # The end that a tokenizer without end tokens was given is none of the model's.
        words[self._vocabulary // 32] &= np.uint32((1 << self._vocabulary % 32) - 1)
        return words[: (self._vocabulary + 31) // 32]

    def accept(self, token: int) -> None:
        """The token that was chosen. Raises ``UserError`` for one that the mask does not allow."""
        if not self._matcher.consume_token(token):
            why = _line(self._matcher.get_error())
            raise UserError(f"expected a token that the grammar allows, found {token} ({why})")

    @property
    def finished(self) -> bool:
        """Nothing may follow but an end token."""
        return bool(self._matcher.is_stopped())

    def forced(self, most: int = 16) -> list[int]:
        """Tokens that must follow, at most so many: as long as one token alone is allowed. They are not accepted yet.

        Of a text that must follow, such as a key, several beginnings are tokens; those are no force.
        """
        ahead = Matcher(self._matcher.deep_copy(), self._vocabulary, self._size)
        found: list[int] = []
        while len(found) < most and not ahead.finished:
            tokens = np.flatnonzero(np.unpackbits(ahead.mask().view(np.uint8), bitorder="little"))
            if len(tokens) != 1:
                break
            found.append(int(tokens[0]))
            ahead.accept(found[-1])
        return found

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UserError(f"expected a grammar that can be followed, found: {_line(self._matcher.get_error())}")


class Grammars:
    """Compiles grammars for a model's tokens, and keeps what it compiled. Safe to use from several threads.

    ``end_tokens``: ids that end a text [the tokenizer's]; ``vocabulary``: logits of the model [the tokenizer's size],
    often padded beyond the tokenizer's.
    """

    def __init__(
        self, tokenizer: ModelTokenizer, end_tokens: Collection[int] | None = None, vocabulary: int | None = None
    ):
        self._text = tokenizer
        self.vocabulary = vocabulary or tokenizer.tokenizer.get_vocab_size()
        ends = tokenizer.end_tokens if end_tokens is None else end_tokens
        self._ends = sorted(end for end in ends if 0 <= end < self.vocabulary)
        self._size = self.vocabulary if self._ends else self.vocabulary + 1
        self._tokenizer: LLTokenizer | None = None
        self._lock = threading.Lock()
        self._slots = threading.Semaphore(AT_ONCE)
        self._known: OrderedDict[Grammar, LLMatcher | str] = OrderedDict()

    def compile(self, grammar: Grammar) -> Callable[[], Matcher]:
        """What makes a constraint for each sequence. Raises ``UserError`` for a grammar that is invalid or large."""
        with self._lock:
            found = self._known.get(grammar)
            if found is not None:
                self._known.move_to_end(grammar)
        if found is None:
            found = self._compiled(grammar, self._prepared())
            self._keep(grammar, found)
        if isinstance(found, str):
            raise UserError(found)
        prototype = found
        return lambda: Matcher(prototype.deep_copy(), self.vocabulary, self._size)

    def _prepared(self) -> LLTokenizer:
        """The library's tokenizer, once."""
        with self._lock:
            if self._tokenizer is None:
                ends = self._ends or [self.vocabulary]
                tokens: Any = _Tokens(self._text.tokenizer, self._size, ends)
                self._tokenizer = LLTokenizer(tokens, eos_token=ends)
            return self._tokenizer

    def _keep(self, grammar: Grammar, found: LLMatcher | str) -> None:
        with self._lock:
            self._known[grammar] = found
            while len(self._known) > KNOWN or sum(len(g.text) for g in self._known) > KNOWN_CHARACTERS:
                self._known.popitem(last=False)

    def _compiled(self, grammar: Grammar, tokenizer: LLTokenizer) -> LLMatcher | str:
        """A matcher at the beginning of a text, or what is wrong. Gives up after ``SECONDS``."""
        found: list[LLMatcher | str] = []

        def work() -> None:
            try:
                found.append(_matcher(grammar, tokenizer))
            except UserError as error:
                found.append(str(error))
            except Exception as error:  # the library's own, and Python's for what is nested deeply
                found.append(f"expected a grammar that is valid, found: {_line(str(error) or type(error).__name__)}")
            finally:
                self._slots.release()

        if not self._slots.acquire(timeout=SECONDS):
            raise UserError("expected a grammar to compile, found other large ones still at work; try again later")
        _with_stack(work).join(SECONDS)
        return (
            found[0]
            if found
            else (
                f"expected a grammar that compiles within {SECONDS} seconds, found one that does not; make it smaller"
            )
        )


class _Tokens:
    """A tokenizer as the library wants it: the bytes of every token, and a function from bytes to tokens."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, size: int, ends: Sequence[int]):
        self._library = tokenizer
        # The library takes a first byte of 255, which no text in UTF-8 has, for the mark of a special token.
        self.tokens = [b"" if token.startswith(b"\xff") else token for token in token_bytes(tokenizer)[:size]]
        self.tokens += [b""] * (size - len(self.tokens))
        self.special_token_ids = sorted({i for i in special_ids(tokenizer) if i < size} | set(ends))
        self.eos_token_id, self.bos_token_id = ends[0], None

    def __call__(self, text: bytes | str) -> list[int]:
        """The library asks once in the beginning, and where it forces text, which :func:`_lark` switches off."""
        content = text.decode(errors="replace") if isinstance(text, bytes) else text
        found: list[int] = self._library.encode(content, add_special_tokens=False).ids
        return found


def _with_stack(work: Callable[[], None]) -> threading.Thread:
    """A thread with a large stack, started."""
    thread = threading.Thread(target=work, name="grammar", daemon=True)
    with _stack_lock:
        before = threading.stack_size(STACK)
        try:
            thread.start()
        finally:
            threading.stack_size(before)
    return thread


_stack_lock = threading.Lock()


def _line(message: str) -> str:
    """The library's message in one line, without the state of its parser and without the grammar."""
    return " ".join(re.split(r"<state>|<backtrace>|<non-verbose/>|\n *\d+ \|", message)[0].split())[:300]


def _matcher(grammar: Grammar, tokenizer: LLTokenizer) -> LLMatcher:
    found = LLMatcher(tokenizer, _source(grammar), log_level=0, limits=LIMITS)
    if not found.is_error():
        # The first mask costs more than others, and finds what cannot begin.
        found.compute_bitmask()
    wrong = _line(found.get_error()) if found.is_error() else ""
    if wrong.startswith("NoExtension"):
        raise UserError(
            f"expected a {grammar.kind} that allows a text of the model's tokens, found one that allows none"
        )
    if wrong:
        raise UserError(f"expected a {grammar.kind} that is valid, found: {wrong}")
    return found


def _source(grammar: Grammar) -> str:
    """The grammar for the library. Raises ``UserError`` for one that is known to be too large."""
    text = grammar.text
    if grammar.kind == "json_object":
        text = '{"type": "object"}'
    if grammar.kind in ("json_schema", "json_object"):
        schema = _json(text)
        if not isinstance(schema, dict):
            raise UserError(f"expected a JSON schema as an object, found {text[:40]!r}")
        _check_schema(schema)
        return _lark(f"start: %json {json.dumps(schema | {'x-guidance': JSON_OPTIONS})}")
    if grammar.kind != "choice":
        run = max(re.findall(r'[^"/|\n()\[\]*+?.{}]+', text), key=len, default="")
        if len(run) > LONGEST_STRING:
            raise UserError(
                f"expected constants of at most {LONGEST_STRING} characters, found {len(run)}: {run[:40]!r}…"
            )
        depth = max(itertools.accumulate(1 if c == "(" else -1 for c in re.findall("[()]", text)), default=0)
        if depth > DEEPEST:
            raise UserError(f"expected at most {DEEPEST} groups in each other, found {depth}")
    if grammar.kind == "regex":
        return _lark(_lark_of_regex(text))
    if grammar.kind == "choice":
        choices = _json(text)
        if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c for c in choices):
            raise UserError(f"expected choices as a list of strings that are not empty, found {text[:40]!r}")
        if len(choices) > MOST_CHOICES:
            raise UserError(f"expected at most {MOST_CHOICES} choices, found {len(choices)}")
        _check_strings(choices)
        return _lark(_lark_of_regex("|".join(map(_literal, choices))))
    if grammar.kind == "gbnf":
        text = lark_of_gbnf(text)
    rules, alternatives = len(re.findall(r"(?m)^[ \t]*[?!]?\w[^\n\"/:]*:", text)), text.count("|")
    if rules > MOST_RULES or alternatives > MOST_ALTERNATIVES:
        raise UserError(
            f"expected a grammar of at most {MOST_RULES} rules and {MOST_ALTERNATIVES} alternatives, found {rules} and "
            f"{alternatives}; a choice may have more"
        )
    return _lark(_with_options(text))


def _lark_of_regex(expression: str) -> str:
    """The library knows what to escape."""
    found: str = json.loads(LLMatcher.grammar_from_regex(expression))["grammars"][0]["lark_grammar"]
    return found


def _lark(text: str) -> str:
    """A grammar in Lark that forces nothing.

    By itself the library works out, before every mask, all the text that must follow, and allows the tokens alone that
    the tokenizer would choose for it. That text may be of any length, such as that of ``((a{1000}){1000}){1000}``, and
    its limits do not hold there.
    """
    options: dict[str, Any] = {}
    match = re.match(r"\s*%llguidance\s*(?=\{)", text)
    if match:
        try:
            found, end = json.JSONDecoder().raw_decode(text, match.end())
        except (ValueError, RecursionError):
            raise UserError(f"expected JSON after %llguidance, found {text[match.end() :][:40]!r}") from None
        options, text = dict(found), text[end:]
    return LLMatcher.grammar_from_lark(f"%llguidance {json.dumps(options | {'no_forcing': True})}\n{text}")


def _literal(text: str) -> str:
    """A regular expression of one text."""
    return "".join(c if c.isalnum() and c.isascii() else f"\\x{{{ord(c):x}}}" for c in text)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"expected JSON, found {text[:40]!r} ({_line(str(error))[:80]})") from None


def _with_options(lark: str) -> str:
    """``%json`` schemas in a Lark grammar, checked as others are, with :data:`JSON_OPTIONS` or options of their own."""
    decoder, parts, place = json.JSONDecoder(), [], 0
    for match in re.finditer(r"%json\s*(?=\{)", lark):
        if match.start() < place:
            continue
        try:
            schema, end = decoder.raw_decode(lark, match.end())
        except (ValueError, RecursionError):
            continue  # the library says what is wrong
        _check_schema(schema)
        own = schema.get("x-guidance")
        schema["x-guidance"] = (own if isinstance(own, dict) else JSON_OPTIONS) | {"lenient": False}
        parts += [lark[place : match.end()], json.dumps(schema)]
        place = end
    return "".join(parts) + lark[place:]


def _check_strings(values: Sequence[Any]) -> None:
    longest = max((len(value) for value in values if isinstance(value, str)), default=0)
    if longest > LONGEST_STRING:
        raise UserError(f"expected constants of at most {LONGEST_STRING} characters, found {longest}")


def _check_schema(schema: dict[str, Any]) -> None:
    """Raises ``UserError`` for a schema that would take long to compile or to follow."""
    found = dict.fromkeys(MOST, 0)
    multiples = 0
    todo: list[Any] = [schema]
    while todo:
        node = todo.pop()
        if isinstance(node, list):
            todo += node
        if not isinstance(node, dict):
            continue
        todo += [value for key, value in node.items() if key not in ("enum", "const")]
        properties = node.get("properties")
        if isinstance(properties, dict):
            found["properties"] += len(properties)
            one = "properties of one object"
            found[one] = max(found[one], len(properties))
        constants = list(node["enum"]) if isinstance(node.get("enum"), list) else []
        constants += [node["const"]] if "const" in node else []
        found["values of enum"] += len(constants)
        _check_strings(constants)
        inner = [c for c in constants if isinstance(c, list | dict)]
        while inner:
            value = inner.pop()
            found["lists and objects in values of enum and const"] += 1
            content = list(value.values()) if isinstance(value, dict) else value
            _check_strings(content)
            inner += [c for c in content if isinstance(c, list | dict)]
        found["alternatives"] += sum(_alternatives(node))
        parts = node.get("allOf")
        counts = [c for part in [*(parts if isinstance(parts, list) else ()), node] for c in _alternatives(part)]
        if len(counts) > 1:
            key = "combinations of alternatives in one allOf"
            found[key] = max(found[key], min(math.prod(counts), 1 << 30))
        multiple = node.get("multipleOf")
        if isinstance(multiple, int | float) and not isinstance(multiple, bool):
            number = Decimal(repr(multiple)).normalize().as_tuple()
            zeros = number.exponent if isinstance(number.exponent, int) and number.exponent > 0 else 0
            multiples += int("".join(map(str, number.digits))) * 10 ** min(zeros, 9)
    for name, most in MOST.items():
        if found[name] > most:
            raise UserError(f"expected a JSON schema of at most {most} {name}, found {found[name]}")
    if multiples > LARGEST_MULTIPLE:
        raise UserError(
            f"expected multipleOf in a JSON schema of at most {LARGEST_MULTIPLE} together, found {multiples}"
        )


def _alternatives(node: Any) -> list[int]:
    """How many each ``anyOf`` and ``oneOf`` of a schema has."""
    if not isinstance(node, dict):
        return []
    return [len(node[key]) for key in ("anyOf", "oneOf") if isinstance(node.get(key), list)]

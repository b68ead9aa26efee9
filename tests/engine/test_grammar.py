"""Structured output: what is written under a mask is what the grammar says, and hostile grammars are answered soon."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Sequence
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_in_memory import KINDS, byte_fallback, byte_level

from tulle.engine import grammar as module
from tulle.engine.gbnf import lark_of_gbnf
from tulle.engine.grammar import KNOWN, SECONDS, Grammar, Grammars, Matcher
from tulle.errors import UserError
from tulle.text.detokenizer import token_bytes
from tulle.text.tokenizer import ModelTokenizer

CLOSING = '"}],e.0'
"""Characters that bring a JSON text to its end, the best first."""


def model_tokenizer(kind: str = "byte-level BPE") -> ModelTokenizer:
    library = KINDS[kind]()
    ends = {library.token_to_id("</s>"), library.token_to_id("<|im_end|>")}
    return ModelTokenizer(library, {"eos_token": "</s>"}, frozenset(ends))


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    text = model_tokenizer()
    return Grammars(text, vocabulary=text.tokenizer.get_vocab_size() + 75)


def allowed(matcher: Matcher) -> list[int]:
    mask = matcher.mask()
    found: list[int] = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
    return found


def written(grammars: Grammars, grammar: Grammar, seed: int, free: int = 30, most: int = 1500) -> str:
    """A text by chance: uniform over the mask for a while, then towards the end."""
    matcher, generator, tokens = grammars.compile(grammar)(), np.random.default_rng(seed), []
    text, ends = grammars._text, grammars._ends
    pieces = token_bytes(text.tokenizer)
    closing = [pieces.index(c.encode()) for c in CLOSING]
    for step in range(most):
        if matcher.finished:
            break
        may = set(allowed(matcher))
        assert may, "the grammar allows a text, but no token"
        near = [t for t in [*ends, *closing] if t in may]
        hurry = near and step >= free and generator.random() < 0.7
        token = near[0] if hurry else int(generator.choice(sorted(may)))
        matcher.accept(token)
        if token in ends:
            break
        tokens.append(token)
    else:
        pytest.fail(f"no end after {most} tokens: {text.decode(tokens)[-200:]}")
    return b"".join(pieces[t] for t in tokens).decode()


def holds(grammars: Grammars, grammar: Grammar, text: str) -> bool:
    """Whether a text is one of the grammar's, token by token."""
    matcher = grammars.compile(grammar)()
    for token in grammars._text.encode(text, special=False):
        if matcher.finished or token not in allowed(matcher):
            return False
        matcher.accept(token)
    return matcher.finished or bool(set(grammars._ends) & set(allowed(matcher)))


SCHEMAS: list[dict[str, Any]] = [
    {"type": "string"},
    {"type": "integer"},
    {"type": "number"},
    {"type": "boolean"},
    {"type": "null"},
    {"type": ["string", "null", "integer"]},
    {"enum": ["one", 2, None, True, {"a": [1, "b"]}, 2.5]},
    {"const": {"name": "é\n\"x\"", "n": [1, 2]}},
    {"type": "string", "minLength": 3, "maxLength": 5},
    {"type": "string", "maxLength": 0},
    {"type": "string", "pattern": "^[A-Z][a-z]{2,4}-[0-9]+$"},
    {"type": "string", "pattern": "b+"},
    {"type": "integer", "minimum": -3, "maximum": 12},
    {"type": "integer", "exclusiveMinimum": 99, "exclusiveMaximum": 102},
    {"type": "number", "minimum": 0.25, "maximum": 0.75},
    {"type": "integer", "multipleOf": 7, "minimum": 0},
    {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 4},
    {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 0},
    {"type": "array", "prefixItems": [{"type": "string"}, {"type": "boolean"}], "items": False, "minItems": 2},
    {"type": "array", "prefixItems": [{"const": 1}], "items": {"type": "null"}, "minItems": 3},
    {"type": "object"},
    {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    {"type": "object", "properties": {"a": {"type": "integer"}, "b": {}}, "additionalProperties": False},
    {"type": "object", "additionalProperties": {"type": "boolean"}, "required": ["x"]},
    {"type": "object", "patternProperties": {"^n_": {"type": "integer"}}, "additionalProperties": False},
    {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a", "b"], "minProperties": 2},
    {"type": "object", "maxProperties": 2, "additionalProperties": {"const": 0}},
    {"anyOf": [{"type": "string", "maxLength": 2}, {"type": "array", "items": {"type": "null"}}]},
    {"oneOf": [{"type": "string"}, {"type": "integer"}]},
    {"allOf": [{"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]},
               {"properties": {"b": {"type": "boolean"}}, "required": ["b"]}]},
    {"$defs": {"node": {"type": "object", "properties": {"v": {"type": "integer"}, "next": {"anyOf": [
        {"$ref": "#/$defs/node"}, {"type": "null"}]}}, "required": ["v", "next"], "additionalProperties": False}},
     "$ref": "#/$defs/node"},
    {"definitions": {"id": {"type": "string", "pattern": "^[0-9a-f]{4}$"}},
     "type": "array", "items": {"$ref": "#/definitions/id"}, "minItems": 1},
    {"type": "object", "properties": {"inner": {"type": "object", "properties": {"deep": {"type": "array", "items": {
        "type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}, "minItems": 1}},
        "required": ["deep"]}}, "required": ["inner"]},
    *({"type": "string", "format": name} for name in ("date", "time", "date-time", "ipv4", "ipv6", "uuid", "email")),
]  # fmt: skip


FORMATS = jsonschema.FormatChecker(["ipv4", "ipv6", "uuid", "email"])
DAY, HOUR = (
    r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])",
    r"([01]\d|2[0-3]):[0-5]\d:([0-5]\d|60)(\.\d+)?(Z|[+-][0-2]\d:[0-5]\d)",
)
for name, pattern in (("date", DAY), ("time", HOUR), ("date-time", DAY + "[Tt]" + HOUR)):
    # The form of RFC 3339; the grammar knows how long months are, but not in which years the 29th of February is.
    FORMATS.checks(name)(lambda value, pattern=pattern: re.fullmatch(pattern, value, re.IGNORECASE) is not None)


@pytest.mark.parametrize("number", range(len(SCHEMAS)))
def test_documents_satisfy_their_schema(grammars: Grammars, number: int) -> None:
    schema = SCHEMAS[number]
    checker = jsonschema.Draft202012Validator(schema, format_checker=FORMATS)
    found = [json.loads(written(grammars, Grammar("json_schema", json.dumps(schema)), seed)) for seed in range(6)]
    for document in found:
        checker.validate(document)


def test_the_test_above_could_fail(grammars: Grammars) -> None:
    """Documents of one schema do not satisfy the next one's."""
    wrong = 0
    for schema, other in zip(SCHEMAS[:-7], SCHEMAS[1:-6], strict=True):
        document = json.loads(written(grammars, Grammar("json_schema", json.dumps(schema)), 0))
        wrong += not jsonschema.Draft202012Validator(other).is_valid(document)
    assert wrong > 20


NAMES = st.sampled_from(["a", "b", "name", "ä", "x y", 'q"'])
PLAIN = st.one_of(
    st.builds(lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more},
              st.integers(-300, 300), st.integers(0, 200)),
    st.builds(lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more},
              st.integers(0, 3), st.integers(0, 4)),
    st.builds(lambda values: {"enum": values}, st.lists(
        st.one_of(st.text(st.characters(codec="utf-8"), max_size=5), st.integers(-99, 99), st.booleans(), st.none()),
        min_size=1, max_size=4)),
    st.builds(lambda kinds: {"type": kinds}, st.lists(
        st.sampled_from(["string", "number", "integer", "boolean", "null", "array", "object"]),
        min_size=1, max_size=3, unique=True)),
    st.builds(lambda p: {"type": "string", "pattern": p}, st.from_regex(r"\A\^([a-z]|[a-c]\+|x\?){1,4}\$\Z")),
)  # fmt: skip


def _object(properties: dict[str, Any], needed: set[str], more: bool) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": sorted(needed & set(properties)),
            "additionalProperties": more}  # fmt: skip


SOME_SCHEMA = st.recursive(
    PLAIN,
    lambda inner: st.one_of(
        st.builds(_object, st.dictionaries(NAMES, inner, max_size=3), st.sets(NAMES, max_size=3), st.booleans()),
        st.builds(lambda items, low, more: {"type": "array", "items": items, "minItems": low, "maxItems": low + more},
                  inner, st.integers(0, 2), st.integers(0, 2)),
        st.builds(lambda parts: {"anyOf": parts}, st.lists(inner, min_size=1, max_size=3)),
    ),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(SOME_SCHEMA, st.integers(0, 2**32))
def test_documents_of_any_schema(schema: dict[str, Any], seed: int) -> None:
    document = json.loads(written(SHARED, Grammar("json_schema", json.dumps(schema)), seed, free=12))
    jsonschema.Draft202012Validator(schema).validate(document)


SHARED = Grammars(model_tokenizer())


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {"type": "string"}}, '"not"'),
        ({"if": {"type": "string"}, "then": {"maxLength": 3}}, '"if", "then"'),
        ({"properties": {"a": {"properties": {"b": {"contains": {}}}}}}, "contains"),
        ({"propertyNames": {"maxLength": 3}}, "propertyNames"),
        ({"dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({"unevaluatedProperties": False}, "unevaluatedProperties"),
        ({"x-guidance": {"lenient": True}, "unevaluatedItems": False}, "unevaluatedItems"),
        ({"$dynamicRef": "#a"}, "dynamicRef"),
        ({"type": "string", "format": "hairdo"}, "hairdo"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "strnig"}, "strnig"),
        ({"$ref": "#/nowhere"}, "nowhere"),
        ({"$ref": "https://example.com/schema"}, "example.com"),
        ({"$ref": "#"}, "allows a text"),
        ({"enum": []}, "Unsatisfiable|empty"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "minimum"),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "oneOf"),
    ],
)
def test_what_a_schema_may_not_say_is_named(grammars: Grammars, schema: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named) as error:
        grammars.compile(Grammar("json_schema", json.dumps(schema)))
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize(
    "grammar",
    [
        ("json_schema", "{"), ("json_schema", "[]"), ("json_schema", "true"), ("json_schema", '{"enum": [1e999]}'),
        ("json_schema", '{"enum": ["\\ud800"]}'), ("regex", "("), ("regex", "(?=a)"), ("regex", "a\\b"),
        ("lark", "start: nothing"), ("lark", "begin: 'a'"), ("lark", ""), ("lark", "start: a\na: a"),
        ("gbnf", "root = a"), ("gbnf", 'x ::= "a"'), ("choice", "[]"), ("choice", '["a", ""]'), ("choice", '["a", 1]'),
        ("choice", "a"), ("json_schema", '{"a": ' + "9" * 5000 + "}"),
    ],
)  # fmt: skip
def test_what_is_no_grammar(grammars: Grammars, grammar: tuple[Any, str]) -> None:
    for _ in range(2):  # the second time from what is kept
        with pytest.raises(UserError, match="expected .*found") as error:
            grammars.compile(Grammar(*grammar))
        assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_grammars_themselves_are_checked() -> None:
    for bad in (("xml", ""), ("regex", "a" * 2_000_000), ("regex", "\ud800"), ("regex", b"a")):
        with pytest.raises(UserError, match="expected a grammar"):
            Grammar(*bad)  # type: ignore[arg-type]


def _nested(depth: int) -> str:
    return '{"items":' * depth + "{}" + "}" * depth


HOSTILE: dict[str, tuple[Any, str]] = {
    "repeats of repeats": ("regex", "((a{1000}){1000}){1000}"),
    "one to follow of any length": ("lark", "start: a0\n" + "".join(f"a{i}: a{i + 1} a{i + 1}\n" for i in range(60))
                                    + 'a60: "x" | "x" a60 "y"'),
    "values that double": ("json_schema", json.dumps({"$ref": "#/$defs/0", "$defs": {"40": {"const": 1}} | {
        f"{i}": {"type": "array", "prefixItems": [{"$ref": f"#/$defs/{i + 1}"}] * 2, "minItems": 2, "items": False}
        for i in range(40)}})),
    "catastrophic": ("regex", "(a+)+" * 300 + "b"),
    "alternatives of repeats": ("regex", "(a|a|aa)*" * 1000 + "b"),
    "a place far back": ("regex", "(a|b)*a(a|b){200}c"),
    "parentheses": ("regex", "(" * 60_000 + ")" * 60_000),
    "all of Unicode": ("regex", r"\p{L}{1000}\w{1000}"),
    "10,000 choices": ("choice", json.dumps([f"choice {i}" for i in range(10_000)])),
    "10,000 alternatives": ("lark", "start: " + " | ".join(f'"w{i}"' for i in range(10_000))),
    "terminals that double": ("lark", "start: A0\n" + "".join(f"A{i}: A{i + 1} A{i + 1}\n" for i in range(60)) 
                              + 'A60: "x"'),
    "a long constant": ("lark", 'start: "' + "a b " * 30_000 + '"'),
    "groups in groups": ("lark", "start: " + "(" * 50_000 + '"a"' + ")" * 50_000),
    "a chain of rules": ("lark", "start: a0\n" + "".join(f"a{i}: a{i + 1}\n" for i in range(7000)) + 'a7000: "x"'),
    "left, right and middle": ("lark", 'start: e\ne: e e | e e e | "a" | "aa" | ""'),
    "chain in GBNF": ("gbnf", "root ::= a0\n" + "".join(f"a{i} ::= a{i + 1}\n" for i in range(6000)) + 'a6000 ::= "x"'),
    "groups in GBNF": ("gbnf", "root ::= " + "(" * 60_000),
    "10,000 properties": ("json_schema", json.dumps({"properties": {f"{i}": True for i in range(8000)}})),
    "deep": ("json_schema", _nested(10_000)),
    "quite deep": ("json_schema", _nested(200)),
    "many values": ("json_schema", json.dumps({"enum": [{"a": [i]} for i in range(5000)]})),
    "many ways": ("json_schema", json.dumps({"allOf": [{"anyOf": [{"properties": {f"{i}{j}": {"type": "null"}}}
                  for j in range(3)]} for i in range(20)]})),
    "multiples": ("json_schema", json.dumps({"type": "integer", "multipleOf": 1_000_003})),
    "a chain of references": ("json_schema", json.dumps({"$ref": "#/$defs/0", "$defs": {
        f"{i}": {"$ref": f"#/$defs/{i + 1}"} for i in range(3000)}})),
    "a circle": ("json_schema", json.dumps({"$ref": "#/$defs/a", "$defs": {
        "a": {"allOf": [{"$ref": "#/$defs/b"}]}, "b": {"anyOf": [{"$ref": "#/$defs/a"}]}}})),
    "a pattern": ("json_schema", json.dumps({"type": "string", "pattern": "^(a+)+(b|c)*a(b|c){500}$"})),
    "in Lark": ("lark", 'start: "a" %json {"type": "integer", "multipleOf": 1000003}'),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_are_answered_soon(grammars: Grammars, name: str) -> None:
    grammars.compile(Grammar("regex", "a"))  # the library's tokenizer is there
    begun = time.monotonic()
    try:
        matcher = grammars.compile(Grammar(*HOSTILE[name]))()
        generator = np.random.default_rng(0)
        for _ in range(20):
            if matcher.finished or not (may := allowed(matcher)):
                break
            matcher.accept(int(generator.choice(may)))
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 500
    # A second on an idle machine; others run here too.
    assert time.monotonic() - begun < SECONDS + 1.7


def test_a_grammar_that_takes_too_long_is_not_waited_for(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    wait = threading.Event()
    monkeypatch.setattr(module, "SECONDS", 0.05)
    monkeypatch.setattr(module, "_matcher", lambda *_: wait.wait(20))
    for number in range(2):
        with pytest.raises(UserError, match="one that does not; make it smaller"):
            grammars.compile(Grammar("regex", f"slow{number}"))
    with pytest.raises(UserError, match="other large ones still at work"):
        grammars.compile(Grammar("regex", "slow3"))
    wait.set()
    monkeypatch.undo()
    time.sleep(0.05)
    assert holds(grammars, Grammar("regex", "slow3"), "slow3")  # it was never tried, so nothing is kept of it
    with pytest.raises(UserError, match="make it smaller"):
        grammars.compile(Grammar("regex", "slow1"))


def test_the_end_is_allowed_exactly_where_the_grammar_ends(grammars: Grammars) -> None:
    text = grammars._text
    one = {c: text.encode(c)[0] for c in "abc"}
    matcher = grammars.compile(Grammar("regex", "ab(c|cc)?"))()
    ends = set(grammars._ends)
    assert len(ends) == 2
    for character, end in (("a", False), ("b", True), ("c", True), ("c", True)):
        assert not matcher.finished
        matcher.accept(one[character])
        assert ends <= set(allowed(matcher)) if end else not ends & set(allowed(matcher))
    assert matcher.finished and set(allowed(matcher)) == ends
    matcher = grammars.compile(Grammar("regex", "ab"))()
    with pytest.raises(UserError, match="a token that the grammar allows"):
        matcher.accept(one["c"])


def test_padding_and_special_tokens_are_never_allowed(grammars: Grammars) -> None:
    size = grammars._text.tokenizer.get_vocab_size()
    matcher = grammars.compile(Grammar("regex", r"(?s:.)*"))()
    mask = matcher.mask()
    assert mask.dtype == np.uint32 and mask.shape == ((size + 75 + 31) // 32,)
    may = set(allowed(matcher))
    special = {grammars._text.tokenizer.token_to_id(t) for t in ("<s>", "</s>", "<|im_end|>")}
    assert special & may == set(grammars._ends)
    # Half a character may begin, a lone continuation byte may not; all else is text.
    pieces = token_bytes(grammars._text.tokenizer)
    assert set(range(size)) - may - special <= {i for i, p in enumerate(pieces) if p[0] >= 0x80}
    assert len(may) > size - 100 and max(may) < size


@pytest.mark.parametrize("extra", [0, 1, 31, 32, 33])
def test_a_tokenizer_without_an_end(extra: int) -> None:
    text = ModelTokenizer(byte_level())
    size = text.tokenizer.get_vocab_size() + extra
    found = Grammars(text, vocabulary=size)
    matcher = found.compile(Grammar("regex", "a+b"))()
    for token in (text.encode("a")[0], text.encode("a")[0], text.encode("b")[0]):
        assert max(allowed(matcher)) < text.tokenizer.get_vocab_size()
        mask = matcher.mask()
        assert len(mask) == (size + 31) // 32
        matcher.accept(token)
    assert matcher.finished and not allowed(matcher)


ODD = {"strip both ends", "replace in the text", "pattern in the text", "ctc", "BPE with ends of words"}
"""Where the prompt's last token changes what the next one says, or the text's end what the last one says."""


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ODD])
def test_every_kind_of_tokenizer(kind: str) -> None:
    """The text that a client sees, after a prompt, is one of the grammar's."""
    text = model_tokenizer(kind)
    found, generator = Grammars(text), np.random.default_rng(1)
    prompt = text.encode("a", special=False)
    choices = ["the dog", "a dog", "upon"]
    for _ in range(5):
        try:
            matcher = found.compile(Grammar("choice", json.dumps(choices)))()
        except UserError as error:
            # Every word of this one comes with a space before it.
            assert kind == "WordLevel" and "allows none" in str(error)
            return
        tokens: list[int] = []
        while not matcher.finished:
            token = int(generator.choice([t for t in allowed(matcher) if t not in text.end_tokens]))
            matcher.accept(token)
            tokens.append(token)
        stream = text.stream(prompt)
        assert "".join([*(stream.add(t) for t in tokens), stream.finish()]) in choices


def test_a_tokenizer_that_cannot_write_json() -> None:
    with pytest.raises(UserError, match="a json_object that allows a text of the model's tokens"):
        Grammars(model_tokenizer("WordPiece")).compile(Grammar("json_object"))


@pytest.mark.parametrize("make", [byte_level, byte_fallback, lambda: byte_fallback("never")])
def test_the_bytes_of_tokens_are_those_that_the_library_reads(make: Any) -> None:
    from llguidance import LLTokenizer

    library = make()
    theirs = LLTokenizer(library.to_str(), eos_token=[library.token_to_id("</s>")])
    ours = [b"" if token == b"\xff" else token for token in token_bytes(library)]  # a mark of theirs
    assert ours == [theirs.decode_bytes([i]) for i in range(library.get_vocab_size())]


def test_forced_tokens(grammars: Grammars) -> None:
    text = grammars._text
    matcher = grammars.compile(Grammar("regex", "[ab]\\.,\\.([cd]|\\?)"))()
    assert matcher.forced() == []
    matcher.accept(text.encode("a")[0])
    assert matcher.forced() == text.encode(".,.") and matcher.forced(2) == text.encode(".,")
    for token in matcher.forced():
        assert allowed(matcher) == [token]
        matcher.accept(token)


def test_what_was_compiled_is_kept_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    found, count = Grammars(model_tokenizer()), 0
    compiled = module._matcher

    def counting(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        return compiled(*arguments)

    monkeypatch.setattr(module, "_matcher", counting)
    first, second = (found.compile(Grammar("regex", "ab"))() for _ in range(2))
    assert count == 1
    first.accept(found._text.encode("a")[0])
    assert allowed(first) != allowed(second)  # one's progress is not the other's
    for number in range(KNOWN + 10):
        found.compile(Grammar("regex", f"x{number}"))
        found.compile(Grammar("regex", "ab"))
    assert count == KNOWN + 11 and len(found._known) == KNOWN


def test_several_threads_at_once(grammars: Grammars) -> None:
    texts: list[str] = []

    def work(seed: int) -> None:
        texts.append(written(grammars, Grammar("json_schema", json.dumps(SCHEMAS[20 + seed % 4])), seed))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 8 and all(isinstance(json.loads(t), dict) for t in texts)


def test_special_tokens_that_a_grammar_names(grammars: Grammars) -> None:
    text = grammars._text
    special = text.tokenizer.token_to_id("<s>")
    style = {"x-guidance": {"whitespace_flexible": False, "key_separator": ": "}}
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    matcher = grammars.compile(Grammar("lark", f"start: <[{special}]> %json {json.dumps(schema | style)}"))()
    assert allowed(matcher) == [special]
    matcher.accept(special)
    for token in text.encode('{"a": 1', special=False):
        assert token in allowed(matcher)
        matcher.accept(token)
    assert not set(text.encode(" \n\t", special=False)) & set(allowed(matcher))


def test_white_space_ends(grammars: Grammars) -> None:
    for grammar in (Grammar("json_object"), Grammar("lark", 'start: "x" %json {"type": "object"}')):
        start = "x" if grammar.kind == "lark" else ""
        assert holds(grammars, grammar, start + '{\n        "a" :\t1\n}')
        assert not holds(grammars, grammar, start + "{" + " " * 40 + "}")


JSON_GBNF = r"""
# JSON
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws (
            string ":" ws value
    ("," ws string ":" ws value)*
  )? "}" ws
array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9]{1,15})? ws
ws ::= | " " | "\n" [ \t]{0,20}
"""


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        (JSON_GBNF, ["{}", '{"a": [1, -2.5e3, "x\\n\\u00e9"], "b":{"c" :null}}', '{"ä": {}}\n  '],
         ["[]", '{"a" 1}', '{"a":01}', '{"a":"\n"}', "{", '{"a": "\\x"}']),
        ('root ::= "a"* "b"+ "c"? [d-f]{2} [x]{1,} [y]{0,2}', ["abbcdexx", "bffxyy"],
         ["acdex", "bdx", "bddxyyy"]),
        ('root ::= (\n  "a"\n | "b" # c\n) "d"', ["ad", "bd"], ["a", "abd"]),
        ("root ::= [^a-z\\n] . | [\\]\\[^-]", ["A\n", "]", "[", "^", "-", "9é"], ["a.", "\nx", "", "]]x"]),
        ('root ::= "\\u00e9\\U0001F642\\x41\\n" | "\\"\\\\"', ["é🙂A\n", '"\\'], ["e", '"']),
        ("root ::= [à-ü\\u4e00-\\u9fff]+", ["é世"], ["e", ""]),
        ('root ::= a-b | "("  root ")"\na-b ::= a_b\na_b ::= "x" | ', ["x", "((x))", "()", ""], ["(x", ")"]),
        ('root ::= term ("+" term)*\r\nterm ::= [0-9]+ |\r\n  "(" root ")"\r\n', ["1+(2+34)", "(1)"], ["1+", "()"]),
        ('root ::= s\ns ::= "a" s "b" | ""', ["", "ab", "aaabbb"], ["aab", "ba"]),
        ("root ::= [\\uD7FF-\\uE001]", ["\ue000"], ["a"]),
    ],
)  # fmt: skip
def test_gbnf(grammars: Grammars, grammar: str, good: Sequence[str], bad: Sequence[str]) -> None:
    made = Grammar("gbnf", grammar)
    assert [holds(grammars, made, text) for text in good] == [True] * len(good)
    assert [holds(grammars, made, text) for text in bad] == [False] * len(bad)


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ("root ::= a", "a in the rule of line 1"),
        ('a ::= "x"', "a rule named root"),
        ('root ::= "x"\nroot ::= "y"', "defined once, found root in line 2"),
        ('root ::= ("x"', "groups that end, found 1 that does not"),
        ('root ::= "x")', r"found '\)' in line 1"),
        ('root ::= *"x"', "something to repeat"),
        ('root ::= "x"**', "something to repeat"),
        ('root ::= "x"{0}', "repeats of at least one"),
        ('root ::= "x', "found '\"x' in line 1"),
        ("root ::= [a", r"found '\[a'"),
        ("root ::= []", "characters in a class"),
        ("root ::= [z-a]", "ranges that rise"),
        ('root ::= "\\q"', "an escape that GBNF has"),
        ('root ::= "\\u12"', "an escape with its digits"),
        ('root ::= "\\uD800"', "an escape of a character"),
        ('\n\nroot := "x"', "found ':= \"x\"' in line 3"),
        ('"x"\n', "a rule, as in"),
        ("root ::= <think>", "found '<think>'"),
        ("".join(f'a{i} ::= "x"\n' for i in range(1001)), "at most 1000 rules"),
    ],
)
def test_what_is_no_gbnf(grammar: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        lark_of_gbnf(grammar)

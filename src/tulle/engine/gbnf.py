"""llama.cpp's grammars (GBNF) in the Lark dialect of llguidance.

A GBNF rule is a name, ``::=`` and alternatives of strings, character classes, ``.``, names and groups, each with
``*``, ``+``, ``?`` or ``{m,n}``; ``root`` is the start. A rule that does not come back to itself becomes a terminal:
one regular expression for the lexer instead of a production per character. Where a terminal follows another, the
lexer's rule holds: a text belongs to the first one as long as that can go on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from tulle.errors import UserError

MOST_RULES = 1000

_TOKEN = re.compile(
    r"""(?P<space>[ \t]+|\#[^\r\n]*)|(?P<line>\r\n|\r|\n)|(?P<is>::=)|(?P<name>[A-Za-z0-9_-]+)
    |(?P<string>"(?:[^"\\\r\n]|\\.)*")|(?P<class>\[(?:[^\]\\\r\n]|\\.)*\])
    |(?P<times>[*+?]|\{[ \t]*\d+[ \t]*(?:,[ \t]*\d*[ \t]*)?\})|(?P<mark>[()|.])""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", '"': '"', "\\": "\\", "[": "[", "]": "]", "-": "-", "^": "^", "/": "/"}
_DIGITS = {"x": 2, "u": 4, "U": 8}


def lark_of_gbnf(text: str) -> str:
    """The grammar in Lark. Raises ``UserError``, with the line, for what is no GBNF."""
    rules = dict(_rules(text))
    if "root" not in rules:
        raise UserError("expected a GBNF grammar with a rule named root, found none")
    for line, body in rules.values():
        for kind, word in body:
            if kind == "name" and word not in rules:
                raise UserError(f"expected GBNF rules that are defined, found {word} in the rule of line {line}")
    terminals = _terminals(rules)
    names = {name: f"T{i}" if name in terminals else f"r{i}" for i, name in enumerate(rules)}
    lines = [f"start: {names['root']}"]
    for name, (_, body) in rules.items():
        lines.append(f"{names[name]}: " + " ".join(names[word] if kind == "name" else word for kind, word in body))
    return "\n".join(lines) + "\n"


Body = list[tuple[str, str]]
"""What a rule is made of, as (kind, Lark); names still of GBNF."""


def _rules(text: str) -> Iterator[tuple[str, tuple[int, Body]]]:
    """Names with line and body."""
    found: list[tuple[str, str, int]] = []
    place, line = 0, 1
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise _error(line, text[place : place + 20])
        kind = str(match.lastgroup)
        if kind != "space":
            found.append((kind, match.group(), line))
        line += kind == "line"
        place = match.end()
    known: set[str] = set()
    place = 0
    while True:
        while place < len(found) and found[place][0] == "line":
            place += 1
        if place == len(found):
            return
        if found[place][0] != "name" or [k for k, _, _ in found[place + 1 : place + 2]] != ["is"]:
            raise _error(found[place][2], found[place][1], "a rule, as in: name ::= ...")
        _, name, line = found[place]
        if name in known or len(known) == MOST_RULES:
            wanted = f"at most {MOST_RULES} rules" if name not in known else "rules that are defined once"
            raise UserError(f"expected a GBNF grammar with {wanted}, found {name} in line {line} too")
        known.add(name)
        body, place = _body(found, place + 2)
        yield name, (line, body)


def _body(found: list[tuple[str, str, int]], place: int) -> tuple[Body, int]:
    """The alternatives from ``place`` on, and where they end."""
    body: Body = []
    depth, before = 0, "|"
    """What came before: ``|`` or ``(``, after which an alternative begins, an element, or ``times``."""
    while place < len(found):
        kind, word, line = found[place]
        if kind == "line":
            if depth == 0 and (before != "|" or not body):
                break
        elif kind == "mark" and word in "|)":
            if before in "|(":
                body.append(("string", '""'))
            if word == ")":
                depth -= 1
                if depth < 0:
                    raise _error(line, word)
            body.append((kind, word))
            before = "|" if word == "|" else "element"
        elif kind == "times":
            if before != "element":
                raise _error(line, word, "something to repeat before it")
            times = re.sub(r"[ \t]", "", word)
            if re.fullmatch(r"\{0+(,0+)?\}", times):
                raise _error(line, word, "repeats of at least one")
            body.append((kind, times))
            before = "times"
        elif kind == "is":
            raise _error(line, word)
        else:
            lark = word
            if kind == "string":
                lark = json.dumps("".join(map(chr, _characters(word[1:-1], line))))
            elif kind == "class":
                lark = _class(word, line)
            elif word == ".":
                lark = "/(?s:.)/"
            elif word == "(":
                depth += 1
            body.append((kind, lark))
            before = "(" if word == "(" and kind == "mark" else "element"
        place += 1
    if depth:
        raise UserError(f"expected GBNF groups that end, found {depth} that {'does' if depth == 1 else 'do'} not")
    if before == "|":
        body.append(("string", '""'))
    return body, place


def _error(line: int, word: str, wanted: str = "GBNF") -> UserError:
    return UserError(f"expected {wanted}, found {word!r} in line {line} of the grammar")


def _characters(text: str, line: int) -> list[int]:
    """Code points; those of escapes below 0 where they have no meaning of their own in a class."""
    return [abs(c) for c in _escaped(text, line)]


def _escaped(text: str, line: int) -> list[int]:
    """Code points; negative where they were escaped."""
    found, place = [], 0
    while place < len(text):
        character = text[place]
        place += 1
        if character != "\\":
            found.append(ord(character))
            continue
        letter = text[place : place + 1]
        place += 1
        if letter in _DIGITS:
            digits = text[place : place + _DIGITS[letter]]
            place += _DIGITS[letter]
            if not re.fullmatch(r"[0-9A-Fa-f]+", digits) or len(digits) < _DIGITS[letter]:
                raise _error(line, f"\\{letter}{digits}", "an escape with its digits")
            code = int(digits, 16)
            if code > 0x10FFFF or 0xD800 <= code < 0xE000:
                raise _error(line, f"\\{letter}{digits}", "an escape of a character")
            found.append(-code)
        elif letter in _ESCAPES:
            found.append(-ord(_ESCAPES[letter]))
        else:
            raise _error(line, f"\\{letter}", "an escape that GBNF has")
    return found


def _class(word: str, line: int) -> str:
    """A character class as a regular expression."""
    negated = word.startswith("[^")
    codes = _escaped(word[2 if negated else 1 : -1], line)
    if not codes:
        raise _error(line, word, "characters in a class")
    parts, place = [], 0
    while place < len(codes):
        first = last = abs(codes[place])
        if place + 2 < len(codes) and codes[place + 1] == ord("-"):
            last = abs(codes[place + 2])
            place += 2
        place += 1
        if last < first:
            raise _error(line, word, "ranges that rise")
        parts += [f"\\x{{{a:x}}}-\\x{{{b:x}}}" for a, b in _without_surrogates(first, last)]
    return f"/[{'^' if negated else ''}{''.join(parts)}]/"


def _without_surrogates(first: int, last: int) -> list[tuple[int, int]]:
    """A range of characters; surrogates are none."""
    pieces = [(first, min(last, 0xD7FF)), (max(first, 0xE000), last)]
    return [(a, b) for a, b in pieces if a <= b]


def _terminals(rules: dict[str, tuple[int, Body]]) -> set[str]:
    """Rules that no chain of rules leads back to, nor to one that it does: these are regular."""
    needs = {name: {word for kind, word in body if kind == "name"} for name, (_, body) in rules.items()}
    users: dict[str, list[str]] = {name: [] for name in rules}
    for name, words in needs.items():
        for word in words:
            users[word].append(name)
    left = {name: len(words) for name, words in needs.items()}
    ready = [name for name, count in left.items() if count == 0]
    found = set()
    while ready:
        name = ready.pop()
        found.add(name)
        for user in users[name]:
            left[user] -= 1
            if left[user] == 0:
                ready.append(user)
    return found

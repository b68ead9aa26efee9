"""The next token from its logits.

Samplers and their order are those of llama.cpp, so that settings can be carried over::

    logit bias, grammar → penalties → DRY → top-k → typical → top-p → min-p → XTC → temperature → draw

Every sampler sees the probabilities of what the one before left, at temperature 1; the temperature comes last and so
decides only among what remains. (Up to version 0.1 it came first, so that top-p kept more tokens when it was high.)

At temperature 0 the token is the most likely one after bias, grammar, penalties and DRY: nothing is drawn, and what
only limits a draw (top-k, typical, top-p, min-p, XTC) has no say. Of equal logits the lowest token wins.

Where llama.cpp lets a grammar reject a drawn token and draws again, tokens that may not follow are taken out first:
the shares of top-p and of the others are those of the tokens that may.
"""

from __future__ import annotations

import bisect
import itertools
import math
import secrets
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tulle.errors import UserError
from tulle.text.tokenizer import ModelTokenizer

BREAKERS = ("\n", ":", '"', "*")
"""llama.cpp's sequence breakers."""
MOST_BREAKERS, LONGEST_BREAKER, LONGEST_TAIL = 32, 40, 20
"""Breakers, characters of one, and tokens that a token which begins one may still lack of it."""
LARGEST_BIAS = 10_000.0
LARGEST_PENALTY = 1e30
"""Of DRY; two tokens that it takes out remain equal."""

_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
_BANS = np.where(_BITS, 0, -np.inf).astype(np.float32)
"""What each byte of a mask adds to the logits of its eight tokens."""
FEW = 1024
"""Scores that are simply sorted."""

Floats = NDArray[np.float32]
Tokens = NDArray[np.int64]


@dataclass(frozen=True)
class Sampling:
    """Settings. By default greedy: everything else is off. Raises ``UserError`` for values out of range."""

    temperature: float = 0.0
    """Divides the logits; 0 takes the most likely token."""
    top_k: int = 0
    """Only so many of the most likely tokens; 0: all."""
    top_p: float = 1.0
    """Only the fewest most likely tokens whose probabilities add up to this (Holtzman et al. 2020)."""
    repetition_penalty: float = 1.0
    """Logits of tokens that occurred are divided by it where positive, else multiplied (Keskar et al. 2019)."""
    seed: int | None = 0
    """Equal seeds draw equal tokens; None: one by chance, which :attr:`Sampler.seed` tells."""
    min_p: float = 0.0
    """Only tokens at least this share as likely as the most likely one (Nguyen et al. 2024)."""
    typical_p: float = 1.0
    """Only tokens whose information is nearest to the entropy, adding up to this (Meister et al. 2022)."""
    xtc_probability: float = 0.0
    """How often XTC takes out all tokens that reach its threshold but the least likely of them; 0: never."""
    xtc_threshold: float = 0.1
    """In probability; above 0.5 XTC is off, for two tokens cannot both reach it."""
    dry_multiplier: float = 0.0
    """DRY's penalty for a token that would go on with a repetition of ``dry_allowed_length`` tokens; 0: off."""
    dry_base: float = 1.75
    """Every token that the repetition is longer multiplies the penalty by this."""
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    """DRY looks for repetitions in so many last tokens; -1: all, 0: off."""
    dry_sequence_breakers: tuple[str, ...] = BREAKERS
    """No repetition reaches back over one of these strings."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens that occurred."""
    frequency_penalty: float = 0.0
    """Taken from the logits of tokens, times how often they occurred."""
    repeat_last_n: int = -1
    """The three penalties count so many last tokens, of prompt and continuation; -1: all, 0: off. (llama.cpp's own
    default is 64.)"""
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    """Added to the logits of these tokens; minus infinity bans one."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "dry_sequence_breakers", _strings(self.dry_sequence_breakers))
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        inf = math.inf
        _number("temperature", self.temperature, 0, inf, "0 is greedy, 1 neutral", open_end=True)
        _whole("top-k", self.top_k, 0, "0 takes all tokens")
        _number("top-p", self.top_p, 0, 1, "1 takes all tokens", open_start=True)
        _number("repetition penalty", self.repetition_penalty, 0.01, 100, "1 is none")
        if self.seed is not None:
            _whole("seed", self.seed, 0, "any whole number from 0 on will do")
        _number("min-p", self.min_p, 0, 1, "0 takes all tokens")
        _number("typical-p", self.typical_p, 0, 1, "1 takes all tokens", open_start=True)
        _number("XTC probability", self.xtc_probability, 0, 1, "0 is off")
        _number("XTC threshold", self.xtc_threshold, 0, 1, "0.1 is usual")
        _number("DRY multiplier", self.dry_multiplier, 0, inf, "0 is off, 0.8 usual", open_end=True)
        _number("DRY base", self.dry_base, 1, inf, "1.75 is usual", open_end=True)
        _whole("DRY allowed length", self.dry_allowed_length, 0, "2 is usual")
        _whole("DRY last n", self.dry_penalty_last_n, -1, "-1 looks at all tokens")
        _number("presence penalty", self.presence_penalty, -100, 100, "0 is none")
        _number("frequency penalty", self.frequency_penalty, -100, 100, "0 is none")
        _whole("repeat last n", self.repeat_last_n, -1, "-1 looks at all tokens")

    def check(self, vocabulary: int) -> None:
        """Raises ``UserError`` where a biased token is none of so many."""
        unknown = [token for token in self.logit_bias if token >= vocabulary]
        if unknown:
            raise UserError(f"expected logit biases for tokens below {vocabulary}, found one for {max(unknown)}")


def _number(
    name: str, value: object, low: float, high: float, hint: str, open_start: bool = False, open_end: bool = False
) -> None:
    if isinstance(value, Real) and not isinstance(value, bool):
        number = float(value)
        # No comparison with NaN holds.
        if (low < number if open_start else low <= number) and (number < high if open_end else number <= high):
            return
    start = f"above {low}" if open_start else f"of {low} or more"
    end = "" if high == math.inf else f" and at most {high}"
    raise UserError(f"expected a {name} {start}{end}, found {value!r}; {hint}")


def _whole(name: str, value: object, low: int, hint: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < low:
        raise UserError(f"expected a {name} of {low} or more, found {value!r}; {hint}")


def _strings(breakers: object) -> tuple[str, ...]:
    if isinstance(breakers, str) or not isinstance(breakers, Sequence):
        raise UserError(f"expected DRY sequence breakers as a list of strings, found {breakers!r}")
    if len(breakers) > MOST_BREAKERS:
        raise UserError(f"expected at most {MOST_BREAKERS} DRY sequence breakers, found {len(breakers)}")
    for breaker in breakers:
        if not isinstance(breaker, str) or not 0 < len(breaker) <= LONGEST_BREAKER:
            raise UserError(
                f"expected DRY sequence breakers of 1 to {LONGEST_BREAKER} characters, found {str(breaker)[:60]!r}"
            )
    return tuple(breakers)


def _biases(biases: object) -> dict[int, float]:
    if not isinstance(biases, Mapping):
        raise UserError(f"expected logit biases as a mapping of tokens to numbers, found {type(biases).__name__}")
    for token, bias in biases.items():
        _whole("token", token, 0, "logit biases are by token id")
        if bias != -math.inf:
            _number("logit bias", bias, -LARGEST_BIAS, LARGEST_BIAS, "minus infinity bans a token")
    return {int(token): float(bias) for token, bias in biases.items()}


@dataclass(frozen=True)
class TokenLogprobs:
    """Of one token, from the model's own logits: before temperature, penalties and constraints."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens and their log-probabilities, falling."""


def log_probabilities(logits: Floats, token: int, top: int = 0) -> TokenLogprobs:
    """Of ``token`` and of the ``top`` most likely ones, from logits ``[V]``."""
    most = logits.max()
    total = float(most) + math.log(np.exp(logits - most).sum())
    pairs: tuple[tuple[int, float], ...] = ()
    if top:
        tokens, found = largest(logits, top)
        pairs = tuple(zip(tokens.tolist(), (found.astype(np.float64) - total).tolist(), strict=True))
    return TokenLogprobs(token, float(logits[token]) - total, pairs)


class Sampler:
    """Draws the tokens of one sequence from a generator of its own.

    Equal seeds, logits and ``seen`` give equal tokens, whatever else runs. ``tokenizer`` is asked for DRY's sequence
    breakers only. Raises ``UserError`` where it is needed and missing.
    """

    def __init__(self, settings: Sampling, tokenizer: ModelTokenizer | None = None):
        self.settings = s = settings
        self.seed = secrets.randbits(32) if s.seed is None else int(s.seed)
        """What the generator began with: the settings' seed, or one by chance."""
        self._generator = np.random.Generator(np.random.PCG64(self.seed))
        self._penalties = s.repeat_last_n != 0 and (
            s.repetition_penalty != 1 or s.presence_penalty != 0 or s.frequency_penalty != 0
        )
        self._dry = s.dry_multiplier > 0 and s.dry_penalty_last_n != 0
        self._breakers: Breakers = {}
        if self._dry and s.dry_sequence_breakers:
            if tokenizer is None:
                raise UserError(
                    "expected a tokenizer for DRY's sequence breakers, found none; give no breakers, or one"
                )
            self._breakers = breakers(tokenizer, s.dry_sequence_breakers)
        self._biased = np.fromiter(s.logit_bias.keys(), np.int64)
        self._bias = np.fromiter(s.logit_bias.values(), np.float32)
        self._history = _History()

    def choose(self, logits: Floats, seen: Sequence[int] = (), allowed: NDArray[np.uint32] | None = None) -> int:
        """A token for logits ``[V]``.

        ``seen``: the tokens so far, prompt and continuation; ``allowed``: the tokens that may follow, a bit each,
        ``[(V + 31) / 32]``, the lowest first; None: all. Raises ``UserError`` where no token may, or where logits are
        no numbers.
        """
        scores = self.scores(logits, seen, allowed)
        if self.settings.temperature == 0:
            best = int(scores.argmax())
            _check(scores[best])
            return best
        tokens, left = candidates(self.settings, scores, self._generator)
        return _draw(tokens, left, self.settings.temperature, self._generator.random())

    def scores(self, logits: Floats, seen: Sequence[int] = (), allowed: NDArray[np.uint32] | None = None) -> Floats:
        """Logits after bias, grammar, penalties and DRY, ``[V]``; minus infinity: may not follow."""
        penalised = (self._penalties or self._dry) and len(seen) > 0
        if allowed is None and not penalised and not len(self._biased):
            return logits
        if allowed is None:
            scores = logits.copy()
        else:
            # Bits to 0 and minus infinity, eight at a time.
            scores = _BANS.take(allowed.view(np.uint8), axis=0).reshape(-1)[: len(logits)]
            scores += logits
        if len(self._biased):
            self.settings.check(len(logits))
            scores[self._biased] += self._bias
        if penalised:
            tokens = self._history.follow(seen)
            if self._penalties:
                self._penalise(scores, tokens)
            if self._dry:
                self._penalise_repetitions(scores, tokens)
        return scores

    def _penalise(self, scores: Floats, tokens: NDArray[np.int32]) -> None:
        s = self.settings
        window = tokens if s.repeat_last_n < 0 else tokens[-s.repeat_last_n :]
        known, count = np.unique(window, return_counts=True)
        found = scores[known].astype(np.float64)
        found = np.where(found > 0, found / s.repetition_penalty, found * s.repetition_penalty)
        scores[known] = found - count * s.frequency_penalty - s.presence_penalty

    def _penalise_repetitions(self, scores: Floats, tokens: NDArray[np.int32]) -> None:
        s = self.settings
        window = tokens if s.dry_penalty_last_n < 0 else tokens[-s.dry_penalty_last_n :]
        longest = repetitions(window, self._breakers, s.dry_allowed_length)
        # Beyond it a float32 would overflow.
        most = math.log(np.finfo(np.float32).max) / math.log(s.dry_base) if s.dry_base > 1.000001 else math.inf
        for token, length in longest.items():
            penalty = s.dry_multiplier * s.dry_base ** min(length - s.dry_allowed_length, most)
            scores[token] -= min(penalty, LARGEST_PENALTY)


class _History:
    """The tokens of a sequence as an array that grows with it."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._array = np.empty(256, np.int32)

    def follow(self, seen: Sequence[int]) -> NDArray[np.int32]:
        """``seen`` as an array; quick where it only grew since the last call."""
        known, count = len(self._tokens), len(seen)
        if list(seen[:known]) != self._tokens:
            self._tokens, known = [], 0
        new = list(seen[known:])
        self._tokens += new
        if count > len(self._array):
            larger = np.empty(2 * count, np.int32)
            larger[:known] = self._array[:known]
            self._array = larger
        self._array[known:count] = new
        return self._array[:count]


# DRY ------------------------------------------------------------------------------------------------------------------

Breakers = Mapping[int, Sequence[tuple[int, ...]]]
"""Tokens in which a breaker ends or begins: the tokens that must follow for all of it to be there; none: it is."""

_known_breakers: OrderedDict[tuple[int, tuple[str, ...]], Breakers] = OrderedDict()
_known_texts: dict[int, _Texts] = {}


class _Texts:
    """What every token decodes to alone, special tokens too, in an order to search."""

    def __init__(self, tokenizer: ModelTokenizer):
        library = tokenizer.tokenizer
        count = library.get_vocab_size()
        self._texts = library.decode_batch([[token] for token in range(count)], skip_special_tokens=False)
        self._joined = "\0".join(self._texts)
        self._starts = list(itertools.accumulate((len(text) + 1 for text in self._texts), initial=0))
        self._reversed = sorted((text[::-1], token) for token, text in enumerate(self._texts))

    def holding(self, string: str) -> Iterator[int]:
        """Tokens that hold a string."""
        place = self._joined.find(string)
        while place >= 0:
            token = bisect.bisect_right(self._starts, place) - 1
            if string in self._texts[token]:
                yield token
            place = self._joined.find(string, self._starts[token + 1])

    def ending(self, string: str) -> Iterator[int]:
        """Tokens that end with a string."""
        wanted = string[::-1]
        for place in range(bisect.bisect_left(self._reversed, (wanted, -1)), len(self._reversed)):
            text, token = self._reversed[place]
            if not text.startswith(wanted):
                return
            yield token


def _texts(tokenizer: ModelTokenizer) -> _Texts:
    key = id(tokenizer)
    if key not in _known_texts:
        _known_texts[key] = _Texts(tokenizer)
        weakref.finalize(tokenizer, _forget, key)
    return _known_texts[key]


def _forget(key: int) -> None:
    _known_texts.pop(key, None)
    for known in [k for k in _known_breakers if k[0] == key]:
        _known_breakers.pop(known, None)


def breakers(tokenizer: ModelTokenizer, strings: Sequence[str]) -> Breakers:
    """Where in tokens the strings stand, as llama.cpp finds them.

    A token that holds a string ends it. A token whose text ends with the beginning of one must be followed by the
    tokens of its rest, at most 20. Computed once per tokenizer and strings.
    """
    key = (id(tokenizer), tuple(strings))
    if key in _known_breakers:
        _known_breakers.move_to_end(key)
        return _known_breakers[key]
    found: dict[int, list[tuple[int, ...]]] = {}
    texts = _texts(tokenizer)
    for string in strings:
        for token in texts.holding(string):
            found.setdefault(token, []).append(())
        for length in range(1, len(string)):
            tail = tuple(tokenizer.encode(string[length:], special=False)[:LONGEST_TAIL])
            for token in texts.ending(string[:length]):
                if tail not in found.setdefault(token, []):
                    found[token].append(tail)
    _known_breakers[key] = found
    while len(_known_breakers) > 64:
        _known_breakers.popitem(last=False)
    return found


def repetitions(tokens: NDArray[np.int32], breakers: Breakers, allowed_length: int) -> dict[int, int]:
    """Tokens that would go on with a repetition, and the length of the longest one that each would.

    ``tokens`` ``[n]``: what DRY looks at. For every earlier place, the tokens that end there are compared with those
    that end the text; the match does not reach over a breaker. Where it has at least ``allowed_length`` tokens, the
    token after it is the one that would repeat. Tokens that hold a breaker are left out. All matches together take time
    O(n), by the Z-algorithm on the reversed text.
    """
    n = len(tokens)
    if n <= allowed_length:
        return {}
    text = tokens[::-1].tolist()
    limit = _before_breaker(text, breakers)
    if limit < allowed_length:
        return {}
    longest: dict[int, int] = {}

    def note(place: int, length: int) -> None:
        length = min(length, limit)
        # The token that followed the match stands one place nearer to the end.
        follower = text[place - 1]
        if length >= allowed_length and length > longest.get(follower, -1):
            longest[follower] = length

    if allowed_length == 0:
        for place in range(1, n):
            note(place, 0)
    # z[k]: how many tokens from k on are those from 0 on; known where it is not 0.
    z: dict[int, int] = {}
    left = right = 0  # the match [left, right) that reaches furthest
    for k in (np.flatnonzero(tokens[-2::-1] == tokens[-1]) + 1).tolist():
        length = min(z.get(k - left, 0), right - k) if k < right else 0
        if k + length >= right:
            while k + length < n and text[length] == text[k + length]:
                length += 1
            left, right = k, k + length
        z[k] = length
        note(k, length)
    return {token: length for token, length in longest.items() if () not in breakers.get(token, ())}


def _before_breaker(text: Sequence[int], breakers: Breakers) -> int:
    """How many tokens follow the last breaker; ``text`` is reversed."""
    for place, token in enumerate(text):
        tails = breakers.get(token)
        if tails is None:
            continue
        lengths = [
            len(tail)
            for tail in tails
            if len(tail) <= place and all(tail[i] == text[place - i - 1] for i in range(len(tail)))
        ]
        if lengths:
            return place - max(lengths)
    return len(text)


# What remains to draw from ------------------------------------------------------------------------------------------


def candidates(settings: Sampling, scores: Floats, generator: np.random.Generator) -> tuple[Tokens | None, Floats]:
    """Tokens that remain after top-k, typical, top-p, min-p and XTC, and their scores; equal scores by token.

    ``None`` and all scores, by token, where that is no more work. XTC asks ``generator`` for one number, every time.
    """
    s = settings
    xtc = s.xtc_probability > 0 and generator.random() < s.xtc_probability and s.xtc_threshold <= 0.5
    _check(scores.max())
    tokens: Tokens | None = None
    left = scores
    if 0 < s.top_k < len(scores):
        tokens, left = largest(scores, s.top_k)
    if s.typical_p < 1:
        tokens, left = _taken(tokens, left, _typical(left, s.typical_p))
    if s.top_p < 1:
        tokens, left = _taken(tokens, left, _top_p(left, s.top_p))
    if s.min_p > 0:
        tokens, left = _taken(tokens, left, np.flatnonzero(left >= left.max() + math.log(s.min_p)))
    if xtc:
        left = _without_top(left, s.xtc_threshold)
    return tokens, left


def _taken(tokens: Tokens | None, left: Floats, places: Tokens) -> tuple[Tokens, Floats]:
    return places if tokens is None else tokens[places], left[places]


def _check(most: np.floating) -> None:
    """Of the largest score."""
    if most == -np.inf:
        raise UserError("expected a token that may follow, found none; ban fewer with logit biases or a grammar")
    if not np.isfinite(most):
        raise UserError(f"expected logits that are numbers, found {most}; the model's weights may be broken")


def largest(scores: Floats, count: int) -> tuple[Tokens, Floats]:
    """The ``count`` tokens of the largest scores, and these, falling.

    Of equal scores the lowest tokens; of minus infinity none.
    """
    width = len(scores) // 64
    # The largest of 64 rows each: `count` of these are as many scores, so that none of the `count` largest scores is
    # below them all. Few others reach them.
    within = scores[: 64 * width].reshape(64, width).max(axis=0) if count < width else scores
    place = len(within) - min(count, len(within))
    least = np.partition(within, place)[place]
    tokens = np.flatnonzero(scores >= least if least > -np.inf else scores > -np.inf)
    found = scores[tokens]
    order = np.argsort(-found, kind="stable")[:count]
    return tokens[order], found[order]


def _fewest(keys: Floats, weights: NDArray[np.floating], needed: float, beyond: bool = False) -> Tokens:
    """Places, rising, of the fewest smallest keys whose weights add up to ``needed``, or to more if ``beyond``.

    Keys are 0 or more. Of equal keys the lowest places. The key that crosses the line is in.
    """
    side: Literal["left", "right"] = "right" if beyond else "left"
    before, some, keep = 0.0, np.arange(len(keys)), np.zeros(len(keys), np.bool_)
    if len(keys) > FEW:
        # The first bits of a float that is not negative order it: sort only the keys that share those of the one that
        # crosses. Minus infinity as a score makes the largest key, infinity.
        bucket = keys.view(np.int32) >> 16
        reach = np.bincount(bucket, weights).cumsum()
        cross = min(int(np.searchsorted(reach, needed, side)), len(reach) - 1)
        before, some = float(reach[cross - 1]) if cross else 0.0, np.flatnonzero(bucket == cross)
        keep = bucket < cross
    some = some[np.argsort(keys[some], kind="stable")]
    count = int(np.searchsorted(before + weights[some].cumsum(dtype=np.float64), needed, side)) + 1
    keep[some[:count]] = True
    return np.flatnonzero(keep)


def _top_p(left: Floats, p: float) -> Tokens:
    keys = np.abs(left.max() - left)  # without -0.0
    shares = np.exp(-keys)
    needed = p * float(shares.sum(dtype=np.float64))
    # Most often few tokens carry that much.
    for least in (1e-2, 1e-4, 1e-6) if len(left) > FEW else ():
        places = np.flatnonzero(shares >= least)
        some = shares[places]
        if some.sum(dtype=np.float64) > needed:
            return places[_fewest(keys[places], some, needed)]
    return _fewest(keys, shares, needed)


def _typical(left: Floats, p: float) -> Tokens:
    shifted = left - left.max()
    shares = np.exp(shifted)
    total = float(shares.sum(dtype=np.float64))
    # Information is log(total) - shifted; 0 · inf is 0 here.
    mean = float((shares * np.maximum(shifted, -1e30)).sum(dtype=np.float64)) / total
    return _fewest(np.abs(shifted - np.float32(mean)), shares, p * total, beyond=True)


def _without_top(left: Floats, threshold: float) -> Floats:
    """XTC (exclude top choices): minus infinity for them."""
    shares = np.exp(left - left.max())
    above = np.flatnonzero((shares >= threshold * shares.sum(dtype=np.float64)) & (left > -np.inf))
    if len(above) < 2:
        return left
    # The least likely of them stays; of several the last, as if they were sorted.
    stays = len(above) - 1 - int(left[above][::-1].argmin())
    left = left.copy()
    left[np.delete(above, stays)] = -np.inf
    return left


def _draw(tokens: Tokens | None, left: Floats, temperature: float, chance: float) -> int:
    """A token by its share; ``chance`` in [0, 1)."""
    with np.errstate(over="ignore"):  # a very small temperature: minus infinity is right
        shares = np.exp((left - left.max()) / np.float32(max(temperature, 1e-30)))
    place = _place(shares, chance)
    return place if tokens is None else int(tokens[place])


def _place(shares: Floats, chance: float) -> int:
    """The first place up to which there is more than this part of the whole."""
    if len(shares) <= FEW:
        return _first(shares.cumsum(dtype=np.float64), chance)
    # First one of the blocks of 256, then one in it: a sum over all places in turn would be slow.
    whole = len(shares) // 256 * 256
    sums = shares[:whole].reshape(-1, 256).sum(axis=1).astype(np.float64)
    reach = np.append(sums, shares[whole:].sum(dtype=np.float64)).cumsum()
    block = _first(reach, chance)
    before = reach[block - 1] if block else 0.0
    inside = shares[256 * block : 256 * block + 256].cumsum(dtype=np.float64)
    return 256 * block + _first(inside, (chance * reach[-1] - before) / (reach[block] - before))


def _first(reach: NDArray[np.float64], chance: float) -> int:
    place = int(np.searchsorted(reach, chance * reach[-1], "right"))
    # Rounding may ask for the end: then the last place that adds something.
    return place if place < len(reach) else int(np.searchsorted(reach, reach[-1]))

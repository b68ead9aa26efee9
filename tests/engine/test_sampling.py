"""Every sampler against a plain one that is written here from its definition, on random logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, currently_in_test_context, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from tokenizers_in_memory import byte_level, metaspace

from tulle.engine import Sampling
from tulle.engine.sampling import Sampler, breakers, candidates, log_probabilities, repetitions
from tulle.errors import UserError
from tulle.text.tokenizer import ModelTokenizer

QUICK = settings(max_examples=40, deadline=None)
VOCABULARIES = st.sampled_from([1, 2, 7, 63, 64, 65, 200, 1025, 1500])
"""On both sides of every short cut: 64 columns, FEW, blocks of 256."""


@st.composite
def some_logits(draw: st.DrawFn) -> NDArray[np.float32]:
    size, scale = draw(VOCABULARIES), draw(st.sampled_from([0.01, 1.0, 4.0, 30.0]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    logits = generator.normal(size=size) * scale
    if draw(st.booleans()):
        logits = np.round(logits)  # many are equal
    if size > 1 and draw(st.booleans()):
        logits[generator.permutation(size)[: generator.integers(1, size)]] = -np.inf
    return logits.astype(np.float32)


def clear(holds: bool) -> None:
    """Rounding does not decide."""
    if currently_in_test_context():
        assume(holds)
    else:
        assert holds


class Plain:
    """The samplers over a list of (token, logit), as their papers and llama.cpp define them."""

    def __init__(self, logits: NDArray[np.float32]):
        self.left = [(t, float(x)) for t, x in enumerate(logits) if x > -np.inf]
        self.left.sort(key=lambda pair: (-pair[1], pair[0]))

    def shares(self, temperature: float = 1.0) -> list[float]:
        weights = [math.exp((x - self.left[0][1]) / temperature) for _, x in self.left]
        return [w / math.fsum(weights) for w in weights]

    def until(self, order: Sequence[int], p: float) -> None:
        total, kept, shares = 0.0, [], self.shares()
        for place in order:
            kept.append(place)
            total += shares[place]
            clear(abs(total - p) > 2e-6)
            if total >= p:
                break
        self.left = [self.left[place] for place in sorted(kept)]

    def top_k(self, k: int) -> None:
        self.left = self.left[: k or None]

    def typical(self, p: float) -> None:
        shares = self.shares()
        # A share that underflows has no part in the entropy.
        entropy = -math.fsum(s * math.log(s) for s in shares if s > 0)
        total = math.log(math.fsum(math.exp(x - self.left[0][1]) for _, x in self.left))
        keys = [abs(self.left[0][1] - x + total - entropy) for _, x in self.left]
        order = sorted(range(len(shares)), key=lambda i: (keys[i], self.left[i][0]))
        for a, b in zip(order, order[1:], strict=False):
            clear(self.left[a][1] == self.left[b][1] or keys[b] - keys[a] > 1e-4)
        if p < 1:
            self.until(order, p)

    def top_p(self, p: float) -> None:
        if p < 1:
            self.until(range(len(self.left)), p)

    def min_p(self, p: float) -> None:
        shares = self.shares()
        clear(all(abs(s - p * shares[0]) > 1e-6 * shares[0] or p in (0, 1) for s in shares))
        self.left = [pair for pair, s in zip(self.left, shares, strict=True) if s >= p * shares[0]]

    def xtc(self, threshold: float) -> None:
        shares = self.shares()
        clear(all(abs(s - threshold) > 1e-6 for s in shares))
        above = sum(s >= threshold for s in shares)
        if threshold <= 0.5 and above > 1:
            self.left = self.left[above - 1 :]


def remaining(chosen: Sampling, logits: NDArray[np.float32]) -> dict[int, float]:
    tokens, left = candidates(chosen, logits, np.random.default_rng(0))
    numbers = range(len(left)) if tokens is None else tokens.tolist()
    return {t: float(x) for t, x in zip(numbers, left, strict=True) if x > -np.inf}


@QUICK
@given(some_logits(), st.integers(1, 6000))
def test_top_k(logits: NDArray[np.float32], k: int) -> None:
    plain = Plain(logits)
    plain.top_k(k)
    assert remaining(Sampling(1.0, top_k=k), logits) == dict(plain.left)


@QUICK
@given(some_logits(), st.floats(0.001, 0.9999))
def test_top_p(logits: NDArray[np.float32], p: float) -> None:
    plain = Plain(logits)
    plain.top_p(p)
    assert remaining(Sampling(1.0, top_p=p), logits) == dict(plain.left)


@QUICK
@given(some_logits(), st.floats(0, 1))
def test_min_p(logits: NDArray[np.float32], p: float) -> None:
    plain = Plain(logits)
    plain.min_p(p)
    assert remaining(Sampling(1.0, min_p=p), logits) == dict(plain.left)


@settings(QUICK, suppress_health_check=())
@given(st.integers(0, 2**32), st.sampled_from([2, 9, 60]), st.floats(0.01, 0.99))
def test_typical(seed: int, size: int, p: float) -> None:
    logits = (np.random.default_rng(seed).normal(size=size) * 3).astype(np.float32)
    plain = Plain(logits)
    plain.typical(p)
    assert remaining(Sampling(1.0, typical_p=p), logits) == dict(plain.left)


def test_typical_of_many_tokens() -> None:
    logits = (np.random.default_rng(3).normal(size=40000) * 3).astype(np.float32)
    shares = np.exp(logits.astype(np.float64))
    shares /= shares.sum()
    order = np.argsort(np.abs(-np.log(shares) + (shares * np.log(shares)).sum()))
    wanted = set(order[: int(np.searchsorted(shares[order].cumsum(), 0.8)) + 1].tolist())
    found = set(remaining(Sampling(1.0, typical_p=0.8), logits))
    # In float32 a token on the border may be another.
    assert len(wanted) > 500 and len(found ^ wanted) <= 2


@QUICK
@given(some_logits(), st.floats(0, 1))
def test_xtc(logits: NDArray[np.float32], threshold: float) -> None:
    plain = Plain(logits)
    plain.xtc(threshold)
    assert remaining(Sampling(1.0, xtc_probability=1.0, xtc_threshold=threshold), logits) == dict(plain.left)
    assert remaining(Sampling(1.0, xtc_threshold=threshold), logits) == dict(Plain(logits).left)


@QUICK
@given(
    some_logits(), st.integers(0, 100), st.sampled_from([1.0, 0.7]), st.sampled_from([1.0, 0.9, 0.5]),
    st.sampled_from([0.0, 0.05]), st.sampled_from([0.0, 1.0]),
)  # fmt: skip
def test_all_of_them_in_llama_cpps_order(
    logits: NDArray[np.float32], k: int, typical: float, p: float, least: float, xtc: float
) -> None:
    assume(typical == 1 or 0 < k or len(logits) < 100)
    plain = Plain(logits)
    plain.top_k(k)
    if typical < 1:
        plain.typical(typical)
    plain.top_p(p)
    plain.min_p(least)
    if xtc:
        plain.xtc(0.1)
    chosen = Sampling(0.7, k, p, min_p=least, typical_p=typical, xtc_probability=xtc)
    assert remaining(chosen, logits) == dict(plain.left)


def drawn(chosen: dict[str, Any], logits: NDArray[np.float32], count: int, **more: Any) -> NDArray[np.int64]:
    sampler = Sampler(Sampling(**chosen))
    return np.bincount([sampler.choose(logits, **more) for _ in range(count)], minlength=len(logits))


@pytest.mark.parametrize(
    ("chosen", "size"),
    [
        ({"temperature": 1.0}, 12),
        ({"temperature": 0.6, "seed": 1}, 2000),
        ({"temperature": 2.0, "top_k": 40, "top_p": 0.95, "seed": 2}, 1500),
        ({"temperature": 3.0, "top_p": 0.98, "seed": 3}, 1500),
        ({"temperature": 1.5, "min_p": 0.02, "seed": 4}, 2000),
        ({"temperature": 1.5, "xtc_probability": 1.0, "xtc_threshold": 0.05, "seed": 5}, 2000),
    ],
)
def test_tokens_are_drawn_by_their_shares(chosen: dict[str, Any], size: int) -> None:
    logits = (np.random.default_rng(size).normal(size=size) * 2.5).astype(np.float32)
    plain = Plain(logits)
    plain.top_k(chosen.get("top_k", 0))
    plain.top_p(chosen.get("top_p", 1))
    plain.min_p(chosen.get("min_p", 0))
    if "xtc_probability" in chosen:
        plain.xtc(0.05)
    count = 6000
    expected = np.zeros(size)
    expected[[t for t, _ in plain.left]] = np.array(plain.shares(chosen["temperature"])) * count
    found = drawn(chosen, logits, count)
    assert found[expected == 0].sum() == 0
    # Chi-square wants at least about 5 per class: rare tokens are one class.
    common = expected >= 10
    classes = np.append(expected[common], expected[~common].sum())
    counts = np.append(found[common], found[~common].sum())
    keep = classes > 0
    assert stats.chisquare(counts[keep], classes[keep] * count / classes.sum()).pvalue > 0.001
    # A wrong temperature would be seen.
    wrong = np.array(plain.shares(chosen["temperature"] * 2))
    table = np.zeros(size)
    table[[t for t, _ in plain.left]] = wrong * count
    classes = np.append(table[common], table[~common].sum())
    assert stats.chisquare(counts[keep], classes[keep] * count / classes.sum()).pvalue < 1e-6


def test_how_often_xtc_takes_part() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    found = drawn({"temperature": 1.0, "xtc_probability": 0.4, "xtc_threshold": 0.2, "seed": 8}, logits, 8000)
    # With it, of the two above the threshold only the less likely stays.
    expected = 0.6 * np.array([0.5, 0.3, 0.15, 0.05]) + 0.4 * np.array([0, 0.6, 0.3, 0.1])
    assert stats.chisquare(found, expected * 8000).pvalue > 0.001


@QUICK
@given(some_logits(), st.integers(0, 2**64))
def test_masks_and_greedy(logits: NDArray[np.float32], seed: int) -> None:
    allowed = np.random.default_rng(seed).random(len(logits)) < 0.3
    bits = np.zeros((len(logits) + 31) // 32 * 32, np.uint8)
    bits[: len(logits)] = allowed
    bits[len(logits) :] = 1  # padding says nothing
    mask = np.packbits(bits, bitorder="little").view(np.uint32)
    usable = np.flatnonzero(allowed & (logits > -np.inf))
    for chosen in (Sampling(), Sampling(1.0, seed=seed), Sampling(1.0, 5, 0.9, seed=seed)):
        if not len(usable):
            with pytest.raises(UserError, match="a token that may follow, found none"):
                Sampler(chosen).choose(logits, (), mask)
            continue
        token = Sampler(chosen).choose(logits, (), mask)
        assert token in usable
        if chosen.temperature == 0:
            assert token == usable[logits[usable].argmax()]
    greedy = Sampler(Sampling(0.0, 3, 0.1, min_p=1.0, typical_p=0.2, xtc_probability=1.0))
    assert greedy.choose(logits) == int(logits.argmax())


def test_penalties_and_biases_by_their_formulas() -> None:
    generator = np.random.default_rng(5)
    logits = (generator.normal(size=500) * 4).astype(np.float32)
    seen = generator.integers(0, 40, 3000).tolist()
    kept = logits.copy()
    for last in (-1, 0, 1, 64, 1000, 5000):
        chosen = Sampling(
            repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=-0.2, repeat_last_n=last,
            logit_bias={3: 2.5, 7: -math.inf, 499: -1.0},
        )  # fmt: skip
        window = seen if last < 0 else seen[len(seen) - last :] if last <= len(seen) else seen
        wanted = logits.astype(np.float64)
        wanted[3] += 2.5
        wanted[499] -= 1
        for token in set(window):
            wanted[token] = wanted[token] / 1.3 if wanted[token] > 0 else wanted[token] * 1.3
            wanted[token] -= 0.4 - 0.2 * window.count(token)
        wanted[7] = -math.inf
        found = Sampler(chosen).scores(logits, seen)
        assert np.allclose(found, wanted, rtol=1e-5, atol=1e-4)
    assert (logits == kept).all()  # the engine's own array


def test_penalties_follow_a_sequence_as_it_grows_and_when_it_is_another() -> None:
    generator = np.random.default_rng(6)
    logits = generator.normal(size=300).astype(np.float32)
    chosen = Sampling(frequency_penalty=0.5, dry_multiplier=0.8, dry_sequence_breakers=())
    sampler, seen = Sampler(chosen), []
    for step in range(700):
        seen.append(int(generator.integers(0, 300 if step % 3 else 5)))
        if step in (100, 400):
            seen[step // 2] = 299  # another history of the same length
        if step % 7 == 0 or step in (100, 400):
            assert (sampler.scores(logits, seen) == Sampler(chosen).scores(logits, list(seen))).all()
    assert (sampler.scores(logits, seen[:50]) == Sampler(chosen).scores(logits, seen[:50])).all()


def plain_dry(tokens: list[int], ends: dict[int, list[tuple[int, ...]]], allowed: int) -> dict[int, int]:
    """DRY by its definition: every earlier place, every length."""
    n = len(tokens)
    limit = n
    for place in range(n - 1, -1, -1):
        tails = [t for t in ends.get(tokens[place], []) if tuple(tokens[place + 1 : place + 1 + len(t)]) == t]
        if tails:
            limit = n - 1 - place - max(len(t) for t in tails)
            break
    found: dict[int, int] = {}
    for end in range(1, n):
        length = 0
        while length < min(end, limit) and tokens[end - 1 - length] == tokens[n - 1 - length]:
            length += 1
        if length >= allowed and limit >= allowed and n > allowed and () not in ends.get(tokens[end], []):
            found[tokens[end]] = max(found.get(tokens[end], 0), length)
    return found


TAILS = st.lists(st.lists(st.integers(0, 3), max_size=2).map(tuple), min_size=1, max_size=2)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, 3), max_size=40), st.dictionaries(st.integers(0, 4), TAILS, max_size=2), st.integers(0, 4)
)
def test_dry_finds_what_repeats(tokens: list[int], ends: dict[int, list[tuple[int, ...]]], allowed: int) -> None:
    assert repetitions(np.array(tokens, np.int32), ends, allowed) == plain_dry(tokens, ends, allowed)


def test_dry_of_a_long_text_that_only_repeats() -> None:
    tokens = [1, 2] * 4000
    assert repetitions(np.array(tokens, np.int32), {}, 2) == {1: 7998}
    assert repetitions(np.full(5000, 9, np.int32), {}, 2) == {9: 4999}


def test_the_penalty_of_dry() -> None:
    seen = [5, 1, 2, 3, 4, 7, 1, 2, 3]  # 4 would repeat 1 2 3 4
    logits = np.zeros(10, np.float32)
    chosen: dict[str, Any] = {"dry_multiplier": 0.8, "dry_sequence_breakers": ()}
    assert Sampler(Sampling(**chosen)).scores(logits, seen)[4] == pytest.approx(-0.8 * 1.75)
    assert Sampler(Sampling(**chosen, dry_allowed_length=3, dry_base=3)).scores(logits, seen)[4] == pytest.approx(-0.8)
    assert not Sampler(Sampling(**chosen, dry_allowed_length=4)).scores(logits, seen).any()
    assert not Sampler(Sampling(**chosen, dry_penalty_last_n=6)).scores(logits, seen).any()
    assert Sampler(Sampling(**chosen, dry_penalty_last_n=7)).scores(logits, seen)[4] == pytest.approx(-0.8)
    assert not Sampler(Sampling(**chosen, dry_penalty_last_n=0)).scores(logits, seen).any()
    # It stays a number however long the repetition.
    far = Sampler(Sampling(dry_multiplier=1e30, dry_base=1e30, dry_sequence_breakers=())).scores(logits, [1] * 500)
    assert np.isfinite(far).all() and far[1] < -1e29


def test_sequence_breakers_are_found_in_tokens() -> None:
    text = ModelTokenizer(byte_level())
    found = breakers(text, ("\n", "dog barks"))
    for token, tails in found.items():
        shown = text.decode([token], keep_special=True)
        for tail in tails:
            assert any(b in shown + text.decode(tail) for b in ("\n", "dog barks"))
            assert tail or any(b in shown for b in ("\n", "dog barks"))
    for token in range(text.tokenizer.get_vocab_size()):
        shown = text.decode([token], keep_special=True)
        begins = {n for n in range(1, 9) if shown.endswith("dog barks"[:n])}
        tails = [tuple(text.encode("dog barks"[n:])) for n in sorted(begins)]
        assert set(found.get(token, ())) == {*tails, *([()] if "\n" in shown or "dog barks" in shown else [])}
    assert found[text.encode("\n")[0]] == [()]
    assert any(tails == [tuple(text.encode("og barks"))] for tails in found.values())
    with pytest.raises(UserError, match="a tokenizer for DRY"):
        Sampler(Sampling(dry_multiplier=1.0))
    # A line that is said twice is no repetition; without breakers it is one.
    line = metaspace()
    seen = ModelTokenizer(line).encode("dog , dog", special=False)
    logits = np.zeros(line.get_vocab_size(), np.float32)
    comma = Sampling(dry_multiplier=1.0, dry_sequence_breakers=(",",), dry_allowed_length=1)
    end = seen.index(next(t for t in seen if "," in line.id_to_token(t)))
    bare = Sampling(dry_multiplier=1.0, dry_sequence_breakers=(), dry_allowed_length=1)
    assert Sampler(bare).scores(logits, seen)[seen[end]] < 0
    assert Sampler(comma, ModelTokenizer(line)).scores(logits, seen)[seen[end]] == 0


def test_equal_seeds_draw_equal_tokens_whatever_else_runs() -> None:
    generator = np.random.default_rng(1)
    rows = (generator.normal(size=(60, 2000)) * 3).astype(np.float32)
    alone = {}
    for seed in range(5):
        sampler = Sampler(Sampling(1.0, 50 if seed % 2 else 0, 0.95, seed=seed, xtc_probability=0.5))
        alone[seed] = [sampler.choose(row) for row in rows]
    samplers = {s: Sampler(Sampling(1.0, 50 if s % 2 else 0, 0.95, seed=s, xtc_probability=0.5)) for s in alone}
    together: dict[int, list[int]] = {s: [] for s in alone}
    for row in rows:
        for seed in generator.permutation(5).tolist():
            np.random.seed(seed)
            # Another place in memory.
            together[seed].append(samplers[seed].choose(np.concatenate([[0] * seed, row]).astype(np.float32)[seed:]))
    assert together == alone
    assert len({tuple(t) for t in alone.values()}) == 5


def test_a_seed_by_chance_is_told() -> None:
    logits = np.zeros(1000, np.float32)
    first, second = Sampler(Sampling(1.0, seed=None)), Sampler(Sampling(1.0, seed=None))
    assert first.seed != second.seed
    again = Sampler(Sampling(1.0, seed=first.seed))
    assert [first.choose(logits) for _ in range(8)] == [again.choose(logits) for _ in range(8)]


@QUICK
@given(some_logits(), st.integers(0, 30), st.integers(0, 2**20))
def test_log_probabilities(logits: NDArray[np.float32], top: int, token: int) -> None:
    token %= len(logits)
    shifted = logits.astype(np.float64) - float(logits.max())
    wanted = shifted - np.log(np.exp(shifted).sum())
    found = log_probabilities(logits, token, top)
    assert found.token == token and type(found.logprob) is float
    assert found.logprob == pytest.approx(wanted[token], abs=2e-5)
    order = [t for t in np.lexsort([np.arange(len(logits)), -logits]) if logits[t] > -np.inf][:top]
    assert [t for t, _ in found.top] == order
    assert [p for _, p in found.top] == pytest.approx(wanted[order].tolist(), abs=2e-5)


def test_logits_that_are_no_numbers() -> None:
    for broken in (np.nan, np.inf):
        logits = np.array([0.0, broken, 1.0], np.float32)
        for chosen in (Sampling(), Sampling(1.0), Sampling(1.0, 2)):
            with pytest.raises(UserError, match="logits that are numbers"):
                Sampler(chosen).choose(logits)


def test_extreme_temperatures() -> None:
    logits = np.array([1.0, 3.0, 2.999], np.float32)
    assert {Sampler(Sampling(1e-300, seed=s)).choose(logits) for s in range(20)} == {1}
    assert {Sampler(Sampling(1e-300, 2, seed=s)).choose(logits) for s in range(20)} == {1}
    assert {Sampler(Sampling(1e300, seed=s)).choose(logits) for s in range(60)} == {0, 1, 2}


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-1, math.nan, math.inf, "1", None, True]),
        ("top_k", [-1, 1.5, math.nan, True]),
        ("top_p", [0, 1.5, -0.1, math.nan]),
        ("repetition_penalty", [0, -1, math.inf, math.nan, 1e-300]),
        ("seed", [-1, 0.5, math.nan]),
        ("min_p", [-0.1, 1.1, math.nan]),
        ("typical_p", [0, 1.1, math.nan]),
        ("xtc_probability", [-0.1, 1.1, math.nan]),
        ("xtc_threshold", [-0.1, 1.1, math.nan]),
        ("dry_multiplier", [-1, math.inf, math.nan]),
        ("dry_base", [0.5, math.inf, math.nan]),
        ("dry_allowed_length", [-1, 0.5]),
        ("dry_penalty_last_n", [-2, math.nan]),
        ("dry_sequence_breakers", ["\n", [""], ["a" * 41], ["a"] * 33, [3], 5]),
        ("presence_penalty", [math.nan, -math.inf, 1000]),
        ("frequency_penalty", [math.nan, math.inf]),
        ("repeat_last_n", [-2, 1.0]),
        ("logit_bias", [{-1: 0.0}, {1: math.nan}, {1: math.inf}, {1: 1e6}, {"1": 1.0}, [(1, 1.0)], {1.5: 1.0}]),
    ],
)
def test_values_out_of_range_are_refused(name: str, values: list[object]) -> None:
    for value in values:
        with pytest.raises(UserError, match="expected .*found"):
            Sampling(**{name: value})  # type: ignore[arg-type]


def test_a_bias_beyond_the_vocabulary() -> None:
    with pytest.raises(UserError, match="tokens below 3, found one for 9"):
        Sampler(Sampling(logit_bias={9: 1.0})).choose(np.zeros(3, np.float32))

"""Channel permutations for N:M sparsity: Pool & Yu, NeurIPS 2021, "Channel Permutations for N:M Sparsity".

Which input channels share a stripe of M decides what an N:M mask can retain. For scores S ``[R, C]`` (>= 0) the aim is
the order of columns with the largest

    retained = Σ_rows Σ_stripes (the N largest scores of the row in the stripe),

and a search is judged by its *efficacy* (section 5): the share it wins back of what the stripes cost, against the N/M
largest of every row wherever they are, which in general no order reaches.

:func:`greedy_swaps` and :func:`stripe_groups` are the paper's searches; :func:`search` is ours, compiled: simulated
annealing over swaps. All look at swaps through one matrix. Let b_p ``[R]`` be the N-th largest score of a row among
the other M−1 columns of column p's stripe. With q in p's place a row retains max(0, S_q − b_p) on top of what the
others give it, so that

    E[p, q] = Σ_rows max(0, S_q − b_p),    gain(p, q) = E[p, q] + E[q, p] − E[p, p] − E[q, q]

for any N:M, and a swap changes the rows of E of its two stripes alone.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from tulle import native
from tulle.core.masks import Pattern
from tulle.errors import UserError

CHUNK_ELEMENTS = 1 << 24
"""Elements of a temporary that are in memory at once."""
MOST_SUBSETS = 20_000
"""Choices of M columns out of a group that :func:`stripe_groups` enumerates."""
RESTARTS = 8
"""Annealings of a small problem."""


def retained(scores: Tensor, pattern: Pattern) -> float:
    """What the N:M mask keeps of ``scores`` ``[R, C]``, summed in float64."""
    stripes = (part.reshape(len(part), -1, pattern.m) for part in _row_chunks(scores))
    return float(sum(part.topk(pattern.n, dim=2).values.double().sum() for part in stripes))


def ideal(scores: Tensor, pattern: Pattern) -> float:
    """What the C·N/M largest scores of every row would keep, stripes or not."""
    keep = scores.shape[1] * pattern.n // pattern.m
    return float(sum(part.topk(keep, dim=1).values.double().sum() for part in _row_chunks(scores)))


@dataclass(frozen=True)
class Efficacy:
    """Shares of the sum of all scores that are retained: as they came, permuted, and without stripes."""

    before: float
    after: float
    ideal: float

    @property
    def value(self) -> float:
        """Of what the stripes cost, the share won back (1 − lost/base_lost with losses relative to the ideal)."""
        return (self.after - self.before) / max(self.ideal - self.before, 1e-30)


def efficacy(scores: Tensor, pattern: Pattern, index: Tensor) -> Efficacy:
    """How good the order ``index`` ``[C]`` of the columns is."""
    total = max(float(scores.double().sum()), 1e-30)
    found = (retained(scores, pattern), retained(scores[:, index], pattern), ideal(scores, pattern))
    return Efficacy(*(value / total for value in found))


def search(scores: Tensor, pattern: Pattern, seed: int = 0, effort: float = 1.0, threads: int | None = None) -> Tensor:
    """An order ``index`` int64 ``[C]`` of the columns of S ``[R, C]`` (float32, >= 0) that retains much.

    Never retains less than the order they came in. The same seed gives the same order, whatever the threads.
    ``effort`` scales the number of swaps tried; 1 takes about a second on a core for small matrices and half a minute
    for 22016 × 4096.
    """
    rows, columns = scores.shape
    identity = torch.arange(columns)
    if pattern.n >= pattern.m or columns < 2 * pattern.m or not bool(scores.any()):
        return identity
    pattern.check("scores", columns)
    pairs = columns * (columns - 1) // 2
    small = rows * columns < 1 << 16
    proposals = max(int(min(1000 * pairs, 1e11 / rows, 1.6e7) * effort), 1000)
    # The fewer tries a pair gets, the colder: a hot start must be paid back. Found by trial, 64 to 4096 columns.
    start = float(np.clip(0.06 * (proposals / pairs) ** 0.27, 0.02, 0.4))
    whole = _integers(scores, small)
    threads = threads or torch.get_num_threads()

    def once(number: int) -> tuple[np.ndarray, int]:
        return native.anneal(
            whole, pattern.n, pattern.m, proposals=proposals, start=start, end=start / 4,
            seed=seed * 1000 + number, threads=1 if small else threads,
        )  # fmt: skip

    if small:
        # Small problems end in different valleys: the best of several.
        with ThreadPoolExecutor(threads) as pool:
            index, _ = max(pool.map(once, range(RESTARTS)), key=lambda found: found[1])
    else:
        index, _ = once(0)
    order = torch.from_numpy(index)
    # The search sees rounded scores.
    return order if retained(scores[:, order], pattern) > retained(scores, pattern) else identity


def _integers(scores: Tensor, fine: bool) -> np.ndarray:
    """Scores as int16 (``fine``) or uint8. What is far above the mean is cut: it is retained in any case, and only how
    many such scores share one stripe matters."""
    top, cut = (32767, 256) if fine else (255, 16)
    limit = min(float(scores.max()), cut * float(scores.mean()))
    scaled = (scores * (top / limit)).round_().clamp_(max=top)
    return scaled.to(torch.int16 if fine else torch.uint8).numpy()


class Swaps:
    """An order of the columns of S ``[R, C]`` with the gains of all swaps, kept up to date."""

    def __init__(self, scores: Tensor, pattern: Pattern):
        pattern.check("scores", scores.shape[1])
        self.pattern, self.columns = pattern, scores.T.double().contiguous()
        count = scores.shape[1]
        self.index = torch.arange(count)
        self._excess = torch.zeros(count, count, dtype=torch.float64)
        """E by column: of column p, wherever it stands now, and column q."""
        self._update(torch.arange(count // pattern.m))

    def gains(self) -> Tensor:
        """gain ``[C, C]`` by position; 0 within a stripe."""
        e = self._excess[self.index][:, self.index]
        own = e.diagonal()
        gain = e + e.T - own[:, None] - own
        stripe = torch.arange(len(own)) // self.pattern.m
        return gain.masked_fill(stripe[:, None] == stripe, 0)

    def swap(self, pairs: Tensor) -> None:
        """Exchanges positions ``pairs`` ``[K, 2]``, no two of which touch one stripe."""
        p, q = pairs.T
        self.index[p], self.index[q] = self.index[q].clone(), self.index[p].clone()
        self._update((pairs.flatten() // self.pattern.m).unique())

    def _update(self, stripes: Tensor) -> None:
        n, m = self.pattern.n, self.pattern.m
        members = self.index.reshape(-1, m)[stripes]
        values = self.columns[members]
        ordered = values.sort(dim=1, descending=True).values
        within = ordered[:, n - 1 : n]
        beyond = ordered[:, n : n + 1] if n < m else torch.zeros_like(within)
        limits = torch.where(values >= within, beyond, within).flatten(0, 1)
        for part in torch.arange(limits.shape[0]).split(max(1, CHUNK_ELEMENTS // self.columns.numel())):
            self._excess[members.flatten()[part]] = (self.columns[None] - limits[part, None]).clamp(min=0).sum(-1)


def greedy_swaps(scores: Tensor, pattern: Pattern, escapes: int = 0, seed: int = 0, forced: int = 2) -> Tensor:
    """The paper's greedy channel swaps with bounded regressions: ``index`` ``[C]``.

    Of all swaps between stripes that gain, the best ones are made, one per stripe at a time, until none is left. Then,
    up to ``escapes`` times, ``forced`` random swaps are made in spite of their loss, and the search goes on. The best
    order seen is returned (the public code returns the last). Time and memory grow with C²·R and C².
    """
    state = Swaps(scores, pattern)
    generator = torch.Generator().manual_seed(seed)
    stripes = scores.shape[1] // pattern.m
    tolerance = 1e-12 * max(float(scores.sum()), 1e-30)
    best, most = state.index.clone(), retained(scores, pattern)
    if stripes < 2:
        return best
    for attempt in range(escapes + 1):
        if attempt:
            for _ in range(forced):
                pair = torch.randperm(stripes, generator=generator)[:2] * pattern.m
                state.swap((pair + torch.randint(pattern.m, (2,), generator=generator))[None])
        while len(pairs := _best_swaps(state.gains(), pattern.m, tolerance)):
            state.swap(pairs)
        found = retained(scores[:, state.index], pattern)
        if found > most:
            best, most = state.index.clone(), found
    return best


def _best_swaps(gains: Tensor, m: int, tolerance: float) -> Tensor:
    """Positions ``[K, 2]`` of the best swaps, by falling gain, each stripe in one of them at most."""
    stripes = gains.shape[0] // m
    by_stripes = gains.reshape(stripes, m, stripes, m).permute(0, 2, 1, 3).reshape(stripes, stripes, m * m)
    value, where = by_stripes.max(-1)
    upper = torch.triu(torch.ones(stripes, stripes, dtype=torch.bool), 1)
    candidates = (upper & (value > tolerance)).nonzero()
    order = value[candidates[:, 0], candidates[:, 1]].argsort(descending=True, stable=True)
    used, chosen = set[int](), []
    for a, b in candidates[order].tolist():
        if a not in used and b not in used:
            used |= {a, b}
            i, j = divmod(int(where[a, b]), m)
            chosen.append((a * m + i, b * m + j))
    return torch.tensor(chosen, dtype=torch.int64).reshape(-1, 2)


def stripe_groups(scores: Tensor, pattern: Pattern, size: int = 2) -> Tensor:
    """The paper's narrow and deep search: ``index`` ``[C]``.

    For every group of ``size`` stripes the best way to deal its columns is found among all (35 for two stripes of 4,
    5775 for three); the groups that gain most are rearranged, and the search goes on until none gains. Raises
    ``UserError`` where a group has more than ``MOST_SUBSETS`` choices of a stripe.
    """
    m, stripes = pattern.m, scores.shape[1] // pattern.m
    subsets, dealt = _deals(m, size)
    index = torch.arange(scores.shape[1])
    if stripes < size:
        return index
    groups = torch.tensor(list(combinations(range(stripes), size)))
    gains, choice = torch.zeros(len(groups), dtype=torch.float64), torch.zeros(len(groups), dtype=torch.int64)
    dirty = torch.ones(stripes, dtype=torch.bool)
    tolerance = 1e-12 * max(float(scores.sum()), 1e-30)
    per_group = len(subsets) * m * scores.shape[0]
    while True:
        stale = dirty[groups].any(1).nonzero()[:, 0]
        for part in stale.split(max(1, CHUNK_ELEMENTS // per_group)):
            members = index.reshape(-1, m)[groups[part]].flatten(1)
            # Every subset of the group's columns as a stripe: [groups, subsets, M, R].
            values = scores.T[members[:, subsets]].double()
            sums = values.topk(pattern.n, dim=2).values.sum((2, 3))
            totals = sums[:, dealt].sum(-1)
            most, choice[part] = totals.max(1)
            gains[part] = most - totals[:, 0]
        dirty[:] = False
        used = set[int]()
        for g in gains.argsort(descending=True, stable=True).tolist():
            if float(gains[g]) <= tolerance:
                break
            touched = groups[g].tolist()
            if used.isdisjoint(touched):
                used |= set(touched)
                members = index.reshape(-1, m)[groups[g]].flatten()
                index.reshape(-1, m)[groups[g]] = members[subsets[dealt[choice[g]]]]
        if not used:
            return index
        dirty[list(used)] = True


def _deals(m: int, size: int) -> tuple[Tensor, Tensor]:
    """The M-subsets ``[K, M]`` of ``size``·M columns, and every way ``[P, size]`` to deal all columns, as subsets; the
    first is the order as it is."""
    count = math.comb(m * size, m)
    if count > MOST_SUBSETS:
        raise UserError(
            f"expected at most {MOST_SUBSETS} choices of {m} columns out of {size} stripes, found {count}; take "
            "groups of 2, or the annealed search"
        )
    subsets = list(combinations(range(m * size), m))
    number = {subset: k for k, subset in enumerate(subsets)}

    def deal(left: tuple[int, ...]) -> list[list[int]]:
        if not left:
            return [[]]
        found = []
        # The first column left goes into the first stripe: orders of stripes are one and the same.
        for others in combinations(left[1:], m - 1):
            taken = (left[0], *others)
            rest = tuple(c for c in left if c not in taken)
            found += [[number[taken], *more] for more in deal(rest)]
        return found

    return torch.tensor(subsets), torch.tensor(deal(tuple(range(m * size))))


def _row_chunks(scores: Tensor) -> tuple[Tensor, ...]:
    return scores.split(max(1, CHUNK_ELEMENTS // max(scores.shape[1], 1)))

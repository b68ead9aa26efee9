"""The searches of DuQuant (Lin et al. 2024): greedy rotations, zigzag permutations, and the tokens they need.

Activations are rows x ``[R, b]``: every run of b consecutive channels of every token, one rotation for all of them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

POOL = 32
"""Matrices per block size that the greedy search draws from; rows are shuffled and signs drawn for each use."""
MOST_ROWS = 1024
"""Rows that the greedy search looks at, by falling norm."""
CANDIDATES = 3


def random_orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """``[n, n]`` float32, uniform over the orthogonal group (QR of a Gaussian matrix, signs of R's diagonal fixed)."""
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).float()


def uniform_first_row(n: int, generator: torch.Generator) -> Tensor:
    """Orthogonal ``[n, n]`` float64 with the first row 1/√n: diag(1, Q′)·R̃, Q′ random orthogonal.

    R̃ is the reflection that takes the first unit vector to the uniform one. Departure: the paper (eq. 3) and its code
    write R̃·diag(1, Q′), which keeps the first column and not the first row; this order spreads an outlier better.
    """
    uniform = torch.full((n,), n**-0.5, dtype=torch.float64)
    axis = uniform.clone()
    axis[0] -= 1
    reflection = torch.eye(n, dtype=torch.float64)
    if n > 1:
        reflection -= 2 * torch.outer(axis, axis) / axis.dot(axis)
    mixed = reflection.clone()
    if n > 1:
        # Any orthogonal mixing of the other rows leaves the first one alone.
        mixed[1:] = random_orthogonal(n - 1, generator).double() @ reflection[1:]
    return mixed


def greedy_rotation(
    x: Tensor,
    steps: int,
    generator: torch.Generator,
    choose: Literal["channel", "row_index"] = "channel",
) -> tuple[Tensor, list[float]]:
    """R̂ ``[b, b]`` (eq. 4) for x ``[R, b]`` and max|x·R¹…Rⁱ| after every step i = 0 … ``steps``.

    Step i swaps the channel with the largest |x| to the front and multiplies by a matrix with a uniform first row; R̂
    is the product up to the step with the least maximum. ``row_index`` takes the row of the maximum, modulo b, for the
    channel, as the authors' code does.

    The search looks at the ``MOST_ROWS`` rows of the largest norm. Since |x·R| ≤ ‖x‖₂, its result is that of all rows
    as long as no other row's norm exceeds the least maximum found, which holds where there are outliers to search for.
    Without them all rows have about one norm; then the ``CANDIDATES`` best steps are tried on all rows, the identity
    among them, so that the maximum over all rows never rises. Deterministic for one state of ``generator``.
    """
    device, size = x.device, x.shape[1]
    norms, order = x.float().norm(dim=1).sort(descending=True, stable=True)
    pool = _pool(size)
    which = torch.randint(len(pool), (steps,), generator=generator)
    shuffles = torch.stack([torch.randperm(size - 1, generator=generator) + 1 for _ in range(steps)])
    signs = torch.randint(0, 2, (steps, size), generator=generator).double() * 2 - 1
    rows = order[:MOST_ROWS]
    found, peaks = _search(x[rows], rows, which, shuffles, signs, pool, choose)
    if len(x) > MOST_ROWS and float(norms[MOST_ROWS]) > min(peaks):
        found.append(torch.eye(size, dtype=torch.float64, device=device))
        whole = [float((x.float() @ rotation.float()).abs().max()) for rotation in found]
        return found[whole.index(min(whole))].float().to(device), peaks
    return found[0].float().to(device), peaks


def _search(
    x: Tensor, rows: Tensor, which: Tensor, shuffles: Tensor, signs: Tensor, pool: Tensor, choose: str
) -> tuple[list[Tensor], list[float]]:
    """The best products, best first, and the maximum after every step."""
    size = x.shape[1]
    x = x.float()
    pool = pool.to(x.device)
    rotation = torch.eye(size, dtype=torch.float64, device=x.device)
    largest = x.abs().amax(0)
    peaks = [float(largest.max())]
    best = [(peaks[0], 0, rotation)]
    for number in range(len(which)):
        channel = int(largest.argmax())
        if choose == "row_index":
            channel = int(rows[x[:, channel].abs().argmax()]) % size
        step = torch.empty_like(rotation)
        base = pool[int(which[number])]
        step[0] = base[0]
        step[1:] = base[shuffles[number]] * signs[number, 1:, None].to(x.device)
        # E: channel ↔ first, as a swap of the matrix's rows.
        step[[0, channel]] = step[[channel, 0]]
        rotation = rotation @ step
        x = x @ step.float()
        largest = x.abs().amax(0)
        peaks.append(float(largest.max()))
        if len(best) < CANDIDATES or peaks[-1] < best[-1][0]:
            best = sorted([*best, (peaks[-1], number + 1, rotation)], key=lambda found: found[:2])[:CANDIDATES]
    return [product for _, _, product in best], peaks


@lru_cache(maxsize=16)
def _pool(size: int) -> Tensor:
    """``[POOL, b, b]`` float64 matrices with a uniform first row, the same in every process."""
    generator = torch.Generator().manual_seed(size)
    return torch.stack([uniform_first_row(size, generator) for _ in range(POOL)])


def zigzag(absmax: Tensor, block: int) -> Tensor:
    """Permutation ``[C]`` (eq. 5) that deals channels, by falling max|x| ``[C]``, to C/block blocks back and forth.

    x[:, permutation] is the permuted activation.
    """
    blocks = len(absmax) // block
    dealt = absmax.argsort(descending=True, stable=True).reshape(block, blocks)
    dealt[1::2] = dealt[1::2].flip(1)
    return dealt.T.reshape(-1)


def random_permutation(channels: int, generator: torch.Generator) -> Tensor:
    """Uniform over the permutations of ``channels``."""
    return torch.randperm(channels, generator=generator)


class Extremes:
    """Keeps whole tokens of a stream of activations: those with the largest norm on each segment of consecutive
    channels, and some at random. ``rows`` is what a search for outliers needs of X; memory is bounded.
    """

    def __init__(self, channels: int, segment: int = 128, per_segment: int = 16, random: int = 64, seed: int = 0):
        self._segments = [slice(i, min(i + segment, channels)) for i in range(0, channels, segment)]
        self._per_segment, self._random = per_segment, random
        self._generator = torch.Generator().manual_seed(seed)
        self._rows: Tensor | None = None
        self._random_keys = torch.empty(0)
        """A uniform number per kept token: the smallest ones are the sample."""

    def add(self, x: Tensor) -> None:
        """Sees tokens ``[T, C]``."""
        x = x.detach().float()
        keys = torch.rand(len(x), generator=self._generator)
        if self._rows is not None:
            x, keys = torch.cat([self._rows, x]), torch.cat([self._random_keys, keys])
        kept = torch.zeros(len(x), dtype=torch.bool)
        kept[keys.topk(min(self._random, len(x)), largest=False).indices] = True
        for segment in self._segments:
            norms = x[:, segment].square().sum(1)
            kept[norms.topk(min(self._per_segment, len(x))).indices.cpu()] = True
        self._rows, self._random_keys = x[kept.to(x.device)], keys[kept]

    @property
    def rows(self) -> Tensor:
        """``[K, C]`` float32, in the order they came."""
        if self._rows is None:
            raise ValueError("no tokens have been seen")
        return self._rows

"""DuQuant's searches against a naive float64 version, hand-worked cases and what must always hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tulle.core import rotation as module
from tulle.core.rotation import (
    Extremes,
    greedy_rotation,
    random_orthogonal,
    random_permutation,
    uniform_first_row,
    zigzag,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def is_orthogonal(matrix: Tensor, tolerance: float) -> bool:
    identity = torch.eye(len(matrix), dtype=torch.float64)
    return bool((matrix.double() @ matrix.double().T - identity).abs().max() < tolerance)


@pytest.mark.parametrize("n", [1, 2, 3, 64, 127])
def test_random_orthogonal(n: int) -> None:
    assert is_orthogonal(random_orthogonal(n, generator()), 1e-6)
    assert torch.equal(random_orthogonal(n, generator(1)), random_orthogonal(n, generator(1)))


@pytest.mark.parametrize("n", [1, 2, 8, 128])
def test_uniform_first_row(n: int) -> None:
    matrix = uniform_first_row(n, generator())
    assert is_orthogonal(matrix, 1e-6)
    torch.testing.assert_close(matrix[0], torch.full((n,), n**-0.5, dtype=torch.float64))


def with_outliers(rows: int, b: int, seed: int = 0) -> Tensor:
    x = torch.randn(rows, b, generator=generator(seed))
    x[::7, b // 3] *= 40
    x[3, b - 1] = 500
    return x


def naive(x: Tensor, steps: int, choose: str) -> tuple[Tensor, list[float]]:
    """The search on every row, in float64, with whole matrices."""
    b, x = x.shape[1], x.double()
    g = generator(5)
    pool = module._pool(b)
    which = torch.randint(len(pool), (steps,), generator=g)
    shuffles = [torch.randperm(b - 1, generator=g) + 1 for _ in range(steps)]
    signs = torch.randint(0, 2, (steps, b), generator=g).double() * 2 - 1
    product, best = torch.eye(b, dtype=torch.float64), torch.eye(b, dtype=torch.float64)
    peaks = [float(x.abs().max())]
    for i in range(steps):
        row, channel = divmod(int(x.abs().argmax()), b)
        swap = torch.eye(b, dtype=torch.float64)
        d = channel if choose == "channel" else row % b
        swap[[0, d]] = swap[[d, 0]]
        uniform = torch.cat([pool[which[i]][:1], pool[which[i]][shuffles[i]] * signs[i, 1:, None]])
        product, x = product @ swap @ uniform, x @ swap @ uniform
        peaks.append(float(x.abs().max()))
        if peaks[-1] < min(peaks[:-1]):
            best = product
    return best, peaks


@pytest.mark.parametrize("b", [4, 16, 128])
@pytest.mark.parametrize("choose", ["channel", "row_index"])
def test_greedy_equals_the_naive_search(b: int, choose: str) -> None:
    # More rows than the search keeps; the outlier rows are what carries every maximum.
    x = with_outliers(3 * module.MOST_ROWS, b)
    found, peaks = greedy_rotation(x, 12, generator(5), choose)  # type: ignore[arg-type]
    expected, expected_peaks = naive(x, 12, choose)
    assert is_orthogonal(found, 1e-6)
    torch.testing.assert_close(torch.tensor(peaks), torch.tensor(expected_peaks), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 4, 64])
def test_the_peak_never_rises(steps: int) -> None:
    x = with_outliers(300, 32)
    found, peaks = greedy_rotation(x, steps, generator(steps))
    after = (x @ found).abs().max()
    assert len(peaks) == steps + 1
    assert after <= x.abs().max() and after == pytest.approx(min(peaks), rel=1e-4)


def test_without_outliers_the_peak_of_all_rows_does_not_rise() -> None:
    """Rows of one norm: the search sees a part of them, and must not fit that part alone."""
    x = torch.randn(20 * module.MOST_ROWS, 16, generator=generator())
    x = x / x.norm(dim=1, keepdim=True)
    for seed in range(5):
        found, _ = greedy_rotation(x, 20, generator(seed))
        assert (x @ found).abs().max() <= x.abs().max() * (1 + 1e-6)


def test_without_gain_the_identity_stays() -> None:
    x = torch.ones(10, 16)  # as flat as can be: any rotation makes a larger peak
    found, _ = greedy_rotation(x, 5, generator())
    assert torch.equal(found, torch.eye(16))


def test_one_outlier_is_spread_evenly_by_one_step() -> None:
    x = torch.zeros(1, 64)
    x[0, 20] = 8.0
    found, peaks = greedy_rotation(x, 1, generator())
    torch.testing.assert_close((x @ found).abs(), torch.ones(1, 64))
    assert peaks == pytest.approx([8.0, 1.0])


def test_zigzag_by_hand() -> None:
    # Falling: 7 6 5 4 3 2 1 0, dealt to two blocks: 7 | 6, then back 5 → second, 4 → first, …
    index = zigzag(torch.tensor([0.0, 1, 2, 3, 4, 5, 6, 7]), block=4)
    assert index.tolist() == [7, 4, 3, 0, 6, 5, 2, 1]


@pytest.mark.parametrize(("channels", "block"), [(64, 8), (96, 32), (128, 128), (12, 1)])
def test_zigzag_evens_the_blocks_out(channels: int, block: int) -> None:
    absmax = torch.rand(channels, generator=generator()) ** 8
    index = zigzag(absmax, block)
    assert sorted(index.tolist()) == list(range(channels))
    before = absmax.reshape(-1, block).mean(1)
    after = absmax[index].reshape(-1, block).mean(1)
    assert after.max() - after.min() <= before.max() - before.min() + 1e-6
    # Each round of dealing adds at most the gap of its neighbours to a block's lead, and the gaps add up to the range.
    assert (after.max() - after.min()) * block <= absmax.max() - absmax.min() + 1e-5


def test_random_permutation() -> None:
    first, again, other = (random_permutation(40, generator(seed)).tolist() for seed in (0, 0, 1))
    assert sorted(first) == list(range(40))
    assert first == again != other and first != sorted(first)


class TestExtremes:
    def test_keeps_what_carries_the_maxima(self) -> None:
        x = torch.randn(500, 300, generator=generator())
        x[123, 5], x[77, 290], x[400, 150] = 90.0, -80.0, 70.0
        sampler = Extremes(300, segment=128, per_segment=2, random=8)
        for part in x.split(64):
            sampler.add(part)
        rows = sampler.rows
        for token in (123, 77, 400):
            assert any(torch.equal(row, x[token]) for row in rows)
        assert len(rows) <= 3 * 2 + 8
        # Brute force: the tokens with the largest norms of each segment are all there.
        for start in (0, 128, 256):
            norms = x[:, start : start + 128].norm(dim=1)
            for token in norms.topk(2).indices:
                assert any(torch.equal(row, x[token]) for row in rows)

    def test_what_is_kept_unless_said_otherwise(self) -> None:
        x = torch.randn(2000, 300, generator=generator())
        plain, spelt = Extremes(300), Extremes(300, segment=128, per_segment=16, random=64, seed=0)
        for sampler in (plain, spelt):
            sampler.add(x)
        assert torch.equal(plain.rows, spelt.rows) and 64 < len(plain.rows) <= 3 * 16 + 64
        # 129 channels to a segment would rank other tokens first.
        sampler = Extremes(300, segment=129)
        sampler.add(x)
        assert not torch.equal(plain.rows, sampler.rows)

    def test_all_of_a_few(self) -> None:
        x = torch.randn(5, 16, generator=generator())
        sampler = Extremes(16)
        sampler.add(x)
        assert torch.equal(sampler.rows, x)

    def test_equal_runs_keep_equal_tokens(self) -> None:
        x = torch.randn(400, 16, generator=generator())

        def sample(seed: int) -> Tensor:
            sampler = Extremes(16, per_segment=1, random=10, seed=seed)
            for part in x.split(50):
                sampler.add(part)
            return sampler.rows

        assert torch.equal(sample(1), sample(1)) and not torch.equal(sample(1), sample(2))

    def test_the_random_part_is_uniform(self) -> None:
        counts = torch.zeros(60)
        x = torch.zeros(60, 2)
        x[:, 0] = torch.arange(60)
        for seed in range(300):
            sampler = Extremes(2, per_segment=1, random=12, seed=seed)
            for part in x.split(7):
                sampler.add(part)
            counts[sampler.rows[:, 0].long()] += 1
        counts = counts[:-1]  # the last token has the largest norm and is always kept
        # Each is kept with probability 1/5: 60 ± 5 standard deviations of 6.9.
        assert counts.min() > 25 and counts.max() < 95

    def test_nothing_seen(self) -> None:
        with pytest.raises(ValueError, match="no tokens"):
            _ = Extremes(4).rows

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from tulle.core.grid import Grid, Quantised, code, find_steps, fitting_group, round_to_grid, steps
from tulle.errors import UserError


@pytest.mark.parametrize(
    ("columns", "most", "size"),
    [
        (576, 128, 64), (1536, 128, 128), (4096, 128, 128), (256, 64, 64), (96, 128, 32), (64, 128, 64), (32, 128, 32),
        # No power of two of 32 or more: the largest divisor, and none below 32.
        (1000, 128, 125), (88, 128, 88), (720, 128, 120), (720, 64, 60), (48, 128, 48), (131, 128, None),
        (262, 128, None), (16, 128, None), (2 * 31 * 37, 128, 74),
    ],
)  # fmt: skip
def test_fitting_groups(columns: int, most: int, size: int | None) -> None:
    assert fitting_group(columns, most) == size
    name = "auto" if most == 128 else f"auto-{most}"
    assert Grid.of(4, name, True, columns) == Grid(4, size, True)  # type: ignore[arg-type]


def test_without_a_width_auto_has_no_size_yet() -> None:
    assert Grid.of(4, "auto", False) == Grid(4, None, False) and Grid.of(4, 32, True) == Grid(4, 32, True)


def test_a_misfit_is_told_what_fits() -> None:
    with pytest.raises(UserError, match=r"^x: .* 128, found 576; use group_size 64, 32, 16, 8, or auto, or leave it"):
        Grid(4, 128).check("x", 576)
    with pytest.raises(UserError, match=r"found 131; use group_size auto, or leave it out"):
        Grid(4, 128).check("x", 131)


GRIDS = st.builds(Grid, bits=st.integers(2, 8), group_size=st.sampled_from([None, 4, 8]), symmetric=st.booleans())


def weights(seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(5, 16, generator=g) * torch.rand(5, 1, generator=g) * 10 + torch.randn(5, 1, generator=g)


@given(grid=GRIDS, seed=st.integers(0, 999))
@settings(max_examples=80, deadline=None)
def test_rounding_is_within_half_a_step(grid: Grid, seed: int) -> None:
    w = weights(seed)
    step, zero = find_steps(w, grid)
    width = 16 // step.shape[1]
    step, zero = step.repeat_interleave(width, 1), zero.repeat_interleave(width, 1)
    error = (w - round_to_grid(w, step, zero, grid)).abs()
    # bfloat16 keeps 8 bits, so a step may come out 2^-9 too small and the outermost codes, at most 2^bits
    # steps away, miss by that much more; the zero point's own rounding adds up to half a step on an
    # asymmetric grid.
    slack = 0.5 + 2.0 ** (grid.bits - 8) + (0 if grid.symmetric else 0.5)
    assert bool((error <= slack * step).all())


@given(grid=GRIDS, seed=st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_a_grid_reproduces_its_own_points(grid: Grid, seed: int) -> None:
    w = weights(seed)
    step, zero = find_steps(w, grid)
    width = 16 // step.shape[1]
    codes = code(w, step.repeat_interleave(width, 1), zero.repeat_interleave(width, 1), grid)
    on_grid = Quantised(grid, codes.to(torch.int16), step, zero).dequantise()
    again = round_to_grid(on_grid, step.repeat_interleave(width, 1), zero.repeat_interleave(width, 1), grid)
    assert torch.equal(on_grid, again)


@given(grid=GRIDS, seed=st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_clip_search_never_loses(grid: Grid, seed: int) -> None:
    w, importance = weights(seed), torch.rand(16, generator=torch.Generator().manual_seed(seed))

    def error(step: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        width = 16 // step.shape[1]
        q = round_to_grid(w, step.repeat_interleave(width, 1), zero.repeat_interleave(width, 1), grid)
        return (importance * (w - q) ** 2).reshape(5, -1, width).sum(-1)

    plain, searched = error(*find_steps(w, grid)), error(*find_steps(w, grid, importance, search=20))
    assert bool((searched <= plain * (1 + 1e-6)).all())


@pytest.mark.parametrize("norm", [2.0, 2.4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("given", [False, True])
def test_clip_search_takes_the_best_of_its_ratios(norm: float, symmetric: bool, given: bool) -> None:
    """Every ratio from 1 down to above 0.5 tried by hand, in float64, with pruned weights and an importance."""
    grid, g = Grid(3, 8, symmetric), torch.Generator().manual_seed(1)
    w = torch.randn(40, 16, generator=g) ** 3
    mask, importance = torch.rand(40, 16, generator=g) > 0.2, torch.rand(16, generator=g) + 0.1
    importance[3] = 0  # where it holds the largest weight, clipping that costs nothing
    ranges = (-8 * torch.rand(40, 2, generator=g) - 0.1, 8 * torch.rand(40, 2, generator=g) + 0.1) if given else None
    part = (w * mask).reshape(40, 2, 8)
    low, high = ranges or (part.amin(-1), part.amax(-1))

    def error(step: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        q = round_to_grid(part, step[..., None], zero[..., None], grid)
        lost = (part - q).double().abs() ** norm * (importance * mask).reshape(40, 2, 8)
        return lost.sum(-1)

    every = torch.stack([error(*steps(low * (1 - 0.05 * i), high * (1 - 0.05 * i), grid)) for i in range(10)])
    found = error(*find_steps(w, grid, importance, 10, mask, norm, ranges))
    torch.testing.assert_close(found, every.amin(0), rtol=1e-5, atol=1e-9)
    chosen = every.argmin(0).unique()
    assert 0 in chosen and 9 in chosen  # the ends are tried


def test_zero_is_on_every_asymmetric_grid() -> None:
    step, zero = steps(torch.tensor([2.0, -3.0]), torch.tensor([5.0, -1.0]), Grid(4, symmetric=False))
    assert torch.equal(round_to_grid(torch.zeros(2), step, zero, Grid(4, symmetric=False)), torch.zeros(2))


@pytest.mark.parametrize("symmetric", [True, False])
def test_all_zero_group(symmetric: bool) -> None:
    step, zero = find_steps(torch.zeros(1, 4), Grid(4, symmetric=symmetric), search=5)
    assert bool((step > 0).all()) and torch.equal(zero, torch.zeros(1, 1))


def test_eight_bits_symmetric_by_hand() -> None:
    w = torch.tensor([[1.27, -1.27, 0.635, 0.0]])
    step, zero = find_steps(w, Grid(8))
    assert step.item() == torch.tensor(0.01).bfloat16().item()
    assert code(w, step, zero, Grid(8)).tolist() == [[127, -127, 63, 0]]

"""Grids of floats of four bits, against torch's casts, compressed-tensors' own rounding and plain search."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tulle.core import compiled, float4
from tulle.core.descent import descend, objective
from tulle.core.gptq import gptq
from tulle.core.grid import Grid, Quantised, find_steps, joined, round_to_grid, storable_step, stored_steps
from tulle.core.hessian import Hessian
from tulle.errors import UserError
from tulle.methods.quantize.round_to_nearest import round_to_nearest

MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
NUMBERS = torch.cat([-MAGNITUDES.flip(0), MAGNITUDES])
GRIDS = {form: Grid.of(4, None, True, format=form) for form in ("mxfp4", "nvfp4")}  # type: ignore[arg-type]
forms = pytest.mark.parametrize("form", GRIDS)


def weights(rows: int = 12, columns: int = 96, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    spread = torch.exp(torch.randn(rows, columns // 16, generator=g)).repeat_interleave(16, 1)
    return 0.05 * torch.randn(rows, columns, generator=g) * spread


def correlated(columns: int = 96, tokens: int = 300) -> Hessian:
    g = torch.Generator().manual_seed(3)
    mix = torch.randn(columns, columns, generator=g) / columns**0.5
    x = torch.randn(tokens, columns, generator=g) @ mix * torch.rand(columns, generator=g).add(0.05)
    hessian = Hessian.identity(columns, torch.device("cpu"))
    hessian.matrix = x.T @ x / tokens
    return hessian


def test_levels_are_nearest() -> None:
    x = torch.cat([torch.linspace(-15, 15, 60001), torch.randn(2000) * 5])
    found = float4.nearest_level(x) / 2
    best = (x[:, None] / 2 - NUMBERS).abs().amin(1)
    torch.testing.assert_close((x / 2 - found).abs(), best, rtol=0, atol=1e-6)


def test_ties_go_where_the_standard_s_casts_go() -> None:
    middles = (MAGNITUDES[1:] + MAGNITUDES[:-1]) / 2
    # The even mantissa: 0, 1, 1, 2, 2, 4, 4.
    expected = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0])
    for sign in (1, -1):
        assert torch.equal(float4.nearest_level(2 * sign * middles) / 2, sign * expected)


def test_levels_are_those_of_compressed_tensors() -> None:
    quant_args = pytest.importorskip("compressed_tensors.quantization.quant_args")
    middles = (MAGNITUDES[1:] + MAGNITUDES[:-1]) / 2
    x = torch.cat([middles, -middles, torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 3])
    with torch.compiler.set_stance("force_eager"):
        expected = quant_args.FP4_E2M1_DATA.cast_to_fp4(x.clone()).float()
    assert torch.equal(float4.nearest_level(2 * x) / 2, expected)


@forms
def test_steps_are_what_a_byte_says(form: str) -> None:
    grid = GRIDS[form]
    w = weights()
    w[3, 32:64] = 0
    for search in (0, 1):
        step, zero, row = stored_steps(*find_steps(w, grid, search=search), grid)
        assert step.shape == (12, 96 // float4.GROUP[form]) and not zero.any()
        if form == "mxfp4":
            assert row is None
            scale = 2 * step
            assert torch.equal(scale.to(torch.float8_e8m0fnu).float(), scale)
        else:
            assert row is not None and bool((row == row[0]).all()) and torch.frexp(row[0])[0] == 0.5
            bytes_of = step / row[:, None]
            assert torch.equal(bytes_of.to(torch.float8_e4m3fn).float(), bytes_of)
            assert 224 < float(bytes_of.max()) <= 448
        assert torch.equal(step.bfloat16().float(), step)  # the engine's kernels take bfloat16
        assert torch.equal(storable_step(step, None if row is None else row[:, None], grid), step)


def test_mxfp4_without_a_search_is_the_standard_s() -> None:
    w = weights()
    largest = w.reshape(12, 3, 32).abs().amax(-1)
    scale = 2 * find_steps(w, GRIDS["mxfp4"])[0]
    assert torch.equal(scale, torch.exp2(torch.floor(torch.log2(largest)) - 2))


def test_nvfp4_without_a_search_puts_the_largest_at_six() -> None:
    w = weights()
    largest = w.reshape(12, 6, 16).abs().amax(-1)
    scale = 2 * find_steps(w, GRIDS["nvfp4"])[0]
    torch.testing.assert_close(scale, largest / 6, rtol=2**-4, atol=0)


@forms
@pytest.mark.parametrize("weighted", [False, True])
def test_the_search_finds_the_best_of_all_scales(form: str, weighted: bool) -> None:
    """Against every byte there is."""
    grid, w = GRIDS[form], weights(seed=7)
    importance = torch.rand(96, generator=torch.Generator().manual_seed(1)) ** 3 if weighted else None
    step, zero = find_steps(w, grid, importance, search=5)
    _, _, row = stored_steps(step, zero, grid)
    weight = (torch.ones(96) if importance is None else importance).expand_as(w).reshape(12, -1, float4.GROUP[form])
    parts = w.reshape(weight.shape)

    def error(tried: Tensor) -> Tensor:
        rounded = round_to_grid(parts, tried[..., None], zero[..., None], grid)
        return (weight * (parts - rounded).square()).sum(-1)

    if form == "mxfp4":
        everything = torch.exp2(torch.arange(-40.0, 10)) / 2
    else:
        assert row is not None
        everything = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float() * row[0]
    best = torch.stack([error(s.expand_as(step)) for s in everything]).amin(0)
    # Twice or half of the standard's is as far as it looks; an importance near 0 for the largest weight may want less.
    found = error(step)
    assert float((found > best * (1 + 1e-6)).float().mean()) <= (0.1 if weighted else 0)
    assert bool((found <= error(find_steps(w, grid)[0]) * (1 + 1e-6)).all())


@forms
def test_points_of_the_grid_are_kept(form: str) -> None:
    grid = GRIDS[form]
    q = round_to_nearest(weights(), grid, 5)
    assert int(q.codes.abs().max()) == 12 and set(q.codes.unique().tolist()) <= {2 * n for n in NUMBERS.tolist()}
    again = round_to_grid(q.dequantise().reshape(*q.scale.shape, -1), q.scale[..., None], q.zero[..., None], grid)
    assert torch.equal(again.reshape(12, 96), q.dequantise())


@forms
@pytest.mark.parametrize("masked", [False, True])
def test_error_compensation_beats_rounding(form: str, masked: bool) -> None:
    grid, w, hessian = GRIDS[form], weights(), correlated()
    mask = torch.rand(12, 96, generator=torch.Generator().manual_seed(2)) < 0.7 if masked else None
    factor = hessian.factor(0.01, True)
    damped = hessian.damped(factor.damping)

    def lost(q: Quantised) -> float:
        return float(objective(w, q.dequantise(mask), damped).sum())

    scale, zero = find_steps(w, grid, hessian.matrix.diagonal(), 20, mask)
    swept = gptq(w, factor, grid, scale, zero, mask)
    descended = descend(w, swept, damped, mask, 4)
    nearest = round_to_nearest(w, grid, 20, mask)
    assert lost(descended) <= lost(swept) < lost(nearest)
    row = descended.row_scale
    kept = storable_step(descended.scale, None if row is None else row[:, None], grid)
    assert torch.equal(descended.scale, kept)
    assert set(descended.codes.unique().tolist()) <= {2 * n for n in NUMBERS.tolist()}


def test_kernels_of_whole_numbers_are_not_asked() -> None:
    w = torch.zeros(2, 32)
    assert compiled.fits(w, grid=Grid(4, 32)) and not compiled.fits(w, grid=GRIDS["mxfp4"])


def test_parts_of_a_tensor_get_one_scale() -> None:
    w = weights(24)
    w[12:] *= 100
    parts = [round_to_nearest(part, GRIDS["nvfp4"]) for part in w.split(12)]
    whole = joined(parts)
    assert whole.row_scale is not None and parts[1].row_scale is not None
    assert bool((whole.row_scale == parts[1].row_scale[0]).all())
    torch.testing.assert_close(
        whole.dequantise(), torch.cat([part.dequantise() for part in parts]), rtol=0.1, atol=1e-5
    )
    assert torch.equal(whole.scale, storable_step(whole.scale, whole.row_scale[:, None], GRIDS["nvfp4"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 8}, "expected bits 4 with format mxfp4, found 8"),
        ({"group_size": 64}, "expected group_size 32 with format mxfp4, found 64"),
        ({"symmetric": False}, "expected symmetric true with format mxfp4, found False"),
    ],
)
def test_other_settings_are_refused(settings: dict, message: str) -> None:
    given = {"bits": 4, "group_size": None, "symmetric": True} | settings
    with pytest.raises(UserError, match=message):
        Grid.of(**given, format="mxfp4")


def test_a_width_that_does_not_split_is_refused() -> None:
    with pytest.raises(UserError, match="x: expected .* divisible by 32 for mxfp4, found 48; use format: int"):
        GRIDS["mxfp4"].check("x", 48)
    GRIDS["nvfp4"].check("x", 48)

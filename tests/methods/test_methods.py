"""Contract tests of the methods that compress weights, driven by one list. A new method is added to ``METHODS``, or to
``tests/test_block_methods.py`` where it acts on blocks or models.
"""

from __future__ import annotations

import inspect
import pkgutil
from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch
from test_block_methods import OTHERS, TRANSFORMS

import tulle.methods.activation
import tulle.methods.prune
import tulle.methods.quantize
from oracles.problems import layer, state, statistics
from tulle.core.grid import Grid
from tulle.errors import UserError
from tulle.methods.contract import GroupState, LinearState, Method, Statistics
from tulle.methods.prune.alps import ALPS
from tulle.methods.prune.magnitude import Magnitude
from tulle.methods.prune.ria import RIA
from tulle.methods.prune.sparsegpt import SparseGPT
from tulle.methods.prune.wanda import Wanda
from tulle.methods.pruner import ScorePruner
from tulle.methods.quantize.gptq import GPTQ
from tulle.methods.quantize.round_to_nearest import RoundToNearest

METHODS: list[Method] = [
    Magnitude(sparsity=0.5),
    Magnitude(sparsity=0.3, scope="row"),
    Magnitude(pattern="2:4"),
    Wanda(sparsity=0.5),
    Wanda(sparsity=0.5, refit=True),
    Wanda(pattern="1:4"),
    Wanda(sparsity=0.5, refit=True, swaps=1),
    RIA(sparsity=0.5),
    RIA(pattern="2:4", power=1.0, refit=True),
    SparseGPT(sparsity=0.5),
    SparseGPT(pattern="2:4"),
    SparseGPT(pattern="3:8", refit=False),
    SparseGPT(sparsity=0.5, bits=4, group_size=16),
    SparseGPT(pattern="2:4", bits=8, symmetric=False, refit=False),
    SparseGPT(pattern="2:4", swaps=2),
    ALPS(sparsity=0.5),
    ALPS(sparsity=0.7, scope="row", swaps=1),
    ALPS(pattern="2:4", swaps=1),
    ALPS(pattern="3:8", refit=False, iterations=20),
    RoundToNearest(bits=8, input_bits=8),
    RoundToNearest(bits=3, group_size=8, symmetric=False, clip_search=10),
    GPTQ(bits=4, group_size=16),
    GPTQ(bits=2, symmetric=False, act_order=False, descent=0),
    GPTQ(bits=8, input_bits=8),
    GPTQ(bits=3, group_size=16, symmetric=False, scale_bits=8),
    RoundToNearest(bits=5, group_size=16, scale_bits=8),
    RoundToNearest(bits=4, format="nvfp4", clip_search=1, clip=0.9),
    GPTQ(format="nvfp4", group_size="auto"),
    RoundToNearest(bits=4, symmetric=False, clip=0.8, input_bits=4),
]

ROWS, COLUMNS = 24, 48


def run(method: Method, mask: torch.Tensor | None = None, columns: int = COLUMNS) -> LinearState:
    w, x = layer(ROWS, columns)
    linear = state(w if mask is None else w * mask)
    linear.mask = mask
    method.validate(linear.name, (ROWS, columns))
    group = GroupState("qkv", [linear], only_needed(method, statistics(x)))
    method.apply(group)
    return linear


def only_needed(method: Method, full: Statistics) -> Statistics:
    """What the walker collects: nothing that ``needs`` does not name."""
    result = Statistics(full.tokens)
    for name in method.needs:
        setattr(result, name, getattr(full, name))
    return result


def test_the_list_is_complete() -> None:
    listed = {type(method) for method in [*METHODS, *TRANSFORMS, *OTHERS]}
    for room in (tulle.methods.prune, tulle.methods.quantize, tulle.methods.activation):
        for file in pkgutil.iter_modules(room.__path__, room.__name__ + "."):
            module = __import__(file.name, fromlist=["*"])
            own = {
                c
                for _, c in inspect.getmembers(module, inspect.isclass)
                if issubclass(c, Method) and c.__module__ == file.name
            }
            assert len(own) == 1, f"{file.name} must hold one method"
            assert own <= listed, f"{own} is missing in METHODS"


def test_every_method_has_a_recipe_name() -> None:
    from tulle.compression.recipe import METHODS as named

    paths = {f"{type(m).__module__}:{type(m).__qualname__}" for m in [*METHODS, *TRANSFORMS, *OTHERS]}
    assert paths == set(named.values())


@pytest.mark.parametrize("method", METHODS, ids=str)
class TestContract:
    def test_state_is_consistent(self, method: Method) -> None:
        linear = run(method)
        w = linear.weight
        assert w.shape == linear.dense.shape and w.dtype == torch.float32 and bool(w.isfinite().all())
        if linear.mask is not None:
            assert linear.mask.dtype == torch.bool and linear.mask.shape == w.shape
            assert not w[~linear.mask].any()
        if linear.quantised is not None:
            q = linear.quantised
            assert torch.equal(w, q.dequantise(linear.mask))
            kept = q.codes if linear.mask is None else q.codes[linear.mask]
            assert q.codes.dtype == torch.int16 and q.grid.low <= kept.min() and kept.max() <= q.grid.high
            groups = COLUMNS // (q.grid.group_size or COLUMNS)
            assert q.scale.shape == q.zero.shape == (ROWS, groups)
            assert bool((q.scale > 0).all())
            stored = q.scale if q.row_scale is None else q.row_scale
            assert torch.equal(stored, stored.bfloat16().float())
            if q.row_scale is not None:
                levels = (q.scale / q.row_scale[:, None]).round()
                most = 255 if q.grid.format == "int" else 448
                assert torch.equal(q.scale, levels * q.row_scale[:, None]) and 1 <= levels.min() <= levels.max() <= most
            assert torch.equal(q.zero, q.zero.round()) and q.zero.min() >= 0 and q.zero.max() <= 2**q.grid.bits - 1
            assert not (q.grid.symmetric and q.zero.any())

    def test_dense_weight_is_never_changed(self, method: Method) -> None:
        assert torch.equal(run(method).dense, layer(ROWS, COLUMNS)[0])

    def test_two_runs_are_equal(self, method: Method) -> None:
        assert torch.equal(run(method).weight, run(method).weight)

    def test_an_existing_mask_is_kept(self, method: Method) -> None:
        w, _ = layer(ROWS, COLUMNS)
        mask = w.abs() > w.abs().quantile(0.25)
        linear = run(method, mask)
        assert linear.mask is not None and not linear.mask[~mask].any()
        assert not linear.weight[~mask].any()

    def test_exact_sparsity(self, method: Method) -> None:
        sparsity, pattern = getattr(method, "sparsity", None), getattr(method, "pattern", None)
        linear = run(method)
        if sparsity is not None:
            per_row = isinstance(method, ScorePruner) or getattr(method, "scope", "layer") == "row"
            count = ROWS * round(sparsity * COLUMNS) if per_row else round(sparsity * ROWS * COLUMNS)
            assert linear.mask is not None and int((~linear.mask).sum()) == count
            assert linear.pattern is None
        elif pattern is not None:
            n, m = map(int, pattern.split(":"))
            assert linear.mask is not None and linear.pattern == pattern
            assert bool((linear.mask.reshape(ROWS, -1, m).sum(-1) == n).all())
        else:
            assert linear.mask is None

    def test_dead_channels_stay_finite(self, method: Method) -> None:
        w, x = layer(ROWS, COLUMNS)
        x[:, [0, 7, 40]] = 0
        linear = state(w)
        method.apply_linear(linear, only_needed(method, statistics(x)))
        assert bool(linear.weight.isfinite().all())
        if "hessian" in method.needs:
            assert any("3 input channels were zero" in note for note in linear.notes)

    def test_all_zero_weight(self, method: Method) -> None:
        _, x = layer(ROWS, COLUMNS)
        linear = state(torch.zeros(ROWS, COLUMNS))
        method.apply_linear(linear, only_needed(method, statistics(x)))
        assert not linear.weight.any()

    def test_settings_are_frozen(self, method: Method) -> None:
        with pytest.raises(FrozenInstanceError):
            setattr(method, fields(method)[0].name, 1)  # type: ignore[arg-type]

    def test_input_bits_are_passed_on(self, method: Method) -> None:
        assert run(method).input_bits == getattr(method, "input_bits", None)


@pytest.mark.parametrize("method", [m for m in METHODS if getattr(m, "bits", None)], ids=str)
class TestMixedPrecision:
    def test_kept_bits_replace_the_own(self, method: Method) -> None:
        w, x = layer(ROWS, COLUMNS)
        linear = state(w)
        linear.kept_bits = 6
        method.apply(GroupState("qkv", [linear], only_needed(method, statistics(x))))
        assert linear.quantised is not None and linear.quantised.grid.bits == 6

    def test_sixteen_bits_leave_it_alone(self, method: Method) -> None:
        w, x = layer(ROWS, COLUMNS)
        linear = state(w)
        linear.kept_bits = 16
        method.apply(GroupState("qkv", [linear], only_needed(method, statistics(x))))
        assert linear.quantised is None and torch.equal(linear.weight, w)


@pytest.mark.parametrize(
    "method", [m for m in METHODS if getattr(m, "bits", None) and getattr(m, "format", "int") == "int"], ids=str
)
def test_group_size_must_divide(method: Method) -> None:
    with pytest.raises(UserError, match=r"layer: .*divisible by group_size 7, found 48"):
        replace(method, group_size=7).validate("layer", (ROWS, COLUMNS))  # type: ignore[type-var]


def test_floats_have_their_own_group_size() -> None:
    with pytest.raises(UserError, match="layer: .* divisible by 32 for mxfp4, found 48; use format: int"):
        GPTQ(format="mxfp4").validate("layer", (ROWS, COLUMNS))
    for settings in ({"bits": 8}, {"group_size": 64}, {"symmetric": False}):
        with pytest.raises(UserError, match=f"expected {next(iter(settings))} .* with format mxfp4"):
            RoundToNearest(**{"bits": 4, "format": "mxfp4"} | settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", [GPTQ(format="nvfp4"), RoundToNearest(bits=4, format="nvfp4")], ids=str)
def test_bits_given_by_others_are_whole_numbers(method: Method) -> None:
    w, x = layer(ROWS, COLUMNS)
    linear = state(w)
    linear.kept_bits = 8
    method.apply(GroupState("qkv", [linear], only_needed(method, statistics(x))))
    assert linear.quantised is not None and linear.quantised.grid == Grid(8)
    linear = state(w)
    linear.allotted_grid = Grid(3, 16)
    method.apply(GroupState("qkv", [linear], only_needed(method, statistics(x))))
    assert linear.quantised is not None and linear.quantised.grid == Grid(3, 16)


@pytest.mark.parametrize("cls", [Magnitude, Wanda, RIA, SparseGPT, ALPS])
class TestPruningSettings:
    def test_pattern_must_divide(self, cls: type) -> None:
        with pytest.raises(UserError, match="layer: .*divisible by 4 .*found 50"):
            cls(pattern="2:4").validate("layer", (ROWS, 50))

    @pytest.mark.parametrize("pattern", ["5:4", "0:4", "2-4", "half", "2:", "-1:4"])
    def test_impossible_pattern(self, cls: type, pattern: str) -> None:
        with pytest.raises(UserError, match="expected a pattern"):
            cls(pattern=pattern)

    @pytest.mark.parametrize("sparsity", [1.0, -0.1, 50, float("nan")])
    def test_impossible_sparsity(self, cls: type, sparsity: float) -> None:
        with pytest.raises(UserError, match="expected a sparsity"):
            cls(sparsity=sparsity)

    def test_one_of_sparsity_and_pattern(self, cls: type) -> None:
        for settings in ({}, {"sparsity": 0.5, "pattern": "2:4"}):
            with pytest.raises(UserError, match="exactly one"):
                cls(**settings)


@pytest.mark.parametrize("cls", [GPTQ, RoundToNearest])
@pytest.mark.parametrize("settings", [{"bits": 1}, {"bits": 9}, {"group_size": 0}])
def test_impossible_grid(cls: type, settings: dict[str, int]) -> None:
    with pytest.raises(UserError, match="expected"):
        cls(**settings)


@pytest.mark.parametrize(
    "method", [GPTQ(), SparseGPT(sparsity=0.5), Wanda(sparsity=0.5, refit=True), ALPS(sparsity=0.5)], ids=str
)
def test_impossible_damping(method: Method) -> None:
    with pytest.raises(UserError, match="positive damping"):
        replace(method, damping=0.0)  # type: ignore[type-var]

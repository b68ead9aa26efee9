"""Oracles of the methods that transform, clip and choose: closed forms, planted outliers, naive float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_block_methods import TEXT, prose
from torch import Tensor, nn

import tulle.hf
from checkpoints import write_checkpoint
from tulle.compression.job import compress
from tulle.core.grid import Grid
from tulle.core.hadamard import hadamard_matrix
from tulle.core.token_grid import TokenGrid
from tulle.core.transform import fold, run
from tulle.methods.contract import BlockState, GroupState, LinearState, ProducedRows, Statistics, Survey
from tulle.methods.learning import LearnedGroup, Schedule, fake_linears, learn_block
from tulle.methods.quantize.affinequant import AffineQuant, gradual_mask
from tulle.methods.quantize.duquant import DuQuant, block_size
from tulle.methods.quantize.flatquant import factors, start
from tulle.methods.quantize.keep_sensitive import KeepSensitive, output_error
from tulle.methods.quantize.learned_clipping import LearnedClipping
from tulle.methods.quantize.perq import PeRQ, zigzag_within_heads
from tulle.methods.quantize.smoothquant import SmoothQuant
from tulle.methods.quantize.spinquant import SpinQuant, cayley_step
from tulle.methods.smoothing import smoothing
from tulle.models.description import Linear, LinearGroup, Norm


def a_block(x: dict[str, Tensor], seed: int = 0, heads: int = 4, kv_heads: int = 2, head_dim: int = 16) -> BlockState:
    """A block of plain numbers: d 64, ffn 96, and given inputs of its roles."""
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "qkv": {"q": (heads * head_dim, 64), "k": (kv_heads * head_dim, 64), "v": (kv_heads * head_dim, 64)},
        "o": {"o": (64, heads * head_dim)},
        "gate_up": {"gate": (96, 64), "up": (96, 64)},
        "down": {"down": (64, 96)},
    }
    groups = {}
    for role, linears in shapes.items():
        states = []
        for name, shape in linears.items():
            weight = torch.randn(shape, generator=g)
            states.append(LinearState(name, weight, weight, role))
        rows = x.get(role)
        absmax = None if rows is None else rows.abs().amax(0)
        groups[role] = GroupState(role, states, Statistics(0, absmax=absmax, rows=rows))
    by_name = {linear.name: linear for group in groups.values() for linear in group.linears}
    return BlockState(
        index=0,
        groups=groups,
        gains={"qkv": torch.rand(64, generator=g) + 0.5, "gate_up": torch.rand(64, generator=g) + 0.5},
        biases={"v": torch.randn(kv_heads * head_dim, generator=g)},
        producers={
            "qkv": (),
            "o": (ProducedRows(by_name["v"]),),
            "gate_up": (),
            "down": (ProducedRows(by_name["up"]), ProducedRows(by_name["gate"])),
        },
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
    )


def inputs(columns: int, outlier: int | None = None, size: float = 50.0, tokens: int = 200) -> Tensor:
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(columns))
    if outlier is not None:
        x[:, outlier] *= size
    return x


class TestSmoothQuant:
    def test_half_evens_the_maxima_out(self) -> None:
        """α = ½: max|X/s| = max|s·W| = √(max|X|·max|W|) in every channel."""
        x, w = torch.tensor([100.0, 1.0, 4.0]), torch.tensor([1.0, 4.0, 9.0])
        s = smoothing(x, w, 0.5)
        torch.testing.assert_close(x / s, (x * w).sqrt())
        torch.testing.assert_close(s * w, (x * w).sqrt())

    def test_ends(self) -> None:
        x, w = torch.tensor([100.0, 0.0]), torch.tensor([2.0, 4.0])
        assert smoothing(x, w, 1.0).tolist() == [100, 1]
        assert smoothing(x, w, 0.0).tolist() == [0.5, 1]

    def test_tiny_sizes_count_as_a_hundred_thousandth(self) -> None:
        """Of X, of W, and of s itself."""
        x, w = torch.tensor([1e-9, 4.0, 1e-5]), torch.tensor([4.0, 1e-9, 1e5])
        expected = [(1e-5 / 4) ** 0.5, (4 / 1e-5) ** 0.5, 1e-5]
        assert smoothing(x, w, 0.5).tolist() == pytest.approx(expected, rel=1e-5)
        assert smoothing(x[2:], w[2:], 0.0).tolist() == pytest.approx([1e-5])

    def test_norms_balance_best_before_a_rotation(self) -> None:
        """Σ(x_j/s_j)²·Σ(s_j·w_j)² reaches Cauchy's bound (Σ x_j·w_j)², which no other s passes."""
        g = torch.Generator().manual_seed(0)
        x, w = torch.rand(40, generator=g) * 9 + 0.1, torch.rand(40, generator=g) + 0.1
        s = smoothing(x, w, 0.5)

        def product(s: Tensor) -> float:
            return float((x / s).square().sum() * (s * w).square().sum())

        assert product(s) == pytest.approx(float((x * w).sum() ** 2), rel=1e-5)
        assert product(s) < product(s * (1 + 0.1 * torch.rand(40, generator=g)))

    def test_a_massive_value_does_not_move_the_norms(self) -> None:
        scales = []
        for size in ("max", "rms"):
            x = inputs(96, tokens=1000)
            x[17, 5] = 400.0
            block = a_block({"down": x})
            block.groups["down"].statistics.column_norm = x.norm(dim=0)
            before = block.producers["down"][0].state.dense
            SmoothQuant(size=size).prepare(block, ("down",))
            s = (before / block.producers["down"][0].state.dense).mean(1)
            scales.append(float(s[5] / s.median()))
        assert scales[0] > 5 and scales[1] < 4

    def test_folds(self) -> None:
        block = a_block({role: inputs(c, 3) for role, c in (("qkv", 64), ("o", 64), ("gate_up", 64), ("down", 96))})
        gain, up = block.gains["qkv"].clone(), block.producers["down"][0].state.dense.clone()
        q = block.groups["qkv"].linears[0].dense.clone()
        gate = block.producers["down"][1].state.dense.clone()
        SmoothQuant(alpha=0.5).prepare(block, ("qkv", "down"))
        s = gain / block.gains["qkv"]
        torch.testing.assert_close(block.groups["qkv"].linears[0].dense, q * s)
        x_max = block.groups["qkv"].statistics.absmax
        w_max = torch.stack([linear.dense.abs().amax(0) for linear in block.groups["qkv"].linears]).amax(0)
        torch.testing.assert_close(x_max, w_max)
        # down: up's rows take 1/s, gate's do not.
        assert torch.equal(block.producers["down"][1].state.dense, gate)
        assert not torch.allclose(block.producers["down"][0].state.dense, up)

    def test_query_heads_of_one_kv_head_share_s(self) -> None:
        x = inputs(64)
        x[:, 16 + 5] *= 100  # channel 5 of the second query head, which reads the first KV head
        block = a_block({"o": x})
        before, bias = block.producers["o"][0].state.dense.clone(), block.biases["v"].clone()
        o = block.groups["o"].linears[0].dense.clone()
        SmoothQuant().prepare(block, ("o",))
        ratio = (before / block.producers["o"][0].state.dense).mean(1)
        assert ratio.argmax() == 5 and ratio[5] > 2 * ratio[6:].max()
        torch.testing.assert_close(bias / block.biases["v"], ratio)
        scale = (block.groups["o"].linears[0].dense / o).mean(0).reshape(2, 2, 16)
        torch.testing.assert_close(scale[:, 0], scale[:, 1])
        torch.testing.assert_close(scale[:, 0].reshape(-1), ratio)


class TestDuQuant:
    def test_an_outlier_channel_is_spread(self) -> None:
        x = inputs(64, outlier=17)
        block = a_block({"qkv": x})
        DuQuant(steps=64, block=64).prepare(block, ("qkv",))
        group = block.groups["qkv"]
        transformed = run(group.linears[0].transform, x)
        # Spread evenly over 64 channels the outlier of size m would leave m/8; the noise of the others adds to it.
        assert transformed.abs().max() < x.abs().max() / 5
        # Orthogonal up to the rounding of its entries to float16.
        torch.testing.assert_close(transformed.norm(dim=1), x.norm(dim=1), rtol=1e-3, atol=0)
        torch.testing.assert_close(group.statistics.rows, transformed)

    def test_every_stage_lowers_the_peak(self) -> None:
        x = inputs(96)
        x[:, 32:38] *= 100  # six independent outliers in one of three blocks
        peaks = []
        for method in (None, DuQuant(steps=32, block=32, permutations=0), DuQuant(steps=32, block=32)):
            block = a_block({"down": x})
            if method:
                method.prepare(block, ("down",))
            peaks.append(float(run(block.groups["down"].linears[0].transform, x).abs().max()))
        # R̂₁ spreads them over their block, P and R̂₂ over all three.
        assert peaks[1] < 0.8 * peaks[0] and peaks[2] < 0.8 * peaks[1]

    def test_kinds_of_the_chain(self) -> None:
        def kinds(method: DuQuant) -> list[str]:
            block = a_block({"qkv": inputs(64)})
            method.prepare(block, ("qkv",))
            siblings = {linear.transform for linear in block.groups["qkv"].linears}
            assert len(siblings) == 1
            return [t.kind for t in siblings.pop()]

        small = {"steps": 2, "block": 16}
        assert kinds(DuQuant(**small)) == ["block_matrix", "permutation", "block_matrix"]
        assert kinds(DuQuant(**small, permutations=0)) == ["block_matrix"]
        assert kinds(DuQuant(**small, permutations=2)) == ["block_matrix", *["permutation", "block_matrix"] * 2]
        assert kinds(DuQuant(**small, permutation="none")) == ["block_matrix"] * 2
        assert kinds(DuQuant(**small, rotation="hadamard")) == ["hadamard", "permutation", "hadamard"]
        assert kinds(DuQuant(**small, rotation="none")) == ["permutation"]
        assert kinds(DuQuant(steps=2, block=2)) == ["block_matrix", "permutation", "block_matrix"]

    def test_block_size(self) -> None:
        assert [block_size(c, 128) for c in (4096, 11008, 384, 96, 88, 7)] == [128, 128, 128, 32, 8, 1]


class TestPeRQ:
    def test_permutation_stays_in_its_head(self) -> None:
        absmax = torch.rand(64, generator=torch.Generator().manual_seed(0))
        index = zigzag_within_heads(absmax, heads=4, kv_heads=2, head_dim=16, block=4)
        assert sorted(index.tolist()) == list(range(64))
        heads = index.reshape(4, 16) // 16
        assert torch.equal(heads, torch.arange(4)[:, None].expand(4, 16))
        within = index.reshape(2, 2, 16) % 16
        assert torch.equal(within[:, 0], within[:, 1])

    def test_blocks_share_the_outliers(self) -> None:
        x = inputs(96)
        x[:, :4] *= 100  # all in the first block of 32
        errors = []
        for permute in (False, True):
            block = a_block({"down": x})
            PeRQ(block=32, permute=permute).prepare(block, ("down",))
            rows = block.groups["down"].statistics.rows
            assert rows is not None
            errors.append(float((TokenGrid(4, False).fake(rows) - rows).square().sum()))
        assert errors[1] < 0.7 * errors[0]

    @pytest.mark.parametrize("role", ["down", "o"])
    def test_signs_and_places_are_all_that_is_folded(self, role: str) -> None:
        """Before the Hadamard, channels change their signs, about half of them, and their places, and no size."""
        block = a_block({role: inputs(96 if role == "down" else 64)})
        producer, linear = block.producers[role][0].state, block.groups[role].linears[0]
        before = producer.dense.clone(), linear.dense.clone()
        PeRQ(block=8).prepare(block, (role,))
        for found, given, axis in ((producer.dense, before[0], 1), (linear.dense, before[1], 0)):
            places = (found.abs().sum(axis)[:, None] - given.abs().sum(axis)).abs().argmin(1)
            moved = given[places] if axis == 1 else given[:, places]
            assert sorted(places.tolist()) == list(range(len(places))) and torch.equal(found.abs(), moved.abs())
            changed = (found == -moved).all(axis)
            assert torch.equal((found == moved).all(axis), ~changed)
            assert 0.25 < float(changed.float().mean()) < 0.75

    def test_nothing_but_the_rotation_is_left_online(self) -> None:
        block = a_block({"down": inputs(96), "o": inputs(64)})
        PeRQ(block=8).prepare(block, ("o", "down"))
        for role in ("o", "down"):
            assert [t.kind for t in block.groups[role].linears[0].transform] == ["hadamard"]


def test_quarot_is_the_rotated_model(tmp_path: Path) -> None:
    """Every stored tensor of QuaRot's residual rotation against W·diag(γ)·Q and Qᵀ·W in float64."""
    dense = write_checkpoint(tmp_path / "m", num_hidden_layers=1)
    recipe = {"steps": [{"quarot": {"heads": False, "across_heads": False, "down": False}}]}
    compress(tmp_path / "m", recipe | {"calibration": {"samples": 2, "length": 20}}, tmp_path / "o", calibration=TEXT)
    model = tulle.hf.load(tmp_path / "o", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (32,), generator=generator).double() * 2 - 1
    q = torch.diag(signs) @ hadamard_matrix(32).double() / 32**0.5
    found, given = ({k: v.double() for k, v in m.state_dict().items()} for m in (model, dense))
    gain = given["model.layers.0.input_layernorm.weight"]
    for key, expected in {
        "model.embed_tokens.weight": given["model.embed_tokens.weight"] @ q,
        "lm_head.weight": given["lm_head.weight"] * given["model.norm.weight"] @ q,
        "model.layers.0.self_attn.q_proj.weight": given["model.layers.0.self_attn.q_proj.weight"] * gain @ q,
        "model.layers.0.mlp.down_proj.weight": q.T @ given["model.layers.0.mlp.down_proj.weight"],
        "model.layers.0.input_layernorm.weight": torch.ones(32, dtype=torch.float64),
    }.items():
        torch.testing.assert_close(found[key], expected, rtol=0, atol=1e-5)


class TestSpinQuant:
    def test_cayley_steps_stay_orthogonal_and_go_down(self) -> None:
        """min ‖R − A‖² over orthogonal R has a closed form: U·Vᵀ of A's singular value decomposition."""
        g = torch.Generator().manual_seed(0)
        target = torch.randn(6, 6, generator=g, dtype=torch.float64)
        u, _, vh = torch.linalg.svd(target)
        best = u @ vh
        rotation, _ = torch.linalg.qr(torch.randn(6, 6, generator=g, dtype=torch.float64))
        if torch.det(rotation) * torch.det(best) < 0:  # Cayley steps cannot leave a component
            rotation[:, 0] *= -1
        for i in range(400):
            rotation = cayley_step(rotation, 2 * (rotation - target), 0.3 * (1 - i / 400))
        assert (rotation @ rotation.T - torch.eye(6)).abs().max() < 1e-10
        assert (rotation - best).abs().max() < 1e-2

    def test_learning_lowers_the_error(self) -> None:
        survey = a_survey(outlier=5)
        method = SpinQuant(steps=60, rate=0.2)
        start = SpinQuant(steps=0)
        losses = []
        for m in (start, method):
            survey.residual = ()
            m.plan(survey, ())
            (transform,) = survey.residual
            matrix = transform.matrix  # type: ignore[union-attr]
            assert (matrix.double() @ matrix.double().T - torch.eye(64)).abs().max() < 1e-6
            losses.append(float(m._loss(survey, 0, matrix)))
        assert losses[1] < 0.9 * losses[0]
        first, last = survey.notes[-1].split("readers ")[1].split(" → ")
        assert first == f"{losses[0]:.3g}" and losses[1] * 0.99 < float(last) < 1.05 * losses[1]

    def test_the_note_is_a_mean_over_blocks(self) -> None:
        """Two steps, each on a block of its own: the first and the last visit of each are one."""
        survey = a_survey(outlier=5)
        survey.layers = 2
        SpinQuant(steps=2, rate=1e-9).plan(survey, ())
        first, last = survey.notes[-1].split("readers ")[1].split(" → ")
        (transform,) = survey.residual
        expected = float(SpinQuant()._loss(survey, 0, transform.matrix))  # type: ignore[union-attr]
        assert float(first) == float(last) == pytest.approx(expected, rel=5e-3)


def a_survey(outlier: int | None = None, spoiled: str = "") -> Survey:
    g = torch.Generator().manual_seed(0)
    q, k, v, o = (Linear(name, (64, 64)) for name in "qkvo")
    groups = {"qkv": LinearGroup("qkv", (q, k, v), Norm("norm", 1e-6)), "o": LinearGroup("o", (o,))}
    tensors = {f"{n}.weight": torch.randn(64, 64, generator=g) for group in groups.values() for n in group.names}
    tensors["norm.weight"] = torch.rand(64, generator=g) + 0.5
    if spoiled:
        tensors[f"{spoiled}.weight"][:, 3] *= 100
    x = inputs(64, outlier)
    if spoiled:
        x[:, 3] *= 1e-3  # the large weights matter to the grid alone
    return Survey(
        layers=1, rows=lambda block, role: x, block=lambda index: tensors, groups=[groups, groups],
        prefix=lambda index: f"{index}.", hidden=64,
    )  # fmt: skip


class TestKeepSensitive:
    def test_a_spoiled_linear_is_found(self) -> None:
        survey = a_survey(spoiled="k")
        KeepSensitive(count=1, bits=4, input_bits=None).plan(survey, ("qkv", "o"))
        assert survey.kept == survey.kept_inputs == {"0.q": 16, "0.k": 16, "0.v": 16}
        assert survey.notes[0].endswith("q and v keep them too, for readers that fuse the group")

    def test_alone_where_asked_to(self) -> None:
        survey = a_survey(spoiled="k")
        KeepSensitive(count=1, bits=4, input_bits=None, siblings=False).plan(survey, ("qkv", "o"))
        assert survey.kept == {"0.k": 16} and "keep them too" not in survey.notes[0]
        # The input is one for all three.
        assert survey.kept_inputs == {"0.q": 16, "0.k": 16, "0.v": 16}

    def test_error_by_hand(self) -> None:
        w, x = torch.tensor([[1.0, 0.4]]), torch.tensor([[1.0, 1.0]])
        # 2 bits, symmetric: codes −2…1, step 1: 0.4 → 0. y 1.4 → 1.
        assert output_error(w, x, Grid(2), None) == pytest.approx((0.4 / 1.4) ** 2)
        assert output_error(w, x, Grid(2), None, relative=False) == pytest.approx(0.16)

    def test_the_artefact_keeps_them(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path / "m", num_hidden_layers=2)
        steps: list[dict[str, Any]] = [
            {"keep_sensitive": {"count": 3, "keep_bits": 16, "siblings": False}},
            {"activations": {"bits": 8}}, {"gptq": {"bits": 8}},
        ]  # fmt: skip
        recipe = {"steps": steps, "calibration": {"samples": 3, "length": 30}}
        report = compress(tmp_path / "m", recipe, tmp_path / "o", calibration=TEXT)
        kept = [linear for linear in report["linears"] if linear["bits"] is None]
        assert len(kept) == 3 and len(report["notes"]) == 3
        assert all(any(linear["name"] in note for note in report["notes"]) for linear in kept)
        assert all(linear["input_bits"] is None for linear in kept)
        model = tulle.hf.load(tmp_path / "o", dtype=torch.float32)
        assert bool(model(prose()).logits.isfinite().all())
        config = json.loads((tmp_path / "o" / "config.json").read_text())["quantization_config"]["linears"]
        assert sum(spec["bits"] == 8 for spec in config.values()) == 14 - 3


class TestLearnedClipping:
    def test_a_lone_outlier_is_clipped_away(self) -> None:
        """A linear block y = x·Wᵀ where one useless weight per row stretches the grid: its input is nearly zero."""
        g = torch.Generator().manual_seed(0)
        weight = torch.randn(8, 32, generator=g)
        weight[:, 7] = 30.0
        x = torch.randn(4, 25, 32, generator=g)
        x[..., 7] *= 1e-3
        module = nn.Sequential(nn.Linear(32, 8, bias=False))
        module[0].weight.data = weight
        state = LinearState("0", weight, weight, "o")
        block = BlockState(
            index=0, groups={"o": GroupState("o", [state], Statistics())}, gains={}, biases={}, producers={},
            heads=1, kv_heads=1, head_dim=8, module=module, forward=lambda hidden: module(hidden),
            batches=lambda: iter([(x, x @ weight.T, torch.ones(4, 25, dtype=torch.bool))]),
        )  # fmt: skip
        LearnedClipping(epochs=300, rate=0.1).prepare(block, ("o",))
        assert state.ranges is not None
        low, high = state.ranges
        assert high.shape == (8, 1) and float(high.max()) < 15 and float(low.min()) >= float(weight.min()) * 1.0001
        note = block.notes[0].split(": block error ")[1].split(" → ")
        assert float(note[1]) < 0.5 * float(note[0])

    def test_the_best_state_is_kept(self) -> None:
        g = torch.Generator().manual_seed(0)
        weight, x = torch.randn(8, 32, generator=g), torch.randn(2, 20, 32, generator=g)
        module = nn.Sequential(nn.Linear(32, 8, bias=False))
        state = LinearState("0", weight, weight, "o")
        block = BlockState(
            index=0, groups={"o": GroupState("o", [state], Statistics())}, gains={}, biases={}, producers={},
            heads=1, kv_heads=1, head_dim=8, module=module, forward=lambda hidden: module(hidden),
            batches=lambda: iter([(x, x @ weight.T, torch.ones(2, 20, dtype=torch.bool))]),
        )  # fmt: skip
        groups = {"o": LearnedGroup()}
        linears = fake_linears(block, groups, lambda columns: Grid(4, None, False), ("o",), learn_clip=True)
        # A rate that ruins everything: the start is what remains.
        history = learn_block(block, linears, groups, Schedule(3, 100.0, 100.0))
        assert history[-1] > history[0]
        assert torch.equal(linears["0"].clip.low, torch.full((8, 1), 4.0))
        assert isinstance(module[0], nn.Linear)


@pytest.mark.parametrize(
    "method", [AffineQuant(epochs=4, block=8, alpha=1.0, rate=0.02), LearnedClipping(epochs=40, rate=0.1)]
)
def test_the_error_that_is_noted_is_that_of_what_is_left(method: AffineQuant | LearnedClipping) -> None:
    """A linear block: its error anew, from the transform, the ends of the grids and the weights."""
    g = torch.Generator().manual_seed(0)
    weight, x = torch.randn(8, 32, generator=g), torch.randn(4, 25, 32, generator=g)
    x[..., 5] *= 8
    module = nn.Sequential(nn.Linear(32, 8, bias=False))
    module[0].weight.data = weight
    state = LinearState("0", weight, weight, "o")
    block = BlockState(
        index=0, groups={"o": GroupState("o", [state], Statistics())}, gains={}, biases={}, producers={},
        heads=1, kv_heads=1, head_dim=8, module=module, forward=lambda hidden: module(hidden),
        batches=lambda: iter([(x, x @ weight.T, torch.ones(4, 25, dtype=torch.bool))]),
    )  # fmt: skip
    method.prepare(block, ("o",))
    assert state.ranges is not None
    folded, (low, high) = fold(state.transform, weight), state.ranges
    step = (high.clamp(min=0) - low.clamp(max=0)) / 15
    zero = (-low.clamp(max=0) / step).round()
    rounded = (((folded / step).round() + zero).clamp(0, 15) - zero) * step
    y = x @ weight.T
    lost = float((run(state.transform, x) @ rounded.T - y).square().sum() / y.square().sum())
    start, end = (float(part) for part in block.notes[0].split(": block error ")[1].split(" → "))
    assert end < 0.98 * start and lost == pytest.approx(end, rel=0.02)


def test_learned_ends_follow_their_rows() -> None:
    """What is folded into a producer's rows later moves the ends of their grids along."""
    block = a_block({role: inputs(c) for role, c in (("o", 64), ("down", 96))})
    for role in ("qkv", "gate_up"):
        for linear in block.groups[role].linears:
            low, high = linear.dense.aminmax(dim=1, keepdim=True)
            linear.ranges = (low, high)
    g = torch.Generator().manual_seed(0)
    scale = torch.randn(96, generator=g)
    block.fold_permutation("down", torch.randperm(96, generator=g))
    block.fold_diagonal("down", scale)
    block.fold_diagonal("o", torch.rand(32, generator=g).reshape(2, 1, 16).expand(2, 2, 16).reshape(-1))
    for linear in (*block.groups["qkv"].linears, *block.groups["gate_up"].linears):
        assert linear.ranges is not None
        low, high = linear.dense.aminmax(dim=1, keepdim=True)
        torch.testing.assert_close(linear.ranges, (low, high))


def test_gradual_mask_by_hand() -> None:
    found = gradual_mask(4, 0.25, 0.1)
    expected = torch.tensor([[1, 0.1, 0, 0], [0.1, 1, 0.1, 0], [0, 0.1, 1, 0.1], [0, 0, 0.1, 1]])
    torch.testing.assert_close(found, expected)
    assert bool((gradual_mask(4, 1.0, 1.0) == 1).all())


def test_kronecker_factors() -> None:
    assert [factors(c) for c in (4096, 11008, 128, 384, 7)] == [(64, 64), (86, 128), (8, 16), (16, 24), (1, 7)]


@pytest.mark.parametrize("size", [1, 7, 8, 12, 86])
def test_kronecker_maps_start_orthogonal(size: int) -> None:
    found = start(size, torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(found @ found.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-6)
    flat = torch.full((size, size), size**-0.5, dtype=torch.float64)
    assert torch.allclose(found.abs(), flat) == (size in (1, 8, 12))  # a Hadamard matrix where there is one

"""Steps that decide where to prune how much: rules by hand, budgets to the weight, and the road into the artefact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_block_methods import TEXT, prose
from torch import Tensor

import tulle.hf
from checkpoints import write_checkpoint
from tulle.compression.job import compress
from tulle.compression.recipe import parse_recipe
from tulle.compression.survey import take_survey
from tulle.compression.walker import Walker
from tulle.core.hessian import Hessian
from tulle.errors import UserError
from tulle.format.spec import QuantizationConfig
from tulle.methods.contract import LinearState, Survey
from tulle.methods.prune.allocate import Allocate, Surgeon
from tulle.methods.prune.magnitude import Magnitude
from tulle.methods.prune.owl import OWL, outlier_share, owl
from tulle.methods.prune.sparsegpt import SparseGPT
from tulle.methods.prune.wanda import Wanda
from tulle.models.batches import Batch
from tulle.models.decoder import DecoderBlock
from tulle.models.description import Linear, LinearGroup
from tulle.models.rewrite import DenseModel

SPARSE: dict[str, Any] = {"sparsegpt": {"sparsity": 0.6}}


def run(model: Path, output: Path, steps: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
    recipe = {"steps": steps, "calibration": {"samples": 6, "length": 48}}
    return compress(model, recipe, output, calibration=TEXT, **settings)


def pruned(report: dict[str, Any]) -> dict[str, int]:
    return {x["name"]: round(x["sparsity"] * x["shape"][0] * x["shape"][1]) for x in report["linears"]}


class TestRespecting:
    def test_a_sparsity_is_replaced_and_a_pattern_is_not(self) -> None:
        linear = LinearState("0.q", torch.zeros(2, 4), torch.zeros(2, 4), allotted=0.25)
        assert Wanda(sparsity=0.5).at(linear) == Wanda(sparsity=0.25)
        assert Magnitude(pattern="2:4").at(linear) == Magnitude(pattern="2:4")
        linear.kept_bits = 8
        assert SparseGPT(sparsity=0.5, bits=4).at(linear) == SparseGPT(sparsity=0.25, bits=8)
        linear.allotted = linear.kept_bits = None
        assert Wanda(sparsity=0.5).at(linear) == Wanda(sparsity=0.5)

    @pytest.mark.parametrize(
        ("steps", "message"),
        [
            ([{"owl": {"sparsity": 0.5}}, {"gptq": {}}], "pruning step with a sparsity on qkv, found none"),
            ([{"owl": {"sparsity": 0.5}}, {"wanda": {"pattern": "2:4"}}], "respects owl"),
            (
                [{"allocate": {"sparsity": 0.5}}, {"wanda": {"sparsity": 0.5, "targets": ["qkv", "o", "down"]}}],
                "on gate_up, found none that respects allocate",
            ),
            (
                [{"owl": {"sparsity": 0.5}}, {"allocate": {"sparsity": 0.5, "targets": ["o"]}}, SPARSE],
                "one step that decides sparsities of o, found owl and allocate",
            ),
            ([SPARSE, {"owl": {"sparsity": 0.5}}], "put owl before it"),
        ],
    )
    def test_recipes_that_cannot_work(self, steps: list[dict[str, Any]], message: str) -> None:
        with pytest.raises(UserError) as error:
            parse_recipe({"steps": steps})
        assert message in str(error.value) and "\n" not in str(error.value)

    def test_roles_may_be_divided_among_steps(self) -> None:
        steps = [
            {"owl": {"sparsity": 0.5, "targets": ["qkv", "o"]}},
            {"allocate": {"sparsity": 0.5, "targets": ["gate_up"]}},
            {"wanda": {"sparsity": 0.5}},
        ]
        assert len(parse_recipe({"steps": steps}).steps) == 3


class TestOWL:
    def test_outliers_by_hand(self) -> None:
        # 10 scores, sum 28, mean 2.8: above 5 times that is 15 alone, above 2 times 15 and 6.
        scores = [torch.tensor([[15.0, 1, 1, 1]]), torch.tensor([[6.0, 1], [1, 1], [1, 0]])]
        assert outlier_share(scores, 5) == pytest.approx(0.1)
        assert outlier_share(scores, 2) == pytest.approx(0.2)

    def test_rule_by_hand(self) -> None:
        # D from 1 % to 5 %: kept shares 0, 0.04, 0.16 above the least, their mean 1/15.
        found = owl(torch.tensor([0.01, 0.02, 0.05]), torch.tensor([7, 7, 7]), 0.7, 0.08)
        assert found.tolist() == pytest.approx([0.7 + 0.2 / 3, 0.7 + 0.2 / 3 - 0.04, 0.7 + 0.2 / 3 - 0.16])

    def test_mean_is_weighted(self) -> None:
        sizes = torch.tensor([1000, 10, 300])
        found = owl(torch.tensor([0.3, 0.1, 0.2]), sizes, 0.5)
        assert float((found * sizes).sum() / sizes.sum()) == pytest.approx(0.5, abs=1e-12)
        assert float(found.max() - found.min()) == pytest.approx(0.16, abs=1e-7)
        assert owl(torch.tensor([0.1, 0.1]), torch.tensor([3, 5]), 0.5).tolist() == [0.5, 0.5]

    def test_out_of_range(self) -> None:
        survey = a_survey([torch.ones(4, 4), torch.eye(4)])
        with pytest.raises(UserError, match="lower the spread of owl"):
            OWL(0.95, spread=0.2, multiple=2).plan(survey, ("o",))


def a_survey(weights: list[Tensor]) -> Survey:
    """One linear ``w`` per block; input norms 1."""
    return Survey(
        layers=len(weights), rows=lambda block, role: torch.eye(4), block=lambda i: {"w.weight": weights[i]},
        groups=[{"o": LinearGroup("o", (Linear("w", (4, 4)),))} for _ in weights], prefix=lambda i: f"{i}.", hidden=4,
        column_norm=lambda block, role: torch.ones(4),
    )  # fmt: skip


class TestAllocate:
    def test_surgeon_on_an_orthogonal_input_is_magnitude_pruning(self) -> None:
        weight = torch.arange(1.0, 17).reshape(4, 4)
        hessian = Hessian.zeros(4)
        hessian.add(torch.eye(4))
        found = Surgeon(weight, hessian, 0.01, 5).prune(0.25)
        assert torch.allclose(found, weight * (weight > 4))

    def test_surgeon_prunes_dead_channels_first(self) -> None:
        hessian = Hessian.zeros(4)
        hessian.add(torch.tensor([[1.0, 0, 1, 0], [0, 0, 1, 1]]))
        found = Surgeon(torch.full((2, 4), 5.0), hessian, 0.01, 5).prune(0.25)
        assert (found[:, 1] == 0).all() and (found[:, [0, 2, 3]] != 0).all()

    @pytest.mark.parametrize("per", ["linear", "role", "block"])
    def test_costs_decide(self, per: str) -> None:
        """Two blocks whose costs are made up: the second costs four times the first, c = s² and 4·s²."""
        seen: list[int] = []

        def made_up(tokens: int, weights: Any = None, inputs: Any = None) -> dict[Any, float]:
            costs = {}
            for index in range(2):
                hessian = Hessian.zeros(4)
                hessian.add(torch.eye(4))
                for key, replaced in weights(index, {"w.weight": torch.rand(4, 4) + 1}, {"o": hessian}):
                    share = float((replaced["w.weight"] == 0).float().mean())
                    assert share == pytest.approx(key[2], abs=1 / 32)
                    costs[key] = (1, 4)[index] * key[2] ** 2
            seen.append(tokens)
            return costs

        survey = a_survey([torch.ones(4, 4), torch.ones(4, 4)])
        survey.costs = made_up
        Allocate(0.5, per=per, tokens=99).plan(survey, ("o",))  # type: ignore[arg-type]
        # 2·s₁ = 8·s₂ and s₁ + s₂ = 1
        assert survey.sparsity == pytest.approx({"0.w": 0.8, "1.w": 0.2}, abs=0.04)
        assert sum(survey.sparsity.values()) == pytest.approx(1.0, abs=1e-9)
        assert seen == [99]

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"sparsity": 0.5, "lowest": 0.6}, "lowest <= sparsity"),
            ({"sparsity": 0.97}, "<= highest"),
            ({"sparsity": 0.5, "bits": 1}, "bits of 2 to 8"),
            ({"sparsity": 0.5, "tokens": 1}, "tokens of 2"),
            ({"sparsity": 1.0}, "sparsity in"),
            ({"sparsity": 0.5, "damping": 0.0}, "positive damping"),
        ],
    )
    def test_impossible_settings(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=message):
            Allocate(**settings)

    @pytest.mark.parametrize("settings", [{"spread": 0.5}, {"multiple": 0.0}, {"sparsity": -0.1}])
    def test_impossible_settings_of_owl(self, settings: dict[str, Any]) -> None:
        with pytest.raises(UserError, match="expected"):
            OWL(**({"sparsity": 0.5} | settings))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    write_checkpoint(folder, dtype=torch.bfloat16, tie_word_embeddings=True)
    return folder


@pytest.mark.parametrize(
    "step",
    [{"owl": {"sparsity": 0.6}}, {"allocate": {"sparsity": 0.6, "tokens": 48}},
     {"allocate": {"sparsity": 0.6, "per": "role", "tokens": 48, "lowest": 0.3}}],
    ids=str,
)  # fmt: skip
class TestWholeRuns:
    def test_budget_and_artefact(self, step: dict[str, Any], model: Path, tmp_path: Path) -> None:
        report = run(model, tmp_path / "o", [step, SPARSE, {"gptq": {"bits": 4, "group_size": 16}}])
        counts = pruned(report)
        weights = sum(x["shape"][0] * x["shape"][1] for x in report["linears"])
        # Each linear rounds to a whole weight.
        assert abs(sum(counts.values()) - 0.6 * weights) <= len(counts) / 2
        assert len({x["sparsity"] for x in report["linears"]}) > 2
        assert len(report["notes"]) == 3 and all("sparsit" in note for note in report["notes"])
        config = json.loads((tmp_path / "o" / "config.json").read_text())["quantization_config"]
        for name, spec in QuantizationConfig.from_json(config).linears.items():
            # What is hardly sparse is stored dense.
            assert not spec.sparse or spec.nonzeros == spec.shape[0] * spec.shape[1] - counts[name]
        loaded = tulle.hf.load(tmp_path / "o", dtype=torch.float32)
        assert bool(loaded(prose()).logits.isfinite().all())

    def test_a_resumed_run_decides_the_same(
        self, step: dict[str, Any], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run(model, tmp_path / "whole", [step, SPARSE])
        block = Walker.block

        def stop(self: Walker, index: int, *arguments: Any) -> Any:
            if index == 2:
                raise KeyboardInterrupt
            return block(self, index, *arguments)

        monkeypatch.setattr(Walker, "block", stop)
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path / "o", [step, SPARSE])
        monkeypatch.undo()
        run(model, tmp_path / "o", [step, SPARSE], resume=True)
        for file in sorted((tmp_path / "whole").glob("*.safetensors")):
            assert file.read_bytes() == (tmp_path / "o" / file.name).read_bytes()


def test_bytes_count_what_linears_keep(model: Path, tmp_path: Path) -> None:
    """With mixed precision, as many packed bytes as the uniform sparsity gives."""
    keep = {"keep_sensitive": {"count": 4, "keep_bits": 8, "bits": 4, "input_bits": None}}
    after = [SPARSE, {"gptq": {"bits": 4}}]
    uniform = run(model, tmp_path / "u", [keep, *after])
    divided = {}
    for budget in ("zeros", "bytes"):
        step = {"allocate": {"sparsity": 0.6, "budget": budget, "bits": 4, "tokens": 48}}
        divided[budget] = run(model, tmp_path / budget, [keep, step, *after])
    bytes_of = {k: r["totals"]["linear_packed_bytes"] for k, r in ({"uniform": uniform} | divided).items()}
    assert abs(bytes_of["bytes"] - bytes_of["uniform"]) <= len(uniform["linears"])
    assert divided["zeros"]["totals"]["sparsity"] == pytest.approx(0.6, abs=1e-3)
    assert divided["bytes"]["totals"]["sparsity"] != pytest.approx(0.6, abs=1e-3)


class Passes:
    """Counts tokens that go through a block, a way back counting twice."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.tokens = 0
        steps, grad = DecoderBlock.steps, torch.autograd.grad

        def counted_steps(block: DecoderBlock, hidden: Tensor, *more: Any) -> Any:
            self.tokens += hidden.shape[0] * hidden.shape[1]
            return steps(block, hidden, *more)

        def counted_grad(out: Any, *more: Any) -> Any:
            if isinstance(out, list):  # of a block, not of the labels
                self.tokens += 2 * out[0].shape[0] * out[0].shape[1]
            return grad(out, *more)

        monkeypatch.setattr(DecoderBlock, "steps", counted_steps)
        monkeypatch.setattr(torch.autograd, "grad", counted_grad)


SURVEYS: dict[str, list[dict[str, Any]]] = {
    "allocate": [{"allocate": {"sparsity": 0.6}}, SPARSE],
    "allocate per block": [{"allocate": {"sparsity": 0.6, "per": "block"}}, SPARSE],
    "owl": [{"owl": {"sparsity": 0.6}}, SPARSE],
    "keep_sensitive, allocate": [
        {"keep_sensitive": {"count": 4, "bits": 4}},
        {"allocate": {"sparsity": 0.6, "budget": "bytes", "bits": 4}},
        SPARSE,
        {"gptq": {"bits": 4}},
    ],
    "activation_budget": [{"activation_budget": {"share": 0.4}}, {"teal": {"share": 0.4}}],
    "larosa, activation_budget": [{"larosa": {}}, {"activation_budget": {"share": 0.4}}, {"teal": {"kind": "top_k"}}],
}


@pytest.mark.parametrize("steps", SURVEYS.values(), ids=list(SURVEYS))
def test_a_survey_is_a_fixed_number_of_passes(
    steps: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most eight forward passes' worth over the calibration tokens, for two layers and for six."""
    worth = {}
    for layers in (2, 6):
        write_checkpoint(tmp_path / f"{layers}", num_hidden_layers=layers)
        survey, found = _survey(tmp_path / f"{layers}", steps, monkeypatch)
        assert survey.sparsity or survey.input_sparsity
        worth[layers] = found.tokens / (layers * CALIBRATION.numel())
    assert 0 < worth[2] == worth[6] <= 8


def test_a_killed_survey_goes_on_and_a_finished_one_is_not_repeated(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in front of the second block from the end: two of three are left, and no forward pass."""
    run(model, tmp_path / "whole", SURVEYS["allocate"])

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "sensitivity 2/3":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "o", SURVEYS["allocate"], progress=stop)
    said: list[str] = []
    run(model, tmp_path / "o", SURVEYS["allocate"], resume=True, progress=lambda stage, *_: said.append(stage))
    assert [s for s in said if s.startswith(("survey", "sensitivity"))] == ["sensitivity 2/3", "sensitivity 3/3"]
    for file in sorted((tmp_path / "whole").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "o" / file.name).read_bytes()


CALIBRATION = torch.randint(0, 128, (3, 16, 48), generator=torch.Generator().manual_seed(0))


def _survey(folder: Path, steps: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> tuple[Survey, Passes]:
    recipe = parse_recipe({"name": "test", "steps": steps})
    batches = [Batch(t, torch.ones_like(t, dtype=torch.bool)) for t in CALIBRATION]
    passes = Passes(monkeypatch)
    found = take_survey(DenseModel.open(folder), recipe, batches)
    monkeypatch.undo()
    return found, passes

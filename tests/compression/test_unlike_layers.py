"""Steps on the whole model where its layers differ in linears and widths, or lack some."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import PROSE, write_checkpoint
from family_folders import write_family
from tulle.compression.job import compress
from tulle.compression.recipe import read_recipe
from tulle.compression.survey import take_survey
from tulle.errors import UserError
from tulle.methods.contract import Survey
from tulle.models.batches import batched
from tulle.models.rewrite import DenseModel
from tulle.text.reading import Text

pytestmark = pytest.mark.usefixtures("no_pages")

EVERYWHERE = ["qkv", "o", "gate_up", "down", "embedding", "head"]


MODELS = {
    "delta nets": ("qwen3_5_text", 2, {}),
    "lone parts": ("nemotron_h", 0, {"hybrid_override_pattern": "MM*-"}),
}


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS.keys())
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gated delta nets and attention; and Mamba-2, attention and feed-forwards, each a layer of its own."""
    family, seed, changes = request.param
    folder = write_family(tmp_path_factory.mktemp("hybrid") / "model", family, seed, **changes)
    layers = DenseModel.open(folder).description.layers
    assert len({tuple(group.role for group in layer.groups) + layer.groups[0].names for layer in layers}) > 1
    return folder


def survey_of(folder: Path, *steps: dict[str, Any]) -> Survey:
    sequences = list(torch.tensor(list(PROSE.encode()[:320])).reshape(8, 40))
    return take_survey(DenseModel.open(folder), read_recipe({"steps": list(steps)}), batched(sequences))


def sizes_of(folder: Path) -> dict[str, int]:
    """Weights of every linear by full name."""
    layers = DenseModel.open(folder).description.layers
    return {layer.prefix + x.name: x.shape[0] * x.shape[1] for layer in layers for x in layer.linears()}


def mean(shares: dict[str, float], sizes: dict[str, int]) -> float:
    return sum(sizes[name] * share for name, share in shares.items()) / sum(sizes[name] for name in shares)


@pytest.mark.parametrize(
    "step",
    [{"owl": {"sparsity": 0.6}}]
    + [{"allocate": {"sparsity": 0.6, "tokens": 160, "steps": 2, "per": per}} for per in ("linear", "role", "block")],
    ids=str,
)
def test_sparsities_keep_their_mean(model: Path, step: dict[str, Any]) -> None:
    """Over all linears by their own sizes, and every one has its own."""
    survey, sizes = survey_of(model, step, {"wanda": {"sparsity": 0.6}}), sizes_of(model)
    assert survey.sparsity.keys() == sizes.keys()
    assert mean(survey.sparsity, sizes) == pytest.approx(0.6, abs=1e-9)
    assert len(set(survey.sparsity.values())) > 1


@pytest.mark.parametrize("per", ["role", "block"])
def test_shares_of_inputs_keep_their_mean(model: Path, per: str) -> None:
    step = {"activation_budget": {"share": 0.4, "tokens": 160, "per": per}}
    survey, sizes = survey_of(model, step, {"teal": {"share": 0.4}}), sizes_of(model)
    assert survey.input_sparsity.keys() == sizes.keys()
    assert mean(survey.input_sparsity, sizes) == pytest.approx(0.4, abs=1e-9)
    for index, groups in enumerate(survey.groups):
        shares = [{survey.input_sparsity[survey.prefix(index) + name] for name in g.names} for g in groups.values()]
        assert all(len(own) == 1 for own in shares)
        assert len(set.union(*shares)) == 1 if per == "block" else len(set.union(*shares)) > 1


def test_bits_by_cost(model: Path, tmp_path: Path) -> None:
    """Within the budget; what is noted is what the blocks that have a linear got; the file has those grids."""
    steps = [
        {"allocate_bits": {"bits": 6.5, "tokens": 160, "group_sizes": ["auto-32"], "targets": EVERYWHERE}},
        {"gptq": {"targets": EVERYWHERE}},
    ]
    text = Text((PROSE,), False, ("prose",))
    report = compress(
        model, {"steps": steps, "calibration": {"samples": 4, "length": 40}}, tmp_path / "out", calibration=text
    )
    every = [*report["linears"], *report["tables"]]
    weights = sum(x["shape"][0] * x["shape"][1] for x in every)
    assert 8 * sum(x["packed_bytes"] for x in every) / weights <= 6.5
    bits = {x["name"]: x["bits"] for x in report["linears"]}
    assert bits.keys() == sizes_of(model).keys() and len(set(bits.values())) > 1
    layers = DenseModel.open(model).description.layers
    notes = dict(note.split(": ", 1) for note in report["notes"] if ", block" in note)
    for name in {linear.name for layer in layers for linear in layer.linears()}:
        own = [layer for layer in layers if name in [linear.name for linear in layer.linears()]]
        where = f"blocks {', '.join(str(layer.index) for layer in own)}" if len(own) < len(layers) else "block by block"
        grids = notes[f"{name}, {where}"].split(", ")
        assert [int(grid.partition("/")[0]) for grid in grids] == [bits[layer.prefix + name] for layer in own]


def test_sensitive_linears_and_their_siblings(model: Path) -> None:
    survey = survey_of(model, {"keep_sensitive": {"count": 100}}, {"round_to_nearest": {"bits": 8}})
    assert survey.kept.keys() == survey.kept_inputs.keys() == sizes_of(model).keys()
    assert any("in_proj" in note and "keep" in note for note in survey.notes)


@pytest.mark.parametrize(
    "step", [{"spinquant": {"steps": 4}}, {"permute_channels": {}}, {"larosa": {"heads": False}}], ids=str
)
@torch.no_grad()
def test_bases_of_the_stream_leave_the_function(model: Path, step: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    import tulle

    text = Text((PROSE,), False, ("prose",))
    compress(model, {"steps": [step], "calibration": {"samples": 4, "length": 40}}, tmp_path / "out", calibration=text)
    tokens = torch.tensor(list(PROSE.encode()[:50]))[None]
    wanted = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(tokens).logits
    found = tulle.load(tmp_path / "out", dtype=torch.float32)(tokens).logits
    assert float((found - wanted).abs().max() / wanted.abs().max()) <= 2e-5


def test_values_behind_a_gate_are_refused(model: Path) -> None:
    with pytest.raises(UserError, match="values that reach o as they are"):
        survey_of(model, {"larosa": {}}, {"teal": {"share": 0.4}})


def test_like_layers_are_seen_as_ever(tmp_path: Path) -> None:
    """By hand from what the survey shows: OWL's rule over blocks of one shape."""
    from tulle.methods.prune.owl import outlier_share, owl

    write_checkpoint(tmp_path / "m", num_hidden_layers=2)
    survey = survey_of(tmp_path / "m", {"owl": {"sparsity": 0.6}}, {"wanda": {"sparsity": 0.6}})
    shares, names = [], {}
    for index in range(2):
        scores = []
        for role, group in survey.groups[index].items():
            assert survey.column_norm is not None
            norm = survey.column_norm(index, role)
            scores += [survey.block(index)[f"{name}.weight"].abs() * norm for name in group.names]
            names |= {survey.prefix(index) + name: index for name in group.names}
        shares.append(outlier_share(scores))
    found = owl(torch.tensor(shares), torch.tensor([1, 1]), 0.6)
    assert survey.sparsity == pytest.approx({name: float(found[index]) for name, index in names.items()})

"""Experts on their way through the walker: one in memory at a time, each with tokens enough, none with a say that the
router did not give it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from family_folders import write_family
from tulle.compression.job import compress
from tulle.errors import UserError
from tulle.models.checkpoint import Checkpoint
from tulle.models.decoder import DecoderBlock
from tulle.models.description import Layer
from tulle.text.reading import Text

pytestmark = pytest.mark.usefixtures("no_pages")

TEXT = Text(("The quick brown fox jumps over the lazy dog. " * 20,), False, ("prose",))
GPTQ = [{"gptq": {"bits": 4, "group_size": "auto-32"}}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shared expert beside the others, and a layer without any."""
    return write_family(tmp_path_factory.mktemp("experts") / "model", "qwen2_moe", 1)


def run(model: Path, output: Path, steps: list[dict[str, Any]], **calibration: Any) -> dict[str, Any]:
    recipe = {"calibration": {"samples": 3, "length": 24} | calibration, "steps": steps}
    return compress(model, recipe, output, calibration=TEXT)


def test_one_expert_is_in_memory_at_a_time(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: dict[DecoderBlock, set[int]] = {}
    hold, release, most = DecoderBlock.hold, DecoderBlock.release, []

    def count_hold(block: DecoderBlock, expert: int, tensors: Any) -> None:
        held.setdefault(block, set()).add(expert)
        most.append(max(map(len, held.values())))
        hold(block, expert, tensors)

    def count_release(block: DecoderBlock, expert: int) -> None:
        held[block].remove(expert)
        release(block, expert)
        assert not any(f".experts.{expert}." in name for name, _ in block.named_parameters())

    monkeypatch.setattr(DecoderBlock, "hold", count_hold)
    monkeypatch.setattr(DecoderBlock, "release", count_release)
    run(model, tmp_path / "out", GPTQ)
    assert set(most) == {1}
    assert not any(held.values())


def test_rare_experts_see_tokens_that_they_would_get_next(model: Path, tmp_path: Path) -> None:
    report = run(model, tmp_path / "out", GPTQ, expert_tokens=20)
    tokens, chosen = report["calibration"]["tokens"], Checkpoint.open(model).config["num_experts_per_tok"]
    for block in (block["experts"] for block in report["blocks"] if block["experts"]):
        assert sum(block["routed"]) == tokens * chosen
        for routed, added in zip(block["routed"], block["added"], strict=True):
            assert added == max(0, 20 - routed)
    assert any(block["experts"] for block in report["blocks"])


def test_shown_tokens_change_no_sum(model: Path, tmp_path: Path) -> None:
    """Whatever experts are shown besides, an unchanged model stays what it is."""
    fold = [{"smoothquant": {"targets": ["qkv"]}}]
    for least in (1, 1000):
        report = run(model, tmp_path / str(least), fold, expert_tokens=least)
        assert all(block["output_error"] < 1e-10 for block in report["blocks"])
        assert all(linear["output_error"] < 1e-10 for linear in report["linears"])


def test_every_tensor_of_an_expert_is_written(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "out", [{"gptq": {"bits": 4, "targets": ["down"]}}])
    dense, packed = Checkpoint.open(model), Checkpoint.open(tmp_path / "out")
    down = {name for name in dense.names() if name.endswith("down_proj.weight")}
    assert set(packed.packed.linears) == {name.removesuffix(".weight") for name in down}
    for name in set(dense.names()) - down:
        assert torch.equal(packed.read(name), dense.read(name)), name


DIVIDED: dict[str, list[dict[str, Any]]] = {
    "allocate_bits": [{"allocate_bits": {"bits": 7.0, "group_sizes": ["auto-32"], "tokens": 48}}, {"gptq": {}}],
    "allocate": [{"allocate": {"sparsity": 0.5, "tokens": 48}}, {"sparsegpt": {"sparsity": 0.5}}],
    "owl": [{"owl": {"sparsity": 0.5}}, {"wanda": {"sparsity": 0.5}}],
    "activation_budget": [
        {"activation_budget": {"share": 0.4, "tokens": 48}}, {"teal": {"kind": "top_k", "share": 0.4}},
    ],
    "permute_channels": [{"permute_channels": {}}, {"wanda": {"pattern": "2:4"}}],
    "larosa": [{"larosa": {}}, {"teal": {"kind": "top_k", "share": 0.4}}],
    "keep_sensitive": [{"keep_sensitive": {"count": 3}}, {"activations": {}}, {"round_to_nearest": {"bits": 8}}],
}  # fmt: skip


@pytest.mark.parametrize("name", DIVIDED)
def test_steps_on_the_whole_model_take_experts(
    model: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One in memory at a time; what is decided for one projection of a block's experts is decided for all."""
    read, held = Checkpoint.read_layer, []

    def count(checkpoint: Checkpoint, layer: Layer, names: Iterable[str] | None = None) -> Any:
        own = list(layer.tensors() if names is None else names)
        held.append(len({n.split(".experts.")[1].split(".")[0] for n in own if ".experts." in n}))
        return read(checkpoint, layer, own)

    monkeypatch.setattr(Checkpoint, "read_layer", count)
    report = run(model, tmp_path / "out", DIVIDED[name])
    assert max(held) == 1
    assert report["reload"]["difference"] <= report["reload"]["allowed"]
    found: dict[str, set[Any]] = {}
    for linear in report["linears"]:
        prefix, experts, rest = linear["name"].partition(".experts.")
        unit = f"{prefix} {rest.partition('.')[2]}" if experts else linear["name"]
        chosen = {
            "allocate_bits": lambda x: x["bits"], "activation_budget": lambda x: x["input_sparsity"]["keep"],
            "allocate": lambda x: round(x["sparsity"], 1), "owl": lambda x: round(x["sparsity"], 1),
        }.get(name)  # fmt: skip
        if chosen is not None:
            found.setdefault(unit, set()).add(chosen(linear))
    assert all(len(values) == 1 for values in found.values())
    if name in ("allocate", "owl"):
        pruned = sum(x["sparsity"] * x["shape"][0] * x["shape"][1] for x in report["linears"])
        assert pruned / sum(x["shape"][0] * x["shape"][1] for x in report["linears"]) == pytest.approx(0.5, abs=0.01)
        assert len({round(x["sparsity"], 2) for x in report["linears"]}) > 1
    if name == "allocate_bits":
        assert len({x["bits"] for x in report["linears"]}) > 1


def test_what_needs_all_experts_at_once_is_refused_with_its_reason(model: Path, tmp_path: Path) -> None:
    for steps, name, reason in (
        ([*GPTQ, {"reconstruct": {}}], "reconstruct", "trains all linears of a feed-forward together"),
        ([{"spinquant": {}}, *GPTQ], "spinquant", "would read all experts of a block"),
        (
            [{"learned_clipping": {}}, {"gptq": {"bits": 4, "symmetric": False}}],
            "learned_clipping",
            "learns through whole blocks",
        ),
    ):
        with pytest.raises(UserError, match=f"one expert at a time, found {name} for qwen2_moe, which {reason}"):
            run(model, tmp_path / "out", steps)
    assert not (tmp_path / "out").exists()

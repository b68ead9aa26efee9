"""What controllers choose: the numbers, the page, the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import VOCABULARY, write_prose, write_tokenizer
from tulle.cli import main
from tulle.errors import UserError
from tulle.inspect.controllers import architecture, inspect_controllers, layer_statistics
from tulle.models.scaling_transformer import ScalingTransformerConfig, ScalingTransformerForCausalLM
from tulle.models.scaling_transformer.choices import Choices
from tulle.report.controller import controllers_page


def config(**settings: Any) -> ScalingTransformerConfig:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sparse = {"ff_block": 8, "ff_lowrank": 3, "qkv_modules": 4, "initializer_range": 1.0}
    return ScalingTransformerConfig(**({"vocab_size": 64, "max_position_embeddings": 32} | sizes | sparse | settings))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer, and a text."""
    work = tmp_path_factory.mktemp("controllers")
    write_tokenizer(work / "model")
    torch.manual_seed(0)
    ScalingTransformerForCausalLM(config(vocab_size=VOCABULARY)).save_pretrained(work / "model")
    write_prose(work / "text.txt", 2000)
    return work


def choices(sequence: list[list[int]], block: int) -> Choices:
    found = Choices(len(sequence[0]), block)
    found.add(100.0 * torch.nn.functional.one_hot(torch.tensor([sequence]), block))
    return found


def test_statistics_of_a_block_that_never_changes_and_of_one_that_goes_round() -> None:
    """Eight tokens, two blocks of four: the first always takes unit 2, the second each unit in turn."""
    found = layer_statistics(choices([[2, t % 4] for t in range(8)], 4))
    assert found["counts"] == [[0, 0, 8, 0], [2, 2, 2, 2]]
    assert (found["units"], found["dead"]) == (8, 3)
    assert found["effective_units"] == pytest.approx((1 + 4) / 2)
    assert found["largest_share"] == pytest.approx((1 + 0.25) / 2)
    assert found["changed"] == pytest.approx(0.5)
    assert found["chance_changed"] == pytest.approx((0 + 0.75) / 2)
    assert found["certainty"] == pytest.approx(1)


def test_load_variation_of_choices_at_random_is_what_is_said_of_chance() -> None:
    """64 blocks of 8 and 400 tokens: 512 counts; the estimate of a standard deviation is good to 1/√(2·512) = 3 %."""
    generator = torch.Generator().manual_seed(0)
    found = layer_statistics(choices(torch.randint(0, 8, (400, 64), generator=generator).tolist(), 8))
    assert found["variation"] == pytest.approx(found["chance_variation"], rel=0.12)
    assert found["changed"] == pytest.approx(7 / 8, rel=0.01)
    assert found["changed"] == pytest.approx(found["chance_changed"], rel=0.01)


def test_weights_read_are_counted() -> None:
    """d 16, d_ff 32, N 8, rank 3: 2·16·32 of the layer or a eighth of it, and 3·(16 + 32) + 32 of the controller."""
    found = architecture(config())
    assert found["feed_forward_weights"] == 1024 + 176 and found["feed_forward_weights_read"] == 128 + 176


def test_numbers_of_a_model_on_a_text(folder: Path) -> None:
    found = inspect_controllers(folder / "model", str(folder / "text.txt"), samples=3, length=20)
    assert found["tokens"] == 60 and len(found["layers"]) == 2
    for layer in found["layers"]:
        assert [sum(block) for block in layer["counts"]] == [60] * 4
        assert len(layer["shown"]) == len(found["text"]) == 20
    again = inspect_controllers(folder / "model", str(folder / "text.txt"), samples=3, length=20)
    assert again == found


def test_a_dense_feed_forward_chooses_nothing(folder: Path, tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "dense")
    ScalingTransformerForCausalLM(config(vocab_size=VOCABULARY, ff_block=None)).save_pretrained(tmp_path / "dense")
    with pytest.raises(UserError, match="sparse feed-forward, found ff_block null"):
        inspect_controllers(tmp_path / "dense", str(folder / "text.txt"), samples=1, length=8)


def test_the_page_shows_every_layer_and_needs_no_other_file(folder: Path) -> None:
    found = inspect_controllers(folder / "model", str(folder / "text.txt"), samples=2, length=16)
    found["text"][0] = "$x_1$ <b>"  # neither formula nor markup
    page = controllers_page(found)
    for heading in ("Layers", "Load", "Change from token to token", "Usage of every unit", "Choices along a text"):
        assert f"<h2>{heading}</h2>" in page
    assert page.count(">Layer 0<") == page.count(">Layer 1<") == 2
    assert "$x_1$·&lt;b&gt;" in page and "<b>" not in page
    assert "http-equiv" not in page and 'src="http' not in page


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    arguments = ["inspect", "model", "--text", "text.txt", "--samples", "2", "--length", "16"]
    assert main.run([*arguments, "-o", "page.html", "--json", "found.json"]) == 0
    out = capsys.readouterr().out
    assert "one unit in 8, controller of rank 3, sparse QKV (S 4)" in out and "dead" in out
    assert json.loads((folder / "found.json").read_text())["tokens"] == 32
    assert "Usage of every unit" in (folder / "page.html").read_text()
    assert main.run(["inspect", "model", "--activations"]) == 2

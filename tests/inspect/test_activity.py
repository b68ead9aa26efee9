"""What tokens read, counted naively token by token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tulle.hf
from checkpoints import PROSE, write_checkpoint
from tulle.compression.job import compress
from tulle.inspect.activity import Counter, columns_of, measure_activity
from tulle.report.activity import activity_charts
from tulle.text.reading import Text

TEXT = Text((PROSE,), False, ("prose",))


def test_by_hand() -> None:
    weight = torch.tensor([[1.0, 0.0, 2.0], [3.0, 4.0, 0.0]])
    counter = Counter(columns_of([weight, weight[:1]]))
    assert counter.columns.tolist() == [3, 1, 2]
    x = torch.tensor([[[1.0, 0, 2], [0, 5, 6], [9, 9, 9]], [[0, 0, 1], [7, 7, 7], [7, 7, 7]]])
    counter.see(x, torch.tensor([[True, True, False], [True, False, False]]))
    found = counter.result()
    # Active channels {0, 2}, {1, 2} and {2} of three tokens; one pair, which shares one of two.
    assert found["weights"] == 6 and found["active"] == pytest.approx((5 + 3 + 2) / 3)
    assert found["sparsity"] == pytest.approx(1 - 5 / 9)
    assert found["overlap"] == 0.5
    assert found["chance"] == pytest.approx((1 / 9 + 1 / 9 + 1) / (5 / 3))


def test_independent_tokens_overlap_by_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    rates = torch.rand(400, generator=generator)
    x = (torch.rand(4, 500, 400, generator=generator) < rates).float()
    counter = Counter(torch.ones(400))
    counter.see(x, torch.ones(4, 500, dtype=torch.bool))
    found = counter.result()
    # 2000 tokens of some 200 active inputs: a standard error of about 0.001.
    assert found["overlap"] == pytest.approx(found["chance"], abs=5e-3)


@torch.no_grad()
def test_walker_and_loaded_model_count_the_same(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", num_hidden_layers=2, tie_word_embeddings=True)
    steps = [{"teal": {"share": 0.5, "kind": "top_k"}}, {"wanda": {"sparsity": 0.5}}]
    recipe = {"steps": steps, "calibration": {"samples": 6, "length": 40, "target": "layer"}}
    report = compress(tmp_path / "m", recipe, tmp_path / "out", calibration=TEXT)
    model = tulle.hf.load(tmp_path / "out", dtype=torch.float32)
    from transformers import AutoTokenizer

    from tulle.text.reading import sequences

    tokens = sequences(TEXT, AutoTokenizer.from_pretrained(tmp_path / "m"), 40, 6, 0)
    found = measure_activity(model, tokens)
    rows = [row | {"block": block["index"]} for block in report["blocks"] for row in block["activity"]]
    assert len(rows) == len(found["rows"]) == 8
    for mine, theirs in zip(rows, found["rows"], strict=True):
        assert mine.pop("role") == theirs.pop("role")
        assert mine == pytest.approx(theirs, rel=1e-3)
        assert mine["sparsity"] == pytest.approx(0.5)
    # Half of the weights are stored, and a token reads about half of those.
    stored = sum(p["shape"][0] * p["shape"][1] for p in report["linears"]) // 2
    assert found["total"]["weights"] == pytest.approx(stored, rel=0.01)
    assert found["total"]["sparsity"] == pytest.approx(0.5, abs=0.1)
    table = 257 * 32
    assert found["parameters"] == found["total"]["weights"] + table
    assert found["active_parameters"] == pytest.approx(found["total"]["active"] + table + 32)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") >= 8 and "Overlap of neighbouring tokens" in page and "Read per token" in page


@torch.no_grad()
def test_zeros_of_a_relu(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "m", num_hidden_layers=1, hidden_act="relu2")
    ids = torch.tensor(list(PROSE.encode()[:60]))
    found = measure_activity(model, [ids])
    seen: list[torch.Tensor] = []
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    model(ids[None])
    by_role = {row["role"]: row for row in found["rows"]}
    assert (
        by_role["down"]["sparsity"] == pytest.approx(float((seen[0] == 0).float().mean()))
        and 0.3 < by_role["down"]["sparsity"] < 0.7
    )
    assert by_role["qkv"]["sparsity"] == 0 and by_role["qkv"]["overlap"] == 1
    weights, active = (sum(row[key] for row in found["rows"]) for key in ("weights", "active"))
    assert found["total"] == pytest.approx({"weights": weights, "active": active, "sparsity": 1 - active / weights})
    assert weights == sum(p.numel() for n, p in model.named_parameters() if "_proj" in n) > active > weights / 2


def test_no_cards_without_rows() -> None:
    assert activity_charts([], 10) == []

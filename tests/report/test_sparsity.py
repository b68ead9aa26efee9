"""Pictures of sparse models: there with the right figures, and only where there is something to show."""

from __future__ import annotations

import base64
import re
import zlib
from typing import Any

import pytest
import torch

from sample_report import sample_report, sparse_report
from tulle.core.mask_structure import mask_structure
from tulle.report import masks
from tulle.report.compression import compression_page
from tulle.report.sparsity import sparsity_charts

SPARSITY, KEPT, PERMUTED = (
    "Sparsity", "Where weights are kept", "Retained by the N:M mask, without and with channel permutation",
)  # fmt: skip


def charts(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {chart["heading"]: chart for chart in sparsity_charts(report)}


def titles(svg: str) -> list[str]:
    """What a browser shows under the pointer."""
    return re.findall(r"<title>([^<]*)</title>", svg)


def cells(html: str) -> list[list[str]]:
    return [re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in re.findall(r"<tr>.*?</tr>", html, re.S)]


def test_a_model_without_sparse_linears_has_no_such_pictures() -> None:
    dense = sample_report(sparse=False)
    assert sparsity_charts(dense) == []
    page = compression_page(dense)
    assert not any(f"<h2>{heading}</h2>" in page for heading in (SPARSITY, KEPT, PERMUTED))


def test_a_report_without_masks_and_permutations_shows_the_sparsities_alone() -> None:
    assert list(charts(sample_report())) == [SPARSITY]
    page = compression_page(sample_report())
    assert f"<h2>{SPARSITY}</h2>" in page and f"<h2>{KEPT}</h2>" not in page and f"<h2>{PERMUTED}</h2>" not in page
    assert "50 % in every pruned linear." in charts(sample_report())[SPARSITY]["note"]


def test_all_three_are_on_the_page() -> None:
    page = compression_page(sparse_report())
    assert all(f"<h2>{heading}</h2>" in page for heading in (SPARSITY, KEPT, PERMUTED))


def test_sparsities_by_role_and_block() -> None:
    report = sparse_report()
    for linear in report["linears"]:
        if linear["role"] != "o":
            linear["sparsity"] = 0.3 + 0.1 * linear["block"]
    report["linears"][0]["sparsity"] = 0.5  # q: half of the weights of q/k/v
    report["totals"]["sparsity"] = 0.375
    found = charts(report)[SPARSITY]
    shown = titles(found["svg"])
    assert "q/k/v, block 0: 40 % (q 50 %, k 30 %, v 30 %)" in shown
    assert "gate/up, block 1: 40 %" in shown and "down, block 2: 50 %" in shown
    assert len(shown) == 9
    assert "mean 37.5 %" in found["svg"]
    assert "Not pruned: o." in found["note"] and "30 % (model.layers.0." in found["note"]
    assert found["note"] in found["text"]


def test_a_role_that_a_block_lacks_leaves_a_gap() -> None:
    report = sparse_report()
    report["linears"] = [x for x in report["linears"] if (x["role"], x["block"]) != ("down", 1)]
    assert [t for t in titles(charts(report)[SPARSITY]["svg"]) if t.startswith("down")] == [
        "down, block 0: 50 %", "down, block 2: 50 %",
    ]  # fmt: skip


def test_masks_of_each_role_in_the_first_middle_and_last_block() -> None:
    report = sample_report(5)
    mask = mask_structure(torch.ones(8, 8, dtype=torch.bool).tril())
    for linear in report["linears"]:
        linear["mask"] = mask if linear["role"] in ("qkv", "down") and linear["block"] else None
    html = charts(report)[KEPT]["svg"]
    names = re.findall(r'<div class="label">([^<]*)</div>', html)
    assert names == ["q, block 1", "q, block 3", "q, block 4", "down, block 1", "down, block 3", "down, block 4"]
    report["linears"] = [x for x in report["linears"] if x["block"] < 2]
    assert "--columns: 1" in charts(report)[KEPT]["svg"]


def test_a_picture_says_what_it_shows() -> None:
    html = charts(sparse_report())[KEPT]["svg"]
    q = next(label for label in re.findall(r'aria-label="([^"]*)"', html) if label.startswith("q, block 0"))
    assert "single columns 0 % to" in q and "; 1 column empty." in q and "Of every 4 weights of a row:" in q
    down = next(label for label in re.findall(r'aria-label="([^"]*)"', html) if label.startswith("down, block 0"))
    assert "tiles keep 50 % to 50 %, single rows 50 % to 50 %, single columns 0 % to 100 %" in down
    assert down.endswith("100 % keep 2.")
    assert "256×768 · 50 % kept · 2:4 · 384 columns empty" in html
    assert "all rows and all tiles of 8 × 12 weights: 50 %" in html and "tiles of 8 × 4 weights" in html


def test_cells_have_the_ramps_steps() -> None:
    # Tiles of one row and four columns: 0, 100 and 50 %.
    mask = torch.tensor([[0] * 4 + [1] * 4 + [1, 1, 0, 0], [0] * 4 + [1] * 8], dtype=torch.bool)
    picture = masks.picture("x", mask_structure(mask), 0, 100)
    tiles = picture[picture.index("<g ") : picture.index("</g>")]
    assert re.findall(r'var\(--ramp-(\d)\)" d="([^"]*)"', tiles) == [
        ("0", "M0 0h1M0 1h1"), ("4", "M2 0h1"), ("7", "M1 0h1M1 1h2"),
    ]  # fmt: skip
    assert titles(picture)[:3] == ["33.3 % of the stripes keep 0", "0 % of the stripes keep 1",
                                   "16.7 % of the stripes keep 2"]  # fmt: skip


@pytest.mark.parametrize(
    ("percents", "expected"),
    [([50, 50], (40, 60)), ([0], (0, 20)), ([99, 100], (80, 100)), ([10, 90], (10, 90)), ([0, *[50] * 300], (40, 60))],
)
def test_the_ramp_spans_what_there_is_but_at_least_a_fifth(percents: list[int], expected: tuple[int, int]) -> None:
    tiles = [{"grid": [1, 1], "tiles": base64.b64encode(zlib.compress(bytes([x]))).decode()} for x in percents]
    assert masks.span(tiles) == expected


def test_only_masks_that_are_even_need_no_key() -> None:
    report = sparse_report()
    assert 'class="key"' in charts(report)[KEPT]["svg"]
    for linear in report["linears"]:
        if linear["role"] != "down":
            linear["mask"] = None
    found = charts(report)[KEPT]
    assert 'class="key"' not in found["svg"] and "shaded" not in found["note"]


def test_what_a_permutation_retained() -> None:
    found = charts(sparse_report())[PERMUTED]
    # Means over three blocks of two roles: (0.823 + 0.753) / 2, (0.861 + 0.8) / 2, (0.878 + 0.95) / 2.
    assert "78.8 % → 83 % on average. Ideal (91.4 %)" in found["note"]
    shown = titles(found["svg"])
    assert shown[1] == "block 1: 82.3 % without, 86.1 % with, 87.8 % ideal" and len(shown) == 6
    assert "down, mean over the blocks: 82.3 % without, 86.1 % with, 87.8 % ideal" in found["svg"]
    assert "order folded into up, gate" in found["svg"]
    rows = cells(found["below"])
    assert ["1", "down", "2:4", "up, gate", "82.3 %", "86.1 %", "87.8 %", "69.1 %", "0.41 s"] in rows
    assert ["2", "o", "2:4", "v_proj", "75.3 %", "80 %", "95 %", "23.9 %", "2.5 s"] in rows
    assert rows[-1] == ["0–2", "q/k/v", "2:4", "left alone: the residual stream keeps its order", *["–"] * 5]
    assert len(rows) == 1 + 6 + 1


def test_permutations_that_were_all_left_alone_are_a_table() -> None:
    report = sparse_report()
    for block in report["blocks"]:
        block["permutations"] = [x for x in block["permutations"] if not x["folded"] and block["index"] != 1]
    found = charts(report)["Channel permutation"]
    assert cells(found["svg"])[1][:2] == ["0, 2", "q/k/v"]
    assert "<svg" not in found["svg"]


def test_an_ideal_that_is_reached_already() -> None:
    report = sparse_report()
    for block in report["blocks"]:
        block["permutations"] = [block["permutations"][0] | {"kept_before": 0.9, "kept_after": 0.9, "ideal": 0.9}]
    assert cells(charts(report)[PERMUTED]["below"])[1][7] == "–"


def test_reasons_are_escaped() -> None:
    report = sparse_report()
    report["blocks"][0]["permutations"][2]["reason"] = "<b>"
    report["blocks"][0]["permutations"][0]["folded"] = "<i>"
    page = compression_page(report)
    assert "<b>" not in page and "<i>" not in page and "&lt;b&gt;" in page

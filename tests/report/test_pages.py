"""Pages: self-contained, complete, the same each time."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from html_page import Page
from sample_report import sample_report, sparse_report
from tulle.report.compression import compression_page, notes, write_report
from tulle.report.demo import demo_page
from tulle.report.inspection import inspection_page
from tulle.report.laws import laws_page, loss_range


def demo_result() -> dict:
    row = {
        "description": "what it does",
        "perplexity": 9.5,
        "tokens": 1000,
        "scored_bytes": 3000,
        "sample": "    return <lines>",
    }
    sizes = {"dense": (11.5, "dense"), "sparse": (7.0, "sparse"), "w4": (4.6, "low-bit")}
    rows = [
        row | {"name": name, "kind": kind, "bytes": mb * 1e6, "linear_bytes": mb * 5e5, "weight_bytes": mb * 1e6,
               "bits_per_weight": mb, "layout": "sparse", "sparsity": 0.5 * (kind == "sparse"),
               "bits_per_byte": 1.5 - mb / 50, "decode_tokens_per_s": 11500 / mb, "speedup": 11.5 / mb,
               "compress_seconds": None if name == "dense" else 12.0}
        for name, (mb, kind) in sizes.items()
    ]  # fmt: skip
    architecture = {
        "type": "llama", "blocks": 6, "hidden": 256, "intermediate": 768, "heads": 4, "kv_heads": 2, "head_dim": 64,
        "vocabulary": 4096, "tied": True,
    }  # fmt: skip
    speed = {"threads": 2, "prompt": 64, "tokens": 32, "rounds": 15, "spread": 0.03, "disturbed": False}
    report = sample_report()
    machine = report["machine"] | {"cache_bytes": 32 << 20}
    found = {"rows": rows, "architecture": architecture, "protocol": "p", "prompt": "def f():", "seconds": 100.0}
    return found | {"speed": speed, "calibration": report["calibration"], "machine": machine}


def inspection_result() -> dict:
    linears = [
        x | {"bytes": x["packed_bytes"], "std": 0.1, "absmax": 1.0, "kurtosis": 3.1, "outlier_ratio": 1.0 + number,
             "outlier_channels": 0, "rounding_error": 0.01}
        for number, x in enumerate(sample_report()["linears"])
    ]  # fmt: skip
    return {
        "model": "a-model",
        "architecture": demo_result()["architecture"] | {"blocks": 2},
        "linears": linears,
        "others": [{"name": "model.norm.weight", "shape": [256], "dtype": "bfloat16", "bytes": 512}],
        "totals": {"bytes": 9e6, "linear_bytes": 8e6, "linear_weights": 100, "bits_per_weight": 3.0, "sparsity": 0.5},
        "extreme": {"name": "x", "outlier_ratio": 4.0, "channel_absmax": [0.1, 0.2, 0.9]},
    }


def activations_result() -> dict:
    """With outliers of both kinds and a token that is markup."""
    inputs = [
        {"block": block, "role": role, "readers": [f"model.layers.{block}.x.{role}_proj"], "channels": 4,
         "absmax": 9.0, "median": 0.1, "channel_ratio": 9.0, "normal_ratio": 3.0, "massive_ratio": 4.0,
         "rounding_error": 0.02, "normal": [], "massive_values": 0, "massive_tokens": 0, "massive_channels": 0,
         "massive": []}
        for block in range(2) for role in ("qkv", "o", "gate_up", "down")
    ]  # fmt: skip
    inputs[0]["normal"] = [{"channel": 77, "absmax": 9.0, "median": 3.0, "ratio": 30.0}]
    value = {"token": 1, "channel": 42, "value": -9.0, "ratio": 900.0, "sequence": 3, "position": 5, "id": 7}
    inputs[7] |= {"massive": [value | {"text": "<b>"}], "massive_values": 2, "massive_tokens": 2}
    inputs[7] |= {"massive_channels": 1, "massive_ratio": 900.0}
    stage = {"picture": [[0.0, 1.0], [2.0, 9.0]], "peak": 9.0, "rounding_error": 0.02, "output_error": 0.3}
    landscapes = [
        {"kinds": kinds, "block": 1, "role": role, "readers": [], "channel_absmax": [1.0, 9.0],
         "channel_median": [0.5, 0.6], "stages": [stage | {"name": f"stage {i}"} for i in range(4)]}
        for role, kinds in (("qkv", ["normal"]), ("down", ["normal", "massive"]), ("o", []))
    ]  # fmt: skip
    linears = [
        {"name": x["name"], "role": x["role"], "block": x["block"], "output_error": 0.01 * (i + 1),
         "loss_rise": 0.001 * (i - 2), "kl": 0.002 * i}
        for i, x in enumerate(sample_report()["linears"])
    ]  # fmt: skip
    sensitivity = {"loss": 2.5, "tokens": 99, "linears": linears, "spearman": 0.87, "spearman_loss": 0.66}
    return inspection_result() | {
        "activations": {"tokens": 99, "inputs": inputs, "landscapes": landscapes},
        "sensitivity": [sensitivity | {"bits": bits} for bits in (4, 8)],
    }


PAGES = {
    "compression": lambda: compression_page(sample_report()),
    "sparse": lambda: compression_page(sparse_report()),
    "demo": lambda: demo_page(demo_result()),
    "inspection": lambda: inspection_page(inspection_result()),
    "activations": lambda: inspection_page(activations_result()),
}


@cache
def page_of(kind: str) -> str:
    return PAGES[kind]()


@pytest.mark.parametrize("kind", PAGES)
def test_a_page_loads_nothing(kind: str) -> None:
    html = page_of(kind)
    page = Page(html)
    own = [target for target in page.loaded if not target.startswith(("#", "data:"))]
    # The demo's rows link to the reports beside it; a link loads nothing until it is followed.
    assert own == (["sparse/report.html", "w4/report.html"] if kind == "demo" else [])
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not re.search(r"@import|url\((?!#)", html)
    assert "svg" in page.tags


@pytest.mark.parametrize("kind", PAGES)
def test_pictures_have_the_pages_colours(kind: str) -> None:
    html = page_of(kind)
    assert not re.search(r"#0[12345]01\d\d", html)  # no placeholder is left
    used = set(re.findall(r"var\((--[a-z0-9-]+)\)", html))
    defined = set(re.findall(r"(--[a-z0-9-]+):", html))
    assert used <= defined


@pytest.mark.parametrize("kind", PAGES)
def test_the_same_input_gives_the_same_page(kind: str) -> None:
    assert page_of(kind) == PAGES[kind]()


def test_the_report_says_what_happened() -> None:
    text = Page(page_of("compression")).text
    for part in (
        "owner/a-model → sparse50-w4", "Half of the weights", "50 %", "18.31 → 19.20", "0.950 → 0.965", "1 min 23 s",
        "812 MB", "wiki.txt", "cut at 512 tokens", "sparsegpt", "sparsity: 0.5", "A CPU",
        "damping raised from 0.01 to 0.1", "model.layers.1.mlp.down_proj", "W4 g128 asym",
    ):  # fmt: skip
        assert part in text, part


def test_outliers_and_sensitivity_are_shown() -> None:
    html = page_of("activations")
    page = Page(html)
    for part in (
        "Normal outliers: input of q/k/v, block 1", "Normal and massive outliers: input of down, block 1",
        "No outliers: the most uneven input of o, block 1", "77 (×30.0)", "'<b>' at 3:5", "900", "stage 3",
        "max |x| 9.00 · A4 2 % · W4A4 30 %", "The most sensitive linears, W8A8", "Spearman correlation 0.87",
        "model.layers.1.mlp.down_proj", "+11.00",
    ):  # fmt: skip
        assert part in page.text, part
    assert "b" not in page.tags
    assert html.count("data:image/png;base64") == 12  # a surface per stage
    nothing = activations_result()
    for x in nothing["activations"]["inputs"]:
        x |= {"normal": [], "massive": [], "massive_values": 0}
    assert "None." in Page(inspection_page(nothing)).text


def test_without_evaluation_and_sparsity_there_are_no_such_parts() -> None:
    text = Page(compression_page(sample_report(sparse=False, evaluated=False))).text
    assert "Perplexity" not in text
    assert "Share of weights that are exactly zero" not in text


def test_many_blocks() -> None:
    text = Page(compression_page(sample_report(40))).text
    assert "model.layers.39.mlp.down_proj" in text
    assert "3.00 everywhere" in text  # too many cells to write into each


def test_a_lossless_linear_does_not_break_the_log_scale() -> None:
    report = sample_report(1)
    for linear in report["linears"]:
        linear["output_error"] = 0.0
    report["blocks"][0]["output_error"] = 0.0
    assert "Output error" in Page(compression_page(report)).text


def test_text_is_escaped() -> None:
    report = sample_report()
    report["model"] = "<b>bold</b> & sons"
    page = Page(compression_page(report))
    assert "b" not in page.tags
    assert "<b>bold</b> & sons" in page.text


def test_equal_notes_are_listed_once() -> None:
    (line,) = notes(sample_report(6))
    assert line.startswith("model.layers.0.self_attn.q_proj, ")
    assert line.endswith("and 2 more: damping raised from 0.01 to 0.1")


def test_a_page_is_written_whole(tmp_path: Path) -> None:
    write_report(sample_report(1), tmp_path / "report.html")
    assert [f.name for f in tmp_path.iterdir()] == ["report.html"]
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.title == "owner/a-model → sparse50-w4"
    (linears,) = page.tables
    assert [row[0] for row in linears[1:]] == [x["name"] for x in sample_report(1)["linears"]]


def test_a_page_that_was_cut_off_is_noticed() -> None:
    """What the tests of pages rest on."""
    html = page_of("demo")
    for end in ("</html>", "</main>", "</table>", "</svg>"):
        with pytest.raises(AssertionError):
            Page(html[: html.index(end)])


def test_the_demo_shows_size_quality_and_speed_of_every_model() -> None:
    page = Page(page_of("demo"))
    assert page.title == "Sparse and low-bit: the bundled model by shipped recipes"
    # The picture of speed stands first, then the table, then one more picture.
    assert page.headings[1:4] == ["Quality against speed", "Results", "Quality against size"]
    assert page.tags.count("svg") == 2 and page.tags.index("svg") < page.tags.index("table")
    (table,) = page.tables
    assert table == [
        ["recipe", "size", "smaller", "bits/weight", "sparsity", "bits/byte", "perplexity", "tokens/s", "× dense",
         "time"],
        ["densewhat it does", "11.5 MB", "1.00×", "11.50", "0 %", "1.2700", "9.500", "1,000", "1.00×", "–"],
        ["sparsewhat it does", "7.00 MB", "1.64×", "7.00", "50 %", "1.3600", "9.500", "1,643", "1.64×", "12.0 s"],
        ["w4what it does", "4.60 MB", "2.50×", "4.60", "0 %", "1.4080", "9.500", "2,500", "2.50×", "12.0 s"],
    ]  # fmt: skip
    for name in ("dense", "sparse", "w4"):
        # A label in each of the two pictures, the table, the samples; the legend has the kinds.
        assert len(re.findall(rf">{name}<", page_of("demo"))) >= 4
    for part in (
        "Fastest2.50×w4, +0.1380 bits per byte", "32 tokens decoded after a prompt of 64", "medians of 15 rounds",
        "w4: 4.60 MB, 1.4080 bits per byte, 2,500 tokens/s", "cache holds 32 MiB: every model here runs from the cache",
    ):  # fmt: skip
        assert part in page.text, part
    assert "something else was running" not in page.text


def test_the_demo_says_what_its_speeds_are_worth() -> None:
    found = demo_result()
    found["speed"] |= {"disturbed": True, "spread": 0.256}
    found["machine"]["cache_bytes"] = 8 << 20
    text = Page(demo_page(found)).text
    assert "Speeds varied by 26 % between rounds: something else was running." in text
    assert "reads 11.5 MB, which may be more than this processor's cache holds." in text
    found["machine"]["cache_bytes"] = None
    assert "which may be more than this processor's cache holds." in Page(demo_page(found)).text
    assert "Densified" not in text
    for row in found["rows"]:
        row["layout"] = "dense"
    assert "to be faster here: sparse. Their pruned weights" in Page(demo_page(found)).text  # the others are not pruned


def test_a_demo_of_models_alike_has_a_picture() -> None:
    """No span on either axis."""
    found = demo_result()
    for row in found["rows"]:
        row |= {"bits_per_byte": 1.2, "decode_tokens_per_s": 100.0, "bytes": 1e6, "speedup": 1.0}
    assert Page(demo_page(found)).tags.count("svg") == 2


def activity_rows(blocks: int = 2) -> list[dict]:
    return [
        {"block": block, "role": role, "weights": 1000, "active": 500.0 - 100 * block, "sparsity": 0.5 + 0.1 * block,
         "overlap": 0.7, "chance": 0.6}
        for block in range(blocks) for role in ("qkv", "o", "gate_up", "down")
    ]  # fmt: skip


def test_what_tokens_read_is_on_both_pages():
    report = sample_report()
    without = Page(compression_page(report))
    for block in report["blocks"]:
        block["activity"] = [row for row in activity_rows() if row["block"] == block["index"]]
    inspection = inspection_result() | {"activity": {"rows": activity_rows(), "tokens": 99}}
    for html in (compression_page(report), inspection_page(inspection)):
        page = Page(html)
        assert all(link.startswith("#") for link in page.loaded)
        for text in (
            "Activation sparsity",
            "Weights read per token",
            "Overlap of neighbouring tokens",
            "by chance 60 %",
        ):
            assert text in page.text
    assert Page(compression_page(report)).tags.count("svg") == without.tags.count("svg") + 3
    assert "Read per token" in compression_page(report) and "Read per token" not in without.text


def test_page_of_laws_is_whole():
    runs = [{"size": n, "sparsity": s, "loss": 3.0 + s} for n in (1e5, 1e6) for s in (0.0, 0.5)]
    law = {"E": 1.0, "B": 0.1, "C": 2.0, "alpha": 0.1, "beta": 0.05}
    one = {"law": law, "error": 1e-6, "runs": runs, "replicates": [law, law | {"beta": 0.06}]}
    one |= {"optimum_interval": [0.4, 0.5], "held_out": [runs[0] | {"predicted": 3.1, "interval": [3.0, 3.2]}]}
    page = Page(laws_page({"laws": {"": one, "<1.58-bit>": one | {"replicates": [], "held_out": []}}}))
    assert all(link.startswith("#") for link in page.loaded) and page.tags.count("svg") == 6
    assert "Loss against sparsity, <1.58-bit>" in page.text


def test_a_wild_replicate_does_not_stretch_the_picture():
    sparsities = np.array([0.0, 0.4, 0.8, 0.9])
    low, high = loss_range([np.array([4.0, 4.1, 4.4, 900.0]), np.array([4.2, 4.3, 4.5, 9.0])], sparsities, 0.8)
    assert (low, high) == pytest.approx((3.85, 4.65))

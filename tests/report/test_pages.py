"""Pages: self-contained, complete, the same each time."""

from __future__ import annotations

import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sample_report import sample_report
from tulle.report.compression import compression_page, notes, write_report
from tulle.report.demo import demo_page
from tulle.report.inspection import inspection_page

VOID = {"meta", "br", "link", "img", "input", "hr"}
LOADING = {"src", "srcset", "href", "xlink:href", "data", "poster", "action"}


class Page(HTMLParser):
    """Collects what a browser would load, the text, and whether tags nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in LOADING]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [value or "" for name, value in attrs if name in LOADING]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def demo_result() -> dict:
    row = {
        "description": "what it does",
        "perplexity": 9.5,
        "tokens": 1000,
        "scored_bytes": 3000,
        "sample": "    return <lines>",
    }
    sizes = {"dense": 11.5, "w4": 4.6, "sparse": 7.0}
    rows = [
        row | {"name": name, "bytes": mb * 1e6, "linear_bytes": mb * 5e5, "bits_per_weight": mb, "sparsity": 0.0,
               "bits_per_byte": 1.5 - mb / 50, "compress_seconds": None if name == "dense" else 12.0}
        for name, mb in sizes.items()
    ]  # fmt: skip
    architecture = {
        "type": "llama", "blocks": 6, "hidden": 256, "intermediate": 768, "heads": 4, "kv_heads": 2, "head_dim": 64,
        "vocabulary": 4096, "tied": True,
    }  # fmt: skip
    report = sample_report()
    return {"rows": rows, "architecture": architecture, "protocol": "p", "prompt": "def f():", "seconds": 100.0} | {
        key: report[key] for key in ("calibration", "machine")
    }


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


PAGES = {
    "compression": lambda: compression_page(sample_report()),
    "demo": lambda: demo_page(demo_result()),
    "inspection": lambda: inspection_page(inspection_result()),
}


@cache
def page_of(kind: str) -> str:
    return PAGES[kind]()


@pytest.mark.parametrize("kind", PAGES)
def test_a_page_loads_nothing(kind: str) -> None:
    html = page_of(kind)
    page = Page(html)
    own = [target for target in page.loaded if not target.startswith("#")]
    # The demo's rows link to the reports beside it; a link loads nothing until it is followed.
    assert own == (["w4/report.html", "sparse/report.html"] if kind == "demo" else [])
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not re.search(r"@import|url\((?!#)", html)
    assert "svg" in page.tags


@pytest.mark.parametrize("kind", PAGES)
def test_pictures_have_the_pages_colours(kind: str) -> None:
    html = page_of(kind)
    assert not re.search(r"#0[1234]01\d\d", html)  # no placeholder is left
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
    assert (tmp_path / "report.html").read_text(encoding="utf-8").rstrip().endswith("</html>")

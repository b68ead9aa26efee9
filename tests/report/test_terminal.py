"""Numbers as text, and tables."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.table import Table

from sample_report import sample_report
from tulle.report import units
from tulle.report.cells import scheme
from tulle.report.terminal import (
    activation_lines,
    compression_table,
    demo_table,
    sensitivity_table,
    task_table,
    text_table,
)


def printed(table: Table) -> str:
    console = Console(file=io.StringIO(), width=140)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("count", "text"),
    [(999, "999 B"), (1000, "1.00 kB"), (1_234_567, "1.23 MB"), (123_456_789, "123 MB"), (2.2e9, "2.20 GB")],
)
def test_size(count: float, text: str) -> None:
    assert units.size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0123, "0.012 s"), (3.14, "3.1 s"), (42.4, "42.4 s"), (75.3, "1 min 15 s"), (120, "2 min"), (3700, "1 h 2 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert units.duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(18.3127, 4, "18.31"), (0.00123, 2, "0.0012"), (123456.0, 3, "123,456"), (0.0, 3, "0"), (float("inf"), 3, "inf")],
)
def test_significant(value: float, digits: int, text: str) -> None:
    assert units.significant(value, digits) == text


@pytest.mark.parametrize(("share", "text"), [(0.5, "50 %"), (0.499, "49.9 %"), (0.0, "0 %")])
def test_percent(share: float, text: str) -> None:
    assert units.percent(share) == text


def test_scheme() -> None:
    linear = sample_report()["linears"][0]
    assert scheme(linear) == "W4 g128 asym"
    assert scheme(linear | {"group_size": None, "symmetric": True, "input_bits": 8, "bits": 8}) == "W8 per channel, A8"
    assert scheme(linear | {"bits": None}) == "unquantised"
    empty = {"keep": None, "block": None, "unit": 1, "by": "max", "weighted": False, "rescale": False}
    top_k = empty | {"kind": "top_k", "keep": 16, "block": 32, "unit": 4, "weighted": True, "threshold": None}
    assert scheme(linear | {"input_sparsity": top_k}) == "W4 g128 asym, 16 of 32 weighted inputs by 4"
    teal = empty | {"kind": "threshold", "threshold": 0.1234}
    assert scheme(linear | {"input_sparsity": teal}) == "W4 g128 asym, |x| > 0.12"


def test_compression_table_has_before_and_after() -> None:
    text = printed(compression_table(sample_report()))
    before, after = (line for line in text.splitlines() if "owner/a-model" in line or "sparse50-w4" in line)
    assert "16.00" in before and "18.313" in before and "0 %" in before
    assert "3.00" in after and "19.204" in after and "50 %" in after and "812 MB" in after


@pytest.mark.parametrize(("width", "whole"), [(140, True), (106, True), (80, False)])
def test_demo_table_fits_the_terminal(width: int, whole: bool) -> None:
    model = {"name": "w8a8-smoothquant", "bytes": 7.8e6, "bits_per_weight": 9.71, "sparsity": 0.5, "description": ""}
    model |= {"bits_per_byte": 1.1504, "perplexity": 11.59, "decode_tokens_per_s": 2345.6, "speedup": 1.32}
    found = {"rows": [model | {"compress_seconds": None, "bytes": 11.5e6}, model | {"compress_seconds": 75.0}]}
    console = Console(file=io.StringIO(), width=width)
    console.print(demo_table(found, width))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    *_, dense, compressed = (line.split() for line in text.splitlines() if line.strip())
    shown = ["1.47×", "9.71", "50", "%"] if whole else ["9.71"]
    last = ["1.1504", *["11.59"] * whole, "2,346", "1.32×", "1", "min", "15", "s"]
    assert compressed == ["w8a8-smoothquant", "7.80", "MB", *shown, *last]
    assert dense[-1] == "–" and "…" not in text


def test_text_table() -> None:
    text = printed(text_table("m", {"perplexity": 18.3127, "bits_per_byte": 0.94989, "tokens": 17901, "bytes": 79052}))
    for part in ("18.313", "0.9499", "17,901", "79,052"):
        assert part in text


def test_task_table() -> None:
    task = {
        "task": "arc",
        "accuracy": 0.25,
        "accuracy_stderr": 0.031,
        "accuracy_norm": None,
        "accuracy_norm_stderr": None,
        "examples": 200,
    }
    text = printed(task_table("m", [task]))
    assert "25.0 % ± 3.1" in text and "–" in text and "200" in text
    assert "± " not in printed(task_table("m", [task | {"accuracy_stderr": None}]))


def test_outliers_are_lines() -> None:
    clean = {"block": 0, "readers": ["m.0.q_proj", "m.0.k_proj"], "normal": [], "massive_values": 0}
    assert activation_lines({}) == []
    assert activation_lines({"activations": {"inputs": [clean]}}) == ["no outliers among the activations"]
    value = {"channel": 3, "ratio": 512.0, "position": 9, "sequence": 1, "text": " the"}
    normal = {"normal": [{"channel": 5, "ratio": 20.0}, {"channel": 6, "ratio": 9.0}]}
    massive = {"massive_values": 1, "massive_tokens": 1, "massive": [value]}
    assert activation_lines({"activations": {"inputs": [clean | normal | massive]}}) == [
        "block 0, input of q_proj, k_proj: 2 channels large for most tokens, up to 20.0 times the median channel "
        "(channel 5)",
        "block 0, input of q_proj, k_proj: 1 massive value on 1 token, up to 512 times the median (channel 3, ' the', "
        "position 9 of sequence 1)",
    ]


def test_sensitivity_table_has_the_most_sensitive_first() -> None:
    linears = [{"name": f"linear{i}", "output_error": 0.1, "loss_rise": -0.25, "kl": i / 100} for i in range(9)]
    measured = {"bits": 4, "spearman": 0.654, "spearman_loss": 0.321, "linears": linears}
    text = printed(sensitivity_table(measured))
    assert "W4A4" in text and "0.65 (KL), 0.32 (loss)" in text and "-0.25000" in text
    assert text.index("linear8") < text.index("linear7") and "linear0" not in text

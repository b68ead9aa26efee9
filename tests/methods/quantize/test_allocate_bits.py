"""Choosing bits: the knapsack against brute force, budgets kept, grids that reach the file."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tulle.hf
from checkpoints import PROSE, write_checkpoint
from tulle.compression.job import compress
from tulle.compression.recipe import parse_recipe
from tulle.core.grid import Grid
from tulle.errors import UserError
from tulle.format.spec import QuantizationConfig
from tulle.methods.quantize.allocate_bits import AllocateBits, bytes_of, knapsack
from tulle.models.checkpoint import Checkpoint
from tulle.text.reading import Text

TEXT = Text((PROSE,), False, ("prose",))
EVERYWHERE = ["qkv", "o", "gate_up", "down", "embedding", "head"]


def least_cost(sizes: list[list[int]], costs: list[list[float]], budget: int) -> float:
    """By trying every combination."""
    every = itertools.product(*(range(len(row)) for row in sizes))
    fits = (pick for pick in every if sum(s[k] for s, k in zip(sizes, pick, strict=True)) <= budget)
    return min(sum(c[k] for c, k in zip(costs, pick, strict=True)) for pick in fits)


@given(st.data())
def test_knapsack(data: st.DataObject) -> None:
    """Within the budget, and no worse than the best by more than the largest step (the relaxation's bound)."""
    units = data.draw(st.integers(1, 4))
    count = data.draw(st.integers(1, 4))
    sizes = [data.draw(st.lists(st.integers(1, 50), min_size=count, max_size=count)) for _ in range(units)]
    costs = [
        data.draw(st.lists(st.floats(0, 100, allow_nan=False), min_size=count, max_size=count)) for _ in range(units)
    ]
    smallest = sum(map(min, sizes))
    budget = data.draw(st.integers(smallest, sum(map(max, sizes))))
    picks = knapsack(sizes, costs, budget)
    assert sum(size[k] for size, k in zip(sizes, picks, strict=True)) <= budget
    found = sum(cost[k] for cost, k in zip(costs, picks, strict=True))
    largest = max(max(row) - min(row) for row in costs)
    assert found <= least_cost(sizes, costs, budget) + largest + 1e-9
    with pytest.raises(UserError, match="expected a budget of"):
        knapsack(sizes, costs, smallest - 1)


def test_knapsack_takes_what_gains_most_per_byte() -> None:
    sizes = [[10, 20], [10, 20], [10, 30]]
    costs = [[5.0, 1.0], [5.0, 4.0], [9.0, 0.0]]
    assert knapsack(sizes, costs, 50) == [0, 0, 1]
    assert knapsack(sizes, costs, 60) == [1, 0, 1]
    assert knapsack(sizes, costs, 70) == [1, 1, 1]
    # Smaller and better is free.
    assert knapsack([[10, 20]], [[1.0, 2.0]], 100) == [0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "one of size and bits"),
        ({"size": "1MB", "bits": 4.0}, "one of size and bits"),
        ({"size": "1 XB"}, "a size such as 90MB"),
        ({"bits": 4.0, "choices": [1]}, "expected 2 to 8 bits"),
        ({"bits": 4.0, "choices": []}, "an empty list"),
    ],
)
def test_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_recipe({"steps": [{"allocate_bits": settings}, {"gptq": {}}]})


def test_needs_a_quantiser() -> None:
    with pytest.raises(UserError, match="quantises down on the grids of allocate_bits"):
        parse_recipe({"steps": [{"allocate_bits": {"bits": 4.0}}, {"gptq": {"targets": ["qkv", "o", "gate_up"]}}]})
    assert bytes_of("4.5GB") == 4_500_000_000


def test_grids_are_distinct() -> None:
    method = AllocateBits(bits=4.0, choices=(3, 4), group_sizes=("auto-32", "auto-64", None))
    assert len(method.grids(128)) == 6
    assert method.grids(32)[:2] == [Grid(3, 32, False, 8), Grid(3, None, False, 8)]


@pytest.mark.parametrize("tied", [True, False])
def test_a_budget_of_bytes(tmp_path: Path, tied: bool) -> None:
    model, output = tmp_path / "dense", tmp_path / "m"
    write_checkpoint(model, dtype=torch.bfloat16, tie_word_embeddings=tied)
    bits = 4.4
    recipe = {
        "steps": [
            {"allocate_bits": {"bits": bits, "choices": [2, 4, 8], "group_sizes": ["auto-32"], "targets": EVERYWHERE}},
            {"gptq": {"targets": EVERYWHERE}},
        ],
        "calibration": {"samples": 6, "length": 48},
    }
    report = compress(model, recipe, output, calibration=TEXT)
    config = json.loads((output / "config.json").read_text())
    specs = QuantizationConfig.from_json(config["quantization_config"]).linears
    tables = {"model.embed_tokens"} | (set() if tied else {"lm_head"})
    assert tables <= specs.keys() and len(specs) == 3 * 7 + len(tables)
    assert {row["name"] for row in report["tables"]} == tables
    assert len({spec.bits for spec in specs.values()}) > 1
    packed = sum(spec.packed_bytes for spec in specs.values())
    weights = sum(spec.shape[0] * spec.shape[1] for spec in specs.values())
    largest = max(spec.packed_bytes for spec in specs.values())
    assert 8 * packed / weights <= bits < 8 * (packed + largest) / weights
    assert Checkpoint.open(output).bytes == report["totals"]["packed_bytes"]
    logits = tulle.hf.load(output, dtype=torch.float32)(torch.arange(20)[None]).logits
    assert bool(torch.isfinite(logits).all())


def test_a_size_is_that_of_the_files(tmp_path: Path) -> None:
    """Headers of the files count, which are a large part of a model so small."""
    write_checkpoint(tmp_path / "dense", dtype=torch.bfloat16)
    allocate = {"size": "60KB", "choices": [2, 3, 4, 5, 6, 8], "group_sizes": ["auto-32"], "targets": EVERYWHERE}
    recipe = {
        "steps": [{"allocate_bits": allocate}, {"gptq": {"targets": EVERYWHERE}}],
        "calibration": {"samples": 4, "length": 48},
    }
    report = compress(tmp_path / "dense", recipe, tmp_path / "m", calibration=TEXT)
    files = sum(file.stat().st_size for file in (tmp_path / "m").glob("*.safetensors"))
    assert report["totals"]["packed_bytes"] < 0.9 * files
    assert 50_000 < files <= 60_000

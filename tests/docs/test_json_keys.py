"""docs/reference/json.md names every key that the commands write, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import docs_pages as markdown
import pytest

import tulle
from checkpoints import PROSE, write_checkpoint
from tulle.compression.expert_tokens import ExpertTokens
from tulle.compression.recipe import Recover
from tulle.engine import Generation
from tulle.engine.bench import Speed
from tulle.evaluate.perplexity import TextScore
from tulle.evaluate.tasks import TaskScore

PAGE = (markdown.ROOT / "docs" / "reference" / "json.md").read_text("utf-8")


def named(section: str) -> set[str]:
    """Words in backticks in a section of the page."""
    text = PAGE.split(f"## {section}\n")[1].split("\n## ")[0]
    return set(re.findall(r"`([a-z_]+)`", text))


@pytest.mark.parametrize(
    ("section", "kind", "besides"),
    [
        ("eval", TextScore, {"model", "tasks", *TaskScore.__annotations__}),
        ("bench", Speed, {"other_layouts"}),
        ("generate", Generation, {"model", "prompt", "length", "end", "stop"}),
    ],
)
def test_results(section: str, kind: type, besides: set[str]) -> None:
    assert named(section) == set(kind.__annotations__) | besides


def test_report(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model")
    (tmp_path / "text.txt").write_text(PROSE)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "calibration: {samples: 2, length: 32}\nsteps: [wanda: {sparsity: 0.5}, round_to_nearest: {targets: [head]}]\n"
        "recover: {tokens: 64, context: 16, batch: 2}\n"
    )
    report = tulle.compress(tmp_path / "model", recipe, tmp_path / "out", calibration=[str(tmp_path / "text.txt")])
    written = {*report, *report["totals"], *report["linears"][0], *report["blocks"][0], "steps", "total"}
    written |= (
        report["reload"].keys() | report["tables"][0].keys() | (report["recover"].keys() - Recover.model_fields.keys())
    )
    written |= report["recover"]["curve"][-1].keys() | {"recover"}
    # Of the summary, of an evaluation, and of a block with experts; two terms of the loss are settings too.
    besides = {"output", "protocol", "dense", "compressed"} | set(ExpertTokens.__annotations__)
    assert named("compress") == written | besides

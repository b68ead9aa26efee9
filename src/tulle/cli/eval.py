"""``tulle eval``: perplexity, bits per byte, tasks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tulle.cli import common
from tulle.cli.engine import Activations, Weights
from tulle.errors import UserError
from tulle.extras import needs

if TYPE_CHECKING:
    from tulle.evaluate import TaskScore, TextScore


def evaluate(
    model: common.Model,
    text: Annotated[
        str | None, typer.Option("--text", metavar="FILE", help="Text or JSONL; without: the standard library.")
    ] = None,
    separator: common.Separator = None,
    length: Annotated[
        int | None, typer.Option("--length", metavar="T", help="Tokens per sequence [2048 or the context].")
    ] = None,
    min_chars: common.MinChars = 1,
    documents: common.Documents = None,
    bos: Annotated[
        bool, typer.Option("--bos/--no-bos", help="Begin sequences with the tokenizer's BOS token, if any.")
    ] = True,
    tasks: Annotated[
        list[str] | None,
        typer.Option("--tasks", metavar="NAME|FILE", help="A JSONL file or an lm-eval task; may be repeated."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", min=1, help="Only the first N rows of each task.")
    ] = None,
    backend: Annotated[
        str, typer.Option("--backend", metavar="NAME", help="What runs the model: torch or engine.")
    ] = "torch",
    activations: Activations = "as quantised",
    weights: Weights = "as stored",
    device: common.Device = "cpu",
    dtype: Annotated[str, typer.Option("--dtype", help="Of activations and unpacked weights.")] = "float32",
    json_file: common.JsonFile = None,
) -> None:
    """Perplexity and bits per byte of a text, or accuracy on tasks.

    Example: tulle eval out --text stories.txt --separator '<|endoftext|>' --documents 0:100
    """
    if backend not in ("torch", "engine"):
        raise UserError(f"expected --backend torch or engine, found {backend!r}")
    options = {"activations": activations, "weights": weights}
    if backend == "torch" and options != {"activations": "as quantised", "weights": "as stored"}:
        raise UserError("expected --activations and --weights with --backend engine, found them with torch; add that")
    chosen = common.parse_range(documents)
    if backend == "torch":
        needs("compress", "tulle eval", "run the model with --backend engine")
    from tulle.evaluate import Protocol, evaluate_text, held_out_text
    from tulle.evaluate.text import read_documents
    from tulle.models.hub import local_folder

    folder = local_folder(model)
    runs = [(name, _task(name, limit, backend)) for name in tasks or ()]
    protocol = Protocol(length, bos)
    passage = None
    if text is not None:
        passage = read_documents(text, separator, chosen, min_chars)
    elif not runs:
        passage, whole = held_out_text()
        protocol = Protocol(length, bos, whole.whole)
    if backend == "engine":
        from tulle.evaluate.engine import load_engine

        loaded, tokenizer = load_engine(folder, **options)
    else:
        from tulle.evaluate.loading import load_model

        loaded, tokenizer = load_model(folder, device, dtype)
    score: TextScore | None = None
    with common.progress_bars() as progress:
        if passage is not None:
            score = evaluate_text(
                loaded, tokenizer, passage, protocol, lambda done, total: progress("perplexity", done, total)
            )
        found = [
            run(loaded, tokenizer, lambda done, total, name=name: progress(name, done, total)) for name, run in runs
        ]
    if str(json_file) != "-":
        _show(model, score, found)
    common.write_json(
        json_file, {"model": model} | (dict(score) if score else {}) | ({"tasks": found} if found else {})
    )
    if score is not None and not math.isfinite(score["perplexity"]):
        raise UserError(
            f"expected a finite perplexity, found {_not_finite(score)}; the model's weights or activations overflow: "
            "compare with the model it was made from, or try --dtype float32"
        )


def _not_finite(score: TextScore) -> str:
    if math.isnan(score["perplexity"]):
        return "logits that are no numbers (NaN)"
    bits = score["bits_per_byte"]
    return f"an infinite one ({bits:.1f} bits per byte)" if math.isfinite(bits) else "a token of probability 0"


def _task(name: str, limit: int | None, backend: str) -> Any:
    """``run(model, tokenizer, progress)`` of one task; what cannot run is refused here, before the model is loaded."""
    from tulle.evaluate.tasks import evaluate_task, read_examples

    file = Path(name)
    if file.is_file():
        read_examples(file, limit)
        return lambda model, tokenizer, progress: evaluate_task(model, tokenizer, file, limit=limit, progress=progress)
    if file.suffix == ".jsonl" or "/" in name:
        raise UserError(f"expected a JSONL file, found nothing at {name}; check the path")
    if backend == "engine":
        raise UserError(
            f"expected a JSONL file for a task on the engine, found the name {name!r}; leave out --backend engine, or "
            "start tulle serve and let lm-eval ask it (its model local-completions)"
        )
    from tulle.evaluate.harness import check_task_name, evaluate_named

    check_task_name(name)
    return lambda model, tokenizer, progress: evaluate_named(model, tokenizer, name, limit=limit)


def _show(model: str, score: TextScore | None, tasks: list[TaskScore]) -> None:
    from tulle.report.terminal import task_table, text_table

    out = common.console()
    if score is not None:
        out.print(text_table(model, score))
        out.print(score["protocol"], style="dim")
    if tasks:
        out.print(task_table(model, tasks))
        for task in tasks:
            out.print(task["protocol"], style="dim")

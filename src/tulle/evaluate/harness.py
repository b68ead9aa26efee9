"""Tasks by name, through EleutherAI's lm-eval (the extra ``tasks``), whose data come from the hub."""

from __future__ import annotations

from typing import Any

from tulle.errors import UserError
from tulle.evaluate.tasks import TaskScore
from tulle.extras import needs
from tulle.network import require_hub


def check_task_name(name: str) -> None:
    """Raises ``UserError`` at once if a named task cannot run here: no lm-eval, or no way to its data."""
    needs("tasks", f"the task {name!r}", "give the path of a JSONL file")
    require_hub(f"the data of the task {name!r}", "give the path of a JSONL file")


def evaluate_named(model: Any, tokenizer: Any, name: str, *, limit: int | None = None) -> TaskScore:
    """Runs one lm-eval task on a loaded model.

    Raises ``UserError`` if lm-eval does not know it or cannot get its data.
    """
    check_task_name(name)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        found = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8), tasks=[name], limit=limit
        )
    except Exception as error:  # lm-eval raises whatever its parts raise, from a missing task to a failed download
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"expected lm-eval to run the task {name!r}, found: {first_line}; see lm-eval's list of tasks"
        ) from error
    results = found["results"][name]
    return TaskScore(
        task=name,
        accuracy=_value(results, "acc"),
        accuracy_stderr=_optional(results, "acc_stderr"),
        accuracy_norm=_optional(results, "acc_norm"),
        accuracy_norm_stderr=_optional(results, "acc_norm_stderr"),
        examples=int(found.get("n-samples", {}).get(name, {}).get("effective", 0)),
        protocol=f"lm-eval task {name}, {found['n-shot'].get(name, 0)}-shot",
    )


def _optional(results: dict[str, Any], metric: str) -> float | None:
    value = next((v for key, v in results.items() if key.partition(",")[0] == metric), None)
    return float(value) if isinstance(value, int | float) else None


def _value(results: dict[str, Any], metric: str) -> float:
    value = _optional(results, metric)
    if value is None:
        raise UserError(
            f"expected a task with an accuracy, found metrics {', '.join(results)}; run it with lm-eval itself"
        )
    return value

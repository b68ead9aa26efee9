"""``tulle law``: scaling laws of sparse activations, fitted on runs, and what they say is best."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tulle.cli import common
from tulle.errors import UserError

if TYPE_CHECKING:
    from tulle.laws import Fit, Run

app = typer.Typer(
    help="Scaling laws of sparse activations: fit one to runs, ask for the best sparsity.",
    rich_markup_mode=None,
)
PUBLISHED = "published"


@app.command("fit")
@common.checked("law fit")
def fit(
    runs: Annotated[
        Path, typer.Argument(metavar="RUNS", help="JSON, JSONL or CSV with size, sparsity, loss (and weights).")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="OUT.html", help="Also write pictures as an HTML page.")
    ] = None,
    replicates: Annotated[
        int, typer.Option("--replicates", metavar="N", min=0, help="Bootstrap replicates for the intervals.")
    ] = 200,
    hold_out: Annotated[
        str | None,
        typer.Option("--hold-out", metavar="A,B", help="Rows of RUNS, from 1 on, to predict instead of fitting them."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the bootstrap.")] = 0,
    json_file: common.JsonFile = None,
) -> None:
    """Fit L(N, S) = E + (B + C·exp(β/(1−S)))/N^α to RUNS, for each kind of weights.

    Size is a number of parameters, sparsity the share of them that a token does not read, loss nats per token.

    Example: tulle law fit runs.csv --json law.json -o law.html
    """
    if output is not None and (output.is_dir() or not output.resolve().parent.is_dir()):
        raise UserError(f"expected -o to name an HTML file in a folder that exists, found {output}; try -o law.html")
    from tulle import laws

    rows = laws.read_runs(runs)
    held = _numbers(hold_out, len(rows))
    found: dict[str, Any] = {"laws": {}}
    for kind in dict.fromkeys(run.weights for run in rows):
        own = [(number, run) for number, run in enumerate(rows, 1) if run.weights == kind]
        fitted = laws.fit([run for number, run in own if number not in held], replicates, seed)
        predicted = [_predicted(fitted, run) for number, run in own if number in held]
        found["laws"][kind] = fitted.to_json() | {"held_out": predicted}
    if output is not None:
        from tulle.report.laws import write_laws

        write_laws(found, output)
    if str(json_file) != "-":
        from tulle.report.terminal import law_table

        common.console().print(law_table(found))
    common.write_json(json_file, found)


@app.command("optimum")
@common.checked("law optimum")
def optimum(
    law: Annotated[
        str,
        typer.Argument(metavar="LAW", help=f"The JSON of tulle law fit, or '{PUBLISHED}' for the paper's constants."),
    ],
    active: Annotated[
        float | None, typer.Option("--active", metavar="N", help="Budget: parameters that a token reads.")
    ] = None,
    flops: Annotated[
        float | None, typer.Option("--flops", metavar="F", help="Budget: FLOPs per token, two per active parameter.")
    ] = None,
    json_file: common.JsonFile = None,
) -> None:
    """The sparsity with the least loss at a budget of active parameters or FLOPs per token, with its interval.

    Example: tulle law optimum law.json --active 1e6
    """
    if active is not None and flops is not None:
        raise UserError("expected --active or --flops, found both; leave one out")
    budget = active if active is not None else None if flops is None else flops / 2
    if budget is not None and not budget > 0:
        raise UserError(f"expected a budget above 0, found {budget:g}")
    from tulle import laws

    if law == PUBLISHED:
        fits = {kind: laws.Fit(one, float("nan"), ()) for kind, one in laws.PUBLISHED.items()}
    else:
        fits = _read(Path(law))
    found: dict[str, Any] = {"budget": budget, "optima": {k: _best(k, f, budget, law) for k, f in fits.items()}}
    if str(json_file) != "-":
        from tulle.report.terminal import optimum_table

        common.console().print(optimum_table(found))
    common.write_json(json_file, found)


def _numbers(given: str | None, rows: int) -> set[int]:
    if given is None:
        return set()
    try:
        numbers = {int(part) for part in given.split(",")}
    except ValueError:
        numbers = {0}
    if not all(1 <= n <= rows for n in numbers):
        raise UserError(f"expected --hold-out as row numbers from 1 to {rows}, found {given!r}; try --hold-out 3,5")
    return numbers


def _predicted(fit: Fit, run: Run) -> dict[str, Any]:
    found = {"size": run.size, "sparsity": run.sparsity, "loss": run.loss}
    found["predicted"] = float(fit.law.loss(run.size, run.sparsity))
    if fit.replicates:
        ends = fit.interval(float(law.loss(run.size, run.sparsity)) for law in fit.replicates)
        return found | {"interval": list(ends)}
    return found


def _best(kind: str, fit: Fit, budget: float | None, law: str) -> dict[str, Any]:
    from tulle.laws import STATED_OPTIMA

    best = fit.law.optimum
    found: dict[str, Any] = {"sparsity": best}
    if fit.replicates:
        found["interval"] = list(fit.interval(one.optimum for one in fit.replicates))
    if law == PUBLISHED:
        found["stated"] = STATED_OPTIMA[kind]
    if budget is not None:
        found |= {"size": budget / (1 - best), "loss": float(fit.law.loss_of_active(budget, best))}
        found["dense_loss"] = float(fit.law.loss(budget, 0.0))
        if fit.replicates:
            ends = fit.interval(float(one.loss_of_active(budget, one.optimum)) for one in fit.replicates)
            found["loss_interval"] = list(ends)
    return found


def _read(file: Path) -> dict[str, Fit]:
    from tulle.laws import Fit

    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(
            f"expected the JSON that tulle law fit writes, or '{PUBLISHED}', found {file} unreadable ({error})"
        ) from None
    kinds = content.get("laws") if isinstance(content, dict) else None
    if not isinstance(kinds, dict) or not kinds:
        raise UserError(
            f"expected the JSON that tulle law fit writes, found no laws in {file}; run tulle law fit first"
        )
    return {kind: Fit.from_json(one) for kind, one in kinds.items()}

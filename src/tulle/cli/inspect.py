"""``tulle inspect``: what is in a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tulle.cli import common, controllers
from tulle.errors import UserError

SAMPLES, LENGTH = 8, 512


@common.checked("inspect")
def inspect(
    model: common.Model,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="OUT.html", help="Also write pictures as an HTML page.")
    ] = None,
    activations: Annotated[
        bool,
        typer.Option(
            "--activations",
            help="Run text through the model: outliers and what transforms do, or what tokens read of sparse inputs.",
        ),
    ] = False,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Round each linear alone to 4 and to 8 bits: what the model loses.")
    ] = False,
    text: Annotated[
        str | None,
        typer.Option(
            "--text", metavar="FILE|DIR|DATASET", help="For --activations and --sensitivity [standard library]."
        ),
    ] = None,
    separator: common.Separator = None,
    samples: Annotated[
        int | None, typer.Option("--samples", metavar="N", min=1, help=f"Sequences of the text [{SAMPLES}].")
    ] = None,
    length: Annotated[
        int | None, typer.Option("--length", metavar="T", min=2, help=f"Tokens per sequence [{LENGTH}].")
    ] = None,
    device: common.Device = "cpu",
    json_file: common.JsonFile = None,
) -> None:
    """Structure, bits, sparsity, sizes, outliers and sensitivity of MODEL, dense or compressed; of a Scaling
    Transformer, what its controllers choose.

    Example: tulle inspect reference --activations -o reference.html
    """
    if output is not None and (output.is_dir() or not output.resolve().parent.is_dir()):
        raise UserError(f"expected -o to name an HTML file in a folder that exists, found {output}; try -o model.html")
    from tulle.models.hub import local_folder

    folder = local_folder(model)
    if controllers.fits(folder) and not (activations or sensitivity):
        controllers.inspect(folder, text, separator, samples or SAMPLES, length or LENGTH, device, output, json_file)
        return
    given = {"--text": text, "--separator": separator, "--samples": samples, "--length": length}
    alone = [option for option, value in given.items() if value is not None]
    if alone and not (activations or sensitivity):
        raise UserError(f"expected --activations or --sensitivity with {alone[0]}, found neither; add one of them")
    from tulle.inspect.weights import inspect_model
    from tulle.report.inspection import describe, write_inspection
    from tulle.report.terminal import activation_lines, activity_table, inspection_table, sensitivity_table

    with common.progress_bars() as progress:
        measured: dict[str, Any] = {}
        if activations or sensitivity:
            sequences = _sequences(folder, text, separator, samples or SAMPLES, length or LENGTH, sensitivity)
            measured = _measured(folder, sequences, device, activations, sensitivity, progress)
        found = inspect_model(folder, progress) | measured
    if output is not None:
        write_inspection(found, output)
    if str(json_file) != "-":
        out = common.console()
        out.print(f"{model}: {describe(found['architecture'])}, {found['totals']['bytes'] / 1e6:,.1f} MB")
        out.print(inspection_table(found))
        if "activity" in found:
            out.print(activity_table(found["activity"]))
        for line in activation_lines(found):
            out.print(line, markup=False)
        for one in found.get("sensitivity", ()):
            out.print(sensitivity_table(one))
    for shown in found.get("activations", {}).get("landscapes", ()):
        for stage in shown["stages"]:
            del stage["picture"]  # thousands of numbers that the page has drawn
    common.write_json(json_file, found)


def _sequences(
    folder: Path, text: str | None, separator: str | None, samples: int, length: int, dense: bool
) -> list[Any]:
    from tulle.compression.calibration import calibration_sequences, calibration_text
    from tulle.inspect.outliers import require_dense
    from tulle.models.checkpoint import Checkpoint

    if dense or not _sparse_inputs(folder):
        require_dense(folder)
    checkpoint, passage = Checkpoint.open(folder), calibration_text(text, separator)
    return calibration_sequences(checkpoint.describe(), checkpoint.source.tokenizer, passage, samples, length)


def _measured(
    folder: Path, sequences: list[Any], device: str, activations: bool, sensitivity: bool, progress: Any
) -> dict[str, Any]:
    from tulle.evaluate.loading import load_model
    from tulle.inspect.outliers import inspect_activations
    from tulle.inspect.sensitivity import measure_sensitivity

    found: dict[str, Any] = {}
    if activations and _sparse_inputs(folder):
        from tulle.inspect.activity import measure_activity

        model, _ = load_model(folder, device)
        found["activity"] = measure_activity(model, sequences, progress)
    if activations and not _is_packed(folder):
        from transformers import AutoTokenizer

        from tulle.models.source import open_source

        tokenizer = AutoTokenizer.from_pretrained(open_source(folder).tokenizer, local_files_only=True)
        found["activations"] = inspect_activations(
            folder, sequences, device, progress, lambda token: str(tokenizer.decode([token]))
        )
    if sensitivity:
        model, _ = load_model(folder, device)
        found["sensitivity"] = [measure_sensitivity(model, sequences, bits, progress) for bits in (4, 8)]
    return found


def _is_packed(folder: Path) -> bool:
    from tulle.models.checkpoint import Checkpoint

    return Checkpoint.open(folder).packed is not None


def _sparse_inputs(folder: Path) -> bool:
    """Whether tokens choose among the inputs of a packed model, or the gate of a dense one makes zeros."""
    from tulle.models.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(folder)
    packed = checkpoint.packed
    if packed is None:
        return str(checkpoint.config.get("hidden_act", "")).startswith("relu")
    return any(spec.input_sparsity is not None for spec in packed.linears.values())

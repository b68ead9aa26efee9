"""Recovery: a pruned, quantised model is trained towards the dense one (:mod:`tulle.training.distil`).

Masks are held; weights are trained on their grids (``codes``) or only the grids' steps (``steps``), with norms and
biases (:mod:`tulle.methods.train.codes`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tulle import machine
from tulle.compression import job
from tulle.compression.calibration import calibration_sequences, calibration_text
from tulle.compression.job import Evaluation
from tulle.compression.recipe import Recover, read_recipe
from tulle.compression.reload import confirm, first_windows, losses
from tulle.compression.run_folder import RunFolder, disk_errors
from tulle.compression.walker import compute_dtype
from tulle.errors import UserError
from tulle.hf import packed_linears, require_packed_tensors
from tulle.hf.pack import packed_tensors
from tulle.hf.packed_linear import DTYPES
from tulle.methods.contract import Progress
from tulle.models.batches import Batch, batched
from tulle.models.checkpoint import Checkpoint, copy_companions, read_json, write_index, write_shard, write_text
from tulle.models.rewrite import DenseModel
from tulle.text.reading import Text
from tulle.training.distil import Distillation, Windows, training
from tulle.training.student import Student, Teacher


def recover(
    packed: str | Path,
    dense: str | Path,
    output: str | Path,
    settings: Recover,
    *,
    text: Text | None = None,
    evaluation: Evaluation | None = None,
    device: str = "cpu",
    seed: int = 0,
    resume: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Trains the model in the folder ``packed`` towards ``dense`` and writes it to the folder ``output``.

    Returns the report: that of ``packed`` with ``recover`` added. ``text`` is what is trained on; None takes the source
    of the installed standard library. The last windows of the text are held out. ``evaluation``: perplexity of the
    dense and the recovered model goes into the report. A killed run goes on from its newest training checkpoint with
    ``resume``. Raises ``UserError`` for models, text and settings that do not fit.
    """
    machine.require_device(device)
    source, teacher = Checkpoint.open(packed), DenseModel.open(dense)
    require_packed_tensors(source, packed_linears(source))
    report = read_json(source.path / "report.json", "a report of tulle compress")
    same_basis = _require_pair(source, teacher)
    if not same_basis and not settings.kl and not settings.cross_entropy:
        raise UserError(
            "expected kl or cross_entropy above 0 for a model whose residual stream was rotated, found squarehead "
            "alone; hidden states are compared in one basis only"
        )
    training(settings)
    text = text if text is not None else calibration_text(None)
    windows = _windows(teacher, text, settings, seed)
    dtype = compute_dtype(settings.compute, teacher.embedding_dtype, device)
    run = RunFolder(Path(output), _fingerprint(source, teacher, settings, windows, seed, dtype), 1)
    with run.claimed(resume) as state:
        if state is None:
            return read_json(Path(output) / "report.json", "a report")
        with disk_errors(Path(output)):
            run.commit(state)
            torch.manual_seed(seed)
            student = Student(source, settings.train, device, dtype)
            loop = Distillation(student, Teacher(teacher, device, dtype), settings, windows, device, same_basis)
            facts = loop.run(run.work, progress)
            _write(source, student, settings, run.folder)
            seen = first_windows(student.decoder, batched(windows.held_out))
            reload = confirm(run.folder, seen, _predicted(student, seen, device), device, dtype, progress=progress)
            report |= {"fingerprint": run.fingerprint, "recover": settings.model_dump() | facts, "reload": reload}
            report["recipe"] = report["recipe"] | {"recover": settings.model_dump()}
            report["recover"] |= {
                "source": list(text.source), "seed": seed,
                "hidden_states": same_basis, "compute": str(dtype).removeprefix("torch."),
                "peak_memory_bytes": max(state.peak_memory_bytes, machine.peak_memory()),
            }  # fmt: skip
            report["evaluation"] = None
            job.finish_report(report, run.folder, teacher.checkpoint.path, evaluation, device, progress)
            run.publish()
    if progress:
        progress("done", 1, 1)
    return report


def _require_pair(source: Checkpoint, teacher: DenseModel) -> bool:
    """Whether hidden states of the two are in one basis. Raises ``UserError`` for two models of other sizes."""
    student, dense = source.describe(), teacher.description
    for what, found, wanted in (
        ("blocks", len(student.layers), len(dense.layers)),
        ("channels of the residual stream", student.hidden, dense.hidden),
        ("tokens of the vocabulary", student.vocabulary, dense.vocabulary),
    ):
        if found != wanted:
            raise UserError(
                f"expected a dense model of {found} {what}, as the compressed one has, found {wanted}; give the model "
                "that was compressed"
            )
    packed = source.packed
    steps = read_recipe(packed.recipe).steps if packed is not None and packed.recipe.get("steps") else ()
    return not any(step.method.changes_residual_basis(step.targets) for step in steps)


def _windows(teacher: DenseModel, text: Text, settings: Recover, seed: int) -> Windows:
    """Whole windows of the text; as many as the tokens of the run need, all where there are fewer."""
    length = settings.context + 1
    if length > teacher.description.context:
        raise UserError(
            f"expected a context below the model's {teacher.description.context} tokens, found {settings.context}; "
            "set a shorter one"
        )
    stream = Text(text.documents, False, text.source)
    found = calibration_sequences(
        teacher.description, teacher.checkpoint.source.tokenizer, stream, None, length, seed
    )  # fmt: skip
    held_out = settings.batch
    if len(found) < held_out + settings.batch:
        raise UserError(
            f"expected at least {held_out + settings.batch} windows of {length} tokens of text, found {len(found)}; "
            "give more text, or a smaller batch or context"
        )
    return Windows(found, held_out, seed)


def _fingerprint(
    source: Checkpoint, teacher: DenseModel, settings: Recover, windows: Windows, seed: int, dtype: torch.dtype
) -> str:
    """Equal for runs that must end with the same bytes."""
    facts = [source.source.identity(), teacher.checkpoint.source.identity(), settings.model_dump(), seed, str(dtype)]
    return hashlib.sha256(json.dumps([*facts, windows.digest()], sort_keys=True).encode()).hexdigest()


@torch.no_grad()
def _predicted(student: Student, windows: Sequence[Batch], device: str) -> Tensor:
    """The trained model's losses of the windows' next tokens, nats ``[N]``."""
    found = []
    for window in windows:
        hidden = student.embed(window.tokens.to(device))
        for index in range(len(student.decoder.layers)):
            hidden = student.block(index, hidden, window.tokens)
        found.append(hidden)
    return losses(student.decoder, windows, found, student.outer(), student.head)


def _write(source: Checkpoint, student: Student, settings: Recover, folder: Path) -> None:
    """The packed model with what was trained, file by file as ``source`` has it."""
    packed = source.packed
    assert packed is not None
    changed = {name: t.to(source.info(name).dtype) for name, t in student.plain()}
    for linear in student.linears():
        spec = packed.linears[linear.name]
        dtype = torch.float32 if spec.values_dtype is None else DTYPES[spec.values_dtype]
        found = packed_tensors(linear, spec, dtype)
        changed |= {f"{linear.name}.{suffix}": tensor for suffix, tensor in found.items()}
    files: dict[Path, list[str]] = {}
    for name in source.names():
        files.setdefault(source.info(name).file, []).append(name)
    total = 0
    for file, names in files.items():
        tensors = {name: changed[name].cpu() if name in changed else source.read(name) for name in names}
        write_shard(folder / file.name, tensors)
        total += sum(t.numel() * t.element_size() for t in tensors.values())
    if len(files) > 1:
        write_index(folder, {file.name: names for file, names in files.items()}, total)
    config = source.config
    recipe = config["quantization_config"].get("recipe") or {}
    recipe = recipe | {"recover": settings.model_dump()}
    config = config | {"quantization_config": config["quantization_config"] | {"recipe": recipe}}
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    copy_companions(source.path, folder)

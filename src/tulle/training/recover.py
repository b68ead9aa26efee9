"""Recovery: a pruned, quantised model learns from the dense one what compressing it has cost.

Masks are held; weights are trained on their grids (``codes``) or only the grids' steps (``steps``), with norms and
biases (:mod:`tulle.methods.train.codes`). What is minimised, in nats per token, over windows of any text:

    L = kl·T²·KL(p_t ‖ p_s) + squarehead·Σ_layers MSE(h_s, h_t)/(mean h_t² + ε) + cross_entropy·CE,

p_t and h_t the teacher's distribution of the next token and its hidden states (SquareHead, Kurtic et al. 2023, equation
2; the logits' term as in Hinton et al. 2015).

Blocks run one after the other, teacher and student side by side. The gradient of every layer's term is known in closed
form there, so that the backward pass needs one block's graph at a time: a block's inputs are kept and it is run once
more (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"), or its graph is kept where all of them are
small beside the machine's memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from tulle import machine
from tulle.compression import job
from tulle.compression.calibration import calibration_sequences, calibration_text
from tulle.compression.job import Evaluation
from tulle.compression.recipe import Recipe, Recover, read_recipe
from tulle.compression.run_folder import RunFolder, disk_errors
from tulle.compression.walker import compute_dtype
from tulle.errors import UserError
from tulle.hf import packed_linears, require_packed_tensors
from tulle.hf.pack import packed_tensors
from tulle.hf.packed_linear import DTYPES
from tulle.methods.contract import Progress
from tulle.methods.train.squarehead import SquareHead
from tulle.models.checkpoint import Checkpoint, copy_companions, read_json, write_index, write_shard, write_text
from tulle.models.description import Decoder
from tulle.models.rewrite import DenseModel
from tulle.text.reading import Text
from tulle.training import checkpoint as checkpoints
from tulle.training.model_folder import unpack
from tulle.training.optim import learning_rates
from tulle.training.recipe import Training
from tulle.training.student import Student, Teacher

LOGITS = 1 << 25
"""Logits that are in memory at once."""
GRAPH_SHARE = 1 / 3
"""Share of the machine's memory up to which the graphs of all blocks are kept for the backward pass."""
CHECKPOINT_SECONDS = 300.0


def compress(
    model: str | Path,
    recipe: str | Path | dict[str, Any] | Recipe,
    output: str | Path,
    *,
    calibration: Text | Sequence[str | Path] | None = None,
    separator: str | None = None,
    documents: tuple[int, int] | None = None,
    min_chars: int = 1,
    evaluation: Evaluation | None = None,
    device: str = "cpu",
    seed: int = 0,
    resume: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """:func:`tulle.compression.job.compress`, and recovery on the same text where the recipe has ``recover``.

    With ``then`` the steps before only prune, what is trained are plain weights under their masks, and the steps of
    ``then`` compress the recovered model. Until all is done, models on the way lie beside ``output``.
    """
    chosen, text = read_recipe(recipe), calibration_text(calibration, separator, documents, min_chars)
    given: dict[str, Any] = {"device": device, "seed": seed, "progress": progress}
    if chosen.recover is None:
        return job.compress(
            model, chosen, output, calibration=text, evaluation=evaluation, resume=resume, **given, **settings
        )
    out = Path(output)
    pruned, recovered, dense = (out.with_name(f"{out.name}.{what}") for what in ("compressed", "recovered", "dense"))
    first = recovered if chosen.then else out
    if resume and (out / "report.json").exists() and not pruned.exists():
        found = read_json(out / "report.json", "a report")
        if found["recipe"] == chosen.to_json():
            return found
    try:
        if not first.exists():
            alone = replace(chosen, recover=None, then=())
            job.compress(model, alone, pruned, calibration=text, resume=resume, **given, **settings)
        report = recover(
            pruned if pruned.exists() else first, model, first, chosen.recover, text=text, resume=resume,
            evaluation=None if chosen.then else evaluation, **given,
        )  # fmt: skip
        if chosen.then:
            if not dense.exists():
                unpack(recovered, dense, DenseModel.open(model).embedding_dtype)
            rest = replace(chosen, steps=chosen.then, recover=None, then=())
            job.compress(dense, rest, out, calibration=text, resume=resume, **given, **settings)
            report = _told(out, report, chosen, str(model), evaluation, device, progress)
    except BaseException as error:
        error.add_note(f"what was done so far lies beside {out}: --resume goes on")
        raise
    for folder in (pruned, recovered, dense):
        shutil.rmtree(folder, ignore_errors=True)
    return report


def _told(
    out: Path,
    recovered: dict[str, Any],
    recipe: Recipe,
    model: str,
    evaluation: Evaluation | None,
    device: str,
    progress: Progress | None,
) -> dict[str, Any]:
    """The report of the whole recipe, in ``out``: the last steps' figures, what recovering gave, times of all."""
    report = read_json(out / "report.json", "a report")
    before, seconds = recovered["seconds"], report["seconds"]
    steps = before["steps"] | {k: v + before["steps"].get(k, 0.0) for k, v in seconds["steps"].items()}
    report["seconds"] = {k: v + before.get(k, 0.0) for k, v in seconds.items() if k != "steps"} | {"steps": steps}
    report |= {"model": model, "recover": recovered["recover"]}
    report["peak_memory_bytes"] = max(report["peak_memory_bytes"], recovered["peak_memory_bytes"])
    report["recipe"] = recipe.to_json()
    config = read_json(out / "config.json", "a config")
    config["quantization_config"]["recipe"] = recipe.to_json()
    write_text(out / "config.json", json.dumps(config, indent=2) + "\n")
    job.finish_report(report, out, DenseModel.open(model).checkpoint.path, evaluation, device, progress)
    return report


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
    _training(settings)
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
            recovery = _Recovery(student, Teacher(teacher, device, dtype), settings, windows, device, same_basis)
            facts = recovery.run(run.work, progress)
            _write(source, student, settings, run.folder)
            report |= {"fingerprint": run.fingerprint, "recover": settings.model_dump() | facts}
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


class _Windows:
    """Token windows ``[T + 1]`` to train on, in a seeded order of their own for every pass, and some held out."""

    def __init__(self, rows: list[Tensor], held_out: int, seed: int):
        self.held_out, self._train, self._seed = rows[-held_out:], rows[:-held_out], seed
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self._train)

    def batch(self, step: int, size: int) -> Tensor:
        """int64 ``[size, T + 1]`` of a step."""
        found = []
        for position in range(step * size, (step + 1) * size):
            epoch, index = divmod(position, len(self._train))
            if epoch != self._epoch:
                self._epoch = epoch
                self._order = np.random.default_rng([self._seed, epoch]).permutation(len(self._train))
            found.append(self._train[int(self._order[index])])
        return torch.stack(found)

    def digest(self) -> str:
        found = hashlib.sha256()
        for row in (*self._train, *self.held_out):
            found.update(row.numpy().tobytes())
        return found.hexdigest()


def _windows(teacher: DenseModel, text: Text, settings: Recover, seed: int) -> _Windows:
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
    return _Windows(found, held_out, seed)


def _training(settings: Recover) -> Training:
    """The loop's settings. Raises ``UserError`` where the tokens do not make one step."""
    found = Training(
        tokens=settings.tokens, context=settings.context, batch=settings.batch, accumulation=settings.accumulation,
        learning_rate=settings.rate, schedule="cosine", warmup_steps=settings.warmup_steps,
    )  # fmt: skip
    if not found.steps:
        raise UserError(
            f"expected tokens for one step of {found.step_tokens} or more, found {settings.tokens}; raise tokens, or "
            "lower batch or context"
        )
    return found


class _Recovery:
    """The training loop."""

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        settings: Recover,
        windows: _Windows,
        device: str,
        same_basis: bool,
    ):
        self.student, self.teacher, self.settings, self.windows = student, teacher, settings, windows
        self._device = device
        self._squarehead = settings.squarehead if same_basis else 0.0
        self._training = _training(settings)
        activations = _graph_bytes(student.decoder) * settings.batch * settings.context
        self._keeps_graphs = activations <= GRAPH_SHARE * machine.memory_bytes()
        # Of a size of its own for every tensor: weights of one model differ in size tenfold from another's.
        groups = [{"params": [p], "size": _size(p)} for p in student.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def run(self, work: Path, progress: Progress | None) -> dict[str, Any]:
        """All steps from the newest checkpoint in ``work`` on; figures for the report."""
        folder, file = work / "checkpoints", work / "recover.json"
        found = checkpoints.latest(folder)
        start = 0 if found is None else checkpoints.load(found, self.student, [self._optimizer])
        record: dict[str, Any] = read_json(file, "figures") if start else {"curve": [], "seconds": 0.0}
        record["curve"] = [row for row in record["curve"] if row["step"] <= start]
        if not record["curve"]:
            record["curve"].append({"step": 0, "tokens": 0} | self.held_out())
        steps, rates = self._training.steps, learning_rates(self._training)
        saved = time.perf_counter()
        sums: dict[str, float] = {}
        for step in range(start, steps):
            if progress:
                progress(f"recover {step}/{steps}", step, steps)
            for group in self._optimizer.param_groups:
                group["lr"] = rates[step] * group["size"]
            for name, value in self._step(step).items():
                sums[name] = sums.get(name, 0.0) + value
            done, now = step + 1, time.perf_counter()
            if done % self.settings.evaluate_every == 0 or done == steps:
                count = (done - 1) % self.settings.evaluate_every + 1
                row = {"step": done, "tokens": done * self._training.step_tokens, "rate": rates[step]}
                row |= {name: value / count for name, value in sums.items()}
                record["curve"].append(row | self.held_out())
                sums = {}
            if now - saved > CHECKPOINT_SECONDS or done == steps:
                record["seconds"] += now - saved
                saved = now
                write_text(file, json.dumps(record))
                checkpoints.save(folder, done, {}, self.student, [self._optimizer])
        record["tokens_trained"] = steps * self._training.step_tokens
        record["windows"] = len(self.windows)
        return record

    def _step(self, step: int) -> dict[str, float]:
        """One optimizer step; the mean of every term."""
        sums: dict[str, float] = {}
        rows = self.windows.batch(step, self.settings.batch * self.settings.accumulation)
        for part in rows.split(self.settings.batch):
            for name, value in self._differentiate(part.to(self._device)).items():
                sums[name] = sums.get(name, 0.0) + value / self.settings.accumulation
        trained = [p for group in self._optimizer.param_groups for p in group["params"]]
        if self.settings.accumulation > 1:
            for parameter in trained:
                if parameter.grad is not None:
                    parameter.grad /= self.settings.accumulation
        norm = float(nn.utils.clip_grad_norm_(trained, self.settings.clip))
        if not math.isfinite(norm):
            raise UserError(
                f"expected finite gradients, found {norm} at step {step}; try a lower rate than {self.settings.rate}"
            )
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return sums

    def _differentiate(self, rows: Tensor) -> dict[str, float]:
        """Adds the gradients of L on windows ``[B, T + 1]`` to the parameters'; the value of every term."""
        inputs, targets = rows[:, :-1], rows[:, 1:]
        wanted, hidden = self.teacher.embed(inputs), self.student.embed(inputs)
        trail: list[tuple[Tensor, Tensor | None, Tensor | None]] = []
        squares = 0.0
        for index in range(len(self.student.decoder.layers)):
            wanted = self.teacher.block(index, wanted)
            entry = hidden.detach().requires_grad_()
            with torch.set_grad_enabled(self._keeps_graphs):
                out = self.student.block(index, entry)
            hidden, pull = out.detach(), None
            if self._squarehead:
                value, pull = _square_head(hidden, wanted)
                squares, pull = squares + value, pull * self._squarehead
            trail.append((entry, out if self._keeps_graphs else None, pull))
        found, gradient = self._at_the_head(hidden, wanted, targets)
        for index in reversed(range(len(trail))):
            entry, kept, pull = trail.pop()
            if kept is None:
                with torch.enable_grad():
                    kept = self.student.block(index, entry)
            torch.autograd.backward(kept, gradient if pull is None else gradient + pull)
            assert entry.grad is not None
            gradient = entry.grad
        return found | ({"squarehead": squares} if self._squarehead else {})

    def _at_the_head(self, hidden: Tensor, wanted: Tensor, targets: Tensor) -> tuple[dict[str, float], Tensor]:
        """KL and cross-entropy, nats per token, and ∂L/∂h ``[B, T, d]`` of the last block's outputs."""
        gradient, count = torch.empty_like(hidden), targets.numel()
        size = max(1, LOGITS // self.student.decoder.vocabulary)
        sums = {"kl": 0.0, "cross_entropy": 0.0}
        flat, into = hidden.flatten(0, 1), gradient.flatten(0, 1)
        for rows in _slices(count, size):
            part = flat[rows].detach().requires_grad_()
            with torch.enable_grad():
                loss, terms = self._terms(part, wanted.flatten(0, 1)[rows], targets.flatten()[rows])
                loss.backward()  # type: ignore[no-untyped-call]
            assert part.grad is not None
            into[rows] = part.grad / count
            for name, value in terms.items():
                sums[name] += value / count
        if self.student.gain.grad is not None:
            # Chunks add sums up; the rest of the model sees means.
            self.student.gain.grad /= count
        return sums, gradient

    def _terms(self, hidden: Tensor, wanted: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Sums over tokens ``[N, d]``: what is minimised, and its terms."""
        settings, given = self.settings, self.student.logits(hidden)
        own = given.log_softmax(-1)
        entropy = functional.nll_loss(own, targets, reduction="sum")
        taught = self.teacher.logits(wanted)
        if settings.temperature != 1:
            own, taught = (given / settings.temperature).log_softmax(-1), taught / settings.temperature
        kl = functional.kl_div(own, taught.log_softmax(-1), reduction="sum", log_target=True)
        loss = settings.kl * settings.temperature**2 * kl + settings.cross_entropy * entropy
        return loss, {"kl": float(kl.detach()), "cross_entropy": float(entropy.detach())}

    @torch.no_grad()
    def held_out(self) -> dict[str, float]:
        """``held_out_kl`` and ``held_out_perplexity`` of the student, on windows it does not train on."""
        rows = torch.stack(self.windows.held_out).to(self._device)
        sums = {"kl": 0.0, "cross_entropy": 0.0}
        for part in rows.split(1):
            inputs, targets = part[:, :-1], part[:, 1:]
            wanted, hidden = self.teacher.embed(inputs), self.student.embed(inputs)
            for index in range(len(self.student.decoder.layers)):
                wanted, hidden = self.teacher.block(index, wanted), self.student.block(index, hidden)
            for piece in _slices(targets.numel(), max(1, LOGITS // self.student.decoder.vocabulary)):
                _, terms = self._terms(
                    hidden.flatten(0, 1)[piece], wanted.flatten(0, 1)[piece], targets.flatten()[piece]
                )
                for name, value in terms.items():
                    sums[name] += value / (len(rows) * targets.numel())
        return {"held_out_kl": sums["kl"], "held_out_perplexity": math.exp(min(sums["cross_entropy"], 700.0))}


def _size(parameter: Tensor) -> float:
    """Root mean square of what is trained and not zero; 1 where all is zero."""
    value = parameter.detach()
    kept = int((value != 0).sum())
    return math.sqrt(float(value.square().sum()) / kept) if kept else 1.0


def _square_head(student: Tensor, teacher: Tensor) -> tuple[float, Tensor]:
    """MSE(h_s, h_t)/(mean h_t² + ε) of states ``[B, T, d]``, and its gradient with respect to h_s."""
    size = teacher.square().mean() + SquareHead.epsilon
    gap = student - teacher
    return float(gap.square().mean() / size), gap * (2 / (gap.numel() * size))


def _slices(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _graph_bytes(decoder: Decoder) -> int:
    """About what the graphs of all blocks hold per token: outputs and inputs of linears and norms, float32."""
    layer = decoder.layers[0]
    channels = sum(x.shape[0] + x.shape[1] for x in layer.linears()) + 6 * decoder.hidden
    return 4 * channels * len(decoder.layers)


def _fingerprint(
    source: Checkpoint, teacher: DenseModel, settings: Recover, windows: _Windows, seed: int, dtype: torch.dtype
) -> str:
    """Equal for runs that must end with the same bytes."""
    facts = [source.source.identity(), teacher.checkpoint.source.identity(), settings.model_dump(), seed, str(dtype)]
    return hashlib.sha256(json.dumps([*facts, windows.digest()], sort_keys=True).encode()).hexdigest()


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

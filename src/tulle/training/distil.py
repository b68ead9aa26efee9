"""The loop of recovery: a student learns from its teacher what compressing it has cost.

What is minimised, in nats per token, over windows of text:

    L = kl·T²·KL(p_t ‖ p_s) + squarehead·Σ_layers MSE(h_s, h_t)/(mean h_t² + ε) + cross_entropy·CE,

p_t and h_t the teacher's distribution of the next token and its hidden states (SquareHead, Kurtic et al. 2023, equation
2; the logits' term as in Hinton et al. 2015).

Blocks run one after the other, teacher and student side by side. The gradient of every term is known in closed form, so
that the backward pass needs one block's graph at a time: a block's inputs are kept and it is run once more (Chen et al.
2016, "Training Deep Nets with Sublinear Memory Cost"), or its graph is kept where all of them are small beside the
machine's memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tulle import machine
from tulle.compression.recipe import Recover
from tulle.errors import UserError
from tulle.methods.contract import Progress
from tulle.methods.train.squarehead import SquareHead
from tulle.models.checkpoint import read_json, write_text
from tulle.models.description import Decoder, Mixture
from tulle.training import checkpoint as checkpoints
from tulle.training.corpus import EpochOrder
from tulle.training.optim import learning_rates
from tulle.training.recipe import Training
from tulle.training.student import Student, Teacher

LOGITS = 1 << 25
"""Logits that are in memory at once."""
CACHED_LOGITS = 1 << 20
"""Logits that are worked on at a time: what the processor's cache holds."""
GRAPH_SHARE = 1 / 3
"""Share of the machine's memory up to which the graphs of all blocks are kept for the backward pass."""
CHECKPOINT_SECONDS = 300.0


class Windows:
    """Token windows ``[T + 1]`` to train on, in a seeded order of their own for every pass, and some held out."""

    def __init__(self, rows: list[Tensor], held_out: int, seed: int):
        self.held_out, self._train = rows[-held_out:], rows[:-held_out]
        self._order = EpochOrder(len(self._train), seed)

    def __len__(self) -> int:
        return len(self._train)

    def batch(self, step: int, size: int) -> Tensor:
        """int64 ``[size, T + 1]`` of a step."""
        return torch.stack([self._train[self._order[position]] for position in range(step * size, (step + 1) * size)])

    def digest(self) -> str:
        found = hashlib.sha256()
        for row in (*self._train, *self.held_out):
            found.update(row.numpy().tobytes())
        return found.hexdigest()


def training(settings: Recover) -> Training:
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


class Distillation:
    """The training loop."""

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        settings: Recover,
        windows: Windows,
        device: str,
        same_basis: bool,
    ):
        self.student, self.teacher, self.settings, self.windows = student, teacher, settings, windows
        self._device = device
        self._squarehead = settings.squarehead if same_basis else 0.0
        self._training = training(settings)
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
        # Of the terms since the curve's last point, and of how many steps.
        kept = {} if found is None else checkpoints.read_state(found)[1]
        sums: dict[str, float] = kept.get("sums", {})
        count: int = kept.get("count", 0)
        for step in range(start, steps):
            if progress:
                progress(f"recover {step}/{steps}", step, steps)
            for group in self._optimizer.param_groups:
                group["lr"] = rates[step] * group["size"]
            for name, value in self._step(step).items():
                sums[name] = sums.get(name, 0.0) + value
            count += 1
            done, now = step + 1, time.perf_counter()
            if done % self.settings.evaluate_every == 0 or done == steps:
                row = {"step": done, "tokens": done * self._training.step_tokens, "rate": rates[step]}
                row |= {name: value / count for name, value in sums.items()}
                record["curve"].append(row | self.held_out())
                sums, count = {}, 0
            if now - saved > CHECKPOINT_SECONDS or done == steps:
                record["seconds"] += now - saved
                saved = now
                write_text(file, json.dumps(record))
                checkpoints.save(folder, done, {"sums": sums, "count": count}, self.student, [self._optimizer])
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
            wanted = self.teacher.block(index, wanted, inputs)
            entry = hidden.detach().requires_grad_()
            with torch.set_grad_enabled(self._keeps_graphs):
                out = self.student.block(index, entry, inputs)
            hidden, pull = out.detach(), None
            if self._squarehead:
                width = self.student.decoder.hidden  # what stands beside the stream is left out
                value, pull = _square_head(hidden[..., :width], wanted[..., :width])
                squares += value
                pull = nn.functional.pad(pull * self._squarehead, (0, hidden.shape[-1] - width))
            trail.append((entry, out if self._keeps_graphs else None, pull))
        found, gradient = self._at_the_head(hidden, wanted, targets)
        for index in reversed(range(len(trail))):
            entry, kept, pull = trail.pop()
            if kept is None:
                with torch.enable_grad():
                    kept = self.student.block(index, entry, inputs)
            torch.autograd.backward(kept, gradient if pull is None else gradient + pull)
            assert entry.grad is not None
            gradient = entry.grad
        return found | ({"squarehead": squares} if self._squarehead else {})

    def _at_the_head(self, hidden: Tensor, wanted: Tensor, targets: Tensor) -> tuple[dict[str, float], Tensor]:
        """KL and cross-entropy, nats per token, and ∂L/∂h ``[B, T, d]`` of the last block's outputs."""
        gradient, count = torch.empty_like(hidden), targets.numel()
        into = gradient.flatten(0, 1)
        sums: dict[str, float] = {}
        for rows, part, given, taught in self._logits(hidden.detach(), wanted):
            terms = output_loss(given.detach(), taught, targets.flatten()[rows], self.settings)
            # ``given`` holds ∂L/∂given now.
            given.backward(given.detach())  # type: ignore[no-untyped-call]
            assert part.grad is not None
            into[rows] = part.grad / count
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value / count
        for parameter in self.student.norm.values():
            # Chunks add sums up; the rest of the model sees means.
            if parameter.grad is not None:
                parameter.grad /= count
        return sums, gradient

    @torch.no_grad()
    def held_out(self) -> dict[str, float]:
        """``held_out_kl`` and ``held_out_perplexity`` of the student, on windows it does not train on."""
        rows = torch.stack(self.windows.held_out).to(self._device)
        sums = {"kl": 0.0, "cross_entropy": 0.0}
        for part in rows.split(1):
            inputs, targets = part[:, :-1], part[:, 1:]
            wanted, hidden = self.teacher.embed(inputs), self.student.embed(inputs)
            for index in range(len(self.student.decoder.layers)):
                wanted = self.teacher.block(index, wanted, inputs)
                hidden = self.student.block(index, hidden, inputs)
            for piece, _, given, taught in self._logits(hidden, wanted):
                for name, value in output_loss(given.detach(), taught, targets.flatten()[piece], self.settings).items():
                    sums[name] += value / (len(rows) * targets.numel())
        return {"held_out_kl": sums["kl"], "held_out_perplexity": math.exp(min(sums["cross_entropy"], 700.0))}

    def _logits(self, hidden: Tensor, wanted: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Student's and teacher's logits ``[n, V]`` of states ``[B, T, d]`` after the last block, so many tokens at a
        time: the tokens, the student's states ``[n, d]`` (leaves of a graph), and both models' logits."""
        hidden, wanted = hidden.flatten(0, 1), wanted.flatten(0, 1)
        for rows in _slices(len(hidden), LOGITS // self.student.decoder.vocabulary):
            part = hidden[rows].detach().requires_grad_()
            with torch.enable_grad():
                given = self.student.logits(part)
            yield rows, part, given, self.teacher.logits(wanted[rows])


@torch.no_grad()
def output_loss(given: Tensor, taught: Tensor, targets: Tensor, settings: Recover) -> dict[str, float]:
    """Sums over tokens of KL(p_t ‖ p_s) at temperature T and of the cross-entropy, in nats.

    ``given`` and ``taught`` are logits ``[N, V]`` of student and teacher, ``targets`` int64 ``[N]``. ``given`` becomes
    the gradient of its part of L: kl·T·(p_s − p_t) + cross_entropy·(softmax(given) − onehot).
    """
    temperature, kl, entropy = settings.temperature, 0.0, 0.0
    for rows in _slices(len(given), CACHED_LOGITS // given.shape[1]):
        logits, wanted, places = given[rows], taught[rows], targets[rows, None]
        plain = logits.log_softmax(-1)
        entropy -= float(plain.gather(1, places).sum())
        own = plain if temperature == 1 else (logits / temperature).log_softmax(-1)
        wanted = (wanted / temperature).log_softmax(-1)
        share = wanted.exp()
        kl += float((wanted.sub_(own)).mul_(share).sum())
        torch.sub(own.exp(), share, out=logits).mul_(settings.kl * temperature)
        if settings.cross_entropy:
            logits.add_(plain.exp_(), alpha=settings.cross_entropy)
            logits.scatter_add_(1, places, torch.full_like(places, -settings.cross_entropy, dtype=logits.dtype))
    return {"kl": kl, "cross_entropy": entropy}


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
    size = max(1, size)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _graph_bytes(decoder: Decoder) -> int:
    """About what the graphs of all blocks hold per token: outputs and inputs of linears and norms, float32. Of experts
    those that a token goes to."""
    channels = 0
    for layer in decoder.layers:
        linears = [linear for group in layer.groups for linear in group.linears]
        if isinstance(layer.feed_forward, Mixture):
            linears += layer.experts[0].linears() * layer.feed_forward.router.chosen
        channels += sum(x.shape[0] + x.shape[1] for x in linears) + 6 * decoder.hidden
    return 4 * channels

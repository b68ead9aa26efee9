"""The block walker: the only code that runs calibration activations through a model.

Block by block: load, collect the statistics that the recipe's steps ask for, apply the steps row by row (qkv, o,
gate_up, down), run the *compressed* block to get the next block's inputs, free. Two streams of hidden states are
carried, the dense model's and the compressed model's; both live in files, so that memory is one block (dense and
compressed), one batch of activations and the statistics, and a killed run continues from the files.

**Fitting to the dense model.** A row sees inputs X of the compressed model, while the dense model would have given its
linears X̃. With ``target: dense`` the wanted output is T = X̃·Wᵀ; for ``stream``, o and down also take over the error
(H̃ − H) of the residual stream. The least-squares weight for that,

    W* = argmin ‖T − X·W*ᵀ‖² = W + R·(XᵀX + λI)⁻¹,   R = (T − X·Wᵀ)ᵀ·X,

replaces W before the steps run, and min ‖T − X·Ŵᵀ‖² is then min tr((W* − Ŵ)·H·(W* − Ŵ)ᵀ), which is what GPTQ and
SparseGPT already solve: no method needs to know. (The same aim as GPTAQ, Li et al. 2025, "asymmetric calibration".)
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from tulle.core.contract import GroupState, LinearState, Progress, Statistics
from tulle.core.hessian import Hessian
from tulle.errors import UserError
from tulle.models.anatomy import Anatomy, Row
from tulle.models.skeleton import Block
from tulle.recipe import Recipe
from tulle.simulate import fake_quantise_input

BATCH_TOKENS = 2048
"""Tokens per batch (at least one sequence): bounds the activations inside a block."""


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences of similar length. Attention is causal, so padding at the end changes no real token."""

    tokens: Tensor
    """int64 ``[B, T]``."""
    valid: Tensor
    """bool ``[B, T]``."""


def batched(sequences: Sequence[Tensor], budget: int = BATCH_TOKENS) -> list[Batch]:
    """Sequences, longest first, in batches of at most ``budget`` tokens including padding."""
    ordered = sorted(sequences, key=len, reverse=True)
    batches: list[Batch] = []
    start = 0
    while start < len(ordered):
        rows = ordered[start : start + max(1, budget // len(ordered[start]))]
        tokens = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        lengths = torch.tensor([len(r) for r in rows])
        batches.append(Batch(tokens, torch.arange(tokens.shape[1]) < lengths[:, None]))
        start += len(rows)
    return batches


class HiddenStates:
    """Hidden states ``[B, T, d]`` of every batch, float32, in one file.

    Reading goes through the page cache, so a small run never touches the disk, and a large one is spilled by the
    operating system.
    """

    def __init__(self, file: Path, batches: Sequence[Batch], width: int):
        self.file = file
        self._shapes = [(*b.tokens.shape, width) for b in batches]
        sizes = [4 * s[0] * s[1] * s[2] for s in self._shapes]
        self._offsets = [sum(sizes[:i]) for i in range(len(sizes))]
        self.bytes = sum(sizes)

    def write(self, index: int, hidden: Tensor) -> None:
        with open(self.file, "r+b" if self.file.exists() else "w+b") as handle:
            handle.seek(self._offsets[index])
            handle.write(hidden.detach().float().cpu().contiguous().numpy().data)

    def read(self, index: int) -> Tensor:
        shape = self._shapes[index]
        buffer = bytearray(4 * shape[0] * shape[1] * shape[2])
        with open(self.file, "rb") as handle:
            handle.seek(self._offsets[index])
            if handle.readinto(buffer) != len(buffer):
                raise UserError(
                    f"expected {self.bytes} bytes of activations in {self.file}, found fewer; start without --resume"
                )
        return torch.frombuffer(buffer, dtype=torch.float32).reshape(shape)

    def is_whole(self) -> bool:
        return self.file.exists() and self.file.stat().st_size == self.bytes


@dataclass
class BlockResult:
    """A compressed block: its linears' final states and what it cost."""

    index: int
    linears: list[LinearState]
    output_errors: dict[str, float]
    """Σ|ŷ − y|²/Σ|y|² per linear, dense model against compressed model, over all calibration tokens."""
    block_error: float
    """The same for the hidden states after the block."""
    seconds: dict[str, float]
    """``load``, ``forward``, ``statistics``, and one entry per step name."""
    linear_seconds: dict[str, float] = field(default_factory=dict)


class Walker:
    """Walks the blocks of one model. ``block(i)`` needs the hidden states that ``begin`` or ``block(i − 1)`` left."""

    def __init__(
        self,
        config: PretrainedConfig,
        model: Anatomy,
        recipe: Recipe,
        batches: Sequence[Batch],
        folder: Path,
        device: str = "cpu",
        progress: Progress | None = None,
    ):
        self._config, self._model, self._recipe, self._batches = config, model, recipe, batches
        self._folder, self._device, self._progress = folder, device, progress
        self._seconds: dict[str, float] = {}

    def states(self, path: str, block: int) -> HiddenStates:
        """Inputs of ``block`` on the ``dense`` or the ``compressed`` path; the same file for block 0."""
        return HiddenStates(
            self._folder / f"{path if block else 'dense'}-{block}.bin", self._batches, self._model.hidden
        )

    def begin(self, embedding: Tensor) -> None:
        """Looks the tokens up in the embedding ``[V, d]``."""
        states = self.states("dense", 0)
        for i, batch in enumerate(self._batches):
            states.write(i, nn.functional.embedding(batch.tokens, embedding))

    @torch.no_grad()
    def block(self, index: int, tensors: Mapping[str, Tensor]) -> BlockResult:
        """Compresses block ``index`` (tensors by relative name) and leaves the next block's inputs."""
        self._seconds = defaultdict(float)
        weights = {name: t.float().to(self._device) for name, t in tensors.items()}
        # Both share every tensor; a compressed linear gets a new one.
        dense, compressed = (Block(self._config, index, weights, self._device) for _ in range(2))
        prefix = self._model.block_prefix(index)
        rows = [row for row in self._model.rows if self._recipe.steps_for(row.role)]
        linears: list[LinearState] = []
        linear_seconds: dict[str, float] = {}
        statistics = None if self._recipe.calibration.sequential else self._collect(dense, compressed, rows, index)
        for number, row in enumerate(rows):
            self._report(index, number, row.role)
            found = statistics or self._collect(dense, compressed, [row], index)
            group = self._group(row, found.pop(row.role), compressed.module, weights, prefix)
            begun = time.perf_counter()
            for step in self._recipe.steps_for(row.role):
                with self._timed(step.name):
                    step.method.apply(group)
            for state in group.linears:
                relative = state.name.removeprefix(prefix)
                self._finish(compressed.module.get_submodule(relative), state, tensors[f"{relative}.weight"].dtype)
                linear_seconds[state.name] = (time.perf_counter() - begun) / len(group.linears)
            linears += group.linears
            group.statistics = Statistics()
        self._report(index, len(rows), "propagate")
        with self._timed("forward"):
            errors, block_error = self._propagate(dense, compressed, index)
        return BlockResult(index, linears, errors, block_error, dict(self._seconds), linear_seconds)

    def _collect(
        self, dense: Block, compressed: Block, rows: Sequence[Row], index: int
    ) -> dict[str, tuple[Statistics, dict[str, Tensor]]]:
        """Per role: the statistics of the row's input and R ``[C_out, C_in]`` of each linear (see above)."""
        needs = {row.role: self._needs(row) for row in rows}
        fit = {role: "hessian" in n and self._recipe.calibration.target != "layer" for role, n in needs.items()}
        found: dict[str, tuple[Statistics, dict[str, Tensor]]] = {row.role: (Statistics(), {}) for row in rows}
        rows = [row for row in rows if needs[row.role]]
        if not rows:
            return found
        for i, batch in enumerate(self._batches):
            valid = batch.valid.to(self._device)
            with self._timed("forward"):
                inputs = self._capture(compressed, self.states("compressed", index).read(i), rows)
                wanted = [row for row in rows if fit[row.role]]
                dense_inputs = self._capture(dense, self.states("dense", index).read(i), wanted) if wanted else {}
            with self._timed("statistics"):
                for row in rows:
                    x, stream = inputs.pop(row.role)
                    statistics, cross = found[row.role]
                    _accumulate(statistics, x[valid], needs[row.role])
                    if not fit[row.role]:
                        continue
                    dense_x, dense_stream = dense_inputs.pop(row.role)
                    lag = None
                    if self._recipe.calibration.target == "stream" and stream is not None and dense_stream is not None:
                        lag = (dense_stream - stream)[valid]
                    difference = dense_x[valid] - x[valid]
                    for name in row.linears:
                        # The biases cancel.
                        gap = nn.functional.linear(difference, dense.module.get_parameter(f"{name}.weight"))
                        gap = gap if lag is None else gap + lag
                        if name not in cross:
                            cross[name] = torch.zeros(gap.shape[1], x.shape[-1], device=gap.device)
                        cross[name].addmm_(gap.T, x[valid])
        return found

    def _needs(self, row: Row) -> frozenset[str]:
        return frozenset().union(*(step.method.needs for step in self._recipe.steps_for(row.role)))

    def _capture(self, block: Block, hidden: Tensor, rows: Sequence[Row]) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Inputs of the rows' linears, and the residual stream they are added to, by role; stops after the last."""
        inputs: dict[str, Tensor] = {}
        streams: dict[str, Tensor] = {}
        handles = []

        def keep(row: Row, last: bool) -> Any:
            def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
                inputs[row.role] = arguments[0]
                if last:
                    raise _Stop

            return hook

        def keep_stream(row: Row) -> Any:
            def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
                streams[row.role] = arguments[0]

            return hook

        for row in rows:
            handles.append(
                block.module.get_submodule(row.linears[0]).register_forward_pre_hook(keep(row, row is rows[-1]))
            )
            if row.residual:
                handles.append(block.module.get_submodule(row.residual).register_forward_pre_hook(keep_stream(row)))
        try:
            block(hidden.to(self._device))
        except _Stop:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return {role: (x, streams.get(role)) for role, x in inputs.items()}

    def _group(
        self,
        row: Row,
        found: tuple[Statistics, dict[str, Tensor]],
        block: nn.Module,
        weights: Mapping[str, Tensor],
        prefix: str,
    ) -> GroupState:
        statistics, cross = found
        linears = []
        for name in row.linears:
            weight = weights[f"{name}.weight"]
            fitted = weight.clone()
            if name in cross and statistics.hessian is not None:
                with self._timed("statistics"):
                    fitted += _least_squares(
                        cross.pop(name), statistics.hessian, self._recipe.calibration.target_damping
                    )
            linears.append(LinearState(name=prefix + name, weight=fitted, dense=weight, role=row.role))
        return GroupState(row.role, linears, statistics, block)

    def _finish(self, module: nn.Module, state: LinearState, dtype: torch.dtype) -> None:
        """Puts the effective weight, as it will be stored, into the compressed block."""
        if state.quantised is None:
            state.weight = state.weight.to(dtype).float()
        if not bool(torch.isfinite(state.weight).all()):
            raise UserError(
                f"expected finite weights after the recipe's steps, found NaN or Inf in {state.name}; raise the damping"
            )
        module.weight = nn.Parameter(state.weight, requires_grad=False)
        if state.input_bits is not None:
            bits = state.input_bits
            module.register_forward_pre_hook(lambda _, arguments: (fake_quantise_input(arguments[0], bits),))

    def _propagate(self, dense: Block, compressed: Block, index: int) -> tuple[dict[str, float], float]:
        """Runs both blocks, leaves their outputs as the next block's inputs, and compares every linear's output."""
        names = [name for row in self._model.rows for name in row.linears]
        gap = _Gap()
        for i, batch in enumerate(self._batches):
            gap.valid = batch.valid.to(self._device)
            hidden = self.states("dense", index).read(i).to(self._device)
            reference = self._run(dense, hidden, names, gap.keep)
            hidden = self.states("compressed", index).read(i).to(self._device)
            hidden = self._run(compressed, hidden, names, gap.compare)
            gap.keep("", reference)
            gap.compare("", hidden)
            self.states("dense", index + 1).write(i, reference)
            self.states("compressed", index + 1).write(i, hidden)
        prefix = self._model.block_prefix(index)
        return {prefix + name: gap.share(name) for name in names}, gap.share("")

    @staticmethod
    def _run(block: Block, hidden: Tensor, names: Sequence[str], see: Any) -> Tensor:
        """Runs the block; ``see(name, output)`` for each linear."""
        handles = [
            block.module.get_submodule(name).register_forward_hook(lambda m, a, y, name=name: see(name, y))
            for name in names
        ]
        try:
            return block(hidden)
        finally:
            for handle in handles:
                handle.remove()

    def _timed(self, stage: str) -> _Timer:
        return _Timer(self._seconds, stage)

    def _report(self, index: int, number: int, what: str) -> None:
        if self._progress:
            per_block = len(self._model.rows) + 1
            self._progress(
                f"block {index + 1}/{self._model.layers} {what}",
                index * per_block + number,
                self._model.layers * per_block,
            )


class _Stop(Exception):
    """Ends a forward pass once the last wanted input has been seen."""


class _Gap:
    """Σ|ŷ − y|² and Σ|y|² per name: ``keep`` a reference output, then ``compare`` the other model's with it."""

    def __init__(self) -> None:
        self.valid = torch.empty(0)
        self._kept: dict[str, Tensor] = {}
        self._lost: dict[str, float] = defaultdict(float)
        self._total: dict[str, float] = defaultdict(float)

    def keep(self, name: str, y: Tensor) -> None:
        self._kept[name] = y[self.valid]

    def compare(self, name: str, y: Tensor) -> None:
        reference = self._kept.pop(name)
        self._lost[name] += float((y[self.valid] - reference).square().sum())
        self._total[name] += float(reference.square().sum())

    def share(self, name: str) -> float:
        return self._lost[name] / max(self._total[name], 1e-30)


@dataclass
class _Timer:
    seconds: dict[str, float]
    stage: str
    begun: float = 0.0

    def __enter__(self) -> None:
        self.begun = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.stage] += time.perf_counter() - self.begun


def _accumulate(statistics: Statistics, x: Tensor, needs: frozenset[str]) -> None:
    statistics.tokens += x.shape[0]
    if "hessian" in needs:
        if statistics.hessian is None:
            statistics.hessian = Hessian.zeros(x.shape[1], x.device)
        statistics.hessian.add(x)
    if "column_norm" in needs:
        squares = x.square().sum(0)
        old = statistics.column_norm
        statistics.column_norm = squares.sqrt() if old is None else (old.square() + squares).sqrt()
    if "absmax" in needs:
        peak = x.abs().amax(0)
        statistics.absmax = peak if statistics.absmax is None else torch.maximum(statistics.absmax, peak)


def _least_squares(cross: Tensor, hessian: Hessian, damping: float) -> Tensor:
    """R·(XᵀX + λI)⁻¹ ``[C_out, C_in]``, from R = Σ gap·xᵀ and H = 2·XᵀX/T."""
    return hessian.solve(cross * (2.0 / hessian.tokens), damping)

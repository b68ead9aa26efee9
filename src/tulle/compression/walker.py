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

**Transforms and quantised activations.** The recipe's block steps run first, on the whole block: what they fold into
neighbours changes the dense block too (the same function), what runs on activations (transforms, quantisers of inputs,
of keys and values) stands in front of the compressed block's linears while their statistics are taken. X above is then
the transformed and rounded input, and W starts from W·T⁻ᵀ.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from tulle.compression.recipe import Recipe, Step
from tulle.core.grid import all_finite
from tulle.core.hessian import Hessian
from tulle.core.masks import PATTERNS, Pattern, follows, zero_share
from tulle.core.rotation import Extremes
from tulle.core.sample import Reservoir
from tulle.core.token_grid import TokenGrid
from tulle.core.topk import Selection
from tulle.core.transform import Transform
from tulle.errors import UserError
from tulle.hf.attention import IMPLEMENTATION, attach
from tulle.inspect.activity import Counter, columns_of, counting
from tulle.methods.contract import (
    BlockState,
    CompressedBlock,
    GroupState,
    HeadGrids,
    LinearState,
    Progress,
    Stage,
    Statistic,
    Statistics,
)
from tulle.models.anatomy import Anatomy, Row
from tulle.models.batches import Batch, HiddenStates, batched
from tulle.models.hooks import Gap, QuantisedInput, capture, run_compared, run_with_stream
from tulle.models.skeleton import Block

SPARSE_FROM = 0.01
"""Share of exact zeros from which on a linear of a checkpoint counts as pruned."""
FILLED = "the checkpoint's zeros are filled by a rotation or another map of its inputs; leave it out to keep them"

__all__ = ["Batch", "BlockResult", "HiddenStates", "Walker", "batched"]


SAMPLE = 2048
"""Tokens of an unbiased sample of a row's input."""


@dataclass
class BlockResult:
    """A compressed block: its linears' final states and what it cost."""

    index: int
    linears: list[LinearState]
    tensors: dict[str, Tensor]
    """Norm gains and biases by relative name, float32, where a step changed them."""
    output_errors: dict[str, float]
    """Σ|ŷ − y|²/Σ|y|² per linear, dense model against compressed model, over all calibration tokens."""
    block_error: float
    """The same for the hidden states after the block."""
    seconds: dict[str, float]
    """``load``, ``forward``, ``statistics``, and one entry per step name."""
    linear_seconds: dict[str, float] = field(default_factory=dict)
    attention: HeadGrids | None = None
    notes: list[str] = field(default_factory=list)
    """Of the block steps."""
    permutations: list[dict[str, Any]] = field(default_factory=list)
    """What channel permutations retained, per role."""
    activity: list[dict[str, Any]] = field(default_factory=list)
    """What the tokens read, per role, in a block whose inputs are selected (:mod:`tulle.inspect.activity`)."""


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
        seed: int = 0,
    ):
        self._config, self._model, self._recipe, self._batches = config, model, recipe, batches
        self._folder, self._device, self._progress, self._seed = folder, device, progress, seed
        self._dtype = getattr(torch, recipe.calibration.compute)
        self._seconds: dict[str, float] = {}
        self.kept: dict[str, int] = {}
        """Mixed precision: full linear name → bits."""
        self.kept_inputs: dict[str, int] = {}
        self.sparsity: dict[str, float] = {}
        """Allocation: full linear name → share to prune."""
        self.input_sparsity: dict[str, float] = {}
        """Allocation: full linear name → share of inputs to drop."""
        self.residual: tuple[Transform, ...] = ()
        """Maps of the residual stream that the tensors given to :meth:`block` already have."""

    def states(self, path: str, block: int) -> HiddenStates:
        """Inputs of ``block`` on the ``dense`` or the ``compressed`` path; the same file for block 0."""
        return HiddenStates(
            self._folder / f"{path if block else 'dense'}-{block}.bin", self._batches, self._model.hidden
        )

    def _hidden(self, path: str, block: int, batch: int) -> Tensor:
        return self.states(path, block).read(batch).to(self._device)

    def begin(self, embedding: Tensor) -> None:
        """Looks the tokens up in the embedding ``[V, d]``."""
        states = self.states("dense", 0)
        for i, batch in enumerate(self._batches):
            states.write(i, nn.functional.embedding(batch.tokens, embedding))

    @torch.no_grad()
    def block(
        self, index: int, tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype] | None = None
    ) -> BlockResult:
        """Compresses block ``index`` (tensors by relative name) and leaves the next block's inputs.

        ``dtypes``: what each tensor is stored as if nothing quantises it; None: its own.
        """
        dtypes = dtypes or {name: tensor.dtype for name, tensor in tensors.items()}
        self._seconds = defaultdict(float)
        weights = {name: t.float().to(self._device) for name, t in tensors.items()}
        names = {name: self._model.block_prefix(index) + name for row in self._model.rows for name in row.linears}
        block_steps = self._recipe.stage("block")
        attention, notes, permutations = None, [], []
        if block_steps:
            state = self._prepare(index, tensors, weights, block_steps)
            attention, notes, permutations = state.attention, state.notes, state.permutations
            groups = state.groups
            changed = self._rewritten(state, weights)
            weights |= changed
        else:
            groups = {}
            for row in self._model.rows:
                if self._recipe.steps_for(row.role, "linear") or self._recipe.stage("model"):
                    groups[row.role] = self._group(row, index, weights, Statistics(), None)
            changed = {}
        # Both share every tensor; a compressed linear gets a new one.
        cast = {name: tensor.to(self._dtype) for name, tensor in weights.items()}
        dense, compressed = (
            self._block(index, cast, implementation)
            for implementation in ("sdpa", IMPLEMENTATION if attention else "sdpa")
        )
        self._attach(compressed, attention)
        linear_seconds: dict[str, float] = {}
        dtype = {name: dtypes[f"{name}.weight"] for name in names}
        untouched = [r for r in groups if not self._recipe.steps_for(r, "linear")]
        for role, group in groups.items():
            group.block = compressed.module
            group.statistics = Statistics()
            for linear in group.linears:
                linear.kept_bits = self.kept.get(linear.name)
                linear.allotted = self.sparsity.get(linear.name)
                linear.weight = linear.folded() if linear.transform else linear.dense
                hold_zeros(linear)
                self._install(compressed.module.get_submodule(self._relative(linear)), linear)
            self._share_inputs(compressed.module, group)
            if role in untouched:
                for linear in group.linears:
                    self._finish(compressed.module, linear, dtype[self._relative(linear)])
        rows = [row for row in self._model.rows if row.role in groups and row.role not in untouched]
        fitted: set[str] = set()
        for steps, refining in self._recipe.phases():
            phase = [row for row in rows if any(row.role in step.targets for step in steps)]
            fit = {row.role for row in phase} - fitted
            statistics = None
            if not self._recipe.calibration.sequential:
                statistics = self._collect(dense, compressed, phase, groups, index, fit=fit)
            for row in phase:
                self._report(index, rows.index(row), row.role)
                found = statistics or self._collect(dense, compressed, [row], groups, index, fit=fit)
                group = groups[row.role]
                group.statistics, cross = found.pop(row.role)
                self._fit(group, cross)
                begun = time.perf_counter()
                for step in steps:
                    if row.role in step.targets:
                        with self._timed(step.name):
                            step.method.apply(group)
                for linear in group.linears:
                    self._finish(compressed.module, linear, dtype[self._relative(linear)])
                    spent = (time.perf_counter() - begun) / len(group.linears)
                    linear_seconds[linear.name] = linear_seconds.get(linear.name, 0.0) + spent
                group.statistics = Statistics()
            fitted |= {row.role for row in phase}
            for step in refining:
                self._report(index, len(rows), step.name)
                with self._timed(step.name):
                    self._refine(step, dense, compressed, groups, index, dtype, notes)
        self._report(index, len(rows), "propagate")
        sparse = any(linear.input_selection for group in groups.values() for linear in group.linears)
        counters = self._counters(compressed) if sparse else {}
        with self._timed("forward"):
            errors, block_error = self._propagate(dense, compressed, index, counters)
        linears = [linear for row in self._model.rows if row.role in groups for linear in groups[row.role].linears]
        for linear in linears:
            linear_seconds.setdefault(linear.name, 0.0)
        kept = {name: tensor for name, tensor in changed.items() if name.removesuffix(".weight") not in names}
        return BlockResult(
            index, linears, kept, errors, block_error, dict(self._seconds), linear_seconds, attention, notes,
            permutations, [{"role": role} | counter.result() for role, counter in counters.items()],
        )  # fmt: skip

    def _prepare(
        self, index: int, tensors: Mapping[str, Tensor], weights: dict[str, Tensor], steps: Sequence[Step]
    ) -> BlockState:
        """Runs the recipe's block steps on the block, its inputs seen once, before any of them."""
        block = self._block(index, tensors)
        rows = {row.role: row for row in self._model.rows}
        needs = {role: self._needs(role, "block") for role in rows}
        found = self._collect(block, block, [row for row in rows.values() if needs[row.role]], {}, index, "block")
        groups = {
            role: self._group(row, index, weights, found[role][0] if role in found else Statistics(), block.module)
            for role, row in rows.items()
        }
        prefix = self._model.block_prefix(index)
        by_name = {linear.name: linear for group in groups.values() for linear in group.linears}
        for group in groups.values():
            for linear in group.linears:
                linear.allotted_inputs = self.input_sparsity.get(linear.name)
        state = BlockState(
            index=index,
            groups=groups,
            gains={role: weights[f"{row.norm}.weight"] for role, row in rows.items() if row.norm},
            biases={
                n: weights[f"{n.removeprefix(prefix)}.bias"]
                for n in by_name
                if f"{n.removeprefix(prefix)}.bias" in weights
            },
            producers={role: tuple(by_name[prefix + n] for n in row.producers) for role, row in rows.items()},
            heads=self._model.heads,
            kv_heads=self._model.kv_heads,
            head_dim=self._model.head_dim,
            seed=self._seed,
            residual=self.residual,
        )
        outputs: list[Tensor] = []
        for step in steps:
            self._report(index, 0, step.name)
            with self._timed(step.name):
                if step.method.learns:
                    outputs = outputs or self._dense_outputs(index, weights)
                    current = Block(
                        self._config,
                        index,
                        weights | self._rewritten(state, weights),
                        self._device,
                        IMPLEMENTATION if state.attention else "sdpa",
                    )
                    self._attach(current, state.attention)
                    state.module, state.forward = current.module, current.__call__
                    state.batches = partial(self._learning_batches, index, outputs)
                step.method.prepare(state, step.targets)
        for group in groups.values():
            for linear in group.linears:
                bits = self.kept_inputs.get(linear.name)
                if bits is not None and linear.input_grid is not None:
                    linear.input_grid = None if bits >= 16 else replace(linear.input_grid, bits=bits)
        return state

    def _refine(
        self,
        step: Step,
        dense: Block,
        compressed: Block,
        groups: Mapping[str, GroupState],
        index: int,
        dtype: Mapping[str, torch.dtype],
        notes: list[str],
    ) -> None:
        """Runs a refine step on the compressed block, in float32, and puts its linears back as they will be stored."""
        middle = self._model.row("down").residual
        assert middle is not None
        wanted = [run_with_stream(dense, self._hidden("dense", index, i), middle) for i in range(len(self._batches))]

        def batches() -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
            for i, batch in enumerate(self._batches):
                yield self._hidden("compressed", index, i), *wanted[i], batch.valid.to(self._device)

        compressed.to(torch.float32)
        touched = {role: group for role, group in groups.items() if role in step.targets}
        modules: dict[str, nn.Linear] = {}
        for group in touched.values():
            for linear in group.linears:
                module = compressed.module.get_submodule(self._relative(linear))
                assert isinstance(module, nn.Linear)
                modules[linear.name] = module

        def forward(hidden: Tensor) -> tuple[Tensor, Tensor]:
            return run_with_stream(compressed, hidden, middle)

        state = CompressedBlock(index, touched, compressed.module, modules, forward, batches)
        step.method.refine(state, step.targets)
        notes += state.notes
        compressed.to(self._dtype)
        for group in touched.values():
            for linear in group.linears:
                self._finish(compressed.module, linear, dtype[self._relative(linear)])

    def _dense_outputs(self, index: int, weights: Mapping[str, Tensor]) -> list[Tensor]:
        block = self._block(index, weights)
        return [block(self._hidden("dense", index, i)) for i in range(len(self._batches))]

    def _learning_batches(self, index: int, outputs: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for i, batch in enumerate(self._batches):
            yield self._hidden("compressed", index, i), outputs[i], batch.valid.to(self._device)

    def _rewritten(self, state: BlockState, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The block's tensors that block steps changed, by relative name."""
        prefix = self._model.block_prefix(state.index)
        tensors = {f"{n.removeprefix(prefix)}.bias": bias for n, bias in state.biases.items()}
        for row in self._model.rows:
            if row.norm:
                tensors[f"{row.norm}.weight"] = state.gains[row.role]
            for linear in state.groups[row.role].linears:
                tensors[f"{self._relative(linear)}.weight"] = linear.dense
        return {name: tensor for name, tensor in tensors.items() if tensor is not weights[name]}

    def _block(self, index: int, weights: Mapping[str, Tensor], attention: str = "sdpa") -> Block:
        return Block(self._config, index, weights, self._device, attention, self._dtype)

    def _attach(self, block: Block, attention: HeadGrids | None) -> None:
        if attention is not None:
            attach(block.module.get_submodule(self._model.attention), attention)

    def _collect(
        self,
        dense: Block,
        compressed: Block,
        rows: Sequence[Row],
        groups: Mapping[str, GroupState],
        index: int,
        stage: Stage = "linear",
        fit: Set[str] = frozenset(),
    ) -> dict[str, tuple[Statistics, dict[str, Tensor]]]:
        """Per role: the statistics of the row's input and, for roles to ``fit`` to the dense model, R ``[C_out, C_in]``
        of each linear (see above)."""
        needs = {row.role: self._needs(row.role, stage) for row in rows}
        target = self._recipe.calibration.target
        fits = {role: role in fit and "hessian" in n and target != "layer" for role, n in needs.items()}
        found: dict[str, tuple[Statistics, dict[str, Tensor]]] = {row.role: (Statistics(), {}) for row in rows}
        samplers: dict[str, Extremes] = {}
        drawn: dict[str, Reservoir] = {}
        rows = [row for row in rows if needs[row.role]]
        if not rows:
            return found
        for i, batch in enumerate(self._batches):
            valid = batch.valid.to(self._device)
            with self._timed("forward"):
                inputs = capture(compressed, self._hidden("compressed", index, i), rows)
                wanted = [row for row in rows if fits[row.role]]
                dense_inputs = {} if not wanted else capture(dense, self._hidden("dense", index, i), wanted)
            with self._timed("statistics"):
                for row in rows:
                    x, stream = inputs.pop(row.role)
                    statistics, cross = found[row.role]
                    x = x[valid].float()
                    statistics.add(x, needs[row.role])
                    if "rows" in needs[row.role]:
                        samplers.setdefault(row.role, Extremes(x.shape[-1], seed=self._seed)).add(x)
                    if "sample" in needs[row.role]:
                        drawn.setdefault(row.role, Reservoir(SAMPLE, self._seed)).add(x)
                    if not fits[row.role]:
                        continue
                    dense_x, dense_stream = dense_inputs.pop(row.role)
                    lag = None
                    if target == "stream" and stream is not None and dense_stream is not None:
                        lag = (dense_stream - stream)[valid].float()
                    dense_x = dense_x[valid].float()
                    for name, linear in zip(row.linears, groups[row.role].linears, strict=True):
                        # The biases cancel.
                        if linear.transform:
                            gap = nn.functional.linear(dense_x, linear.dense)
                            gap -= nn.functional.linear(x, linear.weight)
                        else:
                            gap = nn.functional.linear(dense_x - x, linear.dense)
                        gap = gap if lag is None else gap + lag
                        if name not in cross:
                            cross[name] = torch.zeros(gap.shape[1], x.shape[-1], device=gap.device)
                        cross[name].addmm_(gap.T, x)
        for role, sampler in samplers.items():
            found[role][0].rows = sampler.rows
        for role, reservoir in drawn.items():
            found[role][0].sample = reservoir.rows
        return found

    def _needs(self, role: str, stage: Stage) -> frozenset[Statistic]:
        return frozenset().union(*(step.method.needs for step in self._recipe.steps_for(role, stage)))

    def _group(
        self, row: Row, index: int, weights: Mapping[str, Tensor], statistics: Statistics, block: nn.Module | None
    ) -> GroupState:
        prefix = self._model.block_prefix(index)
        linears = []
        for name in row.linears:
            weight = weights[f"{name}.weight"]
            linears.append(LinearState(name=prefix + name, weight=weight, dense=weight, role=row.role))
        return GroupState(row.role, linears, statistics, block if block is not None else nn.Identity())

    def _relative(self, linear: LinearState) -> str:
        """Name within the block."""
        for row in self._model.rows:
            for name in row.linears:
                if linear.name.endswith("." + name):
                    return name
        raise KeyError(linear.name)

    def _fit(self, group: GroupState, cross: dict[str, Tensor]) -> None:
        """Gives each linear W* for W where the recipe fits to the dense model."""
        hessian = group.statistics.hessian
        for linear in group.linears:
            gap = cross.pop(self._relative(linear), None)
            if gap is not None and hessian is not None:
                with self._timed("statistics"):
                    fit = _least_squares(gap, hessian, self._recipe.calibration.target_damping)
                    linear.weight = linear.weight + fit

    def _install(self, module: nn.Module, linear: LinearState) -> None:
        module.weight = nn.Parameter(linear.weight.to(self._dtype), requires_grad=False)

    def _share_inputs(self, block: nn.Module, group: GroupState) -> None:
        """Transforms and quantisers in front of a group's linears; siblings see one result."""
        hooks: dict[tuple[TokenGrid | None, Selection | None], QuantisedInput] = {}
        for linear in group.linears:
            if linear.transform or linear.input_grid or linear.input_selection:
                found = (linear.input_grid, linear.input_selection)
                hook = hooks.setdefault(found, QuantisedInput(linear.transform, *found))
                block.get_submodule(self._relative(linear)).register_forward_pre_hook(hook)

    def _finish(self, block: nn.Module, state: LinearState, dtype: torch.dtype) -> None:
        """Puts the effective weight, as it will be stored, into the compressed block."""
        module = block.get_submodule(self._relative(state))
        if state.quantised is None:
            state.weight = state.weight.to(dtype).float()
        if not all_finite(state.weight):
            raise UserError(
                f"expected finite weights after the recipe's steps, found NaN or Inf in {state.name}; raise the damping"
            )
        self._install(module, state)
        found = {key: hook for key, hook in module._forward_pre_hooks.items() if isinstance(hook, QuantisedInput)}
        if state.input_grid is not None and all(hook.grid is None for hook in found.values()):
            # A linear step brought its own quantiser.
            for key in found:
                del module._forward_pre_hooks[key]
            module.register_forward_pre_hook(QuantisedInput(state.transform, state.input_grid, state.input_selection))

    def _counters(self, block: Block) -> dict[str, Counter]:
        """One per role, to count what the tokens read of the block as it will be stored."""
        found = {}
        for row in self._model.rows:
            weights = [block.module.get_submodule(name).weight for name in row.linears]
            found[row.role] = Counter(columns_of(weights))  # type: ignore[arg-type]
        return found

    def _propagate(
        self, dense: Block, compressed: Block, index: int, counters: Mapping[str, Counter]
    ) -> tuple[dict[str, float], float]:
        """Runs both blocks, leaves their outputs as the next block's inputs, and compares every linear's output.

        Counts what the tokens read of the roles in ``counters``.
        """
        names = [name for row in self._model.rows for name in row.linears]
        gap = Gap()
        for i, batch in enumerate(self._batches):
            gap.valid = batch.valid.to(self._device)
            hidden = self._hidden("dense", index, i)
            reference = run_compared(dense, hidden, names, gap.keep)
            hidden = self._hidden("compressed", index, i)
            with counting(compressed.module, self._model.rows, counters, gap.valid):
                hidden = run_compared(compressed, hidden, names, gap.compare)
            gap.keep("", reference)
            gap.compare("", hidden)
            self.states("dense", index + 1).write(i, reference)
            self.states("compressed", index + 1).write(i, hidden)
        prefix = self._model.block_prefix(index)
        return {prefix + name: gap.share(name) for name in names}, gap.share("")

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


@dataclass
class _Timer:
    seconds: dict[str, float]
    stage: str
    begun: float = 0.0

    def __enter__(self) -> None:
        self.begun = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.stage] += time.perf_counter() - self.begun


def hold_zeros(linear: LinearState) -> None:
    """Takes the zeros of a checkpoint that was pruned before for the linear's mask, which every method keeps.

    A transform that mixes channels has filled them by now; the report says so.
    """
    if linear.mask is not None or zero_share(linear.dense) < SPARSE_FROM:
        return
    if zero_share(linear.weight) < SPARSE_FROM:
        linear.notes.append(FILLED)
        return
    linear.mask = linear.weight != 0
    linear.pattern = next((text for text in PATTERNS if follows(linear.mask, Pattern.parse(text))), None)


def _least_squares(cross: Tensor, hessian: Hessian, damping: float) -> Tensor:
    """R·(XᵀX + λI)⁻¹ ``[C_out, C_in]``, from R = Σ gap·xᵀ and H = 2·XᵀX/T."""
    return hessian.solve(cross * (2.0 / hessian.tokens), damping)

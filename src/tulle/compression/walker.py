"""The block walker: the only code that runs calibration activations through a model.

Block by block: prepare (load, block steps), compress the groups of linears one after the other (qkv, o, gate_up, down:
statistics of the group's input, then the recipe's linear steps), propagate (the outputs of the *compressed* block are
the next block's inputs), free. Two streams of hidden states are carried, the dense model's and the compressed model's;
both lie in files between blocks, so that a killed run continues from there. Inside a block every batch is parked at the
group that is compressed (:mod:`tulle.compression.block_pass`): each stream costs one forward pass per block.

**Fitting to the dense model.** Before a group's steps run, its weights are fitted to what the dense model would give
(:mod:`tulle.compression.fitting`).

**Transforms and quantised activations.** The recipe's block steps run first, on the whole block: what they fold into
neighbours changes the dense block too (the same function); what runs on activations (transforms, quantisers of inputs,
of keys and values) stands in front of the compressed block's linears while their statistics are taken. For the fit, X
is then the transformed and rounded input, X̃ the transformed one, and W is W·T⁻ᵀ.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tulle.compression.block_pass import Gap, ParkedBatches, advance
from tulle.compression.fitting import Mismatch, fit_to_dense
from tulle.compression.hidden_states import HiddenStates, Parking
from tulle.compression.recipe import Recipe, Step
from tulle.core.activity import Counter, columns_of
from tulle.core.grid import all_finite
from tulle.core.head_grids import HeadGrids
from tulle.core.masks import PATTERNS, Pattern, follows, zero_share
from tulle.core.quantised_input import QuantisedInput
from tulle.core.rotation import Extremes
from tulle.core.sample import Reservoir
from tulle.core.token_grid import TokenGrid
from tulle.core.topk import Selection
from tulle.core.transform import run
from tulle.errors import UserError
from tulle.machine import memory_bytes
from tulle.methods.contract import (
    BlockState,
    CompressedBlock,
    Decisions,
    GroupState,
    LinearState,
    ProducedRows,
    Progress,
    Statistic,
    Statistics,
)
from tulle.models.batches import Batch, real_tokens
from tulle.models.decoder import DecoderBlock, GroupInput
from tulle.models.description import Decoder, Layer, LinearGroup
from tulle.models.watch import run_with_stream

SPARSE_FROM = 0.01
"""Share of exact zeros from which on a linear of a checkpoint counts as pruned."""
DENSIFIED = "a rotation or another map of its inputs densified the checkpoint's zeros; leave it out to keep them"
SAMPLE = 2048
"""Tokens of an unbiased sample of a group's input."""
PARKED_SHARE = 1 / 8
"""Share of the machine's memory up to which activations of parked sequences are kept there; more go to files."""


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
    """What the tokens read, per role, in a block whose inputs are selected (:mod:`tulle.core.activity`)."""


@dataclass
class _Work:
    """A block while it is compressed."""

    layer: Layer
    dtypes: Mapping[str, torch.dtype]
    """What tensors (relative names) are stored as if nothing quantises them."""
    dense: DecoderBlock
    compressed: DecoderBlock
    """Shares every tensor with ``dense`` but those of linears that were compressed."""
    groups: dict[str, GroupState]
    """By role, in the order in which they run; those that the recipe has anything to do with."""
    linear_roles: tuple[str, ...]
    """Roles that linear steps target."""
    changed: dict[str, Tensor]
    """Tensors by relative name that block steps changed."""
    attention: HeadGrids | None
    notes: list[str]
    permutations: list[dict[str, Any]]
    inputs: dict[str, QuantisedInput] = field(default_factory=dict)
    """In front of the compressed block's linears, by relative name."""
    hooks: dict[str, Any] = field(default_factory=dict)
    linear_seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def relative(self, linear: LinearState) -> str:
        return linear.name.removeprefix(self.layer.prefix)

    def input_of(self, group: LinearGroup, x: Tensor) -> Tensor:
        """What the group's first linear multiplies with its weights in the compressed block."""
        quantised = self.inputs.get(group.names[0])
        return x if quantised is None else quantised(x)


Found = tuple[Statistics, Tensor | None]
"""Of one group's input: statistics, and R ``[C_out, C_in]`` where its weights are fitted to the dense model."""


class Walker:
    """Walks the blocks of one model. ``block(i)`` needs the hidden states that ``begin`` or ``block(i − 1)`` left.

    ``decisions``: what the recipe's model steps decided; None: nothing. ``dtype``: what the blocks compute in;
    statistics and weights are float32. ``embedding_changes``: the compressed model has an embedding of its own.
    """

    def __init__(
        self,
        model: Decoder,
        recipe: Recipe,
        batches: Sequence[Batch],
        folder: Path,
        decisions: Decisions | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        progress: Progress | None = None,
        seed: int = 0,
        embedding_changes: bool = False,
    ):
        self._model, self._recipe, self._batches, self._folder = model, recipe, batches, folder
        self._decisions = decisions or Decisions()
        self._device, self._dtype, self._progress, self._seed = device, dtype, progress, seed
        self._valid = [None if bool(batch.valid.all()) else batch.valid.to(device) for batch in batches]
        tokens = sum(batch.tokens.numel() for batch in batches)
        widest = max(group.inputs for group in model.layers[0].groups)
        parked = 2 * tokens * (model.hidden + widest) * dtype.itemsize
        self._parking = Parking(folder, on_disk=parked > PARKED_SHARE * memory_bytes())
        self._seconds: dict[str, float] = {}
        self._embedding_changes = embedding_changes

    def states(self, path: str, block: int) -> HiddenStates:
        """Inputs of ``block`` on the ``dense`` or the ``compressed`` path; the same file for block 0 where the
        embedding is the same."""
        own = block > 0 or self._embedding_changes
        file = self._folder / f"{path if own else 'dense'}-{block}.bin"
        return HiddenStates(file, self._batches, self._model.hidden, self._dtype)

    def begin(self, embedding: Tensor, compressed: Tensor | None = None) -> None:
        """Looks the tokens up in the embedding ``[V, d]``, and in the ``compressed`` one where it changes."""
        for path, table in (("dense", embedding), ("compressed", compressed)):
            if table is None:
                continue
            states = self.states(path, 0)
            for i, batch in enumerate(self._batches):
                hidden = nn.functional.embedding(batch.tokens, table).float()
                states.write(i, hidden * self._model.embedding_scale)

    def outputs(self) -> tuple[Sequence[Batch], Iterator[Tensor]]:
        """The calibration batches, and the compressed model's hidden states after the last block."""
        states = self.states("compressed", len(self._model.layers))
        return self._batches, (states.read(i) for i in range(len(self._batches)))

    @torch.no_grad()
    def block(
        self, index: int, tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype] | None = None
    ) -> BlockResult:
        """Compresses block ``index`` (tensors by relative name) and leaves the next block's inputs.

        ``dtypes``: what each tensor is stored as if nothing quantises it; None: its own.
        """
        self._seconds = defaultdict(float)
        work = self._prepare(index, tensors, dtypes or {name: t.dtype for name, t in tensors.items()})
        phases = self._recipe.phases()
        fitted: set[str] = set()
        for steps, refining in phases[:-1]:
            self._compress(work, steps, fitted)
            for step in refining:
                self._refine(work, step)
        steps, refining = phases[-1]
        if refining or (steps and not self._recipe.calibration.sequential):
            self._compress(work, steps, fitted)
            for step in refining:
                self._refine(work, step)
            steps = []
        # The last pass over the block also leaves the next one's inputs.
        gap, counters = self._compress(work, steps, fitted, propagate=True)
        linears = [linear for group in work.groups.values() for linear in group.linears]
        names = [linear.name for linear in work.layer.linears()]
        return BlockResult(
            index=index,
            linears=linears,
            tensors={n: t for n, t in work.changed.items() if n.removesuffix(".weight") not in names},
            output_errors={work.layer.prefix + name: gap.share(name) for name in names},
            block_error=gap.share(""),
            seconds=dict(self._seconds),
            linear_seconds={linear.name: work.linear_seconds[linear.name] for linear in linears},
            attention=work.attention,
            notes=work.notes,
            permutations=work.permutations,
            activity=[{"role": role} | counter.result() for role, counter in counters.items()],
        )

    # Prepare

    def _prepare(self, index: int, tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> _Work:
        """The block in both forms, block steps applied, every linear's state at the start of the linear steps."""
        layer = self._model.layers[index]
        weights = {name: t.float().to(self._device) for name, t in tensors.items()}
        linear_roles = tuple(g.role for g in layer.groups if self._recipe.steps_for(g.role, "linear"))
        attention, notes, permutations, changed = None, [], [], {}
        if self._recipe.stage("block"):
            state = self._run_block_steps(layer, weights)
            attention, notes, permutations, groups = state.attention, state.notes, state.permutations, state.groups
            changed = rewritten(layer, state, weights)
            weights |= changed
        else:
            planned = bool(self._recipe.stage("model"))
            touched = [group for group in layer.groups if planned or group.role in linear_roles]
            groups = {group.role: group_state(layer, group, weights, Statistics()) for group in touched}
        # Both share every tensor; a compressed linear gets a new one.
        cast = {name: tensor.to(self._dtype) for name, tensor in weights.items()}
        dense, compressed = (
            DecoderBlock(self._model, index, cast, self._device, self._dtype) for _ in ("dense", "compressed")
        )
        work = _Work(
            layer, dtypes, dense, compressed, groups, linear_roles, changed, attention, notes, permutations
        )  # fmt: skip
        for group in groups.values():
            group.statistics = Statistics()
            for linear in group.linears:
                linear.kept_bits = self._decisions.kept.get(linear.name)
                linear.allotted_grid = self._decisions.grids.get(linear.name)
                linear.allotted = self._decisions.sparsity.get(linear.name)
                linear.weight = linear.folded() if linear.transform else linear.dense
                hold_zeros(linear)
                self._install(work, linear)
            self._put_inputs_in_front(work, group)
            if group.role not in linear_roles:
                self._finish(work, group)
        return work

    def _run_block_steps(self, layer: Layer, weights: Mapping[str, Tensor]) -> BlockState:
        """Runs the recipe's block steps; the block's inputs are seen once, before any of them."""
        needs = {group.role: self._needs(group.role, "block") for group in layer.groups}
        found: dict[str, Statistics] = {}
        if any(needs.values()):
            found = self._statistics_of_dense(layer, weights, needs)
        groups = {
            group.role: group_state(layer, group, weights, found.get(group.role, Statistics()))
            for group in layer.groups
        }
        by_name = {linear.name: linear for group in groups.values() for linear in group.linears}
        for linear in by_name.values():
            linear.allotted_inputs = self._decisions.input_sparsity.get(linear.name)
        heads, kv_heads, head_dim = layer.heads
        state = BlockState(
            index=layer.index,
            groups=groups,
            gains={g.role: weights[f"{norm.name}.weight"] + norm.offset for g, norm in layer.own_norms()},
            norm_biases={g.role: weights[f"{norm.name}.bias"] for g, norm in layer.own_norms() if norm.bias},
            biases={layer.prefix + x.name: weights[f"{x.name}.bias"] for x in layer.linears() if x.bias},
            producers={
                g.role: tuple(ProducedRows(by_name[layer.prefix + p.name], p.rows, p.linear) for p in g.producers)
                for g in layer.groups
            },
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            seed=self._seed,
            residual=self._decisions.residual,
        )
        outputs: list[Tensor] = []
        for step in self._recipe.stage("block"):
            self._report(layer.index, 0, step.name)
            with self._timed(step.name):
                if step.method.learns:
                    outputs = outputs or self._dense_outputs(layer.index, weights)
                    self._lend_block(state, layer, weights, outputs)
                step.method.prepare(state, step.targets)
        for linear in by_name.values():
            bits = self._decisions.kept_inputs.get(linear.name)
            if bits is not None and linear.input_grid is not None:
                linear.input_grid = None if bits >= 16 else replace(linear.input_grid, bits=bits)
        return state

    def _statistics_of_dense(
        self, layer: Layer, weights: Mapping[str, Tensor], needs: Mapping[str, frozenset[Statistic]]
    ) -> dict[str, Statistics]:
        """Of the inputs of the block's groups as they are before any step, on the compressed model's hidden states."""
        block = DecoderBlock(self._model, layer.index, weights, self._device, self._dtype)
        with self._timed("forward"):
            path = ParkedBatches(block, self._hidden("compressed", layer.index), self._parking)
        found: dict[str, Statistics] = {}
        last = [group.role for group in layer.groups if needs[group.role]][-1]
        for group in layer.groups:
            if needs[group.role]:
                with self._timed("statistics"):
                    found[group.role] = self._statistics(path.given, needs[group.role], lambda x: x)
            if group.role == last:
                return found
            with self._timed("forward"):
                for i in range(len(self._batches)):
                    path.send(i, path.outputs(i))
        return found

    def _lend_block(
        self, state: BlockState, layer: Layer, weights: Mapping[str, Tensor], outputs: Sequence[Tensor]
    ) -> None:
        """Gives a learned method the block as the steps so far left it, float32, and the batches to train on."""
        current = dict(weights) | rewritten(layer, state, weights)
        block, attention = DecoderBlock(self._model, layer.index, current, self._device), state.attention

        def batches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            yield from zip(self._hidden("compressed", layer.index), outputs, self._masks(), strict=True)

        state.module, state.forward = block, lambda hidden: block(hidden, attention)
        state.batches = batches

    def _dense_outputs(self, index: int, weights: Mapping[str, Tensor]) -> list[Tensor]:
        block = DecoderBlock(self._model, index, weights, self._device, self._dtype)
        return [block(hidden).float() for hidden in self._hidden("dense", index)]

    # Compress the groups, and propagate

    def _compress(
        self, work: _Work, steps: Sequence[Step], fitted: set[str], propagate: bool = False
    ) -> tuple[Gap, dict[str, Counter]]:
        """One pass over the block, in which ``steps`` compress the groups they target; roles that it fits to the
        dense model join ``fitted``. With ``propagate`` it leaves the next block's inputs.

        Returns how far the outputs of linears and block are from the dense model's, and what the tokens read of
        selected inputs.
        """
        index = work.layer.index
        targeted = [role for role in work.linear_roles if any(role in step.targets for step in steps)]
        sequential = self._recipe.calibration.sequential
        gap, counters, counts = Gap(), {}, propagate and self._selects_inputs(work)
        with self._timed("forward"):
            dense = ParkedBatches(work.dense, self._hidden("dense", index), self._parking)
            compressed = ParkedBatches(
                work.compressed, self._hidden("compressed", index), self._parking, work.attention
            )
        seen: list[tuple[GroupState, Found]] = []
        for group in work.layer.groups:
            if group.role in targeted:
                self._report(index, work.linear_roles.index(group.role), group.role)
                fit = group.role not in fitted and self._recipe.calibration.target != "layer"
                found = self._collect(work, group, dense.given, compressed.given, fit)
                fitted.add(group.role)
                if sequential:
                    self._apply(work, work.groups[group.role], steps, found)
                else:
                    seen.append((work.groups[group.role], found))
            if counts:  # now that the group's weights are those that will be stored
                counter = counters[group.role] = self._counter(work, group)
                for given, mask in zip(compressed.given, self._masks(), strict=True):
                    counter.see(work.input_of(group, given.x), mask)
            if not propagate and group.role == targeted[-1]:
                break
            with self._timed("forward"):
                ends = advance(dense, compressed, group, self._valid, gap)
        for state, found in seen:
            self._apply(work, state, steps, found)
        if propagate:
            self._report(index, len(work.linear_roles), "propagate")
            for i, (wanted, left) in enumerate(ends):
                gap.add("", wanted, left, self._valid[i])
                self.states("dense", index + 1).write(i, wanted)
                self.states("compressed", index + 1).write(i, left)
        for quantised in work.inputs.values():
            quantised.forget()
        return gap, counters

    def _collect(
        self, work: _Work, group: LinearGroup, dense: Sequence[GroupInput], compressed: Sequence[GroupInput], fit: bool
    ) -> Found:
        """Statistics of the group's input in the compressed block, and what fitting to the dense model needs."""
        needs = self._needs(group.role, "linear")
        with self._timed("statistics"):
            if not fit or "hessian" not in needs:
                return self._statistics(compressed, needs, lambda x: work.input_of(group, x)), None
            linears = work.groups[group.role].linears
            transform = linears[0].transform
            stream = self._recipe.calibration.target == "stream" and compressed[0].adds
            mismatch = Mismatch(torch.cat([linear.weight for linear in linears]), stream)
            scale = work.layer.residual_scale

            def compare(i: int, x: Tensor) -> None:
                there, here, valid = dense[i], compressed[i], self._valid[i]
                wanted = real_tokens(there.x, valid)
                wanted = run(transform, wanted.float()) if transform else wanted
                behind = None
                if stream:
                    behind = real_tokens(there.residual, valid) - real_tokens(here.residual, valid)
                    behind = behind if scale == 1 else behind / scale
                mismatch.add(wanted, x, behind)

            found = self._statistics(compressed, needs, lambda x: work.input_of(group, x), compare)
            return found, mismatch.result()

    def _statistics(
        self,
        given: Sequence[GroupInput],
        needs: frozenset[Statistic],
        prepare: Callable[[Tensor], Tensor],
        see: Callable[[int, Tensor], None] | None = None,
    ) -> Statistics:
        """What a step wants to know of the inputs of a group, after ``prepare``; ``see`` is shown the real tokens
        ``[T, C_in]`` of every batch."""
        found = Statistics()
        extremes, reservoir = None, None
        for i, (batch, valid) in enumerate(zip(given, self._valid, strict=True)):
            x = real_tokens(prepare(batch.x), valid)
            found.add(x, needs)
            if see is not None:
                see(i, x)
            if "rows" in needs:
                extremes = extremes or Extremes(x.shape[-1], seed=self._seed)
                extremes.add(x)
            if "sample" in needs:
                reservoir = reservoir or Reservoir(SAMPLE, self._seed)
                reservoir.add(x.float())
        found.rows = None if extremes is None else extremes.rows
        found.sample = None if reservoir is None else reservoir.rows
        return found

    def _apply(self, work: _Work, group: GroupState, steps: Sequence[Step], found: Found) -> None:
        """Fits a group's weights to the dense model where that is wanted, and runs the steps on it."""
        group.statistics, mismatch = found
        if mismatch is not None:
            with self._timed("statistics"):
                fit_to_dense(group, mismatch, self._recipe.calibration.target_damping)
        begun = time.perf_counter()
        for step in steps:
            if group.role in step.targets:
                with self._timed(step.name):
                    step.method.apply(group)
        self._finish(work, group)
        for linear in group.linears:
            work.linear_seconds[linear.name] += (time.perf_counter() - begun) / len(group.linears)
        group.statistics = Statistics()

    def _finish(self, work: _Work, group: GroupState) -> None:
        """Puts the effective weights, as they will be stored, into the compressed block."""
        for linear in group.linears:
            if linear.quantised is None:
                linear.weight = linear.weight.to(work.dtypes[f"{work.relative(linear)}.weight"]).float()
            if not all_finite(linear.weight):
                raise UserError(
                    f"expected finite weights after the recipe's steps, found NaN or Inf in {linear.name}; raise the "
                    "damping"
                )
            self._install(work, linear)
        self._put_inputs_in_front(work, group)

    def _install(self, work: _Work, linear: LinearState) -> None:
        module = work.compressed.get_submodule(work.relative(linear))
        module.weight = nn.Parameter(linear.weight.to(work.compressed.dtype), requires_grad=False)

    def _put_inputs_in_front(self, work: _Work, group: GroupState) -> None:
        """Transforms, quantisers and selections in front of a group's linears; siblings see one result."""
        shared: dict[tuple[TokenGrid | None, Selection | None], QuantisedInput] = {}
        for linear in group.linears:
            name, found = work.relative(linear), (linear.input_grid, linear.input_selection)
            if hook := work.hooks.pop(name, None):
                hook.remove()
                del work.inputs[name]
            if linear.transform or any(part is not None for part in found):
                quantised = shared.setdefault(found, QuantisedInput(linear.transform, *found))
                module = work.compressed.get_submodule(name)
                work.inputs[name], work.hooks[name] = quantised, module.register_forward_pre_hook(quantised.pre_hook)

    # Refine

    def _refine(self, work: _Work, step: Step) -> None:
        """Runs a refine step on the compressed block, in float32, and puts its linears back as they will be stored."""
        index = work.layer.index
        self._report(index, len(work.linear_roles), step.name)
        with self._timed(step.name):
            wanted = [run_with_stream(work.dense, hidden) for hidden in self._hidden("dense", index)]
            masks = self._masks()

            def batches() -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
                for i, hidden in enumerate(self._hidden("compressed", index)):
                    yield hidden, *wanted[i], masks[i]

            work.compressed.to(torch.float32)
            touched = {role: group for role, group in work.groups.items() if role in step.targets}
            modules: dict[str, nn.Linear] = {}
            for linear in (linear for group in touched.values() for linear in group.linears):
                module = work.compressed.get_submodule(work.relative(linear))
                assert isinstance(module, nn.Linear)
                modules[linear.name] = module

            def forward(hidden: Tensor) -> tuple[Tensor, Tensor]:
                return run_with_stream(work.compressed, hidden, work.attention)

            state = CompressedBlock(index, touched, work.compressed, modules, forward, batches)
            step.method.refine(state, step.targets)
            work.notes += state.notes
            work.compressed.to(self._dtype)
            for group in touched.values():
                self._finish(work, group)

    # Small things

    def _hidden(self, path: str, block: int) -> Iterator[Tensor]:
        states = self.states(path, block)
        return (states.read(i).to(self._device) for i in range(len(self._batches)))

    def _masks(self) -> list[Tensor]:
        """Which tokens are real, bool ``[B, T]`` per batch."""
        return [batch.valid.to(self._device) for batch in self._batches]

    def _needs(self, role: str, stage: str) -> frozenset[Statistic]:
        return frozenset().union(*(step.method.needs for step in self._recipe.steps_for(role, stage)))  # type: ignore[arg-type]

    def _selects_inputs(self, work: _Work) -> bool:
        return any(linear.input_selection for group in work.groups.values() for linear in group.linears)

    def _counter(self, work: _Work, group: LinearGroup) -> Counter:
        """To count what the tokens read of a group's weights as they are in the compressed block now."""
        weights = [work.compressed.get_submodule(name).weight for name in group.names]
        return Counter(columns_of(weights))  # type: ignore[arg-type]

    def _timed(self, stage: str) -> _Timer:
        return _Timer(self._seconds, stage)

    def _report(self, index: int, number: int, what: str) -> None:
        if self._progress:
            per_block, layers = len(self._model.layers[index].groups) + 1, len(self._model.layers)
            self._progress(f"block {index + 1}/{layers} {what}", index * per_block + number, layers * per_block)


@dataclass
class _Timer:
    seconds: dict[str, float]
    stage: str
    begun: float = 0.0

    def __enter__(self) -> None:
        self.begun = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.stage] += time.perf_counter() - self.begun


def group_state(layer: Layer, group: LinearGroup, weights: Mapping[str, Tensor], statistics: Statistics) -> GroupState:
    """A group's linears before any step."""
    linears = []
    for name in group.names:
        weight = weights[f"{name}.weight"]
        linears.append(LinearState(name=layer.prefix + name, weight=weight, dense=weight, role=group.role))
    return GroupState(group.role, linears, statistics)


def rewritten(layer: Layer, state: BlockState, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The block's tensors that block steps changed, by relative name."""
    tensors = {f"{name.removeprefix(layer.prefix)}.bias": bias for name, bias in state.biases.items()}
    for group, norm in layer.own_norms():
        stored, gain = weights[f"{norm.name}.weight"], state.gains[group.role] - norm.offset
        # As it was, to the bit, where no step has changed it.
        tensors[f"{norm.name}.weight"] = stored if torch.equal(state.gains[group.role], stored + norm.offset) else gain
        if norm.bias:
            tensors[f"{norm.name}.bias"] = state.norm_biases[group.role]
    for group in layer.groups:
        for linear in state.groups[group.role].linears:
            tensors[f"{linear.name.removeprefix(layer.prefix)}.weight"] = linear.dense
    return {name: tensor for name, tensor in tensors.items() if tensor is not weights[name]}


def hold_zeros(linear: LinearState) -> None:
    """Takes the zeros of a checkpoint that was pruned before for the linear's mask, which every method keeps.

    A transform that mixes channels has densified them by now; the report says so.
    """
    if linear.mask is not None or zero_share(linear.dense) < SPARSE_FROM:
        return
    if zero_share(linear.weight) < SPARSE_FROM:
        linear.notes.append(DENSIFIED)
        return
    linear.mask = linear.weight != 0
    linear.pattern = next((text for text in PATTERNS if follows(linear.mask, Pattern.parse(text))), None)


def compute_dtype(setting: str, stored: torch.dtype, device: str = "cpu") -> torch.dtype:
    """What the blocks compute in: ``float32``, ``bfloat16``, or for ``auto`` bfloat16 if that is how the checkpoint is
    stored and the device is fast in it."""
    if setting != "auto":
        found: torch.dtype = getattr(torch, setting)
        return found
    fast = device != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if stored == torch.bfloat16 and fast else torch.float32

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
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tulle.compression.block_pass import Gap, ParkedBatches, advance
from tulle.compression.block_work import BlockWork, Part, group_state, rewritten
from tulle.compression.expert_tokens import ExpertTokens, route
from tulle.compression.fitting import fit_to_dense
from tulle.compression.group_inputs import Found, compared_inputs, statistics_of
from tulle.compression.hidden_states import HiddenStates, Parking
from tulle.compression.recipe import Recipe, Step
from tulle.core.activity import Counter
from tulle.core.head_grids import HeadGrids
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
from tulle.models.decoder import DecoderBlock, run_group
from tulle.models.description import Decoder, Expert, Layer, LinearGroup
from tulle.models.state import TokenInputs
from tulle.models.watch import run_with_stream

PARKED_SHARE = 1 / 8
"""Share of the machine's memory up to which activations of parked sequences are kept there; more go to files."""


@dataclass
class PartResult:
    """Compressed linears, be it of a block without its experts or of one expert, and what they cost."""

    linears: list[LinearState]
    """Their final states."""
    tensors: dict[str, Tensor]
    """Other tensors by relative name, float32, where a step changed them."""
    output_errors: dict[str, float]
    """Σ|ŷ − y|²/Σ|y|² per linear, dense model against compressed model, over all calibration tokens that it sees."""
    linear_seconds: dict[str, float]


@dataclass
class BlockResult(PartResult):
    """A compressed block without its experts."""

    index: int
    block_error: float
    """Σ|ŷ − y|²/Σ|y|² of the hidden states after the block."""
    seconds: dict[str, float]
    """``load``, ``forward``, ``statistics``, and one entry per step name."""
    attention: HeadGrids | None = None
    notes: list[str] = field(default_factory=list)
    """Of the block steps."""
    permutations: list[dict[str, Any]] = field(default_factory=list)
    """What channel permutations retained, per role."""
    activity: list[dict[str, Any]] = field(default_factory=list)
    """What the tokens read, per role, in a block whose inputs are selected (:mod:`tulle.core.activity`)."""
    expert_tokens: ExpertTokens | None = None


@dataclass(frozen=True)
class Experts:
    """Where a block's experts come from and go, one at a time."""

    read: Callable[[int], Mapping[str, Tensor]]
    """An expert's tensors by relative name."""
    finished: Callable[[PartResult, Mapping[str, Tensor]], None]
    """Is given what has become of an expert, and the tensors that were read."""


class Walker:
    """Walks the blocks of one model. ``block(i)`` needs the hidden states that ``begin`` or ``block(i − 1)`` left.

    ``decisions``: what the recipe's model steps decided; None: nothing. ``dtype``: what the blocks compute in;
    statistics and weights are float32. ``embedding_changes``: the compressed model has an embedding of its own.
    ``inputs``: what blocks have of their own, in a model where they do.
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
        inputs: TokenInputs | None = None,
        compressed_inputs: TokenInputs | None = None,
    ):
        self._model, self._recipe, self._batches, self._folder = model, recipe, batches, folder
        self._decisions = decisions or Decisions()
        self._device, self._dtype, self._progress, self._seed = device, dtype, progress, seed
        self._valid = [None if bool(batch.valid.all()) else batch.valid.to(device) for batch in batches]
        tokens = sum(batch.tokens.numel() for batch in batches)
        widest = max(group.inputs for layer in model.layers for group in layer.groups)
        parked = 2 * tokens * (widest_state(model) + widest) * dtype.itemsize
        self._parking = Parking(folder, on_disk=parked > PARKED_SHARE * memory_bytes())
        self._seconds: dict[str, float] = {}
        self._embedding_changes = embedding_changes
        self._inputs = {"dense": inputs, "compressed": compressed_inputs or inputs}

    def states(self, path: str, block: int) -> HiddenStates:
        """Inputs of ``block`` on the ``dense`` or the ``compressed`` path; the same file for block 0 where the
        embedding is the same."""
        own = block > 0 or self._embedding_changes
        file = self._folder / f"{path if own else 'dense'}-{block}.bin"
        return HiddenStates(file, self._batches, self._model.state_width(block), self._dtype)

    def forget(self, block: int) -> None:
        """Removes the inputs of a block that is done, but for what later ones make inputs of their own of."""
        if block or self._model.per_layer is None:
            for path in ("dense", "compressed"):
                self.states(path, block).file.unlink(missing_ok=True)

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
        self,
        index: int,
        tensors: Mapping[str, Tensor],
        dtypes: Mapping[str, torch.dtype] | None = None,
        experts: Experts | None = None,
    ) -> BlockResult:
        """Compresses block ``index`` (tensors by relative name, but those of experts) and leaves the next block's
        inputs.

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
        expert_steps = steps
        if refining or (steps and not self._recipe.calibration.sequential):
            self._compress(work, steps, fitted)
            for step in refining:
                self._refine(work, step)
            steps = []
        # The last pass over the block also leaves the next one's inputs.
        gap, counters, tokens = self._compress(work, steps, fitted, experts, expert_steps, propagate=True)
        part = work.part
        return BlockResult(
            **self._result(work, part, compressible(work.layer), gap),
            index=index,
            block_error=gap.share(""),
            seconds=dict(self._seconds),
            attention=part.attention,
            notes=part.notes,
            permutations=part.permutations,
            activity=[{"role": role} | counter.result() for role, counter in counters.items()],
            expert_tokens=tokens,
        )

    def _result(self, work: BlockWork, part: Part, groups: Sequence[LinearGroup], gap: Gap) -> dict[str, Any]:
        """The fields of :class:`PartResult`."""
        linears, names = part.linears(), [name for group in groups for name in group.names]
        return {
            "linears": linears,
            "tensors": {n: t for n, t in part.changed.items() if n.removesuffix(".weight") not in names},
            "output_errors": {work.layer.prefix + name: gap.share(name) for name in names},
            "linear_seconds": {linear.name: work.linear_seconds[linear.name] for linear in linears},
        }

    # Prepare

    def _prepare(self, index: int, tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> BlockWork:
        """The block in both forms, block steps applied, every linear's state at the start of the linear steps."""
        layer = self._model.layers[index]
        weights = {name: t.float().to(self._device) for name, t in tensors.items()}
        needs = {group.role: self._needs(group.role, "block") for group in layer.groups}
        found: dict[str, Statistics] = {}
        if any(needs.values()):
            found = self._statistics_of_dense(layer, weights, needs)
        part = self._part(layer, compressible(layer), weights, found, self._seed)
        weights |= part.changed
        # Both share every tensor; a compressed linear gets a new one.
        cast = {name: tensor.to(self._dtype) for name, tensor in weights.items()}
        dense, compressed = (
            DecoderBlock(self._model, index, cast, self._device, self._dtype, experts=False)
            for _ in ("dense", "compressed")
        )
        work = BlockWork(layer, dtypes, dense, compressed, part)
        work.begin(part, self._decisions)
        return work

    def _part(
        self,
        layer: Layer,
        groups: Sequence[LinearGroup],
        weights: Mapping[str, Tensor],
        found: Mapping[str, Statistics],
        seed: int,
        whole: bool = True,
    ) -> Part:
        """A layer without its experts, or, not ``whole``, one expert, with the recipe's block steps applied; ``found``:
        what they need of the groups' inputs, by role."""
        roles = tuple(group.role for group in groups if self._recipe.steps_for(group.role, "linear"))
        if not self._recipe.stage("block"):
            planned = bool(self._recipe.stage("model")) or not whole
            touched = [group for group in groups if planned or group.role in roles]
            return Part({g.role: group_state(layer, g, weights, Statistics()) for g in touched}, roles)
        state = self._run_block_steps(layer, groups, weights, found, seed)
        changed = rewritten(layer, groups, state, weights)
        return Part(state.groups, roles, changed, state.attention, state.notes, state.permutations)

    def _run_block_steps(
        self,
        layer: Layer,
        linear_groups: Sequence[LinearGroup],
        weights: Mapping[str, Tensor],
        found: Mapping[str, Statistics],
        seed: int,
    ) -> BlockState:
        """Runs the recipe's block steps; the block's inputs are seen once, before any of them."""
        groups = {g.role: group_state(layer, g, weights, found.get(g.role, Statistics())) for g in linear_groups}
        by_name = {linear.name: linear for group in groups.values() for linear in group.linears}
        for linear in by_name.values():
            linear.allotted_inputs = self._decisions.input_sparsity.get(linear.name)
        heads, kv_heads, head_dim = layer.heads
        own = [(group, norm) for group, norm in layer.own_norms() if group in linear_groups]
        linears = [linear for group in linear_groups for linear in group.linears]
        state = BlockState(
            index=layer.index,
            groups=groups,
            gains={g.role: weights[f"{norm.name}.weight"] + norm.offset for g, norm in own},
            norm_biases={g.role: weights[f"{norm.name}.bias"] for g, norm in own if norm.bias},
            biases={layer.prefix + x.name: weights[f"{x.name}.bias"] for x in linears if x.bias},
            producers={
                g.role: tuple(ProducedRows(by_name[layer.prefix + p.name], p.rows, p.linear) for p in g.producers)
                for g in linear_groups
            },
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            seed=seed,
            residual=self._decisions.residual,
        )
        outputs: list[Tensor] = []
        for step in self._recipe.stage("block"):
            targets = tuple(role for role in groups if step.covers(role))
            if not targets:
                continue
            self._report(layer.index, 0, step.name)
            with self._timed(step.name):
                if step.method.learns:
                    outputs = outputs or self._dense_outputs(layer.index, weights)
                    self._lend_block(state, layer, weights, outputs)
                step.method.prepare(state, targets)
        for linear in by_name.values():
            bits = self._decisions.kept_inputs.get(linear.name)
            if bits is not None and linear.input_grid is not None:
                linear.input_grid = None if bits >= 16 else replace(linear.input_grid, bits=bits)
        return state

    def _statistics_of_dense(
        self, layer: Layer, weights: Mapping[str, Tensor], needs: Mapping[str, frozenset[Statistic]]
    ) -> dict[str, Statistics]:
        """Of the inputs of the block's groups as they are before any step, on the compressed model's hidden states."""
        block = DecoderBlock(self._model, layer.index, weights, self._device, self._dtype, experts=False)
        with self._timed("forward"):
            path = ParkedBatches(block, self._hidden("compressed", layer.index), self._parking)
        found: dict[str, Statistics] = {}
        last = [group.role for group in layer.groups if needs[group.role]][-1]
        for group in layer.groups:
            if needs[group.role]:
                with self._timed("statistics"):
                    found[group.role] = statistics_of(path.given, self._valid, needs[group.role], seed=self._seed)
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
        current = dict(weights) | rewritten(layer, compressible(layer), state, weights)
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
        self,
        work: BlockWork,
        steps: Sequence[Step],
        fitted: set[str],
        experts: Experts | None = None,
        expert_steps: Sequence[Step] = (),
        propagate: bool = False,
    ) -> tuple[Gap, dict[str, Counter], ExpertTokens | None]:
        """One pass over the block, in which ``steps`` compress the groups they target; roles that it fits to the
        dense model join ``fitted``. With ``propagate`` it goes on through ``experts``, with steps of their own, and
        leaves the next block's inputs.

        Returns how far the outputs of linears and block are from the dense model's, what the tokens read of selected
        inputs, and which experts they went to.
        """
        index, part = work.layer.index, work.part
        targeted = [role for role in part.roles if any(step.covers(role) for step in steps)]
        gap, counters, tokens = Gap(), {}, None
        counts = propagate and any(linear.input_selection for linear in part.linears())
        with self._timed("forward"):
            dense = ParkedBatches(work.dense, self._hidden("dense", index), self._parking)
            compressed = ParkedBatches(
                work.compressed, self._hidden("compressed", index), self._parking, part.attention
            )
        seen: list[tuple[GroupState, Found]] = []
        for group in work.layer.groups:
            if group.role in targeted:
                self._report(index, part.roles.index(group.role), group.role)
                fit = group.role not in fitted and self._recipe.calibration.target != "layer"
                found = self._collect(work, part.groups[group.role], dense, compressed, fit)
                fitted.add(group.role)
                if self._recipe.calibration.sequential:
                    self._apply(work, part.groups[group.role], steps, found)
                else:
                    seen.append((part.groups[group.role], found))
            if counts:  # now that the group's weights are those that will be stored
                counter = counters[group.role] = work.counter(group)
                for given, mask in zip(compressed.given, self._masks(), strict=True):
                    counter.see(work.input_of(group, given.x), mask)
            if not propagate and group.role == targeted[-1]:
                break
            with self._timed("forward"):
                if group.role == "router":
                    least = self._recipe.calibration.expert_tokens
                    tokens = route(dense, compressed, self._valid, len(work.layer.experts), least)
                ends = advance(dense, compressed, group, self._valid, gap)
        for state, found in seen:
            self._apply(work, state, steps, found)
        if propagate:
            for expert in work.layer.experts:
                assert experts is not None
                self._report(index, len(part.roles), f"expert {expert.index + 1}/{len(work.layer.experts)}")
                ends = self._expert(work, expert, experts, expert_steps, dense, compressed, gap)
            self._report(index, len(part.roles), "propagate")
            for i, (wanted, left) in enumerate(ends):
                streams = [x[..., : self._model.hidden] for x in (wanted, left)]
                gap.add("", *(real_tokens(stream, self._valid[i]) for stream in streams))
                self.states("dense", index + 1).write(i, wanted)
                self.states("compressed", index + 1).write(i, left)
        for quantised in work.inputs.values():
            quantised.forget()
        return gap, counters, tokens

    def _expert(
        self,
        work: BlockWork,
        expert: Expert,
        experts: Experts,
        steps: Sequence[Step],
        dense: ParkedBatches,
        compressed: ParkedBatches,
        gap: Gap,
    ) -> list[tuple[Tensor, Tensor]]:
        """Compresses an expert, at whose gate and up the batches are parked, and lets them go on behind it.

        Its weights are in memory from here to the end alone, and its steps run group by group. Returns the outputs of
        both blocks behind the last one.
        """
        with self._timed("load"):
            tensors = experts.read(expert.index)
            weights = {name: t.float().to(self._device) for name, t in tensors.items()}
            for path in (dense, compressed):
                path.block.hold(expert.index, weights)
        found = self._statistics_of_expert(expert, compressed)
        seed = (self._seed + 1) * 100_003 + expert.index  # its own random signs
        part = self._part(work.layer, expert.groups, weights, found, seed, whole=False)
        if part.changed:
            for path in (dense, compressed):
                path.block.hold(expert.index, {**weights, **part.changed})
        del weights
        work.begin(part, self._decisions)
        ends: list[tuple[Tensor, Tensor]] = []
        for group in expert.groups:
            if group.role in part.roles:
                state = part.groups[group.role]
                fit = self._recipe.calibration.target != "layer"
                inputs = self._collect(work, state, dense, compressed, fit)
                self._apply(work, state, steps, inputs)
            with self._timed("forward"):
                ends = advance(dense, compressed, group, self._valid, gap)
        work.drop(part)
        for path in (dense, compressed):
            path.block.release(expert.index)
        with self._timed("write"):
            experts.finished(PartResult(**self._result(work, part, expert.groups, gap)), tensors)
        return ends

    def _statistics_of_expert(self, expert: Expert, compressed: ParkedBatches) -> dict[str, Statistics]:
        """Of the inputs of an expert's groups before any step, which block steps ask for."""
        reads, writes = expert.groups
        needs = {group.role: self._needs(group.role, "block") for group in expert.groups}
        found: dict[str, Statistics] = {}
        with self._timed("statistics"):
            if needs[reads.role]:
                found[reads.role] = statistics_of(compressed.given, self._valid, needs[reads.role], seed=self._seed)
            if needs[writes.role]:
                block = compressed.block
                inner = [
                    replace(given, group=writes, x=block.inner_of_expert(run_group(block, reads, given.x)))
                    for given in compressed.given
                ]
                found[writes.role] = statistics_of(inner, self._valid, needs[writes.role], seed=self._seed)
        return found

    def _collect(
        self, work: BlockWork, group: GroupState, dense: ParkedBatches, compressed: ParkedBatches, fit: bool
    ) -> Found:
        """Statistics of the input of the group that the batches are parked at, in the compressed block, and what
        fitting to the dense model needs."""
        needs, settings = self._needs(group.role, "linear"), self._recipe.calibration
        with self._timed("statistics"):
            if fit and "hessian" in needs:
                return compared_inputs(
                    work, group, dense.given, compressed.given, self._valid, needs, settings.target == "stream",
                    self._seed,
                )  # fmt: skip
            linear_group = compressed.given[0].group
            prepare = lambda x: work.input_of(linear_group, x)  # noqa: E731
            return statistics_of(compressed.given, self._valid, needs, prepare, seed=self._seed), None

    def _apply(self, work: BlockWork, group: GroupState, steps: Sequence[Step], found: Found) -> None:
        """Fits a group's weights to the dense model where that is wanted, and runs the steps on it."""
        group.statistics, mismatch = found
        if mismatch is not None:
            with self._timed("statistics"):
                fit_to_dense(group, mismatch, self._recipe.calibration.target_damping)
        begun = time.perf_counter()
        for step in steps:
            if step.covers(group.role):
                with self._timed(step.name):
                    step.method.apply(group)
        work.finish(group)
        for linear in group.linears:
            work.linear_seconds[linear.name] += (time.perf_counter() - begun) / len(group.linears)
        group.statistics = Statistics()

    # Refine

    def _refine(self, work: BlockWork, step: Step) -> None:
        """Runs a refine step on the compressed block, in float32, and puts its linears back as they will be stored."""
        index = work.layer.index
        self._report(index, len(work.part.roles), step.name)
        with self._timed(step.name):
            wanted = [run_with_stream(work.dense, hidden) for hidden in self._hidden("dense", index)]
            masks = self._masks()

            def batches() -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
                for i, hidden in enumerate(self._hidden("compressed", index)):
                    yield hidden, *wanted[i], masks[i]

            work.compressed.to(torch.float32)
            touched = {role: group for role, group in work.part.groups.items() if step.covers(role)}
            modules: dict[str, nn.Linear] = {}
            for linear in (linear for group in touched.values() for linear in group.linears):
                module = work.compressed.get_submodule(work.relative(linear))
                assert isinstance(module, nn.Linear)
                modules[linear.name] = module

            def forward(hidden: Tensor) -> tuple[Tensor, Tensor]:
                return run_with_stream(work.compressed, hidden, work.part.attention)

            state = CompressedBlock(index, touched, work.compressed, modules, forward, batches)
            step.method.refine(state, step.targets)
            work.part.notes += state.notes
            work.compressed.to(self._dtype)
            for group in touched.values():
                work.finish(group)

    # Small things

    def _hidden(self, path: str, block: int) -> Iterator[Tensor]:
        """What the block takes, batch by batch."""
        states, first = self.states(path, block), self.states(path, 0)
        for i, batch in enumerate(self._batches):
            state = states.read(i)
            if (inputs := self._inputs[path]) is not None:
                state = inputs.join(block, state, batch.tokens, partial(first.read, i))
            yield state.to(self._device)

    def _masks(self) -> list[Tensor]:
        """Which tokens are real, bool ``[B, T]`` per batch."""
        return [batch.valid.to(self._device) for batch in self._batches]

    def _needs(self, role: str, stage: str) -> frozenset[Statistic]:
        return frozenset().union(*(step.method.needs for step in self._recipe.steps_for(role, stage)))  # type: ignore[arg-type]

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


def widest_state(model: Decoder) -> int:
    """Channels of a token that the files between blocks hold at most."""
    return max(model.state_width(index) for index in range(len(model.layers) + 1))


def compressible(layer: Layer) -> list[LinearGroup]:
    """The groups of a layer without its experts that steps can target: all but the router."""
    return [group for group in layer.groups if group.role != "router"]


def compute_dtype(setting: str, stored: torch.dtype, device: str = "cpu") -> torch.dtype:
    """What the blocks compute in: ``float32``, ``bfloat16``, or for ``auto`` bfloat16 if that is how the checkpoint is
    stored and the device is fast in it."""
    if setting != "auto":
        found: torch.dtype = getattr(torch, setting)
        return found
    fast = device != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if stored == torch.bfloat16 and fast else torch.float32

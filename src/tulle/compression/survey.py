"""Walks through the dense model before the real one, for recipe steps that concern the whole model."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from tulle.compression.recipe import Recipe, Step
from tulle.compression.run_folder import locked
from tulle.compression.tables import table_steps
from tulle.core.grid import Grid
from tulle.core.hessian import Hessian
from tulle.core.rotation import Extremes
from tulle.core.transform import Permutation
from tulle.core.trials import InputTrials, Key, TableTrials, WeightTrials
from tulle.errors import UserError
from tulle.format.spec import LinearSpec
from tulle.methods.contract import Progress, See, Statistics, Survey
from tulle.models.batches import Batch, batched
from tulle.models.decoder import DecoderBlock, GroupInput, PlainDecoder, embed, final_norm
from tulle.models.description import Decoder, Mixture
from tulle.models.expert_pass import outputs
from tulle.models.fisher import divergences
from tulle.models.rewrite import DenseModel

TOKENS = 8192
"""Calibration tokens of the walk; its hidden states are in memory."""
HEADER = 96
"""Bytes of a tensor's entry in the header of a safetensors file, besides its name: dtype, shape and offsets."""
HEAD_TOKENS = 16384
"""Calibration tokens of the head's Hessian."""


@torch.no_grad()
def take_survey(
    dense: DenseModel,
    recipe: Recipe,
    batches: Sequence[Batch],
    device: str = "cpu",
    progress: Progress | None = None,
    seed: int = 0,
    folder: Path | None = None,
    dtype: torch.dtype = torch.float32,
    begun: bool = False,
    costs: Path | None = None,
) -> Survey:
    """Runs the recipe's model steps and returns what they decided. Equal inputs give equal decisions.

    ``dtype``: what the blocks compute in for the head's Hessian, which is not taken where the walk has ``begun``: a
    tied table is quantised before the first block.

    ``costs``: a folder where what ``Survey.costs`` measures is kept from run to run, under a name of all that it
    depends on: a step that differs in its budget alone takes it from there.

    Every step costs a fixed number of passes over the calibration tokens. With ``folder``, of one run alone, a killed
    survey goes on at the block where it stopped, and what a finished one found is not computed again.
    """
    found: dict[tuple[int, str], Tensor] = {}
    norms: dict[tuple[int, str], Tensor] = {}
    model = dense.description
    survey = Survey(
        layers=len(model.layers),
        rows=lambda block, role: found[block, role],
        block=lambda index: walk.read_block(index),
        expert=lambda index, expert: walk.read_expert(index, expert),
        experts=[layer.experts for layer in model.layers],
        chosen=[x.router.chosen if isinstance(x := layer.feed_forward, Mixture) else 0 for layer in model.layers],
        groups=[{group.role: group for group in layer.groups} for layer in model.layers],
        prefix=lambda index: model.layers[index].prefix,
        hidden=model.hidden,
        heads=[layer.heads for layer in model.layers],
        seed=seed,
        column_norm=lambda block, role: norms[block, role],
        table=lambda role: walk.table(role),
        stored_bytes=sum(
            dense.checkpoint.info(name).bytes + header_bytes(name, dense.checkpoint.info(name).shape)
            for name in dense.checkpoint.names_of(model)
        ),
        packed_bytes=packed_bytes,
        weight_bytes=lambda name: dense.checkpoint.info(stored_name(dense, name)).bytes,
    )
    walk, watched = _Walk(dense, batches, device, progress, seed, folder), False
    for number, step in enumerate(recipe.stage("model")):
        measure, kept = walk, None
        if costs is not None:
            kept = costs / _costs_name(dense, batches, recipe.stage("model")[: number + 1], seed)
            kept.mkdir(parents=True, exist_ok=True)
            measure = replace(walk, folder=kept)
        survey.costs, survey.look, survey.tables = measure.costs, walk.look, table_names(walk.dense)
        if not watched and {"rows", "column_norm"} & step.method.needs:
            walk.watch(seed, found, norms)
            watched = True
        before = survey.residual, dict(survey.values)
        with nullcontext() if kept is None else locked(kept):
            step.method.plan(survey, step.targets)
        if before != (survey.residual, survey.values):
            maps = [*survey.residual, *survey.values.values()]
            if survey.input_sparsity and not all(isinstance(t, Permutation) for t in maps):
                raise UserError(
                    "expected shares of dropped inputs to be measured in the basis that they are used in, found "
                    f"{step.name} after that; put {step.name} first"
                )
            walk, watched = replace(walk, dense=dense.rewritten(survey.residual, survey.values)), False
    if (
        not begun
        and walk.dense.tied
        and any("hessian" in step.method.needs for step in table_steps(walk.dense.tied, recipe).values())
    ):
        survey.head_hessian = walk.head_hessian(dtype)
    return survey


def _costs_name(dense: DenseModel, batches: Sequence[Batch], steps: Sequence[Step], seed: int) -> str:
    """Equal where costs are: the same model, text, seed and steps, the last one's budget left out."""
    settings = [step.to_json() for step in steps]
    (last,) = settings[-1].values()
    for budget in ("size", "bits"):
        last.pop(budget, None)
    digest = hashlib.sha256(json.dumps([dense.checkpoint.source.identity(), settings, seed]).encode())
    for batch in batches:
        digest.update(batch.tokens.numpy().tobytes() + batch.valid.numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class _Walk:
    """The dense model, block by block, on the calibration text."""

    dense: DenseModel
    batches: Sequence[Batch]
    device: str
    progress: Progress | None
    seed: int = 0
    folder: Path | None = None
    calls: Iterator[int] = field(default_factory=count)
    """Numbers of the calls of ``costs``."""

    @property
    def model(self) -> Decoder:
        return self.dense.description

    def read_block(self, index: int) -> dict[str, Tensor]:
        """Float32 tensors of a block without its experts by relative name."""
        return {name: t.float().to(self.device) for name, t in self.dense.read_block(index, experts=False).items()}

    def read_expert(self, index: int, expert: int) -> dict[str, Tensor]:
        """Those of one of its experts."""
        return {name: t.float().to(self.device) for name, t in self.dense.read_expert(index, expert).items()}

    def watch(self, seed: int, found: dict[tuple[int, str], Tensor], norms: dict[tuple[int, str], Tensor]) -> None:
        """Fills ``found`` with the extreme rows and ``norms`` with the column norms of the inputs of every role."""
        taken: list[Batch] = []
        for batch in self.batches:
            if taken and sum(int(b.valid.sum()) for b in taken) + int(batch.valid.sum()) > TOKENS:
                break
            taken.append(batch)

        def see(samplers: dict[str, Extremes], seen: Mapping[str, Statistics], batch: int, given: GroupInput) -> None:
            role, x = given.role, given.real(given.x, taken[batch].valid.to(self.device))
            if given.tokens is None:
                sampler = samplers.setdefault(role, Extremes(x.shape[-1], per_segment=4, random=128, seed=seed))
                sampler.add(x)
            seen[role if given.tokens is None else given.group.names[0]].add(x, frozenset({"column_norm"}))

        first = hidden = self._embedded(taken)
        for index, tensors in self._blocks("survey"):
            hidden = self._entering(index, hidden, taken, first)
            samplers: dict[str, Extremes] = {}
            seen: dict[str, Statistics] = defaultdict(Statistics)
            hidden = outputs(self._block(index, tensors), hidden, self.read_expert, partial(see, samplers, seen))
            found |= {(index, role): sampler.rows for role, sampler in samplers.items()}
            tokens = max(statistics.tokens for statistics in seen.values())
            for key, statistics in seen.items():
                assert statistics.column_norm is not None
                share = statistics.tokens / tokens
                norms[index, key] = statistics.column_norm / (share**0.5 if 0 < share < 1 else 1.0)
            for expert in self.model.layers[index].experts:
                for group in expert.groups:  # of one that no token goes to
                    norms.setdefault((index, group.names[0]), torch.zeros(group.inputs, device=self.device))

    def look(self, see: See, roles: Sequence[str]) -> None:
        """``Survey.look``; in memory are one block and the hidden states of about ``TOKENS`` tokens."""
        seen = batched(_drawn(self.batches, TOKENS)[0])

        def add(found: Mapping[str, Hessian], batch: int, given: GroupInput) -> None:
            if given.tokens is None and given.role in found:
                found[given.role].add(given.real(given.x, seen[batch].valid.to(self.device)))

        first = stream = self._embedded(seen)
        for index, tensors in self._blocks("survey"):
            block = self._block(index, tensors)
            stream = self._entering(index, stream, seen, first)
            groups = [group for group in block.layer.groups if group.role in roles]
            found = {group.role: Hessian.zeros(group.inputs, self.device) for group in groups}
            stream = outputs(block, stream, self.read_expert, partial(add, found))
            see(index, tensors, found)

    def head_hessian(self, dtype: torch.dtype) -> Hessian:
        """H of what the head reads; in memory are one block and the hidden states of about ``HEAD_TOKENS`` tokens."""
        seen = batched(_drawn(self.batches, HEAD_TOKENS)[0])
        first = stream = [hidden.to(dtype) for hidden in self._embedded(seen)]
        for index, tensors in self._blocks("head"):
            entering = self._entering(index, stream, seen, first)
            stream = outputs(self._block(index, tensors, dtype), entering, self.read_expert)
        return head_hessian(self.model, seen, stream, self.dense.closing(), self.device)

    def costs(
        self,
        tokens: int,
        weights: WeightTrials | None = None,
        inputs: InputTrials | None = None,
        tables: TableTrials | None = None,
    ) -> dict[Key, float]:
        """``Survey.costs``. A killed run goes on from what is in the folder."""
        outer = {self.model.embedding: self.dense.embedding(), **self.dense.closing()}
        model = PlainDecoder(
            replace(self.model, tied=self.dense.tied), self.read_block, outer, self.device,
            inputs=self.dense.token_inputs(), read_expert=self.read_expert,
        )  # fmt: skip
        folder = None if self.folder is None else self.folder / f"costs-{next(self.calls)}"
        chosen = batched(_drawn(self.batches, tokens)[0])
        return divergences(
            model, chosen, weights=weights, inputs=inputs, tables=tables, seed=self.seed, folder=folder,
            progress=self.progress,
        )  # fmt: skip

    def table(self, role: str) -> Tensor:
        """The embedding or the head ``[V, d]``, as stored."""
        return self.dense.embedding() if role == "embedding" else self.dense.closing()[self.model.head]

    def _embedded(self, batches: Sequence[Batch]) -> list[Tensor]:
        embedding = self.dense.embedding().float()
        return [embed(self.model, b.tokens, embedding).to(self.device) for b in batches]

    def _block(self, index: int, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> DecoderBlock:
        """Without its experts."""
        return DecoderBlock(self.model, index, tensors, self.device, dtype, experts=False)

    def _entering(
        self, index: int, hidden: Sequence[Tensor], batches: Sequence[Batch], first: Sequence[Tensor]
    ) -> list[Tensor]:
        """Hidden states as block ``index`` takes them; ``first``: those in front of the first block."""
        inputs = self.dense.token_inputs()
        return [
            inputs.join(index, states, batch.tokens, embedded.clone)
            for states, batch, embedded in zip(hidden, batches, first, strict=True)
        ]

    def _blocks(self, what: str) -> Iterator[tuple[int, dict[str, Tensor]]]:
        for index in range(len(self.model.layers)):
            if self.progress:
                self.progress(f"{what} {index + 1}/{len(self.model.layers)}", index, len(self.model.layers))
            yield index, self.read_block(index)


def table_names(dense: DenseModel) -> dict[str, str]:
    """``embedding`` and, unless it is tied, ``head`` → module name."""
    model = dense.description
    found = {"embedding": model.embedding, **({} if dense.tied else {"head": model.head})}
    return {role: name.removesuffix(".weight") for role, name in found.items()}


def header_bytes(name: str, shape: tuple[int, ...]) -> int:
    """At most what the headers of the files need for a weight, which may become codes, scales of two kinds and zero
    points, or for another tensor."""
    return (4 if len(shape) == 2 else 1) * (len(name) + HEADER)


def packed_bytes(shape: tuple[int, int], grid: Grid) -> int:
    """Of a dense weight ``(C_out, C_in)`` on a grid."""
    return LinearSpec(
        shape, grid.bits, grid.group_size, grid.symmetric, scale_bits=grid.scale_bits, format=grid.format
    ).packed_bytes


def stored_name(dense: DenseModel, module: str) -> str:
    """Under which a module's weight is stored; a tied model may hold either table."""
    name = f"{module}.weight"
    return dense.description.embedding_name(dense.checkpoint) if name == dense.description.embedding else name


def head_hessian(
    model: Decoder, batches: Sequence[Batch], hidden: Iterable[Tensor], closing: Mapping[str, Tensor], device: str
) -> Hessian:
    """H of the final norm's outputs, from the last block's ``hidden`` ``[B, T, d]`` of every batch; ``closing`` has the
    norm's tensors by full name."""
    found = Hessian.zeros(model.hidden, device)
    norm = {name: closing[name].to(device, torch.float32) for name in model.final_norm.names()}
    for batch, states in zip(batches, hidden, strict=True):
        found.add(final_norm(model, states[batch.valid.to(states.device)].to(device).float(), norm))
    return found


def _drawn(batches: Sequence[Batch], tokens: int) -> tuple[list[Tensor], list[Tensor]]:
    """Sequences of about so many tokens, evenly over all, and the sequences left."""
    sequences = [row[keep] for b in batches for row, keep in zip(b.tokens, b.valid, strict=True)]
    mean = sum(map(len, sequences)) / len(sequences)
    count = min(len(sequences), max(1, round(tokens / mean)))
    chosen = {int((i + 0.5) * len(sequences) / count) for i in range(count)}
    return [sequences[i] for i in sorted(chosen)], [s for i, s in enumerate(sequences) if i not in chosen]

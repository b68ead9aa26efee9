"""Walks through the dense model before the real one, for recipe steps that concern the whole model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tulle.compression.recipe import Recipe
from tulle.core.hessian import Hessian
from tulle.core.rotation import Extremes
from tulle.core.transform import Permutation
from tulle.errors import UserError
from tulle.methods.contract import Progress, See, Statistics, Survey, Trials
from tulle.models.batches import Batch, batched
from tulle.models.decoder import DecoderBlock, embed, final_norm, logits
from tulle.models.description import Decoder
from tulle.models.rewrite import Source
from tulle.models.watch import run_replaced, run_watched

TOKENS = 8192
"""Calibration tokens of the walk; its hidden states are in memory."""


@torch.no_grad()
def take_survey(
    model: Decoder,
    source: Source,
    recipe: Recipe,
    batches: Sequence[Batch],
    device: str = "cpu",
    progress: Progress | None = None,
    seed: int = 0,
) -> Survey:
    """Runs the recipe's model steps and returns what they decided. Equal inputs give equal decisions."""
    found: dict[tuple[int, str], Tensor] = {}
    norms: dict[tuple[int, str], Tensor] = {}
    first = model.layers[0]
    survey = Survey(
        layers=len(model.layers),
        rows=lambda block, role: found[block, role],
        block=lambda index: walk.read_block(index),
        roles={group.role: group.names for group in first.groups},
        norms={group.role: group.norm for group in first.groups if group.norm},
        prefix=lambda index: model.layers[index].prefix,
        hidden=model.hidden,
        heads=(first.mixer.heads, first.mixer.kv_heads, first.mixer.head_dim),
        seed=seed,
        column_norm=lambda block, role: norms[block, role],
    )
    walk, watched = _Walk(model, source, batches, device, progress), False
    for step in recipe.stage("model"):
        survey.probe, survey.look = walk.probe, walk.look
        if not watched and {"rows", "column_norm"} & step.method.needs:
            walk.watch(seed, found, norms)
            watched = True
        before = survey.residual, dict(survey.values)
        step.method.plan(survey, step.targets)
        if before != (survey.residual, survey.values):
            turned = [*survey.residual, *survey.values.values()]
            if survey.input_sparsity and not all(isinstance(t, Permutation) for t in turned):
                raise UserError(
                    "expected shares of dropped inputs to be measured in the basis that they are used in, found "
                    f"{step.name} after that; put {step.name} first"
                )
            walk, watched = replace(walk, source=source.rewritten(survey.residual, survey.values)), False
    return survey


@dataclass(frozen=True)
class _Walk:
    """The dense model, block by block, on the calibration text."""

    model: Decoder
    source: Source
    batches: Sequence[Batch]
    device: str
    progress: Progress | None

    def read_block(self, index: int) -> dict[str, Tensor]:
        """Float32 tensors of a block by relative name."""
        return {name: t.float().to(self.device) for name, t in self.source.read_block(index).items()}

    def watch(self, seed: int, found: dict[tuple[int, str], Tensor], norms: dict[tuple[int, str], Tensor]) -> None:
        """Fills ``found`` with the extreme rows and ``norms`` with the column norms of the inputs of every role."""
        taken: list[Batch] = []
        for batch in self.batches:
            if taken and sum(int(b.valid.sum()) for b in taken) + int(batch.valid.sum()) > TOKENS:
                break
            taken.append(batch)
        hidden = self._embedded(taken)
        for index, tensors in self._blocks("survey"):
            block = DecoderBlock(self.model, index, tensors, self.device)
            samplers: dict[str, Extremes] = {}
            seen: dict[str, Statistics] = defaultdict(Statistics)
            for i, batch in enumerate(taken):
                hidden[i], inputs = run_watched(block, hidden[i])
                for role, x in inputs.items():
                    sampler = samplers.setdefault(role, Extremes(x.shape[-1], per_segment=4, random=128, seed=seed))
                    x = x[batch.valid.to(self.device)]
                    sampler.add(x)
                    seen[role].add(x, frozenset({"column_norm"}))
            for role, sampler in samplers.items():
                found[index, role] = sampler.rows
                norm = seen[role].column_norm
                assert norm is not None
                norms[index, role] = norm

    def look(self, see: See, roles: Sequence[str]) -> None:
        """``Survey.look``; in memory are one block and the hidden states of about ``TOKENS`` tokens."""
        groups = [group for group in self.model.layers[0].groups if group.role in roles]
        seen = batched(_drawn(self.batches, TOKENS)[0])
        stream = self._embedded(seen)
        for index, tensors in self._blocks("survey"):
            block = DecoderBlock(self.model, index, tensors, self.device)
            found = {group.role: Hessian.zeros(group.inputs, self.device) for group in groups}
            for i, batch in enumerate(seen):
                stream[i], inputs = run_watched(block, stream[i])
                for role, hessian in found.items():
                    hessian.add(inputs[role][batch.valid.to(self.device)])
            see(index, tensors, found)

    def probe(self, trials: Trials, tokens: int, hessians: bool = True) -> dict[Hashable, float]:
        """Runs every trial (``Survey.probe``); in memory is one block, and the hidden states of each trial so far.

        Hessians are of other sequences than those that the divergence is measured on, where there is more than one.
        """
        probed, rest = _drawn(self.batches, tokens)
        seen = batched(_drawn(batched(rest), TOKENS)[0] if rest else probed)
        measured = batched(probed)
        stream, dense = self._embedded(seen), self._embedded(measured)
        running: dict[Hashable, list[Tensor]] = {}
        for index, tensors in self._blocks("probe"):
            block = DecoderBlock(self.model, index, tensors, self.device)
            found: dict[str, Hessian] = {}
            for batch, hidden in zip(seen, stream, strict=True) if hessians else ():
                for role, x in run_watched(block, hidden)[1].items():
                    if role not in found:
                        found[role] = Hessian.zeros(x.shape[-1], self.device)
                    found[role].add(x[batch.valid.to(self.device)])
            running = {key: [block(h) for h in states] for key, states in running.items()}
            for key, replaced in trials(index, tensors, found):
                running[key] = [run_replaced(block, h, replaced) for h in dense]
            stream = [block(h) for h in stream] if hessians else stream
            dense = [block(h) for h in dense]
        total: dict[Hashable, float] = dict.fromkeys(running, 0.0)
        predict = self._predictor()
        for i, batch in enumerate(measured):
            valid = batch.valid.to(self.device)
            wanted = predict(dense[i][valid])
            for key, states in running.items():
                given = predict(states[i][valid])
                total[key] += float(nn.functional.kl_div(given, wanted, log_target=True, reduction="sum"))
        return {key: value / sum(map(len, probed)) for key, value in total.items()}

    def _embedded(self, batches: Sequence[Batch]) -> list[Tensor]:
        embedding = self.source.embedding().float()
        return [embed(self.model, b.tokens, embedding).to(self.device) for b in batches]

    def _blocks(self, what: str) -> Iterator[tuple[int, dict[str, Tensor]]]:
        for index in range(len(self.model.layers)):
            if self.progress:
                self.progress(f"{what} {index + 1}/{len(self.model.layers)}", index, len(self.model.layers))
            yield index, self.read_block(index)

    def _predictor(self) -> Callable[[Tensor], Tensor]:
        """Log probabilities of the next token from the last block's outputs."""
        closing = [t.float().to(self.device) for t in self.source.closing().values()]
        gain = closing[0]
        head = closing[1] if len(closing) > 1 else self.source.embedding().float().to(self.device)

        def predict(hidden: Tensor) -> Tensor:
            return logits(self.model, final_norm(self.model, hidden, gain), head).log_softmax(-1)

        return predict


def _drawn(batches: Sequence[Batch], tokens: int) -> tuple[list[Tensor], list[Tensor]]:
    """Sequences of about so many tokens, evenly over all, and the sequences left."""
    sequences = [row[keep] for b in batches for row, keep in zip(b.tokens, b.valid, strict=True)]
    mean = sum(map(len, sequences)) / len(sequences)
    count = min(len(sequences), max(1, round(tokens / mean)))
    chosen = {int((i + 0.5) * len(sequences) / count) for i in range(count)}
    return [sequences[i] for i in sorted(chosen)], [s for i, s in enumerate(sequences) if i not in chosen]

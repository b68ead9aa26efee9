"""What changes of single linears cost the whole model: a second-order estimate from one pass forward and one backward.

With a small change of a linear's output, δy_t at token t, the mean KL divergence of the next token's distribution from
the dense model's is, to second order,

    KL ≈ 1/(2T)·E[(Σ_t g_tᵀδy_t)²],   g_t = ∂ log p(ŷ)/∂y_t,

where the labels ŷ of all tokens are drawn from the dense model's own distribution (its Fisher information; Amari 1998,
for pruning Hassibi & Stork 1993, Singh & Alistarh 2020). Tokens are taken to be independent, so that only squares of
single tokens remain. Then

- for pruned or rounded weights, δy = ΔW·x, and with g and x taken to be independent as well (K-FAC; Martens & Grosse
  2015) KL ≈ ½·tr(G·ΔW·M·ΔWᵀ), G = E[g·gᵀ] ``[C_out, C_out]``, M = E[x·xᵀ] ``[C_in, C_in]``: any number of Ŵ costs no
  further pass. Of several linears the costs are added;
- for selected inputs, δx = x⊙M − x, KL ≈ ½·E[(g_xᵀδx)²] with g_x the gradient at the group's input: the product is
  taken token by token, and of several groups added up before it is squared;
- for another embedding, δh is the difference of the token's rows, and the cost that of its inputs to the first block;
- for another head no estimate is needed: KL is computed, on some of the tokens;
- for an expert that sees n of the T tokens, G and M are of those, and the cost is n/T of the above.

**Experts.** One is in memory at a time. Σ_e w_e·y_e adds up, so that with the gradient g of the sum every expert is
differentiated by itself: w_e·g goes into it, y_eᵀg to the router's weight w_e. A change of weights is tried on
``TRIED_EXPERTS`` of a block alone, those with the most tokens. They stand for all: costs are scaled up by the tokens.
GPTQ and its like fit what they do to the tokens that the cost is then measured on. In an expert, with not many more
tokens n than channels C, the cost came out at a fifth to a half of what fresh tokens showed, and within a tenth of it
once H was drawn towards its diagonal by C/(n + C). So trials are given that H.

A trial's cost was measured before by running the rest of the model for every linear and setting, which grows with the
square of the depth. Here every block is run twice and differentiated once, whatever the number of blocks and trials:
four forward passes' worth. Sums over 8 or 64 tokens before squaring, whole sequences (the exact second order), G's
diagonal and its mean were tried as well, and are no better (docs/log.md).

Hidden states between blocks are kept, in memory or in ``folder``, from where a killed run goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tulle.core.hessian import Hessian
from tulle.core.topk import Selection
from tulle.core.trials import InputTrials, Key, TableTrials, WeightTrials
from tulle.errors import UserError
from tulle.models.decoder import DecoderBlock, GroupInput, PlainDecoder, drive, logits, run_group
from tulle.models.description import Expert, LinearGroup, Mixture, expert_role
from tulle.models.expert_pass import ParkedBatch, holding, outputs
from tulle.models.state import without_own

Progress = Callable[[str, int, int], None]

HEAD_TOKENS = 2048
"""Tokens that a head's divergence is computed on."""
TRIED_EXPERTS = 8
LOGITS = 1 << 25
"""Logits that are in memory at once."""


class Sequences(Protocol):
    """Right-padded sequences."""

    @property
    def tokens(self) -> Tensor:
        """int64 ``[B, T]``."""

    @property
    def valid(self) -> Tensor:
        """bool ``[B, T]``."""


def divergences(
    model: PlainDecoder,
    batches: Sequence[Sequences],
    *,
    weights: WeightTrials | None = None,
    inputs: InputTrials | None = None,
    tables: TableTrials | None = None,
    seed: int = 0,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> dict[Key, float]:
    """The estimated KL divergence from the dense model, nats per token, of every trial by key.

    Trials are asked for block by block, from the last to the first. In memory are one block, its G and H, and the
    hidden states of all batches, or of one block's with ``folder``. A call with the same arguments and folder goes on
    where a killed one stopped; the caller removes the folder. Equal seeds give equal results. Raises ``UserError`` for
    tables of a model where the embedding gives more than the stream.
    """
    if tables is not None and model.decoder.per_layer is not None:
        raise UserError(
            "expected an embedding that gives the residual stream alone, found inputs of single layers that are made "
            f"of it in {model.decoder.model_type}; leave tables out of what bits are allotted to"
        )
    states = _States(folder, len(batches), model.device)
    layers = len(model.decoder.layers)
    found, next_block = states.results()
    if next_block is None:
        _forward(model, batches, states, progress)
        states.write(f"gradient-{layers}", _label_gradients(model, batches, states.read(f"hidden-{layers}"), seed))
        if tables is not None:
            found = _head_costs(model, batches, states, tables)
        next_block = layers - 1
        states.finish_block(layers, found, ())
    for index in range(next_block, -1, -1):
        if progress:
            progress(f"sensitivity {layers - index}/{layers}", layers - 1 - index, layers)
        found |= _backward(model, index, batches, states, weights, inputs, keep=index > 0 or tables is not None)
        spent = [f"hidden-{index + 1}", f"gradient-{index + 1}", *([] if index else ["hidden-0"])]
        states.finish_block(index, found, spent)
    if tables is not None:
        for key, cost in _embedding_costs(model, batches, states, tables).items():
            found[key] = found.get(key, 0.0) + cost
    return found


@torch.no_grad()
def _head_costs(
    model: PlainDecoder, batches: Sequence[Sequences], states: _States, tables: TableTrials
) -> dict[Key, float]:
    """KL of every head; leaves H of the head's inputs."""
    decoder = model.decoder
    hessian, rows = Hessian.zeros(decoder.hidden, model.device), []
    for batch, hidden in zip(batches, states.read(f"hidden-{len(decoder.layers)}"), strict=True):
        rows.append(model.normed(hidden[batch.valid.to(hidden.device)]).float())
        hessian.add(rows[-1])
    states.write("head", [hessian.matrix])
    every = torch.cat(rows)
    x = every[:: -(-len(every) // HEAD_TOKENS)]
    role, found = "tied" if decoder.tied else "head", {}
    parts = x.split(max(1, LOGITS // decoder.vocabulary))
    for key, table in tables(role, hessian):
        found[key] = 0.0
        for part in parts:
            before = logits(decoder, part, model.head().float()).log_softmax(-1)
            after = logits(decoder, part, table).log_softmax(-1)
            found[key] += float((before.exp() * (before - after)).sum()) / len(x)
    return found


@torch.no_grad()
def _embedding_costs(
    model: PlainDecoder, batches: Sequence[Sequences], states: _States, tables: TableTrials
) -> dict[Key, float]:
    """½·E[(g_hᵀδh)²] of every embedding, g_h at the input of the first block."""
    matrix = next(iter(states.read("head", 1)))
    role = "tied" if model.decoder.tied else "embedding"
    gradients = list(states.read("gradient-0"))
    found, old = {}, model.embedding().float()
    for key, table in tables(role, Hessian(matrix, tokens=1)):
        lost, tokens = 0.0, 0
        for batch, gradient in zip(batches, gradients, strict=True):
            real = batch.valid.to(gradient.device)
            seen = batch.tokens.to(gradient.device)[real]
            change = (table[seen] - old[seen]) * model.decoder.embedding_scale
            lost += float((change * gradient[real].float()).sum(-1).double().square().sum())
            tokens += len(seen)
        found[key] = lost / (2 * tokens)
    return found


@torch.no_grad()
def _forward(model: PlainDecoder, batches: Sequence[Sequences], states: _States, progress: Progress | None) -> None:
    """Leaves the hidden states in front of every block and behind the last."""
    layers = len(model.decoder.layers)
    first = states.last("hidden", layers)
    if first is None:
        states.write("hidden-0", [model.embed(batch.tokens) for batch in batches])
        first = 0
    for index in range(first, layers):
        if progress:
            progress(f"survey {index + 1}/{layers}", index, layers)
        before = zip(batches, states.read(f"hidden-{index}"), strict=True)
        entering = (model.enter(index, hidden, batch.tokens) for batch, hidden in before)
        states.write(f"hidden-{index + 1}", outputs(model.block(index), entering, model.read_expert))


def _label_gradients(
    model: PlainDecoder, batches: Sequence[Sequences], hidden: Iterable[Tensor], seed: int
) -> list[Tensor]:
    """∂ log p(ŷ)/∂h ``[B, T, d]`` of the last block's outputs h, one label per real token, drawn from p."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for batch, states in zip(batches, hidden, strict=True):
        gradient = torch.zeros_like(states)
        real = batch.valid.to(states.device)
        parts = []
        for part in states[real].split(max(1, LOGITS // model.decoder.vocabulary)):
            part = part.detach().requires_grad_()
            with torch.enable_grad():
                log_p = model.predict(part).float().log_softmax(-1)
                labels = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator).to(log_p.device)
                parts.append(torch.autograd.grad(log_p.gather(-1, labels).sum(), part)[0])
        gradient[real] = torch.cat(parts)
        found.append(gradient)
    return found


def _backward(
    model: PlainDecoder,
    index: int,
    batches: Sequence[Sequences],
    states: _States,
    weights: WeightTrials | None,
    inputs: InputTrials | None,
    keep: bool,
) -> dict[Key, float]:
    """Costs of a block's trials. Leaves the gradient of the block's inputs where that is to be kept."""
    block = model.block(index)
    tensors = {name: t.detach() for name, t in block.state_dict().items()}
    thinned = [] if inputs is None else [(key, dict(chosen)) for key, chosen in inputs(index, tensors)]
    found: dict[Key, float] = {}
    mixed: list[_Mixed] | None = None
    if block.layer.experts:
        mixed, found = _experts(model, block, batches, states, weights, thinned)
    lost = {key: 0.0 for key, _ in thinned}
    watched = _Watched(block.layer.groups, block.device) if weights is not None else None
    tokens, before = 0, []
    stored = zip(batches, states.read(f"hidden-{index}"), states.read(f"gradient-{index + 1}"), strict=True)
    for i, (batch, hidden, gradient) in enumerate(stored):
        real, inside = batch.valid.to(hidden.device), None if mixed is None else mixed[i]
        tokens += int(real.sum())
        given = model.enter(index, hidden, batch.tokens)
        seen = _Differentiated(block, given, gradient, bool(thinned), weights is not None, inside)
        before.append(without_own(model.decoder, index, seen.before))
        if watched is not None:
            for role, x in seen.x.items():
                watched.h[role].add(x[real])
            for name, y in seen.of_outputs.items():
                watched.g[name].add(y[real])
        for key, chosen in thinned:
            product = sum(
                _thinned(seen.x[role], seen.of_inputs[role], s) for role, s in chosen.items() if role in seen.x
            )
            product = torch.as_tensor(product) if inside is None else product + inside.products[key].view(real.shape)
            lost[key] += float(product[real].double().square().sum())
    if keep:
        states.write(f"gradient-{index}", before)
    if weights is not None and watched is not None:
        _add(found, watched.costs(weights(index, tensors, watched.h), tensors), 1.0)
    return found | {key: value / (2 * tokens) for key, value in lost.items()}


class _Watched:
    """H of the inputs of groups by role, and of the gradients of their linears' outputs by relative name."""

    def __init__(self, groups: Sequence[LinearGroup], device: torch.device):
        self.h = {group.role: Hessian.zeros(group.inputs, device) for group in groups}
        self.g = {x.name: Hessian.zeros(x.shape[0], device) for group in groups for x in group.linears}
        self._roles = {name: group.role for group in groups for name in group.names}

    def costs(
        self, trials: Iterable[tuple[Key, Mapping[str, Tensor]]], tensors: Mapping[str, Tensor]
    ) -> Iterator[tuple[Key, float]]:
        """Per token that was seen."""
        for key, replaced in trials:
            cost = 0.0
            for name, weight in replaced.items():
                linear = name.removesuffix(".weight")
                change = weight.float() - tensors[name].float()
                cost += kronecker_cost(change, self.g[linear], self.h[self._roles[linear]])
            yield key, cost


def _add(found: dict[Key, float], costs: Iterable[tuple[Key, float]], share: float) -> None:
    for key, cost in costs:
        found[key] = found.get(key, 0.0) + share * cost


@dataclass
class _Mixed:
    """What a batch's experts say to the rest of the block."""

    total: Tensor
    """Σ_e w_e·y_e ``[N, d]``; zeros where nothing that follows depends on it."""
    of_x: Tensor
    """Gradient of what they read ``[N, d]``."""
    of_weights: Tensor
    """Gradient of the routes' weights ``[P]``."""
    products: dict[Key, Tensor]
    """g_xᵀ(x⊙M − x) ``[N]`` of trials of inputs, added up over a token's experts."""


def _experts(
    model: PlainDecoder,
    block: DecoderBlock,
    batches: Sequence[Sequences],
    states: _States,
    weights: WeightTrials | None,
    thinned: Sequence[tuple[Key, Mapping[str, Selection]]],
) -> tuple[list[_Mixed], dict[Key, float]]:
    """Differentiates a block's experts, one at a time; costs of changes of their weights."""
    layer, index = block.layer, block.layer.index
    with torch.no_grad():
        stored = zip(batches, states.read(f"hidden-{index}"), strict=True)
        entering = (model.enter(index, hidden, batch.tokens) for batch, hidden in stored)
        parked = [ParkedBatch(block, hidden.to(block.dtype)) for hidden in entering]
    mixed = [
        _Mixed(
            torch.zeros_like(batch.x),
            torch.zeros_like(batch.x),
            torch.zeros_like(batch.routes.weights),
            {key: batch.x.new_zeros(len(batch.x)) for key, _ in thinned},
        )
        for batch in parked
    ]
    mixture = layer.feed_forward
    assert isinstance(mixture, Mixture)
    if layer.feed_forward_norm_after or mixture.experts_norm_after:  # its gradient depends on what it is given
        for expert in layer.experts:
            with holding(block, expert, model.read_expert), torch.no_grad():
                for batch, own in zip(parked, mixed, strict=True):
                    at, weight = batch.routes.of_expert(expert.index)
                    own.total.index_add_(0, at, _Expert(block, expert, batch.x[at]).y * weight[:, None])
    gradients = [
        _of_total(batch, own, gradient)
        for batch, own, gradient in zip(parked, mixed, states.read(f"gradient-{index + 1}"), strict=True)
    ]
    real = [batch.valid.flatten().to(block.device) for batch in batches]
    counts = sum(
        torch.bincount(batch.routes.experts[seen[batch.routes.tokens]], minlength=len(layer.experts)).cpu()
        for batch, seen in zip(parked, real, strict=True)
    )
    assert isinstance(counts, Tensor)
    tried = [e for e in counts.argsort(descending=True, stable=True)[:TRIED_EXPERTS].tolist() if counts[e]]
    tokens = sum(int(seen.sum()) for seen in real)
    scale = int(counts.sum()) / max(1, sum(int(counts[e]) for e in tried)) / tokens
    found: dict[Key, float] = {}
    for expert in layer.experts:
        if not any(len(batch.routes.of_expert(expert.index)[0]) for batch in parked):
            continue
        watches = weights is not None and expert.index in tried
        watched = _Watched(expert.groups, block.device) if watches else None
        with holding(block, expert, model.read_expert) as tensors:
            for batch, own, gradient, seen in zip(parked, mixed, gradients, real, strict=True):
                at, weight = batch.routes.of_expert(expert.index)
                _through_expert(block, expert, batch, own, gradient, seen[at], thinned, watched)
            if watched is not None and weights is not None:
                n = int(counts[expert.index])
                drawn = {role: _towards_diagonal(hessian) for role, hessian in watched.h.items()}
                _add(found, watched.costs(weights(index, tensors, drawn), tensors), n * scale)
    return mixed, found


def _of_total(batch: ParkedBatch, mixed: _Mixed, gradient: Tensor) -> Tensor:
    """Gradient of the sum of a batch's experts' outputs ``[N, d]``."""
    total = torch.empty(0)

    def change(shared: Tensor) -> Tensor:
        nonlocal total
        total = (shared.detach() + mixed.total).requires_grad_()
        return total.clone()

    with torch.enable_grad():
        out = batch.skip(change)
        (found,) = torch.autograd.grad(out, total, gradient.to(out.dtype))
    return found


class _Expert:
    """Tokens x ``[n, d]`` on their way through an expert that the block holds."""

    def __init__(self, block: DecoderBlock, expert: Expert, x: Tensor):
        reads, writes = expert.groups
        self.x, self.outputs = x, run_group(block, reads, x)
        self.inner = block.inner_of_expert(self.outputs)
        (self.y,) = run_group(block, writes, self.inner)


def _through_expert(
    block: DecoderBlock,
    expert: Expert,
    batch: ParkedBatch,
    mixed: _Mixed,
    gradient: Tensor,
    real: Tensor,
    thinned: Sequence[tuple[Key, Mapping[str, Selection]]],
    watched: _Watched | None,
) -> None:
    """Forward and back through an expert with a batch's tokens, of which ``real`` ``[n]`` are no padding."""
    at, weight = batch.routes.of_expert(expert.index)
    if not len(at):
        return
    reads, writes = expert.groups
    with torch.enable_grad():
        own = _Expert(block, expert, batch.x[at].detach().requires_grad_())
    of_y = gradient[at] * weight[:, None].detach()
    of_x, of_inner, *of_outputs = torch.autograd.grad(own.y, [own.x, own.inner, *own.outputs], of_y.to(own.y.dtype))
    mixed.of_x.index_add_(0, at, of_x)
    rows = batch.routes.rows_of(expert.index)
    mixed.of_weights[rows] = (own.y.detach() * gradient[at]).sum(-1).to(mixed.of_weights.dtype)
    sides = ((reads.role, own.x.detach(), of_x), (writes.role, own.inner.detach(), of_inner))
    for key, chosen in thinned:
        for role, x, back in sides:
            if (selection := chosen.get(expert_role(role))) is not None:
                mixed.products[key].index_add_(0, at, _thinned(x, back, selection))
    if watched is not None:
        for role, x, _ in sides:
            watched.h[role].add(x[real])
        for name, back in zip((*reads.names, *writes.names), (*of_outputs, of_y), strict=True):
            watched.g[name].add(back[real])


def _towards_diagonal(hessian: Hessian) -> Hessian:
    """Its own H, drawn towards the diagonal by C/(n + C) of its n tokens and C channels."""
    channels, n = len(hessian.matrix), hessian.tokens
    drawn = hessian.matrix * (n / (n + channels))
    drawn.diagonal().copy_(hessian.matrix.diagonal())
    return Hessian(drawn, n)


def kronecker_cost(change: Tensor, g: Hessian, h: Hessian) -> float:
    """½·tr(G·ΔW·M·ΔWᵀ) of ΔW ``[C_out, C_in]``; a :class:`Hessian` holds twice its second moment."""
    return float(((g.matrix @ change) * (change @ h.matrix)).double().sum()) / 8


def _thinned(x: Tensor, gradient: Tensor, selection: Selection) -> Tensor:
    """g_xᵀ(x⊙M − x) ``[B, T]``."""
    return (gradient * (selection.apply(x) - x)).sum(-1)


class _Differentiated:
    """One batch's way through a block, and the gradients of ``gradient``·output; ``mixed``: what experts that are not
    in the block have to say."""

    def __init__(
        self,
        block: DecoderBlock,
        hidden: Tensor,
        gradient: Tensor,
        of_inputs: bool,
        of_outputs: bool,
        mixed: _Mixed | None = None,
    ):
        hidden = hidden.to(block.dtype).detach().requires_grad_()
        x: dict[str, Tensor] = {}
        y: dict[str, Tensor] = {}

        def answer(given: GroupInput) -> tuple[Tensor, ...]:
            x[given.role] = given.x
            answers = run_group(block, given.group, given.x)
            y.update(zip(given.group.names, answers, strict=True))
            return answers

        ends: list[Tensor] = []
        backs: list[Tensor] = []
        with torch.enable_grad():
            if mixed is None:
                ends.append(drive(block.steps(hidden), answer))
            else:
                batch = ParkedBatch(block, hidden, answer)
                ends += [batch.skip(lambda shared: shared + mixed.total), batch.x, batch.routes.weights]
                backs += [mixed.of_x, mixed.of_weights]
        wanted = [hidden, *(x.values() if of_inputs else ()), *(y.values() if of_outputs else ())]
        found = iter(torch.autograd.grad(ends, wanted, [gradient.to(ends[0].dtype), *backs]))
        self.before = next(found)
        """Of the block's input ``[B, T, d]``."""
        self.of_inputs = {role: next(found).detach() for role in x} if of_inputs else {}
        """Of every group's input, by role."""
        self.of_outputs = {name: next(found) for name in y} if of_outputs else {}
        """Of every linear's output, by relative name."""
        self.x = {role: value.detach() for role, value in x.items()}


class _States:
    """Lists of tensors by name, in memory or in files of a folder, and the results so far."""

    def __init__(self, folder: Path | None, batches: int, device: str | torch.device):
        self._folder, self._batches, self._device = folder, batches, str(device)
        self._memory: dict[str, list[Tensor]] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, tensors: list[Tensor]) -> None:
        if self._folder is None:
            self._memory[name] = tensors
            return
        part = self._folder / f"{name}.part"
        save_file({str(i): t.detach().cpu().contiguous() for i, t in enumerate(tensors)}, part)
        os.replace(part, self._file(name))

    def read(self, name: str, count: int | None = None) -> Iterator[Tensor]:
        """What was written: a tensor per batch, or ``count``."""
        if self._folder is None:
            yield from self._memory[name]
            return
        stored = load_file(self._file(name), self._device)
        yield from (stored[str(i)] for i in range(self._batches if count is None else count))

    def last(self, what: str, most: int) -> int | None:
        """The largest number under which there is something."""
        return next((i for i in range(most, -1, -1) if self._folder and self._file(f"{what}-{i}").exists()), None)

    def results(self) -> tuple[dict[Key, float], int | None]:
        """Costs so far, and the block that comes next; None: the forward pass is not through."""
        file = None if self._folder is None else self._folder / "costs.json"
        if file is None or not file.exists():
            return {}, None
        stored = json.loads(file.read_text())
        return {tuple(key): value for key, value in stored["costs"]}, stored["done"] - 1

    def finish_block(self, index: int, costs: Mapping[Key, float], spent: Sequence[str]) -> None:
        """Commits the costs of all blocks from ``index`` on, then drops what no block needs any more."""
        if self._folder is not None:
            part = self._folder / "costs.part"
            part.write_text(json.dumps({"done": index, "costs": [[list(key), v] for key, v in costs.items()]}))
            os.replace(part, self._folder / "costs.json")
        for name in spent:
            self._memory.pop(name, None)
            if self._folder is not None:
                self._file(name).unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{name}.safetensors"

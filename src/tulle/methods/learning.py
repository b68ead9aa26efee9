"""Settings of a block's quantisation learned by gradient: the block's output against the dense block's.

A learned method describes, per group, differentiable maps in front of the linears and, per linear, the ends of the
weights' grid; :func:`learn_block` puts fake-quantised linears into the block, trains on the calibration hidden states
and takes them out again. Rounding is passed straight through (STE); steps and zero points are differentiated, as in
OmniQuant (Shao et al. 2023).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from tulle.core.grid import Grid, GroupSize, extremes, grouped
from tulle.core.token_grid import TokenGrid
from tulle.core.transform import Diagonal, Transform, fold, run
from tulle.methods.contract import BlockState, Decision, LinearState, Method, Stage


def round_through(x: Tensor) -> Tensor:
    """round(x) with the gradient of x."""
    return x + (x.round() - x).detach()


def fake_quantise(x: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool, narrow: bool = False) -> Tensor:
    """x on a grid with ends low and high (shapes broadcast), differentiable in all three.

    ``narrow``: the symmetric grid has as many negative as positive codes (activations); else one more (weights).
    """
    if symmetric:
        top = (1 << (bits - 1)) - 1
        step = torch.maximum(low.abs(), high.abs()).clamp(min=1e-12) / top
        return round_through(x / step).clamp(-top if narrow else -top - 1, top) * step
    top = (1 << bits) - 1
    low, high = low.clamp(max=0), high.clamp(min=0)
    step = (high - low).clamp(min=1e-12) / top
    zero = round_through(-low / step)
    return ((round_through(x / step) + zero).clamp(0, top) - zero) * step


class WeightClip(nn.Module):
    """Ends of a weight's grid: the extremes times sigmoid(p), p learned (OmniQuant eq. 2)."""

    def __init__(self, rows: int, groups: int, learned: bool, start: float = 4.0):
        super().__init__()
        shape = (rows, groups)
        self.low, self.high = (nn.Parameter(torch.full(shape, start), requires_grad=learned) for _ in range(2))
        self.learned = learned

    def ranges(self, weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """(low, high), ``[C_out, G]`` each."""
        low, high = extremes(weight, grid)
        return (low * self.low.sigmoid(), high * self.high.sigmoid()) if self.learned else (low, high)


@dataclass
class LearnedGroup:
    """What is learned about one group, on top of the transforms that it has."""

    maps: Callable[[], Sequence[Transform]] = tuple
    """Maps in front of the linears, behind those that are there, from the parameters as they are now."""
    before: Callable[[], Sequence[Transform]] = tuple
    """The same in front of those that are there."""
    parameters: list[nn.Parameter] = field(default_factory=list)
    clip: nn.Parameter | None = None
    """Logit of the activations' clip ratio, or None: the clip of the input grid stays."""
    held: tuple[Tensor, tuple[object, ...], Tensor] | None = field(default=None, repr=False)
    """Inputs of this pass, by what they were rounded, and the result: linears of a group share it."""

    def input_clip(self) -> Tensor | None:
        return None if self.clip is None else self.clip.sigmoid()


class FakeLinear(nn.Module):
    """A linear with transformed and rounded inputs and weight, differentiable in what is learned."""

    def __init__(
        self, linear: LinearState, bias: Tensor | None, group: LearnedGroup, grid: Grid | None, learn_clip: bool
    ):
        super().__init__()
        self.dense, self.bias, self.fixed = linear.dense, bias, linear.transform
        self.ready = linear.folded()
        self.grid, self.input_grid, self.group = grid, linear.input_grid, group
        columns = self.dense.shape[1]
        groups = 1 if grid is None or grid.group_size is None else columns // grid.group_size
        self.clip = WeightClip(self.dense.shape[0], groups, learn_clip)

    def folded(self) -> Tensor:
        before = self.group.before()
        ready = fold(self.fixed, fold(before, self.dense)) if before else self.ready
        return fold(self.group.maps(), ready)

    def forward(self, x: Tensor) -> Tensor:
        x = self._rounded(x)
        weight = self.folded()
        if self.grid is not None:
            low, high = self.clip.ranges(weight, self.grid)
            parts = grouped(weight, self.grid.group_size)
            weight = fake_quantise(parts, low[..., None], high[..., None], self.grid.bits, self.grid.symmetric).reshape(
                weight.shape
            )
        return nn.functional.linear(x, weight, self.bias)

    def _rounded(self, x: Tensor) -> Tensor:
        """The transformed, rounded inputs."""
        by = (self.input_grid, *map(id, self.fixed))
        if self.group.held is not None and self.group.held[0] is x and self.group.held[1] == by:
            return self.group.held[2]
        found = run(self.group.maps(), run(self.fixed, run(self.group.before(), x)))
        if self.input_grid is not None:
            found = fake_tokens(found, self.input_grid, self.group.input_clip())
        self.group.held = (x, by, found)
        return found


def fake_tokens(x: Tensor, grid: TokenGrid, clip: Tensor | None = None) -> Tensor:
    """x̂ of a token grid, differentiable; ``clip`` replaces the grid's own ratio."""
    ratio = grid.clip if clip is None else clip
    if grid.symmetric:
        high = x.abs().amax(-1, keepdim=True) * ratio
        return fake_quantise(x, -high, high, grid.bits, True, narrow=True)
    low, high = x.amin(-1, keepdim=True) * ratio, x.amax(-1, keepdim=True) * ratio
    return fake_quantise(x, low, high, grid.bits, False)


@dataclass(frozen=True)
class Schedule:
    """How a block is trained."""

    epochs: int
    """Passes over the calibration batches."""
    rate: float
    """Peak learning rate of the maps; falls along a cosine."""
    clip_rate: float
    """Learning rate of clipping parameters."""


@dataclass(frozen=True)
class Learned(Method):
    """Base of the methods that learn against the dense block's output, for a grid of weights that follows.

    Models with experts are refused: all experts of a block would have to be in memory at once."""

    stages: ClassVar[tuple[Stage, ...]] = ("block",)
    refuses_experts: ClassVar[str] = "learns through whole blocks"
    learns: ClassVar[bool] = True

    settles: ClassVar[frozenset[Decision]] = frozenset({"clipping"})

    bits: int = 4
    """Bits of a weight's code, as the step that quantises later in the recipe has it."""
    group_size: GroupSize = None
    """Input channels per step, as the step that quantises has it."""
    symmetric: bool = False
    """Whether codes lie around 0, as the step that quantises has it."""

    def __post_init__(self) -> None:
        self.grid()

    def grid(self, columns: int | None = None) -> Grid:
        """The grid of a linear with so many input channels."""
        return Grid.of(self.bits, self.group_size, self.symmetric, columns)

    def validate(self, name: str, shape: tuple[int, int]) -> None:
        self.grid(shape[1]).check(name, shape[1])

    def keep_clips(
        self, block: BlockState, groups: Mapping[str, LearnedGroup], linears: Mapping[str, FakeLinear]
    ) -> None:
        """Leaves the learned ends of the weights' grids, and clip ratios of inputs, in the linears' states."""
        for role, group in groups.items():
            ratio = group.input_clip()
            for linear in block.groups[role].linears:
                fake = linears[linear.name]
                low, high = fake.clip.ranges(fake.folded(), self.grid(fake.dense.shape[1]))
                linear.ranges = (low.detach(), high.detach())
                if ratio is not None and linear.input_grid is not None:
                    linear.input_grid = replace(linear.input_grid, clip=float(ratio))


def input_clip(block: BlockState, role: str, wanted: bool = True) -> nn.Parameter | None:
    """A logit for the clip ratio of a role's input, or None without a quantiser or if not wanted.

    Starts from the grid's own ratio, or as weights do (sigmoid(4) = 0.982) where that is 1.
    """
    grid = block.groups[role].linears[0].input_grid
    if not wanted or grid is None:
        return None
    return nn.Parameter(torch.tensor(4.0 if grid.clip > 0.982 else math.log(grid.clip / (1 - grid.clip))))


@contextmanager
def replaced(module: nn.Module, linears: Mapping[str, nn.Module]) -> Iterator[None]:
    """Stands ``linears`` in a module's submodules for a while, by name."""
    originals = {name: module.get_submodule(name) for name in linears}
    try:
        for name, linear in linears.items():
            _put(module, name, linear)
        yield
    finally:
        for name, linear in originals.items():
            _put(module, name, linear)


def _put(module: nn.Module, name: str, child: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, child)


def fake_linears(
    block: BlockState,
    groups: Mapping[str, LearnedGroup],
    grid: Callable[[int], Grid],
    roles: Sequence[str],
    learn_clip: bool,
) -> dict[str, FakeLinear]:
    """A fake-quantised linear for every linear of the roles, by full name; ``grid`` of a number of input channels."""
    return {
        linear.name: FakeLinear(
            linear, block.biases.get(linear.name), groups[role], grid(linear.dense.shape[1]), learn_clip
        )
        for role in roles
        for linear in block.groups[role].linears
    }


def learn_block(
    block: BlockState,
    linears: Mapping[str, FakeLinear],
    groups: Mapping[str, LearnedGroup],
    schedule: Schedule,
    after_step: Callable[[int, int], None] | None = None,
    keep_best: bool = True,
) -> list[float]:
    """Trains what the groups and clips hold; leaves the best state seen (or the last).

    Returns the loss of every epoch, the first being that of the start: Σ|ŷ − y|²/Σ|y|² over real tokens, the block's
    output against the dense block's.

    ``after_step(step, steps)`` runs after every optimizer step (a gradual mask, a retraction to a manifold).
    """
    assert block.batches is not None and block.forward is not None and block.module is not None
    run_block, batches = block.forward, list(block.batches())

    def forward(x: Tensor) -> Tensor:
        for group in groups.values():
            group.held = None  # of parameters as they were
        return run_block(x)

    maps = [p for group in groups.values() for p in group.parameters if p.requires_grad]
    clips = [g.clip for g in groups.values() if g.clip is not None]
    clips += [p for linear in linears.values() for p in linear.parameters() if p.requires_grad]
    every = maps + clips
    steps = max(schedule.epochs * len(batches), 1)
    settings = [{"params": maps, "lr": schedule.rate}] if maps else []
    settings += [{"params": clips, "lr": schedule.clip_rate}] if clips else []
    optimizer = torch.optim.AdamW(settings, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, steps, eta_min=min(schedule.rate, schedule.clip_rate) / 100
    )
    relative = {name: _relative(block.module, name) for name in linears}

    def total_loss() -> float:
        with torch.no_grad():
            lost, total = 0.0, 0.0
            for x, y, valid in batches:
                lost += float((forward(x) - y)[valid].square().sum())
                total += float(y[valid].square().sum())
        return lost / max(total, 1e-30)

    with torch.enable_grad(), replaced(block.module, {relative[name]: linear for name, linear in linears.items()}):
        history = [total_loss()]
        best, kept = history[0], [p.detach().clone() for p in every]
        done = 0
        for _ in range(schedule.epochs):
            for x, y, valid in batches:
                difference = (forward(x) - y)[valid]
                loss = difference.square().sum() / y[valid].square().sum()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(every, 1.0)
                optimizer.step()
                scheduler.step()
                done += 1
                if after_step:
                    after_step(done, steps)
            history.append(total_loss())
            if keep_best and history[-1] < best:
                best, kept = history[-1], [p.detach().clone() for p in every]
        if keep_best:
            with torch.no_grad():
                for parameter, value in zip(every, kept, strict=True):
                    parameter.copy_(value)
    for group in groups.values():
        group.held = None
    return history


def _relative(module: nn.Module, name: str) -> str:
    """A linear's name within its block."""
    parts = name.split(".")
    for start in range(len(parts)):
        candidate = ".".join(parts[start:])
        try:
            module.get_submodule(candidate)
            return candidate
        except AttributeError:
            continue
    raise KeyError(name)


class LearnedScale:
    """d ``[C_in]`` of x·diag(d) in front of a group, positive, equal for the query heads of one KV head."""

    def __init__(self, block: BlockState, role: str, start: Tensor):
        self.role = role
        self._heads = (block.kv_heads, block.heads // block.kv_heads, block.head_dim)
        if role == "o":
            start = start.reshape(self._heads)[:, 0].reshape(-1)
        self.parameter = nn.Parameter(start.log())

    def value(self) -> Tensor:
        scale = self.parameter.exp()
        if self.role != "o":
            return scale
        kv, shared, size = self._heads
        return scale.reshape(kv, 1, size).expand(kv, shared, size).reshape(-1)

    def maps(self) -> list[Transform]:
        return [Diagonal(self.value())]

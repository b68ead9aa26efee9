"""Looking into a running block: inputs of its groups, outputs of its linears, statistics of both."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tulle.core.token_grid import TokenGrid
from tulle.core.topk import Selection
from tulle.core.transform import Transform, run
from tulle.models.anatomy import Row
from tulle.models.skeleton import Block


class Stop(Exception):
    """Ends a forward pass once the last wanted input has been seen."""


def capture(block: Block, hidden: Tensor, rows: Sequence[Row]) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Inputs of the rows' linears, and the residual stream they are added to, by role; stops after the last."""
    inputs: dict[str, Tensor] = {}
    streams: dict[str, Tensor] = {}

    def keep(role: str, last: bool) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            inputs[role] = arguments[0]
            if last:
                raise Stop

        return hook

    def keep_stream(role: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            streams[role] = arguments[0]

        return hook

    hooks = [(row.linears[0], keep(row.role, row is rows[-1])) for row in rows]
    hooks += [(row.residual, keep_stream(row.role)) for row in rows if row.residual]
    with hooked(block.module, hooks):
        try:
            block(hidden)
        except Stop:
            pass
    return {role: (x, streams.get(role)) for role, x in inputs.items()}


def run_watched(block: Block, hidden: Tensor, rows: Sequence[Row]) -> tuple[Tensor, dict[str, Tensor]]:
    """The block's output, and the inputs of the rows' linears by role."""
    inputs: dict[str, Tensor] = {}

    def keep(role: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            inputs[role] = arguments[0]

        return hook

    with hooked(block.module, [(row.linears[0], keep(row.role)) for row in rows]):
        return block(hidden), inputs


def run_with_stream(block: Block, hidden: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    """The residual stream that enters ``norm``, and the block's output."""
    seen: list[Tensor] = []
    with hooked(block.module, [(norm, lambda module, arguments: seen.append(arguments[0]))]):
        out = block(hidden)
    return seen[0].to(out.dtype), out


def run_compared(block: Block, hidden: Tensor, names: Sequence[str], see: Callable[[str, Tensor], None]) -> Tensor:
    """The block's output; ``see(name, output)`` for each linear."""
    handles = [
        block.module.get_submodule(name).register_forward_hook(lambda m, a, y, name=name: see(name, y))
        for name in names
    ]
    try:
        return block(hidden)
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def hooked(module: nn.Module, hooks: Sequence[tuple[str, Any]]) -> Iterator[None]:
    """Forward pre-hooks on submodules by name, for a while."""
    handles = [module.get_submodule(name).register_forward_pre_hook(hook) for name, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class QuantisedInput:
    """Forward pre-hook: x → what the selection keeps of the quantiser's x̂ of x·T. Keeps the last result, for the
    siblings that read the same x."""

    def __init__(self, transform: tuple[Transform, ...], grid: TokenGrid | None, selection: Selection | None = None):
        self._transform, self.grid, self._selection = transform, grid, selection
        self._seen: Tensor | None = None
        self._result: Tensor | None = None

    def __call__(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
        x = arguments[0]
        if self._result is None or self._seen is not x:
            result = run(self._transform, x.float())
            if self.grid is not None:
                rounded = self.grid.fake(result.detach())
                # Straight through, for what is trained behind it.
                result = result + (rounded - result).detach() if result.requires_grad else rounded
            if self._selection is not None:
                result = self._selection.apply(result)
            self._seen, self._result = x, result.to(x.dtype)
        return (self._result,)


def select_inputs(selection: Selection) -> Callable[..., tuple[Tensor]]:
    """A forward pre-hook."""
    return lambda module, arguments: (selection.apply(arguments[0]),)


class Gap:
    """Σ|ŷ − y|² and Σ|y|² per name: ``keep`` a reference output, then ``compare`` the other model's with it."""

    def __init__(self) -> None:
        self.valid = torch.empty(0)
        self._kept: dict[str, Tensor] = {}
        self._lost: dict[str, float] = defaultdict(float)
        self._total: dict[str, float] = defaultdict(float)

    def keep(self, name: str, y: Tensor) -> None:
        self._kept[name] = y[self.valid].float()

    def compare(self, name: str, y: Tensor) -> None:
        reference = self._kept.pop(name)
        self._lost[name] += float((y[self.valid] - reference).square().sum())
        self._total[name] += float(reference.square().sum())

    def share(self, name: str) -> float:
        return self._lost[name] / max(self._total[name], 1e-30)

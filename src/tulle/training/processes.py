"""The processes that train together, by accelerate: one, DDP or FSDP2, as ``accelerate launch`` says.

A recipe gives the same curve on any number of processes, up to the order of additions: each takes its rows of every
micro-batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tulle.errors import UserError


class Processes:
    """This process among those that train together."""

    def __init__(self) -> None:
        self._accelerator = _accelerator()

    @property
    def rank(self) -> int:
        return int(self._accelerator.process_index)

    @property
    def count(self) -> int:
        return int(self._accelerator.num_processes)

    @property
    def main(self) -> bool:
        """Whether this one writes files and speaks."""
        return bool(self._accelerator.is_main_process)

    @property
    def sharded(self) -> bool:
        """FSDP2 shards the weights."""
        return bool(self._accelerator.is_fsdp2)

    @property
    def device(self) -> torch.device:
        return torch.device(self._accelerator.device)

    def wait(self) -> None:
        """Until all are here."""
        self._accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process runs the block before the others do."""
        with self._accelerator.main_process_first():
            yield

    def wrap(
        self, model: nn.Module, optimizers: list[torch.optim.Optimizer]
    ) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
        """The model to call, and torch's own optimizers of its (possibly sharded) parameters.

        Raises ``UserError`` for Muon on sharded weights.
        """
        if self.sharded and any(isinstance(o, torch.optim.Muon) for o in optimizers):
            raise UserError(
                "expected optimizer: adamw under FSDP2, found muon, which needs whole matrices; launch with DDP instead"
            )
        # A new one for every model: it keeps what it has wrapped.
        self._accelerator = _accelerator()
        wrapped, *prepared = self._accelerator.prepare(model, *optimizers)
        return wrapped, [getattr(optimizer, "optimizer", optimizer) for optimizer in prepared]

    def mean(self, value: float) -> float:
        """The mean of a number over the processes."""
        if self.count == 1:
            return value
        found = self._accelerator.reduce(torch.tensor(value, device=self.device), reduction="mean")
        assert isinstance(found, Tensor)
        return float(found)

    def micro_batches(self, model: nn.Module, rows: Tensor, size: int) -> Iterator[Tensor]:
        """This process's rows ``[size / count, T]`` of each micro-batch of ``rows`` ``[batch * accumulation, T]``.

        Gradients are exchanged with the last one only. Raises ``UserError`` for a batch that the processes cannot
        share evenly.
        """
        *parts, last = rows.split(size)
        for part in parts:
            with self._without_exchange(model):
                yield self._local(part)
        yield self._local(last)

    def _local(self, rows: Tensor) -> Tensor:
        if len(rows) % self.count:
            raise UserError(
                f"expected a batch that {self.count} processes can share, found {len(rows)} sequences; "
                "try a multiple, or other processes"
            )
        return rows[self.rank :: self.count].to(self.device)

    def _without_exchange(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        if self.count == 1:
            return contextlib.nullcontext()
        return self._accelerator.no_sync(model)


def _accelerator() -> Accelerator:
    # Precision is the recipe's: autocast in the loop, whatever the launcher's configuration says.
    return Accelerator(mixed_precision="no", cpu=not torch.cuda.is_available())

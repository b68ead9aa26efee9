"""Top-KAST: always sparse training (Jayakumar et al. 2021, "Top-KAST: Top-K Always Sparse Training").

Per layer, A = TopK(|θ|, D) is what the forward pass uses; the gradient is taken on B = TopK(|θ|, D + M) ⊃ A and is zero
elsewhere (section 2.1). The penalty of section 2.3 lets weights of B that are not in A grow into it only if they are
worth it:

    λ·( |θ_A|² + |θ_{B∖A}|² / D ),   D the forward *density*.

Masks are chosen anew every ``refresh`` steps (appendix: every 100 is as good as every step). After a fraction
``explore`` of the training A stays as it is and only A is trained, until the end.

No gradient outside B is ever stored: the trainable parameter of a layer is the vector of B's values ``[|B|]``, whose
gradient and optimizer states are of that size. The rest of θ is a buffer. What is dense and passes is one layer's
weight and its gradient at a time. As weights move between B and the rest, an entry that enters B starts with an
optimizer state of zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tulle.core.masks import largest
from tulle.errors import UserError
from tulle.methods.train.method import TrainingMethod, optimizer_state


class _Scatter(torch.autograd.Function):
    """values ``[|B|]`` → W ``[C_out, C_in]``, those in A, zero elsewhere; the gradient comes back on all of B."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, used: Tensor, index: Tensor, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(index)
        weight = values.new_zeros(shape.numel())
        weight[index] = values * used
        return weight.view(shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (index,) = ctx.saved_tensors
        return gradient.reshape(-1)[index], None, None, None


class TopKASTLinear(nn.Linear):
    """A linear that trains the values of B and computes with those of A."""

    theta: Tensor
    """θ ``[C_out, C_in]``, a buffer; its entries in B are stale between two refreshes."""
    values: nn.Parameter
    """θ_B ``[|B|]``."""
    index: Tensor
    """Where B lies in the flattened θ, ascending, ``[|B|]``."""
    used: Tensor
    """bool ``[|B|]``: which of B are in A."""

    def effective(self) -> Tensor:
        """θ ⊙ A ``[C_out, C_in]``."""
        found: Tensor = _Scatter.apply(self.values, self.used, self.index, self.theta.shape)
        return found

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.effective(), self.bias)


def penalty(values: Tensor, used: Tensor, density: float) -> Tensor:
    """|θ_A|² + |θ_{B∖A}|²/D for θ_B ``[|B|]`` of which ``used`` are in A."""
    return (values.square() * torch.where(used, 1.0, 1.0 / density)).sum()


@dataclass(eq=False)
class TopKAST(TrainingMethod):
    """Top-KAST on every targeted linear. To be used with AdamW; weight decay does not reach the values of B.

    Raises ``UserError`` for fractions outside their range.
    """

    sharded: ClassVar[bool] = False
    settles: ClassVar[frozenset[str]] = frozenset({"mask", "forward"})

    forward_sparsity: float = 0.8
    """1 − D: share of the weights that the forward pass leaves out."""
    backward_sparsity: float = 0.5
    """1 − (D + M): share of the weights that get no gradient."""
    penalty: float = 1e-4
    """λ of the penalty on the weights that are trained."""
    refresh: int = 100
    """Optimizer steps between two choices of the masks."""
    explore: float = 0.5
    """Fraction of the training after which A stays and only A is trained."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.backward_sparsity <= self.forward_sparsity < 1:
            raise UserError(
                "expected 0 <= backward_sparsity <= forward_sparsity < 1, found "
                f"{self.backward_sparsity} and {self.forward_sparsity}; such as 0.5 and 0.8"
            )
        if self.refresh < 1 or not 0 <= self.explore <= 1 or self.penalty < 0:
            raise UserError(
                "expected refresh >= 1, explore in [0, 1] and penalty >= 0, found "
                f"{self.refresh}, {self.explore}, {self.penalty}; the paper refreshes every 100 steps"
            )
        self.layers: dict[str, TopKASTLinear] = {}
        self._changed: float | None = None
        self._first: dict[str, Tensor] = {}

    @property
    def density(self) -> float:
        """D."""
        return 1 - self.forward_sparsity

    def prepare(self, model: nn.Module, steps: int = 0, linears: Mapping[str, nn.Linear] | None = None) -> None:
        super().prepare(model, steps, linears)
        for name, linear in self.linears.items():
            layer = _converted(linear)
            self._choose(layer, layer.theta)
            layer.values = nn.Parameter(layer.theta.reshape(-1)[layer.index].clone())
            self.layers[name] = layer
        self._first = {name: self.mask(name) for name in self.layers}

    def _choose(self, layer: TopKASTLinear, theta: Tensor) -> None:
        """A and B of θ."""
        magnitude = theta.detach().abs().reshape(1, -1)
        n = magnitude.shape[1]
        a = largest(magnitude, round(self.density * n))[0]
        b = largest(magnitude, round((1 - self.backward_sparsity) * n))[0]
        index = b.nonzero()[:, 0]
        layer.register_buffer("index", index, persistent=False)
        layer.register_buffer("used", a[index], persistent=False)

    def mask(self, name: str) -> Tensor:
        """A as bool ``[C_out, C_in]``."""
        layer = self.layers[name]
        flat = torch.zeros(layer.theta.numel(), dtype=torch.bool, device=layer.theta.device)
        flat[layer.index] = layer.used
        return flat.view(layer.theta.shape)

    def exploring(self, step: int) -> bool:
        """Whether masks may still change after step ``step``."""
        return not self.steps or step < round(self.explore * self.steps)

    def loss_terms(self, inputs: Mapping[str, Tensor], outputs: Any) -> dict[str, Tensor]:
        if not self.penalty:
            return {}
        terms = [penalty(layer.values, layer.used, self.density) for layer in self.layers.values()]
        return {"top_kast": self.penalty * torch.stack(terms).sum()}

    @torch.no_grad()
    def after_backward(self, step: int) -> None:
        if self.exploring(step):
            return
        for layer in self.layers.values():
            if layer.values.grad is not None:
                layer.values.grad.mul_(layer.used)

    @torch.no_grad()
    def after_step(self, step: int, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        if not self.exploring(step) or (step + 1) % self.refresh:
            return
        changed = total = 0
        for name, layer in self.layers.items():
            before = self.mask(name)
            self._refresh(layer, optimizers)
            changed += int((before & ~self.mask(name)).sum())
            total += int(before.sum())
        self._changed = changed / max(total, 1)

    def _refresh(self, layer: TopKASTLinear, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        flat, old = layer.theta.view(-1), layer.index
        flat[old] = layer.values
        self._choose(layer, layer.theta)
        layer.values.copy_(flat[layer.index])
        for state in optimizer_state(layer.values, optimizers).values():
            dense = torch.zeros_like(flat, dtype=state.dtype)
            dense[old] = state
            state.copy_(dense[layer.index])

    def metrics(self) -> dict[str, float]:
        """``mask_change``: fraction of A that the last refresh replaced; ``mask_change_total``: since the start."""
        gone = sum(int((first & ~self.mask(name)).sum()) for name, first in self._first.items())
        found = {"mask_change_total": gone / max(sum(int(first.sum()) for first in self._first.values()), 1)}
        if self._changed is not None:
            found["mask_change"] = self._changed
            self._changed = None
        return found

    def state(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            found |= {f"{name}.first": self._first[name], f"{name}.theta": layer.theta}
            found |= {f"{name}.index": layer.index, f"{name}.used": layer.used}
        return found

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for name, layer in self.layers.items():
            self._first[name] = state[f"{name}.first"].to(layer.theta.device)
            for buffer in ("theta", "index", "used"):
                getattr(layer, buffer).copy_(state[f"{name}.{buffer}"])

    @torch.no_grad()
    def finish(self) -> None:
        for layer in self.layers.values():
            weight = layer.effective().detach()
            del layer.values, layer.theta, layer.index, layer.used
            layer.__class__ = nn.Linear  # type: ignore[assignment]
            layer.weight = nn.Parameter(weight)


def _converted(linear: nn.Linear) -> TopKASTLinear:
    """The same module as another class, its weight a buffer."""
    theta = linear.weight.detach().clone()
    del linear.weight
    linear.__class__ = TopKASTLinear
    linear.register_buffer("theta", theta, persistent=False)
    assert isinstance(linear, TopKASTLinear)
    return linear

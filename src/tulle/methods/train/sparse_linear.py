"""Linears that train on their kept entries only: faster because they are sparse.

W has a mask that is held, so of Y = X·Wᵀ, dX = dY·W and dW = dYᵀ·X only the kept entries count; the native kernels of
``tulle.native.SparsePattern`` compute no others (docs/training-kernels.md). ``SparseLinear`` keeps nothing else either:
its parameter holds the kept values, so that the gradient and the optimizer's state are as small as they are. Every
elementwise optimizer (SGD, Adam, AdamW with decay, clipping by norm) takes the same steps as on a dense weight with the
mask held; Muon, whose update is a matrix function, does not.

float32 on the CPU. Under autocast the product is still taken in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tulle.errors import UserError
from tulle.native import SparsePattern

MIN_SPARSITY = 0.4
"""Below it a dense product is about as fast, and needs no indices."""


class SparseProduct(torch.autograd.Function):
    """x [..., C] ↦ x·Wᵀ + b [..., R], where W has ``values`` [kept] at the entries of ``pattern``."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, pattern: SparsePattern) -> Tensor:
        rows, columns = pattern.shape
        flat = x.detach().reshape(-1, columns).contiguous()
        ctx.pattern, ctx.shape = pattern, x.shape
        ctx.save_for_backward(flat if values.requires_grad else None, values)
        start = None if bias is None else bias.detach().numpy()
        y = pattern.product(values.detach().numpy(), flat.numpy(), start, torch.get_num_threads())
        return torch.from_numpy(y).view(*x.shape[:-1], rows)

    @staticmethod
    @once_differentiable
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, *gradients: Any) -> Any:  # type: ignore[override]  # its decorators are typed loosely
        x, values = ctx.saved_tensors
        pattern: SparsePattern = ctx.pattern
        flat = gradients[0].reshape(-1, pattern.shape[0]).contiguous()
        threads = torch.get_num_threads()
        dx = dvalues = dbias = None
        if ctx.needs_input_grad[0]:
            dx = torch.from_numpy(pattern.input_gradient(values.numpy(), flat.numpy(), threads)).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            dvalues = torch.from_numpy(pattern.weight_gradient(x.numpy(), flat.numpy(), threads))
        if ctx.needs_input_grad[2]:
            dbias = flat.sum(0)
        return dx, dvalues, dbias, None


class SparseLinear(nn.Module):
    """An ``nn.Linear`` whose mask is held. Its state dict is that of the dense linear: ``weight`` and ``bias``.

    ``values`` [kept] is the parameter, in the kernels' order; ``entries`` [kept] says where each one lies in the
    flattened weight.
    """

    entries: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None = None, mask: Tensor | None = None):
        """weight [C_out, C_in], float32 on the CPU; ``mask`` alike, bool, True = kept (default: weight ≠ 0)."""
        super().__init__()
        if weight.dtype != torch.float32 or weight.device.type != "cpu" or weight.ndim != 2:
            raise UserError(
                f"expected a float32 matrix on the CPU, found {weight.dtype} {tuple(weight.shape)} on {weight.device}; "
                "convert the model with .float().cpu(), or train it dense"
            )
        kept = weight.detach() != 0 if mask is None else mask
        if kept.shape != weight.shape or kept.dtype != torch.bool:
            raise UserError(
                f"expected a bool mask of shape {tuple(weight.shape)}, found {kept.dtype} {tuple(kept.shape)}; "
                "take one that was made for this weight"
            )
        self.out_features, self.in_features = weight.shape
        self.pattern = SparsePattern(kept.numpy())
        self.register_buffer("entries", torch.from_numpy(self.pattern.entries), persistent=False)
        self.values = nn.Parameter(weight.detach().reshape(-1)[self.entries])
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    @classmethod
    def from_linear(cls, linear: nn.Linear, mask: Tensor | None = None) -> SparseLinear:
        """Copies; ``requires_grad`` of weight and bias is kept."""
        made = cls(linear.weight, linear.bias, mask)
        made.values.requires_grad_(linear.weight.requires_grad)
        if made.bias is not None:
            made.bias.requires_grad_(linear.bias.requires_grad)
        return made.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """The dense linear, zeros included."""
        made = nn.Linear(self.in_features, self.out_features, bias=False)
        made.weight = nn.Parameter(self.weight, self.values.requires_grad)
        if self.bias is not None:
            made.bias = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return made.train(self.training)

    @property
    def weight(self) -> Tensor:
        """Dense [C_out, C_in], a copy without gradient."""
        return self._dense(self.values)

    @property
    def mask(self) -> Tensor:
        """bool [C_out, C_in], True = kept."""
        return self._dense(torch.ones(self.pattern.kept, dtype=torch.bool))

    @property
    def sparsity(self) -> float:
        return 1 - self.pattern.kept / (self.in_features * self.out_features)

    def _dense(self, values: Tensor) -> Tensor:
        flat = torch.zeros(self.out_features * self.in_features, dtype=values.dtype)
        flat[self.entries] = values.detach()
        return flat.view(self.out_features, self.in_features)

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise UserError(
                f"expected inputs of {self.in_features} channels, found shape {tuple(x.shape)}; check the layer before"
            )
        if not torch.is_autocast_enabled("cpu") and not x.dtype == self.values.dtype == torch.float32:
            raise UserError(
                f"expected float32 inputs and values, found {x.dtype} and {self.values.dtype}; "
                "convert with .float(), or run under autocast"
            )
        return cast(Tensor, SparseProduct.apply(x, self.values, self.bias, self.pattern))

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"sparsity={self.sparsity:.3f}"
        )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        wanted = ["weight"] if self.bias is None else ["weight", "bias"]
        missing_keys += [prefix + name for name in wanted if strict and prefix + name not in state_dict]
        here = [key for key in state_dict if key.startswith(prefix)]
        unexpected_keys += [key for key in here if strict and key[len(prefix) :] not in wanted]
        weight, bias = state_dict.get(prefix + "weight"), state_dict.get(prefix + "bias")
        with torch.no_grad():
            if weight is not None:
                if weight.shape != (self.out_features, self.in_features):
                    error_msgs.append(f"{prefix}weight: expected {self.weight.shape}, found {weight.shape}")
                elif int(torch.count_nonzero(weight.masked_fill(self.mask, 0))):
                    error_msgs.append(f"{prefix}weight: expected zeros where the held mask has them, found others")
                else:
                    self.values.copy_(weight.reshape(-1)[self.entries])
            if bias is not None and self.bias is not None:
                if bias.shape != self.bias.shape:
                    error_msgs.append(f"{prefix}bias: expected {self.bias.shape}, found {bias.shape}")
                else:
                    self.bias.copy_(bias)


def sparsify(
    model: nn.Module, masks: Mapping[str, Tensor] | None = None, min_sparsity: float = MIN_SPARSITY
) -> dict[str, SparseLinear]:
    """Replaces, in place, every ``nn.Linear`` with at least ``min_sparsity`` zeros; returns the new ones by name.

    ``masks`` by the linear's name; without one, a linear's zeros are its mask. Linears whose weight is shared with
    another module (a tied output head) stay. Make the optimizer afterwards: the parameters are others. Raises
    ``UserError`` for a mask of a name that is no linear of the model.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name in masks or {}:
        if name not in linears:
            raise UserError(
                f"expected masks by names of linears, found {name!r}; names are those of model.named_modules()"
            )
    holders: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    made: dict[str, SparseLinear] = {}
    for name, linear in linears.items():
        mask = (masks or {}).get(name)
        kept = linear.weight.detach() != 0 if mask is None else mask
        if holders[id(linear.weight)] == 1 and 1 - int(kept.sum()) / kept.numel() >= min_sparsity:
            made[name] = SparseLinear.from_linear(linear, kept)
            _replace(model, name, made[name])
    return made


def densify(model: nn.Module) -> nn.Module:
    """Replaces, in place, every ``SparseLinear`` by the ``nn.Linear`` it stands for; returns the model."""
    for name, module in list(model.named_modules()):
        if isinstance(module, SparseLinear):
            if not name:
                return module.to_linear()
            _replace(model, name, module.to_linear())
    return model


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    if not name:
        raise UserError("expected a model that contains linears, found a linear; use SparseLinear.from_linear")
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)

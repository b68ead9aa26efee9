"""LaRoSA: Liu et al., ICML 2025, "La RoSA: Enhancing LLM Efficiency via Layerwise Rotated Sparse Activation".

Dropping inputs costs least where few of them carry most of the energy. For inputs X with second moment C = XᵀX/T, the
basis of C's eigenvectors Q, by falling eigenvalue, is the one whose first k coordinates keep the most of it for every k
(principal components). x·Q is multiplied with W·Q, so that the function stays, and Top-K is taken of x·Q.

- Residual stream (``qkv``, ``gate_up``): Q of C = Σ C_l over all norms' outputs, their gains taken out. It is folded
  into embeddings, readers, writers and head (:mod:`tulle.models.rewrite`). Experts read what their router reads.
- ``o``: one Q per KV head, of the outputs of the query heads that share it, folded into v and o.
- ``down``: what comes in is a product of channels, and keeps its basis.

Where we depart: the paper gives every layer a Q of its own and carries the stream from one basis to the next by a
product at run time (QᵀQ′, d² weights that every token reads); here one serves the whole model and nothing is left at
run time. The selecting step follows, ``teal`` (thresholds, or the paper's Top-K by ``kind: top_k``) or ``wina``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tulle.core.hessian import Hessian
from tulle.core.transform import BlockMatrix
from tulle.errors import UserError
from tulle.methods.contract import Method, Stage, Survey, gain
from tulle.models.description import LinearGroup


def principal_components(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, falling, ``[..., d]`` and eigenvectors as columns ``[..., d, d]`` of second moments ``[..., d, d]``,
    float64. The largest entry of each vector is positive, so that equal moments give equal signs."""
    values, vectors = torch.linalg.eigh(moment.double())
    values, vectors = values.flip(-1), vectors.flip(-1)
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    return values, vectors * torch.where(largest < 0, -1.0, 1.0)


@dataclass(frozen=True)
class LaRoSA(Method):
    """Rotates inputs to their principal components before others select among them; targets say which."""

    stages: ClassVar[tuple[Stage, ...]] = ("model",)

    residual: bool = True
    """Rotate the residual stream for q, k, v and gate, up."""
    heads: bool = True
    """Rotate the values, head by head, for o."""

    def changes_residual_basis(self, roles: Sequence[str]) -> bool:
        return self.residual and bool({"qkv", "gate_up"} & set(roles))

    def plan(self, survey: Survey, roles: tuple[str, ...]) -> None:
        assert survey.look is not None
        blocks = range(survey.layers) if self.residual else ()
        readers = list(dict.fromkeys(group.role for index in blocks for group in _readers(survey, index, roles)))
        rotated = [*readers, *(["o"] if self.heads and "o" in roles else [])]
        if not rotated:
            raise UserError(
                "expected larosa to rotate the inputs of qkv and gate_up (residual) or o (heads), found targets and "
                "settings that leave neither; leave the step out"
            )
        if (readers and survey.residual) or ("o" in rotated and survey.values_taken):
            raise UserError(
                "expected one step that changes the basis of the residual stream or the values, found larosa after "
                "another; leave one of them out"
            )
        stream = torch.zeros(survey.hidden, survey.hidden, dtype=torch.float64)
        values: dict[int, Tensor] = {}

        def see(index: int, tensors: dict[str, Tensor], hessians: dict[str, Hessian]) -> None:
            for hessian in hessians.values():
                hessian.check_finite()
            for group in _readers(survey, index, roles) if readers else ():
                scale = gain(tensors, group.norm)
                scale = torch.where(scale == 0, torch.ones_like(scale), scale)
                # Norms give out equal energy, so that all count alike.
                stream.add_((hessians[group.role].matrix / scale / scale[:, None]).double().cpu())
            if "o" in rotated and "o" in hessians:
                values[index] = by_kv_head(hessians["o"].matrix.cpu(), *survey.heads[index])

        survey.look(see, rotated)
        survey.values_taken |= "o" in rotated
        if readers:
            survey.residual = (_rotation(survey, "residual stream", stream),)
        for index, moment in values.items():
            survey.values[index] = _rotation(survey, f"block {index}, values", moment)


def _readers(survey: Survey, index: int, roles: Sequence[str]) -> list[LinearGroup]:
    """Of the residual stream, through a norm; the router where experts read beside it and no shared one does."""
    found = survey.readers(index, [role for role in roles if role != "router"])
    if "gate_up" in roles and survey.experts_of(index) and all(group.role != "gate_up" for group in found):
        found += survey.readers(index, ["router"])
    return found


def by_kv_head(moment: Tensor, heads: int, kv_heads: int, head_dim: int) -> Tensor:
    """Of o's inputs ``[h·b, h·b]``: those of each head with itself, summed over the query heads of a KV head,
    ``[kv_heads, b, b]``."""
    blocks = moment.view(heads, head_dim, heads, head_dim).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    return blocks.reshape(kv_heads, -1, head_dim, head_dim).sum(1)


def _rotation(survey: Survey, what: str, moment: Tensor) -> BlockMatrix:
    """To principal components; a note says what half of the coordinates hold before and after, over all heads."""
    energy, vectors = principal_components(moment)
    half = moment.shape[-1] // 2
    before = moment.diagonal(dim1=-2, dim2=-1).sort(descending=True).values
    old, new = (float(e[..., :half].sum() / e.sum().clamp(min=1e-30)) for e in (before, energy))
    survey.notes.append(f"larosa: {what}, half of the coordinates hold {old:.1%} → {new:.1%} of the energy")
    return BlockMatrix(vectors.float())

"""LaRoSA: Liu et al., ICML 2025, "La RoSA: Enhancing LLM Efficiency via Layerwise Rotated Sparse Activation".

Dropping inputs costs least where few of them carry most of the energy. For inputs X with second moment C = XᵀX/T, the
basis of C's eigenvectors Q, by falling eigenvalue, is the one whose first k coordinates keep the most of it for every k
(principal components). x·Q meets W·Q, so that the function stays, and Top-K is taken of x·Q.

- Residual stream (``qkv``, ``gate_up``): Q of C = Σ C_l over all norms' outputs, their gains taken out. It is folded
  into embeddings, readers, writers and head (:mod:`tulle.models.rewrite`).
- ``o``: one Q per KV head, of the outputs of the query heads that share it, folded into v and o.
- ``down``: what comes in is a product of channels, and keeps its basis.

Where we depart: the paper gives every layer a Q of its own and carries the stream from one basis to the next by a
product at run time (QᵀQ′, d² weights that every token reads); here one serves the whole model and nothing is left at
run time. The selecting step follows, ``teal`` (thresholds, or the paper's Top-K by ``kind: top_k``) or ``wina``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tulle.core.contract import Method, Replacements, Stage, Survey
from tulle.core.hessian import Hessian
from tulle.core.transform import BlockMatrix
from tulle.errors import UserError


def principal_components(moment: Tensor) -> Tensor:
    """Eigenvectors of second moments ``[..., d, d]`` as columns, by falling eigenvalue, float64; the largest entry of
    each is positive, so that equal moments give equal signs."""
    vectors = torch.linalg.eigh(moment.double()).eigenvectors.flip(-1)
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)


@dataclass(frozen=True)
class LaRoSA(Method):
    """Turns inputs into their principal components before others select among them; targets say which."""

    stages: ClassVar[tuple[Stage, ...]] = ("model",)

    residual: bool = True
    """Rotate the residual stream for q, k, v and gate, up."""
    heads: bool = True
    """Rotate the values, head by head, for o."""

    def plan(self, survey: Survey, roles: tuple[str, ...]) -> None:
        assert survey.probe is not None
        readers = [role for role in survey.norms if self.residual and role in roles]
        values = self.heads and "o" in roles
        if not readers and not values:
            return
        if survey.residual:
            raise UserError(
                "expected one change of the residual stream's basis, found larosa after another; leave one of them out"
            )
        stream = torch.zeros(survey.hidden, survey.hidden, dtype=torch.float64)
        heads: dict[int, Tensor] = {}

        def look(index: int, tensors: dict[str, Tensor], hessians: dict[str, Hessian]) -> Iterator[Replacements]:
            for role in readers:
                gain = tensors[f"{survey.norms[role]}.weight"]
                gain = torch.where(gain == 0, torch.ones_like(gain), gain)
                # Norms give out equal energy, so that all count alike.
                stream.add_((hessians[role].matrix / gain / gain[:, None]).double().cpu())
            if values:
                heads[index] = by_kv_head(hessians["o"].matrix, *survey.heads)
            yield from ()

        survey.probe(look, 0, True)
        if readers:
            survey.residual = (BlockMatrix(principal_components(stream).float()),)
            survey.notes.append(f"larosa: residual stream, {_energy(stream)}")
        for index, moment in heads.items():
            survey.values[index] = BlockMatrix(principal_components(moment).float().cpu())
            survey.notes.append(f"larosa: block {index}, values, {_energy(moment)}")


def by_kv_head(moment: Tensor, heads: int, kv_heads: int, head_dim: int) -> Tensor:
    """Of o's inputs ``[h·b, h·b]``: those of each head with itself, summed over the query heads of a KV head,
    ``[kv_heads, b, b]``."""
    blocks = moment.view(heads, head_dim, heads, head_dim).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    return blocks.reshape(kv_heads, -1, head_dim, head_dim).sum(1)


def _energy(moment: Tensor) -> str:
    """What half of the coordinates hold before and after, over all heads."""
    half = moment.shape[-1] // 2
    before = moment.diagonal(dim1=-2, dim2=-1).sort(descending=True).values
    after = torch.linalg.eigvalsh(moment.double()).flip(-1)
    found = (float(e[..., :half].sum() / e.sum().clamp(min=1e-30)) for e in (before, after))
    return "energy of the larger half of the coordinates {:.1%} → {:.1%}".format(*found)

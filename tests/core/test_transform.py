"""Transforms against plain matrices in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from tulle.core.hadamard import hadamard_matrix
from tulle.core.transform import (
    BlockMatrix,
    Diagonal,
    Hadamard,
    Kronecker,
    Permutation,
    Transform,
    fold,
    run,
    run_plain,
    stored,
    unfold,
)

C = 48
FLOATING = ("scale", "matrix", "left", "right")


def every_kind() -> list[tuple[Transform, Tensor]]:
    """A transform of each kind on 48 channels with its matrix T: apply(x) = x·T."""
    g = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    scale = torch.rand(C, generator=g, dtype=torch.float64) + 0.5
    index = torch.randperm(C, generator=g)
    orthogonal, _ = torch.linalg.qr(random(8, 8))
    several = random(4, 12, 12) + 6 * torch.eye(12, dtype=torch.float64)
    left, right = random(4, 4), random(12, 12)
    hadamard = hadamard_matrix(12).double() / 12**0.5
    return [
        (Diagonal(scale), torch.diag(scale)),
        (Permutation(index), torch.eye(C, dtype=torch.float64)[:, index]),
        (Hadamard(12), torch.block_diag(*[hadamard] * 4)),
        (BlockMatrix(orthogonal), torch.block_diag(*[orthogonal] * 6)),
        (BlockMatrix(several, orthogonal=False), torch.block_diag(*several)),
        (Kronecker(left, right), torch.kron(left, right)),
    ]


@pytest.mark.parametrize("number", range(6))
def test_against_the_matrix(number: int) -> None:
    transform, matrix = every_kind()[number]
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, C, generator=g, dtype=torch.float64)
    w = torch.randn(5, C, generator=g, dtype=torch.float64)
    inverse = torch.linalg.inv(matrix)
    torch.testing.assert_close(transform.apply(x), x @ matrix)
    torch.testing.assert_close(transform.fold(w), w @ inverse.T)
    torch.testing.assert_close(transform.unfold(w), w @ matrix.T)
    torch.testing.assert_close(transform.apply(x) @ transform.fold(w).T, x @ w.T)


def test_a_chain_keeps_the_product() -> None:
    chain = [transform for transform, _ in every_kind()]
    g = torch.Generator().manual_seed(1)
    x = torch.randn(7, C, generator=g, dtype=torch.float64)
    w = torch.randn(5, C, generator=g, dtype=torch.float64)
    folded = fold(chain, w)
    torch.testing.assert_close(run(chain, x) @ folded.T, x @ w.T)
    torch.testing.assert_close(unfold(chain, folded), w)


@pytest.mark.parametrize("blocks", [((8, 8), (12, 12)), ((4, 12, 12), (6, 8, 8))])
@pytest.mark.parametrize("shape", [(64, C), (3, 50, C), (2, C)])
def test_rotations_around_a_permutation_equal_the_plain_chain(
    blocks: tuple[tuple[int, ...], ...], shape: tuple[int, ...]
) -> None:
    g = torch.Generator().manual_seed(2)
    first, last = (BlockMatrix(torch.randn(*b, generator=g), orthogonal=False) for b in blocks)
    chain = [first, Permutation(torch.randperm(C, generator=g)), last]
    x = torch.randn(*shape, generator=g)
    torch.testing.assert_close(run(chain, x), run_plain(chain, x))
    gradients = []
    for runs in (run, run_plain):
        given = x.clone().requires_grad_()
        with torch.enable_grad():
            runs(chain, given).square().sum().backward()
        assert given.grad is not None
        gradients.append(given.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4 * float(gradients[1].abs().max()))


def test_dtype_is_kept() -> None:
    for transform, _ in every_kind():
        assert transform.apply(torch.ones(2, C, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_what_a_file_gives_back_keeps_the_product() -> None:
    g = torch.Generator().manual_seed(1)
    x, w = (torch.randn(n, C, generator=g) for n in (7, 5))
    for transform, _ in every_kind():
        fields = {f.name: getattr(transform, f.name) for f in dataclasses.fields(transform)}
        single = type(transform)(**{k: v.float() if k in FLOATING else v for k, v in fields.items()})
        rounded = stored(single)
        for name, tensor in rounded.tensors().items():
            values = getattr(rounded, name)
            assert torch.equal(values.double(), tensor.to(values.dtype).double())
        # float32 sums and a float32 inverse of matrices with a condition of about ten.
        torch.testing.assert_close(rounded.apply(x) @ rounded.fold(w).T, x @ w.T, rtol=1e-3, atol=1e-3)

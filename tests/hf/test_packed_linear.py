"""Simulated linears: the unpacker against format.pack, the integer path against int64 arithmetic."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tiny_models import as_torch, pack_random
from tulle.core.grid import Grid
from tulle.core.token_grid import TokenGrid
from tulle.format.pack import unpack_linear
from tulle.format.spec import TransformSpec
from tulle.hf.pack import packed_tensors, spec_of
from tulle.hf.packed_linear import PackedLinear, dequantise
from tulle.methods.contract import LinearState
from tulle.methods.quantize.round_to_nearest import round_to_nearest

INPUT = TokenGrid(8)
QUANTISED = [
    {"bits": bits, "group_size": group, "symmetric": symmetric, "sparse": sparse}
    for bits in (2, 3, 4, 5, 8)
    for group in (None, 10)
    for symmetric in (True, False)
    for sparse in (True, False)
]
FLOATING = [{"values_dtype": d, "sparse": s} for d in ("float32", "float16", "bfloat16") for s in (True, False)]


def weight(rows: int = 7, columns: int = 50, seed: int = 0) -> np.ndarray:
    # Odd sizes: nibbles, bit planes and masks all end in the middle of a byte.
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def packed_linear(w, bias=False, **scheme):
    spec, arrays = pack_random(w, **scheme)
    layer = PackedLinear(spec, bias=bias)
    layer.load_state_dict({k: as_torch(a) for k, a in arrays.items()}, strict=not bias)
    return layer, spec, arrays


@pytest.mark.parametrize("scheme", QUANTISED + FLOATING, ids=str)
def test_unpacks_as_the_format_does(scheme):
    layer, spec, arrays = packed_linear(weight(), **scheme)
    expected = unpack_linear(spec, arrays)
    assert expected.std() > 0.1
    assert np.array_equal(layer.dequantise().numpy(), expected)
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer(x), F.linear(x, torch.from_numpy(expected)))


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(("form", "size"), [("mxfp4", 32), ("nvfp4", 16)])
def test_floats_of_four_bits(form, size, sparse):
    scheme = {"bits": 4, "group_size": size, "scale_bits": 8, "format": form, "sparse": sparse}
    layer, spec, arrays = packed_linear(weight(7, 96), **scheme)
    expected = unpack_linear(spec, arrays)
    assert expected.std() > 0.1
    assert np.array_equal(layer.dequantise().numpy(), expected)
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer(x), F.linear(x, torch.from_numpy(expected)))
    rounding, *_ = packed_linear(weight(7, 96), input_bits=8, **scheme)
    assert torch.allclose(rounding(x), F.linear(INPUT.fake(x), torch.from_numpy(expected)), rtol=0, atol=4e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("form", ["mxfp4", "nvfp4"])
def test_what_was_quantised_to_floats_is_what_is_stored(form, masked):
    w = torch.from_numpy(weight(40, 96) * np.exp(2 * weight(40, 1)))
    w[3, 32:64] = 0
    mask = torch.rand(40, 96, generator=torch.Generator().manual_seed(0)) < 0.3 if masked else None
    linear = LinearState("x", w, w, "o", mask=mask)
    linear.quantised = round_to_nearest(w, Grid.of(4, None, True, format=form), 1, mask)
    linear.weight = linear.quantised.dequantise(mask)
    spec = spec_of(linear, torch.bfloat16)
    assert spec.sparse == masked and spec.format == form
    tensors = packed_tensors(linear, spec, torch.bfloat16)
    assert torch.equal(dequantise(spec, tensors), linear.weight)


def test_two_of_four():
    layer, spec, arrays = packed_linear(weight(8, 64), bits=4, sparse=True, pattern="2:4")
    assert np.array_equal(layer.dequantise().numpy(), unpack_linear(spec, arrays))


def test_empty_mask():
    spec, arrays = pack_random(weight(), bits=4, sparse=True)
    spec = type(spec)(shape=(7, 50), bits=4, sparse=True, nonzeros=0)
    tensors = {suffix: torch.zeros(shape, dtype=torch.uint8) for suffix, (_, shape) in spec.tensors().items()}
    assert not dequantise(spec, tensors).any()


def test_quantised_input_by_hand():
    x = torch.tensor([[0.0, 0.0, 0.0], [1.27, -0.635, 0.005], [-2.54, 0.03, 0.05]])
    codes, step = INPUT.quantise(x)
    assert step[:, 0].tolist() == pytest.approx([1.0, 0.01, 0.02], rel=1e-6)
    # 0.03/0.02 lies within rounding of 1.5 and is left out; halves are checked below, where they are exact.
    assert codes[0].tolist() == [0, 0, 0]
    assert codes[1, 0] == 127 and codes[2, 0] == -127 and codes[2, 2] in (2, 3)
    halves = torch.tensor([[127.0, 0.5, 1.5, -2.5]])
    assert INPUT.quantise(halves)[0].tolist() == [[127, 0, 2, -2]]
    assert torch.equal(INPUT.fake(halves), torch.tensor([[127.0, 0.0, 2.0, -2.0]]))
    assert INPUT.fake(halves.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("group", [None, 12000])
def test_integer_sums_are_exact(symmetric, sparse, group):
    # Thousands of columns of large codes: a single float32 matmul would pass 2^24 and round.
    w = np.abs(weight(5, 24000)) + 2
    scheme = {"bits": 8, "group_size": group, "symmetric": symmetric, "sparse": sparse, "input_bits": 8}
    layer, spec, arrays = packed_linear(w, bias=True, **scheme)
    with torch.no_grad():
        layer.bias.copy_(torch.arange(5.0))
    x = torch.rand(6, 24000, generator=torch.Generator().manual_seed(0)) + 0.5
    codes, step = INPUT.quantise(x)
    scale = layer.scale.double()
    whole = torch.from_numpy(unpack_linear(spec, arrays)).double() / scale.repeat_interleave(24000 // scale.shape[1], 1)
    sums = codes.long().reshape(6, 1, scale.shape[1], -1) * whole.round().long().reshape(1, 5, scale.shape[1], -1)
    expected = torch.zeros(6, 5)
    for g, total in enumerate(sums.sum(-1).unbind(-1)):
        assert int(total.max()) > 1 << 24
        expected += total.float() * layer.scale[:, g].float()
    expected = expected * step + layer.bias
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize(
    "grid", [INPUT, TokenGrid(4, symmetric=False), TokenGrid(6, clip=0.9), TokenGrid(4, False, 0.8)], ids=str
)
def test_integer_path_agrees_with_fake_quantisation(grid):
    scheme = {"input_bits": grid.bits, "input_symmetric": grid.symmetric, "input_clip": grid.clip}
    layer, spec, arrays = packed_linear(weight(16, 64), bits=4, group_size=16, **scheme)
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    expected = F.linear(grid.fake(x), torch.from_numpy(unpack_linear(spec, arrays)))
    y = layer(x)
    assert y.shape == (2, 3, 16)
    # Same numbers, other order of float32 rounding: 64 terms of size about 1.
    assert torch.allclose(y, expected, rtol=0, atol=2e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), y)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_transforms_run_in_order_and_are_shared():
    """x·diag(d)·P·H·M, by plain matrices in float64."""
    g = torch.Generator().manual_seed(0)
    specs = (
        TransformSpec("diagonal"), TransformSpec("permutation"), TransformSpec("hadamard", block=16),
        TransformSpec("block_matrix", block=8, shared=False), TransformSpec("kronecker", left=4, right=8),
    )  # fmt: skip
    w = weight(6, 32)
    base, arrays = pack_random(w, values_dtype="float32")
    spec = dataclasses.replace(base, transform=specs)
    layer, sibling = PackedLinear(spec), PackedLinear(dataclasses.replace(spec, transform_of="first"))
    tensors = {
        "transform.0.scale": torch.rand(32, generator=g) + 0.5,
        "transform.1.index": torch.randperm(32, generator=g).int(),
        "transform.3.matrix": torch.randn(4, 8, 8, generator=g).half(),
        "transform.4.left": torch.randn(4, 4, generator=g).half(),
        "transform.4.right": torch.randn(8, 8, generator=g).half(),
    }
    weights = {k: as_torch(a) for k, a in arrays.items()}
    layer.load_state_dict(weights | tensors)
    sibling.load_state_dict(weights)
    sibling.share_transform(layer)
    hadamard = torch.tensor([[1.0]], dtype=torch.float64)
    for _ in range(4):
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), hadamard)
    matrices = [
        torch.diag(tensors["transform.0.scale"].double()),
        torch.eye(32, dtype=torch.float64)[tensors["transform.1.index"].long()].T,
        torch.block_diag(hadamard / 4, hadamard / 4),
        torch.block_diag(*tensors["transform.3.matrix"].double()),
        torch.kron(tensors["transform.4.left"].double(), tensors["transform.4.right"].double()),
    ]
    product = torch.linalg.multi_dot(matrices)
    x = torch.randn(2, 5, 32, generator=g)
    expected = x.double() @ product @ torch.from_numpy(w).double().T
    for linear in (layer, sibling):
        # float32 sums of a few hundred terms of size about 10.
        torch.testing.assert_close(linear(x).double(), expected, rtol=1e-5, atol=1e-4 * float(expected.abs().max()))
    effective = (torch.from_numpy(w).double() @ product.T).float()
    torch.testing.assert_close(layer.effective(), effective, rtol=1e-4, atol=1e-4)


def test_a_shared_transform_sees_every_change_of_its_input():
    base, arrays = pack_random(weight(6, 32), values_dtype="float32")
    spec = dataclasses.replace(base, transform=(TransformSpec("hadamard", block=32),))
    layer = PackedLinear(spec)
    layer.load_state_dict({k: as_torch(a) for k, a in arrays.items()})
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    first = layer(x)
    assert torch.equal(layer(x), first)
    x.mul_(2)
    torch.testing.assert_close(layer(x), 2 * first)
    assert torch.equal(layer(x.clone()), layer(x))
    y = x.clone().requires_grad_(True)
    layer(y).sum().backward()
    assert y.grad is not None
    torch.testing.assert_close(y.grad, layer.effective().sum(0).expand(3, 32), rtol=1e-5, atol=1e-5)


def test_an_unconnected_transform_is_an_error():
    base, _ = pack_random(weight(6, 32), values_dtype="float32")
    spec = dataclasses.replace(base, transform=(TransformSpec("permutation"),), transform_of="elsewhere")
    with pytest.raises(RuntimeError, match="elsewhere has not been connected"):
        PackedLinear(spec)(torch.zeros(1, 32))


def test_quantised_input_with_floating_weights():
    layer, spec, arrays = packed_linear(weight(), values_dtype="bfloat16", sparse=True, input_bits=8)
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer(x), F.linear(INPUT.fake(x), torch.from_numpy(unpack_linear(spec, arrays))))


def test_cache_is_dropped_on_load_and_cast():
    layer, _, _ = packed_linear(weight(seed=1), bits=4)
    other, _, _ = packed_linear(weight(seed=2), bits=4)
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    before = layer(x)
    layer.load_state_dict(other.state_dict())
    assert not torch.equal(layer(x), before)
    assert torch.equal(layer(x), other(x))
    assert set(layer.state_dict()) == {"codes", "scale"}
    assert layer(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("scheme", [{"bits": 4}, {"values_dtype": "float32", "sparse": True}], ids=str)
def test_packed_tensors_keep_their_dtype(scheme):
    layer, spec, arrays = packed_linear(weight(), bias=True, **scheme)
    before = copy.deepcopy(dict(layer.named_buffers()))
    layer.to(torch.float16)
    assert layer.bias.dtype == torch.float16
    for name, buffer in layer.named_buffers():
        assert buffer.dtype == before[name].dtype and torch.equal(buffer, before[name])
    assert layer.to("meta").bias.device.type == "meta"
    assert all(buffer.device.type == "meta" for buffer in layer.buffers())

"""Simulated linears: the unpacker against format.pack, the integer path against int64 arithmetic."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tiny_models import as_torch, pack_random
from tulle.format.pack import unpack_linear
from tulle.simulate import PackedLinear, dequantise, fake_quantise_input, quantise_input

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
    codes, step = quantise_input(x)
    assert step[:, 0].tolist() == pytest.approx([1.0, 0.01, 0.02], rel=1e-6)
    # 0.03/0.02 lies within rounding of 1.5 and is left out; halves are checked below, where they are exact.
    assert codes[0].tolist() == [0, 0, 0]
    assert codes[1, 0] == 127 and codes[2, 0] == -127 and codes[2, 2] in (2, 3)
    halves = torch.tensor([[127.0, 0.5, 1.5, -2.5]])
    assert quantise_input(halves)[0].tolist() == [[127, 0, 2, -2]]
    assert torch.equal(fake_quantise_input(halves), torch.tensor([[127.0, 0.0, 2.0, -2.0]]))
    assert fake_quantise_input(halves.bfloat16()).dtype == torch.bfloat16


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
    codes, step = quantise_input(x)
    scale = layer.scale.double()
    whole = torch.from_numpy(unpack_linear(spec, arrays)).double() / scale.repeat_interleave(24000 // scale.shape[1], 1)
    sums = codes.long().reshape(6, 1, scale.shape[1], -1) * whole.round().long().reshape(1, 5, scale.shape[1], -1)
    expected = torch.zeros(6, 5)
    for g, total in enumerate(sums.sum(-1).unbind(-1)):
        assert int(total.max()) > 1 << 24
        expected += total.float() * layer.scale[:, g].float()
    expected = expected * step + layer.bias
    assert torch.equal(layer(x), expected)


def test_integer_path_agrees_with_fake_quantisation():
    layer, spec, arrays = packed_linear(weight(16, 64), bits=4, group_size=16, input_bits=8)
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    expected = F.linear(fake_quantise_input(x), torch.from_numpy(unpack_linear(spec, arrays)))
    y = layer(x)
    assert y.shape == (2, 3, 16)
    # Same numbers, other order of float32 rounding: 64 terms of size about 1.
    assert torch.allclose(y, expected, rtol=0, atol=2e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), y)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_quantised_input_with_floating_weights():
    layer, spec, arrays = packed_linear(weight(), values_dtype="bfloat16", sparse=True, input_bits=8)
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer(x), F.linear(fake_quantise_input(x), torch.from_numpy(unpack_linear(spec, arrays))))


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

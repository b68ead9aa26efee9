"""Packing is exact and checked: round trips of every kind of linear, and every kind of damaged tensor."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tulle.errors import UserError
from tulle.format import pack
from tulle.format.spec import LinearSpec

Arrays = dict[str, NDArray]


def random_linear(
    c_out: int,
    c_in: int,
    bits: int | None,
    group_size: int | None,
    symmetric: bool,
    density: float | None,
    seed: int,
    scale_bits: int = 16,
    zero_point_bits: int | None = None,
) -> tuple[LinearSpec, Arrays]:
    """A spec and the arguments of `pack_linear` for it."""
    rng = np.random.default_rng(seed)
    mask = None if density is None else rng.random((c_out, c_in)) < density
    spec = LinearSpec(
        shape=(c_out, c_in),
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        sparse=mask is not None,
        nonzeros=None if mask is None else int(mask.sum()),
        values_dtype="float16" if bits is None else None,
        scale_bits=16 if bits is None else scale_bits,
        zero_point_bits=None if symmetric else zero_point_bits,
    )
    arrays: Arrays = {} if mask is None else {"mask": mask}
    if bits is None:
        return spec, arrays | {"values": rng.standard_normal((c_out, c_in)).astype(np.float16)}
    arrays["values"] = rng.integers(0, 2**bits, (c_out, c_in), dtype=np.uint8)
    arrays["scale"] = pack.f32_to_bf16(rng.uniform(1e-3, 2, (c_out, spec.groups)).astype(np.float32))
    if scale_bits == 8:
        arrays["row_scale"] = arrays["scale"][:, 0].copy()
        arrays["scale"] = rng.integers(0, 256, (c_out, spec.groups), dtype=np.uint8)
    if not symmetric:
        arrays["zero_point"] = rng.integers(0, 2**bits, (c_out, spec.groups), dtype=np.uint8)
    return spec, arrays


def of_bits(bits: np.uint16) -> float:
    """The number that bits of bfloat16 mean."""
    return float(np.array(int(bits) << 16, np.uint32).view(np.float32))


def meaning(spec: LinearSpec, arrays: Arrays) -> NDArray[np.float64]:
    """The weights by the definition in docs/reference/format.md, one at a time, in double precision."""
    c_out, c_in = spec.shape
    weight = np.zeros((c_out, c_in))
    for i in range(c_out):
        for j in range(c_in):
            if spec.sparse and not arrays["mask"][i, j]:
                continue
            u = float(arrays["values"][i, j])
            if spec.bits is None:
                weight[i, j] = u
                continue
            group = 0 if spec.group_size is None else j // spec.group_size
            zero = 2 ** (spec.bits - 1) if spec.symmetric else int(arrays["zero_point"][i, group])
            scale = float(arrays["scale"][i, group])
            if spec.scale_bits == 8:
                scale *= of_bits(arrays["row_scale"][i])
            else:
                scale = of_bits(arrays["scale"][i, group])
            weight[i, j] = scale * (u - zero)
    return weight


@pytest.mark.parametrize("bits", [None, 2, 3, 4, 5, 6, 7, 8])
@given(
    c_out=st.integers(1, 5),
    groups=st.integers(1, 3),
    width=st.integers(1, 23),
    grouped=st.booleans(),
    symmetric=st.booleans(),
    density=st.sampled_from([None, 0.0, 0.3, 0.9, 1.0]),
    seed=st.integers(0, 2**32 - 1),
    scale_bits=st.sampled_from([16, 8]),
    zero_point_bits=st.sampled_from([None, 8]),
)
def test_round_trip(
    bits: int | None,
    c_out: int,
    groups: int,
    width: int,
    grouped: bool,
    symmetric: bool,
    density: float | None,
    seed: int,
    scale_bits: int,
    zero_point_bits: int | None,
) -> None:
    quantised = bits is not None
    group_size = width if grouped and quantised else None
    spec, arrays = random_linear(
        c_out, groups * width, bits, group_size, symmetric or not quantised, density, seed, scale_bits, zero_point_bits
    )
    tensors = pack.pack_linear(spec, **arrays)
    assert {name: array.shape for name, array in tensors.items()} == {
        name: shape for name, (_, shape) in spec.tensors().items()
    }
    assert sum(array.nbytes for array in tensors.values()) == spec.packed_bytes
    # Scales have at most 16 significant bits and u - zero 8 and a sign: float32 holds the product exactly.
    np.testing.assert_array_equal(pack.unpack_linear(spec, tensors), meaning(spec, arrays))
    if quantised:
        codes, mask = pack.unpack_linear_codes(spec, tensors)
        kept = np.ones(spec.shape, bool) if mask is None else mask
        np.testing.assert_array_equal(codes, np.where(kept, arrays["values"], 0))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_unquantised_values_keep_their_bits(dtype: str) -> None:
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((5, 37)).astype(np.float32)
    mask = rng.random((5, 37)) < 0.5
    values = pack.f32_to_bf16(weight) if dtype == "bfloat16" else weight.astype(dtype)
    stored = pack.bf16_to_f32(values) if dtype == "bfloat16" else values.astype(np.float32)
    spec = LinearSpec(shape=(5, 37), sparse=True, nonzeros=int(mask.sum()), values_dtype=dtype)
    tensors = pack.pack_linear(spec, values, mask)
    np.testing.assert_array_equal(tensors["values"], values[mask])
    np.testing.assert_array_equal(pack.unpack_linear(spec, tensors), np.where(mask, stored, 0))


def test_bytes_do_not_depend_on_pruned_values() -> None:
    spec, arrays = random_linear(4, 24, 4, 8, True, 0.5, seed=1)
    other = {**arrays, "values": np.where(arrays["mask"], arrays["values"], 15)}
    one, two = pack.pack_linear(spec, **arrays), pack.pack_linear(spec, **other)
    assert all(one[name].tobytes() == two[name].tobytes() for name in one)


def test_layout_by_hand() -> None:
    """Low nibble first, little bit order, bit planes from the least significant: as docs/reference/format.md says."""
    codes = np.array([[1, 2, 3], [15, 0, 7]], np.uint8)
    assert pack.pack_codes(codes, 4).tolist() == [[0x21, 0x03], [0x0F, 0x07]]
    assert pack.pack_codes(codes[:, :], 8).tolist() == codes.tolist()
    three = np.array([[1, 2, 3, 4, 5, 6, 7, 0, 1]], np.uint8)
    assert pack.pack_codes(three, 3).tolist() == [[[0b01010101, 1], [0b01100110, 0], [0b01111000, 0]]]
    mask = np.array([[1, 0, 0, 0, 0, 0, 0, 1, 1, 0]], bool)
    assert pack.pack_mask(mask).tolist() == [[0b10000001, 0b00000001]]


def test_bfloat16_agrees_with_torch() -> None:
    import torch

    # Every bfloat16, the two floats halfway to its neighbours, and their neighbours: all cases of rounding.
    upper = np.arange(2**16, dtype=np.uint32) << 16
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    x = (upper[:, None] | lower).view(np.float32).ravel()
    ours = pack.bf16_to_f32(pack.f32_to_bf16(x))
    theirs = torch.from_numpy(x).bfloat16().float().numpy()
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(np.signbit(ours), np.signbit(x))


SPEC, ARRAYS = random_linear(3, 21, 4, 7, False, 0.5, seed=5)
TENSORS = pack.pack_linear(SPEC, **ARRAYS)


@pytest.mark.parametrize("density", [None, 0.4])
@pytest.mark.parametrize(("form", "size"), [("mxfp4", 32), ("nvfp4", 16)])
def test_floats_of_four_bits(form: str, size: int, density: float | None) -> None:
    """Against torch's dtypes for the bytes and a list of the sixteen numbers."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    mask = None if density is None else rng.random((5, 96)) < density
    spec = LinearSpec(
        (5, 96), 4, size, sparse=mask is not None, nonzeros=None if mask is None else int(mask.sum()), scale_bits=8,
        format=form,
    )  # fmt: skip
    arrays: Arrays = {"values": rng.integers(0, 16, (5, 96), dtype=np.uint8)} | ({} if mask is None else {"mask": mask})
    # Of E8M0 all that keep the products normal numbers of float32, of E4M3 all.
    low, high = (4, 252) if form == "mxfp4" else (0, 127)
    arrays["scale"] = rng.integers(low, high, (5, 96 // size), dtype=np.uint8)
    dtype = torch.float8_e8m0fnu if form == "mxfp4" else torch.float8_e4m3fn
    scale = torch.from_numpy(arrays["scale"]).view(dtype).double().numpy()
    if form == "nvfp4":
        arrays["tensor_scale"] = np.array([2.0**-11], np.float32)
        scale = scale * 2.0**-11
    tensors = pack.pack_linear(spec, **arrays)
    assert {name: array.shape for name, array in tensors.items()} == {
        name: shape for name, (_, shape) in spec.tensors().items()
    }
    assert sum(array.nbytes for array in tensors.values()) == spec.packed_bytes
    numbers = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    expected = numbers[arrays["values"]] * scale.repeat(size, axis=1)
    found = pack.unpack_linear(spec, tensors)
    np.testing.assert_array_equal(found, expected if mask is None else np.where(mask, expected, 0))
    steps = pack.unpack_scale(spec, tensors)
    np.testing.assert_array_equal(pack.bf16_to_f32(pack.f32_to_bf16(steps)), steps)


def test_nibbles_of_floats_are_those_of_compressed_tensors() -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers")
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(0).integers(0, 16, (3, 32), dtype=np.uint8)
    spec = LinearSpec((3, 32), 4, 32, scale_bits=8, format="mxfp4")
    tensors = pack.pack_linear(spec, values, scale=np.full((3, 1), 127, np.uint8))
    theirs = helpers.unpack_fp4_from_uint8(torch.from_numpy(tensors["codes"]), 3, 32, torch.float32)
    np.testing.assert_array_equal(pack.unpack_linear(spec, tensors), theirs.numpy())


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("mxfp4", {"scale": 255}, "scale: expected bytes up to 254"),
        ("nvfp4", {"scale": 127}, "scale: expected bytes up to 126"),
        ("nvfp4", {"scale": 200}, "scale: expected bytes up to 126"),
        ("nvfp4", {"tensor_scale": 0.75}, "tensor_scale: expected a power of two .*found 0.75"),
        ("nvfp4", {"tensor_scale": -1.0}, "tensor_scale: expected a power of two"),
        ("nvfp4", {"tensor_scale": np.nan}, "tensor_scale: expected a power of two"),
        ("nvfp4", {"tensor_scale": np.inf}, "tensor_scale: expected a power of two"),
    ],
)
def test_scales_of_floats_are_checked(form: str, change: dict[str, float], message: str) -> None:
    size = {"mxfp4": 32, "nvfp4": 16}[form]
    spec = LinearSpec((2, 32), 4, size, scale_bits=8, format=form)
    tensors = {
        name: np.ones(shape, {"uint8": np.uint8, "float32": np.float32}[dtype])
        for name, (dtype, shape) in spec.tensors().items()
    }
    pack.unpack_linear(spec, tensors)
    for name, value in change.items():
        tensors[name].flat[-1] = value
    with pytest.raises(UserError, match=message):
        pack.unpack_linear(spec, tensors)


def changed(name: str, index: tuple[int, ...], value: int) -> Arrays:
    array = TENSORS[name].copy()
    array[index] = value
    return {**TENSORS, name: array}


def test_zero_points_of_a_byte_are_checked() -> None:
    spec, arrays = random_linear(3, 21, 4, 7, False, None, seed=5, zero_point_bits=8)
    tensors = pack.pack_linear(spec, **arrays)
    tensors["zero_point"][2, 1] = 16
    with pytest.raises(UserError, match="zero_point: expected values below 16, found 16"):
        pack.unpack_linear(spec, tensors)


def test_row_scales_are_checked() -> None:
    spec, arrays = random_linear(3, 21, 4, 7, False, None, seed=5, scale_bits=8)
    tensors = pack.pack_linear(spec, **arrays)
    with pytest.raises(UserError, match="expected the tensors codes, row_scale, scale, zero_point"):
        pack.unpack_linear(spec, {name: t for name, t in tensors.items() if name != "row_scale"})
    tensors["row_scale"][1] = 0x7F80
    with pytest.raises(UserError, match="row_scale: expected finite numbers"):
        pack.unpack_linear(spec, tensors)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {k: v for k, v in TENSORS.items() if k != "scale"},
            "expected the tensors mask, scale, values, zero_point",
        ),
        ({**TENSORS, "codes": TENSORS["mask"]}, "found codes, mask"),
        ({**TENSORS, "values": TENSORS["values"][:-1]}, "values: expected uint8"),
        ({**TENSORS, "scale": TENSORS["scale"].astype(np.float32)}, "scale: expected uint16"),
        (
            {**TENSORS, "mask": TENSORS["mask"][:, :-1]},
            r"mask: expected uint8 \[3, 3\], found uint8 \[3, 2\]",
        ),
        (changed("mask", (0, 2), 0xFF), "mask: expected zero padding after 21 columns"),
        (changed("mask", (1, 0), int(TENSORS["mask"][1, 0]) ^ 1), "set bits, found"),
        (changed("scale", (0, 0), 0x7F80), "scale: expected finite"),
        (changed("scale", (0, 0), 0x7FC0), "scale: expected finite"),
        (changed("zero_point", (2, 1), 16), "zero_point: expected zero padding after 3 columns"),
    ],
)
def test_damaged_tensors_are_refused(tensors: Arrays, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pack.unpack_linear(SPEC, tensors)


@pytest.mark.parametrize(("bits", "index"), [(4, (0, -1)), (3, (0, 2, -1))])
def test_padding_of_codes_is_refused(bits: int, index: tuple[int, ...]) -> None:
    spec, arrays = random_linear(2, 13, bits, None, True, None, seed=2)
    tensors = pack.pack_linear(spec, **arrays)
    tensors["codes"][index] |= 0x80
    with pytest.raises(UserError, match="codes: expected zero padding after 13"):
        pack.unpack_linear(spec, tensors)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({**ARRAYS, "values": ARRAYS["values"] + 16}, "expected codes below 16 for 4 bits, found"),
        ({**ARRAYS, "values": ARRAYS["values"].astype(np.int16)}, "values: expected uint8"),
        (
            {**ARRAYS, "values": ARRAYS["values"][:2]},
            r"values: expected uint8 \[3, 21\], found uint8 \[2, 21\]",
        ),
        ({**ARRAYS, "mask": None}, r"mask: expected bool \[3, 21\], found nothing"),
        ({**ARRAYS, "mask": ~ARRAYS["mask"]}, "set bits, found"),
        ({**ARRAYS, "zero_point": None}, "expected the tensors"),
        (
            {**ARRAYS, "scale": ARRAYS["scale"][:, :1]},
            r"scale: expected uint16 \[3, 3\], found uint16 \[3, 1\]",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_refused(arrays: Arrays, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pack.pack_linear(SPEC, **arrays)


def test_a_mask_without_sparsity_is_refused() -> None:
    spec, arrays = random_linear(2, 8, 4, None, True, None, seed=0)
    with pytest.raises(UserError, match="a mask only for a sparse linear"):
        pack.pack_linear(spec, **arrays, mask=np.ones((2, 8), bool))


def test_a_mask_against_its_pattern_is_refused() -> None:
    mask = np.array([[1, 1, 1, 0, 0, 0, 0, 1]], bool)
    spec = LinearSpec((1, 8), sparse=True, nonzeros=4, pattern="2:4", values_dtype="float32")
    with pytest.raises(UserError, match="at most 2 set bits in every 4 columns, found 3"):
        pack.pack_linear(spec, np.ones((1, 8), np.float32), mask)


def test_codes_of_an_unquantised_linear_are_refused() -> None:
    spec, arrays = random_linear(2, 8, None, None, True, None, seed=0)
    with pytest.raises(UserError, match="expected a quantised linear"):
        pack.unpack_linear_codes(spec, pack.pack_linear(spec, **arrays))

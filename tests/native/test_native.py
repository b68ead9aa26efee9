"""The kernels against NumPy, bit for bit: tails, empty and full masks, poisoned outputs, bad lengths."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from tulle import _native, native

# Around one, two and four registers of 64 bytes; 0 columns is a legal, empty matrix.
COLUMNS = st.one_of(st.integers(0, 300), st.sampled_from([63, 64, 65, 127, 128, 129, 192, 255, 256]))
DTYPES = [np.uint8, np.uint16, np.uint32]
POISON = 0xA5


@st.composite
def masks(draw: st.DrawFn) -> NDArray[np.bool_]:
    rows, columns = draw(st.integers(0, 5)), draw(COLUMNS)
    density = draw(st.sampled_from([0.0, 0.03, 0.5, 0.97, 1.0]))
    seed = draw(st.integers(0, 2**32 - 1))
    return np.random.default_rng(seed).random((rows, columns)) < density


def packed(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    return np.packbits(mask, axis=1, bitorder="little")


def random_like(mask: NDArray[np.bool_], dtype: type) -> NDArray:
    top = int(np.iinfo(dtype).max)
    return np.random.default_rng(mask.size).integers(0, top, mask.shape, dtype=dtype, endpoint=True)


def poisoned(shape: tuple[int, ...], dtype: type = np.uint8) -> tuple[NDArray, NDArray]:
    """(guarded, view): a poisoned buffer and the middle of it with the given shape."""
    guard = 70
    guarded = np.full(int(np.prod(shape)) + 2 * guard, POISON, dtype)
    return guarded, guarded[guard : len(guarded) - guard].reshape(shape)


def assert_guards_untouched(guarded: NDArray) -> None:
    assert (guarded[:70] == POISON).all() and (guarded[-70:] == POISON).all()


@given(hnp.arrays(np.uint8, st.tuples(st.integers(0, 4), COLUMNS), elements=st.integers(0, 15)))
def test_nibbles(codes: NDArray[np.uint8]) -> None:
    rows, n = codes.shape
    padded = np.concatenate([codes, np.zeros((rows, n % 2), np.uint8)], axis=1)
    expected = padded[:, 0::2] | padded[:, 1::2] << 4
    guarded, out = poisoned(expected.shape)
    _native.pack_nibbles(codes, out)
    np.testing.assert_array_equal(out, expected)
    assert_guards_untouched(guarded)

    guarded, back = poisoned(codes.shape)
    _native.unpack_nibbles(expected, n, back)
    np.testing.assert_array_equal(back, codes)
    assert_guards_untouched(guarded)


@pytest.mark.parametrize("position", [0, 17, 63, 64, 99, 127, 128, 130])
def test_code_above_15_is_refused(position: int) -> None:
    codes = np.zeros((2, 131), np.uint8)
    codes[1, position] = 16
    with pytest.raises(ValueError, match="expected values up to 15"):
        native.pack_nibbles(codes)


@pytest.mark.parametrize("dtype", DTYPES)
@given(mask=masks())
def test_expand_and_compress(mask: NDArray[np.bool_], dtype: type) -> None:
    dense = random_like(mask, dtype)
    guarded, values = poisoned((int(mask.sum()),), dtype)
    _native.compress(packed(mask), dense, values)
    np.testing.assert_array_equal(values, dense[mask])
    assert_guards_untouched(guarded)

    guarded, back = poisoned(mask.shape, dtype)
    _native.expand(packed(mask), values, mask.shape[1], back)
    np.testing.assert_array_equal(back, np.where(mask, dense, 0))
    assert_guards_untouched(guarded)


@given(masks())
def test_count_ignores_padding(mask: NDArray[np.bool_]) -> None:
    bits = packed(mask)
    spare = 8 * bits.shape[1] - mask.shape[1]
    if spare:
        bits[:, -1] |= (0xFF << (8 - spare)) & 0xFF
    assert native.count_mask(bits, mask.shape[1]) == mask.sum()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int8])
def test_wrappers_keep_the_dtype_and_accept_strides(dtype: type) -> None:
    rng = np.random.default_rng(0)
    dense = rng.integers(-100, 100, (6, 70)).astype(dtype)
    mask = rng.random((6, 70)) < 0.4
    values = native.compress(packed(mask), np.asfortranarray(dense))
    assert values.dtype == dtype
    np.testing.assert_array_equal(values, dense[mask])
    np.testing.assert_array_equal(native.expand(packed(mask), values, 70), np.where(mask, dense, 0))


def test_wrong_lengths_are_refused() -> None:
    u8 = np.zeros((2, 9), np.uint8)
    with pytest.raises(ValueError, match="bytes per row of packed: expected 5, found 9"):
        native.unpack_nibbles(u8, 10)
    with pytest.raises(ValueError, match="bytes per row of mask: expected 2, found 9"):
        native.count_mask(u8, 16)
    with pytest.raises(ValueError, match="one per set bit of mask: expected 0, found 1"):
        native.expand(u8, np.zeros(1, np.uint8), 72)
    with pytest.raises(ValueError, match="one per set bit of mask: expected 144, found 143"):
        native.expand(~u8, np.zeros(143, np.uint16), 72)
    with pytest.raises(ValueError, match="rows of dense, as many as of mask: expected 2, found 3"):
        native.compress(u8, np.zeros((3, 72), np.uint8))
    with pytest.raises(ValueError, match="bytes per row of mask: expected 10, found 9"):
        native.compress(u8, np.zeros((2, 73), np.uint8))
    with pytest.raises(ValueError, match="size of out: expected 18, found 17"):
        _native.unpack_nibbles(u8, 18, np.zeros((2, 17), np.uint8))
    with pytest.raises(TypeError):
        native.count_mask(np.zeros(9, np.uint8), 72)


def run_with_isa(isa: str, code: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, "TULLE_ISA": isa}, capture_output=True)


BYTES_OF_EVERY_FUNCTION = """
import sys
import numpy as np
from tulle import native
rng = np.random.default_rng(7)
out = sys.stdout.buffer
for columns in [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 191, 193, 1000]:
    codes = rng.integers(0, 16, (3, columns), dtype=np.uint8)
    packed = native.pack_nibbles(codes)
    out.write(packed.tobytes() + native.unpack_nibbles(packed, columns).tobytes())
    for density in [0, 0.1, 0.5, 0.9, 1]:
        mask = np.packbits(rng.random((3, columns)) < density, axis=1, bitorder="little")
        out.write(native.count_mask(mask, columns).to_bytes(8, "little"))
        for dtype in ["u1", "u2", "u4"]:
            dense = rng.integers(0, 2 ** (8 * int(dtype[1])), (3, columns)).astype(dtype)
            values = native.compress(mask, dense)
            out.write(values.tobytes() + native.expand(mask, values, columns).tobytes())
print(native.isa, file=sys.stderr)
"""


def test_every_isa_gives_the_same_bytes() -> None:
    outputs = {}
    for isa in native.supported_isas():
        run = run_with_isa(isa, BYTES_OF_EVERY_FUNCTION)
        assert run.stderr.decode().strip() == isa
        outputs[isa] = run.stdout
    assert len(outputs["scalar"]) > 100_000
    assert all(output == outputs["scalar"] for output in outputs.values())


def test_unsupported_isa_is_one_line() -> None:
    code = "from tulle.errors import UserError\ntry: import tulle.native\nexcept UserError as e: print(e)"
    run = run_with_isa("neon9", code)
    line = run.stdout.decode()
    assert line.count("\n") == 1
    assert "expected TULLE_ISA to be one of scalar" in line and "found 'neon9'" in line


def test_probe_is_consistent() -> None:
    cpu = native.cpu_features()
    # Each extends the one named first, on every CPU that exists.
    for base, extension in [("avx2", "avx512f"), ("avx512f", "avx512vbmi2"), ("amx_tile", "amx_int8")]:
        assert cpu[base] or not cpu[extension]
    assert ("avx512" in native.supported_isas()) <= cpu["avx512vbmi2"]


@pytest.mark.skipif(not os.path.exists("/proc/cpuinfo"), reason="the oracle is Linux's /proc/cpuinfo")
def test_probe_agrees_with_linux() -> None:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        flags = {flag for line in file if line.startswith("flags") for flag in line.split()}
    names = {"avx512vbmi2": "avx512_vbmi2", "avx512vnni": "avx512_vnni", "avx512bf16": "avx512_bf16"}
    for feature, present in native.cpu_features().items():
        assert present == (names.get(feature, feature) in flags), feature


def permutation_scores(dtype: type, rows: int, columns: int) -> NDArray:
    top = 255 if dtype is np.uint8 else 32767
    return np.random.default_rng(rows).integers(0, top, (rows, columns), dtype=dtype, endpoint=True)


def retained(scores: NDArray, kept: int, m: int) -> int:
    stripes = np.sort(scores.astype(np.int64).reshape(len(scores), -1, m))
    return int(stripes[..., m - kept :].sum())


@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
@pytest.mark.parametrize(("kept", "m"), [(1, 2), (2, 4), (1, 4), (4, 8), (15, 16), (31, 32)])
@pytest.mark.parametrize("rows", [1, 63, 64, 200])
def test_anneal_counts_what_it_gains(dtype: type, kept: int, m: int, rows: int) -> None:
    scores = permutation_scores(dtype, rows, 6 * m)
    index, gain = native.anneal(scores, kept, m, proposals=3000, start=0.3, end=0.05)
    assert sorted(index) == list(range(6 * m))
    assert gain == retained(scores[:, index], kept, m) - retained(scores, kept, m) >= 0


@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
def test_anneal_is_the_same_on_every_instruction_set(dtype: type) -> None:
    code = (
        "import sys, numpy as np; from tulle import native; "
        f"s = np.random.default_rng(1).integers(0, 255, (300, 320)).astype(np.{dtype.__name__}); "
        "print(native.isa, native.anneal(s, 2, 4, proposals=20000, start=.3, end=.05, seed=5, threads=2)[0].tolist())"
    )
    found = {}
    for isa in native.supported_isas():
        environment = os.environ | {"TULLE_ISA": isa}
        output = subprocess.run(
            [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
        )
        ran, _, found[isa] = output.stdout.partition(" ")
        assert ran == isa
    assert len(set(found.values())) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kept": 4}, "1 <= N < M"),
        ({"kept": 0}, "1 <= N < M"),
        ({"m": 5}, "whole stripes"),
        ({"m": 64, "kept": 2}, "M <= 32"),
    ],
)
def test_anneal_refuses(change: dict[str, int], message: str) -> None:
    settings = {"kept": 2, "m": 4} | change
    with pytest.raises(ValueError, match=message):
        native.anneal(np.ones((3, 64), np.uint8), **settings, proposals=10, start=1.0, end=0.1)


def test_anneal_refuses_an_index_that_is_no_order() -> None:
    raw = np.zeros(8 * 64 + 64, np.uint8)
    scores = raw[-raw.ctypes.data % 64 :][: 8 * 64].reshape(8, 64)
    with pytest.raises(ValueError, match="every column once"):
        _native.anneal(scores, [0] * 8, 2, 4, 10, 1.0, 0.1, 0, 1)


def test_anneal_refuses_scores_off_a_cache_line() -> None:
    raw = np.zeros(8 * 64 + 64, np.uint8)
    scores = raw[(-raw.ctypes.data + 16) % 64 :][: 8 * 64].reshape(8, 64)
    with pytest.raises(ValueError, match="64-byte boundary: expected 0, found 16"):
        _native.anneal(scores, list(range(8)), 2, 4, 10, 1.0, 0.1, 0, 1)

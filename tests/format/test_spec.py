"""The spec's JSON, its tensors, and what it refuses."""

import dataclasses
import json
from dataclasses import replace

import pytest

from tulle.errors import UserError
from tulle.format.spec import (
    AttentionSpec,
    HeadSpec,
    InputSparsitySpec,
    LinearSpec,
    QuantizationConfig,
    TransformSpec,
    code_shape,
    parse_pattern,
)

INT4 = LinearSpec(shape=(6, 256), bits=4, group_size=128)
SPARSE_INT8 = LinearSpec(shape=(6, 20), bits=8, symmetric=False, sparse=True, nonzeros=60, pattern="2:4")
SPARSE_BF16 = LinearSpec(shape=(6, 20), sparse=True, nonzeros=33, values_dtype="bfloat16")
DENSE_F16 = LinearSpec(shape=(6, 20), values_dtype="float16", input_bits=8)
TOP_K = replace(DENSE_F16, input_sparsity=InputSparsitySpec("top_k", keep=8, unit=4, weighted=True, rescale=True))
MXFP4 = replace(INT4, group_size=32, scale_bits=8, format="mxfp4")
TEAL = replace(INT4, input_sparsity=InputSparsitySpec("threshold", threshold=0.25))


def test_tensors() -> None:
    assert INT4.tensors() == {"codes": ("uint8", (6, 128)), "scale": ("bfloat16", (6, 2))}
    assert replace(INT4, bits=3).tensors()["codes"] == ("uint8", (6, 3, 32))
    assert SPARSE_INT8.tensors() == {
        "mask": ("uint8", (6, 3)),
        "values": ("uint8", (60,)),
        "scale": ("bfloat16", (6, 1)),
        "zero_point": ("uint8", (6, 1)),
    }
    assert replace(SPARSE_INT8, bits=4, nonzeros=33, pattern=None).tensors()["values"] == ("uint8", (17,))
    assert replace(SPARSE_INT8, bits=5, nonzeros=33, pattern=None).tensors()["values"] == ("uint8", (5, 5))
    ASYMMETRIC = replace(INT4, symmetric=False, group_size=32, bits=3, scale_bits=8)
    assert ASYMMETRIC.tensors() == {
        "codes": ("uint8", (6, 3, 32)),
        "scale": ("uint8", (6, 8)),
        "row_scale": ("bfloat16", (6,)),
        "zero_point": ("uint8", (6, 3, 1)),
    }
    assert replace(ASYMMETRIC, zero_point_bits=8).tensors()["zero_point"] == ("uint8", (6, 8))
    assert MXFP4.tensors() == {"codes": ("uint8", (6, 128)), "scale": ("uint8", (6, 8))}
    assert replace(MXFP4, group_size=16, format="nvfp4").tensors() == {
        "codes": ("uint8", (6, 128)),
        "scale": ("uint8", (6, 16)),
        "tensor_scale": ("float32", (1,)),
    }
    assert SPARSE_BF16.tensors() == {"mask": ("uint8", (6, 3)), "values": ("bfloat16", (33,))}
    assert DENSE_F16.tensors() == {"weight": ("float16", (6, 20))}
    assert TOP_K.stored_tensors() == DENSE_F16.tensors() | {"input_score": ("float32", (20,))}
    assert TEAL.stored_tensors() == INT4.tensors()


def test_sizes() -> None:
    assert INT4.packed_bytes == 6 * 128 + 6 * 2 * 2
    assert INT4.bits_per_weight == 4 + 16 / 128
    assert MXFP4.bits_per_weight == 4.25
    assert SPARSE_BF16.packed_bytes == 6 * 3 + 33 * 2
    assert LinearSpec(shape=(4, 64), bits=8).bits_per_weight == 8 + 16 / 64


ROTATED = LinearSpec(
    shape=(6, 24), bits=4, input_bits=4, input_symmetric=False, input_clip=0.9,
    transform=(
        TransformSpec("block_matrix", block=8, shared=True), TransformSpec("permutation"),
        TransformSpec("block_matrix", block=4, shared=False), TransformSpec("hadamard", block=12),
        TransformSpec("kronecker", left=4, right=6), TransformSpec("diagonal"),
    ),
)  # fmt: skip


def test_transform_tensors() -> None:
    assert ROTATED.transform_tensors() == {
        "transform.0.matrix": ("float16", (8, 8)),
        "transform.1.index": ("int32", (24,)),
        "transform.2.matrix": ("float16", (6, 4, 4)),
        "transform.4.left": ("float16", (4, 4)),
        "transform.4.right": ("float16", (6, 6)),
        "transform.5.scale": ("float32", (24,)),
    }
    assert ROTATED.transform_bytes == 2 * (64 + 96 + 16 + 36) + 4 * (24 + 24)
    assert set(ROTATED.stored_tensors()) == set(ROTATED.tensors()) | set(ROTATED.transform_tensors())
    assert dataclasses.replace(ROTATED, transform_of="other").transform_tensors() == {}


def test_a_shared_transform_must_be_held_by_another() -> None:
    sibling = dataclasses.replace(ROTATED, transform_of="a")
    QuantizationConfig({"a": ROTATED, "b": sibling})
    for linears in ({"b": sibling}, {"a": sibling, "b": sibling}, {"a": INT4, "b": sibling}):
        with pytest.raises(UserError, match="transform_of to name a linear that holds the same transform"):
            QuantizationConfig(linears)


def test_attention_round_trip() -> None:
    spec = AttentionSpec(None, HeadSpec(4), HeadSpec(8, True, 0.9), hadamard=True)
    config = QuantizationConfig({}, {}, spec)
    assert QuantizationConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    for change in ({"key": {"bits": 1, "symmetric": True, "clip": 1.0}}, {"hadamard": 1}, {"keys": None}):
        with pytest.raises(UserError, match="expected"):
            AttentionSpec.from_json(spec.to_json() | change)


@pytest.mark.parametrize("spec", [INT4, SPARSE_INT8, SPARSE_BF16, DENSE_F16, ROTATED, TOP_K, TEAL, MXFP4])
def test_json_round_trip(spec: LinearSpec) -> None:
    assert LinearSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_config_round_trip() -> None:
    config = QuantizationConfig({"model.layers.0.mlp.down_proj": INT4}, {"steps": [{"gptq": {"bits": 4}}]})
    data = config.to_json()
    assert (data["quant_method"], data["format_version"]) == ("tulle", 4)
    assert set(data["linears"]["model.layers.0.mlp.down_proj"]) == {
        *("shape", "bits", "group_size", "symmetric", "sparse", "nonzeros", "pattern", "input_bits"),
        *("input_symmetric", "input_clip", "transform", "transform_of", "values_dtype", "input_sparsity"),
        *("scale_bits", "zero_point_bits", "format"),
    }
    assert QuantizationConfig.from_json(json.loads(json.dumps(data))) == config


def test_older_versions() -> None:
    asymmetric = replace(INT4, symmetric=False, zero_point_bits=8)
    config = QuantizationConfig({"a.b": INT4, "a.c": asymmetric})
    data = config.to_json() | {"format_version": 3}
    with pytest.raises(UserError, match="expected no (scale_bits|zero_point_bits|format) in format_version 3"):
        QuantizationConfig.from_json(data)
    for fields in data["linears"].values():
        del fields["scale_bits"], fields["zero_point_bits"], fields["format"]
    assert QuantizationConfig.from_json(data) == config
    with pytest.raises(UserError, match="expected the key 'scale_bits'"):
        QuantizationConfig.from_json(data | {"format_version": 4})
    for fields in data["linears"].values():
        del fields["input_sparsity"]
    assert QuantizationConfig.from_json(data | {"format_version": 2}) == config
    with pytest.raises(UserError, match="expected the key 'input_sparsity'"):
        QuantizationConfig.from_json(data)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shape": (0, 4), "bits": 4}, "positive sizes"),
        ({"bits": 9}, "expected bits 2-8, found 9"),
        ({"bits": 1}, "expected bits 2-8, found 1"),
        ({"bits": 4, "group_size": 3}, "divides 20 input channels, found 3"),
        ({"bits": 4, "group_size": 0}, "divides 20 input channels, found 0"),
        ({"bits": 4, "scale_bits": 6}, "expected scale_bits 8 or 16, found 6"),
        ({"values_dtype": "float16", "scale_bits": 8}, "expected bits with group_size"),
        ({"bits": 4, "zero_point_bits": 8}, "expected zero_point_bits null"),
        ({"bits": 4, "symmetric": False, "zero_point_bits": 4}, "expected zero_point_bits null"),
        ({"bits": 4, "format": "fp4"}, "expected a format of int, mxfp4, nvfp4, found 'fp4'"),
        ({"bits": 4, "format": "mxfp4", "scale_bits": 8}, "group_size 32, .* found 4, None, True and 8"),
        ({"values_dtype": "float16", "format": "nvfp4"}, "expected bits 4, group_size 16, .* found None"),
        ({"bits": 4, "values_dtype": "float32"}, "no values_dtype with bits"),
        ({"bits": 4, "input_bits": 9}, "input_bits 2-8 or null, found 9"),
        ({"bits": 4, "input_symmetric": False}, "only with input_bits"),
        ({"bits": 4, "input_bits": 4, "input_clip": 0.0}, "input_clip above 0"),
        ({"bits": 4, "transform_of": "x"}, "only with a transform"),
        ({"bits": 4, "transform": (TransformSpec("fourier"),)}, "found 'fourier'"),
        ({"bits": 4, "transform": (TransformSpec("hadamard"),)}, "expected block for a hadamard"),
        ({"bits": 4, "transform": (TransformSpec("permutation", block=4),)}, "no sizes for a permutation"),
        ({"bits": 4, "transform": (TransformSpec("hadamard", block=8),)}, "block that divides 20 .* found 8"),
        ({"bits": 4, "transform": (TransformSpec("kronecker", left=3, right=7),)}, "factors of product 20"),
        ({"bits": 4, "input_sparsity": InputSparsitySpec("most")}, "found 'most'"),
        ({"bits": 4, "input_sparsity": InputSparsitySpec("top_k")}, "keep from 1 to 20 .* found None"),
        ({"bits": 4, "input_sparsity": InputSparsitySpec("top_k", keep=21)}, "keep from 1 to 20"),
        ({"bits": 4, "input_sparsity": InputSparsitySpec("top_k", keep=4, block=8)}, "block that divides 20"),
        ({"bits": 4, "input_sparsity": InputSparsitySpec("top_k", keep=6, unit=4)}, "in steps of 4, found 6"),
        ({"bits": 4, "input_sparsity": InputSparsitySpec("top_k", keep=4, by="mean")}, "max or norm"),
        ({"bits": 4, "input_sparsity": InputSparsitySpec("top_k", keep=4, threshold=0.1)}, "expected a threshold"),
        ({"bits": 4, "input_sparsity": InputSparsitySpec("threshold")}, "expected a threshold"),
        ({"bits": 4, "input_sparsity": InputSparsitySpec("threshold", threshold=float("nan"))}, "finite threshold"),
        ({"bits": 4, "input_sparsity": InputSparsitySpec("relu", weighted=True)}, "only with top_k"),
        ({}, "found values_dtype None"),
        ({"values_dtype": "float64"}, "found values_dtype float64"),
        ({"values_dtype": "float16", "symmetric": False}, "set bits to 2-8"),
        ({"values_dtype": "float16", "group_size": 4}, "set bits to 2-8"),
        ({"bits": 4, "nonzeros": 3}, "only where sparse is true"),
        ({"bits": 4, "pattern": "2:4"}, "only where sparse is true"),
        ({"bits": 4, "sparse": True}, "nonzeros from 0 to 120, found None"),
        ({"bits": 4, "sparse": True, "nonzeros": 121}, "nonzeros from 0 to 120, found 121"),
        ({"bits": 4, "sparse": True, "nonzeros": 60, "pattern": "4:8"}, "M divides 20"),
        ({"bits": 4, "sparse": True, "nonzeros": 61, "pattern": "2:4"}, "at most 60 nonzeros"),
        ({"bits": 4, "sparse": True, "nonzeros": 9, "pattern": "4:2"}, "0 < N <= M"),
    ],
)
def test_contradictions_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        LinearSpec(**{"shape": (6, 20), **fields})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bitz": 4}, "found 'bitz'"),
        ({"bits": "4"}, "bits to be"),
        ({"bits": True}, "bits to be"),
        ({"sparse": 0}, "sparse to be bool"),
        ({"shape": [6]}, r"expected shape \[C_out, C_in\]"),
        ({"shape": [6, 20.0]}, r"expected shape \[C_out, C_in\]"),
        ({"shape": None}, "shape to be list"),
    ],
)
def test_malformed_json_is_refused(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        LinearSpec.from_json({**INT4.to_json(), **change})


def test_missing_key_is_refused() -> None:
    data = INT4.to_json()
    del data["group_size"]
    with pytest.raises(UserError, match="expected the key 'group_size'"):
        LinearSpec.from_json(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method 'tulle', found 'gptq'"),
        ({"format_version": 1}, "format_version 2 or 3 or 4, found 1"),
        ({"linears": []}, "linears to be dict"),
        (
            {"linears": {"a.b": {}}},
            "quantization_config, a.b: a linear: expected the key 'shape', found none",
        ),
    ],
)
def test_malformed_config_is_refused(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        QuantizationConfig.from_json({**QuantizationConfig({}).to_json(), **change})


@pytest.mark.parametrize("pattern", ["", "2", "0:4", "5:4", "2:4:8", "-1:4", "a:b"])
def test_impossible_patterns(pattern: str) -> None:
    with pytest.raises(UserError, match="0 < N <= M"):
        parse_pattern(pattern)


@pytest.mark.parametrize("n", [2**53 + 1, 2**1100 + 1])
def test_sizes_that_no_float_holds(n: int) -> None:
    """A division as floats lost bytes, or overflowed."""
    assert code_shape(3, (2, n)) == (2, 3, (n + 7) // 8) and code_shape(4, (n,)) == ((n + 1) // 2,)

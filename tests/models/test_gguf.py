"""GGUF files: blocks against the gguf library, headers that lie, config and names against transformers."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES

import gguf_files
from gguf_files import (
    FAMILIES,
    READ_ONLY,
    Type,
    add,
    dequantised,
    family_config,
    random_bytes,
    small_config,
    write_keys,
    write_random,
)
from tulle.errors import UserError
from tulle.models.checkpoint import Checkpoint
from tulle.models.decoder import PlainDecoder
from tulle.models.description import describe
from tulle.models.gguf.blocks import RANGES, READERS, decode, encode, encode_q4_1, to_float32
from tulle.models.gguf.config import config_of
from tulle.models.gguf.families import WRITTEN
from tulle.models.gguf.file import GgufFile, is_gguf
from tulle.models.gguf.names import LONG as LONG_TENSOR
from tulle.models.gguf.names import restored_rows, stored_rows
from tulle.models.gguf.source import GgufSource
from tulle.models.gguf.tokenizer import tokenizer_of
from tulle.models.source import describe_source, open_source


@pytest.mark.parametrize("kind", READERS, ids=lambda kind: kind.name)
def test_blocks_as_the_library_reads_them(kind: Type) -> None:
    """Any bytes: bit for bit, NaN and Inf included."""
    rng = np.random.default_rng(int(kind))
    raw = rng.integers(0, 256, (5, 4 * GGML_QUANT_SIZES[kind][1]), np.uint8)
    with np.errstate(all="ignore"):
        expected, found = gguf.quants.dequantize(raw, kind), to_float32(raw, kind)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", READERS, ids=lambda kind: kind.name)
def test_codes_fit_their_bits(kind: Type) -> None:
    rng = np.random.default_rng(1)
    raw = random_bytes(rng, kind, 6, 512)
    coded = decode(raw, kind)
    assert coded.codes.shape == (6, 512) and int(coded.codes.max()) < 1 << coded.bits
    assert 512 % coded.scale.shape[1] == 0 and coded.scale.dtype in (np.float16, np.float32)
    order = np.array([3, 1, 5, 0, 2, 4])
    np.testing.assert_array_equal(coded.rows(order).floats(), dequantised(raw, kind)[order])


def test_columns_move_in_whole_blocks() -> None:
    raw = random_bytes(np.random.default_rng(4), Type.Q4_1, 3, 128)
    coded = decode(raw, Type.Q4_1)
    order = np.concatenate([np.arange(64, 128), np.arange(64)])
    np.testing.assert_array_equal(coded.columns(order).floats(), dequantised(raw, Type.Q4_1)[:, order])
    with pytest.raises(UserError, match="whole blocks of 32"):
        coded.columns(np.roll(np.arange(128), 16))


def test_a_type_without_a_reader_is_refused_by_its_name() -> None:
    with pytest.raises(UserError, match="found IQ2_XXS"):
        decode(np.zeros((1, 66), np.uint8), Type.IQ2_XXS)


@pytest.mark.parametrize("kind", RANGES, ids=lambda kind: kind.name)
def test_what_is_encoded_is_what_is_read(kind: Type) -> None:
    rng = np.random.default_rng(2)
    least, most = RANGES[kind]
    codes = rng.integers(least, most + 1, (7, 512)).astype(np.int16)
    scale = rng.uniform(-1, 1, (7, 512 // GGML_QUANT_SIZES[kind][0])).astype(np.float16)
    expected = codes * scale.astype(np.float32).repeat(GGML_QUANT_SIZES[kind][0], axis=1)
    np.testing.assert_array_equal(dequantised(encode(codes, scale, kind), kind), expected)


def test_q4_1_is_encoded() -> None:
    rng = np.random.default_rng(3)
    codes, scale = rng.integers(0, 16, (4, 64)).astype(np.uint8), rng.uniform(0, 1, (4, 2)).astype(np.float16)
    minimum = rng.uniform(-1, 0, (4, 2)).astype(np.float16)
    found = dequantised(encode_q4_1(codes, scale, minimum), Type.Q4_1)
    wide = [part.astype(np.float32).repeat(32, axis=1) for part in (scale, minimum)]
    np.testing.assert_array_equal(found, codes * wide[0] + wide[1])


def test_names_and_rows_go_back_and_forth() -> None:
    for family in WRITTEN.values():
        names = family.tensors
        biased = "blk.11.attn_q.bias" if "attn_q" in family.biased else "output_norm.weight"
        down = ("blk.0.ffn_down.weight",) * (family.experts is None)
        for name in ("token_embd.weight", biased, *down, "blk.0.attn_output.weight", "output_norm.weight"):
            assert names.theirs(str(names.ours(name))) == name
        part = names.experts("blk.7.ffn_down_exps.weight")
        assert (part is None) == (family.experts is None)
        assert part is None or names.stack(part.format(3)) == ("blk.7.ffn_down_exps.weight", 3)
        assert names.ours("blk.0.ffn_gate_exps.weight") is None and names.ours("attn_q.weight") is None
        assert names.theirs("model.layers.0.mlp.experts.0.weight") is None
    rows = restored_rows(3, 8)
    assert list(rows[:8]) == [0, 2, 4, 6, 1, 3, 5, 7]
    np.testing.assert_array_equal(rows[stored_rows(3, 8)], np.arange(24))


TYPES = [Type.F32, Type.F16, Type.BF16, *READERS]


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_weights_as_transformers_has_them(tmp_path: Path, kind: Type) -> None:
    model = write_random(tmp_path / "model.gguf", small_config(), kind)
    source = open_source(tmp_path / "model.gguf")
    description = describe_source(source)
    assert (description.model_type, description.tied) == ("llama", False)
    state = model.state_dict()
    assert source.names() == sorted(state)
    for name, expected in state.items():
        found = source.read(name)
        if source.info(name).dtype == "BF16":
            found = (found.astype(np.uint32) << 16).view(np.float32)
        np.testing.assert_array_equal(found.astype(np.float32), expected.numpy(), err_msg=name)
        assert found.shape == source.info(name).shape


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_description_computes_what_transformers_does(tmp_path: Path, family: str, tied: bool) -> None:
    config = small_config(family, tie_word_embeddings=tied, num_key_value_heads=1, rope_theta=5e5)
    if family != "llama":
        config["head_dim"] = 96 if family == "qwen3" else 64
    model = write_random(tmp_path / "model.gguf", config, Type.Q8_0)
    _same_logits(tmp_path / "model.gguf", model)


def test_biases_of_llama(tmp_path: Path) -> None:
    config = small_config(attention_bias=True, mlp_bias=True)
    model = write_random(tmp_path / "model.gguf", config, Type.Q4_0)
    _same_logits(tmp_path / "model.gguf", model)


@pytest.mark.parametrize(
    ("rope", "keys"),
    [
        ({"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
            {"type": "yarn", "factor": 4.0, "original_context_length": 16},
        ),
    ],
    ids=["linear", "yarn"],
)
def test_stretched_positions(tmp_path: Path, rope: dict[str, object], keys: dict[str, object]) -> None:
    config = small_config(rope_scaling=rope)
    added = {f"llama.rope.scaling.{key}": value for key, value in keys.items()}
    model = write_random(tmp_path / "model.gguf", config, Type.F32, metadata=added)
    _same_logits(tmp_path / "model.gguf", model)


def test_llama_3_positions_from_their_ratios(tmp_path: Path) -> None:
    """GGUF stores what frequencies are divided by; the parameters are found again."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = small_config(rope_theta=5e5, rope_scaling=rope | {"original_max_position_embeddings": 8192})
    model = write_random(tmp_path / "model.gguf", config, Type.F32)
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))
    plain = 1 / 5e5 ** (torch.arange(0, 64, 2) / 64)
    _with_tensor(tmp_path / "model.gguf", tmp_path / "rope.gguf", "rope_freqs.weight", (plain / stretched).numpy())
    assert GgufSource(tmp_path / "rope.gguf").config["rope_scaling"]["factor"] == 32
    _same_logits(tmp_path / "rope.gguf", model)
    _with_tensor(tmp_path / "model.gguf", tmp_path / "odd.gguf", "rope_freqs.weight", np.linspace(1, 3, 32))
    with pytest.raises(UserError, match="other frequencies"):
        GgufSource(tmp_path / "odd.gguf")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("llama.attention.sliding_window", 16, "attention.sliding_window"),
        ("llama.expert_count", 8, "blk.0.ffn_gate.weight"),  # Mixtral's layers have no such tensor
        ("llama.rope.dimension_count", 32, "rope.dimension_count"),
        ("llama.attention.clamp_kqv", 3.0, "clamp_kqv"),
        ("llama.rope.scaling.type", "longrope", "longrope"),
    ],
)
def test_keys_that_would_change_the_result_are_refused_by_name(
    tmp_path: Path, key: str, value: object, message: str
) -> None:
    write_random(tmp_path / "model.gguf", small_config(num_hidden_layers=1), Type.F16, metadata={key: value})
    with pytest.raises(UserError, match=message):
        GgufSource(tmp_path / "model.gguf")


def test_an_architecture_and_a_tensor_that_are_not_known_are_refused_by_name(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "rwkv.gguf", "rwkv6")
    _finish(writer)
    with pytest.raises(UserError, match="found 'rwkv6'"):
        GgufSource(tmp_path / "rwkv.gguf")
    write_random(tmp_path / "model.gguf", small_config(num_hidden_layers=1), Type.F16)
    _with_tensor(tmp_path / "model.gguf", tmp_path / "more.gguf", "blk.0.attn_sinks.weight", np.ones(4))
    with pytest.raises(UserError, match="blk.0.attn_sinks.weight"):
        GgufSource(tmp_path / "more.gguf")


def test_tensors_of_other_numbers_of_experts_are_refused(tmp_path: Path) -> None:
    write_random(tmp_path / "model.gguf", family_config("qwen3_moe"), Type.F32)
    for count, message in ((5, "expected 5 experts"), (7, "expected 7 experts")):
        _changed(tmp_path / "model.gguf", tmp_path / "other.gguf", {"qwen3moe.expert_count": count})
        with pytest.raises(UserError, match=message):
            GgufSource(tmp_path / "other.gguf")
    _with_tensor(tmp_path / "model.gguf", tmp_path / "flat.gguf", "blk.9.ffn_up_exps.weight", np.ones((6, 8)))
    with pytest.raises(UserError, match="a tensor of all experts"):
        GgufSource(tmp_path / "flat.gguf")


def test_a_gate_of_one_output_as_a_vector(tmp_path: Path) -> None:
    """Files of Qwen 2 with experts differ in how they store it."""
    model = write_random(tmp_path / "model.gguf", family_config("qwen2_moe"), Type.F32)
    file = GgufFile(tmp_path / "model.gguf")
    gates = {name: file.raw(name).view(np.float32).reshape(-1) for name in file.tensors if "inp_shexp" in name}
    _changed(tmp_path / "model.gguf", tmp_path / "vector.gguf", tensors=gates)
    assert gates and GgufFile(tmp_path / "vector.gguf").tensors["blk.1.ffn_gate_inp_shexp.weight"].shape == (64,)
    name = "model.layers.1.mlp.shared_expert_gate.weight"
    found, expected = GgufSource(tmp_path / "vector.gguf").read(name), model.state_dict()[name].numpy()
    np.testing.assert_array_equal(found, expected)


def test_files_in_several_parts(tmp_path: Path) -> None:
    write_random(tmp_path / "model.gguf", small_config(num_hidden_layers=1), Type.Q4_0)
    whole = GgufFile(tmp_path / "model.gguf")
    split = list(whole.tensors)
    for number, names in enumerate((split[:3], split[3:]), 1):
        writer = gguf.GGUFWriter(tmp_path / f"model-{number:05}-of-00002.gguf", "llama")
        if number == 1:
            write_keys(writer, small_config(num_hidden_layers=1))
        for name in names:
            writer.add_tensor(name, np.array(whole.raw(name)), raw_dtype=whole.tensors[name].type)
        _finish(writer)
    one, two = GgufSource(tmp_path / "model.gguf"), GgufSource(tmp_path / "model-00001-of-00002.gguf")
    assert one.names() == two.names() and one.identity() != two.identity()
    np.testing.assert_array_equal(one.read("model.layers.0.mlp.down_proj.weight"),
                                  two.read("model.layers.0.mlp.down_proj.weight"))  # fmt: skip
    with pytest.raises(UserError, match="the first of 2 files"):
        GgufSource(tmp_path / "model-00002-of-00002.gguf")
    (tmp_path / "model-00002-of-00002.gguf").unlink()
    with pytest.raises(UserError, match="model-00002-of-00002.gguf missing"):
        GgufSource(tmp_path / "model-00001-of-00002.gguf")


def test_the_identity_changes_with_the_weights(tmp_path: Path) -> None:
    write_random(tmp_path / "model.gguf", small_config(num_hidden_layers=1), Type.Q4_0)
    source = GgufSource(tmp_path / "model.gguf")
    before = source.identity()
    assert GgufSource(tmp_path / "model.gguf").identity() == before
    write_random(tmp_path / "model.gguf", small_config(num_hidden_layers=1), Type.Q4_0, seed=1)
    assert GgufSource(tmp_path / "model.gguf").identity() != before


def test_scales_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    write_random(tmp_path / "model.gguf", small_config(num_hidden_layers=1), Type.Q4_K)
    entry = GgufFile(tmp_path / "model.gguf").tensors["blk.0.ffn_up.weight"]
    data = bytearray((tmp_path / "model.gguf").read_bytes())
    data[entry.start : entry.start + 2] = np.float16(np.nan).tobytes()
    (tmp_path / "model.gguf").write_bytes(data)
    with pytest.raises(UserError, match="blk.0.ffn_up.weight"):
        GgufSource(tmp_path / "model.gguf").coded("model.layers.0.mlp.up_proj.weight")


def _header(tensors: int, keys: int, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest


def _array(kind: int, count: int) -> bytes:
    return struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, kind, count)


LIES = {
    "empty": b"",
    "no magic": b"GGML" + bytes(60),
    "cut off": _header(0, 0)[:13],
    "version 1": _header(0, 0, bytes(100), 1),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "2^60 keys": _header(0, 1 << 60, bytes(100)),
    "2^60 tensors": _header(1 << 60, 0, bytes(100)),
    "2^60 numbers": _header(0, 1, _array(4, 1 << 60) + bytes(100)),
    "2^60 strings": _header(0, 1, _array(8, 1 << 60) + bytes(100)),
    "2^62 arrays": _header(0, 1, _array(9, 1 << 62) + bytes(100)),
    "a key of 10 TB": _header(0, 1, struct.pack("<Q", 10**13) + bytes(100)),
    "a string of 10 TB": _header(0, 1, struct.pack("<Q", 1) + b"k" + struct.pack("<IQ", 8, 10**13) + bytes(100)),
    "arrays in arrays": _header(0, 1, struct.pack("<Q", 1) + b"k" + struct.pack("<I", 9) +
                                struct.pack("<IQ", 9, 1) * 50 + bytes(1000)),
    "a type 99": _header(0, 1, struct.pack("<Q", 1) + b"k" + struct.pack("<I", 99) + bytes(100)),
    "a tensor beyond": _header(1, 0, struct.pack("<Q", 1) + b"t" + struct.pack("<IQQIQ", 2, 1 << 40, 1 << 40, 0, 0)),
    "an offset beyond": _header(1, 0, struct.pack("<Q", 1) + b"t" + struct.pack("<IQIQ", 1, 8, 0, 1 << 63)),
    "half a block": _header(1, 0, struct.pack("<Q", 1) + b"t" + struct.pack("<IQIQ", 1, 7, 2, 0) + bytes(200)),
    "99 dimensions": _header(1, 0, struct.pack("<Q", 1) + b"t" + struct.pack("<I", 99) + bytes(2000)),
    "a tensor of type 77": _header(1, 0, struct.pack("<Q", 1) + b"t" + struct.pack("<IQIQ", 1, 8, 77, 0) + bytes(99)),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie_are_refused_in_no_time(tmp_path: Path, lie: str) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(LIES[lie])
    with pytest.raises(UserError):
        GgufFile(file)


def test_every_cut_of_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_random(file, small_config(num_hidden_layers=1), Type.Q4_0, metadata={"tokenizer.ggml.tokens": ["a", "b"]})
    whole = file.read_bytes()
    end = GgufFile(file).header_bytes().size
    for size in [*range(0, end, 7), end, len(whole) - 1]:
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(UserError):
            GgufFile(tmp_path / "cut.gguf")


WRONG: tuple[object, ...] = (
    "x", "", True, -1, 0, 10**18, 0.5, float("nan"), [], ["x", "y"], [[1], [2]],
    np.array([1, 2], np.int32), np.array([], np.int32), np.array([0.5, np.inf], np.float32),
)  # fmt: skip


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_metadata_of_any_type_is_read_or_refused(tmp_path: Path, kind: str) -> None:
    """A key of an array was taken for a number, and raised a raw error."""
    write_random(tmp_path / "m.gguf", small_config(), Type.F32)
    metadata = dict(GgufFile(tmp_path / "m.gguf").metadata)
    tokens = ["<unk>", "<s>", "</s>", "a", "b", "ab"]
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in {
        "model": kind, "pre": "smollm", "tokens": tokens, "token_type": [2, 3, 3, 1, 1, 1], "merges": ["a b"],
        "scores": np.zeros(6, np.float32), "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0,
        "padding_token_id": 0, "eot_token_id": 2, "add_bos_token": True, "add_eos_token": False,
        "add_space_prefix": True, "remove_extra_whitespaces": False,
    }.items()}  # fmt: skip
    architecture = metadata["general.architecture"]
    metadata |= {f"{architecture}.{key}": value for key, value in {
        "rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.original_context_length": 64,
        "rope.scaling.attn_factor": 1.0, "rope.scaling.yarn_beta_fast": 32.0, "rope.scale_linear": 1.0,
        "expert_count": 0, "attention.sliding_window": 0, "attention.scale": 0.0,
    }.items()}  # fmt: skip
    metadata |= {"tokenizer.chat_template": "x", "tokenizer.chat_templates": ["t"], "tokenizer.chat_template.t": "y"}
    describe(config_of(metadata, 256, ()))
    tokenizer_of(metadata)
    for key in metadata:
        for wrong in WRONG:
            for read in (lambda m: describe(config_of(m, 256, ())), tokenizer_of):
                try:
                    read(metadata | {key: wrong})
                except UserError as error:
                    assert "\n" not in str(error) and len(str(error)) < 600


@pytest.mark.parametrize("family", ["phi3", "olmo3", "granite", "ministral3", "apertus"])
def test_metadata_of_families_is_read_or_refused(tmp_path: Path, family: str) -> None:
    write_random(tmp_path / "m.gguf", family_config(family), Type.F32)
    metadata, rope = dict(GgufFile(tmp_path / "m.gguf").metadata), {LONG_TENSOR: np.ones(6, np.float32)}
    for key in metadata:
        for wrong in WRONG:
            for factors in ({}, rope):
                try:
                    describe(config_of(metadata | {key: wrong}, 96, (), factors))
                except UserError as error:
                    assert "\n" not in str(error) and len(str(error)) < 600


def test_what_is_taken_for_gguf(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(_header(0, 0))
    (tmp_path / "b.bin").write_bytes(b"no")
    assert is_gguf(tmp_path / "a.bin") and is_gguf("missing.gguf")
    assert not is_gguf(tmp_path / "b.bin") and not is_gguf(tmp_path)
    with pytest.raises(UserError, match="found none that can be read"):
        open_source(tmp_path / "missing.gguf")


def test_reading_needs_no_torch(tmp_path: Path) -> None:
    write_random(tmp_path / "model.gguf", small_config(num_hidden_layers=1), Type.Q4_K)
    code = (
        "import sys; from tulle.models.source import open_source; s = open_source(sys.argv[1]);"
        "s.read('model.layers.0.mlp.up_proj.weight'); assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.gguf")], check=True)


def _same_logits(file: Path, model: torch.nn.Module, most: float = 1e-4, length: int = 48) -> None:
    checkpoint = Checkpoint.open(file)
    decoder = checkpoint.describe()
    outer = {name: checkpoint.read(name).float() for name in decoder.outer_tensors()}

    def layer(index: int) -> dict[str, torch.Tensor]:
        return {name: t.float() for name, t in checkpoint.read_layer(decoder.layers[index]).items()}

    plain = PlainDecoder(decoder, layer, outer, dtype=torch.float32)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 96, (2, length)))
    with torch.no_grad():
        expected, found = model(tokens).logits, plain(tokens)
    assert float(expected.std()) > 0.1
    assert float((found - expected).abs().max()) <= most * float(expected.abs().max())


def _with_tensor(file: Path, to: Path, name: str, values: np.ndarray) -> None:
    """A copy of a file with one more tensor."""
    _changed(file, to, tensors={name: values})


def _changed(
    file: Path, to: Path, keys: Mapping[str, object] | None = None, tensors: Mapping[str, np.ndarray] | None = None
) -> None:
    """A copy of a file with other, or further, keys and float32 tensors."""
    old, tensors = GgufFile(file), tensors or {}
    writer = gguf.GGUFWriter(to, str(old.metadata["general.architecture"]))
    for key, value in (old.metadata | dict(keys or {})).items():
        if key != "general.architecture":
            add(writer, key, value.tolist() if isinstance(value, np.ndarray) else value)
    for tensor, entry in old.tensors.items():
        if tensor not in tensors:
            writer.add_tensor(tensor, np.array(old.raw(tensor)), raw_dtype=entry.type)
    for tensor, values in tensors.items():
        writer.add_tensor(tensor, values.astype(np.float32))
    _finish(writer)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_gemma(tmp_path: Path, family: str) -> None:
    """Norms that are stored as 1 + w, windows and soft caps, two rotary tables of which the file says one."""
    model = write_random(tmp_path / "model.gguf", small_config(family), Type.Q8_0)
    _same_logits(tmp_path / "model.gguf", model)


LONG = {"rope_factors_long.weight": [2.0 + i for i in range(6)], "rope_factors_short.weight": [1.0] * 6}


@pytest.mark.parametrize("family", [*FAMILIES, *READ_ONLY])
def test_families(tmp_path: Path, family: str) -> None:
    """What the library's writer stores as the converter of a family does, against transformers."""
    size = 0.1 if family == "qwen3_next" or "gemma4" in family else 0.2  # rounding would grow
    model = write_random(tmp_path / "model.gguf", family_config(family), Type.F32, size=size)
    model_type = {"qwen3_next": "qwen3_5_moe_text"}.get(family, family.partition(",")[0])
    assert GgufSource(tmp_path / "model.gguf").config["model_type"] == model_type
    _same_logits(tmp_path / "model.gguf", model, 1e-5)


def test_mistral_under_its_newer_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a scale of queries by position, mistral3 is Mistral."""
    monkeypatch.setitem(gguf_files.ARCHITECTURES, "mistral", "mistral3")
    model = write_random(tmp_path / "model.gguf", small_config("mistral"), Type.F32)
    assert GgufSource(tmp_path / "model.gguf").config["model_type"] == "mistral"
    _same_logits(tmp_path / "model.gguf", model, 1e-5)


@pytest.mark.parametrize("length", [16, 48])
def test_longrope_of_short_and_of_long_texts(tmp_path: Path, length: int) -> None:
    longrope = {"rope_type": "longrope", "rope_theta": 1000.0, "original_max_position_embeddings": 32}
    scaling = longrope | {"long_factor": LONG["rope_factors_long.weight"], "short_factor": [1.0] * 6}
    config = family_config("phi3") | {"rope_parameters": scaling, "original_max_position_embeddings": 32}
    attention = (1 + np.log(64 / 32) / np.log(32)) ** 0.5
    keys = {"phi3.rope.scaling.attn_factor": attention, "phi3.rope.scaling.original_context_length": 32}
    model = write_random(tmp_path / "model.gguf", config, Type.F32, metadata=keys, size=0.2, factors=LONG)
    _same_logits(tmp_path / "model.gguf", model, 1e-5, length)


def test_windows_of_exaone_s_larger_model_alone(tmp_path: Path) -> None:
    """llama.cpp has them with 64 layers, and says so nowhere in the file."""
    metadata = {"general.architecture": "exaone4", **{f"exaone4.{key}": value for key, value in {
        "block_count": 64, "context_length": 64, "embedding_length": 64, "feed_forward_length": 96,
        "attention.head_count": 4}.items()}}  # fmt: skip
    mixers = [layer.attention for layer in describe(config_of(metadata, 96, ())).layers]
    assert [mixer.window for mixer in mixers[:4]] == [4096] * 3 + [None]
    assert [mixer.rotary for mixer in mixers[:4]] == ["default"] * 3 + [None]
    metadata |= {"exaone4.block_count": 4, "exaone4.attention.sliding_window": 4096}
    with pytest.raises(UserError, match="none without 64 layers"):
        config_of(metadata, 96, ())
    del metadata["exaone4.attention.sliding_window"]
    assert {layer.attention.rotary for layer in describe(config_of(metadata, 96, ())).layers} == {"default"}


@pytest.mark.parametrize(
    ("family", "key", "value", "message"),
    [
        ("granite", "granite.rope.scaling.finetuned", False, "rope.scaling.finetuned"),
        ("phi3", "phi3.rope.dimension_count", 32, "rope.dimension_count"),
        ("arcee", "arcee.rope.scaling.yarn_log_multiplier", 1.0, "yarn_log_multiplier"),
        ("olmo2", "olmo2.attention.scale", 0.5, "attention.scale"),
        ("cohere2", "cohere2.attention.sliding_window_pattern", [True, False], "sliding_window_pattern"),
        ("apertus", "xielu.beta", [0.5], "xielu.beta"),
        ("apertus", "xielu.beta", "much", "xielu.beta"),
        ("gemma4_text", "gemma4.attention.shared_kv_layers", 5, "shared_kv_layers"),
        ("gemma4_text", "gemma4.attention.shared_kv_layers", 1, "a layer with a window and one without before those"),
        ("gemma4_text", "gemma4.attention.value_length_swa", 8, "value_length_swa"),
        ("gemma4_text", "gemma4.attention.head_count_kv", [1, 2], "attention.head_count_kv"),
        ("gemma4_text", "gemma4.feed_forward_length", [96, 96, 96, 192, 288], "feed_forward_length"),
        ("gemma4_text, experts", "gemma4.expert_count", 4, "expected 4 experts in blk.0.ffn_"),
    ],
)
def test_what_a_family_does_not_do_is_refused(
    tmp_path: Path, family: str, key: str, value: object, message: str
) -> None:
    write_random(tmp_path / "model.gguf", family_config(family), Type.F32)
    _changed(tmp_path / "model.gguf", tmp_path / "other.gguf", {key: value})
    with pytest.raises(UserError, match=message):
        GgufSource(tmp_path / "other.gguf")


@pytest.mark.parametrize(
    ("family", "tensor"),
    [
        ("ernie4_5", "blk.0.attn_q.bias"), ("cohere2", "output.weight"), ("olmo2", "blk.0.ffn_norm.weight"),
        ("qwen2", "rope_freqs.weight"),
    ],
)  # fmt: skip
def test_tensors_that_llama_cpp_does_not_read_in_a_family(tmp_path: Path, family: str, tensor: str) -> None:
    config = family_config(family) if family in FAMILIES else small_config(family)
    write_random(tmp_path / "model.gguf", config, Type.F32)
    _with_tensor(tmp_path / "model.gguf", tmp_path / "more.gguf", tensor, np.ones(64))
    with pytest.raises(UserError, match=tensor):
        GgufSource(tmp_path / "more.gguf")


def test_gemma_s_norms_of_any_type(tmp_path: Path) -> None:
    """What is stored in 16 bits is 1 + w there too."""
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gemma3")
    write_keys(writer, small_config("gemma3_text", num_hidden_layers=1))
    writer.add_tensor("token_embd.weight", np.zeros((96, 256), np.float16))
    bits = (np.full(256, 1.5, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    writer.add_tensor("output_norm.weight", bits.view(np.uint8), raw_dtype=Type.BF16)
    writer.add_tensor("blk.0.attn_norm.weight", np.full(256, 1.25, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = GgufSource(tmp_path / "model.gguf")
    for name, weight in (("model.norm.weight", 0.5), ("model.layers.0.input_layernorm.weight", 0.25)):
        assert source.info(name).dtype == "F32" and source.read(name).dtype == np.float32
        assert (source.read(name) == weight).all() and source.read(name).shape == (256,)


def test_heads_for_several_tokens_are_left_out(tmp_path: Path) -> None:
    """Converters of Qwen 3.5 count them among the layers."""
    model = write_random(tmp_path / "model.gguf", family_config("qwen3_5_text"), Type.F32, size=0.2)
    keys = {"qwen35.block_count": 6, "qwen35.nextn_predict_layers": 1,
            "qwen35.attention.recurrent_layers": [True, True, True, False, True, False]}  # fmt: skip
    further = {"blk.5.nextn.eh_proj.weight": np.ones((64, 128))}
    _changed(tmp_path / "model.gguf", tmp_path / "more.gguf", keys, further)
    assert "1 tensors of heads for several tokens" in GgufSource(tmp_path / "more.gguf").notes[0]
    _same_logits(tmp_path / "more.gguf", model, 1e-5)


def test_a_state_that_would_grow_is_refused(tmp_path: Path) -> None:
    write_random(tmp_path / "model.gguf", family_config("qwen3_5_text"), Type.F32)
    entry = GgufFile(tmp_path / "model.gguf").tensors["blk.0.ssm_a"]
    data = bytearray((tmp_path / "model.gguf").read_bytes())
    data[entry.start : entry.start + 4] = np.float32(0.5).tobytes()
    (tmp_path / "model.gguf").write_bytes(data)
    with pytest.raises(UserError, match="numbers below 0 in blk.0.ssm_a"):
        GgufSource(tmp_path / "model.gguf").read("model.layers.0.linear_attn.A_log")


def test_gemma_of_another_pattern_is_refused(tmp_path: Path) -> None:
    key = "gemma3.attention.sliding_window_pattern"
    write_random(tmp_path / "model.gguf", small_config("gemma3_text"), Type.F16, metadata={key: 4})
    with pytest.raises(UserError, match="sliding_window_pattern"):
        GgufSource(tmp_path / "model.gguf")

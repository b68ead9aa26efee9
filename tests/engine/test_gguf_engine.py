"""The engine on GGUF files: codes as they are stored, logits as transformers computes them from the same weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from dense_codes import in_order_of_units

from gguf_files import Type, family_config, random_bytes, small_config, write_random
from tulle.engine import Engine
from tulle.engine.checkpoint import Source
from tulle.engine.layout import for_kernels
from tulle.engine.native_model import ScaleKind
from tulle.engine.prepare import quantised_head
from tulle.models.gguf.blocks import READERS, decode

WIDTHS = {
    Type.Q5_0: 5, Type.Q5_1: 5, Type.Q5_K: 5, Type.Q6_K: 6, Type.Q2_K: 2, Type.TQ1_0: 2, Type.TQ2_0: 2, Type.Q8_0: 8,
    Type.IQ4_NL: 8, Type.IQ4_XS: 8, Type.MXFP4: 5,
}  # fmt: skip
"""Bits of codes in the engine, where not 4. Q3_K has a scale per 16 weights, half a group of 3 bits."""
CLOSE = 3e-4
"""Of the largest logit: inputs have 16 bits. Scales rounded to bfloat16 would be off by 2e-3 each."""
TYPES = [Type.F32, Type.F16, Type.BF16, *READERS]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_logits_of_every_type(tmp_path: Path, kind: Type) -> None:
    model = write_random(tmp_path / "model.gguf", small_config(num_hidden_layers=1), kind, embedding=kind)
    _agrees(tmp_path / "model.gguf", model)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_families(tmp_path: Path, family: str) -> None:
    config = small_config(family, tie_word_embeddings=True)
    model = write_random(tmp_path / "model.gguf", config, Type.Q4_K, embedding=Type.Q6_K)
    _agrees(tmp_path / "model.gguf", model)


@pytest.mark.parametrize("family", ["phi3", "nemotron", "apertus"])
def test_fused_tensors_and_norms_that_are_more_than_stored(tmp_path: Path, family: str) -> None:
    """Codes of fused tensors, an offset of norms, numbers that stand in the file's metadata."""
    config = family_config(family) | {"num_hidden_layers": 2}
    model = write_random(tmp_path / "model.gguf", config, Type.Q8_0, embedding=Type.Q8_0, size=0.1)
    _agrees(tmp_path / "model.gguf", model)


@pytest.mark.parametrize(
    ("family", "kind", "most"),
    [
        ("mixtral", Type.Q8_0, 3e-4),
        ("qwen2_moe", Type.Q5_1, 3e-4),
        ("qwen3_moe", Type.Q4_K, 3e-4),
        ("gpt_oss", Type.MXFP4, 3e-4),
        ("qwen3_5_text", Type.F32, 1e-5),
        ("lfm2", Type.Q8_0, 3e-4),
        ("qwen3_5_text", Type.Q8_0, 3e-3),
        ("qwen3_5_moe_text", Type.Q5_1, 3e-3),
        ("glm4_moe", Type.Q8_0, 3e-4),
        ("qwen3_next", Type.Q8_0, 3e-3),
        ("gemma4_text", Type.F32, 1e-5),
        ("gemma4_text", Type.Q8_0, 3e-3),
        ("gemma4_text, experts", Type.Q8_0, 3e-3),
    ],
)
def test_experts_and_delta_nets_and_layers_that_differ(tmp_path: Path, family: str, kind: Type, most: float) -> None:
    """Codes of experts, all of a layer in one tensor; columns of delta nets that are put back; a table of layers' own
    inputs. What inputs of 16 bits round grows from token to token in a state, and where scores are large."""
    config = family_config(family)
    if "layer_types" not in config:  # whose kinds of layers stand in the config
        config["num_hidden_layers"] = 4 if family.startswith(("qwen3_5", "qwen3_next", "glm4")) else 2
    if kind == Type.Q4_K:
        config |= {"hidden_size": 256, "num_attention_heads": 8, "moe_intermediate_size": 256}
    embedding = kind if "gemma4" in family else Type.F16  # whose layers have a table, too
    model = write_random(tmp_path / "model.gguf", config, kind, embedding=embedding, size=0.1)
    _agrees(tmp_path / "model.gguf", model, most)


@pytest.mark.parametrize("kind", READERS, ids=lambda kind: kind.name)
def test_codes_run_as_they_are_stored(tmp_path: Path, kind: Type) -> None:
    """What the kernels get, put together again, is the file's weights value for value."""
    coded = decode(random_bytes(np.random.default_rng(0), kind, 1, 256), kind)
    write_random(tmp_path / "model.gguf", small_config(num_hidden_layers=1), kind)
    stored = Source(tmp_path / "model.gguf").linear("model.layers.0.mlp.down_proj")
    assert stored.mask is None and stored.bits == coded.bits and stored.zero == coded.zero
    facts, arrays = for_kernels(stored)
    assert facts.kind == f"codes{WIDTHS.get(kind, 4)}"
    assert facts.scale_kind is (ScaleKind.F16 if coded.scale.dtype == np.float16 else ScaleKind.F32)
    assert ("minima" in arrays) == (kind in (Type.Q4_1, Type.Q5_1, Type.Q2_K, Type.Q4_K, Type.Q5_K))
    numbers = [_by_row(arrays[name], facts) for name in ("scales", "minima") if name in arrays]
    codes = _codes(arrays["values"], facts)
    found = (codes - facts.zero) * numbers[0].repeat(facts.segment, axis=1)
    if len(numbers) == 2:
        found += numbers[1].repeat(facts.segment, axis=1)
    expected = Source(tmp_path / "model.gguf").source.read("model.layers.0.mlp.down_proj.weight")
    np.testing.assert_array_equal(found, expected)


def test_a_quantised_head_is_run_as_it_is_stored(tmp_path: Path) -> None:
    write_random(tmp_path / "model.gguf", small_config(num_hidden_layers=1), Type.Q4_0, embedding=Type.Q6_K)
    source = Source(tmp_path / "model.gguf")
    expected = source.coded("lm_head.weight", (96, 256))
    assert expected is not None
    for head in ("int8", "bf16", "as stored"):
        found = quantised_head(source, head)
        np.testing.assert_array_equal(found.values, expected.values)
        np.testing.assert_array_equal(found.scale, expected.scale)
    rougher = quantised_head(source, "int4")
    assert rougher.bits == 4 and rougher.scale is not None and rougher.scale.dtype == np.uint16


def test_generation_with_the_files_own_tokenizer(tmp_path: Path) -> None:
    tokens = [chr(c) for c in range(33, 127)] + ["Ġ", "<|end|>"]
    metadata = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 95 + [3], "tokenizer.ggml.merges": ["! !"],
        "tokenizer.ggml.eos_token_id": 95,
        "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
    }  # fmt: skip
    metadata["tokenizer.ggml.tokens"] = [*tokens[:-2], "!!", "<|end|>"]
    config = small_config(num_hidden_layers=1, vocab_size=96)
    write_random(tmp_path / "model.gguf", config, Type.Q4_0, metadata=metadata)
    engine = Engine(tmp_path / "model.gguf", threads=1)
    assert engine.text.encode("ab!!") == [64, 65, 94]
    found = engine.generate("abc", 8, ignore_end=True)
    assert found.text == "".join("!!" if t == 94 else tokens[t] for t in found.tokens if t != 95)
    assert engine.text.chat([{"role": "user", "content": "abc"}]) == "abc"


def _agrees(file: Path, model: torch.nn.Module, most: float = CLOSE) -> None:
    engine = Engine(file, threads=1, cache="f32", head="as stored")
    tokens = np.random.default_rng(1).integers(0, 96, 24).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    whole = engine.forward(tokens)
    single = np.concatenate([engine.forward([token], 0, place) for place, token in enumerate(tokens)])
    largest = float(np.abs(expected).max())
    for found in (whole, single):
        assert float(np.abs(found - expected).max()) < most * largest


def _by_row(numbers: np.ndarray, facts: object) -> np.ndarray:
    """Scales or minima ``[rows, scales]`` in float32."""
    numbers = numbers.view(np.float16) if numbers.dtype == np.uint16 else numbers
    tiles = -(-facts.rows // 16)  # type: ignore[attr-defined]
    return numbers.astype(np.float32).reshape(tiles, -1, 16).transpose(0, 2, 1).reshape(tiles * 16, -1)


def _codes(values: np.ndarray, facts: object) -> np.ndarray:
    """Codes ``[rows, columns]`` of dense tiles."""
    values = in_order_of_units(facts.kind, values[:-64])  # type: ignore[attr-defined]
    units = values.reshape(-(-facts.rows // 16), -1, 16, 4)  # type: ignore[attr-defined]
    return units.transpose(0, 2, 1, 3).reshape(units.shape[0] * 16, -1).astype(np.float32)

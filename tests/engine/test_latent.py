"""Latent attention in the engine: one small key and value for all heads, packed in every way, shared and batched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from native_engines import decoder
from test_batch_invariance import differing
from test_families import TEXT, TOKENS, difference, wanted

from family_folders import write_family
from tulle.compression.job import compress
from tulle.engine import Engine
from tulle.engine.checkpoint import StoredLinear
from tulle.engine.latent import absorbed, tiled
from tulle.format.pack import f32_to_bf16
from tulle.models.description import LatentAttention, Norm

# Sizes that fill tiles and vectors, and such that do not; no experts.
WIDE = {
    "hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3, "q_lora_rank": 24, "kv_lora_rank": 64,
    "qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 20, "first_k_dense_replace": 2,
    "max_position_embeddings": 128,
}  # fmt: skip
W4: dict[str, Any] = {"bits": 4, "group_size": "auto-32"}
SCHEMES: dict[str, list[dict[str, Any]]] = {
    "int4": [{"gptq": W4}],
    "int4 with zero points": [{"gptq": W4 | {"symmetric": False}}],
    "sparse int4": [{"sparsegpt": {"sparsity": 0.5}}, {"gptq": W4}],
    "sparse floats": [{"sparsegpt": {"sparsity": 0.5}}],
    "quantised inputs": [{"activations": {"bits": 8}}, {"gptq": {"bits": 8}}],
    "transforms": [{"duquant": {}}, {"activations": {"bits": 8}}, {"gptq": W4}],
    "sparse inputs": [{"teal": {"share": 0.5, "kind": "top_k"}}, {"gptq": W4}],
    "quantised heads": [{"kv_cache": {"bits": 8, "query_bits": 8}}, {"gptq": W4}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("latent") / "model", "deepseek_v3", 3, **WIDE, num_hidden_layers=1)


def packed(folder: Path, output: Path, scheme: str) -> Path:
    recipe = {"calibration": {"samples": 2, "length": 24}, "steps": SCHEMES[scheme]}
    compress(folder, recipe, output, calibration=TEXT)
    return output


@pytest.mark.parametrize(("rank", "threads"), [(None, 3), (24, 1), (24, 3)])
def test_wide_heads(tmp_path: Path, rank: int | None, threads: int) -> None:
    folder = write_family(tmp_path / "model", "deepseek_v3", 2, **WIDE | {"q_lora_rank": rank})
    expected = wanted(folder, TOKENS)
    engine = Engine(folder, threads, sequences=2, cache="f32", head="as stored")
    assert difference(engine.forward(TOKENS), expected) <= 5e-5
    # Two sequences token by token, in one pass, one of them a step behind.
    rows = [engine.forward(TOKENS[:1], 1, 0)]
    for place, token in enumerate(TOKENS[1:], 1):
        found = engine.forward([token, TOKENS[place - 1]], [1, 0], [place, place - 1])
        rows.append(found[:1])
        assert np.array_equal(found[1], rows[place - 1][0])
    assert difference(np.concatenate(rows), expected) <= 5e-5


@pytest.mark.parametrize(("scheme", "threads"), [("", 2), ("sparse int4", 1), ("quantised heads", 2)])
def test_same_bits_in_any_batch(folder: Path, tmp_path: Path, scheme: str, threads: int) -> None:
    model = decoder(packed(folder, tmp_path / "out", scheme) if scheme else folder)
    assert differing(model, threads) == []


@pytest.mark.parametrize("scheme", SCHEMES)
def test_packed(folder: Path, tmp_path: Path, scheme: str) -> None:
    """Of a scheme whose linears are sparse also with zeros filled in, and input by input."""
    output = packed(folder, tmp_path / "out", scheme)
    expected = wanted(output, TOKENS, packed=True)
    layouts = ["sparse", "dense"] if scheme.startswith("sparse") else ["sparse"]
    for layout in [*layouts, "input-major"] if scheme == "sparse inputs" else layouts:
        engine = Engine(output, 2, cache="f32", head="as stored", layout=layout)
        off = np.abs(engine.forward(TOKENS) - expected).max(1) / np.abs(expected).max()
        if any("activations" in step for step in SCHEMES[scheme]):
            # Queries that meet latents have 16 bits. An input that lies between two codes of 8 may take the other one,
            # which all later tokens see.
            assert np.sort(off)[7] <= 1e-4 and off.max() <= 5e-2
        else:
            # Inputs are rounded to 16 bits, and some of the heads' codes to others then.
            assert off.max() <= (1e-2 if scheme == "quantised heads" else 5e-3)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bits", [None, 3, 8])
def test_absorbed_linears(bits: int | None, seed: int) -> None:
    """What they stand for is the linear's own numbers, turned."""
    draw = np.random.default_rng(seed)
    heads, parts, plain, value = (int(draw.integers(1, 4)) for _ in range(4))
    rank, rows = parts * int(draw.integers(1, 40)), heads * (plain + value)
    mask = draw.random((rows, rank)) < 0.5 if seed % 2 else None
    if bits is None:
        stored = StoredLinear(draw.normal(size=(rows, rank)).astype(np.float32), mask)
    else:
        zeros = draw.integers(0, 1 << bits, (rows, parts), np.uint8) if seed % 3 else None
        scale = f32_to_bf16(draw.uniform(0.5, 2, (rows, parts)).astype(np.float32))
        stored = StoredLinear(draw.integers(0, 1 << bits, (rows, rank), np.uint8), mask, bits, scale, zeros)
    weight = stored.floats() if mask is None else np.where(mask, stored.floats(), 0)
    k, v = np.split(weight.reshape(heads, plain + value, rank), [plain], axis=1)
    mixer = LatentAttention(heads, None, rank, plain, 2, value, 1.0, None, Norm("norm", 1e-6))
    found = absorbed(stored, mixer)

    def floats(one: StoredLinear) -> np.ndarray:
        return one.floats() if one.mask is None else np.where(one.mask, one.floats(), 0)

    assert np.array_equal(floats(found.values).reshape(heads, tiled(value), rank)[:, :value], v)
    cut = 1 if found.factors is None else parts
    turned = floats(found.keys).reshape(heads, cut, tiled(rank // cut), plain)[:, :, : rank // cut]
    if found.factors is not None:
        turned = turned * found.factors.reshape(heads, cut, 1, plain)
    assert np.array_equal(turned.reshape(heads, rank, plain), k.transpose(0, 2, 1))
    wider = None if bits is None else bits + (stored.zero_point is not None)
    assert found.keys.bits == (None if wider == 9 else wider)  # no codes have 9 bits


def test_the_cache_is_small(folder: Path) -> None:
    """Of a token one latent and one rotated key, whatever heads there are; codes of it stay near."""
    expected = Engine(folder, 1, cache="f32", head="as stored").forward(TOKENS)
    for cache, most in (("f32", 0.0), ("bf16", 0.01), ("int8", 0.04), ("int4", 0.4)):
        engine = Engine(folder, 1, context=128, cache=cache, head="as stored")
        bits = {"f32": 32, "bf16": 16, "int8": 8, "int4": 4}[cache]
        steps = 16 if bits < 16 else 0
        assert engine.cache_bytes == 128 * ((64 + 8) * bits // 8 + steps)
        assert np.abs(engine.forward(TOKENS) - expected).mean() <= most * np.abs(expected).mean()


@pytest.mark.parametrize("cache", ["f32", "int8"])
def test_prefixes_are_shared(folder: Path, cache: str) -> None:
    prompt = list(b"A prompt that others begin with, too.")
    alone = [
        Engine(folder, 1, cache=cache).generate([*prompt, *end], 12, ignore_end=True).tokens for end in (b"A", b"Bcd")
    ]
    engine = Engine(folder, 1, sequences=2, cache=cache)
    assert engine.generate([*prompt, *b"A"], 12, ignore_end=True).tokens == alone[0]
    again = engine.generate([*prompt, *b"Bcd"], 12, ignore_end=True)
    assert again.tokens == alone[1] and again.cached_tokens == len(prompt) // 16 * 16

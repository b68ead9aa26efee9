"""Embedding and head in codes: rows value for value, one copy where they are tied, and which head is run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from native_engines import Runner, decoder

from gguf_files import Type, small_config, write_random
from tulle.engine.checkpoint import Source
from tulle.engine.native_model import Linear, Model, Table, WeightKind

KINDS = [Type.Q8_0, Type.Q6_K, Type.Q5_K, Type.Q4_1, Type.Q3_K, Type.TQ2_0]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def in_floats(file: Path, model: Model) -> Model:
    """The same with its embedding in float32, as the file's reader gives it."""
    source = Source(file)
    rows = source.floats(source.embedding_name(), (model.vocabulary, model.hidden))
    return replace(model, embedding=Table(WeightKind.F32, rows.reshape(-1)))


def write(file: Path, kind: Type, tied: bool) -> None:
    config = small_config(num_hidden_layers=1, tie_word_embeddings=tied)
    write_random(file, config, Type.Q4_0, embedding=kind)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("tied", [False, True])
def test_rows_are_what_the_codes_stand_for(tmp_path: Path, kind: Type, tied: bool) -> None:
    file = tmp_path / "model.gguf"
    write(file, kind, tied)
    model = replace(decoder(file), layers=[])  # the hidden states are the rows, normalised
    assert isinstance(model.embedding, Linear)
    tokens = list(range(model.vocabulary))
    found, expected = (Runner(one, pages=12, slots=1, context=96, batch=96).embed(tokens)
                       for one in (model, in_floats(file, model)))  # fmt: skip
    np.testing.assert_array_equal(found, expected)


def test_a_tied_table_is_in_memory_once(tmp_path: Path) -> None:
    write(tmp_path / "tied.gguf", Type.Q6_K, True)
    write(tmp_path / "untied.gguf", Type.Q6_K, False)
    for name, tied in (("tied", True), ("untied", False)):
        model = decoder(tmp_path / f"{name}.gguf", head="int8")
        assert isinstance(model.embedding, Linear)
        assert np.shares_memory(model.embedding.values, model.head.linears[0].values) == tied
        assert model.embedding.facts.kind is WeightKind.CODES6 and model.exact_head is None


@pytest.mark.parametrize("tied", [False, True])
def test_a_rougher_head_keeps_the_stored_one(tmp_path: Path, tied: bool) -> None:
    """int4 of more bits: the largest logits are those of the stored codes. Codes of 4 bits are run as they are."""
    file = tmp_path / "model.gguf"
    write(file, Type.Q6_K, tied)
    rough, exact = decoder(file, head="int4"), decoder(file, head="as stored")
    assert rough.head.linears[0].facts.kind is WeightKind.CODES4
    assert isinstance(rough.exact_head, Linear) and rough.exact_head.facts.kind is WeightKind.CODES6
    assert np.shares_memory(rough.exact_head.values, rough.embedding.values) == tied
    tokens = [3, 1, 4, 1, 5]
    found, expected = (Runner(one).forward(tokens) for one in (rough, exact))
    best = np.argsort(expected, axis=1)[:, -20:]
    kept = [np.take_along_axis(logits, best, axis=1) for logits in (found, expected)]
    # The exact head multiplies by inputs in floats, the stored one by inputs in 16 bits.
    assert np.abs(kept[0] - kept[1]).max() < 3e-4 * np.abs(expected).max()
    write(tmp_path / "q4.gguf", Type.Q4_0, tied)
    assert decoder(tmp_path / "q4.gguf", head="int4").exact_head is None

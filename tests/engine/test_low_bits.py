"""Packed models of every width of codes in the engine, against a torch model of the weights that they stand for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from native_engines import Runner, decoder

from tiny_models import write_model
from tulle.engine import Engine
from tulle.engine.checkpoint import Source
from tulle.engine.layout import ModelLayout
from tulle.engine.native_model import Linear, ScaleKind, Table, WeightKind
from tulle.format.pack import unpack_linear

WIDTHS = [
    {"qkv": 2, "o": 3, "gate_up": 5, "down": 6, "embedding": 3, "head": 5},
    {"qkv": 6, "o": 5, "gate_up": 3, "down": 2, "embedding": 6, "head": 2},
    {"qkv": 4, "o": 7, "gate_up": 8, "down": 4, "embedding": 8, "head": 4},
]
"""Bits by role: each width stands in front of inputs of several sizes."""
CLOSE = 3e-4
"""Of the largest logit: inputs have 16 bits."""


def schemes(bits: dict[str, int], **fields: Any) -> dict[str, dict[str, Any]]:
    return {role: {"bits": of_role, **fields} for role, of_role in bits.items()}


def off(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def agrees(folder: Path, model: torch.nn.Module, **options: Any) -> None:
    ids = np.random.default_rng(0).integers(0, 128, 20).tolist()
    with torch.inference_mode():
        expected = model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
    engine = Engine(folder, threads=1, cache="f32", **options)
    assert off(engine.forward(ids), expected) < CLOSE
    steps = [engine.forward([token], 0, place) for place, token in enumerate(ids)]
    assert off(np.concatenate(steps), expected) < CLOSE


@pytest.mark.parametrize("bits", WIDTHS, ids=lambda bits: "".join(map(str, bits.values())))
@pytest.mark.parametrize("scale_bits", [8, 16])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [None, 16, 32])
def test_every_width(bits: dict[str, int], group: int | None, symmetric: bool, scale_bits: int, tmp_path: Path) -> None:
    fields = {"group_size": group, "symmetric": symmetric, "scale_bits": scale_bits}
    agrees(tmp_path / "m", write_model(tmp_path / "m", schemes(bits, **fields)))


FP4 = {
    form: {"bits": 4, "group_size": size, "scale_bits": 8, "format": form}
    for form, size in (("mxfp4", 32), ("nvfp4", 16))
}


@pytest.mark.parametrize("layout", ModelLayout)
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("form", FP4)
def test_floats_of_four_bits(form: str, sparse: bool, layout: str, tmp_path: Path) -> None:
    """They run as whole numbers with half the scale."""
    found = {role: FP4[form] | {"sparse": sparse} for role in ("qkv", "gate_up", "o", "down")}
    tables = {"embedding": FP4[form], "head": FP4[form]}
    agrees(tmp_path / "m", write_model(tmp_path / "m", found | tables), layout=layout)
    for name in ("model.layers.0.mlp.down_proj", "lm_head"):
        source = Source(tmp_path / "m")
        spec = source.specs[name]
        stored = source.coded(f"{name}.weight", spec.shape)
        assert stored is not None and stored.bits == 5
        kept = np.ones(spec.shape, bool) if stored.mask is None else stored.mask
        tensors = {suffix: source.tensor(f"{name}.{suffix}") for suffix in spec.tensors()}
        np.testing.assert_array_equal(stored.floats() * kept, unpack_linear(spec, tensors))


@pytest.mark.parametrize("layout", ModelLayout)
@pytest.mark.parametrize("sparse", [False, True])
def test_other_layouts(layout: str, sparse: bool, tmp_path: Path) -> None:
    """Sparse and input-major ones take wider lanes; scales of a byte become floats where there is no kernel."""
    found = schemes(WIDTHS[0], group_size=32, symmetric=False, scale_bits=8)
    for role in ("qkv", "gate_up", "o", "down"):
        found[role] |= {"sparse": sparse}
    agrees(tmp_path / "m", write_model(tmp_path / "m", found), layout=layout)


@pytest.mark.parametrize("scale_bits", [8, 16])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_a_tied_table_is_one_and_exact(bits: int, scale_bits: int, tmp_path: Path) -> None:
    scheme = {"bits": bits, "group_size": 16, "symmetric": False, "scale_bits": scale_bits}
    dense = write_model(tmp_path / "m", {"embedding": scheme}, tie_word_embeddings=True)
    model = replace(decoder(tmp_path / "m", head="int8"), layers=[])  # the hidden states are the rows, normalised
    head = model.head.linears[0]
    assert isinstance(model.embedding, Linear) and model.exact_head is None
    assert np.shares_memory(model.embedding.values, head.values)
    assert (head.facts.scale_kind is ScaleKind.U8) == (scale_bits == 8)
    table = dense.get_input_embeddings().weight.detach().numpy()  # type: ignore[operator]
    ids = list(range(128))
    rows = [Runner(one, slots=1, pages=8, context=128, batch=128).embed(ids)
            for one in (model, replace(model, embedding=Table(WeightKind.F32, table.reshape(-1).copy())))]  # fmt: skip
    np.testing.assert_array_equal(*rows)
    agrees(tmp_path / "m", dense)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bits", [3, 4, 6])
def test_which_head_is_run(bits: int, tied: bool, tmp_path: Path) -> None:
    """The codes that are stored, whatever is asked for; int4 of wider ones is a copy beside them."""
    scheme = {"bits": bits, "group_size": 16, "scale_bits": 8}
    dense = write_model(
        tmp_path / "m", {"embedding": scheme} | ({} if tied else {"head": scheme}), tie_word_embeddings=tied
    )
    name = "model.embed_tokens" if tied else "lm_head"
    stored = Source(tmp_path / "m").coded(f"{name}.weight", (128, 64))
    assert stored is not None
    np.testing.assert_array_equal(stored.floats(), dense.lm_head.weight.detach().numpy())  # type: ignore[union-attr]
    for head in ("int8", "bf16", "as stored", "int4"):
        model = decoder(tmp_path / "m", head=head)
        rough = head == "int4" and bits > 4
        facts = model.head.linears[0].facts
        assert (facts.scale_kind is ScaleKind.BF16) == rough and (model.exact_head is not None) == rough
        agrees_best(Runner(model), dense)


def agrees_best(runner: Runner, model: torch.nn.Module) -> None:
    """On the logits that a token is chosen from."""
    ids = list(range(5, 20))
    with torch.inference_mode():
        expected = model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
    best = np.argsort(expected, axis=1)[:, -16:]
    found = np.take_along_axis(runner.forward(ids), best, axis=1)
    assert np.abs(found - np.take_along_axis(expected, best, axis=1)).max() < CLOSE * np.abs(expected).max()


def test_a_damaged_table_is_refused(tmp_path: Path) -> None:
    """Sizes of the native engine's tables are checked before a row is read."""
    write_model(tmp_path / "m", {"embedding": {"bits": 3, "group_size": 32, "scale_bits": 8}}, tie_word_embeddings=True)
    model = decoder(tmp_path / "m")
    table = model.embedding
    assert isinstance(table, Linear) and table.row_scales is not None
    changes: list[tuple[dict[str, Any], str]] = [
        ({"values": table.values[:-1]}, "bytes of the weights"),
        ({"row_scales": None}, "scales of rows"),
        ({"row_scales": table.row_scales[:-1]}, "scales of rows"),
        ({"scales": None}, "scales"),
        ({"facts": replace(table.facts, rows=127)}, "rows of a table"),
        ({"facts": replace(table.facts, columns=63)}, "columns of a table"),
        ({"facts": replace(table.facts, segment=16)}, "whole groups"),
        ({"facts": replace(table.facts, kind=WeightKind.BF16)}, "expected"),
    ]
    for change, message in changes:
        with pytest.raises(ValueError, match=message):
            Runner(replace(model, embedding=replace(table, **change)))


def test_unpack_linear_is_what_the_rows_are(tmp_path: Path) -> None:
    """The reference itself: the packed tensors, unpacked by the format's own code."""
    write_model(tmp_path / "m", {"head": {"bits": 5, "group_size": 32, "symmetric": False, "scale_bits": 8}})
    source = Source(tmp_path / "m")
    spec = source.specs["lm_head"]
    tensors = {suffix: source.tensor(f"lm_head.{suffix}") for suffix in spec.tensors()}
    stored = source.coded("lm_head.weight", (128, 64))
    assert stored is not None
    np.testing.assert_array_equal(stored.floats(), unpack_linear(spec, tensors))

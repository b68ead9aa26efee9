"""Decoders with recurrent states: heads of any size, packed ones, and states that are shared, dropped, limited."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from isas import logits_by_isa
from test_families import TEXT, TOKENS, difference, wanted

from family_folders import write_family
from tulle.compression.job import compress
from tulle.engine import Engine, Request
from tulle.errors import UserError

FAMILY = "qwen3_5_text"
# Channels of several vectors and a part of one.
ATTENTION = {"hidden_size": 88, "num_attention_heads": 2, "num_key_value_heads": 1}
WIDE: dict[str, dict[str, Any]] = {
    # Three value heads to a key head.
    FAMILY: {
        "linear_key_head_dim": 24, "linear_value_head_dim": 88, "linear_num_key_heads": 2, "linear_num_value_heads": 6,
    },
    "lfm2": ATTENTION,
    "granitemoehybrid": ATTENTION | {
        "num_local_experts": 0, "mamba_expand": 2, "mamba_n_heads": 2, "mamba_d_head": 88, "mamba_d_state": 24,
        "mamba_n_groups": 2,
    },
    # Every order of layers that are a mixer or a feed-forward alone.
    "nemotron_h": ATTENTION | {
        "hybrid_override_pattern": "-M*M--*M", "mamba_num_heads": 4, "mamba_head_dim": 24, "ssm_state_size": 20,
    },
}  # fmt: skip
OTHERS = [family for family in WIDE if family != FAMILY]
STEPS: list[dict[str, Any]] = [
    {"sparsegpt": {"sparsity": 0.5}}, {"gptq": {"bits": 4, "group_size": "auto-32"}},
]  # fmt: skip
PROMPT = list(b"A prompt that others begin with, too.")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("hybrid")
    return {
        family: write_family(parent / family, family, 2, max_position_embeddings=192, **changes)
        for family, changes in WIDE.items()
    }


@pytest.fixture(scope="module")
def folder(folders: dict[str, Path]) -> Path:
    return folders[FAMILY]


@pytest.mark.parametrize("family", WIDE)
@pytest.mark.parametrize("threads", [1, 3])
def test_wide_heads(folders: dict[str, Path], family: str, threads: int) -> None:
    folder = folders[family]
    expected = wanted(folder, TOKENS)
    engine = Engine(folder, threads, sequences=2, cache="f32", head="as stored")
    assert difference(engine.forward(TOKENS), expected) <= 5e-5
    # Two sequences token by token, in one pass, one of them a step behind.
    rows = [engine.forward([token], 1, place) for place, token in enumerate(TOKENS[:1])]
    for place, token in enumerate(TOKENS[1:], 1):
        found = engine.forward([token, TOKENS[place - 1]], [1, 0], [place, place - 1])
        rows.append(found[:1])
        assert np.array_equal(found[1], rows[place - 1][0])
    assert difference(np.concatenate(rows), expected) <= 5e-5


def test_instruction_sets_agree(folders: dict[str, Path], tmp_path: Path) -> None:
    """Of every family; all in one process per set."""
    parts = "[Engine(f, 1, cache='f32', head='as stored').forward({}) for f in {}]"
    paths = [str(folders[family]) for family in WIDE]
    first, *others = logits_by_isa(folders[FAMILY], tmp_path, f"np.stack({parts.format(TOKENS, paths)})")
    for other in others:
        assert all(difference(found, wanted) < 1e-5 for found, wanted in zip(other, first, strict=True))


LAYOUTS = [(FAMILY, layout) for layout in ("auto", "sparse", "dense", "input-major")]
LAYOUTS += [(family, layout) for family in OTHERS for layout in ("sparse", "input-major")]


@pytest.mark.parametrize(("family", "layout"), LAYOUTS)
def test_packed(folders: dict[str, Path], family: str, layout: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    output = tmp_path_factory.getbasetemp() / f"packed-{family}"
    if not output.exists():
        recipe = {"calibration": {"samples": 2, "length": 24}, "steps": STEPS}
        compress(folders[family], recipe, output, calibration=TEXT)
    expected = wanted(output, TOKENS, packed=True)
    found = Engine(output, threads=2, cache="f32", head="as stored", layout=layout).forward(TOKENS)
    assert difference(found, expected) <= 5e-3  # inputs are rounded to 16 bits


def said(engine: Engine, *prompts: list[int], count: int = 24) -> list[tuple[list[int], list[Any], int]]:
    """Tokens, their log-probabilities and how much of the prompt was known, of requests that run together."""
    found: dict[int, list[Any]] = {}
    sequences = [engine.scheduler.add(Request(p, count, logprobs=4, ignore_end=True)) for p in prompts]
    while not engine.scheduler.idle:
        for event in engine.scheduler.step():
            found.setdefault(event.sequence.number, []).append(event.logprobs)
    return [(s.tokens, found[s.number], s.cached_tokens) for s in sequences]


Alone = Callable[[list[int]], tuple[list[int], list[Any]]]


@pytest.fixture(scope="module")
def alone(folder: Path) -> Alone:
    """What a prompt gets of an engine that knows nothing."""
    known: dict[tuple[int, ...], tuple[list[int], list[Any]]] = {}

    def answer(prompt: list[int]) -> tuple[list[int], list[Any]]:
        if tuple(prompt) not in known:
            known[tuple(prompt)] = said(Engine(folder, 1, cache="f32"), prompt)[0][:2]
        return known[tuple(prompt)]

    return answer


def test_what_others_computed_changes_no_bit(folder: Path, alone: Alone) -> None:
    """One after the other, together, as a conversation goes on, and after some that were cancelled."""
    engine = Engine(folder, 1, sequences=3, cache="f32")
    first, second, third = ([*PROMPT, *end] for end in (b"One?", b"Two, or more of them?", b"3"))
    assert said(engine, first)[0] == (*alone(first), 0)
    again = said(engine, first, second, third)
    for (tokens, logprobs, known), prompt in zip(again, (first, second, third), strict=True):
        assert (tokens, logprobs) == alone(prompt)
        assert known == len(PROMPT) // 16 * 16
    turn = [*second, *again[1][0], *b" And then?"]
    (tokens, logprobs, known), *_ = said(engine, turn)
    assert (tokens, logprobs) == alone(turn) and known == (len(second) + 23) // 16 * 16
    sequences = [engine.scheduler.add(Request([*b"x", *p], 40, ignore_end=True)) for p in (first, second, third)]
    for _ in range(5):
        engine.scheduler.step()
    for sequence in sequences:
        engine.scheduler.cancel(sequence)
    assert [one[:2] for one in said(engine, third, turn)] == [alone(third), alone(turn)]


@pytest.mark.parametrize("family", OTHERS)
def test_a_snapshot_changes_no_bit(folders: dict[str, Path], family: str) -> None:
    """Of what others computed, and of prompts that run together."""
    prompts = [[*PROMPT, *end] for end in (b"One?", b"Two, or more of them?")]
    alone = [said(Engine(folders[family], 1, cache="f32"), prompt)[0][:2] for prompt in prompts]
    engine = Engine(folders[family], 1, sequences=2, cache="f32")
    assert said(engine, prompts[0])[0] == (*alone[0], 0)
    for (tokens, logprobs, known), expected in zip(said(engine, *prompts), alone, strict=True):
        assert (tokens, logprobs) == expected and known == len(PROMPT) // 16 * 16


def test_memory_counts_states(folder: Path, alone: Alone) -> None:
    plain = Engine(folder, 1, cache="f32", context=192)
    state, page = plain._native.state_bytes, plain._native.page_bytes
    assert state > page > 0 and plain.cache_bytes >= 12 * page + state * (1 + plain._kv.snapshots)
    assert state > 4 * page  # so that pages for one prompt leave no room for a snapshot
    for snapshots, memory in ((0, 8 * page), (3, 7 * state)):
        engine = Engine(folder, 1, sequences=2, cache="f32", cache_memory=2 * state + memory)
        assert engine.cache_bytes <= 2 * state + memory + 4096  # buffers begin at whole cache lines
        assert engine._kv.snapshots == snapshots
        engine.reserve_cache()
        for end in (b"One?", b"Two, or more of them?", b"One?"):
            found = said(engine, [*PROMPT, *end])[0]
            assert found[:2] == alone([*PROMPT, *end])
        assert (found[2] > 0) == (snapshots > 0)
    with pytest.raises(UserError, match=f"{page} bytes of keys and values beside 2 recurrent states of {state}"):
        Engine(folder, 1, sequences=2, cache="f32", cache_memory=2 * state)


def test_a_sequence_goes_on_where_it_is(folder: Path) -> None:
    engine = Engine(folder, 1, cache="f32")
    engine.forward(TOKENS)
    for place in (3, len(TOKENS) - 1, len(TOKENS) + 1):
        with pytest.raises(UserError, match=f"expected {len(TOKENS)} or a start at 0, found {place}"):
            engine.forward([1], 0, place)
    assert np.array_equal(engine.forward([7], 0, len(TOKENS)), Engine(folder, 1).forward([*TOKENS, 7])[-1:])


def test_a_model_without_attention_is_refused(tmp_path: Path) -> None:
    write_family(tmp_path / "m", FAMILY, 2, layer_types=["linear_attention"] * 2)
    with pytest.raises(UserError, match="with attention in one layer at least"):
        Engine(tmp_path / "m", 1)

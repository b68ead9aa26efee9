"""Configs that contradict themselves or the tensors beside them: every command does what transformers does, or refuses.

Three readers see each folder: the plain decoder, by which ``compress`` reads a model; the engine; transformers through
our loader, by which ``eval`` and training do. transformers alone is the oracle.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

import tulle
from checkpoints import PROSE, write_tokenizer
from random_decoders import FAMILIES, random_config
from tulle.engine import Engine
from tulle.errors import UserError
from tulle.hf import load_checkpoint
from tulle.models.checkpoint import Checkpoint
from tulle.models.decoder import PlainDecoder
from tulle.models.rewrite import DenseModel

TOKENS = torch.randint(0, 40, (1, 20), generator=torch.Generator().manual_seed(0))
FOR_ENGINE = {"hidden_act": "silu", "max_position_embeddings": 64}
"""What the engine runs: its contexts end where the config says."""
ENGINE: dict[str, Any] = {"threads": 1, "head": "as stored", "cache": "f32"}
Change = Callable[[dict[str, Any], dict[str, torch.Tensor], random.Random], None]


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    """One thread (models this small are slower with more), and none of transformers' bars and warnings."""
    before, bars = torch.get_num_threads(), logging.is_progress_bar_enabled()
    level = logging.get_verbosity()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    yield
    torch.set_num_threads(before)
    logging.set_verbosity(level)
    if bars:
        logging.enable_progress_bar()


def weights_of(config: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Random tensors of a model, as transformers names them, of a tied one the embedding alone."""
    found = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(found)
    draw = torch.Generator().manual_seed(seed)
    state = {}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=draw)
        state[name] = 1 + 0.3 * noise if "norm" in name else noise * 1.5 / parameter.shape[-1] ** 0.5
    return state


def write(folder: Path, config: dict[str, Any], state: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({k: v.clone() for k, v in state.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def by_transformers(folder: Path) -> np.ndarray | None:
    """Logits; None where it cannot load the folder, or makes up weights."""
    try:
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        with torch.no_grad():
            return None if info["missing_keys"] else model.eval()(TOKENS).logits[0].numpy()
    except Exception:
        return None


def by_compress(folder: Path) -> np.ndarray:
    dense = DenseModel.open(folder)
    outer = {dense.description.embedding: dense.embedding(), **dense.closing()}
    return PlainDecoder(dense.description, dense.read_block, outer)(TOKENS)[0].numpy()


def by_eval(folder: Path) -> np.ndarray:
    with torch.no_grad():
        return load_checkpoint(Checkpoint.open(folder), torch.float32).eval()(TOKENS).logits[0].numpy()


def by_engine(folder: Path) -> np.ndarray:
    return Engine(folder, **ENGINE).forward(TOKENS[0].tolist())


READERS = {"compress": by_compress, "eval": by_eval, "engine": by_engine}


def compared(folder: Path) -> str:
    """What became of a folder: every reader agrees with transformers or refuses; a refusal of compress is one of eval.

    Returns "refused", "ran" or "ran but in the engine".
    """
    wanted = by_transformers(folder)
    outcome = {}
    for reader, logits in READERS.items():
        try:
            found = logits(folder)
        except UserError as error:
            assert "\n" not in str(error)
            outcome[reader] = "refused"
            continue
        assert wanted is not None, f"{reader} runs what transformers refuses or makes up"
        # Written so that NaN fails.
        assert np.abs(found - wanted).max() <= 2e-4 * max(1, np.abs(wanted).max()), reader
        outcome[reader] = "ran"
    assert outcome["compress"] == outcome["eval"]
    if outcome["compress"] == "refused":
        assert outcome["engine"] == "refused"
    return "ran but in the engine" if len(set(outcome.values())) > 1 else outcome["engine"]


def set_keys(**values: Any) -> Change:
    return lambda config, state, draw: config.update(copy.deepcopy(values))


def drop(*keys: str) -> Change:
    def change(config: dict[str, Any], state: dict[str, torch.Tensor], draw: random.Random) -> None:
        for key in keys:
            config.pop(key, None)

    return change


def second_table(equal: bool) -> Change:
    def change(config: dict[str, Any], state: dict[str, torch.Tensor], draw: random.Random) -> None:
        table = state["model.embed_tokens.weight"]
        state["lm_head.weight"] = table.clone() if equal else table.flip(0)
        config["tie_word_embeddings"] = True

    return change


def only_head(tied: bool | None) -> Change:
    def change(config: dict[str, Any], state: dict[str, torch.Tensor], draw: random.Random) -> None:
        state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
        config["tie_word_embeddings"] = tied

    return change


def only_embedding(tied: bool | None) -> Change:
    def change(config: dict[str, Any], state: dict[str, torch.Tensor], draw: random.Random) -> None:
        state.pop("lm_head.weight", None)
        config["tie_word_embeddings"] = tied
        if tied is None:
            del config["tie_word_embeddings"]

    return change


def stored_biases(*linears: str) -> Change:
    def change(config: dict[str, Any], state: dict[str, torch.Tensor], draw: random.Random) -> None:
        for name in [n for n in state if n.endswith(tuple(f"{linear}.weight" for linear in linears))]:
            state[name.removesuffix("weight") + "bias"] = torch.ones(len(state[name]))

    return change


def without_biases(config: dict[str, Any], state: dict[str, torch.Tensor], draw: random.Random) -> None:
    for name in [n for n in state if n.endswith("bias")]:
        del state[name]


def extra(name: str, tensor: torch.Tensor) -> Change:
    return lambda config, state, draw: state.update({name: tensor})


def rotary(**values: Any) -> Change:
    """Keys of the rotary table alone, every other removed."""

    def change(config: dict[str, Any], state: dict[str, torch.Tensor], draw: random.Random) -> None:
        for key in ("rope_theta", "rope_scaling", "rope_parameters"):
            config.pop(key, None)
        config.update(copy.deepcopy(values))

    return change


LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
HAND_MADE: dict[str, Change] = {
    "nothing": set_keys(),
    "tied, two tables": second_table(False),
    "tied, one table twice": second_table(True),
    "tied, the head alone": only_head(True),
    "untied, the head alone": only_head(False),
    "untied, the embedding alone": only_embedding(False),
    "tied, the embedding alone": only_embedding(True),
    "tied unsaid, the embedding alone": only_embedding(None),
    "tied null": set_keys(tie_word_embeddings=None),
    "biases of q, k, v stored": stored_biases("q_proj", "k_proj", "v_proj"),
    "bias of o stored": stored_biases("o_proj"),
    "biases of the MLP stored": stored_biases("gate_proj", "up_proj", "down_proj"),
    "bias of the head stored": stored_biases("lm_head"),
    "bias of norms stored": stored_biases("layernorm", "norm"),
    "biases not stored": without_biases,
    "quantization_config null": set_keys(quantization_config=None),
    "rotary keys missing": rotary(),
    "rotary keys null": rotary(rope_theta=None, rope_scaling=None, rope_parameters=None),
    "theta null inside": rotary(rope_parameters={"rope_type": "default", "rope_theta": None}),
    "theta inside and beside": rotary(rope_parameters={"rope_type": "default", "rope_theta": 50.0}, rope_theta=9e3),
    "theta beside alone": rotary(rope_theta=77.0),
    "theta beside an empty table": rotary(rope_theta=77.0, rope_parameters={}),
    "theta as text": rotary(rope_theta="10000"),
    "old beside new": rotary(rope_scaling=LINEAR, rope_parameters={"rope_type": "default", "rope_theta": 50.0}),
    "old null beside new": rotary(rope_scaling=None, rope_parameters=LINEAR | {"rope_theta": 50.0}),
    "old empty beside new": rotary(rope_scaling={}, rope_parameters=LINEAR | {"rope_theta": 50.0}),
    "old default beside new": rotary(rope_scaling={"type": "default"}, rope_parameters=LINEAR),
    "old beside new null": rotary(rope_scaling=LINEAR, rope_parameters=None, rope_theta=300.0),
    "type null": rotary(rope_parameters={"rope_type": None, "rope_theta": 50.0}),
    "type unknown": rotary(rope_parameters={"rope_type": "spiral", "rope_theta": 50.0}),
    "type missing": rotary(rope_parameters={"factor": 4.0}),
    "factor null": rotary(rope_scaling={"rope_type": "linear", "factor": None}),
    "factor below 1": rotary(rope_scaling={"rope_type": "linear", "factor": 0.5}),
    "factor whole": rotary(rope_scaling={"rope_type": "linear", "factor": 4}),
    "yarn": rotary(rope_scaling=YARN),
    "yarn, original beside": lambda c, s, d: (
        rotary(rope_scaling=YARN)(c, s, d),
        set_keys(original_max_position_embeddings=16)(c, s, d),
    )[0],
    "yarn, factor null": rotary(rope_scaling=YARN | {"factor": None}),
    "yarn, factor missing": rotary(rope_scaling={"rope_type": "yarn", "original_max_position_embeddings": 8}),
    "yarn, original null": rotary(rope_scaling=YARN | {"original_max_position_embeddings": None}),
    "window missing": drop("sliding_window"),
    "window null": set_keys(sliding_window=None),
    "window 0": set_keys(sliding_window=0),
    "window 3": set_keys(sliding_window=3),
    "windows used, max_window_layers missing": lambda c, s, d: (
        c.update(use_sliding_window=True, sliding_window=3),
        drop("max_window_layers", "layer_types")(c, s, d),
    )[1],
    "windows used, size missing": lambda c, s, d: (
        c.update(use_sliding_window=True, max_window_layers=0),
        drop("sliding_window", "layer_types")(c, s, d),
    )[1],
    "windows used, size null": set_keys(use_sliding_window=True, sliding_window=None, max_window_layers=0),
    "windows used from layer -1": set_keys(use_sliding_window=True, sliding_window=3, max_window_layers=-1),
    "windows used from layer null": set_keys(use_sliding_window=True, sliding_window=3, max_window_layers=None),
    "windows unused, types say so": set_keys(use_sliding_window=False, layer_types=["sliding_attention"] * 2),
    "use_sliding_window missing": lambda c, s, d: (
        c.update(sliding_window=2, max_window_layers=0),
        drop("use_sliding_window", "layer_types")(c, s, d),
    )[1],
    "layer types null": set_keys(layer_types=None),
    "head_dim null": set_keys(head_dim=None),
    "head_dim missing": drop("head_dim"),
    "head_dim other": set_keys(head_dim=10),
    "kv heads missing": drop("num_key_value_heads"),
    "kv heads null": set_keys(num_key_value_heads=None),
    "eps missing": drop("rms_norm_eps"),
    "eps null": set_keys(rms_norm_eps=None),
    "activation missing": drop("hidden_act"),
    "activation null": set_keys(hidden_act=None),
    "context missing": drop("max_position_embeddings"),
    "context null": set_keys(max_position_embeddings=None),
    "vocabulary larger": set_keys(vocab_size=48),
    "vocabulary missing": drop("vocab_size"),
    "fewer layers than stored": set_keys(num_hidden_layers=1),
    "more layers than stored": set_keys(num_hidden_layers=9),
    "attention_bias null": set_keys(attention_bias=None),
    "partial rotary": set_keys(partial_rotary_factor=0.5),
    "partial rotary null": set_keys(partial_rotary_factor=None),
    "a mask of old": extra("model.layers.0.self_attn.bias", torch.ones(1, 1, 4, 4, dtype=torch.bool)),
    "inverse frequencies of old": extra("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4)),
    "dtype said twice": set_keys(dtype="float16", torch_dtype="bfloat16"),
}

MILD = (
    "tied, two tables", "tied, one table twice", "biases of q, k, v stored", "bias of o stored",
    "bias of the head stored",
    "biases of the MLP stored", "bias of norms stored", "quantization_config null", "rotary keys missing",
    "theta inside and beside", "theta beside alone", "theta beside an empty table", "old beside new",
    "old null beside new", "old empty beside new", "old default beside new", "old beside new null", "factor below 1",
    "factor whole", "yarn", "yarn, original beside", "yarn, factor null", "eps missing", "activation missing",
    "fewer layers than stored", "a mask of old", "inverse frequencies of old", "dtype said twice",
)  # fmt: skip
"""Changes that leave every family a model."""


@pytest.mark.parametrize("family", FAMILIES)
def test_hand_made(family: str, tmp_path: Path) -> None:
    base = random_config(family, 0) | {"num_hidden_layers": 2} | FOR_ENGINE
    base.pop("layer_types", None)
    outcomes = {}
    for tied in (False, True):
        start = base | {"tie_word_embeddings": tied}
        weights = weights_of(start, 1)
        for number, (name, change) in enumerate(HAND_MADE.items()):
            if tied and number % 3:
                continue  # a third of them is enough to meet ties
            config, state = copy.deepcopy(start), dict(weights)
            change(config, state, random.Random(number))
            try:
                outcomes[name, tied] = compared(write(tmp_path / f"{number} {tied}", config, state))
            except AssertionError as error:
                raise AssertionError(f"{name}, tied {tied}: {error}") from None
    ran = [name for (name, _), outcome in outcomes.items() if outcome != "refused"]
    assert {"nothing", "tied, two tables", "a mask of old", "quantization_config null"} <= set(ran)
    assert outcomes["untied, the embedding alone", False] == outcomes["context null", False] == "refused"
    assert list(outcomes.values()).count("ran") > 40


@pytest.mark.parametrize("family", FAMILIES)
def test_random(family: str, tmp_path: Path) -> None:
    """Random configs, each with three hand-made changes on top."""
    outcomes = []
    for seed in range(20):
        draw = random.Random(f"{family} {seed}")
        config = random_config(family, seed) | FOR_ENGINE
        state = weights_of(config, seed)
        names = draw.sample(MILD, 3)
        for name in names:
            HAND_MADE[name](config, state, draw)
        try:
            outcomes.append(compared(write(tmp_path / str(seed), config, state)))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, {names}: {error}") from None
    assert outcomes.count("ran") > 12


@pytest.mark.parametrize("change", ["tied, two tables", "biases of q, k, v stored", "quantization_config null"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_compressed_to_8_bits(family: str, change: str, tmp_path: Path) -> None:
    """The compressed folder computes what the dense one does, up to the rounding, in transformers and the engine."""
    config = random_config(family, 0) | FOR_ENGINE | {"vocab_size": 257, "tie_word_embeddings": False}
    config |= {"attention_bias": False, "mlp_bias": False} if family == "llama" else {}
    state = weights_of(config, 2)
    HAND_MADE[change](config, state, random.Random(0))
    folder = write(tmp_path / "m", config, state)
    write_tokenizer(folder)
    (tmp_path / "prose.txt").write_text(PROSE[:4000])
    recipe = {"name": "cheap", "steps": [{"round_to_nearest": {"bits": 8}}]}
    text = [tmp_path / "prose.txt"]
    report = tulle.compress(folder, recipe, tmp_path / "out", calibration=text, samples=1, length=8)
    wanted = by_transformers(folder)
    assert wanted is not None
    with torch.no_grad():
        found = tulle.load(tmp_path / "out", dtype=torch.float32)(TOKENS).logits[0].numpy()
    assert np.abs(found - wanted).max() < 0.1 * np.abs(wanted).max()
    assert np.abs(by_engine(tmp_path / "out") - found).max() < 1e-3 * np.abs(found).max()
    assert any("ties the head" in note for note in report["notes"]) == (change == "tied, two tables")

"""Gemma 4 beyond what all families are tested for: shared keys and values, inputs by layer, what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, Gemma4Config
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import tulle
from family_folders import write_family
from random_decoders import largest_difference, plain_model, reference_model, text
from random_families import family_config, saved_model
from tulle.compression import walker
from tulle.compression.job import compress
from tulle.engine import Engine
from tulle.errors import UserError
from tulle.hf.packed_decoder import PackedDecoder
from tulle.models.checkpoint import Checkpoint
from tulle.models.decoder import PlainDecoder, final_norm, logits
from tulle.models.description import describe
from tulle.models.rewrite import DenseModel
from tulle.models.source import open_source
from tulle.text.reading import Text

pytestmark = pytest.mark.usefixtures("one_thread", "no_pages")

SHARING = 2
"""A seed whose layers share keys and values and have inputs of their own."""
CONFIG = family_config("gemma4_text", SHARING)
EXPERTS = {"enable_moe_block": True, "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 20}
EXPERTS |= {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
TEXT = Text(("The quick brown fox jumps over the lazy dog. " * 20,), False, ("prose",))
RECIPE = {
    "calibration": {"samples": 2, "length": 24},
    "steps": [
        {"permute_channels": {"pattern": "2:4", "effort": 0.01}},
        {"round_to_nearest": {"bits": 4, "targets": ["qkv", "down"]}},
    ],
}


@torch.no_grad()
def test_token_by_token_as_all_at_once() -> None:
    """transformers' cache, past the window, gives the plain decoder's logits."""
    assert CONFIG["num_kv_shared_layers"] and CONFIG["sliding_window"] < 10
    model = reference_model(CONFIG, 0)
    tokens, cache, rows = text(0)[0], None, []
    for place in range(tokens.shape[1]):
        found = model(tokens[:, place : place + 1], past_key_values=cache, use_cache=True)
        cache = found.past_key_values
        rows.append(found.logits)
    assert largest_difference(torch.cat(rows, 1), plain_model(CONFIG, model)(tokens)) <= 1e-5


def test_state_between_blocks() -> None:
    """Keys and values stand beside the stream from the block that makes them to the last one that reads them."""
    decoder = describe(CONFIG)
    full, slides = decoder.layers[0].attention, decoder.layers[1].attention
    assert [layer.attention.kv_from for layer in decoder.layers] == [None, None, 1, 0]
    both = sum(full.widths[1:]), sum(slides.widths[1:])
    beside = [decoder.state_width(index) - decoder.hidden for index in range(5)]
    assert beside == [0, both[0], sum(both), both[0], 0]


def test_sizes_as_transformers_writes_them() -> None:
    """``per_layer_config`` in the place of ``global_head_dim`` and ``num_global_key_value_heads``."""
    for seed in range(4):
        config = family_config("gemma4_text", seed)
        written = CONFIG_MAPPING["gemma4_text"].from_dict(copy.deepcopy(config)).to_dict()
        assert "per_layer_config" in written and "global_head_dim" not in written
        assert describe(written) == describe(config)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"enable_moe_block": True}, "0 beside experts (enable_moe_block) for hidden_size_per_layer_input"),
        ({**EXPERTS, "top_k_experts": None}, "a positive whole number for top_k_experts"),
        ({**EXPERTS, "top_k_experts": 7}, "a number up to that of experts (6) for top_k_experts"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
        ({"vocab_size_per_layer_input": 39}, "at least vocab_size (40) for vocab_size_per_layer_input"),
        ({"num_kv_shared_layers": 3}, "layers of every kind before those that share for num_kv_shared_layers"),
        ({"num_kv_shared_layers": 4}, "a number from 0 to 3"),
        ({"per_layer_config": {"0": {"hidden_size": 8}}}, "sizes (head_dim, num_key_value_heads)"),
        ({"per_layer_config": {"0": {"head_dim": 32}}}, "one head_dim and num_key_value_heads for every full"),
        ({"rope_parameters": {"full_attention": {}}}, "rope_theta"),
    ],
)
def test_refused_by_name(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as error:
        describe(CONFIG | change)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_a_stopped_run_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared keys and values, and what inputs by layer are made of, survive; parked in files they are the same."""
    folder = write_family(tmp_path / "model", "gemma4_text", SHARING)
    compress(folder, RECIPE, tmp_path / "whole", calibration=TEXT)

    def stop(stage: str, done: int, total: int) -> None:
        if stage.startswith("block 4/4"):
            raise KeyboardInterrupt

    monkeypatch.setattr(walker, "PARKED_SHARE", 0)
    with pytest.raises(KeyboardInterrupt):
        compress(folder, RECIPE, tmp_path / "stopped", calibration=TEXT, progress=stop)
    report = compress(folder, RECIPE, tmp_path / "stopped", calibration=TEXT, resume=True)
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "stopped" / file.name).read_bytes()
    assert any("left as stored: model.embed_tokens_per_layer.weight" in note for note in report["notes"])


@pytest.mark.parametrize("group_size", [8, 16])
def test_the_table_of_inputs_in_codes(group_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what rounding a layer's part gives; groups that do not fit into one leave it as it is. Stopped, the run
    goes on with it."""
    folder = write_family(tmp_path / "model", "gemma4_text", SHARING)
    assert CONFIG["hidden_size_per_layer_input"] == 8
    step = {"bits": 4, "group_size": group_size, "targets": ["embedding"]}
    recipe = RECIPE | {"steps": [{"round_to_nearest": step}]}
    compress(folder, recipe, tmp_path / "whole", calibration=TEXT)
    name = "model.embed_tokens_per_layer.weight"
    dense, packed = Checkpoint.open(folder), Checkpoint.open(tmp_path / "whole")
    table, rows = dense.read(name).float(), torch.tensor([3, 5, 250])
    found = packed.read_part(name, rows, slice(8, 24))
    if group_size == 16:
        assert name in packed and torch.equal(found, table[rows, 8:24])
        return
    parts = table[rows, 8:24].unflatten(-1, (2, 8))
    scale = (parts.abs().amax(-1, keepdim=True) / 7).bfloat16().float()
    wanted = ((parts / scale).round().clamp(-7, 7) * scale).flatten(1)
    assert name not in packed and float((found - wanted).abs().max()) < 1e-6

    def stop(stage: str, done: int, total: int) -> None:
        if stage.startswith("block 2/4"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(folder, recipe, tmp_path / "stopped", calibration=TEXT, progress=stop)
    report = compress(folder, recipe, tmp_path / "stopped", calibration=TEXT, resume=True)
    assert report["reload"]["difference"] < 1e-5
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "stopped" / file.name).read_bytes()


@torch.no_grad()
def test_experts_beside_a_dense_feed_forward(tmp_path: Path) -> None:
    for seed in range(4):
        config = family_config("gemma4_text", seed) | EXPERTS
        model = reference_model(config, seed)
        tokens, valid = text(seed)
        wanted = model(tokens, attention_mask=valid.long()).logits[valid]
        folder = tmp_path / str(seed)
        assert largest_difference(wanted, saved_model(model, folder)(tokens)[valid]) <= 1e-5, config
        engine = Engine(folder, threads=2, cache="f32", head="as stored")
        row = tokens[0, valid[0]][: engine.context]
        found = torch.from_numpy(engine.forward(row.tolist()))
        assert largest_difference(wanted[: len(row)], found) <= 5e-5, config


@torch.no_grad()
@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_experts(bits: int, tmp_path: Path) -> None:
    """The folder means in transformers what it means when it is read again, and every linear but the router is in
    codes."""
    folder = write_family(tmp_path / "model", "gemma4_text", SHARING, **EXPERTS)
    steps: list[dict[str, Any]] = [{"gptq": {"bits": 4, "group_size": "auto-32"}}]
    if bits == 8:
        steps = [{"smoothquant": {}}, {"activations": {"bits": 8}}, {"round_to_nearest": {"bits": 8}}]
    report = compress(folder, {**RECIPE, "steps": steps}, tmp_path / "out", calibration=TEXT)
    assert {linear["bits"] for linear in report["linears"]} == {bits}
    assert sum(".experts." in linear["name"] for linear in report["linears"]) == 4 * 6 * 3
    tokens = text(0)[0]
    plain = PackedDecoder(Checkpoint.open(tmp_path / "out"))
    hidden = plain.embed(tokens)
    for index in range(4):
        (hidden,) = plain.block(index, [hidden], [tokens])
    found = logits(plain.decoder, final_norm(plain.decoder, hidden, plain.outer()), plain.head(0, 257))
    wanted = tulle.load(tmp_path / "out", dtype=torch.float32)(tokens).logits
    if bits == 4:
        assert report["reload"]["difference"] < 1e-5
        assert largest_difference(wanted, found) <= 1e-5
    else:  # a sum in another order moves some of the inputs by a step
        assert float((wanted - found).norm() / wanted.norm()) <= 0.02


def test_costs_of_tables_are_refused(tmp_path: Path) -> None:
    folder = write_family(tmp_path / "model", "gemma4_text", SHARING)
    targets = {"targets": ["qkv", "embedding"]}
    steps = [{"allocate_bits": {"bits": 5.0, "group_sizes": ["auto-32"], **targets}}, {"gptq": targets}]
    with pytest.raises(UserError, match="found inputs of single layers that are made of it in gemma4_text"):
        compress(folder, {**RECIPE, "steps": steps}, tmp_path / "out", calibration=TEXT)


def test_a_quantised_embedding_gives_the_inputs_too(tmp_path: Path) -> None:
    """Stream and inputs by layer come of the same codes when the folder is read again."""
    folder = write_family(tmp_path / "model", "gemma4_text", SHARING)
    steps = [{"round_to_nearest": {"bits": 4, "targets": ["down", "embedding"]}}]
    report = compress(folder, {**RECIPE, "steps": steps}, tmp_path / "out", calibration=TEXT)
    assert report["reload"]["difference"] < 1e-5
    assert [table["name"] for table in report["tables"]] == ["model.embed_tokens", "model.embed_tokens_per_layer"]
    assert {table["bits"] for table in report["tables"]} == {4}
    assert report["tables"][1]["group_size"] == CONFIG["hidden_size_per_layer_input"]  # a scale for every layer's part
    assert not any("embed_tokens_per_layer.weight" in note for note in report["notes"])


@torch.no_grad()
def test_the_text_part_of_a_checkpoint_that_sees(tmp_path: Path) -> None:
    torch.manual_seed(0)
    changes = {"vocab_size": 300, "max_position_embeddings": 64}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"num_key_value_heads": 2, "head_dim": 8, "patch_size": 4, "position_embedding_size": 16}
    config = Gemma4Config(text_config=CONFIG | changes, vision_config=vision, audio_config=None)
    model = AutoModelForImageTextToText.from_config(config).eval()
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    (note,) = open_source(tmp_path).notes
    assert note.startswith("gemma4: the text part is read; left out: ") and "vision_tower" in note
    dense, tokens = DenseModel.open(tmp_path), text(0)[0]
    outer = {"model.embed_tokens.weight": dense.embedding(), **dense.closing()}
    plain = PlainDecoder(dense.description, dense.read_block, outer, inputs=dense.token_inputs())
    assert largest_difference(model(tokens).logits, plain(tokens)) <= 1e-5
    engine = Engine(tmp_path, threads=1, cache="f32", head="as stored")
    found = torch.from_numpy(engine.forward(tokens[0].tolist()))
    assert largest_difference(model(tokens[:1]).logits[0], found) <= 5e-5
    assert Checkpoint.open(tmp_path).config["model_type"] == "gemma4_text"

"""One reader for every command: which tensors are the model, and what a folder of another kind is told."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from checkpoints import write_checkpoint, write_shards
from tulle.engine import Engine
from tulle.errors import UserError
from tulle.evaluate.loading import load_model
from tulle.export import export
from tulle.models import identity
from tulle.models.checkpoint import Checkpoint
from tulle.models.hub import local_folder
from tulle.models.source import INDEX, describe_source, open_source

TOKENS = [3, 100, 7, 250, 31, 31, 90]
OPTIONS: dict[str, Any] = {"threads": 1, "head": "as stored", "cache": "f32"}


def by_engine(folder: Path) -> np.ndarray:
    return Engine(folder, **OPTIONS).forward(TOKENS)


def by_eval(folder: Path) -> np.ndarray:
    with torch.no_grad():
        return load_model(folder)[0](torch.tensor([TOKENS])).logits[0].numpy()


def logits_of(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0].numpy()


def assert_computes(folder: Path, model: torch.nn.Module, tolerance: float = 1e-4) -> None:
    wanted = logits_of(model)
    for found in (by_engine(folder), by_eval(folder)):
        assert np.abs(found - wanted).max() < tolerance * np.abs(wanted).max()


def stray(folder: Path, what: str) -> None:
    """Puts files beside a model that are not it, or tensors into it that nothing reads."""
    state = {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}
    other = {k: torch.randn_like(v) for k, v in state.items()}
    if what == "an EMA copy":
        save_file(other, folder / "model_ema.safetensors")
    elif what == "Mistral's consolidated file":
        save_file({"tok_embeddings.weight": torch.ones(3, 3)} | other, folder / "consolidated.safetensors")
    elif what == "stale shards":
        save_file(other, folder / "model-00003-of-00009.safetensors")
    elif what == "a stale index beside a whole file":
        save_file(other, folder / "old.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(other, "old.safetensors")}))
    elif what == "buffers of old":
        state["model.layers.0.self_attn.masked_bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8, dtype=torch.float64)
        state["model.layers.0.code"] = torch.ones(8, 8).to(torch.float8_e5m2)
        state["model.layers.0.small"] = torch.ones(8, dtype=torch.int16)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    elif what == "float64":
        save_file({k: v.double() for k, v in state.items()}, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("what", "shards"),
    [
        ("an EMA copy", 1),
        ("an EMA copy", 3),
        ("Mistral's consolidated file", 3),
        ("stale shards", 3),
        ("a stale index beside a whole file", 1),
        ("buffers of old", 1),
        ("float64", 1),
    ],
)
def test_stray_tensors_change_nothing(what: str, shards: int, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "m", shards=shards)
    stray(tmp_path / "m", what)
    assert_computes(tmp_path / "m", model)


def test_a_dtype_that_is_not_known_matters_only_where_it_is_read(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "m")
    file = tmp_path / "m/model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, end = json.loads(data[8 : 8 + length]), len(data) - 8 - length
    header["spare"] = {"dtype": "F4", "shape": [16], "data_offsets": [end, end + 8]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :] + bytes(8))
    assert np.abs(by_engine(tmp_path / "m") - logits_of(model)).max() < 1e-4
    checkpoint = Checkpoint.open(tmp_path / "m")
    assert checkpoint.info("spare").name == "F4" and checkpoint.bytes == end
    with pytest.raises(UserError, match="found 'F4'"):
        checkpoint.source.read("spare")
    header["model.norm.weight"]["dtype"] = "F4"
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :] + bytes(8))
    with pytest.raises(UserError, match="in bf16, fp16, fp32 or fp64, found F4"):
        Engine(tmp_path / "m", **OPTIONS)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/outside.safetensors", "link.safetensors", "a/../../x"])
def test_an_index_that_leads_out_of_the_folder(name: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", shards=2)
    shutil.copyfile(tmp_path / "m/model-00001-of-00002.safetensors", tmp_path / "outside.safetensors")
    (tmp_path / "m/link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    index = json.loads((tmp_path / "m" / INDEX).read_text())
    for tensor, file in index["weight_map"].items():
        if file.startswith("model-00001"):
            index["weight_map"][tensor] = name
    (tmp_path / "m" / INDEX).write_text(json.dumps(index))
    for reader in (open_source, by_engine, by_eval):
        with pytest.raises(UserError, match="leads out of it"):
            reader(tmp_path / "m")


def test_links_inside_a_folder_and_to_a_folder(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "m", shards=2)
    (tmp_path / "m/model-00001-of-00002.safetensors").rename(tmp_path / "m/blob")
    (tmp_path / "m/model-00001-of-00002.safetensors").symlink_to("blob")
    (tmp_path / "link").symlink_to("m")
    assert_computes(tmp_path / "link", model)


@pytest.mark.parametrize("missing", ["weights", "a shard", "an index's shards"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_folder_in_the_hub_cache(missing: str, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are links to blobs; one without weights is not a model that is at hand."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / ("0" * 39 + "1")
    model = write_checkpoint(snapshot, shards=2, tie_word_embeddings=tied)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(snapshot.name)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(repository / "blobs" / str(number))
        file.symlink_to(f"../../blobs/{number}")
    assert local_folder("owner/name") == snapshot
    assert_computes(local_folder("owner/name"), model)
    if missing == "an index's shards":
        (snapshot / INDEX).unlink()
        (snapshot / INDEX).write_text("{}")
    else:
        for file in sorted(snapshot.glob("*.safetensors*"))[: 1 if missing == "a shard" else None]:
            file.unlink()
    with pytest.raises(
        UserError, match="the weights of 'owner/name'.* missing in the hub's cache.*HF_HUB_OFFLINE"
    ) as e:
        local_folder("owner/name")
    assert "\n" not in str(e.value)


def test_a_name_that_is_no_hub_id() -> None:
    with pytest.raises(UserError, match="expected a hub id"):
        local_folder("own er/na--..me")


def test_a_note_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_checkpoint(tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    by_engine(tmp_path / "m")
    by_eval(tmp_path / "m")
    assert [r.levelname for r in caplog.records if "note: m: config.json ties the head" in r.message] == ["WARNING"]


@pytest.mark.parametrize("tied", [False, True])
def test_a_base_models_save(tied: bool, tmp_path: Path) -> None:
    """AutoModel.save_pretrained: no prefix, and no head, so that only a tied model is whole."""
    model = write_checkpoint(tmp_path / "m", tie_word_embeddings=tied)
    AutoModelForCausalLM.from_pretrained(tmp_path / "m").model.save_pretrained(tmp_path / "base")
    for file in (tmp_path / "m").glob("tokenizer*"):
        shutil.copyfile(file, tmp_path / "base" / file.name)
    if tied:
        assert_computes(tmp_path / "base", model)
        report = export(tmp_path / "base", "dense", tmp_path / "dense")
        assert report["difference"] == 0 and open_source(tmp_path / "dense").plain
        return
    for reader in (by_engine, by_eval):
        with pytest.raises(UserError, match="expected tensor lm_head.weight"):
            reader(tmp_path / "base")


def lora(path: Path, model: torch.nn.Module, **settings: Any) -> dict[str, torch.Tensor]:
    """An adapter of random numbers for q and down of every layer; the tensors of the merged model."""
    path.mkdir()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    draw, stored = torch.Generator().manual_seed(0), {}
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 6,
        "use_rslora": False,
        "target_modules": ["q_proj"],
    } | settings
    for name in [n for n in state if n.endswith(("q_proj.weight", "down_proj.weight"))]:
        module = name.removesuffix(".weight")
        outputs, inputs = state[name].shape
        a, b = torch.randn(4, inputs, generator=draw), torch.randn(outputs, 4, generator=draw)
        stored |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
        alpha = next(
            (v for k, v in config.get("alpha_pattern", {}).items() if module.endswith(k)), config["lora_alpha"]
        )
        state[name] += (b.double() @ a.double() * alpha / (2 if config["use_rslora"] else 4)).float()
    stored["base_model.model.model.norm.weight"] = state["model.norm.weight"] = torch.full((32,), 1.5)
    save_file(stored, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps(config))
    return state


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"alpha_pattern": {"down_proj": 2}}])
@pytest.mark.parametrize("at", ["beside", "absolute"])
def test_an_adapter_is_merged_with_its_base(settings: dict[str, Any], at: str, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "base")
    where = "../base" if at == "beside" else str(tmp_path / "base")
    merged = lora(tmp_path / "adapter", model, base_model_name_or_path=where, **settings)
    model.load_state_dict(merged)
    assert_computes(tmp_path / "adapter", model)
    before = open_source(tmp_path / "adapter").identity()
    os.utime(tmp_path / "base/model.safetensors")
    assert open_source(tmp_path / "adapter").identity() != before


BROKEN = [
    ({"peft_type": "IA3"}, "found 'IA3'"),
    ({"use_dora": True}, "use_dora False, found True"),
    ({"base_model_name_or_path": "nobody/nothing"}, "base model 'nobody/nothing' at hand.*HF_HUB_OFFLINE"),
    ({"base_model_name_or_path": None}, "expected the base model's name"),
    ({"base_model_name_or_path": "."}, "an adapter in its place"),
    ({"alpha_pattern": {"(a|aa)+x": 2}}, "found the pattern"),
    ({"lora_alpha": "2"}, "a number as lora_alpha"),
]


@pytest.mark.parametrize(("settings", "message"), BROKEN)
def test_adapters_that_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "base")
    lora(tmp_path / "adapter", model, base_model_name_or_path="../base")
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(UserError, match=message) as error:
        by_engine(tmp_path / "adapter")
    assert "\n" not in str(error.value)


def test_an_adapter_of_another_base(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "one")
    lora(tmp_path / "adapter", model, base_model_name_or_path="../other")
    write_checkpoint(tmp_path / "other", num_hidden_layers=2)
    with pytest.raises(UserError, match="expected lora_A and lora_B of linears"):
        open_source(tmp_path / "adapter")
    write_checkpoint(tmp_path / "third", intermediate_size=48)
    (tmp_path / "adapter/adapter_config.json").write_text(
        '{"peft_type": "LORA", "base_model_name_or_path": "../third"}'
    )
    with pytest.raises(UserError, match="the adapter is of another base model"):
        open_source(tmp_path / "adapter")
    (tmp_path / "adapter/adapter_model.safetensors").rename(tmp_path / "adapter/adapter_model.bin")
    with pytest.raises(UserError, match="adapter_model.bin, which is never loaded"):
        open_source(tmp_path / "adapter")


@pytest.mark.parametrize("shape", ["one file", "shards", "older torch", "inside a dictionary", "a base model"])
def test_pickled_weights_are_explained_and_converted(shape: str, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "m", dtype=torch.bfloat16, tie_word_embeddings=shape == "a base model")
    state = load_file(tmp_path / "m/model.safetensors")
    (tmp_path / "m/model.safetensors").unlink()
    torch.save({"step": 3}, tmp_path / "m/optimizer.pt")
    names = sorted(state)
    if shape == "shards":
        torch.save({n: state[n] for n in names[::2]}, tmp_path / "m/pytorch_model-00001-of-00002.bin")
        torch.save({n: state[n] for n in names[1::2]}, tmp_path / "m/pytorch_model-00002-of-00002.bin")
    elif shape == "older torch":
        torch.save(state, tmp_path / "m/pytorch_model.bin", _use_new_zipfile_serialization=False)
    elif shape == "inside a dictionary":
        torch.save({"state_dict": state}, tmp_path / "m/model.pth")
    elif shape == "a base model":
        torch.save({n.removeprefix("model."): state[n] for n in names}, tmp_path / "m/pytorch_model.bin")
    else:
        torch.save(state, tmp_path / "m/pytorch_model.bin")
    for reader in (by_engine, by_eval):
        with pytest.raises(UserError, match="is a pickle.*tulle export .* --to dense"):
            reader(tmp_path / "m")
    report = export(tmp_path / "m", "dense", tmp_path / "new")
    assert report["difference"] < 1e-6 and any("weights_only" in note for note in report["notes"])
    assert_computes(tmp_path / "new", model)
    found = load_file(tmp_path / "new/model.safetensors")
    assert found.keys() == state.keys() and all(torch.equal(found[n], state[n]) for n in state)


class Bomb:
    """What a pickle may do."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch exploded",)


def test_a_pickle_that_runs_something_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "m")
    (tmp_path / "m/model.safetensors").unlink()
    torch.save({"a": Bomb()}, tmp_path / "m/pytorch_model.bin")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="refuses with weights_only") as error:
        export(tmp_path / "m", "dense", tmp_path / "new")
    assert "\n" not in str(error.value) and not (tmp_path / "exploded").exists()


def test_metas_own_layout_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m")
    (tmp_path / "m/model.safetensors").unlink()
    torch.save({"tok_embeddings.weight": torch.ones(3, 3)}, tmp_path / "m/consolidated.00.pth")
    with pytest.raises(UserError, match="Meta's own layout"):
        export(tmp_path / "m", "dense", tmp_path / "new")


def test_a_safetensors_file_of_another_name(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m")
    (tmp_path / "m/model.safetensors").rename(tmp_path / "m/weights.safetensors")
    with pytest.raises(
        UserError, match="weights.safetensors is under a name that transformers does not read: rename it"
    ):
        by_engine(tmp_path / "m")


def replaced(file: Path, state: dict[str, torch.Tensor]) -> None:
    """Other numbers, with size and mtime kept."""
    before = file.stat()
    time.sleep(0.02)  # of a clock tick
    save_file(state, file, metadata={"format": "pt"})
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)


@pytest.mark.parametrize("what", ["all", "one number of one tensor"])
def test_weights_replaced_with_size_and_mtime_kept(what: str, tmp_path: Path) -> None:
    """The engine's copy of the weights is made again: no mixture of old linears and new embeddings. The one number
    stands outside of the page that the key holds, so that ctime alone tells."""
    model = write_checkpoint(tmp_path / "m", intermediate_size=4096)
    first = by_engine(tmp_path / "m")
    assert (tmp_path / "m/.engine").is_dir()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    if what == "all":
        state = {k: v + 0.2 for k, v in state.items()}
    else:
        name = "model.layers.1.mlp.up_proj.weight"
        table = state[name].view(-1)
        page, size = identity.page(name, 0, table.nbytes)
        at = (page + size) % table.nbytes // table.itemsize + 128
        table[at] += 100
    replaced(tmp_path / "m/model.safetensors", state)
    model.load_state_dict(state)
    assert_computes(tmp_path / "m", model)
    assert np.abs(by_engine(tmp_path / "m") - first).max() > 1e-3


def test_without_trustworthy_times_pages_tell_a_replaced_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a file system has no ctime: every tensor has a page in the key; one number is not seen."""
    model = write_checkpoint(tmp_path / "m", intermediate_size=4096)
    file = tmp_path / "m/model.safetensors"
    real = os.fstat

    def timeless(handle: int) -> Any:
        found = real(handle)
        return os.stat_result([*found[:7], 0, 0, 0], {"st_mtime_ns": 0, "st_ctime_ns": 0})

    monkeypatch.setattr(identity.os, "fstat", timeless)
    first = open_source(tmp_path / "m").identity()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for name in state:
        save_file(state | {name: state[name] + 1}, file, metadata={"format": "pt"})
        assert open_source(tmp_path / "m").identity() != first, name
    save_file(state, file, metadata={"format": "pt"})
    assert open_source(tmp_path / "m").identity() == first
    table = state["model.layers.0.mlp.up_proj.weight"]
    seen = 0
    for row in range(0, len(table), 64):
        changed = table.clone()
        changed[row, 0] += 1
        save_file(state | {"model.layers.0.mlp.up_proj.weight": changed}, file, metadata={"format": "pt"})
        seen += open_source(tmp_path / "m").identity() != first
    assert seen < 4  # of 64: said in tulle.models.identity


def test_a_copied_folder_makes_its_own_copy_of_the_weights(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "m")
    by_engine(tmp_path / "m")
    shutil.copytree(tmp_path / "m", tmp_path / "copy")  # .engine too, times kept
    assert open_source(tmp_path / "copy").identity() != open_source(tmp_path / "m").identity()
    assert_computes(tmp_path / "copy", model)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_before_generating(family: str, value: float, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "m", family, dtype=torch.bfloat16, attention_bias=True)
    state = load_file(tmp_path / "m/model.safetensors")
    assert len(state) == len(model.state_dict())
    kinds = {name.replace("layers.0", "").replace("layers.1", ""): name for name in state if "layers.2" not in name}
    for name in kinds.values():
        changed = state[name].clone()
        changed.view(-1)[changed.numel() // 2] = value
        write_shards(tmp_path / "m", state | {name: changed}, 1)
        with pytest.raises(UserError, match=f"found 1 NaN or Inf in {name}") as error:
            by_engine(tmp_path / "m")
        assert "\n" not in str(error.value)


def test_a_packed_models_scales_are_finite(tmp_path: Path) -> None:
    from tiny_models import write_model

    write_model(tmp_path / "m", {"all": {"bits": 4, "group_size": 32}})
    state = load_file(tmp_path / "m/model.safetensors")
    state["model.layers.1.mlp.up_proj.scale"][3, 1] = float("nan")
    save_file(state, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="model.layers.1.mlp.up_proj, scale: expected finite numbers"):
        Engine(tmp_path / "m", threads=1)


def test_tensors_that_the_model_does_not_use_are_said(tmp_path: Path) -> None:
    """A head for several tokens is stored as a further layer, a bias may stand beside a config without one."""
    folder = tmp_path / "model"
    write_checkpoint(folder)
    tensors = load_file(folder / "model.safetensors")
    first = {n: t.clone() for n, t in tensors.items() if n.startswith("model.layers.0.")}
    layer = {n.replace("layers.0", "layers.7"): t for n, t in first.items()}
    unasked = {"model.layers.1.mlp.up_proj.bias": torch.zeros(4), "model.layers.0.rotary_emb.inv_freq": torch.zeros(4)}
    save_file(tensors | layer | unasked, folder / "model.safetensors")
    source = open_source(folder)
    for _ in range(2):
        describe_source(source)
    (note,) = source.notes
    assert note == (
        f"tensors that the model does not use are left out: model.layers.1 (1), model.layers.7 ({len(layer)})"
    )

"""The whole road from checkpoint to artefact: same bytes every time, whatever interrupts it."""

import copy
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tulle
from checkpoints import PROSE, write_checkpoint
from random_decoders import FAMILIES
from tulle.compression.job import compress
from tulle.compression.recipe import load_recipe, shipped
from tulle.compression.run_folder import locked
from tulle.core.grid import is_automatic
from tulle.core.token_grid import TokenGrid
from tulle.errors import UserError
from tulle.format.pack import unpack_linear
from tulle.format.spec import QuantizationConfig
from tulle.models.checkpoint import Checkpoint
from tulle.text.reading import Text

TEXT = Text((PROSE,), False, ("prose",))
SPARSE_4BIT: dict[str, Any] = {
    "steps": [{"sparsegpt": {"sparsity": 0.5}}, {"gptq": {"bits": 4, "group_size": 16}}],
    "calibration": {"samples": 6, "length": 48},
}
MIXED: dict[str, Any] = {
    "steps": [
        {"gptq": {"bits": 8, "input_bits": 8, "targets": ["qkv"]}},
        {"wanda": {"pattern": "2:4", "targets": ["o", "down"]}},
        {"round_to_nearest": {"bits": 3, "group_size": 32, "symmetric": False, "targets": ["down"]}},
    ],
    "calibration": {"samples": 4, "length": 40},
}


def run(model: Path, output: Path, recipe: dict[str, Any] = SPARSE_4BIT, **settings: Any) -> dict[str, Any]:
    return compress(model, recipe, output, **({"calibration": TEXT} | settings))


def digest(folder: Path) -> dict[str, str]:
    """Every file but the report, which holds times."""
    files = sorted(f for f in folder.iterdir() if not f.name.startswith("report"))
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    write_checkpoint(folder, dtype=torch.bfloat16, shards=2)
    return folder


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("out") / "m"
    run(model, output)
    return output


def test_artefact(model: Path, finished: Path) -> None:
    """Files, names and numbers agree with each other; nothing else is left behind."""
    assert not finished.with_name("m.partial").exists()
    config = json.loads((finished / "config.json").read_text())
    original = json.loads((model / "config.json").read_text())
    assert {k: v for k, v in config.items() if k != "quantization_config"} == original
    quantization = QuantizationConfig.from_json(config["quantization_config"])
    assert len(quantization.linears) == 3 * 7
    packed, dense = Checkpoint.open(finished), Checkpoint.open(model)
    for name, spec in quantization.linears.items():
        for suffix, (dtype, shape) in spec.tensors().items():
            info = packed.info(f"{name}.{suffix}")
            assert (str(info.dtype), info.shape) == (f"torch.{dtype}", shape)
        assert spec.sparse and spec.nonzeros == spec.shape[0] * spec.shape[1] // 2
    for name in (
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.1.input_layernorm.weight",
    ):
        assert torch.equal(packed.read(name), dense.read(name))
    report = json.loads((finished / "report.json").read_text())
    assert report["totals"]["packed_bytes"] == packed.bytes < report["totals"]["dense_bytes"] == dense.bytes
    assert report["totals"]["sparsity"] == 0.5
    assert [x["name"] for x in report["linears"]] == list(quantization.linears)
    assert sum(x["packed_bytes"] for x in report["linears"]) == report["totals"]["linear_packed_bytes"]
    assert all(0 < x["output_error"] < 0.5 for x in report["linears"])
    assert all(sum(x["mask"]["kept_in_stripe"]) == pytest.approx(1, abs=1e-3) for x in report["linears"])
    assert report["seconds"]["total"] > 0 and set(report["seconds"]["steps"]) == {"sparsegpt", "gptq"}
    assert report["calibration"] == {"source": ["prose"], "samples": 6, "tokens": 288, "length": 48}


def test_two_runs_write_the_same_bytes(model: Path, finished: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "again")
    assert digest(tmp_path / "again") == digest(finished)
    run(model, tmp_path / "other", seed=1)
    assert digest(tmp_path / "other") != digest(finished)


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_transformers_computes_what_was_propagated(model_type: str, tmp_path: Path) -> None:
    """The loaded artefact is the dense model with the unpacked weights, and loses what the report says."""
    import tulle.hf

    settings = {"tie_word_embeddings": True} if model_type in ("qwen2", "llama") else {}
    dense = write_checkpoint(tmp_path / "m", model_type, stored="lm_head.weight", **settings)
    report = run(tmp_path / "m", tmp_path / "out", MIXED)
    loaded = tulle.hf.load(tmp_path / "out", dtype=torch.float32)
    tokens = torch.tensor(list(PROSE.encode()[:60]))[None]
    packed = Checkpoint.open(tmp_path / "out")
    inputs: dict[str, int | None] = {}
    for name, spec in QuantizationConfig.from_json(packed.config["quantization_config"]).linears.items():
        arrays = {}
        for suffix in spec.tensors():
            tensor = packed.read(f"{name}.{suffix}")
            arrays[suffix] = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
        dense.get_submodule(name).weight.copy_(torch.from_numpy(unpack_linear(spec, arrays)))
        inputs[name] = spec.input_bits
    for name, bits in inputs.items():
        if bits:
            dense.get_submodule(name).register_forward_pre_hook(lambda m, a: (TokenGrid(8).fake(a[0]),))
    expected = dense(tokens).logits
    torch.testing.assert_close(loaded(tokens).logits, expected, rtol=0, atol=float(expected.abs().max()) * 1e-5)
    assert {x["pattern"] for x in report["linears"]} == {None, "2:4"}


FLOATS: dict[str, Any] = {
    "steps": [
        {"perq": {"block": 16, "permute": False, "targets": ["qkv"]}},
        {"wanda": {"sparsity": 0.6, "targets": ["down"]}},
        {"gptq": {"format": "nvfp4", "targets": ["qkv", "gate_up", "embedding"]}},
        {"gptq": {"format": "mxfp4", "targets": ["o", "down"]}},
        {"round_to_nearest": {"format": "mxfp4", "bits": 4, "targets": ["head"]}},
        {"reconstruct": {"epochs": 2}},
    ],
    "calibration": {"samples": 4, "length": 40},
}


@torch.no_grad()
def test_floats_of_four_bits_from_end_to_end(tmp_path: Path) -> None:
    import tulle.hf

    write_checkpoint(tmp_path / "m")
    report = run(tmp_path / "m", tmp_path / "out", FLOATS)
    formats = {x["role"]: x["format"] for x in report["linears"] + report["tables"]}
    assert formats == {
        "qkv": "nvfp4", "gate_up": "nvfp4", "o": "mxfp4", "down": "mxfp4", "embedding": "nvfp4", "head": "mxfp4",
    }  # fmt: skip
    assert any("reconstruction" in note for block in report["blocks"] for note in block["notes"])
    tokens = list(PROSE.encode()[:60])
    expected = tulle.hf.load(tmp_path / "out", dtype=torch.float32)(torch.tensor(tokens)[None]).logits[0]
    found = torch.from_numpy(tulle.Engine(tmp_path / "out", threads=1, cache="f32").forward(tokens))
    torch.testing.assert_close(found, expected, rtol=0, atol=float(expected.abs().max()) * 3e-4)


def test_the_package_offers_the_function(model: Path, tmp_path: Path) -> None:
    report = tulle.compress(
        model,
        {"steps": [{"round_to_nearest": {"bits": 4}}]} | {"calibration": {"samples": 2, "length": 16}},
        tmp_path / "o",
        calibration=TEXT,
    )
    assert report["totals"]["bits_per_weight"] < 5


def test_unpacked_sparse_weights_keep_their_dtype(model: Path, tmp_path: Path) -> None:
    steps = {
        "steps": [{"magnitude": {"sparsity": 0.6, "targets": ["down"]}}],
        "calibration": {"samples": 2, "length": 16},
    }
    run(model, tmp_path / "o", steps)
    packed, dense = Checkpoint.open(tmp_path / "o"), Checkpoint.open(model)
    values = packed.read("model.layers.0.mlp.down_proj.values")
    weight = dense.read("model.layers.0.mlp.down_proj.weight")
    assert values.dtype == torch.bfloat16
    threshold = weight.abs().flatten().float().sort().values[round(0.6 * weight.numel())]
    assert float(values.abs().min()) >= float(threshold)
    assert torch.equal(
        packed.read("model.layers.0.mlp.up_proj.weight"), dense.read("model.layers.0.mlp.up_proj.weight")
    )


def test_low_sparsity_is_stored_densely(model: Path, tmp_path: Path) -> None:
    """A bitmask that saves less than it costs is not written; zeros stay exact."""
    steps = [{"magnitude": {"sparsity": 0.125, "scope": "row"}}, {"round_to_nearest": {"bits": 4, "symmetric": False}}]
    run(model, tmp_path / "o", {"steps": steps, "calibration": {"samples": 2, "length": 16}})
    packed = Checkpoint.open(tmp_path / "o")
    spec = QuantizationConfig.from_json(packed.config["quantization_config"]).linears["model.layers.0.mlp.up_proj"]
    assert not spec.sparse
    tensors = {s: packed.read(f"model.layers.0.mlp.up_proj.{s}") for s in spec.tensors()}
    arrays = {s: (t.view(torch.uint16) if t.dtype == torch.bfloat16 else t).numpy() for s, t in tensors.items()}
    assert int((unpack_linear(spec, arrays) == 0).sum()) >= 64 * 4


class Interrupted(BaseException):
    """Stands for a kill inside one process."""


@pytest.mark.parametrize("event", range(1, 16))
def test_interrupted_at_every_stage(model: Path, finished: Path, tmp_path: Path, event: int) -> None:
    seen = 0

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal seen
        seen += 1
        if seen == event:
            raise Interrupted(stage)

    with pytest.raises(Interrupted):
        run(model, tmp_path / "o", progress=progress)
    assert not (tmp_path / "o").exists()
    with pytest.raises(UserError, match="found .*o.partial; continue it with --resume"):
        run(model, tmp_path / "o")
    run(model, tmp_path / "o", resume=True)
    assert digest(tmp_path / "o") == digest(finished)
    assert not (tmp_path / "o.partial").exists()


EVERYWHERE = ["qkv", "o", "gate_up", "down", "embedding", "head"]
ALLOCATED: dict[str, Any] = {
    "steps": [
        {"allocate_bits": {"bits": 5.0, "group_sizes": ["auto-32"], "targets": EVERYWHERE}},
        {"gptq": {"targets": EVERYWHERE}},
    ],
    "calibration": {"samples": 4, "length": 40},
}


@pytest.mark.parametrize("tied", [True, False])
def test_interrupted_with_quantised_tables(tmp_path: Path, tied: bool) -> None:
    folder = tmp_path / "dense"
    write_checkpoint(folder, tie_word_embeddings=tied)
    run(folder, tmp_path / "whole", ALLOCATED)
    for stage in ("sensitivity 2/3", "head 2/3" if tied else "sensitivity 3/3", "block 1/3", "block 3/3"):
        output = tmp_path / stage.replace("/", " of ")

        def stop(seen: str, done: int, total: int, stage: str = stage) -> None:
            if seen.startswith(stage):
                raise Interrupted

        with pytest.raises(Interrupted):
            run(folder, output, ALLOCATED, progress=stop)
        run(folder, output, ALLOCATED, resume=True)
        assert digest(output) == digest(tmp_path / "whole")


def test_costs_are_kept_for_another_budget(tmp_path: Path) -> None:
    """They are measured once for a model, text and step, and give what measuring again gives."""
    folder, costs = tmp_path / "dense", tmp_path / "costs"
    write_checkpoint(folder, tie_word_embeddings=True)
    seen: list[str] = []

    def measured(output: str, recipe: dict[str, Any], **settings: Any) -> int:
        seen.clear()
        run(folder, tmp_path / output, recipe, progress=lambda stage, *_: seen.append(stage), **settings)
        return sum(stage.startswith("sensitivity") for stage in seen)

    smaller = copy.deepcopy(ALLOCATED)
    smaller["steps"][0]["allocate_bits"]["bits"] = 4.0
    assert measured("first", ALLOCATED, costs=costs) == 3
    assert measured("second", smaller, costs=costs) == 0
    assert measured("alone", smaller) == 3
    assert digest(tmp_path / "second") == digest(tmp_path / "alone") != digest(tmp_path / "first")
    assert measured("seed", smaller, costs=costs, seed=1) == 3
    smaller["steps"][0]["allocate_bits"]["choices"] = [2, 4, 8]
    before = {lock.parent for lock in costs.glob("*/lock")}
    assert measured("choices", smaller, costs=costs) == 3
    (newest,) = {lock.parent for lock in costs.glob("*/lock")} - before
    with locked(newest), pytest.raises(UserError, match="found another run writing it"):
        measured("beside", smaller, costs=costs)


def test_the_first_block_sees_the_embedding_that_is_stored(tmp_path: Path) -> None:
    """What transformers computes from the stored model is what the walk propagated."""
    folder = tmp_path / "dense"
    write_checkpoint(folder, tie_word_embeddings=True)
    recipe = {
        "steps": [{"round_to_nearest": {"bits": 2, "targets": ["embedding"]}}, {"gptq": {"bits": 8}}],
        "calibration": {"samples": 4, "length": 40},
    }
    report = run(folder, tmp_path / "o", recipe)
    table = report["tables"][0]
    assert (table["name"], table["role"], table["bits"]) == ("model.embed_tokens", "embedding", 2)
    assert 0.01 < table["weight_error"] < 1
    # The embedding is all that is rough; o and down then correct the stream, so that the error shrinks.
    errors = [block["output_error"] for block in report["blocks"]]
    assert errors[0] > 1e-3
    with pytest.raises(UserError, match="expected one step for embedding and head of a model that ties them"):
        steps = [{"gptq": {"targets": ["embedding"]}}, {"round_to_nearest": {"targets": ["head"]}}]
        run(folder, tmp_path / "two", recipe | {"steps": steps})


def test_resume_does_not_repeat_finished_blocks(model: Path, tmp_path: Path) -> None:
    stages: list[str] = []

    def stop(stage: str, done: int, total: int) -> None:
        if stage.startswith("block 3/3"):
            raise Interrupted

    with pytest.raises(Interrupted):
        run(model, tmp_path / "o", progress=stop)
    run(model, tmp_path / "o", resume=True, progress=lambda stage, done, total: stages.append(stage))
    assert stages[0].startswith("block 3/3")
    before = (tmp_path / "o" / "report.json").stat().st_mtime_ns
    assert run(model, tmp_path / "o", resume=True)["totals"]["sparsity"] == 0.5
    assert (tmp_path / "o" / "report.json").stat().st_mtime_ns == before


def test_all_chat_templates_travel_with_the_model(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m")
    files = {"chat_template.jinja": "a", "additional_chat_templates/rag.jinja": "b"}
    (tmp_path / "m/additional_chat_templates").mkdir()
    for name, content in files.items():
        (tmp_path / "m" / name).write_text(content)
    run(
        tmp_path / "m",
        tmp_path / "o",
        {"steps": [{"round_to_nearest": {"bits": 4}}], "calibration": {"samples": 2, "length": 16}},
    )
    assert {name: (tmp_path / "o" / name).read_text() for name in files} == files


def test_a_failed_run_says_what_to_do_with_what_is_left(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tulle.cli import main

    (tmp_path / "r.yaml").write_text(json.dumps(SPARSE_4BIT))
    (tmp_path / "prose.txt").write_text(PROSE)
    command = ["compress", str(model), "-r", str(tmp_path / "r.yaml"), "-o", str(tmp_path / "o")]
    command += ["--calibration", str(tmp_path / "prose.txt")]
    errors = ((UserError("expected a, found b"), 2), (ValueError("x"), 1), (KeyboardInterrupt(), 130))
    for first in (0, 2):
        for error, code in errors:
            written = 0

            def fails(
                tensors: dict, file: str, metadata: dict, error: BaseException = error, first: int = first
            ) -> None:
                nonlocal written
                written += 1
                if written > first:
                    raise error
                save_file(tensors, file, metadata)

            with monkeypatch.context() as patch:
                patch.setattr("tulle.models.checkpoint.save_file", fails)
                assert main.run(command) == code
            line = capsys.readouterr().err.splitlines()[-1]
            assert (
                ("in o.partial" in line.replace(f"{tmp_path}/", "")) == (tmp_path / "o.partial").exists() == (first > 0)
            )
            assert ("repeat the command with --resume to go on from there, or remove that folder" in line) == (
                first > 0
            )
            shutil.rmtree(tmp_path / "o.partial", ignore_errors=True)


def test_killed_at_random(tmp_path: Path) -> None:
    """SIGKILL at random moments, at least 20 times over several runs; see killing.py."""
    script = Path(__file__).parents[1] / "killing.py"
    result = subprocess.run([sys.executable, script, tmp_path, "20"], capture_output=True, text=True, timeout=550)
    assert result.returncode == 0, result.stderr[-2000:]
    counts = json.loads(result.stdout.splitlines()[-1])
    assert counts["kills"] >= 20 and counts["finished"] >= 1 and counts["equal"] == counts["finished"]


def test_a_second_run_on_the_same_output_waits_outside(model: Path, tmp_path: Path) -> None:
    refused = []

    def start_another(stage: str, done: int, total: int) -> None:
        if stage == "block 2/3 o":
            with pytest.raises(UserError, match="found another run writing it"):
                run(model, tmp_path / "o", resume=True)
            refused.append(stage)

    run(model, tmp_path / "o", progress=start_another)
    assert refused


def test_what_a_killed_write_left_behind_goes(model: Path, finished: Path, tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if stage.startswith("block 2/3"):
            (tmp_path / "o.partial" / "model" / ".tmpKoTlbv").touch()  # as the tokenizers library names its own
            raise Interrupted

    with pytest.raises(Interrupted):
        run(model, tmp_path / "o", progress=stop)
    run(model, tmp_path / "o", resume=True)
    assert {f.name for f in (tmp_path / "o").iterdir()} == {f.name for f in finished.iterdir()}


def test_resuming_another_run_is_refused(model: Path, tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if stage.startswith("block 2/3"):
            raise Interrupted

    with pytest.raises(Interrupted):
        run(model, tmp_path / "o", progress=stop)
    with pytest.raises(UserError, match="of another model, recipe, text or seed"):
        run(model, tmp_path / "o", seed=5, resume=True)
    (tmp_path / "o.partial" / "work" / "compressed-1.bin").write_bytes(b"short")
    with pytest.raises(UserError, match="found them damaged"):
        run(model, tmp_path / "o", resume=True)


def test_disk_full_in_the_middle(model: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = 0

    def fails(tensors: dict, file: str, metadata: dict) -> None:
        nonlocal written
        written += 1
        if written == 3:
            raise OSError(28, "No space left on device")
        save_file(tensors, file, metadata)

    monkeypatch.setattr("tulle.models.checkpoint.save_file", fails)
    with pytest.raises(UserError, match="found the disk full"):
        run(model, tmp_path / "o")
    assert not (tmp_path / "o").exists()
    run(model, tmp_path / "o", resume=True)
    assert digest(tmp_path / "o") == digest(finished)


def test_disk_too_small_is_seen_before_the_work(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"expected 0.00 GB free .* found 0.00 GB"):
        run(model, tmp_path / "o")


def _edited(model: Path, copy: Path, name: str, change) -> Path:  # noqa: ANN001
    shutil.copytree(model, copy)
    for file in copy.glob("*.safetensors"):
        state = load_file(file)
        if name in state:
            change(state[name])
            save_file(state, file, metadata={"format": "pt"})
    return copy


def test_bad_input_leaves_nothing(model: Path, tmp_path: Path) -> None:
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "thesis.txt").write_text("precious")
    packed = tmp_path / "packed"
    shutil.copytree(model, packed)
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "hqq"}}))
    untokenized = tmp_path / "untokenized"
    shutil.copytree(model, untokenized, ignore=shutil.ignore_patterns("tokenizer*"))
    small = {"samples": 2, "length": 16}
    cases: list[tuple[str, dict[str, Any]]] = [
        ("expected an empty or new output folder", {"output": occupied}),
        ("expected a model folder", {"model": tmp_path / "nowhere"}),
        ("'hqq'", {"model": packed}),
        ("expected a tokenizer", {"model": untokenized}),
        ("divisible by group_size 24", {"recipe": {"steps": [{"gptq": {"group_size": 24}}], "calibration": small}}),
        ("5", {"recipe": {"steps": [{"wanda": {"pattern": "2:5"}}], "calibration": small}}),
        ("expected 4000 windows", {"samples": 4000}),
        ("expected 1 windows", {"calibration": Text(("short",), False), "samples": 1}),
        ("expected text in", {"calibration": [_empty(tmp_path)]}),
        ("expected a device", {"device": "quantum"}),
        ("shipped recipe", {"recipe": "w3a3"}),
    ]
    for message, change in cases:
        settings: dict[str, Any] = {
            "model": model,
            "output": tmp_path / "o",
            "recipe": SPARSE_4BIT,
            "calibration": TEXT,
        } | change
        with pytest.raises(UserError) as error:
            compress(**settings)
        assert message in str(error.value) and "\n" not in str(error.value), str(error.value)
        assert not (tmp_path / "o").exists() and not (tmp_path / "o.partial").exists()
    assert (occupied / "thesis.txt").read_text() == "precious"


NARROW = {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 3, "num_key_value_heads": 3}


def test_group_size_auto_fits_every_linear(tmp_path: Path) -> None:
    """96 = 3·32 takes 32, 160 = 5·32 takes 32, o's 3·64 takes 64; the report says so, per linear and in one line."""
    write_checkpoint(tmp_path / "m", head_dim=64, num_hidden_layers=1, **NARROW)
    recipe = {"steps": [{"gptq": {"group_size": "auto"}}], "calibration": {"samples": 2, "length": 32}}
    report = run(tmp_path / "m", tmp_path / "o", recipe)
    found = {linear["role"]: linear["group_size"] for linear in report["linears"]}
    assert found == {"qkv": 32, "o": 64, "gate_up": 32, "down": 32}
    assert report["notes"][0] == (
        "gptq, group_size auto: groups of input channels are 32 of 96 in qkv, gate_up; 64 of 192 in o; 32 of 160 in "
        "down"
    )
    assert report["recipe"]["steps"][0]["gptq"]["group_size"] == "auto"


def test_group_size_auto_is_the_number_where_that_fits(model: Path, tmp_path: Path) -> None:
    """Recipes that said a number before and say auto now write the same tensors."""
    for name, size in (("number", 32), ("auto", "auto-32")):
        steps = [{"learned_clipping": {"epochs": 1, "group_size": size}}, {"gptq": {"group_size": size}}]
        run(model, tmp_path / name, {"steps": steps, "calibration": {"samples": 2, "length": 32}})
    for file in sorted((tmp_path / "number").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "auto" / file.name).read_bytes()


def test_a_group_size_that_fits_nowhere_names_widths_and_sizes(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", head_dim=64, num_hidden_layers=1, **NARROW)
    with pytest.raises(UserError) as error:
        run(tmp_path / "m", tmp_path / "o", {"steps": [{"gptq": {"group_size": 128}}]})
    assert str(error.value) == (
        "expected input channels divisible by group_size 128 in what gptq targets, found 96 (qkv, gate_up) and 192 (o) "
        "and 160 (down); use group_size 32, 16, 8, or auto, or leave it out for one step per output channel"
    )
    assert not (tmp_path / "o").exists()


def test_shipped_recipes_with_groups_take_any_width() -> None:
    """576 is SmolLM2's: 128 does not divide it."""
    grouped = 0
    for name in shipped():
        for step in load_recipe(name).steps:
            size = getattr(step.method, "group_size", None)
            grouped += size is not None
            assert size is None or is_automatic(size), name
            floats = getattr(step.method, "format", "int") != "int"  # their groups of 16 are fixed
            for columns in (576, 720) if floats else (576, 720, 88):
                step.method.validate("linear", (64, columns))
    assert grouped >= 5


def _empty(folder: Path) -> Path:
    file = folder / "empty.txt"
    file.write_text("")
    return file


def test_nan_weights_are_named(model: Path, tmp_path: Path) -> None:
    bad = _edited(
        model, tmp_path / "bad", "model.layers.1.self_attn.v_proj.weight", lambda t: t[0, 0].fill_(float("nan"))
    )
    with pytest.raises(UserError, match="NaN or Inf in model.layers.1.self_attn.v_proj.weight"):
        run(bad, tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_a_singular_hessian_is_reported(model: Path, tmp_path: Path) -> None:
    """One repeated token gives Hessians of rank 1; with next to no damping the first factorisation must fail."""
    settings = {"damping": 1e-12}
    steps = {
        "steps": [{"gptq": {"bits": 4} | settings}],
        "calibration": {"samples": 2, "length": 32, "target": "layer"},
    }
    report = run(model, tmp_path / "o", steps, calibration=Text(("a" * 200,), False))
    notes = [note for linear in report["linears"] for note in linear["notes"]]
    assert any("singular Hessian: damping raised from 1e-12" in note for note in notes)
    assert all(
        torch.isfinite(Checkpoint.open(tmp_path / "o").read(n).float()).all()
        for n in Checkpoint.open(tmp_path / "o").names()
    )

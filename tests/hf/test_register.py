"""Loading through transformers: every format, dtypes, round trips, broken folders."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import tulle
import tulle.hf
from checkpoints import PROSE, write_checkpoint
from tiny_models import tokens, write_model
from tulle.compression.job import compress
from tulle.core.token_grid import TokenGrid
from tulle.errors import UserError
from tulle.hf.packed_linear import PackedLinear
from tulle.text.reading import Text

SCHEMES = {
    "w4": {"all": {"bits": 4}},
    "w4-g32-asymmetric": {"all": {"bits": 4, "group_size": 32, "symmetric": False}},
    "w3": {"all": {"bits": 3, "group_size": 16}},
    "w8": {"all": {"bits": 8}},
    "sparse": {"all": {"sparse": True, "values_dtype": "float32"}},
    "sparse-bf16": {"all": {"sparse": True, "values_dtype": "bfloat16"}},
    "sparse-w4": {"all": {"sparse": True, "bits": 4, "group_size": 32}},
    "2:4-w8-asymmetric": {"all": {"sparse": True, "bits": 8, "pattern": "2:4", "symmetric": False}},
    "mixed": {"qkv": {"bits": 8}, "down": {"bits": 4, "sparse": True}},
    "w5-byte-scales": {"all": {"bits": 5, "group_size": 16, "symmetric": False, "scale_bits": 8}},
    "zero points of a byte": {"all": {"bits": 4, "group_size": 32, "symmetric": False, "zero_point_bits": 8}},
}
FP4 = {
    form: {"bits": 4, "group_size": size, "scale_bits": 8, "format": form}
    for form, size in (("mxfp4", 32), ("nvfp4", 16))
}
SCHEMES |= {form: {"all": scheme} for form, scheme in FP4.items()}
SCHEMES["sparse-mxfp4"] = {"all": FP4["mxfp4"] | {"sparse": True}}
TABLE = {"bits": 6, "group_size": 32, "symmetric": False, "scale_bits": 8}


@pytest.mark.parametrize("name", SCHEMES)
def test_logits_are_those_of_the_unpacked_weights(tmp_path, name):
    folder = tmp_path / "m"
    dense = write_model(folder, SCHEMES[name])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    packed = [m for m in model.modules() if isinstance(m, PackedLinear)]
    assert len(packed) == (8 if name == "mixed" else 14)
    assert torch.equal(model(tokens()).logits, dense(tokens()).logits)


def test_quantised_input(tmp_path):
    folder = tmp_path / "m"
    dense = write_model(folder, {"all": {"bits": 8, "input_bits": 8}})
    model = tulle.hf.load(folder)
    with torch.no_grad():
        exact, found = dense(tokens()).logits, model(tokens()).logits
        for name, module in model.named_modules():
            if isinstance(module, PackedLinear):
                dense.get_submodule(name).register_forward_pre_hook(lambda m, x: (TokenGrid(8).fake(x[0]),))
        expected = dense(tokens()).logits
    # Whole sums against float32's: now and then a later input rounds the other way, a step of 1/127 of its token.
    assert float((found - expected).norm()) < 0.1 * float((exact - expected).norm())


@pytest.mark.parametrize("table", [TABLE, FP4["nvfp4"] | {"bits": 4}], ids=["w6", "nvfp4"])
@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head_in_codes(tmp_path: Path, tied: bool, table: dict[str, Any]) -> None:
    folder, again = tmp_path / "m", tmp_path / "again"
    schemes = {"all": {"bits": 4, "group_size": 32}, "embedding": table} | ({} if tied else {"head": {"bits": 8}})
    dense = write_model(folder, schemes, tie_word_embeddings=tied)
    model = tulle.hf.load(folder)
    assert model.get_input_embeddings().spec.bits == table["bits"]
    assert not any(parameter.ndim > 1 for parameter in model.parameters())
    expected = dense(tokens()).logits
    assert torch.equal(model(tokens()).logits, expected)
    model.save_pretrained(again)
    assert torch.equal(tulle.hf.load(again)(tokens()).logits, expected)
    half = tulle.hf.load(folder, dtype=torch.bfloat16)
    assert half.get_input_embeddings()(tokens()).dtype == torch.bfloat16
    assert half.get_input_embeddings().codes.dtype == torch.uint8
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    assert torch.equal(half.lm_head(x), x @ dense.lm_head.weight.to(torch.bfloat16).T)
    model.tie_weights()
    assert torch.equal(model(tokens()).logits, expected)
    base = AutoModel.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(base.get_input_embeddings()(tokens()), model.get_input_embeddings()(tokens()))


@pytest.mark.parametrize(
    "options", [{"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}], ids=str
)
def test_tied_embeddings_and_biases(tmp_path, options):
    folder = tmp_path / "m"
    dense = write_model(folder, {"all": {"bits": 4}}, **options)
    model = tulle.hf.load(folder)
    tied = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert tied == ("tie_word_embeddings" in options)
    assert torch.equal(model(tokens()).logits, dense(tokens()).logits)


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("asked", ["auto", torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(tmp_path, stored, asked):
    schemes = {"qkv": {"bits": 4, "symmetric": False}, "down": {"sparse": True, "values_dtype": "float32"}}
    folder = tmp_path / "m"
    dense = write_model(folder, schemes, dtype=stored, attention_bias=True)
    model = tulle.load(folder, dtype=asked)
    expected = getattr(torch, stored) if asked == "auto" else asked
    assert model.dtype == expected
    assert {p.dtype for p in model.parameters()} == {expected}
    on_disk = load_file(folder / "model.safetensors")
    for key, buffer in model.state_dict().items():
        if key.rpartition(".")[2] in ("codes", "scale", "zero_point", "mask", "values"):
            assert buffer.dtype == on_disk[key].dtype and torch.equal(buffer, on_disk[key])
    with torch.no_grad():
        logits, reference = model(tokens()).logits, dense(tokens()).logits
    assert logits.dtype == expected
    if expected == torch.float32:
        assert torch.equal(logits, reference)
    # bfloat16 keeps 8 bits: two blocks of rounded activations stay within a few per cent.
    assert float((logits.float() - reference).norm() / reference.norm()) < 3e-2


@pytest.mark.parametrize("name", ["w4-g32-asymmetric", "sparse-w4", "sparse-bf16"])
def test_save_pretrained_keeps_the_packed_bytes(tmp_path, name):
    folder = tmp_path / "m"
    write_model(folder, SCHEMES[name], tie_word_embeddings=True)
    tulle.hf.load(folder).save_pretrained(tmp_path / "again")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype and torch.equal(after[key], tensor)
    configs = [json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "again")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert torch.equal(tulle.hf.load(tmp_path / "again")(tokens()).logits, tulle.hf.load(folder)(tokens()).logits)


def test_generate_and_base_model(tmp_path):
    folder = tmp_path / "m"
    dense = write_model(folder, {"all": {"bits": 4}})
    model = tulle.hf.load(folder)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    prompt = tokens(5)
    assert torch.equal(model.generate(prompt, **options), dense.generate(prompt, **options))
    base = AutoModel.from_pretrained(folder)
    assert torch.equal(base(prompt).last_hidden_state, model.model(prompt).last_hidden_state)


def test_sharded(tmp_path):
    folder = tmp_path / "m"
    dense = write_model(folder, {"all": {"bits": 4}})
    tulle.hf.load(folder).save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    model = tulle.hf.load(tmp_path / "shards")
    assert torch.equal(model(tokens()).logits, dense(tokens()).logits)


def test_import_registers_in_a_fresh_process(tmp_path):
    folder = tmp_path / "m"
    write_model(folder, {"all": {"bits": 4}})
    code = (
        "import sys, tulle; assert 'torch' not in sys.modules; import tulle.hf;"
        "from transformers import AutoModelForCausalLM as A;"
        "print(type(A.from_pretrained(sys.argv[1]).model.layers[0].mlp.up_proj).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert done.stdout.strip() == "PackedLinear", done.stderr


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def test_not_a_compressed_folder(tmp_path):
    folder = tmp_path / "m"
    dense = write_model(folder, {"all": {"bits": 4}})
    dense.save_pretrained(tmp_path / "dense")
    with pytest.raises(UserError, match="found a dense model"):
        tulle.hf.load(tmp_path / "dense")
    with pytest.raises(UserError, match="found nothing"):
        tulle.hf.load(tmp_path / "absent")
    edit_config(folder, quant_method="hqq")
    with pytest.raises(UserError, match="'hqq'"):
        tulle.hf.load(folder)


@pytest.mark.parametrize("loader", [tulle.hf.load, AutoModelForCausalLM.from_pretrained], ids=["load", "transformers"])
@pytest.mark.parametrize("damage", ["version", "missing", "shape", "extra-linear", "truncated"])
def test_broken_folders(tmp_path, loader, damage):
    folder = tmp_path / "m"
    write_model(folder, {"all": {"bits": 4}})
    file = folder / "model.safetensors"
    key = "model.layers.1.mlp.up_proj"
    tensors = load_file(file)
    config = json.loads((folder / "config.json").read_text())
    linears = config["quantization_config"]["linears"]
    match damage:
        case "version":
            edit_config(folder, format_version=99)
        case "missing":
            save_file({k: v for k, v in tensors.items() if k != f"{key}.scale"}, file)
        case "shape":
            save_file(tensors | {f"{key}.codes": tensors[f"{key}.codes"][1:].clone()}, file)
        case "extra-linear":
            edit_config(folder, linears=linears | {"model.layers.1.mlp.router": linears[key]})
        case "truncated":
            file.write_bytes(file.read_bytes()[:-1000])
    expected = {
        "version": "format_version 2 or 3 or 4, found 99",
        "missing": "up_proj.scale",
        "shape": r"found .*\[191, 32\]",
        "extra-linear": "router",
        "truncated": "truncated or corrupt",
    }
    if damage == "truncated" and loader is not tulle.hf.load:
        pytest.raises(Exception, loader, folder, match="(?i)incomplete|truncated|invalid")
        return
    with pytest.raises(UserError, match=expected[damage]) as caught:
        loader(folder)
    assert "\n" not in str(caught.value)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def two_of_four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two_of_four")
    write_checkpoint(folder / "m", hidden_size=64, intermediate_size=128, head_dim=16, num_hidden_layers=1)
    steps = [
        {"wanda": {"pattern": "2:4", "targets": ["qkv", "down"]}},
        {"wanda": {"sparsity": 0.5, "targets": ["gate_up"]}},
        {"round_to_nearest": {"bits": 4, "targets": ["down"]}},
    ]
    recipe = {"steps": steps, "calibration": {"samples": 2, "length": 32}}
    compress(folder / "m", recipe, folder / "out", calibration=Text((PROSE,), False, ("prose",)))
    return folder / "out"


def test_two_of_four_is_recognised(two_of_four: Path) -> None:
    model = tulle.hf.load(two_of_four, dtype=torch.float32)
    found = [n for n, m in model.named_modules() if isinstance(m, PackedLinear) and tulle.hf.fits_two_of_four(m)]
    assert [name.rpartition(".")[2] for name in found] == ["q_proj", "down_proj"]  # k and v have 32 rows


def test_sparse_tensor_cores_need_a_gpu(two_of_four: Path) -> None:
    with pytest.raises(UserError, match="CUDA device"):
        tulle.hf.use_sparse_tensor_cores(tulle.hf.load(two_of_four, dtype=torch.bfloat16))


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 8, reason="no sparse tensor cores here"
)
@torch.no_grad()
def test_sparse_tensor_cores_give_the_same_logits(two_of_four: Path) -> None:
    model = tulle.hf.load(two_of_four, dtype=torch.float16).to("cuda")
    tokens = torch.arange(64, device="cuda").reshape(1, 64)
    expected = model(tokens).logits
    assert tulle.hf.use_sparse_tensor_cores(model)
    assert (model(tokens).logits - expected).abs().max() <= 5e-3 * expected.abs().max()

"""Exports to GGUF and dense exports of GGUF files: types, values, tokenizers; llama.cpp where it is installed."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoints import PROSE, write_checkpoint, write_tokenizer
from gguf_files import FAMILIES, YARN, Type, dequantised, family_config, permuted, small_config, write_random
from tiny_models import tokens, write_model
from tulle.cli.main import run
from tulle.compression.job import compress
from tulle.engine import Engine
from tulle.errors import UserError
from tulle.export import export
from tulle.export import gguf as gguf_export
from tulle.export.gguf_metadata import metadata_of
from tulle.models.checkpoint import Checkpoint
from tulle.models.description import describe
from tulle.models.gguf.blocks import to_float32
from tulle.models.gguf.file import GgufFile
from tulle.models.gguf.source import GgufSource
from tulle.models.gguf.tokenizer import GPT2
from tulle.models.source import describe_source, open_source
from tulle.text.reading import Text

SCHEMES = {
    "w4-g32": ({"bits": 4, "group_size": 32}, "Q4_0"),
    "w4-g64": ({"bits": 4, "group_size": 64}, "Q4_0"),
    "w4-channel": ({"bits": 4}, "Q4_0"),
    "w4-sparse": ({"bits": 4, "group_size": 32, "sparse": True}, "Q4_0"),
    "w3-g32": ({"bits": 3, "group_size": 32}, "Q4_0"),
    "w5-g32": ({"bits": 5, "group_size": 32}, "Q5_0"),
    "w8-g32": ({"bits": 8, "group_size": 32}, "Q8_0"),
    "w8-channel": ({"bits": 8}, "Q8_0"),
    "w8a8": ({"bits": 8, "input_bits": 8}, "Q8_0"),
    "w4-g16": ({"bits": 4, "group_size": 16}, "F16"),
    "w4-byte-scales": ({"bits": 4, "group_size": 32, "scale_bits": 8}, "F32"),
    "mxfp4": ({"bits": 4, "group_size": 32, "scale_bits": 8, "format": "mxfp4"}, "MXFP4"),
    "mxfp4-sparse": ({"bits": 4, "group_size": 32, "scale_bits": 8, "format": "mxfp4", "sparse": True}, "MXFP4"),
    "nvfp4": ({"bits": 4, "group_size": 16, "scale_bits": 8, "format": "nvfp4"}, "BF16"),
    "bf16": ({"values_dtype": "bfloat16", "sparse": True}, "BF16"),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", SCHEMES)
def test_every_linear_in_the_smallest_type_that_loses_nothing(tmp_path: Path, name: str) -> None:
    scheme, kind = SCHEMES[name]
    dense = write_model(tmp_path / "packed", {"all": scheme})
    result = export(tmp_path / "packed", "gguf", tmp_path / "out" / "model.gguf")
    file = GgufFile(tmp_path / "out" / "model.gguf")
    linears = {n: t for n, t in result["types"].items() if n.startswith("blk.") and "norm" not in n}
    assert set(linears.values()) == {kind} and result["difference"] < 1e-5
    said = [note for note in result["notes"] if "quantised weights are written as" in note]
    assert len(said) == (scheme.get("bits") is not None and kind in ("F16", "F32", "BF16"))
    for theirs, ours in (("attn_q", "self_attn.q_proj"), ("ffn_down", "mlp.down_proj")):
        raw, of = np.array(file.raw(f"blk.1.{theirs}.weight")), file.tensors[f"blk.1.{theirs}.weight"].type
        weight = dense.get_submodule(f"model.layers.1.{ours}").weight.detach().numpy()
        # The library reads what it was, in the rows' order of llama.cpp.
        np.testing.assert_array_equal(dequantised(raw, of), permuted(weight, 4) if theirs == "attn_q" else weight)
    again = GgufSource(tmp_path / "out" / "model.gguf")
    for ours, parameter in dense.state_dict().items():
        found = again.read(ours)
        found = (found.astype(np.uint32) << 16).view(np.float32) if found.dtype == np.uint16 else found
        np.testing.assert_array_equal(found.astype(np.float32), parameter.numpy(), err_msg=ours)


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head_in_codes(tmp_path: Path, tied: bool) -> None:
    eight = {"bits": 8, "group_size": 32}
    schemes = {"all": {"bits": 4, "group_size": 32}, "embedding": eight} | ({} if tied else {"head": eight})
    dense = write_model(tmp_path / "packed", schemes, tie_word_embeddings=tied)
    result = export(tmp_path / "packed", "gguf", tmp_path / "out" / "model.gguf")
    tables = {"token_embd.weight"} | (set() if tied else {"output.weight"})
    assert {result["types"][name] for name in tables} == {"Q8_0"} and result["difference"] < 1e-5
    assert ("output.weight" in result["types"]) != tied
    again = GgufSource(tmp_path / "out" / "model.gguf").read("model.embed_tokens.weight")
    np.testing.assert_array_equal(again.astype(np.float32), dense.model.embed_tokens.weight.detach().numpy())


@pytest.mark.parametrize(("powers", "kind"), [(True, "Q4_1"), (False, "Q5_0")])
def test_asymmetric_codes_are_q4_1_where_half_precision_holds_the_minima(
    tmp_path: Path, powers: bool, kind: str
) -> None:
    """−s·z has up to 12 bits, one more than half precision has; 5 bits for u − z then."""
    write_model(tmp_path / "packed", {"all": {"bits": 4, "group_size": 32, "symmetric": False}})
    if powers:
        from safetensors.torch import load_file, save_file

        state = load_file(tmp_path / "packed" / "model.safetensors")
        for name, tensor in state.items():
            if name.endswith(".scale"):
                state[name] = torch.full_like(tensor, 0.03125)
        save_file(state, tmp_path / "packed" / "model.safetensors")
    result = export(tmp_path / "packed", "gguf", tmp_path / "model.gguf")
    assert {t for n, t in result["types"].items() if "ffn" in n and "norm" not in n} == {kind}


def test_a_scale_of_zeros_alone_may_be_anything(tmp_path: Path) -> None:
    """round_to_nearest gives groups of zeros a scale of 1e-30, which half precision does not hold."""
    from safetensors.torch import load_file, save_file

    write_model(tmp_path / "packed", {"all": {"bits": 4, "group_size": 32}})
    state = load_file(tmp_path / "packed" / "model.safetensors")
    for name, tensor in state.items():
        if name.endswith(".scale"):
            tensor[:3] = 1e-30
            state[name.replace(".scale", ".codes")][:3] = 0x88
    save_file(state, tmp_path / "packed" / "model.safetensors")
    result = export(tmp_path / "packed", "gguf", tmp_path / "model.gguf")
    assert {t for n, t in result["types"].items() if n.startswith("blk.") and "norm" not in n} == {"Q4_0"}


def test_ternary_weights_are_tq2_0(tmp_path: Path) -> None:
    write_model(tmp_path / "packed", {"all": {"bits": 2}}, hidden_size=256, intermediate_size=256)
    result = export(tmp_path / "packed", "gguf", tmp_path / "model.gguf")
    linears = {t for n, t in result["types"].items() if n.startswith("blk.") and "norm" not in n}
    assert linears <= {"TQ2_0", "Q4_0"}  # codes of 2 bits go from −2 to 1 here, TQ2_0 from −1 to 2
    assert result["difference"] < 1e-5


def test_a_dense_folder_of_every_family(tmp_path: Path) -> None:
    for family in ("mistral", "qwen2", "qwen3"):
        config = small_config(family, tie_word_embeddings=True)
        model = write_random(tmp_path / f"{family}.gguf", config, Type.BF16)
        model.save_pretrained(tmp_path / family)
        result = export(tmp_path / family, "gguf", tmp_path / f"{family}-again.gguf")
        one, two = GgufSource(tmp_path / f"{family}.gguf"), GgufSource(tmp_path / f"{family}-again.gguf")
        assert one.config == two.config | {key: one.config[key] for key in one.config.keys() - two.config.keys()}
        assert set(one.names()) == set(two.names()) and "no tokenizer" in " ".join(result["notes"])


@pytest.mark.parametrize("family", [*FAMILIES, "gemma2", "gemma3_text"])
def test_families_as_their_converters_store_them(tmp_path: Path, family: str) -> None:
    """Every tensor and every key that the library's writer was given for the same model."""
    config = family_config(family) if family in FAMILIES else small_config(family)
    model = write_random(tmp_path / "theirs.gguf", config, Type.F32, size=0.2)
    model.save_pretrained(tmp_path / "dense")
    checkpoint = Checkpoint.open(tmp_path / "dense")
    gguf_export.write(checkpoint, tmp_path / "ours.gguf")
    assert gguf_export.check(checkpoint, tmp_path / "ours.gguf") == len(GgufSource(tmp_path / "theirs.gguf").names())
    theirs, ours = GgufFile(tmp_path / "theirs.gguf"), GgufFile(tmp_path / "ours.gguf")
    assert theirs.tensors.keys() == ours.tensors.keys()
    for name, entry in theirs.tensors.items():
        assert entry.shape == ours.tensors[name].shape
        values = [to_float32(file.raw(name), file.tensors[name].type).reshape(-1) for file in (theirs, ours)]
        np.testing.assert_array_equal(*values, err_msg=name)
    # The channels of dense layers, of which there is none.
    said_otherwise = SAID_OTHERWISE + ("feed_forward_length",) * ("moe_intermediate_size" in config)
    for key, value in theirs.metadata.items():
        if key.split(".")[-1] not in said_otherwise:
            np.testing.assert_array_equal(value, ours.metadata[key], err_msg=key)


@pytest.mark.parametrize(
    ("grid", "kind"),
    [
        ({"bits": 4, "group_size": 32}, "Q4_0"),
        ({"bits": 4, "group_size": 32, "symmetric": False}, None),
        ({"bits": 4, "group_size": 32, "scale_bits": 8}, "F32"),
    ],
)
def test_experts_in_one_tensor(tmp_path: Path, grid: dict[str, object], kind: str | None) -> None:
    """All in one type that holds every one of them; zero points make some experts' codes wider than others'."""
    config = family_config("qwen3_moe") | {"vocab_size": 288}
    model = write_random(tmp_path / "theirs.gguf", config, Type.BF16, size=0.2)
    model.save_pretrained(tmp_path / "dense")
    write_tokenizer(tmp_path / "dense")
    recipe = {"name": "w4", "calibration": {"samples": 2, "length": 16}, "steps": [{"round_to_nearest": grid}]}
    compress(tmp_path / "dense", recipe, tmp_path / "packed", calibration=Text((PROSE,), False, ()))
    result = export(tmp_path / "packed", "gguf", tmp_path / "model.gguf")
    kinds = {t for n, t in result["types"].items() if "_exps" in n}
    assert kinds == {kind} if kind is not None else kinds <= {"Q4_1", "Q5_0", "Q8_0", "F32", "F16"}
    checkpoint = Checkpoint.open(tmp_path / "packed")
    assert gguf_export.check(checkpoint, tmp_path / "model.gguf") == len(GgufSource(tmp_path / "theirs.gguf").names())
    assert result["difference"] < 1e-5


SAID_OTHERWISE = ("yarn_log_multiplier", "sliding_window_pattern")
"""Our files give yarn's factor of attention as such, and leave out the pattern that llama.cpp takes by itself."""


@pytest.mark.parametrize("attention", [None, 1.5])
def test_longrope_goes_into_tensors(tmp_path: Path, attention: float | None) -> None:
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 6, "long_factor": [2.0 + i for i in range(6)]}
    config = family_config("phi3") | {"rope_scaling": scaling | {"attention_factor": attention}}
    config["original_max_position_embeddings"] = 32
    written = metadata_of(describe(config))
    assert written.keys["phi3.rope.scaling.original_context_length"] == 32
    expected = attention or (1 + np.log(64 / 32) / np.log(32)) ** 0.5
    assert written.keys["phi3.rope.scaling.attn_factor"] == pytest.approx(expected)
    np.testing.assert_array_equal(written.factors["rope_factors_long.weight"], 2 + np.arange(6))


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("smollm3", {"no_rope_layers": [1, 1, 0, 1, 1]}, r"layers\.2\.mixer\.rotary"),
        ("smollm3", {"attention_bias": True}, "q_proj.bias"),
        ("ernie4_5", {"use_bias": True}, "q_proj.bias"),
        ("olmo2", {"tie_word_embeddings": True}, "head of its own"),
        ("cohere2", {"tie_word_embeddings": False}, "lm_head.weight"),
        ("phi3", {"head_dim": 32}, "64 channels in all"),
        ("phi3", {"sliding_window": None, "hidden_act": "gelu"}, "activation"),
        ("exaone4", {"sliding_window": 8, "layer_types": None}, "without 64 layers"),
        ("bitnet", {"hidden_act": "relu2"}, "expected silu"),
        ("olmo3", {"rope_parameters": {"full_attention": {"rope_theta": 1000.0},
                                       "sliding_attention": {"rope_theta": 10.0}}}, "rotary.sliding_attention"),
        ("arcee", {"rope_parameters": YARN | {"beta_slow": 0.1}}, "rotary.default"),
        ("seed_oss", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "found dynamic"),
        ("gemma2", {"query_pre_attn_scalar": 100}, "mixer.scale"),
        ("gemma2", {"attn_logit_softcapping": None}, "soft_cap"),
        ("gemma3_text", {"layer_types": ["full_attention", "sliding_attention"] * 3 + ["full_attention"]},
         "sliding_window_pattern"),
        ("qwen3_5_text", {}, "expected a family of"),
    ],
)  # fmt: skip
def test_what_llama_cpp_does_otherwise_is_refused_by_name(
    family: str, changes: dict[str, object], message: str
) -> None:
    config = family_config(family) if family in FAMILIES else small_config(family)
    if family == "qwen3_5_text":
        config = {"model_type": family}
    with pytest.raises(UserError, match=message):
        metadata_of(describe(config | changes))


@pytest.mark.parametrize("family", ["gemma2", "phi3"])
def test_the_whole_export_of_a_packed_model(tmp_path: Path, family: str) -> None:
    """Fused tensors in codes, norms with an offset, and attention that transformers computes in one way alone."""
    config = family_config(family) if family in FAMILIES else small_config(family, num_hidden_layers=2)
    config["vocab_size"] = 257
    write_random(tmp_path / "model.gguf", config, Type.F32, size=0.2).save_pretrained(tmp_path / "dense")
    write_tokenizer(tmp_path / "dense")
    recipe = {"steps": [{"round_to_nearest": {"bits": 4, "group_size": 32}}]}
    compress(tmp_path / "dense", recipe | {"calibration": {"samples": 2, "length": 24}}, tmp_path / "packed",
             calibration=Text((PROSE,), False, ("prose",)))  # fmt: skip
    result = export(tmp_path / "packed", "gguf", tmp_path / "again.gguf")
    linears = {t for n, t in result["types"].items() if n.startswith("blk.") and "norm" not in n}
    assert linears == {"Q4_0"} and result["difference"] < 1e-5


@pytest.mark.parametrize("eps", [1e-5, 9.999999747378752e-06, 1.2345678e-6])
def test_numbers_that_a_float32_does_not_hold(tmp_path: Path, eps: float) -> None:
    write_checkpoint(tmp_path / "dense", rms_norm_eps=eps)
    export(tmp_path / "dense", "gguf", tmp_path / "model.gguf")
    found = describe_source(open_source(tmp_path / "model.gguf")).final_norm.eps
    assert np.float32(found) == np.float32(eps)


def test_a_window_becomes_the_context(tmp_path: Path) -> None:
    model = write_random(tmp_path / "model.gguf", small_config("mistral"), Type.BF16)
    model.config.sliding_window = 32
    model.save_pretrained(tmp_path / "dense")
    result = export(tmp_path / "dense", "gguf", tmp_path / "window.gguf")
    assert GgufSource(tmp_path / "window.gguf").config["max_position_embeddings"] == 32
    assert any("sliding window" in note for note in result["notes"])
    wide = metadata_of(describe(small_config("mistral", sliding_window=64)))  # which no text of 64 tokens reaches
    assert wide.keys["llama.context_length"] == 64 and not wide.notes


def test_llama_3_positions_come_back(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 8192
    write_model(tmp_path / "packed", {"all": {"bits": 4}}, rope_parameters=rope | {"rope_theta": 5e5})
    export(tmp_path / "packed", "gguf", tmp_path / "model.gguf")
    assert GgufSource(tmp_path / "model.gguf").config["rope_scaling"] == rope


def test_what_is_refused_leaves_nothing(tmp_path: Path) -> None:
    write_model(tmp_path / "packed", {"all": {"bits": 4}}, hidden_act="gelu")
    for output, dtype, message in (
        (tmp_path / "folder", None, "name a .gguf file"), (tmp_path / "m.gguf", "float16", "no --dtype"),
        (tmp_path / "m.gguf", None, "expected silu"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            export(tmp_path / "packed", "gguf", output, dtype)
    assert not list(tmp_path.glob("*.gguf*"))


@pytest.mark.parametrize("kind", [Type.Q4_1, Type.Q4_K], ids=lambda kind: kind.name)
def test_a_dense_folder_of_a_gguf_file(tmp_path: Path, kind: Type) -> None:
    """transformers reads it by itself and computes what the dequantised weights do."""
    model = write_random(tmp_path / "model.gguf", small_config(), kind, metadata=tables(trained(GPT2)))
    assert run(["export", str(tmp_path / "model.gguf"), "--to", "dense", "-o", str(tmp_path / "dense")]) == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    for name, parameter in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], parameter, rtol=0, atol=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dense")
    assert tokenizer("abc abd")["input_ids"] == trained(GPT2).encode("abc abd").ids
    assert tokenizer.eos_token == "<|end|>"


def test_every_command_reads_a_gguf_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "model.gguf")
    write_random(tmp_path / "model.gguf", small_config(), Type.Q4_K, metadata=tables(trained(GPT2)))
    (tmp_path / "text.txt").write_text("abc abd abc " * 200)
    text = str(tmp_path / "text.txt")
    assert run(["generate", file, "-p", "abc", "-n", "4", "--threads", "1"]) == 0
    assert run(["bench", file, "--prompt", "8", "--tokens", "4", "--rounds", "1", "--threads", "1"]) == 0
    found = {}
    for backend in ("torch", "engine"):
        result = tmp_path / f"{backend}.json"
        assert run(["eval", file, "--text", text, "--backend", backend, "--json", str(result)]) == 0
        found[backend] = json.loads(result.read_text())["perplexity"]
    assert found["engine"] == pytest.approx(found["torch"], rel=1e-3)
    assert run(["inspect", file, "--json", str(tmp_path / "inspect.json")]) == 0
    linears = json.loads((tmp_path / "inspect.json").read_text())["linears"]
    assert {row["bits_per_weight"] for row in linears} == {4.5}
    (tmp_path / "r.yaml").write_text("steps:\n  - round_to_nearest: {bits: 4, group_size: 32}\n")
    recipe, out = str(tmp_path / "r.yaml"), str(tmp_path / "out")
    assert (
        run(["compress", file, "-r", recipe, "-o", out, "--calibration", text, "--samples", "2", "--length", "32"]) == 0
    )
    assert run(["export", out, "--to", "gguf", "-o", str(tmp_path / "again.gguf")]) == 0
    types = GgufFile(tmp_path / "again.gguf").tensors
    assert {types[n].type for n in types if n.startswith("blk.") and "norm" not in n} == {Type.Q4_0}
    assert "tulle: " not in capsys.readouterr().err


def trained(*cuts: str) -> Tokenizer:
    """A small byte-level tokenizer of at most 96 tokens over a few letters."""
    found = Tokenizer(models.BPE())
    steps = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in cuts]
    found.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(False, use_regex=False)])
    found.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=80, show_progress=False, special_tokens=[])
    found.train_from_iterator(["abc abd bcd 123 1 22 ' . , don't xyz"] * 4, trainer)
    found.add_tokens([AddedToken("<|end|>", special=True)])
    return found


def tables(tokenizer: Tokenizer) -> dict[str, object]:
    data = json.loads(tokenizer.to_str())
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    kept = [names[n] for n in range(len(names))]
    padded = kept + [f"[PAD{n}]" for n in range(len(kept), 96)]
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": padded,
        "tokenizer.ggml.token_type": [3 if t == "<|end|>" else 1 for t in kept] + [5] * (96 - len(kept)),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in data["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": kept.index("<|end|>"), "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}",
    }  # fmt: skip


@pytest.mark.parametrize("named", [True, False], ids=["gpt-2", "no name"])
def test_tokenizer_and_template_travel(tmp_path: Path, named: bool) -> None:
    tokenizer = trained(GPT2 if named else r" ?\p{L}+|\p{N}+|.")
    write_model(tmp_path / "packed", {"all": {"bits": 4, "group_size": 32}})
    tokenizer.save(str(tmp_path / "packed" / "tokenizer.json"))
    settings = {"eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ messages }}"}
    (tmp_path / "packed" / "tokenizer_config.json").write_text(json.dumps(settings))
    result = export(tmp_path / "packed", "gguf", tmp_path / "model.gguf")
    metadata = GgufFile(tmp_path / "model.gguf").metadata
    assert metadata["tokenizer.ggml.model"] == ("gpt2" if named else "no_vocab")
    assert any("llama.cpp takes token ids" in note for note in result["notes"]) == (not named)
    folder = open_source(tmp_path / "model.gguf").tokenizer
    again = AutoTokenizer.from_pretrained(folder)
    for text in ("abc abd 123 don't", " x  yz\n", "<|end|>abc"):
        assert again(text)["input_ids"] == tokenizer.encode(text).ids
    assert again.chat_template == "{{ messages }}" and again.eos_token == "<|end|>"
    engine = Engine(tmp_path / "model.gguf", threads=1)
    assert engine.text.encode("abc abd") == tokenizer.encode("abc abd").ids


def test_llama_cpp_reads_the_export(tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    dense = write_model(tmp_path / "packed", {"all": {"bits": 8, "group_size": 32}}, intermediate_size=256)
    trained(GPT2).save(str(tmp_path / "packed" / "tokenizer.json"))
    export(tmp_path / "packed", "gguf", tmp_path / "model.gguf")
    llama = llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=64, logits_all=True, verbose=False, n_threads=1)
    ids = tokens()[0].tolist()
    llama.eval(ids)
    with torch.no_grad():
        expected = dense(torch.tensor([ids])).logits[0].numpy()
    # llama.cpp rounds inputs to 8 bits.
    assert np.abs(llama.scores[: len(ids)] - expected).max() < 0.03 * np.abs(expected).max()


def test_the_library_reads_the_header(tmp_path: Path) -> None:
    write_model(tmp_path / "packed", {"all": {"bits": 4, "group_size": 32}})
    export(tmp_path / "packed", "gguf", tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["general.architecture"].contents() == "llama" and fields["general.file_type"].contents() == 2
    assert fields["llama.block_count"].contents() == 2 and fields["llama.vocab_size"].contents() == 128

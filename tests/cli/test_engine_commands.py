"""generate, chat, bench and eval --backend engine on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoints import write_checkpoint, write_prose
from tulle.cli import main


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    write_checkpoint(folder / "model", seed=3)
    write_prose(folder / "prose.txt", 3000)
    recipe = "name: tiny\nsteps:\n  - magnitude: {sparsity: 0.7}\n  - round_to_nearest: {bits: 4}\n"
    (folder / "recipe.yaml").write_text(recipe)
    arguments = ["-r", "recipe.yaml", "-o", "out", "--calibration", "prose.txt", "--samples", "4", "--length", "64"]
    assert run(folder, "compress", "model", *arguments) == 0
    return folder


def run(folder: Path, *arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return main.run(arguments)


def test_generate(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(work, "generate", "out", "-p", "Sentence", "-n", "20", "--json", "found.json") == 0
    shown = capsys.readouterr()
    found = json.loads((work / "found.json").read_text())
    assert shown.out == "Sentence" + found["text"] + "\n"
    assert "prompt tokens in" in shown.err
    assert found["prompt_tokens"] == 8 and len(found["tokens"]) <= 20


def test_generate_reads_a_prompt_and_writes_json_only(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("abc"))
    assert run(work, "generate", "out", "-p", "-", "-n", "5", "--temperature", "1", "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "abc"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "nowhere", "-p", "x"], "expected a model folder"),
        (["generate", "out", "-p", ""], "at least one token"),
        (["generate", "out", "-p", "x", "--temperature", "-1"], "temperature of 0 or more"),
        (["generate", "out", "-p", "x", "-n", "500"], "within 128 tokens"),
        (["generate", "out", "-p", "x", "--cache", "int2"], "a cache in"),
        (["generate", "out", "-p", "x", "--layout", "round"], "a layout of"),
        (["chat", "out"], "chat template"),
        (["generate", "out", "-p", "x", "--seed", "-1"], "expected a seed of 0 or more, found -1"),
        (["chat", "out", "--seed", "-1"], "expected a seed of 0 or more, found -1"),
        (
            ["compress", "model", "-r", "recipe.yaml", "-o", "o", "--seed", "-1"],
            "expected a seed of 0 or more, found -1",
        ),
        (["generate", "out", "-p", "caf\udce9"], "expected text in UTF-8, found b'caf\\xe9'"),
        (["bench", "out", "--prompt", "100", "--tokens", "100"], "within the context of 128, found 200"),
        (["bench", "out", "--tokens", "500"], "within the context"),
        (["eval", "out", "--backend", "gpu"], "torch or engine"),
        (["eval", "out", "--activations", "int8"], "with --backend engine"),
        (["eval", "out", "--backend", "engine", "--weights", "int8"], "no Scaling Transformer"),
    ],
)
def test_bad_input(work: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(work, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_chat(work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import io
    import shutil

    shutil.copytree(work / "out", work / "chatty", dirs_exist_ok=True)
    (work / "chatty/chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }} {% endfor %}"
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\nAgain\n\n"))
    assert run(work, "chat", "chatty", "-n", "6", "--temperature", "0") == 0
    assert capsys.readouterr().out.count("\n") >= 2


def test_bench_shows_both_layouts(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--prompt", "30", "--tokens", "8", "--rounds", "2", "--json", "speed.json", "--threads", "1"]
    assert run(work, "bench", "out", *arguments) == 0
    found = json.loads((work / "speed.json").read_text())
    assert {found["layout"], *(other["layout"] for other in found["other_layouts"])} == {"sparse", "dense"}
    keys = {"prefill_tokens_per_s", "decode_tokens_per_s", "weight_bytes", "bandwidth_gb_s", "threads"}
    assert keys <= set(found) and all(found[k] > 0 for k in keys)
    shown = capsys.readouterr().out
    assert "sparse" in shown and "dense" in shown


def test_bench_of_a_short_context(work: Path) -> None:
    write_checkpoint(work / "short", max_position_embeddings=40)
    for arguments, lengths in (([], (20, 20)), (["--prompt", "33"], (33, 7)), (["--tokens", "3"], (37, 3))):
        assert run(work, "bench", "short", *arguments, "--rounds", "1", "--threads", "1", "--json", "speed.json") == 0
        found = json.loads((work / "speed.json").read_text())
        assert (found["prompt"], found["tokens"]) == lengths


def test_a_prompt_from_a_file(work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    for content, prompt in ((b"\xef\xbb\xbfabc\r\nd", "abc\nd"), ("naïve".encode("latin-1"), None)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        assert run(work, "generate", "out", "-p", "-", "-n", "2", "--json", "found.json") == (0 if prompt else 2)
        if prompt:
            assert json.loads((work / "found.json").read_text())["prompt"] == prompt
    error = capsys.readouterr().err.splitlines()[-1]
    assert "expected text in UTF-8, found b'na\\xefve'" in error
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n")))
    (work / "chatty").mkdir(exist_ok=True)
    import shutil

    shutil.copytree(work / "out", work / "chatty", dirs_exist_ok=True)
    (work / "chatty/chat_template.jinja").write_text("{{ messages[-1].content }}")
    assert run(work, "chat", "chatty", "-n", "6") == 2
    assert "expected text in UTF-8" in capsys.readouterr().err


def test_eval_of_a_model_without_a_finite_perplexity(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    for value, found in ((float("nan"), "NaN"), (3e4, "an infinite one")):
        write_checkpoint(work / f"broken {found}", seed=3)
        (file,) = (work / f"broken {found}").glob("*.safetensors")
        tensors = load_file(file)
        tensors["lm_head.weight"][:50] *= value
        save_file(tensors, file, {"format": "pt"})
        arguments = ["--text", "prose.txt", "--length", "64", "--json", "score.json"]
        assert run(work, "eval", f"broken {found}", *arguments) == 2
        shown = capsys.readouterr()
        assert shown.err.count("\n") == 1 and "expected a finite perplexity, found" in shown.err and found in shown.err
        assert "perplexity" in shown.out and json.loads((work / "score.json").read_text())["perplexity"] is None


def test_eval_gives_the_figures_of_torch(work: Path) -> None:
    figures = []
    for backend in ("torch", "engine"):
        assert run(work, "eval", "out", "--text", "prose.txt", "--backend", backend, "--json", f"{backend}.json") == 0
        figures.append(json.loads((work / f"{backend}.json").read_text()))
    assert figures[0]["tokens"] == figures[1]["tokens"]
    assert figures[1]["perplexity"] == pytest.approx(figures[0]["perplexity"], rel=5e-3)
    # Inputs in 8 bits are another model, though not by much.
    arguments = ["--text", "prose.txt", "--backend", "engine", "--activations", "int8", "--json", "rough.json"]
    assert run(work, "eval", "out", *arguments) == 0
    rough = json.loads((work / "rough.json").read_text())["perplexity"]
    assert rough != figures[1]["perplexity"] and rough == pytest.approx(figures[1]["perplexity"], rel=5e-2)


def test_generate_without_torch(work: Path) -> None:
    """In an interpreter where torch and transformers cannot be imported."""
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from tulle.cli import main; sys.exit(main.run(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "generate", str(work / "out"), "-p", "Sentence", "-n", "5"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("Sentence")


@pytest.fixture(scope="module")
def scaling(work: Path) -> Path:
    """A Scaling Transformer with the tokenizer of ``work``'s model."""
    import shutil

    from tulle.models.scaling_transformer import ScalingTransformerConfig, ScalingTransformerForCausalLM

    vocabulary = json.loads((work / "model/config.json").read_text())["vocab_size"]
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sparse = {"ff_block": 8, "qkv_modules": 4, "max_position_embeddings": 128}
    model = ScalingTransformerForCausalLM(ScalingTransformerConfig(vocab_size=vocabulary, **shape, **sparse))
    model.save_pretrained(work / "scaling")
    for file in (work / "model").glob("*token*"):
        shutil.copy(file, work / "scaling" / file.name)
    return work


def test_a_scaling_transformer(scaling: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for extra in ([], ["--weights", "int8"]):
        assert run(scaling, "generate", "scaling", "-p", "Sentence", "-n", "9", "--json", "found.json", *extra) == 0
        assert len(json.loads((scaling / "found.json").read_text())["tokens"]) == 9
    assert run(scaling, "bench", "scaling", "--prompt", "8", "--tokens", "4", "--rounds", "1", "--json", "-") == 0
    capsys.readouterr()
    found = {}
    for backend in ("torch", "engine"):
        arguments = ["--text", "prose.txt", "--length", "64", "--backend", backend, "--json", f"{backend}.json"]
        assert run(scaling, "eval", "scaling", *arguments) == 0
        found[backend] = json.loads((scaling / f"{backend}.json").read_text())["perplexity"]
    assert abs(found["engine"] / found["torch"] - 1) < 1e-3
    assert run(scaling, "eval", "scaling", *arguments, "--weights", "int8") == 0
    rough = json.loads((scaling / "engine.json").read_text())["perplexity"]
    assert 0 < abs(rough / found["torch"] - 1) < 5e-2
    assert run(scaling, "generate", "scaling", "-p", "x", "--weights", "int2") == 2
    assert "expected weights" in capsys.readouterr().err

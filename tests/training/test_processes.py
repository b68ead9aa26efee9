"""Two processes (gloo, on the CPU) give what one gives, under DDP and under FSDP2, by ``accelerate launch``."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tulle.training.curve import read_metrics
from tulle.training.launch import train

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1",
          "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]  # fmt: skip
KINDS = {
    "ddp": ["--multi_gpu"],
    "fsdp2": ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"],
}


def stages(kind: str) -> list[dict]:
    # N:M from a dense model: many weights of Adam's first step, all of one size, would tie in the choice of masks.
    found: list[dict] = [
        {"name": "dense"},
        {"name": "pattern", "methods": [{"sr_ste": {"decay": 1e-2}}]},
        {"name": "gradual", "methods": [{"gradual_magnitude": {"sparsity": 0.6, "every": 1}}]},
        {"name": "held", "methods": [{"held_masks": {}}, {"squarehead": {"teacher": "dense", "kl": 0.5}}]},
    ]
    if kind == "ddp":
        found[-1]["prune"] = {"steps": [{"magnitude": {"sparsity": 0.7}}]}
        found.append({"name": "kast", "methods": [{"top_kast": {"refresh": 2}}]})
    return found


def write(folder: Path, kind: str) -> Path:
    rows = [{"text": f"Row {i} holds the square {i * i} of {i}.\n" * 3} for i in range(70)]
    for name, part in (("train", rows[:60]), ("test", rows[60:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    recipe = {
        "seed": 3,
        "model": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                  "num_key_value_heads": 1, "head_dim": 8},
        "data": {"sources": [{"path": str(folder / "train.jsonl")}], "vocab_size": 300,
                 "held_out": [{"path": str(folder / "test.jsonl")}]},
        "training": {"tokens": 4 * 128, "context": 16, "batch": 4, "accumulation": 2, "learning_rate": 0.01,
                     "schedule": "linear", "precision": "fp32", "compile": False, "evaluate_every": 2,
                     "evaluate_windows": 4, "checkpoint_every": 4},
        "stages": stages(kind),
    }  # fmt: skip
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("tulle.compression.job.write_report", lambda report, file: file.write_text("page"))
    recipe = write(tmp_path, kind)
    tulle = shutil.which("tulle", path=str(Path(sys.executable).parent)) or pytest.skip("tulle is not installed")
    settings = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    found = subprocess.run(
        [*LAUNCH, *KINDS[kind], tulle, "train", str(recipe), "-o", str(tmp_path / "two")],
        env=os.environ | settings, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-3000:]
    train(recipe, tmp_path / "one", log=lambda line: None)
    for stage in sorted((tmp_path / "one/stages").iterdir()):
        other = tmp_path / "two/stages" / stage.name
        assert json.loads((other / "run.json").read_text())["processes"] == 2
        one, two = (load_file(folder / "model.safetensors") for folder in (stage, other))
        for name, tensor in one.items():
            # Sums in another order, which Adam's division by small variances amplifies over 16 steps; weights are of
            # the order of 0.1 to 1.
            torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4, msg=f"{stage.name} {name}")
            assert torch.equal(two[name] == 0, tensor == 0)
    figures = [[row["held_out_bits_per_byte"] for row in read_metrics(tmp_path / run / "metrics.jsonl")]
               for run in ("one", "two")]  # fmt: skip
    assert figures[0] == pytest.approx(figures[1], rel=1e-4)

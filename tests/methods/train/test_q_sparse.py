"""Q-Sparse and BitNet b1.58: gradients by hand, and one model from the training loop to the loaded folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional

import tulle.hf
from checkpoints import PROSE, write_checkpoint
from tulle.core.topk import Selection
from tulle.engine import Engine
from tulle.errors import UserError
from tulle.hf.packed_linear import PackedLinear
from tulle.methods.train.bitnet import BitNet, quantised, ternary, ternary_weight
from tulle.methods.train.masks import HeldMasks
from tulle.methods.train.method import TrainingMethod
from tulle.methods.train.q_sparse import QSparse
from tulle.models.checkpoint import Checkpoint
from tulle.text import standard_library
from tulle.training import loop
from tulle.training.corpus import prepare
from tulle.training.held_out import bits_per_byte
from tulle.training.launch import train
from tulle.training.pack import pack
from tulle.training.plan import make_plan
from tulle.training.recipe import TrainRecipe, load_recipe

BF16_ALPHA = 0.98046875
"""bfloat16 of 0.98."""


def single(weight: list[list[float]]) -> nn.Linear:
    linear = nn.Linear(len(weight[0]), len(weight), bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor(weight))
    return linear


def ids() -> torch.Tensor:
    data = list(PROSE.encode())
    return torch.tensor([data[:40], data[300:340]])


class TestGradients:
    W = [[1.0, 2.0, -1.0, 0.5], [0.0, 1.0, 3.0, -2.0]]
    X = [[3.0, -1.0, 2.0, 0.5]]
    UP = torch.tensor([[1.0, 10.0]])

    def run(self, *methods: TrainingMethod) -> tuple[Any, Any, Any]:
        linear = single(self.W)
        for method in methods:
            method.prepare(nn.Sequential(linear), linears={"0": linear})
        x = torch.tensor(self.X, requires_grad=True)
        y = linear(x)
        y.backward(self.UP)
        assert linear.weight.grad is not None and x.grad is not None
        return y.tolist(), x.grad.tolist(), linear.weight.grad.tolist()

    def test_q_sparse(self) -> None:
        """Y = (X⊙M)·Wᵀ with X⊙M = (3, 0, 2, 0); ∂L/∂X = ∂L/∂Y·W everywhere, ∂L/∂W = ∂L/∂Yᵀ·(X⊙M)."""
        y, gx, gw = self.run(QSparse(share=0.5))
        assert y == [[1.0, 6.0]]
        assert gx == [[1.0, 12.0, 29.0, -19.5]]
        assert gw == [[3.0, 0.0, 2.0, 0.0], [30.0, 0.0, 20.0, 0.0]]

    def test_without_straight_through(self) -> None:
        _, gx, gw = self.run(QSparse(share=0.5, straight_through=False))
        assert gx == [[1.0, 0.0, 29.0, 0.0]]
        assert gw == [[3.0, 0.0, 2.0, 0.0], [30.0, 0.0, 20.0, 0.0]]

    def test_rounded_inputs(self) -> None:
        """2 bits: steps of 3, so that (3, −1, 2, 0.5) is (3, 0, 3, 0); of the two threes none is dropped."""
        y, gx, _ = self.run(QSparse(share=0.5, input_bits=2))
        assert y == [[0.0, 9.0]]
        assert gx == [[1.0, 12.0, 29.0, -19.5]]

    def test_ternary_weights(self) -> None:
        """α = mean|W| = 10.5/8 = 1.3125 (exact in bfloat16); W/α rounds to (1, 1, −1, 0), (0, 1, 1, −1)."""
        y, gx, gw = self.run(BitNet(input_bits=None))
        a = 1.3125
        assert y == [[a * (3 - 1 - 2), a * (-1 + 2 - 0.5)]]
        assert gx == [[a * 1, a * (1 + 10), a * (-1 + 10), a * -10]]
        assert gw == [[3.0, -1.0, 2.0, 0.5], [30.0, -10.0, 20.0, 5.0]]


def test_ternary_against_the_formula() -> None:
    w = torch.randn(30, 40, generator=torch.Generator().manual_seed(0))
    codes, alpha = ternary(w)
    assert float(alpha) == float(w.abs().mean().bfloat16())
    for row in range(0, 30, 7):
        for column in range(40):
            expected = max(-1, min(1, round(float(w[row, column]) / (float(alpha) + 1e-5))))
            assert codes[row, column] == expected
    effective = ternary_weight(w)
    grid = quantised(effective)
    assert torch.equal(grid.dequantise(), effective) and set(grid.codes.unique().tolist()) == {-1, 0, 1}
    zero = quantised(torch.zeros(3, 4))
    assert not zero.dequantise().any() and bool((zero.scale > 0).all())


METHODS: dict[str, list[TrainingMethod]] = {
    "top-k": [QSparse(share=0.5)],
    "relu2": [QSparse(share=0.3, activation="relu2")],
    "by-role": [QSparse(share=0.5, shares={"down": 0.75}, targets=("qkv", "down"))],
    "blocks": [QSparse(share=0.5, block=16)],
    "units": [QSparse(share=0.5, unit=4, by="norm", rescale=True)],
    "int8": [QSparse(share=0.5, input_bits=8)],
    "bitnet": [BitNet()],
    "bitnet+top-k": [BitNet(), QSparse(share=0.4, activation="relu2")],
    "relufication-1": [QSparse(kind="none", activation="relu")],
    "relufication-2": [QSparse(kind="relu", activation="relu")],
}


@torch.no_grad()
@pytest.mark.parametrize("key", METHODS)
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_what_was_trained_is_what_is_loaded(key: str, model_type: str, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "m", model_type, num_hidden_layers=2)
    methods = METHODS[key]
    plain = model(ids()).logits
    for method in methods:
        method.prepare(model)
    trained = model(ids()).logits
    assert (trained - plain).abs().max() > 1e-2 * plain.abs().max()
    for method in methods:
        method.finish()
    # Finished weights are those that the training computed with.
    assert torch.allclose(model(ids()).logits, trained, rtol=0, atol=1e-5)
    folder = tmp_path / "out"
    model.save_pretrained(folder)
    packed = pack(folder, methods)
    assert packed == (key != "relufication-1")
    loaded = tulle.hf.load(folder, dtype=torch.float32) if packed else type(model).from_pretrained(folder).eval()
    error = (loaded(ids()).logits - trained).abs().amax(-1) / trained.abs().max()
    # Sums over whole numbers are exact when loaded, and an input on the edge between two codes may fall to the other.
    rounded = any(getattr(method, "grid", None) is not None for method in methods)
    assert (error < 1e-4).float().mean() >= (0.7 if rounded else 1.0) and error.max() < 2e-2
    # The same in the engine.
    engine = Engine(folder, 1, cache="f32", head="as stored", layout="input-major")
    found = torch.stack([torch.from_numpy(engine.forward(row.tolist())) for row in ids()])
    error = (found - trained).abs().amax(-1) / trained.abs().max()
    assert (error < 1e-4).float().mean() >= (0.7 if rounded else 1.0) and error.max() < 2e-2


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_one_mask_for_siblings_and_an_exact_count(model_type: str, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "m", model_type, num_hidden_layers=1)
    QSparse(share=0.5, shares={"down": 0.25}).prepare(model)
    seen: dict[str, torch.Tensor] = {}
    block = model.model.layers[0]
    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    names += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    for name in names:
        # Hooks run in the order in which they came: after the method's.
        block.get_submodule(name).register_forward_pre_hook(lambda m, a, name=name: seen.update({name: a[0]}))
    model(ids())
    assert seen["self_attn.q_proj"] is seen["self_attn.k_proj"] is seen["self_attn.v_proj"]
    assert seen["mlp.gate_proj"] is seen["mlp.up_proj"]
    for name, x in seen.items():
        dropped = 0.25 if "down" in name else 0.5
        assert ((x == 0).sum(-1) == round(dropped * x.shape[-1])).all(), name


def test_gradients_of_a_whole_model(tmp_path: Path) -> None:
    """Against linears that select in their own forward, written naively with detach."""
    model = write_checkpoint(tmp_path / "m", num_hidden_layers=2)
    naive = write_checkpoint(tmp_path / "n", num_hidden_layers=2)
    QSparse(share=0.5).prepare(model)

    class Naive(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            kept = torch.zeros_like(x).scatter(-1, x.abs().topk(x.shape[-1] // 2).indices, 1.0)
            return functional.linear(x + (x * kept - x).detach(), self.weight, self.bias)

    for name, module in naive.named_modules():
        if name.endswith("_proj"):
            module.__class__ = Naive
    for one in (model, naive):
        one(input_ids=ids(), labels=ids()).loss.backward()
    for (name, p), (_, q) in zip(model.named_parameters(), naive.named_parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-6), name


def test_compiled_training_is_the_same(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "m", num_hidden_layers=1)
    for method in (BitNet(), QSparse(share=0.4, activation="relu2")):
        method.prepare(model)
    compiled = torch.compile(lambda x: model(input_ids=x, use_cache=False).logits, backend="eager")
    assert torch.allclose(compiled(ids()), model(input_ids=ids(), use_cache=False).logits, atol=1e-6)


@torch.no_grad()
def test_static_and_dynamic_sparsity_together(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "m", num_hidden_layers=1)
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            generator = torch.Generator().manual_seed(module.weight.numel())
            module.weight.mul_(torch.rand(module.weight.shape, generator=generator) < 0.3)
    methods = [HeldMasks(), QSparse(share=0.5)]
    for method in methods:
        method.prepare(model)
    trained = model(ids()).logits
    for method in methods:
        method.finish()
    model.save_pretrained(tmp_path / "out")
    assert pack(tmp_path / "out", methods)
    loaded = tulle.hf.load(tmp_path / "out", dtype=torch.float32)
    assert torch.allclose(loaded(ids()).logits, trained, atol=1e-5)
    down = loaded.get_submodule("model.layers.0.mlp.down_proj")
    assert isinstance(down, PackedLinear) and down.spec.sparse and down.spec.input_sparsity is not None


def test_metrics_count_zeros(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "m", num_hidden_layers=1)
    method = QSparse(share=0.5)
    method.prepare(model)
    model(ids())
    assert method.metrics() == {f"zeros_{role}": pytest.approx(0.5) for role in ("qkv", "o", "gate_up", "down")}
    assert method.metrics() == {}


def test_rounding_after_the_selection_is_refused(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "m", num_hidden_layers=1)
    QSparse().prepare(model)
    with pytest.raises(UserError, match="expected bitnet before q_sparse"):
        BitNet().prepare(model)


def test_shipped_recipes() -> None:
    folder = Path(__file__).parents[3] / "recipes"
    found = {
        name: [
            [type(method).__name__ for method in stage.methods]
            for stage in make_plan(load_recipe(folder / f"{name}.yaml")).stages
        ]
        for name in (
            "q-sparse",
            "q-sparse-rotated",
            "q-sparse-b158",
            "q-sparse-continued",
            "q-sparse-sft",
            "relufication",
        )
    }
    assert found == {
        "q-sparse": [["QSparse"]],
        "q-sparse-rotated": [["QSparse"], ["QSparse"]],
        "q-sparse-b158": [["BitNet", "QSparse"]],
        "q-sparse-continued": [["QSparse"]],
        "q-sparse-sft": [[], ["QSparse", "SquareHead"]],
        "relufication": [["QSparse"]],
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 1.0}, "share of zeroed inputs"),
        ({"shares": {"head": 0.5}}, "found 'head'"),
        ({"input_bits": 1}, "2 to 8"),
        ({"begin": 0.5, "end": 0.5}, "0 <= begin < end <= 1"),
        ({"begin": 0.1}, "0 <= begin < end <= 1"),
        ({"end": 0.5, "kind": "relu"}, "end only with kind top_k"),
    ],
)
def test_refused(settings: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        QSparse(**settings)


@torch.no_grad()
@pytest.mark.parametrize(("block", "unit"), [(None, 1), (8, 2)])
def test_growing(block: int | None, unit: int) -> None:
    """From a quarter to three quarters of 64 steps, of 32 inputs 16 in the end: one in every two steps."""
    linear = single([[1.0] * 32])
    method = QSparse(share=0.5, begin=0.25, end=0.75, block=block, unit=unit)
    method.prepare(nn.Sequential(linear), 64, {"0": linear})
    seen: list[int] = []
    linear.register_forward_pre_hook(lambda m, a: seen.append(int((a[0] == 0).sum())))
    x = torch.arange(1.0, 33.0)[None]
    for step in range(64):
        linear(x)
        method.after_step(step, [])
    linear(x)
    if unit == 1:
        assert seen == [min(max(step - 16, 0) // 2, 16) for step in range(65)]
    else:  # of each of four blocks none, one or two units of two
        assert sorted(set(seen)) == [0, 8, 16] and seen == sorted(seen) and seen[16] == 0 and seen[48] == 16
    assert method.selections["0"].keep == (16 if block is None else 4)
    again = QSparse(share=0.5, begin=0.25, end=0.75)
    again.prepare(nn.Sequential(single([[1.0] * 32])), 64, {"0": linear})
    again.load_state(method.state())
    assert torch.equal(again.state()["ramp"], method.state()["ramp"]) and not QSparse().state()


def test_growing_needs_the_number_of_steps() -> None:
    linear = single([[1.0] * 8])
    with pytest.raises(UserError, match="expected the number of steps"):
        QSparse(end=0.5).prepare(nn.Sequential(linear), linears={"0": linear})


def test_growing_goes_on_where_it_was_cut(
    tmp_path: Path, small_evaluation: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = recipe(tmp_path, methods=[{"q_sparse": {"share": 0.5, "end": 1.0}}])
    whole = train(file, tmp_path / "whole", log=lambda line: None)
    original = loop._step

    def dies(step: int, *arguments: Any) -> float:
        if step == 4:
            raise KeyboardInterrupt
        return original(step, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "_step", dies)
        train(file, tmp_path / "cut", log=lambda line: None)
    resumed = train(file, tmp_path / "cut", resume=True, log=lambda line: None)
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_growing_in_a_compiled_model() -> None:
    linear = single([[1.0] * 32])
    method = QSparse(share=0.5, end=1.0)
    method.prepare(nn.Sequential(linear), 32, {"0": linear})
    made: list[Any] = []
    compiled = torch.compile(linear, backend=lambda graph, inputs: made.append(graph) or graph.forward)
    x = torch.arange(1.0, 33.0)[None]
    for step in range(32):
        assert compiled(x).item() == x[0, step // 2 :].sum()
        method.after_step(step, [])
    assert len(made) == 32


TEXT = ["def f(x):\n    return x\n" * 30, "class A:\n    pass\n" * 20]


@pytest.fixture
def small_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standard_library, "held_out_text", lambda: TEXT)


def recipe(folder: Path, **content: Any) -> Path:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    whole = {
        "model": sizes | {"num_key_value_heads": 1, "head_dim": 16},
        "data": {"sources": [{"name": "tqdm"}], "vocab_size": 300},
        "training": {
            "tokens": 6 * 64, "context": 16, "batch": 4, "learning_rate": 0.01, "precision": "fp32", "compile": False,
            "evaluate_every": 3, "evaluate_windows": 4, "checkpoint_every": 3,
        },
    } | content  # fmt: skip
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(whole))
    return file


METHODS_OF_A_RECIPE = [{"bitnet": {}}, {"q_sparse": {"share": 0.25, "activation": "relu2"}}]


def test_training_from_scratch(tmp_path: Path, small_evaluation: None) -> None:
    out = train(recipe(tmp_path, methods=METHODS_OF_A_RECIPE), tmp_path / "out", log=lambda line: None)
    config = Checkpoint.open(out).config
    linears = config["quantization_config"]["linears"]
    assert config["hidden_act"] == "relu2"
    assert all((s["bits"], s["input_bits"], s["input_sparsity"]["keep"]) == (2, 8, 24 if s["shape"][1] == 32 else 48)
               for s in linears.values())  # fmt: skip
    record = json.loads((out / "run.json").read_text())
    model = tulle.hf.load(out, dtype=torch.float32)
    content = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    made = TrainRecipe.model_validate(content)
    corpus = prepare(made.data, made.seed, tmp_path / "again", 300)
    assert bits_per_byte(model, corpus, 16) == pytest.approx(record["held_out_bits_per_byte"], rel=1e-6)
    # The last estimate of the loop, of the same model in training: another share of the text, the same number of bits.
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["held_out_bits_per_byte"] == pytest.approx(record["held_out_bits_per_byte"], rel=0.05)
    assert rows[-1]["zeros_down"] >= 0.25 and 0.1 < rows[-1]["ternary_zeros"] < 0.6


def test_a_dense_model_in_stages(tmp_path: Path, small_evaluation: None) -> None:
    first = train(recipe(tmp_path), tmp_path / "dense", log=lambda line: None)
    shutil.move(first, tmp_path / "start")
    stages = [
        {"name": "thin", "methods": [{"q_sparse": {"share": 0.25}}]},
        {"name": "thinner", "methods": [{"q_sparse": {"share": 0.5}}]},
    ]
    file = recipe(
        tmp_path, model=None, start=str(tmp_path / "start"), data={"sources": [{"name": "tqdm"}]}, stages=stages
    )
    out = train(file, tmp_path / "out", log=lambda line: None)
    linears = Checkpoint.open(out).config["quantization_config"]["linears"]
    assert {s["input_sparsity"]["keep"] for s in linears.values()} == {16, 32}
    assert "quantization_config" not in Checkpoint.open(out / "stages" / "01-thin").config
    model = tulle.hf.load(out, dtype=torch.float32)
    down = model.get_submodule("model.layers.0.mlp.down_proj")
    assert isinstance(down, PackedLinear) and isinstance(down.selection, Selection)
    # And on from a packed one.
    (tmp_path / "again").mkdir()
    file = recipe(
        tmp_path / "again", model=None, start=str(out), data={"sources": [{"name": "tqdm"}]},
        methods=[{"q_sparse": {"share": 0.5}}],
    )  # fmt: skip
    train(file, tmp_path / "again" / "out", log=lambda line: None)


def test_fine_tuning(tmp_path: Path, small_evaluation: None) -> None:
    train(recipe(tmp_path), tmp_path / "start", log=lambda line: None)
    for name, first in (("task", 0), ("held", 500)):
        rows = [{"question": f"{i} + {i}", "answer": str(2 * i)} for i in range(first, first + 100)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source, held = (
        {"path": str(tmp_path / f"{name}.jsonl"), "template": "Question: {question}\nAnswer: {answer}"}
        for name in ("task", "held")
    )
    file = recipe(
        tmp_path, model=None, start=str(tmp_path / "start"), data={"sources": [source], "held_out": [held]},
        methods=[{"q_sparse": {"share": 0.5}}, {"squarehead": {"teacher": "start"}}],
    )  # fmt: skip
    out = train(file, tmp_path / "out", log=lambda line: None)
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["squarehead"] > 0 and last["zeros_qkv"] == pytest.approx(0.5)
    assert tulle.hf.load(out).config.quantization_config.packed.linears


def test_packing_afterwards_is_refused(tmp_path: Path, small_evaluation: None) -> None:
    stages = [{"name": "x", "methods": [{"q_sparse": {}}], "compress": "w4a16-g128"}]
    with pytest.raises(UserError, match="expected no compress in stage x"):
        train(recipe(tmp_path, stages=stages), tmp_path / "out", log=lambda line: None)

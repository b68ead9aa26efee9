"""Recipes: what is accepted, and what is refused with which hint."""

import itertools
from pathlib import Path

import pytest
import yaml

from tulle.compression.recipe import METHODS, load_recipe, method_class, parse_recipe, shipped
from tulle.errors import UserError
from tulle.methods.contract import Method
from tulle.methods.prune.sparsegpt import SparseGPT
from tulle.methods.quantize.gptq import GPTQ
from tulle.models.description import ROLES

SHIPPED = {
    "w8a8", "w4a16-g128", "sparse50", "sparse50-w4", "2of4", "w4a4", "w4a4-duquant", "w4a4-duquant-lwc", "w4a4-quarot",
    "w6a6-duquant", "w8a8-smoothquant", "sparse60", "sparse70", "sparse70-reconstructed", "sparse70-w4",
    "sparse70-w8a8", "2of4-permuted", "teal40", "wina50", "sparse50-teal40-w4",
    "larosa40", "larosa50-w4a8", "w4a16-nvfp4",
}  # fmt: skip


def test_the_shipped_recipes_load_by_name() -> None:
    assert SHIPPED <= set(shipped())
    for name in shipped():
        assert load_recipe(name).name == name
        assert load_recipe(name).description


def test_steps_keep_their_order_and_targets() -> None:
    recipe = parse_recipe(
        {
            "steps": [
                {"sparsegpt": {"sparsity": 0.5}},
                {"gptq": {"bits": 4, "targets": ["down", "qkv"]}},
                {"reconstruct": {"epochs": 2}},
            ]
        }
    )
    assert [s.name for s in recipe.steps] == ["sparsegpt", "gptq", "reconstruct"]
    assert recipe.steps[0].method == SparseGPT(sparsity=0.5) and recipe.steps[0].targets == ROLES
    assert recipe.steps[1].method == GPTQ(bits=4) and recipe.steps[1].targets == ("qkv", "down")
    assert [s.name for s in recipe.steps_for("o")] == ["sparsegpt", "reconstruct"]


def test_json_round_trip() -> None:
    for name in shipped():
        recipe = load_recipe(name)
        assert parse_recipe(recipe.to_json()) == recipe


def test_every_method_is_importable_and_documented() -> None:
    for name in METHODS:
        found = method_class(name)
        # A dataclass without a docstring gets its signature.
        assert found.__doc__ and not found.__doc__.startswith(f"{found.__name__}("), name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"stepps": []}, "found 'stepps'; did you mean steps?"),
        ({"steps": []}, "expected a list of steps"),
        ({"steps": "gptq"}, "expected a list of steps"),
        ([], "expected a recipe as a mapping"),
        ({"steps": [{"gtpq": {}}]}, "found 'gtpq'; did you mean gptq?"),
        ({"steps": ["gptq"]}, "expected a step as a mapping"),
        ({"steps": [{"gptq": {}, "wanda": {}}]}, "expected one method per step, found gptq, wanda"),
        ({"steps": [{"gptq": {"group_sise": 64}}]}, "found 'group_sise'; did you mean group_size?"),
        ({"steps": [{"gptq": {"bits": 9}}]}, "9"),
        ({"steps": [{"gptq": {"bits": "four"}}]}, "expected a valid bits in gptq"),
        ({"steps": [{"gptq": {"targets": ["q"]}}]}, "found 'q'"),
        ({"steps": [{"gptq": {"targets": ["gateup"]}}]}, "did you mean gate_up?"),
        ({"steps": [{"gptq": {"targets": []}}]}, "expected targets of gptq"),
        ({"steps": [{"gptq": 4}]}, "expected the settings of gptq as a mapping"),
        ({"steps": [{"sparsegpt": {"sparsity": 1.5}}]}, "1.5"),
        ({"steps": [{"sparsegpt": {"pattern": "5:4"}}]}, "5:4"),
        ({"steps": [{"sparsegpt": {"pattern": "two of four"}}]}, "two of four"),
        ({"steps": [{"gptq": {}}], "calibration": {"sample": 3}}, "found 'sample'; did you mean samples?"),
        ({"steps": [{"gptq": {}}], "calibration": {"samples": 0}}, "expected a valid samples in calibration"),
        ({"steps": [{"gptq": {}}], "calibration": {"target": "input"}}, "expected a valid target in calibration"),
    ],
)
def test_refused(content: object, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_recipe(content)
    assert message in str(error.value) and "\n" not in str(error.value)


def gptq(**settings: object) -> dict:
    return {"gptq": {"bits": 4} | settings}


SPARSE: dict = {"sparsegpt": {"sparsity": 0.5}}
TWICE = [
    # Weights quantised twice: by one method, by two, in the sweep of a pruner.
    ([gptq(), gptq(bits=8, targets=["down"])], "quantises the weights of down, found gptq (step 1) and gptq (step 2)"),
    ([gptq(), {"round_to_nearest": {}}], "quantises the weights of qkv, found gptq and round_to_nearest"),
    ([{"sparsegpt": {"sparsity": 0.5, "bits": 4}}, gptq()], "quantises the weights of qkv, found sparsegpt and gptq"),
    ([gptq(), {"reconstruct": {}}, gptq()], "quantises the weights of qkv, found gptq (step 1) and gptq (step 3)"),
    # Pruned twice.
    ([SPARSE, {"sparsegpt": {"sparsity": 0.3, "targets": ["down"]}}], "prunes the weights of down, found sparsegpt (s"),
    ([{"wanda": {"pattern": "2:4"}}, {"alps": {"sparsity": 0.7}}], "prunes the weights of qkv, found wanda and alps"),
    ([{"magnitude": {"sparsity": 0.5}}, {"ria": {"sparsity": 0.6}}], "prunes the weights of qkv, found magnitude and"),
    # Bits and groups.
    ([{"allocate_bits": {"bits": 4.0}}, {"allocate_bits": {"size": "1MB"}}, gptq()], "decides bits and groups of qkv"),
    # Inputs, keys and values.
    ([{"activations": {}}, {"activations": {"bits": 8, "targets": ["o"]}}], "quantises the inputs of o, found activat"),
    ([{"activations": {}}, gptq(input_bits=8)], "quantises the inputs of qkv, found activations and gptq"),
    ([{"kv_cache": {}}, {"kv_cache": {"bits": 8, "targets": ["o"]}}], "quantises keys and values, found kv_cache (st"),
    (
        [{"kv_cache": {"targets": ["qkv"]}}, {"kv_cache": {"targets": ["o"]}}],
        "found kv_cache (step 1) and kv_cache (step 2); leave one of them out",
    ),
    # What stands in front of them.
    ([{"smoothquant": {}}, {"smoothquant": {"targets": ["down"]}}], "smooths the inputs of down"),
    ([{"duquant": {}}, {"perq": {"targets": ["o"]}}], "rotates the inputs of o, found duquant and perq"),
    ([{"quarot": {}}, {"duquant": {}}], "rotates the inputs of o, found quarot and duquant"),
    ([{"learned_clipping": {}}, {"flatquant": {}}], "learns the clipping of qkv, found learned_clipping and flatquant"),
    ([{"affinequant": {}}, {"flatquant": {}}], "learns the clipping of qkv, found affinequant and flatquant"),
    ([{"permute_channels": {}}, {"permute_channels": {"targets": ["down"]}}], "orders the input channels of down"),
    # Decisions about the whole model.
    ([{"keep_sensitive": {}}, {"keep_sensitive": {"keep_bits": 8}}, gptq()], "decides which linears keep bits of qkv"),
    ([{"owl": {"sparsity": 0.5}}, {"allocate": {"sparsity": 0.5}}, SPARSE], "decides sparsities of qkv, found owl and"),
    ([{"activation_budget": {}}, {"activation_budget": {}}, {"teal": {}}], "decides shares of dropped inputs of qkv"),
    ([{"teal": {}}, {"wina": {"targets": ["down"]}}], "selects inputs of down, found teal and wina"),
]


@pytest.mark.parametrize(("steps", "message"), TWICE)
def test_nothing_is_settled_twice(steps: list, message: str) -> None:
    """The second step would work on what the first one left, and the report would not say so."""
    with pytest.raises(UserError) as error:
        parse_recipe({"steps": steps})
    assert str(error.value).startswith("expected one step that ") and message in str(error.value)
    assert "leave one of them out" in str(error.value) and "\n" not in str(error.value)


def test_every_decision_is_covered() -> None:
    """Every method settles something that the cases above know, but those that only refine or rotate the stream."""
    free = {name for name in METHODS if not _settings(name).settles}
    assert free == {"reconstruct", "larosa", "spinquant"}
    named = {name for steps, _ in TWICE for step in steps for name in step}
    assert set(METHODS) - free == named - free


def _settings(name: str) -> Method:
    prunes = name in ("magnitude", "wanda", "ria", "sparsegpt", "alps", "owl", "allocate")
    needed = {"sparsity": 0.5} if prunes else {"bits": 4.0} if name == "allocate_bits" else {}
    return method_class(name)(**needed)


@pytest.mark.parametrize(
    "steps",
    [
        # Other roles, steps that only refine, and steps that share one decision.
        [gptq(targets=["qkv", "o", "gate_up"]), gptq(bits=8, targets=["down"])],
        [SPARSE, gptq(), {"reconstruct": {}}, {"reconstruct": {"epochs": 2}}],
        [SPARSE, {"reconstruct": {}}, gptq()],
        [{"activations": {"targets": ["qkv"]}}, {"activations": {"bits": 8, "targets": ["down"]}}, gptq()],
        [{"activations": {"targets": ["qkv"]}}, gptq(input_bits=8, targets=["down"])],
        [{"spinquant": {}}, {"quarot": {"residual": False}}, gptq()],
        [{"quarot": {"across_heads": False, "down": False}}, {"duquant": {}}, gptq()],
        [{"quarot": {}}, {"duquant": {"targets": ["qkv", "gate_up"]}}, gptq()],
        [{"smoothquant": {}}, {"perq": {}}, {"affinequant": {}}, gptq()],
        [{"keep_sensitive": {"targets": ["o"]}}, {"keep_sensitive": {"targets": ["down"]}}, gptq()],
        [{"learned_clipping": {"group_size": "auto"}}, gptq(group_size="auto")],
    ],
)
def test_what_only_refines_or_shares_is_taken(steps: list) -> None:
    assert len(parse_recipe({"steps": steps}).steps) == len(steps)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([gptq(), SPARSE], "expected qkv to be pruned before it is quantised, found sparsegpt after gptq; put spars"),
        ([gptq(targets=["down"]), {"wanda": {"sparsity": 0.5}}], "expected down to be pruned before it is quantised"),
        ([{"learned_clipping": {"group_size": 64}}, gptq()], "found 64 and None; write the same in both"),
        ([{"flatquant": {}}, gptq(group_size="auto")], "expected one group_size in flatquant and gptq"),
        ([gptq(group_size="automatic")], "expected a valid group_size in gptq"),
    ],
)
def test_steps_that_do_not_fit_each_other(steps: list, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_recipe({"steps": steps})
    assert message in str(error.value) and "\n" not in str(error.value)


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"steps": [{"wanda": {"pattern": "2:4"}}]}))
    assert load_recipe(file).name == "mine"
    with pytest.raises(UserError, match="found nothing at"):
        load_recipe(tmp_path / "other.yaml")
    with pytest.raises(UserError, match="did you mean sparse50"):
        load_recipe("sparce50")
    file.write_text("steps: [gptq: {")
    with pytest.raises(UserError, match="expected YAML in") as error:
        load_recipe(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{n}: &{n} [{', '.join(['*' + m] * 10)}]\n" for m, n in itertools.pairwise("abcdefghij")),
        "steps: &a [*a]",
        "steps: " + "[" * 100 + "]" * 100,
        "steps: " + "[" * 10_000,
        "name: 2001-99-99",
    ],
    ids=["billion laughs", "a list in itself", "deep", "deeper", "no date"],
)  # fmt: skip
def test_yaml_that_is_more_than_it_seems(content: str, tmp_path: Path) -> None:
    from tulle.training.recipe import load_recipe as load_training_recipe

    (tmp_path / "x.yaml").write_text(content)
    for load in (load_recipe, load_training_recipe):
        with pytest.raises(UserError, match="values|YAML"):
            load(tmp_path / "x.yaml")

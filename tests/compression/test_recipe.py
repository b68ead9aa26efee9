"""Recipes: what is accepted, and what is refused with which hint."""

import itertools
from pathlib import Path

import pytest
import yaml

from tulle.compression.recipe import METHODS, load_recipe, method_class, parse_recipe, shipped
from tulle.errors import UserError
from tulle.methods.prune.sparsegpt import SparseGPT
from tulle.methods.quantize.gptq import GPTQ
from tulle.models.description import ROLES

SHIPPED = {
    "w8a8", "w4a16-g128", "sparse50", "sparse50-w4", "2of4", "w4a4", "w4a4-duquant", "w4a4-duquant-lwc", "w4a4-quarot",
    "w6a6-duquant", "w8a8-smoothquant", "sparse60", "sparse70", "sparse70-reconstructed", "sparse70-w4",
    "sparse70-w8a8", "2of4-permuted", "teal40", "wina50", "sparse50-teal40-w4",
    "larosa40", "larosa50-w4a8",
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
                {"magnitude": {"sparsity": 0.1}},
            ]
        }
    )
    assert [s.name for s in recipe.steps] == ["sparsegpt", "gptq", "magnitude"]
    assert recipe.steps[0].method == SparseGPT(sparsity=0.5) and recipe.steps[0].targets == ROLES
    assert recipe.steps[1].method == GPTQ(bits=4) and recipe.steps[1].targets == ("qkv", "down")
    assert [s.name for s in recipe.steps_for("o")] == ["sparsegpt", "magnitude"]


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

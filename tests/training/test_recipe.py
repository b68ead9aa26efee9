"""Training recipes: the shipped ones are valid, mistakes are named in one line."""

from pathlib import Path

import pytest
import yaml

from tulle.errors import UserError
from tulle.training.plan import make_plan
from tulle.training.recipe import RENAMED, load_recipe, shipped

REFERENCE = Path(__file__).parents[2] / "recipes" / "reference.yaml"


def changed(tmp_path: Path, *path: str, value: object) -> Path:
    """The reference recipe with one key set."""
    content = yaml.safe_load(REFERENCE.read_text())
    section = content
    for part in path[:-1]:
        section = section[int(part)] if part.isdigit() else section[part]
    section[path[-1]] = value
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def test_reference_recipe():
    recipe = load_recipe(REFERENCE)
    widths = (recipe.model.hidden_size, recipe.model.intermediate_size, recipe.data.vocab_size)
    assert all(width % 128 == 0 for width in widths)
    assert recipe.training.tokens >= 25_000_000


@pytest.mark.parametrize(
    ("path", "advice"),
    [
        (("training", "learnig_rate"), "unknown key 'training.learnig_rate'; did you mean 'learning_rate'?"),
        (("modle",), "unknown key 'modle'; did you mean 'model'?"),
        (("data", "sources", "0", "weigth"), "unknown key 'data.sources.0.weigth'; did you mean 'weight'?"),
        (("model", "zzz"), "unknown key 'model.zzz'; valid keys: head_dim, hidden_size"),
    ],
)
def test_unknown_key_names_the_nearest(tmp_path, path, advice):
    with pytest.raises(UserError) as error:
        load_recipe(changed(tmp_path, *path, value=1))
    assert advice in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("training", "optimizer"), "sgd", "'training.optimizer'.*'adamw' or 'muon'.*got 'sgd'"),
        (("training", "batch"), 0, "'training.batch'.*greater than 0"),
        (("training", "tokens"), 100, "tokens of stage train to cover one step of 8192 tokens, found 100"),
        (("model", "num_key_value_heads"), 3, "multiple of num_key_value_heads"),
        (("data", "sources"), [{"name": "stdlib"}, {"name": "stdlib"}], "named once"),
    ],
)
def test_bad_value(tmp_path, path, value, message):
    with pytest.raises(UserError, match=message):
        make_plan(load_recipe(changed(tmp_path, *path, value=value)))


def test_missing_key(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("seed: 1\n")
    with pytest.raises(UserError, match="'data'.*Field required"):
        load_recipe(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [("[1, 2]", "map keys to values, found list"), ("a: [", "readable YAML"), ("", "found NoneType")],
)
def test_not_a_recipe(tmp_path, content, message):
    file = tmp_path / "recipe.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        load_recipe(file)
    assert "\n" not in str(error.value)


def test_no_such_file(tmp_path):
    with pytest.raises(UserError, match="found no such file; shipped recipes: .*reference"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="found no file; name a YAML file"):
        load_recipe(tmp_path)


def test_a_recipe_is_a_path_a_shipped_name_or_its_content():
    assert load_recipe("reference") == load_recipe(REFERENCE) == load_recipe(yaml.safe_load(REFERENCE.read_text()))


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_name_is_refused_with_the_new_one(tmp_path, old):
    for asked in (old, tmp_path / f"{old}.yaml"):
        with pytest.raises(UserError, match=f"found {old}; it is {RENAMED[old]} now"):
            load_recipe(asked)
    assert RENAMED[old] in shipped() and old not in shipped()
    # A file of one's own may be called so.
    (tmp_path / f"{old}.yaml").write_text(REFERENCE.read_text())
    assert load_recipe(tmp_path / f"{old}.yaml") == load_recipe(REFERENCE)


def test_a_stage_says_what_differs_and_has_the_rest_from_the_recipe():
    plan = make_plan(load_recipe("train-sparse-pipeline"))
    assert [stage.name for stage in plan.stages] == ["sparse50", "sparse70", "teacher", "task"]
    assert [stage.source for stage in plan.stages] == ["start", "sparse50", "start", "sparse70"]
    assert [stage.training.learning_rate for stage in plan.stages] == [3e-4, 3e-4, 1e-4, 1e-4]
    assert {stage.training.context for stage in plan.stages} == {512}
    assert [[type(method).__name__ for method in stage.methods] for stage in plan.stages] == [
        ["HeldMasks"], ["HeldMasks"], [], ["HeldMasks", "SquareHead"],
    ]  # fmt: skip
    assert plan.stages[1].prune.steps[0].method.sparsity == 0.7 and plan.stages[3].prune is None
    assert [step.name for step in plan.stages[3].compress.steps][-1] == "gptq"
    sources = [[source.label for source in stage.data.sources] for stage in plan.stages]
    assert sources[0] == sources[1] and sources[2] == sources[3] == ["task/train.jsonl"]


@pytest.mark.parametrize("name", shipped())
def test_shipped_training_recipes_are_valid(name):
    make_plan(load_recipe(name))  # or it raises


def test_the_sparse_training_recipes_are_there():
    ways = {"finetune-1-dense-then-prune", "finetune-2-prune-while", "finetune-3-from-one-shot"}
    others = {"finetune-4-from-sparse-pretrained", "train-sparse50-70", "train-sparse-pipeline", "train-2of4-sr-ste"}
    assert ways | others | {"train-top-kast"} <= set(shipped())

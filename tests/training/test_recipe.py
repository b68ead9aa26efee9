"""Training recipes: the shipped one is valid, mistakes are named in one line."""

from pathlib import Path

import pytest
import yaml

from tulle.errors import UserError
from tulle.training.recipe import load_recipe

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
        (("training", "tokens"), 100, "tokens must cover one step of 8192 tokens"),
        (("model", "num_key_value_heads"), 3, "multiple of num_key_value_heads"),
        (("data", "sources"), [{"name": "stdlib"}, {"name": "stdlib"}], "named once"),
    ],
)
def test_bad_value(tmp_path, path, value, message):
    with pytest.raises(UserError, match=message):
        load_recipe(changed(tmp_path, *path, value=value))


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
    with pytest.raises(UserError, match="found no such file"):
        load_recipe(tmp_path / "none.yaml")


TRAINING = sorted(f for f in REFERENCE.parent.glob("*.yaml") if "training" in yaml.safe_load(f.read_text()))


@pytest.mark.parametrize("file", TRAINING, ids=lambda file: file.stem)
def test_shipped_training_recipes_are_valid(file):
    from tulle.training.launch import check

    for stage in load_recipe(file).resolved():
        if stage.prune is not None:
            check(stage.prune, True)
        if stage.compress is not None:
            check(stage.compress, False)


def test_the_sparse_training_recipes_are_there():
    ways = {"finetune-1-dense-then-prune", "finetune-2-prune-while", "finetune-3-from-one-shot"}
    others = {"finetune-4-from-sparse-pretrained", "train-sparse50-70", "train-sparse-road", "train-2of4-sr-ste"}
    assert ways | others | {"train-top-kast"} <= {file.stem for file in TRAINING}

"""The split: stable, disjoint, and nothing held out is ever trained on."""

import subprocess
import sys
from pathlib import Path

import pytest

from tulle.errors import UserError
from tulle.text import standard_library as data
from tulle.training.recipe import Data, Source
from tulle.training.sources import training_documents


def test_a_module_is_named_by_its_last_component():
    assert data.module_name("json/decoder.py") == "decoder"
    assert data.module_name("json/__init__.py") == "json"
    assert data.module_name("json/__main__.py") == "json"


def test_split_is_the_same_on_every_machine():
    # Fixed names: a change of the hash would move the published evaluation text.
    names = ["json/__init__.py", "queue.py", "struct.py", "argparse.py", "asyncio/tasks.py", "heapq.py"]
    assert [data.is_held_out(name) for name in names] == [True, True, True, False, True, False]


def test_copies_of_a_module_fall_on_one_side():
    assert data.is_held_out("pip/_vendor/x/queue.py") == data.is_held_out("queue.py")


def test_about_the_intended_share_is_held_out():
    # Binomial: 20 000 names at 5 % have a standard deviation of 31 names; five of them either way.
    held_out = sum(data.is_held_out(f"module_{number}.py") for number in range(20_000))
    assert abs(held_out - 1000) < 155


def test_held_out_content_under_another_name_is_not_trained_on():
    held_out_name = "stdlib:queue.py"
    copy = data.Document("stdlib:copied_elsewhere.py", "text")
    train, held_out = data.split([copy, data.Document(held_out_name, "text")])
    assert train == []
    assert [document.name for document in held_out] == [held_out_name]


def test_duplicates_are_dropped():
    documents = [data.Document(f"stdlib:{name}.py", "text") for name in ("argparse", "heapq")]
    train, _ = data.split(documents)
    assert train == documents[:1]


def test_stdlib_sides_are_disjoint_and_of_use():
    held_out, calibration = data.held_out_text(), data.calibration_text()
    assert not set(held_out) & set(calibration)
    assert sum(map(len, held_out)) > 100_000
    assert sum(map(len, calibration)) > 10 * sum(map(len, held_out))


def training_texts(settings, seed):
    """Of sources for which nothing must be fetched."""
    return [document.text for document in training_documents(settings, seed, Path(), data.held_out_text())]


def test_no_held_out_text_in_the_training_documents_and_weights_repeat_them():
    texts = training_texts(Data(sources=[Source(name="stdlib", weight=2.5)], vocab_size=300), seed=0)
    assert not set(texts) & set(data.held_out_text())
    # Each of some 530 documents twice or, by a fair lot, thrice: four standard deviations are 0.09.
    assert abs(len(texts) / len(set(texts)) - 2.5) < 0.09


def test_training_order_is_seeded():
    settings = Data(sources=[Source(name="pyyaml")], vocab_size=300)
    assert training_texts(settings, seed=1) == training_texts(settings, seed=1)
    assert training_texts(settings, seed=1) != training_texts(settings, seed=2)
    assert sorted(training_texts(settings, seed=1)) == sorted(training_texts(settings, seed=2))


@pytest.mark.parametrize(
    "raw",
    [
        b"x = 1\n",
        b"# coding: latin-1\n" + b"name = 'caf\xe9'\n" * 50,
        b"# This file was automatically generated, do not edit\n" + b"value = other\n" * 50,
        b"table = [1, 23, 456, 7890, 12, 345]\n" * 50,
        b"text = '" + b"a" * 2000 + b"'\n",
        b"value = other\n" * 50_000,
    ],
    ids=["short", "not UTF-8", "generated", "table", "data line", "large"],
)
def test_unusable_files(raw):
    assert not data.is_source_text(raw)
    assert data.is_source_text(b"value = other\n" * 50)


def test_unknown_source():
    with pytest.raises(UserError, match="expected the source 'no-such-thing'.*pip install no-such-thing"):
        data.read_source("no-such-thing")


def test_texts_load_no_torch():
    code = (
        "import sys; from tulle.text.standard_library import held_out_text, calibration_text;"
        "held_out_text(); calibration_text(); sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

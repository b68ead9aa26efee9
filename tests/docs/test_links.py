"""What the documentation names is there: links, anchors, paths, recipes, command lines."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import docs_pages as markdown
import pytest
import typer.main
import yaml

from tulle.compression.recipe import METHODS, parse_recipe, recipes_folder
from tulle.methods.train.method import METHODS as TRAINING_METHODS
from tulle.training.plan import planned_method

PAGES = markdown.pages()
LINK = re.compile(r"\]\(([^)\s]+)\)|^\[[^]]+\]: (\S+)$", re.MULTILINE)
CODE = re.compile(r"`([^`\n]+)`")
FOLDERS = ("src", "tests", "native", "benchmarks", "docs", "recipes", "fuzz")
EXERCISES = ("src/tulle/methods/prune/nowag.py",)
"""Files that the reader is told to make."""
ROOM = re.compile(r"^(prune|quantize|activation|train|core|models|engine|format|compression)/\S+$")


def parts(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError as error:
        pytest.fail(f"{command}: {error}")


@pytest.fixture(scope="module")
def commands():
    from tulle.cli.main import app

    return typer.main.get_command(app)


@pytest.mark.parametrize("page", PAGES, ids=markdown.name)
def test_links(page: Path) -> None:
    text = markdown.prose(page.read_text("utf-8"))
    for match in LINK.finditer(text):
        link = match[1] or match[2]
        if re.match(r"\w+:", link):
            continue
        path, _, fragment = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{markdown.name(page)} links to {link}, which does not exist"
        if fragment:
            assert fragment in markdown.anchors(target), f"{markdown.name(page)} links to {link}: no such heading"


def test_documents_named_in_the_code_exist() -> None:
    """Comments, docstrings and recipes name pages of the documentation by their path."""
    for folder in ("src", "native", "recipes", "tests", "benchmarks", "fuzz"):
        for file in (markdown.ROOT / folder).rglob("*"):
            if file.suffix in (".py", ".hpp", ".cpp", ".inl", ".c", ".yaml", ".md") and file != Path(__file__):
                for page in re.findall(r"(?<![\w/.])docs/[\w/-]+\.md", file.read_text("utf-8", errors="replace")):
                    assert (markdown.ROOT / page).exists(), f"{markdown.name(file)} names {page}, which does not exist"


def test_every_page_is_reached() -> None:
    """From the README and the site's first page, by links."""
    reached, todo = set(), [markdown.ROOT / "README.md", markdown.ROOT / "docs" / "index.md"]
    while todo:
        page = todo.pop()
        if page in reached:
            continue
        reached.add(page)
        for match in LINK.finditer(markdown.prose(page.read_text("utf-8"))):
            target = (page.parent / (match[1] or match[2]).partition("#")[0]).resolve()
            if target.suffix == ".md" and target.exists():
                todo.append(target)
    assert set(PAGES) <= reached, f"no link leads to {sorted(map(markdown.name, set(PAGES) - reached))}"


@pytest.mark.parametrize("page", PAGES, ids=markdown.name)
def test_paths(page: Path) -> None:
    """Paths in backticks: from the repository's root, or from a room of ``src/tulle`` or ``src/tulle/methods``."""
    for code in CODE.findall(markdown.prose(page.read_text("utf-8"))):
        code = code.removesuffix(":").split("::")[0].split(", ")[0]
        if code in EXERCISES or any(mark in code for mark in ("*", "…", "NAME", "{", "(", "<", " ")):
            continue
        if code.split("/")[0] in FOLDERS and "/" in code:
            assert (markdown.ROOT / code).exists(), f"{markdown.name(page)} names {code}, which does not exist"
        elif ROOM.match(code) and Path(code).suffix:
            places = [markdown.ROOT / "src/tulle" / code, markdown.ROOT / "src/tulle/methods" / code]
            assert any(place.exists() for place in places), f"{markdown.name(page)} names {code}, in neither place"


def test_every_benchmark_is_listed() -> None:
    """Scripts in benchmarks/README.md are there, and those that one can run are listed."""
    folder = markdown.ROOT / "benchmarks"
    listed = set(re.findall(r"`(\w+\.py)`", (folder / "README.md").read_text("utf-8")))
    scripts = {file.name for file in folder.glob("*.py")}
    run = {name for name in scripts if "ArgumentParser(" in (folder / name).read_text("utf-8")}
    assert listed <= scripts
    assert run - listed <= {"speed_worker.py", "synthetic.py", "gguf_model.py"}  # parts of others


def every_command() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        text = page.read_text("utf-8")
        inline = [c for c in CODE.findall(markdown.prose(text)) if c.startswith("tulle ")]
        for line in [*markdown.shell_lines(text), *inline]:
            line = re.sub(r"^(\w+=\S+ )+", "", line)
            if line.startswith("tulle ") and "…" not in line:
                found.append((markdown.name(page), line))
    return found


@pytest.mark.parametrize(("page", "line"), every_command())
def test_command_lines(page: str, line: str, commands) -> None:
    """The command exists, and so do its options; every one that needs a value has one."""
    group, words = commands, parts(line)[1:]
    while hasattr(group, "commands") and words and not words[0].startswith("-"):
        assert words[0] in group.commands, f"{page}: no command {words[0]!r} in {line!r}"
        group, words = group.commands[words[0]], words[1:]
    if hasattr(group, "commands"):
        assert words in ([], ["--help"], ["--version"]), f"{page}: {line!r} names no command"
        return
    options = {o: p for p in group.params for o in (*p.opts, *p.secondary_opts) if o.startswith("-")}
    while words:
        word = words.pop(0)
        if word.startswith("-") and word != "-":
            option, equals, _ = word.partition("=")
            assert option in (*options, "--help", "--debug"), f"{page}: {line!r} has no option {option}"
            if option in options and not options[option].is_flag and not equals and words:
                words.pop(0)


@pytest.mark.parametrize("page", PAGES, ids=markdown.name)
def test_recipes_exist(page: Path) -> None:
    """Names behind ``-r``, in tables of recipes, and paths into ``recipes/``."""
    text = page.read_text("utf-8")
    known = {path.stem for path in recipes_folder().glob("*.yaml")}
    for line in markdown.shell_lines(text):
        if not line.startswith("tulle "):
            continue
        words = parts(line)
        for flag in ("-r", "--recipe"):
            if flag in words:
                recipe = words[words.index(flag) + 1]
                assert recipe == "RECIPE" or recipe.endswith(".yaml") or recipe in known, f"{line}: no such recipe"
        for word in words:
            if word.startswith("recipes/"):
                assert (markdown.ROOT / word).exists(), f"{line}: no such recipe"
    for table in re.findall(r"^\| recipe.*\n\|[-| ]+\n((?:\|.*\n)+)", text, re.MULTILINE):
        for row in table.splitlines():
            for code in CODE.findall(row.split("|")[1]):
                stem = Path(code).stem.removesuffix("*").removesuffix("-")
                assert any(name.startswith(stem) for name in known), f"{markdown.name(page)}: no recipe {code}"


def test_steps_of_the_methods_page_parse() -> None:
    """Every step that docs/methods.md shows is one, and every method has a row."""
    text = (markdown.ROOT / "docs" / "methods.md").read_text("utf-8")
    shown: set[str] = set()
    for code in CODE.findall(text):
        match = re.match(r"^(\w+): (\{.*\})$", code)
        if not match or "…" in code:
            continue
        content = yaml.safe_load(code)
        shown.add(match[1])
        if match[1] in METHODS:
            needs = {"owl": "wanda: {sparsity: 0.5}", "allocate": "wanda: {sparsity: 0.5}"}
            needs |= {"activation_budget": "teal: {share: 0.5}", "allocate_bits": "gptq: {}"}
            before = ["wanda: {sparsity: 0.5}"] if match[1] == "reconstruct" else []
            after = [needs[match[1]]] if match[1] in needs else []
            parse_recipe({"steps": [*map(yaml.safe_load, before), content, *map(yaml.safe_load, after)]})
        elif match[1] in TRAINING_METHODS:
            planned_method(content)
    missing = (set(METHODS) | set(TRAINING_METHODS)) - shown
    assert not missing, f"docs/methods.md shows no step for {sorted(missing)}"


@pytest.mark.parametrize("page", PAGES, ids=markdown.name)
def test_recipes_shown_in_full_parse(page: Path) -> None:
    for language, content in markdown.blocks(page.read_text("utf-8")):
        if language == "yaml" and content.startswith(("name:", "description:")):
            parse_recipe(yaml.safe_load(content))


@pytest.mark.parametrize("page", PAGES, ids=markdown.name)
def test_no_machine_paths(page: Path) -> None:
    home = os.path.expanduser("~")
    text = page.read_text("utf-8")
    assert not re.search(r"(?<![\w.])/(?:work|root|home|tmp)/", text) and home + "/" not in text

"""Writes what docs/reference takes from the code, between ``<!-- generated: NAME -->`` and ``<!-- end -->``.

    python docs/generate.py            # writes
    python docs/generate.py --check    # exits with 1 where a page is not as it would be written

Settings, types, defaults and explanations are those of the dataclasses and pydantic models themselves.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic_core import PydanticUndefined

REFERENCE = Path(__file__).parent / "reference"
MARKED = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- end -->\n)", re.DOTALL)


def plain(text: str) -> str:
    """Docstring markup as Markdown, in one line that fits into a table's cell."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("``", "`")
    return " ".join(text.split()).replace("|", "\\|")


def field_notes(cls: type) -> dict[str, str]:
    """The string below each field of a class and its bases, by field name."""
    notes: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        except (OSError, TypeError):
            continue
        statements = body.body if isinstance(body, ast.ClassDef) else []
        for before, after in zip(statements, statements[1:], strict=False):
            named = isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name)
            if named and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                notes[before.target.id] = plain(str(after.value.value))
    return notes


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def shown(value: Any) -> str:
    """A default as it stands in YAML."""
    if value is dataclasses.MISSING or value is PydanticUndefined:
        return "required"
    value = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()
    return f"`{text}`"


def type_name(annotation: Any) -> str:
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(map(type_name, get_args(annotation)))
    if annotation is type(None):
        return "null"
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    if not isinstance(annotation, str) and "[" in str(annotation) or " | " in str(annotation):
        text = str(annotation)
    text = re.sub(r"\b(typing|tulle(\.\w+)*)\.", "", text)
    text = re.sub(r"Literal\[(.*?)\]", lambda m: m[1].replace("'", "").replace('"', "").replace(", ", " or "), text)
    return text.replace(" | None", " or null").replace("None", "null").replace("|", "or")


def pydantic_rows(cls: Any) -> Iterable[tuple[str, ...]]:
    notes = field_notes(cls)
    for name, field in cls.model_fields.items():
        default = [] if field.default_factory else field.default
        yield f"`{name}`", type_name(cls.__annotations__.get(name, "")), shown(default), notes.get(name, "")


def dataclass_rows(cls: Any, left_out: tuple[str, ...] = ()) -> Iterable[tuple[str, ...]]:
    notes = field_notes(cls)
    for field in dataclasses.fields(cls):
        if field.init and field.name not in left_out:
            # A name that stands for a union or a choice says less than what it stands for.
            alias = next((vars(sys.modules[c.__module__]).get(str(field.type)) for c in cls.__mro__
                          if field.name in vars(c).get("__annotations__", {})), None)  # fmt: skip
            kind = alias if get_origin(alias) is not None else field.type
            yield f"`{field.name}`", type_name(kind), shown(field.default), notes.get(field.name, "")


KEYS = ("key", "type", "default", "meaning")


def calibration() -> str:
    from tulle.compression.recipe import Calibration

    return table(KEYS, pydantic_rows(Calibration))


def recover() -> str:
    from tulle.compression.recipe import Recover

    return table(KEYS, pydantic_rows(Recover))


def where(cls: type) -> str:
    return "src/" + cls.__module__.replace(".", "/") + ".py"


def method_sections(methods: dict[str, Any], left_out: tuple[str, ...] = ()) -> str:
    """A section per method: the first sentence of its file, where it is, its settings."""
    parts = []
    for name, cls in methods.items():
        summary = plain(inspect.getdoc(cls) or "").split(". ")[0].rstrip(".")
        paper = plain((sys.modules[cls.__module__].__doc__ or "").split("\n\n")[0])
        rows = list(dataclass_rows(cls, left_out))
        lines = [f"### `{name}`\n\n", textwrap.fill(f"{summary}.", 99) + "\n\n", textwrap.fill(paper, 99) + "\n\n"]
        lines += [f"File: `{where(cls)}`\n\n", table(KEYS, rows) if rows else "No settings.\n"]
        parts.append("".join(lines))
    return "\n".join(parts)


def steps() -> str:
    from tulle.compression.recipe import METHODS, STAGES, method_class

    classes = {name: method_class(name) for name in METHODS}
    stages = {name: cls.stages[0] for name, cls in classes.items()}
    ordered = sorted(classes, key=lambda name: STAGES.index(stages[name]))
    rows = [(f"[`{name}`](#{name})", " and ".join(classes[name].stages)) for name in ordered]
    listed = table(("step", "acts on"), rows)
    return f"{listed}\n{method_sections({name: classes[name] for name in ordered})}"


def training_methods() -> str:
    from tulle.methods.train.method import METHODS, method_class

    return method_sections({name: method_class(name) for name in METHODS}, ("targets",))


def training_keys() -> str:
    from tulle.training import recipe

    known = [cls for cls in vars(recipe).values() if hasattr(cls, "model_fields")]
    sections = {
        "The recipe": recipe.TrainRecipe,
        "`model`": next(cls for cls in known if "num_key_value_heads" in cls.model_fields),
        "`data`": recipe.Data,
        "A source": recipe.Source,
        "`training`": recipe.Training,
        "A stage": recipe.Stage,
    }
    return "\n".join(f"### {title}\n\n{table(KEYS, pydantic_rows(cls))}" for title, cls in sections.items())


def shipped() -> str:
    from tulle.compression.recipe import recipes_folder
    from tulle.compression.recipe import shipped as names

    parts = []
    for name in names():
        content = yaml.safe_load((recipes_folder() / f"{name}.yaml").read_text(encoding="utf-8"))
        text = (recipes_folder() / f"{name}.yaml").read_text(encoding="utf-8")
        steps = text[text.index("steps:") :].strip()
        parts.append(f"### `{name}`\n\n{textwrap.fill(content['description'], 99)}\n\n```yaml\n{steps}\n```\n")
    return "\n".join(parts)


def commands() -> str:
    import typer

    from tulle.cli.main import app

    return "\n".join(command_sections(typer.main.get_command(app), "tulle"))


def command_sections(group: Any, path: str) -> Iterable[str]:
    for name, command in group.commands.items():
        full = f"{path} {name}"
        if hasattr(command, "commands"):
            yield from command_sections(command, full)
            continue
        text, _, example = inspect.cleandoc(command.help or "").partition("Example:")
        paragraphs = [textwrap.fill(plain(part), 99) for part in text.strip().split("\n\n")]
        arguments = [p.metavar or p.name.upper() for p in command.params if p.param_type_name == "argument"]
        usage = " ".join([full, *arguments, "[OPTIONS]"])
        lines = [f"## {full}\n", *(f"{p}\n" for p in paragraphs), f"```\n{example.strip()}\n```\n"]
        rows = []
        for parameter in command.params:
            if parameter.param_type_name == "argument" or parameter.name == "help":
                continue
            names = ", ".join(f"`{n}`" for n in (*parameter.opts, *parameter.secondary_opts))
            default = parameter.default
            default = default() if callable(default) else default
            flag = getattr(parameter, "is_flag", False)
            worth = not flag and default not in (None, "", [], ()) and "Sentinel" not in repr(default)
            rows.append((names, f"`{default}`" if worth else "", plain(parameter.help or "")))
        yield "\n".join([lines[0], f"Usage: `{usage}`\n", *lines[1:], table(("option", "default", "meaning"), rows)])


NEEDED: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 6},
    "gemma4_text": {"num_kv_shared_layers": 10},
    "glm4_moe": {"head_dim": 128},
    "granitemoehybrid": {"num_hidden_layers": 2, "layer_types": ["mamba", "attention"]},
    "lfm2": {"full_attn_idxs": [2]},
    "nemotron_h": {"hybrid_override_pattern": "M-*-"},
}
"""Keys without which a family's defaults are no model, or none that people use."""


def model_families() -> str:
    """A row per family: what its file says first, what is special, which rotations and exports it takes."""
    from tulle.engine.runnable import FEATURES
    from tulle.models.description import describe, families
    from tulle.models.features import features
    from tulle.models.gguf.families import FAMILIES, WRITTEN
    from tulle.models.rewrite import NOT_ROTATED

    read = {family.model_type for family in FAMILIES} | {"qwen3_next"}  # as Qwen 3.5, the same function
    rows = []
    for family in families():
        decoder = describe({"model_type": family} | NEEDED.get(family, {}))
        module = importlib.import_module(f"tulle.models.families.{family}")
        special = features(decoder)
        name = re.split("[:,]", plain(module.__doc__ or ""))[0]
        can = (not special.keys() & NOT_ROTATED.keys(), special.keys() <= FEATURES)
        answers = ["yes" if one else "no" for one in (*can, family in WRITTEN)]
        if answers[-1] == "no" and family in read:
            answers[-1] = "read"
        rows.append((f"`{family}`", name, "; ".join(special) or "nothing", *answers))
    return table(("model_type", "family", "beyond Llama's layout", "rotation", "engine", "GGUF"), rows)


def agreement() -> str:
    """A row per family of `benchmarks/families.py`'s last run."""
    cells = json.loads((REFERENCE.parents[1] / "benchmarks" / "results" / "families.json").read_text())["cells"]
    forms = ("dense", "w4a16", "sparse50-w4")
    rows = [(f"`{family}`", *(f"{found[form]:.1e}" for form in forms)) for family, found in sorted(cells.items())]
    return table(("model_type", *forms), rows)


PARTS: dict[str, Callable[[], str]] = {
    "families": model_families,
    "agreement": agreement,
    "calibration": calibration,
    "recover": recover,
    "steps": steps,
    "shipped": shipped,
    "training-keys": training_keys,
    "training-methods": training_methods,
    "commands": commands,
}


def generated(text: str) -> str:
    """A page with its generated parts as the code says now."""
    return MARKED.sub(lambda found: f"{found[1]}\n{PARTS[found[2]]()}\n{found[3]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for page in sorted(REFERENCE.glob("*.md")):
        before = page.read_text(encoding="utf-8")
        after = generated(before)
        if after != before:
            stale.append(page.name)
            if not check:
                page.write_text(after, encoding="utf-8")
    print(f"stale: {', '.join(stale)}" if stale else "nothing to do")
    sys.exit(1 if check and stale else 0)


if __name__ == "__main__":
    main()

"""Recipes: typed YAML, an ordered list of steps with targets by role.

::

    name: sparse50-w4
    calibration: {samples: 128, length: 2048, target: stream}
    steps:
      - sparsegpt: {sparsity: 0.5}
      - gptq: {bits: 4, group_size: 128, targets: [qkv, gate_up]}

Every step is one method of ``METHODS`` with its settings; ``targets`` (default: every role) says which linears it is
applied to. ``embedding`` and ``head`` are targets only where a quantiser names them. Unknown keys are refused with the
nearest valid name, and so are two steps that settle one thing of one role (two quantisers, say): the second would work
on what the first one left.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import itertools
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

import tulle
from tulle.errors import UserError
from tulle.methods.contract import Decision, Method, Stage
from tulle.models.description import ROLES, TABLES, target_of

METHODS: dict[str, str] = {
    "magnitude": "tulle.methods.prune.magnitude:Magnitude",
    "wanda": "tulle.methods.prune.wanda:Wanda",
    "ria": "tulle.methods.prune.ria:RIA",
    "sparsegpt": "tulle.methods.prune.sparsegpt:SparseGPT",
    "alps": "tulle.methods.prune.alps:ALPS",
    "reconstruct": "tulle.methods.prune.reconstruct:Reconstruct",
    "permute_channels": "tulle.methods.prune.permute_channels:PermuteChannels",
    "owl": "tulle.methods.prune.owl:OWL",
    "allocate": "tulle.methods.prune.allocate:Allocate",
    "round_to_nearest": "tulle.methods.quantize.round_to_nearest:RoundToNearest",
    "gptq": "tulle.methods.quantize.gptq:GPTQ",
    "activations": "tulle.methods.quantize.activations:Activations",
    "kv_cache": "tulle.methods.quantize.kv_cache:KVCache",
    "smoothquant": "tulle.methods.quantize.smoothquant:SmoothQuant",
    "larosa": "tulle.methods.activation.larosa:LaRoSA",
    "quarot": "tulle.methods.quantize.quarot:QuaRot",
    "duquant": "tulle.methods.quantize.duquant:DuQuant",
    "perq": "tulle.methods.quantize.perq:PeRQ",
    "learned_clipping": "tulle.methods.quantize.learned_clipping:LearnedClipping",
    "flatquant": "tulle.methods.quantize.flatquant:FlatQuant",
    "affinequant": "tulle.methods.quantize.affinequant:AffineQuant",
    "spinquant": "tulle.methods.quantize.spinquant:SpinQuant",
    "allocate_bits": "tulle.methods.quantize.allocate_bits:AllocateBits",
    "keep_sensitive": "tulle.methods.quantize.keep_sensitive:KeepSensitive",
    "activation_budget": "tulle.methods.activation.budget:ActivationBudget",
    "teal": "tulle.methods.activation.thresholds:TEAL",
    "wina": "tulle.methods.activation.wina:WINA",
}
"""Step name in a recipe → its settings class, imported when a recipe asks for it."""


MOST_VALUES, DEEPEST = 100_000, 50
"""Of a recipe file."""

STAGES: tuple[Stage, ...] = ("model", "block", "linear", "refine")
"""Order of a recipe's steps (:mod:`tulle.methods.contract`); linear steps may follow a refine step."""


class Calibration(BaseModel):
    """How the calibration activations are made and what the compressed layers are fitted to."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    samples: int = Field(128, ge=1)
    """Sequences."""
    length: int = Field(2048, ge=2)
    """Tokens per sequence at the most; the model's context caps it."""
    target: Literal["layer", "dense", "stream"] = "stream"
    """What a linear's output is fitted to. ``layer``: its own dense weight on the compressed model's inputs. ``dense``:
    the dense model's output of that linear, so that it corrects the error of its inputs. ``stream``: as ``dense``, and
    o and down also correct the error of the residual stream they are added to."""
    target_damping: float = Field(0.01, gt=0)
    """Ridge of that correction, as a share of the mean diagonal of the Hessian."""
    compute: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the blocks compute in; statistics and weights stay in float32. ``auto``: bfloat16 for a checkpoint that is
    stored so, where the machine is fast in it (AVX512-BF16, AMX, a GPU); float32 elsewhere."""
    sequential: bool = True
    """True: the rows of a block are compressed one after the other, each seeing the outputs of those before it.
    False: all rows of a block see the block's dense weights, for fewer forward passes; those of experts still go one
    after the other."""
    expert_tokens: int = Field(512, ge=1)
    """Tokens that every expert of a mixture is shown at least: where the router gives it fewer, those that it would get
    next."""


class Recover(BaseModel):
    """Training after compressing: the compressed model learns from the dense one, masks held
    (:mod:`tulle.training.recover`)."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    tokens: int = Field(2_000_000, ge=1)
    """Tokens to train on; the text is read again where it is shorter."""
    context: int = Field(512, ge=2)
    """Tokens of a window."""
    batch: int = Field(8, ge=1)
    """Windows that run at a time."""
    accumulation: int = Field(1, ge=1)
    """Batches of an optimizer step."""
    rate: float = Field(2e-3, gt=0)
    """AdamW's learning rate at its peak, as a share of every tensor's root mean square; falls to 0 along a cosine."""
    warmup_steps: int = Field(20, ge=0)
    """Optimizer steps over which the rate rises from 0."""
    clip: float = Field(1.0, gt=0)
    """The largest 2-norm of the gradient."""
    train: Literal["codes", "steps"] = "codes"
    """``codes``: weights, which are rounded to their grid in every step. ``steps``: codes stay, and the grids' steps
    are trained; takes a fraction of the memory. Norms and biases are trained with either."""
    kl: float = Field(1.0, ge=0)
    """Weight of KL(p_t ‖ p_s) of the next token's distribution."""
    squarehead: float = Field(1.0, ge=0)
    """Weight of the hidden states' errors, summed over the blocks."""
    cross_entropy: float = Field(0.0, ge=0)
    """Weight of the cross-entropy of the text itself."""
    temperature: float = Field(1.0, gt=0)
    """T, which divides the logits of both models in the KL term."""
    compute: Literal["auto", "float32", "bfloat16"] = "auto"
    """What products are computed in; weights and sums stay in float32. ``auto`` as for the calibration."""
    evaluate_every: int = Field(50, ge=1)
    """Optimizer steps between two points of the curve in the report."""

    @model_validator(mode="after")
    def _something(self) -> Recover:
        if not self.kl + self.squarehead + self.cross_entropy:
            raise ValueError("give kl, squarehead or cross_entropy a weight above 0")
        return self


@dataclasses.dataclass(frozen=True)
class Step:
    name: str
    method: Method
    targets: tuple[str, ...]

    def covers(self, role: str) -> bool:
        """Whether it is meant for a group of linears: those of latent attention go with qkv."""
        return target_of(role) in self.targets

    def to_json(self) -> dict[str, Any]:
        return {self.name: dataclasses.asdict(self.method) | {"targets": list(self.targets)}}  # type: ignore[call-overload]


@dataclasses.dataclass(frozen=True)
class Recipe:
    name: str
    description: str
    calibration: Calibration
    steps: tuple[Step, ...]
    recover: Recover | None = None
    """Training after the steps (:func:`tulle.training.compress.compress`)."""
    then: tuple[Step, ...] = ()
    """Steps on the recovered model."""

    def to_json(self) -> dict[str, Any]:
        """A plain object that :func:`parse_recipe` reads back."""
        recover: dict[str, Any] = {} if self.recover is None else {"recover": self.recover.model_dump()}
        recover |= {"then": [step.to_json() for step in self.then]} if self.then else {}
        return {
            "name": self.name,
            "description": self.description,
            "calibration": self.calibration.model_dump(),
            "steps": [step.to_json() for step in self.steps],
        } | recover

    def stage(self, stage: Stage) -> list[Step]:
        return [step for step in self.steps if stage in step.method.stages]

    def phases(self) -> list[tuple[list[Step], list[Step]]]:
        """The linear steps, and the refine steps after them, as often as the recipe alternates between the two."""
        phases: list[tuple[list[Step], list[Step]]] = [([], [])]
        for step in self.steps:
            if "refine" in step.method.stages:
                phases[-1][1].append(step)
            elif "linear" in step.method.stages:
                if phases[-1][1]:
                    phases.append(([], []))
                phases[-1][0].append(step)
        return phases

    def steps_for(self, role: str, stage: Stage | None = None) -> list[Step]:
        return [s for s in self.steps if s.covers(role) and (stage is None or stage in s.method.stages)]


def read_recipe(recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe) -> Recipe:
    """A recipe from a YAML path, the name of a shipped one, or plain data; one that is read already as it is."""
    if isinstance(recipe, Recipe):
        return recipe
    return parse_recipe(recipe) if isinstance(recipe, Mapping) else load_recipe(recipe)


def load_recipe(recipe: str | os.PathLike[str]) -> Recipe:
    """A recipe from a YAML path or the name of a shipped one. Raises ``UserError``."""
    path = Path(recipe)
    if path.suffix not in (".yaml", ".yml") and not path.exists():
        names = shipped()
        if str(recipe) not in names:
            raise UserError(
                f"expected a YAML file or a shipped recipe ({', '.join(names)}), found {str(recipe)!r}"
                + _nearest(str(recipe), names)
            )
        path = recipes_folder() / f"{recipe}.yaml"
    if not path.exists():
        raise UserError(f"expected a recipe file, found nothing at {path}; shipped recipes: {', '.join(shipped())}")
    return parse_recipe(read_yaml(path), default_name=path.stem)


def read_yaml(path: Path) -> Any:
    """What a YAML file holds: plain data. Raises ``UserError``, also for a few lines whose aliases stand for more than
    :data:`MOST_VALUES` values."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"expected a recipe file, found {path} unreadable ({error}); check the path") from None
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:  # ValueError: no such date
        raise UserError(f"expected YAML in {path}, found no readable YAML: {' '.join(str(error).split())}") from None
    left = MOST_VALUES
    waiting = [(content, 0)]
    while waiting:
        value, depth = waiting.pop()
        left -= 1
        if left < 0 or depth > DEEPEST:
            raise UserError(
                f"expected at most {MOST_VALUES} values, {DEEPEST} deep, in {path}, found more; write out its aliases"
            )
        parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        waiting += [(part, depth + 1) for part in parts] if isinstance(parts, list | tuple | set) else []
    return content


def parse_recipe(content: Any, default_name: str = "recipe") -> Recipe:
    """A recipe from plain data. Raises ``UserError`` naming the key at fault and the nearest valid one."""
    content = _mapping(content, "a recipe")
    _known(content, ("name", "description", "calibration", "steps", "recover", "then"), "recipe")
    steps = content.get("steps")
    if not isinstance(steps, list) or not steps:
        raise UserError(
            f"expected a list of steps in recipe, found {steps!r}; name at least one of {', '.join(METHODS)}"
        )
    settings = _mapping(content.get("calibration") or {}, "calibration")
    _known(settings, Calibration.model_fields, "calibration")
    try:
        calibration = Calibration(**settings)
    except ValidationError as error:
        raise UserError(_first(error, "calibration")) from None
    recover = read_recover(content["recover"]) if content.get("recover") is not None else None
    parsed = _ordered(steps)
    then = _then(content["then"], parsed, recover) if content.get("then") is not None else ()
    return Recipe(
        name=str(content.get("name", default_name)),
        description=" ".join(str(content.get("description", "")).split()),
        calibration=calibration,
        steps=parsed,
        recover=recover,
        then=then,
    )


def _ordered(steps: list[Any]) -> tuple[Step, ...]:
    """Steps in an order in which they can run. Raises ``UserError``."""
    parsed = tuple(_step(step) for step in steps)
    linear = STAGES.index("linear")
    order = [min(STAGES.index(step.method.stages[0]), linear) for step in parsed]
    for before, after in itertools.pairwise(range(len(parsed))):
        if order[after] < order[before]:
            raise UserError(
                f"expected steps on the model first, then on blocks, then on weights, found {parsed[after].name} after "
                f"{parsed[before].name}; put {parsed[after].name} before it"
            )
    first = next((step for step in parsed if STAGES.index(step.method.stages[0]) >= linear), None)
    if first is not None and "refine" in first.method.stages:
        raise UserError(
            f"expected a step that compresses weights before {first.name}, found none; put one in front of it"
        )
    _require_respected(parsed)
    return parsed


def _then(content: Any, steps: tuple[Step, ...], recover: Recover | None) -> tuple[Step, ...]:
    """The steps after recovering. What the first ones have made is read as a dense model with zeros there, so that
    nothing else would stay: raises ``UserError`` where they do more than prune and select inputs by Top-K. Selected
    inputs must be selected again, by a step of ``then``."""
    if recover is None or not isinstance(content, list) or not content:
        raise UserError(
            f"expected then as a list of steps after recover, found {content!r}"
            + ("" if recover else " without recover")
        )
    for step in steps:
        settled = step.method.settles
        selects = settled and settled <= {"selection", "input sparsities"}
        kept = selects and getattr(step.method, "kind", "top_k") == "top_k"
        if not kept and not METHODS[step.name].startswith("tulle.methods.prune."):
            raise UserError(
                "expected steps that prune, or select inputs by Top-K, before recover and then, found "
                f"{step.name}; move it to then, or leave then out"
            )
    then = _ordered(content)
    before, after = (_settled(found)["selection"] for found in (steps, then))
    if missing := sorted(set(before) - set(after)):
        raise UserError(
            f"expected a step of then that selects inputs of {', '.join(missing)} as {steps[before[missing[0]]].name} "
            "does before recover, found none; add that step to then"
        )
    return then


def read_recover(content: Any) -> Recover:
    """The settings of a recipe's ``recover``. Raises ``UserError`` naming the key at fault."""
    settings = _mapping(content, "recover")
    _known(settings, Recover.model_fields, "recover")
    try:
        return Recover(**settings)
    except ValidationError as error:
        raise UserError(_first(error, "recover")) from None


DOES: dict[Decision, str] = {
    "mask": "prunes the weights of {}",
    "codes": "quantises the weights of {}",
    "inputs": "quantises the inputs of {}",
    "cache": "quantises keys and values",
    "smoothing": "smooths the inputs of {}",
    "rotation": "rotates the inputs of {}",
    "clipping": "learns the clipping of {}",
    "order": "orders the input channels of {}",
    "bits": "decides which linears keep bits of {}",
    "grids": "decides bits and groups of {}",
    "sparsities": "decides sparsities of {}",
    "input sparsities": "decides shares of dropped inputs of {}",
    "selection": "selects inputs of {}",
}
"""What a step that settles a decision does, in a message; for a role, where targets matter."""


def _settled(steps: tuple[Step, ...]) -> dict[Decision, dict[str, int]]:
    """Decision → role → number of the step that settles it. Raises ``UserError`` where two steps do."""
    found: dict[Decision, dict[str, int]] = {decision: {} for decision in DOES}
    for number, step in enumerate(steps):
        for decision in sorted(step.method.settles):
            for role in step.method.settled_roles(decision, step.targets):
                first = found[decision].setdefault(role, number)
                if first != number:
                    does = DOES[decision]
                    raise UserError(
                        f"expected one step that {does.format(role)}, found {_both(steps, first, number)}; leave one "
                        "of them out" + (" or give them other targets" if "{}" in does else "")
                    )
    return found


def _both(steps: tuple[Step, ...], first: int, second: int) -> str:
    """The names of two steps; with their numbers where the names are one."""
    names = [steps[number].name for number in (first, second)]
    if names[0] == names[1]:
        names = [f"{name} (step {number + 1})" for name, number in zip(names, (first, second), strict=True)]
    return " and ".join(names)


def _require_respected(steps: tuple[Step, ...]) -> None:
    """Raises ``UserError`` for a role of which something is settled twice, in a wrong order, or in vain."""
    settled = _settled(steps)
    for role, quantiser in settled["codes"].items():
        pruner = settled["mask"].get(role, quantiser)
        if pruner > quantiser:
            raise UserError(
                f"expected {role} to be pruned before it is quantised, found {steps[pruner].name} after "
                f"{steps[quantiser].name}; put {steps[pruner].name} first"
            )
        learner = settled["clipping"].get(role)
        if learner is not None:
            groups = [getattr(steps[number].method, "group_size", None) for number in (learner, quantiser)]
            if groups[0] != groups[1]:
                raise UserError(
                    f"expected one group_size in {steps[learner].name} and {steps[quantiser].name}, which takes what "
                    f"that learns for {role}, found {groups[0]} and {groups[1]}; write the same in both"
                )
    for role, number in settled["input sparsities"].items():
        if role not in settled["selection"]:
            raise UserError(
                f"expected a step that selects inputs of {role}, found none that respects {steps[number].name}; add "
                "one, such as teal: {share: 0.5}, or narrow the targets"
            )
    for role, number in settled["grids"].items():
        codes = settled["codes"].get(role)
        if codes is None or not steps[codes].method.takes_tables:
            raise UserError(
                f"expected a step that quantises {role} on the grids of {steps[number].name}, found none; add one, "
                "such as gptq: {}, with the same targets"
            )
    for role, number in settled["sparsities"].items():
        if not any(role in step.targets and step.method.respects_allocation for step in steps):
            raise UserError(
                f"expected a pruning step with a sparsity on {role}, found none that respects {steps[number].name}; "
                "add one, such as sparsegpt: {sparsity: 0.5} (a pattern N:M cannot vary)"
            )


def method_class(name: str) -> type[Method]:
    """The settings class of a step name. Raises ``UserError`` for an unknown one."""
    if name not in METHODS:
        raise UserError(f"expected a step of {', '.join(METHODS)}, found {name!r}" + _nearest(name, METHODS))
    module, attribute = METHODS[name].split(":")
    return getattr(importlib.import_module(module), attribute)


def recipes_folder() -> Path:
    """The shipped recipes: beside the package when installed, in the checkout when editable."""
    package = Path(tulle.__file__).parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parents[1] / "recipes"


def shipped() -> list[str]:
    """Names of the shipped compression recipes."""
    files = sorted(recipes_folder().glob("*.yaml"))
    # Training recipes live in the same folder; a compression recipe is one with a list of steps.
    return [f.stem for f in files if isinstance(yaml.safe_load(f.read_text(encoding="utf-8")).get("steps"), list)]


def _step(content: Any) -> Step:
    content = _mapping(content, "a step", "such as gptq: {bits: 4}")
    if len(content) != 1:
        raise UserError(
            f"expected one method per step, found {', '.join(map(str, content)) or 'none'}; start each with '- '"
        )
    name, settings = next(iter(content.items()))
    cls = method_class(str(name))
    settings = dict(_mapping(settings or {}, f"the settings of {name}"))
    targets = settings.pop("targets", list(ROLES))
    roles = (*ROLES, *TABLES) if cls.takes_tables else ROLES
    if not isinstance(targets, list) or not targets:
        raise UserError(f"expected targets of {name} as a list of {', '.join(roles)}, found {targets!r}")
    for target in targets:
        if target not in roles:
            raise UserError(
                f"expected targets of {', '.join(roles)} in {name}, found {target!r}" + _nearest(str(target), roles)
            )
    _known(settings, [f.name for f in dataclasses.fields(cls)] + ["targets"], str(name))  # type: ignore[arg-type]
    try:
        method = TypeAdapter(cls).validate_python(settings)
    except ValidationError as error:
        raise UserError(_first(error, str(name))) from None
    return Step(str(name), method, tuple(role for role in roles if role in targets))


def _mapping(content: Any, what: str, example: str = "key: value") -> Mapping[str, Any]:
    if not isinstance(content, Mapping):
        raise UserError(f"expected {what} as a mapping ({example}), found {content!r}")
    return content


def _known(content: Mapping[str, Any], valid: Iterable[str], where: str) -> None:
    valid = list(valid)
    for key in content:
        if key not in valid:
            raise UserError(
                f"expected one of {', '.join(valid)} in {where}, found {str(key)!r}" + _nearest(str(key), valid)
            )


def _nearest(word: str, valid: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(valid), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _first(error: ValidationError, where: str) -> str:
    details = error.errors()
    detail = details[0]
    if len({d["loc"][:1] for d in details}) == 1 and len(details) > 1:  # a union: one error per kind of value
        key = str(detail["loc"][0])
    else:
        key = ".".join(str(part) for part in detail["loc"]) or "settings"
        details = details[:1]
    message = "; ".join(d["msg"].removeprefix("Value error, ") for d in details)
    return f"expected a valid {key} in {where} ({message}), found {detail['input']!r}"

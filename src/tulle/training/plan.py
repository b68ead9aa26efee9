"""What a recipe asks for, worked out before anything is done.

Every stage gets all that it needs to run: where it starts, its own settings, its methods, its compression recipes. What
can be known to fail is refused here, before a file is written.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tulle.compression import recipe as compression
from tulle.errors import UserError
from tulle.methods.train.method import DOES, METHODS, TrainingMethod, method_class
from tulle.training.architecture import Llama, OtherModel
from tulle.training.recipe import Stage, TextData, Training, TrainRecipe, explain

START = "start"
"""What stages and teachers call the model that the recipe starts from."""
DENSE = ("tulle.methods.prune.", "tulle.methods.activation.larosa")
"""Where the compression steps live that leave plain dense weights: those that prune, and one that rotates."""


@dataclass(frozen=True)
class PlannedStage:
    """A stage with everything said."""

    name: str
    source: str | None
    """Where it starts: ``start``, the name of an earlier stage, or a model. None: a new model."""
    prune: compression.Recipe | None
    training: Training
    methods: tuple[TrainingMethod, ...]
    """As the recipe sets them. A stage trains with copies: while they train they hold the model."""
    data: TextData
    compress: compression.Recipe | None

    @property
    def describes(self) -> bool:
        """Its methods leave more than plain weights: the model is packed as they describe it."""
        return any(method.describes for method in self.methods)


@dataclass(frozen=True)
class Plan:
    """A whole run."""

    seed: int
    start: str | None
    """The model to go on from."""
    new: Llama | OtherModel | None
    """The shape of a new model instead, and the size of its vocabulary."""
    vocab_size: int
    stages: tuple[PlannedStage, ...]
    single: bool
    """The recipe names no stages: the only one writes into the run's own folder."""
    record: dict[str, Any]
    """The recipe, for the run's records."""


def make_plan(recipe: TrainRecipe) -> Plan:
    """Raises ``UserError`` for bad settings of stages, methods and compression recipes, and for teachers that cannot
    teach."""
    stages: list[PlannedStage] = []
    before = None if recipe.start is None else START
    for stage in recipe.stages or [Stage(name="train", methods=recipe.methods)]:
        stages.append(_planned(stage, before, recipe))
        before = stage.name
    _check_teachers(stages)
    return Plan(
        seed=recipe.seed,
        start=recipe.start,
        new=recipe.model,
        vocab_size=recipe.data.vocab_size or 0,
        stages=tuple(stages),
        single=not recipe.stages,
        record=recipe.model_dump(mode="json"),
    )


def _planned(stage: Stage, before: str | None, recipe: TrainRecipe) -> PlannedStage:
    try:
        training = Training.model_validate(recipe.training.model_dump() | stage.training)
    except ValidationError as error:
        raise UserError(f"stage {stage.name}: {explain(error, Training)}") from None
    if not training.steps and (training.tokens or not (stage.prune or stage.compress)):
        raise UserError(
            f"expected tokens of stage {stage.name} to cover one step of {training.step_tokens} tokens, found "
            f"{training.tokens}; raise training.tokens"
        )
    planned = PlannedStage(
        name=stage.name,
        source=stage.start or before,
        prune=None if stage.prune is None else compression.read_recipe(stage.prune),
        training=training,
        methods=tuple(map(planned_method, stage.methods)),
        data=stage.data or recipe.data,
        compress=None if stage.compress is None else compression.read_recipe(stage.compress),
    )
    _require_one_each(planned)
    for step in planned.prune.steps if planned.prune else ():
        if not compression.METHODS[step.name].startswith(DENSE):
            raise UserError(
                f"expected pruning steps or larosa in prune, found {step.name}; quantise with compress: after the "
                "training"
            )
    if planned.compress is not None and planned.describes:
        raise UserError(
            f"expected no compress in stage {stage.name}, whose methods quantise or select inputs themselves, found "
            "one; leave it out"
        )
    return planned


def _require_one_each(stage: PlannedStage) -> None:
    """Raises ``UserError`` where two methods do the same to one role: the second would undo the first."""
    found: dict[tuple[str, str], TrainingMethod] = {}
    names = {path.rpartition(":")[2]: name for name, path in METHODS.items()}
    for method in stage.methods:
        for what in sorted(method.settles):
            for role in method.targets:
                first = found.setdefault((what, role), method)
                if first is not method:
                    both = " and ".join(names[type(m).__name__] for m in (first, method))
                    raise UserError(
                        f"expected one method in stage {stage.name} that {DOES[what]} of {role}, found {both}; leave "
                        "one of them out or give them other targets"
                    )


def planned_method(entry: Mapping[str, Any]) -> TrainingMethod:
    """The method of an entry such as ``{"squarehead": {"kl": 1.0}}``."""
    if len(entry) != 1:
        raise UserError(
            f"expected one method per entry of methods, found {', '.join(entry) or 'none'}; start each with '- '"
        )
    ((name, given),) = entry.items()
    settings = TypeAdapter(method_class(name))
    given = given or {}
    valid = sorted(settings.json_schema()["properties"])
    for key in given:
        if key not in valid:
            near = difflib.get_close_matches(key, valid, n=1, cutoff=0.4)
            advice = f"did you mean '{near[0]}'?" if near else f"valid keys: {', '.join(valid)}"
            raise UserError(f"unknown key 'methods.{name}.{key}'; {advice}")
    try:
        return settings.validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"expected 'methods.{name}.{where}' to be valid, found: {first['msg']} (got {first.get('input')!r})"
        ) from None


def _check_teachers(stages: Sequence[PlannedStage]) -> None:
    """Hidden states are compared only in one basis. Raises ``UserError`` for a stage without the teacher that a method
    needs, and for one whose teacher has its residual stream in another basis."""
    # By stage, the stage that last gave the residual stream a new basis; nothing for what comes from elsewhere.
    rotated: dict[str, str] = {}
    for stage in stages:
        rotated[stage.name] = rotated.get(stage.source or "", "")
        if stage.prune and any(step.method.changes_residual_basis(step.targets) for step in stage.prune.steps):
            rotated[stage.name] = stage.name
        for method in stage.methods:
            teacher = getattr(method, "teacher", None)
            if teacher == "":
                raise UserError(
                    f"expected a teacher for stage {stage.name}, found none; name a folder, 'start' or an earlier stage"
                )
            if teacher is not None and rotated.get(teacher, "") != rotated[stage.name]:
                raise UserError(
                    f"expected a teacher for stage {stage.name} with its residual stream in the student's basis, found "
                    f"{teacher!r}, not rotated or permuted as in stage {rotated[stage.name] or teacher}; rotate in a "
                    "stage of its own (tokens: 0) and name that as the teacher"
                )

"""Sparse or densified, in tiles or input-major: which layout of a model this machine reads faster.

A sparse layout reads fewer bytes and spends more instructions on each. Where weights come from memory, that pays; where
a whole model fits into the caches, dense codes are faster. Input-major, inputs that a token leaves out are not read,
but memory gives short runs slower than a stream. So all candidates are tried: as many copies of the first block as the
model has blocks, or as fill SAMPLE bytes, decode a few tokens in each layout.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tulle import _native
from tulle.engine.checkpoint import Source, StoredLinear
from tulle.engine.files import json_object
from tulle.engine.layout import ModelLayout
from tulle.engine.native_model import LinearFacts, Model, consecutive_pages, copied, nbytes
from tulle.engine.prepare import HEADS, LAYOUT, cache_folders, convert
from tulle.engine.settings import settings_of
from tulle.errors import UserError
from tulle.models.description import Mixture

AUTO = "auto"
LAYOUTS = (AUTO, *ModelLayout)

SAMPLE = 1 << 29
"""Bytes of weights; more than any cache holds."""
ROUNDS, TOKENS = 5, 4
CONTEXT = 64
CHOICES = "layouts.json"


class _Arrays:
    """Tensors in memory."""

    def __init__(self, arrays: dict[str, NDArray[Any]]):
        self._arrays = arrays

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def tensor(self, name: str) -> NDArray[Any]:
        return self._arrays[name]


class FirstBlock(Source):
    """A checkpoint's first block: of a mixture of experts as many as a token has, all of which a router chooses that
    gives them equal scores. So a token reads what it reads of the whole model, and no more is in memory."""

    def __init__(self, source: Source):
        vars(self).update(vars(source))
        first = source.description.layers[0]
        self._router = ""
        if not isinstance(first.feed_forward, Mixture):
            return
        router = first.feed_forward.router
        one = replace(router, experts=router.chosen, correction=None, groups=1, chosen_groups=1, group_best=1)
        first = replace(
            first,
            feed_forward=replace(first.feed_forward, router=one),
            experts=first.experts[: router.chosen],
        )
        self._router = first.prefix + router.linear.name
        self.description = replace(source.description, layers=(first, *source.description.layers[1:]))
        self.groups = [[tuple(first.prefix + name for name in group.names) for group in first.all_groups()]]
        self.shapes = source.shapes | {self._router: (router.chosen, first.hidden)}
        self.biased = source.biased - {self._router}

    def linear(self, name: str) -> StoredLinear:
        if name == self._router:
            return StoredLinear(np.zeros(self.shapes[name], np.float32))
        return super().linear(name)


def choose_layout(source: Source, layout: str, head: str, engine_bits: int, threads: int) -> ModelLayout:
    """``layout`` is one of LAYOUTS. What ``auto`` finds out is kept per CPU, instruction set and number of threads."""
    check_layout(layout)
    if head not in HEADS:
        raise UserError(f"expected a head of {', '.join(HEADS)}, found {head!r}")
    if layout != AUTO:
        return ModelLayout(layout)
    candidates = layouts_for(source)
    if len(candidates) == 1:
        return candidates[0]
    key = f"{LAYOUT} {_cpu()} {_native.active_isa()} {threads} {engine_bits} {head} {source.identity()}"
    for folder in cache_folders(source):
        known = json_object(folder / CHOICES).get(key)
        if isinstance(known, dict) and known.get("layout") in candidates:
            return ModelLayout(known["layout"])
    models = {}
    first = FirstBlock(source)
    for name in candidates:
        facts: dict[str, LinearFacts] = {}
        arrays: dict[str, NDArray[Any]] = {}
        for linear, found, tensors in convert(first, head, name, [0]):
            facts[linear] = found
            arrays |= {f"{linear}.{suffix}": tensor for suffix, tensor in tensors.items()}
        models[name] = settings_of(first, _Arrays(arrays), facts, engine_bits, range(1))
    chosen, seconds = faster(models, len(source.description.layers), threads, _native.Engine)
    for folder in cache_folders(source):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            content = json_object(folder / CHOICES) | {key: {"layout": chosen, "seconds_per_token": seconds}}
            partial = folder / f"{CHOICES}.{os.getpid()}.partial"
            partial.write_text(json.dumps(content, indent=2))
            os.replace(partial, folder / CHOICES)
            break
        except OSError:
            continue  # it is tried again next time
    return chosen


def check_layout(layout: str) -> None:
    """Raises ``UserError`` for a name that is none of LAYOUTS."""
    if layout in LAYOUTS:
        return
    earlier = {"columns": ModelLayout.INPUT_MAJOR, "dense columns": ModelLayout.DENSE_INPUT_MAJOR}.get(layout)
    hint = f"; its name is {earlier} now" if earlier else ""
    raise UserError(f"expected a layout of {', '.join(LAYOUTS)}, found {layout!r}{hint}")


def layouts_for(source: Source) -> list[ModelLayout]:
    """What ``auto`` chooses from."""
    specs = [spec for name, spec in source.specs.items() if name in source.shapes]
    pruned = any(spec.sparse for spec in specs)
    found = [ModelLayout.SPARSE, *([ModelLayout.DENSE] if pruned else [])]
    codes = [spec for spec in specs if spec.bits is not None]
    if any(spec.input_sparsity is not None or spec.bits == 2 for spec in codes):
        found.append(ModelLayout.INPUT_MAJOR)
        if any(spec.sparse for spec in codes):
            found.append(ModelLayout.DENSE_INPUT_MAJOR)
    return found


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "")
    except OSError:
        import platform

        return platform.processor()


def faster(
    models: Mapping[ModelLayout, Model], layers: int, threads: int, engine: Callable[..., Any]
) -> tuple[ModelLayout, dict[ModelLayout, float]]:
    """The layout of the faster model, and seconds per token of each.

    ``models``: of one block, as the native engine takes them; ``engine`` is that engine.
    """
    built, tables = {}, consecutive_pages(1, CONTEXT)
    for layout, one in models.items():
        block = one.layers[0]
        count = min(layers, max(1, SAMPLE // max(nbytes(block), 1)))
        # Copies, so that each block is read from bytes of its own, as in the model.
        blocks = [copied(block) for _ in range(count)]
        built[layout] = engine(replace(one, layers=blocks), tables.size, 1, CONTEXT, 1, "f32", threads)
    logits = np.empty((0, next(iter(models.values())).vocabulary), np.float32)
    zero, none = np.zeros(1, np.int32), np.zeros(0, np.int32)
    seconds: dict[ModelLayout, list[float]] = {layout: [] for layout in built}
    for number in range(ROUNDS + 1):
        for layout, found in built.items():
            begun = time.perf_counter()
            for position in range(TOKENS):
                found.forward(zero, zero, np.full(1, position, np.int32), tables, none, logits)
            if number:
                seconds[layout].append((time.perf_counter() - begun) / TOKENS)
    # Other work on the machine only adds time, and what is chosen now is kept.
    least = {layout: min(times) for layout, times in seconds.items()}
    return min(least, key=least.__getitem__), least

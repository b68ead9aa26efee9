"""Sparse or filled up, in tiles or by columns: which layout of a model this machine reads faster.

A sparse layout reads fewer bytes and spends more instructions on each. Where weights come from memory, that pays; where
a whole model fits into the caches, dense codes are faster. By columns, inputs that a token leaves out are not read, but
memory gives pieces slower than a stream. So all that come into question are tried: as many copies of the first block as
the model has blocks, or as fill SAMPLE bytes, decode a few tokens in each layout.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tulle import _native
from tulle.engine.files import json_object
from tulle.engine.prepare import HEADS, LAYOUT, Source, cache_folders, convert_head, convert_linears, together
from tulle.engine.settings import settings_of
from tulle.errors import UserError

LAYOUTS = ("auto", "sparse", "dense", "columns", "dense columns")
"""Pruned weights left out or filled up, in tiles or by columns."""

SAMPLE = 1 << 29
"""Bytes of weights; more than any cache holds."""
ROUNDS, TOKENS = 5, 4
CHOICES = "layouts.json"


class _Arrays:
    """Tensors in memory."""

    def __init__(self, arrays: dict[str, NDArray[Any]]):
        self._arrays = arrays

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def tensor(self, name: str) -> NDArray[Any]:
        return self._arrays[name]


def choose_layout(source: Source, layout: str, head: str, unquantised: int, threads: int) -> str:
    """One of LAYOUTS but auto. What ``auto`` finds out is remembered per CPU, instruction set and number of threads."""
    if layout not in LAYOUTS:
        raise UserError(f"expected a layout of {', '.join(LAYOUTS)}, found {layout!r}")
    if head not in HEADS:
        raise UserError(f"expected a head of {', '.join(HEADS)}, found {head!r}")
    if layout != "auto":
        return layout
    candidates = layouts_for(source)
    if len(candidates) == 1:
        return candidates[0]
    key = f"{LAYOUT} {_cpu()} {_native.active_isa()} {threads} {unquantised} {head} {source.identity()}"
    for folder in cache_folders(source):
        known = json_object(folder / CHOICES).get(key)
        if isinstance(known, dict) and known.get("layout") in candidates:
            return str(known["layout"])
    settings = {}
    for name in candidates:
        facts: dict[str, Any] = {}
        arrays: dict[str, NDArray[Any]] = {}
        parts = [(ns[0], *convert_linears(source, ns, name)) for ns in together(source, name, [0])]
        for n, found, tensors in [*parts, ("head", *convert_head(source, head))]:
            facts[n] = found
            arrays |= {f"{n}.{suffix}": tensor for suffix, tensor in tensors.items()}
        settings[name] = settings_of(source, _Arrays(arrays), facts, unquantised, range(1))
    chosen, seconds = faster(settings, source.anatomy.layers, threads, _native.Engine)
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


def layouts_for(source: Source) -> list[str]:
    """What ``auto`` chooses from."""
    specs = list(source.packed.linears.values()) if source.packed else []
    found = ["sparse"]
    if any(spec.sparse for spec in specs):
        found.append("dense")
    codes = [spec for spec in specs if spec.bits is not None]
    if any(spec.input_sparsity is not None or spec.bits == 2 for spec in codes):
        found += ["columns"] + ["dense columns"] * any(spec.sparse for spec in codes)
    return found


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "")
    except OSError:
        import platform

        return platform.processor()


def faster(
    settings: Mapping[str, Mapping[str, Any]], layers: int, threads: int, engine: Callable[..., Any]
) -> tuple[str, dict[str, float]]:
    """The name of the faster settings, and seconds per token of each.

    ``settings``: per name those of a model of one block, as the native engine takes them; ``engine`` is that engine.
    """
    built = {}
    for name, one in settings.items():
        block = one["layers"][0]
        count = min(layers, max(1, SAMPLE // max(_bytes(block), 1)))
        # Copies, so that each block is read from bytes of its own, as in the model.
        model = dict(one) | {"layers": [_copied(block) for _ in range(count)]}
        built[name] = engine(model, 1, 64, 1, "f32", threads)
    vocabulary = next(iter(settings.values()))["vocabulary"]
    logits = np.empty((0, vocabulary), np.float32)
    zero, none = np.zeros(1, np.int32), np.zeros(0, np.int32)
    seconds: dict[str, list[float]] = {name: [] for name in built}
    for number in range(ROUNDS + 1):
        for name, found in built.items():
            begun = time.perf_counter()
            for position in range(TOKENS):
                found.forward(zero, zero, np.full(1, position, np.int32), none, logits)
            if number:
                seconds[name].append((time.perf_counter() - begun) / TOKENS)
    # Other work on the machine only adds time, and what is chosen now is remembered.
    least = {name: min(times) for name, times in seconds.items()}
    return min(least, key=least.__getitem__), least


def _bytes(block: Any) -> int:
    if isinstance(block, np.ndarray):
        return block.nbytes
    if isinstance(block, Mapping):
        return sum(map(_bytes, block.values()))
    return sum(map(_bytes, block)) if isinstance(block, list) else 0


def _copied(block: Any) -> Any:
    if isinstance(block, np.ndarray):
        return block.copy()
    if isinstance(block, Mapping):
        return {key: _copied(value) for key, value in block.items()}
    return [_copied(value) for value in block] if isinstance(block, list) else block

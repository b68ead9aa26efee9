"""Composes methods: checkpoint + recipe → packed checkpoint + report, block by block.

Everything is built under ``OUT.partial``: ``model/`` gets one shard per block, ``work/`` holds the hidden states and
``state.json``. A block counts once ``state.json`` names the next one; it is replaced last and atomically, so a run
killed anywhere continues at the last finished block and ends with the same bytes. ``model/`` becomes ``OUT`` in one
rename, so that nothing half-written ever stands where a model is expected.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import json
import shutil
import sys
import time
import types
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from tulle import machine
from tulle.calibrate import BlockResult, Walker, batched
from tulle.core.contract import LinearState, Progress
from tulle.errors import UserError
from tulle.format.pack import f32_to_bf16, pack_linear
from tulle.format.spec import LinearSpec, QuantizationConfig
from tulle.models.anatomy import Anatomy
from tulle.models.checkpoint import (
    Checkpoint,
    companions,
    read_json,
    require_finite,
    write_index,
    write_shard,
    write_text,
)
from tulle.models.hub import local_folder
from tulle.models.skeleton import load_config
from tulle.recipe import Recipe, load_recipe, parse_recipe
from tulle.texts import Text, read_text, sequences

Finish = Callable[[Path, dict[str, Any]], None]
"""``finish(folder, report)``: may evaluate the finished model and add to the report before ``OUT`` appears."""


def compress(
    model: str | Path,
    recipe: str | Path | dict[str, Any] | Recipe,
    output: str | Path,
    *,
    calibration: Text | Sequence[str | Path] | None = None,
    separator: str | None = None,
    documents: tuple[int, int] | None = None,
    min_chars: int = 1,
    samples: int | None = None,
    length: int | None = None,
    device: str = "cpu",
    seed: int = 0,
    resume: bool = False,
    progress: Progress | None = None,
    finish: Finish | None = None,
) -> dict[str, Any]:
    """Compresses ``model`` by ``recipe`` into the folder ``output`` and returns its report (``OUT/report.json``).

    ``calibration``: text files, JSONL files, folders or ``datasets`` names (see :func:`tulle.texts.read_text` for
    ``separator``, ``documents`` and ``min_chars``), or a ready :class:`Text`; None takes the source of the installed
    standard library. ``samples`` and ``length`` (tokens) override the recipe's. Two runs with one seed write the same
    bytes (on one machine, with one number of threads); the report differs in its times. Raises ``UserError`` for bad
    input, before anything is written wherever that can be known.
    """
    begun = time.perf_counter()
    torch.manual_seed(seed)
    _require_device(device)
    chosen = (
        recipe
        if isinstance(recipe, Recipe)
        else parse_recipe(recipe)
        if isinstance(recipe, dict)
        else load_recipe(recipe)
    )
    folder = local_folder(model)
    checkpoint = Checkpoint.open(folder)
    if "quantization_config" in checkpoint.config:
        raise UserError(
            f"expected an unquantised checkpoint, found quantization_config in {folder.name}; give the original model"
        )
    anatomy = checkpoint.anatomy()
    config = load_config(folder)
    for step in chosen.steps:
        for row in anatomy.rows:
            if row.role in step.targets:
                for name in row.linears:
                    step.method.validate(name, anatomy.linear_shape(name))
    text = _calibration_text(calibration, separator, documents, min_chars)
    context = int(getattr(config, "max_position_embeddings", None) or chosen.calibration.length)
    wanted = samples or chosen.calibration.samples
    tokens = sequences(text, _tokenizer(folder), min(length or chosen.calibration.length, context), wanted, seed)
    _require_vocabulary(tokens, anatomy)
    source = {
        "source": list(text.source),
        "samples": len(tokens),
        "tokens": sum(map(len, tokens)),
        "length": max(map(len, tokens)),
    }
    run = _Run(checkpoint, anatomy, chosen, Path(output), _fingerprint(checkpoint, chosen, tokens, seed))
    with run.claimed(resume) as state:
        if state is None:
            return read_json(run.output / "report.json", "a report")
        batches = batched(tokens)
        walker = Walker(config, anatomy, chosen, batches, run.work, device, progress)
        run.require_space(4 * sum(b.tokens.numel() for b in batches) * anatomy.hidden * 4)
        with _disk_errors(run.output):
            if state.next_block is None:
                _begin(run, walker, state)
            for index in range(state.next_block or 0, anatomy.layers):
                _block(run, walker, state, index)
            report = _report(run, state, model=str(model), seed=seed, calibration=source)
            _finish(run, state, report, begun, finish)
    if progress:
        progress("done", 1, 1)
    return report


@dataclasses.dataclass
class _State:
    """What a resumed run must know; ``work/state.json``."""

    fingerprint: str
    next_block: int | None = None
    """None until the embedding has been written."""
    linears: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    specs: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    blocks: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    shards: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    packed_bytes: int = 0
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    peak_memory_bytes: int = 0

    def save(self, run: _Run) -> None:
        self.peak_memory_bytes = max(self.peak_memory_bytes, machine.peak_memory())
        write_text(run.work / "state.json", json.dumps(dataclasses.asdict(self)))

    def count(self, seconds: dict[str, float]) -> None:
        for stage, value in seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + value


@dataclasses.dataclass(frozen=True)
class _Run:
    """Where one run reads and writes."""

    checkpoint: Checkpoint
    anatomy: Anatomy
    recipe: Recipe
    output: Path
    fingerprint: str

    @property
    def partial(self) -> Path:
        return self.output.with_name(self.output.name + ".partial")

    @property
    def folder(self) -> Path:
        return self.partial / "model"

    @property
    def work(self) -> Path:
        return self.partial / "work"

    def shard(self, number: int) -> Path:
        """Shard 0 is the embedding, 1… the blocks, the last the final norm and the head."""
        return self.folder / f"model-{number + 1:05d}-of-{self.anatomy.layers + 2:05d}.safetensors"

    @contextmanager
    def claimed(self, resume: bool) -> Iterator[_State | None]:
        """The state to start from, with the output locked against a second run; None when ``OUT`` is finished."""
        if self._is_finished():
            if not resume:
                raise UserError(
                    f"expected an empty or new output folder, found {self.output} in use; choose another or remove it"
                )
            shutil.rmtree(self.partial, ignore_errors=True)
            yield None
            return
        if self.partial.exists() and not resume:
            raise UserError(
                f"expected no unfinished run, found {self.partial}; continue it with --resume, or remove it"
            )
        for folder in (self.folder, self.work):
            folder.mkdir(parents=True, exist_ok=True)
        with open(self.partial / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"expected {self.partial} free, found another run writing it; wait for it") from None
            yield self._state()

    def require_space(self, activations: int) -> None:
        """Raises ``UserError`` when the disk cannot hold the dense model's bytes and four sets of activations."""
        needed = self.checkpoint.bytes + activations
        free = shutil.disk_usage(self.partial).free
        if free < needed:
            raise UserError(
                f"expected {needed / 1e9:.2f} GB free for {self.output}, found {free / 1e9:.2f} GB; free some space or "
                "choose another disk, then add --resume"
            )

    def _is_finished(self) -> bool:
        if self.output.is_file():
            raise UserError(f"expected an output folder, found the file {self.output}; choose another name")
        if not self.output.exists() or not any(self.output.iterdir()):
            return False
        report = self.output / "report.json"
        if report.exists() and read_json(report, "a report").get("fingerprint") == self.fingerprint:
            return True
        raise UserError(
            f"expected an empty or new output folder, found {self.output} with other content; "
            "choose another or remove it"
        )

    def _state(self) -> _State:
        file = self.work / "state.json"
        if not file.exists():
            return _State(self.fingerprint)
        state = _State(**read_json(file, "a run's state"))
        if state.fingerprint != self.fingerprint:
            raise UserError(
                f"expected to resume the same run, found {self.partial} of another model, recipe, text or seed; "
                "repeat the first command, or remove the folder"
            )
        return state


def _begin(run: _Run, walker: Walker, state: _State) -> None:
    model = run.anatomy
    begun = time.perf_counter()
    embedding = run.checkpoint.read(run.checkpoint.embedding_name(model))
    require_finite(model.architecture.embedding, embedding)
    # Stored under the embedding's name, as transformers does, whichever of the two a tied checkpoint held.
    _write(run, state, 0, {model.architecture.embedding: embedding})
    state.count({"load": time.perf_counter() - begun})
    walker.begin(embedding.float())
    state.next_block = 0
    state.save(run)


def _block(run: _Run, walker: Walker, state: _State, index: int) -> None:
    for path in ("dense", "compressed"):
        states = walker.states(path, index)
        if not states.is_whole():
            raise UserError(
                f"expected the activations of block {index} in {states.file}, found them damaged; "
                f"remove {run.partial} and start again"
            )
    begun = time.perf_counter()
    tensors = run.checkpoint.read_block(run.anatomy, index)
    loaded = time.perf_counter() - begun
    result = walker.block(index, tensors)
    writing = time.perf_counter()
    prefix = run.anatomy.block_prefix(index)
    shard = {prefix + name: tensor for name, tensor in tensors.items()}
    for linear in result.linears:
        dtype = shard.pop(f"{linear.name}.weight").dtype
        spec = spec_of(linear, dtype)
        packed = packed_tensors(linear, spec, dtype)
        shard |= {f"{linear.name}.{suffix}": tensor for suffix, tensor in packed.items()}
        if "weight" not in packed:
            state.specs[linear.name] = spec.to_json()
        state.linears.append(_linear_report(linear, spec, index, result, dtype))
    _write(run, state, index + 1, shard)
    state.blocks.append({"index": index, "output_error": result.block_error, "seconds": time.perf_counter() - begun})
    state.count(result.seconds | {"load": loaded, "write": time.perf_counter() - writing})
    state.next_block = index + 1
    state.save(run)
    for path in ("dense", "compressed"):
        walker.states(path, index).file.unlink(missing_ok=True)


def _finish(run: _Run, state: _State, report: dict[str, Any], begun: float, finish: Finish | None) -> None:
    architecture = run.anatomy.architecture
    outer = {name: run.checkpoint.read(name) for name in run.anatomy.outer_tensors() if name != architecture.embedding}
    for name, tensor in outer.items():
        require_finite(name, tensor)
    _write(run, state, run.anatomy.layers + 1, outer)
    write_index(run.folder, state.shards, state.packed_bytes)
    specs = {name: LinearSpec.from_json(spec) for name, spec in state.specs.items()}
    quantization = QuantizationConfig(specs, run.recipe.to_json()).to_json()
    write_text(
        run.folder / "config.json",
        json.dumps(run.checkpoint.config | {"quantization_config": quantization}, indent=2) + "\n",
    )
    for file in companions(run.checkpoint.path):
        shutil.copyfile(file, run.folder / file.name)
    report["totals"] |= {"packed_bytes": state.packed_bytes}
    if finish:
        finish(run.folder, report)
    report["seconds"]["total"] = time.perf_counter() - begun
    report["peak_memory_bytes"] = max(state.peak_memory_bytes, machine.peak_memory())
    write_text(run.folder / "report.json", json.dumps(report, indent=2) + "\n")
    if run.output.exists():
        run.output.rmdir()
    run.folder.rename(run.output)
    shutil.rmtree(run.partial)


def spec_of(linear: LinearState, dtype: torch.dtype) -> LinearSpec:
    """How a linear's state is stored: as a bitmask with values, or dense where that is no larger."""
    dense = LinearSpec(
        shape=(linear.weight.shape[0], linear.weight.shape[1]),
        bits=linear.quantised.grid.bits if linear.quantised else None,
        group_size=linear.quantised.grid.group_size if linear.quantised else None,
        symmetric=linear.quantised.grid.symmetric if linear.quantised else True,
        input_bits=linear.input_bits,
        values_dtype=None if linear.quantised else str(dtype).removeprefix("torch."),
    )
    if linear.mask is None:
        return dense
    sparse = dataclasses.replace(dense, sparse=True, nonzeros=int(linear.mask.sum()), pattern=linear.pattern)
    return sparse if sparse.packed_bytes < dense.packed_bytes else dense


def packed_tensors(linear: LinearState, spec: LinearSpec, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of ``docs/format.md`` for one linear, by suffix."""
    mask = linear.mask.cpu().numpy() if spec.sparse and linear.mask is not None else None
    q = linear.quantised
    if q is None:
        weight = linear.weight.to(dtype).cpu()
        if mask is None:
            return {"weight": weight}
        values = weight.view(torch.uint16).numpy() if dtype == torch.bfloat16 else weight.numpy()
        return _tensors(pack_linear(spec, values, mask), spec)
    codes = q.codes
    if linear.mask is not None and not spec.sparse:
        # A pruned weight stored densely is the code that means zero.
        width = codes.shape[1] // q.zero.shape[1]
        codes = torch.where(linear.mask, codes, q.zero.repeat_interleave(width, 1).to(codes.dtype))
    unsigned = (codes.int() - q.grid.low).to(torch.uint8).cpu().numpy()
    zero = None if q.grid.symmetric else q.zero.to(torch.uint8).cpu().numpy()
    return _tensors(pack_linear(spec, unsigned, mask, f32_to_bf16(q.scale.cpu().numpy()), zero), spec)


def _tensors(arrays: dict[str, Any], spec: LinearSpec) -> dict[str, Tensor]:
    kinds = spec.tensors()
    tensors = {suffix: torch.from_numpy(array) for suffix, array in arrays.items()}
    return {suffix: t.view(torch.bfloat16) if kinds[suffix][0] == "bfloat16" else t for suffix, t in tensors.items()}


def _write(run: _Run, state: _State, number: int, tensors: dict[str, Tensor]) -> None:
    file = run.shard(number)
    write_shard(file, tensors)
    state.shards[file.name] = sorted(tensors)
    state.packed_bytes += sum(t.numel() * t.element_size() for t in tensors.values())


def _linear_report(
    linear: LinearState, spec: LinearSpec, index: int, result: BlockResult, dtype: torch.dtype
) -> dict[str, Any]:
    return {
        "name": linear.name,
        "role": linear.role,
        "block": index,
        "shape": list(spec.shape),
        "bits": spec.bits,
        "group_size": spec.group_size,
        "symmetric": spec.symmetric,
        "sparsity": 0.0 if linear.mask is None else 1 - int(linear.mask.sum()) / linear.mask.numel(),
        "pattern": linear.pattern,
        "input_bits": linear.input_bits,
        "dense_bytes": linear.weight.numel() * dtype.itemsize,
        "packed_bytes": spec.packed_bytes,
        "bits_per_weight": spec.bits_per_weight,
        "output_error": result.output_errors[linear.name],
        "seconds": result.linear_seconds[linear.name],
        "notes": linear.notes,
    }


def _report(run: _Run, state: _State, **facts: Any) -> dict[str, Any]:
    dense = sum(x["dense_bytes"] for x in state.linears)
    packed = sum(x["packed_bytes"] for x in state.linears)
    weights = sum(x["shape"][0] * x["shape"][1] for x in state.linears)
    zeros = sum(x["shape"][0] * x["shape"][1] * x["sparsity"] for x in state.linears)
    return {
        "tulle": metadata.version("tulle"),
        "fingerprint": run.fingerprint,
        **facts,
        "recipe": run.recipe.to_json(),
        "linears": state.linears,
        "blocks": state.blocks,
        "totals": {
            "dense_bytes": run.checkpoint.bytes,
            "linear_dense_bytes": dense,
            "linear_packed_bytes": packed,
            "bits_per_weight": 8 * packed / max(weights, 1),
            "sparsity": zeros / max(weights, 1),
            "parameters": sum(
                run.checkpoint.info(n).bytes // run.checkpoint.info(n).dtype.itemsize for n in run.checkpoint.names()
            ),
        },
        "seconds": _stages(state.seconds, run.recipe),
        "machine": machine.describe(),
        "evaluation": None,
    }


def _stages(seconds: dict[str, float], recipe: Recipe) -> dict[str, Any]:
    steps = {step.name for step in recipe.steps}
    stages: dict[str, Any] = defaultdict(float, {k: v for k, v in seconds.items() if k not in steps})
    return dict(stages) | {"steps": {k: v for k, v in seconds.items() if k in steps}}


def _calibration_text(
    calibration: Text | Sequence[str | Path] | None,
    separator: str | None,
    documents: tuple[int, int] | None,
    min_chars: int,
) -> Text:
    if isinstance(calibration, Text):
        return calibration
    if calibration is None:
        from tulle.train.data import calibration_text

        return Text(tuple(calibration_text()), False, ("source of the installed standard library",))
    return read_text(
        [calibration] if isinstance(calibration, str | Path) else calibration, separator, documents, min_chars
    )


def _tokenizer(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        line = (str(error).splitlines() or ["none"])[0]
        raise UserError(f"expected a tokenizer in {folder}, found: {line}") from None


def _require_vocabulary(tokens: Sequence[Tensor], anatomy: Anatomy) -> None:
    largest = max(int(t.max()) for t in tokens)
    if largest >= anatomy.vocabulary:
        raise UserError(
            f"expected token ids below vocab_size {anatomy.vocabulary}, found {largest}; "
            "the tokenizer is of another model"
        )


def _require_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"expected a device that torch has here, found {device!r} ({str(error).splitlines()[0]}); try cpu"
        ) from None


def _fingerprint(checkpoint: Checkpoint, recipe: Recipe, tokens: Sequence[Tensor], seed: int) -> str:
    """Equal for runs that must end with the same bytes."""
    digest = hashlib.sha256()
    files = sorted({checkpoint.info(n).file for n in checkpoint.names()})
    stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    facts = [metadata.version("tulle"), checkpoint.config, recipe.to_json(), seed, stats]
    digest.update(json.dumps(facts, sort_keys=True).encode())
    for t in tokens:
        digest.update(t.numpy().tobytes() + b"|")
    return digest.hexdigest()


@contextmanager
def _disk_errors(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = (
            error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            or "No space left" in str(error)
            or "too large" in str(error)
        )
        if not full:
            raise
        raise UserError(
            f"expected space to write {output}, found the disk full ({error}); free some and run again with --resume"
        ) from None


class _Callable(types.ModuleType):
    """``tulle.compress`` is this module and also the function, whichever was imported first."""

    def __call__(self, *arguments: Any, **settings: Any) -> dict[str, Any]:
        return compress(*arguments, **settings)


sys.modules[__name__].__class__ = _Callable

"""Composes methods: checkpoint + recipe → packed checkpoint + report, block by block.

The walker (:mod:`tulle.compression.walker`) owns the loop inside a block, ``run_folder`` the folder that survives a
kill, :mod:`tulle.hf.pack` the bytes; what is left here is the order of things.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from tulle import machine
from tulle.compression.recipe import Recipe, load_recipe, parse_recipe
from tulle.compression.run_folder import RunFolder, State, disk_errors
from tulle.compression.survey import take_survey
from tulle.compression.walker import FILLED, SPARSE_FROM, BlockResult, Walker, batched
from tulle.core.mask_structure import mask_structure
from tulle.core.masks import zero_share
from tulle.errors import UserError
from tulle.format.spec import AttentionSpec, LinearSpec, QuantizationConfig
from tulle.hf.pack import attention_spec, input_tensors, packed_tensors, spec_of, transform_tensors
from tulle.methods.contract import LinearState, Progress
from tulle.models.anatomy import Anatomy, anatomy
from tulle.models.checkpoint import Checkpoint, companions, read_json, require_finite, write_index, write_text
from tulle.models.hub import local_folder
from tulle.models.rewrite import Source
from tulle.models.skeleton import load_config, require_device
from tulle.report.compression import write_report
from tulle.text.reading import Text, read_text, sequences


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
) -> dict[str, Any]:
    """Compresses ``model`` by ``recipe`` into the folder ``output`` and returns its report (``OUT/report.json``).

    ``calibration``: text files, JSONL files, folders or ``datasets`` names (:func:`tulle.text.reading.read_text` says
    what ``separator``, ``documents`` and ``min_chars`` do), or a ready :class:`Text`; None takes the source of the
    installed standard library. ``samples`` and ``length`` (tokens) override the recipe's. Two runs with one seed write
    the same bytes (on one machine, with one number of threads); the report differs in its times. Raises ``UserError``
    for bad input, before anything is written wherever that can be known.
    """
    begun = time.perf_counter()
    torch.manual_seed(seed)
    require_device(device)
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
    tokens, text = calibration_sequences(
        folder,
        calibration,
        separator=separator,
        documents=documents,
        min_chars=min_chars,
        samples=samples or chosen.calibration.samples,
        length=length or chosen.calibration.length,
        seed=seed,
    )
    source = {
        "source": list(text.source),
        "samples": len(tokens),
        "tokens": sum(map(len, tokens)),
        "length": max(map(len, tokens)),
    }
    folder_of_run = RunFolder(Path(output), _fingerprint(checkpoint, chosen, tokens, seed), anatomy.layers + 2)
    with folder_of_run.claimed(resume) as state:
        if state is None:
            return read_json(Path(output) / "report.json", "a report")
        batches = batched(tokens)
        # Two sets of hidden states go in and two come out.
        activations = 4 * sum(b.tokens.numel() for b in batches) * anatomy.hidden * 4
        folder_of_run.require_space(checkpoint.bytes + activations)
        source_of = Source(checkpoint, anatomy)
        # Repeated by a resumed run, with the same result: what it decides is nowhere on disk.
        survey = take_survey(config, anatomy, source_of, chosen, batches, device, progress, seed)
        turned = survey.residual or survey.values
        if turned and any(zero_share(t) >= SPARSE_FROM for t in source_of.read_block(0).values()):
            survey.notes.append(FILLED)
        source_of = source_of.rewritten(survey.residual, survey.values)
        walker = Walker(config, anatomy, chosen, batches, folder_of_run.work, device, progress, seed)
        walker.kept, walker.kept_inputs, walker.residual = survey.kept, survey.kept_inputs, survey.residual
        walker.sparsity, walker.input_sparsity = survey.sparsity, survey.input_sparsity
        job = _Job(checkpoint, source_of, anatomy, chosen, walker, folder_of_run, state, survey.notes)
        with disk_errors(Path(output)):
            if state.next_block is None:
                job.begin()
            for index in range(state.next_block or 0, anatomy.layers):
                job.block(index)
            report = job.report(model=str(model), seed=seed, calibration=source)
            job.finish(report, begun)
    if progress:
        progress("done", 1, 1)
    return report


@dataclasses.dataclass(frozen=True)
class _Job:
    """One run: shard 0 is the embedding, 1… the blocks, the last the final norm and the head."""

    checkpoint: Checkpoint
    source: Source
    anatomy: Anatomy
    recipe: Recipe
    walker: Walker
    run: RunFolder
    state: State
    notes: list[str]

    def begin(self) -> None:
        begun = time.perf_counter()
        name = self.anatomy.architecture.embedding
        embedding = self.source.embedding()
        require_finite(name, embedding)
        # Stored under the embedding's name, as transformers does, whichever of the two a tied checkpoint held.
        self.run.write(self.state, 0, {name: embedding})
        self.state.count({"load": time.perf_counter() - begun})
        self.walker.begin(embedding)
        self.state.next_block = 0
        self.run.commit(self.state)

    def block(self, index: int) -> None:
        for path in ("dense", "compressed"):
            states = self.walker.states(path, index)
            if not states.is_whole():
                raise UserError(
                    f"expected the activations of block {index} in {states.file}, found them damaged; "
                    f"remove {self.run.partial} and start again"
                )
        begun = time.perf_counter()
        tensors, dtypes = self.source.read_block(index), self.source.dtypes(index)
        loaded = time.perf_counter() - begun
        result = self.walker.block(index, tensors, dtypes)
        writing = time.perf_counter()
        prefix = self.anatomy.block_prefix(index)
        shard = {prefix + name: t.cpu().to(dtypes[name]) for name, t in (tensors | result.tensors).items()}
        holders: dict[tuple[int, ...], str] = {}
        for linear in result.linears:
            dtype = shard.pop(f"{linear.name}.weight").dtype
            holder = holders.setdefault(tuple(map(id, linear.transform)), linear.name)
            spec = spec_of(linear, dtype, None if holder == linear.name else holder)
            packed = packed_tensors(linear, spec, dtype)
            if spec.transform_of is None:
                packed |= transform_tensors(linear)
            packed |= input_tensors(linear)
            shard |= {f"{linear.name}.{suffix}": tensor for suffix, tensor in packed.items()}
            if "weight" not in packed or spec.transform or spec.input_bits is not None or spec.input_sparsity:
                self.state.specs[linear.name] = spec.to_json()
            self.state.linears.append(_linear_report(linear, spec, index, result, dtype))
        self.run.write(self.state, index + 1, shard)
        self.state.blocks.append(
            {
                "index": index,
                "output_error": result.block_error,
                "seconds": time.perf_counter() - begun,
                "notes": result.notes,
                "permutations": result.permutations,
                "activity": result.activity,
            }
        )
        self.state.count(result.seconds | {"load": loaded, "write": time.perf_counter() - writing})
        attention = attention_spec(result.attention)
        self.state.attention = None if attention is None else attention.to_json()
        self.state.next_block = index + 1
        self.run.commit(self.state)
        for path in ("dense", "compressed"):
            self.walker.states(path, index).file.unlink(missing_ok=True)

    def finish(self, report: dict[str, Any], begun: float) -> None:
        tensors = self.source.closing()
        for name, tensor in tensors.items():
            require_finite(name, tensor)
        folder = self.run.folder
        self.run.write(self.state, self.anatomy.layers + 1, tensors)
        write_index(folder, self.state.shards, self.state.packed_bytes)
        attention = None if self.state.attention is None else AttentionSpec.from_json(self.state.attention)
        packed = QuantizationConfig(self.state.specs_of_linears(), self.recipe.to_json(), attention)
        config = self.checkpoint.config | {"quantization_config": packed.to_json()}
        if self.anatomy.tied and not self.source.tied:
            config["tie_word_embeddings"] = False
        write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
        for file in companions(self.checkpoint.path):
            shutil.copyfile(file, folder / file.name)
        report["totals"]["packed_bytes"] = self.state.packed_bytes
        report["seconds"]["total"] = time.perf_counter() - begun
        report["peak_memory_bytes"] = max(self.state.peak_memory_bytes, machine.peak_memory())
        write_report(report, folder / "report.html")
        write_text(folder / "report.json", json.dumps(report, indent=2) + "\n")
        self.run.publish()

    def report(self, **facts: Any) -> dict[str, Any]:
        linears = self.state.linears
        weights = [x["shape"][0] * x["shape"][1] for x in linears]
        packed = sum(x["packed_bytes"] + x["transform_bytes"] for x in linears)
        infos = [self.checkpoint.info(name) for name in self.checkpoint.names()]
        steps = {step.name for step in self.recipe.steps}
        return {
            "tulle": metadata.version("tulle"),
            "fingerprint": self.run.fingerprint,
            **facts,
            "recipe": self.recipe.to_json(),
            "linears": linears,
            "blocks": self.state.blocks,
            "attention": self.state.attention,
            "notes": self.notes,
            "totals": {
                "dense_bytes": self.checkpoint.bytes,
                "linear_dense_bytes": sum(x["dense_bytes"] for x in linears),
                "linear_packed_bytes": packed,
                "bits_per_weight": 8 * packed / max(sum(weights), 1),
                "sparsity": sum(n * x["sparsity"] for n, x in zip(weights, linears, strict=True))
                / max(sum(weights), 1),
                "parameters": sum(info.bytes // info.dtype.itemsize for info in infos),
            },
            "seconds": {k: v for k, v in self.state.seconds.items() if k not in steps}
            | {"steps": {k: v for k, v in self.state.seconds.items() if k in steps}},
            "machine": machine.describe(),
            "evaluation": None,
        }


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
        "mask": None if linear.mask is None else mask_structure(linear.mask, linear.pattern),
        "input_bits": linear.input_bits,
        "input_symmetric": spec.input_symmetric,
        "input_clip": spec.input_clip,
        "input_sparsity": None if spec.input_sparsity is None else spec.input_sparsity.to_json(),
        "transform": [t.to_json() for t in spec.transform],
        "transform_bytes": spec.transform_bytes,
        "dense_bytes": linear.weight.numel() * dtype.itemsize,
        "packed_bytes": spec.packed_bytes,
        "bits_per_weight": spec.bits_per_weight,
        "output_error": result.output_errors[linear.name],
        "seconds": result.linear_seconds[linear.name],
        "notes": list(dict.fromkeys(linear.notes)),
    }


def calibration_sequences(
    folder: Path,
    calibration: Text | str | Path | Sequence[str | Path] | None,
    *,
    separator: str | None = None,
    documents: tuple[int, int] | None = None,
    min_chars: int = 1,
    samples: int,
    length: int,
    seed: int = 0,
) -> tuple[list[Tensor], Text]:
    """Token sequences of a text for the model in ``folder``, at most as long as its context, and the text.

    Arguments as those of :func:`compress`. Raises ``UserError`` for text or a tokenizer that does not fit.
    """
    text = _calibration_text(calibration, separator, documents, min_chars)
    context = int(getattr(load_config(folder), "max_position_embeddings", None) or length)
    tokens = sequences(text, _tokenizer(folder), min(length, context), samples, seed)
    _require_vocabulary(tokens, anatomy(Checkpoint.open(folder).config))
    return tokens, text


def _calibration_text(
    calibration: Text | str | Path | Sequence[str | Path] | None,
    separator: str | None,
    documents: tuple[int, int] | None,
    min_chars: int,
) -> Text:
    if isinstance(calibration, Text):
        return calibration
    if calibration is None:
        from tulle.text.standard_library import calibration_text

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


def _require_vocabulary(tokens: Sequence[Tensor], model: Anatomy) -> None:
    largest = max(int(t.max()) for t in tokens)
    if largest >= model.vocabulary:
        raise UserError(
            f"expected token ids below vocab_size {model.vocabulary}, found {largest}; "
            "the tokenizer is of another model"
        )


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

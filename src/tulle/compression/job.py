"""Composes methods: checkpoint + recipe → packed checkpoint + report, block by block.

The walker (:mod:`tulle.compression.walker`) owns the loop inside a block, ``run_folder`` the folder that survives a
kill, :mod:`tulle.hf.pack` the bytes, ``report`` the figures; what is left here is the order of things.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tulle import machine
from tulle.compression.block_work import DENSIFIED, SPARSE_FROM
from tulle.compression.calibration import calibration_sequences, calibration_text
from tulle.compression.layer_table import LayerTable
from tulle.compression.recipe import Recipe, Step, read_recipe
from tulle.compression.reload import Rows, confirm, first_windows, losses, rounding_of
from tulle.compression.report import linear_report, run_report, table_report
from tulle.compression.run_folder import RunFolder, State, disk_errors
from tulle.compression.survey import head_hessian, take_survey
from tulle.compression.tables import quantise_table, relative_error, table_steps
from tulle.compression.walker import Experts, PartResult, Walker, compute_dtype, widest_state
from tulle.core.grid import Grid, is_automatic, try_instead
from tulle.core.hessian import Hessian
from tulle.core.masks import zero_share
from tulle.errors import UserError
from tulle.evaluate.compare import compare
from tulle.evaluate.text import Protocol
from tulle.format.spec import AttentionSpec, LinearSpec, QuantizationConfig
from tulle.hf.pack import attention_spec, input_tensors, packed_tensors, spec_of, transform_tensors
from tulle.hf.packed_decoder import PackedDecoder
from tulle.methods.contract import LinearState, Progress
from tulle.models.batches import Batch, batched
from tulle.models.checkpoint import Checkpoint, copy_companions, read_json, require_finite, write_index, write_text
from tulle.models.description import Decoder, LinearGroup
from tulle.models.rewrite import DenseModel
from tulle.report.compression import write_report
from tulle.text.reading import Text


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Text on which perplexity is measured before and after."""

    text: Text
    protocol: Protocol = dataclasses.field(default_factory=Protocol)


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
    evaluation: Evaluation | None = None,
    device: str = "cpu",
    seed: int = 0,
    resume: bool = False,
    progress: Progress | None = None,
    costs: Path | None = None,
    input_shares: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Compresses ``model`` by ``recipe`` into the folder ``output`` and returns its report (``OUT/report.json``).

    ``calibration``: text files, JSONL files, folders or ``datasets`` names (:func:`tulle.text.reading.read_text` says
    what ``separator``, ``documents`` and ``min_chars`` do), or a ready :class:`Text`; None takes the source of the
    installed standard library. ``samples`` and ``length`` (tokens) override the recipe's. ``evaluation``: perplexity
    before and after goes into the report. ``costs``: a folder that keeps what ``allocate_bits`` and the like measured,
    for another budget of the same model. ``input_shares``: shares of dropped inputs by linear, for a step that selects
    inputs, where the recipe does not decide them. Two runs with one seed write the same bytes (on one machine, with one
    number of threads); the report differs in its times. Raises ``UserError`` for bad input, before anything is written
    wherever that can be known.
    """
    begun = time.perf_counter()
    if seed < 0:
        raise UserError(f"expected a seed of 0 or more, found {seed}; any whole number from 0 on will do")
    torch.manual_seed(seed)
    machine.require_device(device)
    chosen, dense = read_recipe(recipe), DenseModel.open(model)
    if chosen.recover is not None:
        raise UserError(
            f"expected a recipe without recover here, found {chosen.name}, which trains; take tulle compress, or leave "
            "recover out"
        )
    require_fitting(dense.description, chosen)
    settings, text = chosen.calibration, calibration_text(calibration, separator, documents, min_chars)
    tokenizer = dense.checkpoint.source.tokenizer
    samples, length = samples or settings.samples, length or settings.length
    tokens = calibration_sequences(dense.description, tokenizer, text, samples, length, seed)
    dtype = compute_dtype(settings.compute, dense.embedding_dtype, device)
    run = RunFolder(
        Path(output), _fingerprint(dense.checkpoint, chosen, tokens, seed, dtype), len(dense.description.layers) + 2
    )
    with run.claimed(resume) as state:
        if state is None:
            return read_json(Path(output) / "report.json", "a report")
        batches = batched(tokens)
        # Two sets of hidden states go in and two come out.
        activations = 4 * sum(b.tokens.numel() for b in batches) * widest_state(dense.description) * dtype.itemsize
        run.require_space(dense.checkpoint.bytes + activations)
        with disk_errors(Path(output)):
            # The state is not on disk yet, so that the folder's name must tell other runs apart.
            kept = run.work / f"survey-{run.fingerprint[:16]}"
            decisions = take_survey(
                dense, chosen, batches, device, progress, seed, kept, dtype,
                begun=state.next_block is not None, costs=costs,
            )  # fmt: skip
            decisions.input_sparsity = {**(input_shares or {}), **decisions.input_sparsity}
            decisions.notes[:0] = group_sizes(dense.description, chosen)
            decisions.notes.extend(dense.checkpoint.source.notes)
            if decisions.changes_basis and any(
                zero_share(t) >= SPARSE_FROM for t in dense.read_block(0, experts=False).values()
            ):
                decisions.notes.append(DENSIFIED)
            dense = dense.rewritten(decisions.residual, decisions.values)
            tables = table_steps(dense.tied, chosen)
            layer_table = LayerTable.of(dense, run, state, tables)
            decisions.notes.extend(_left_as_stored(dense, layer_table))
            walker = Walker(
                dense.description, chosen, batches, run.work, decisions, device, dtype, progress, seed,
                embedding_changes="embedding" in tables, inputs=dense.token_inputs(),
                compressed_inputs=None if layer_table is None else layer_table.inputs(),
            )  # fmt: skip
            job = _Job(dense, chosen, walker, run, state, tables, decisions.head_hessian, decisions.grids, layer_table)
            closing = job.run_to_end()
            windows = first_windows(dense.description, batches)
            reload = confirm(
                run.folder, windows, job.predicted(windows, closing, device), device, dtype,
                rounding_of(chosen, dtype), progress,
            )  # fmt: skip
            report = run_report(
                dense.checkpoint, chosen, state, run.fingerprint, decisions.notes, model=str(model), seed=seed,
                compute=str(dtype).removeprefix("torch."), calibration=_calibration_facts(text, tokens), reload=reload,
            )  # fmt: skip
            report["seconds"]["total"] = time.perf_counter() - begun
            report["peak_memory_bytes"] = max(state.peak_memory_bytes, machine.peak_memory())
            # Times and peak memory are compression's own.
            finish_report(report, run.folder, dense.checkpoint.path, evaluation, device, progress)
            run.publish()
    if progress:
        progress("done", 1, 1)
    return report


def finish_report(
    report: dict[str, Any],
    folder: Path,
    dense: Path,
    evaluation: Evaluation | None,
    device: str,
    progress: Progress | None,
) -> None:
    """Adds perplexity of the ``dense`` model and the one in ``folder``, where that is wanted, and writes the report
    there."""
    if evaluation is not None:
        report["evaluation"] = compare(dense, folder, evaluation.text, evaluation.protocol, device, progress)
    write_report(report, folder / "report.html")
    write_text(folder / "report.json", json.dumps(report, indent=2) + "\n")


def require_fitting(model: Decoder, recipe: Recipe) -> None:
    """Raises ``UserError`` where a step's settings do not fit a linear or a table that it targets."""
    tables = table_steps(model.tied, recipe)
    all_groups = unlike_groups(model)
    _require_no_experts(model, recipe)
    for step in recipe.steps:
        groups = [group for group in all_groups if step.covers(group.role)]
        size, widths = getattr(step.method, "group_size", None), _roles_by_width(groups)
        for role in (role for role, chosen in tables.items() if chosen is step):
            widths.setdefault(model.hidden, []).append(role)
        if isinstance(size, int) and any(width % size for width in widths):
            found = " and ".join(f"{width} ({', '.join(roles)})" for width, roles in widths.items())
            raise UserError(
                f"expected input channels divisible by group_size {size} in what {step.name} targets, found {found}; "
                f"{try_instead(list(widths))}"
            )
        for group in groups:
            for linear in group.linears:
                step.method.validate(linear.name, linear.shape)


def unlike_groups(model: Decoder) -> list[LinearGroup]:
    """Groups of linears, of those that differ in no width but one."""
    found = {(group.role, *(linear.shape for linear in group.linears)): group for group in _groups(model)}
    return list(found.values())


def _groups(model: Decoder) -> Iterator[LinearGroup]:
    for layer in model.layers:
        yield from layer.groups
        yield from (group for expert in layer.experts[:1] for group in expert.groups)


def _require_no_experts(model: Decoder, recipe: Recipe) -> None:
    """Raises ``UserError`` for a step that does not take experts, where there are any."""
    if not any(layer.experts for layer in model.layers):
        return
    for step in recipe.steps:
        if step.method.refuses_experts:
            raise UserError(
                f"expected steps that take one expert at a time, found {step.name} for {model.model_type}, which "
                f"{step.method.refuses_experts}; leave it out"
            )


def group_sizes(model: Decoder, recipe: Recipe) -> list[str]:
    """A line for every step with ``group_size: auto``: the groups that it takes."""
    lines = []
    for step in recipe.steps:
        size = getattr(step.method, "group_size", None)
        if "codes" in step.method.settles and is_automatic(size):
            groups = [group for group in unlike_groups(model) if step.covers(group.role)]
            found = [
                f"{Grid.of(8, size, True, width).group_size or width} of {width} in {', '.join(roles)}"
                for width, roles in _roles_by_width(groups).items()
            ]
            lines.append(f"{step.name}, group_size {size}: groups of input channels are {'; '.join(found)}")
    return lines


def _roles_by_width(groups: Sequence[LinearGroup]) -> dict[int, list[str]]:
    """Numbers of input channels, and the roles that have them."""
    found: dict[int, list[str]] = {}
    for group in groups:
        found.setdefault(group.inputs, []).append(group.role)
    return found


@dataclasses.dataclass(frozen=True)
class _Job:
    """One run: shard 0 is the embedding, 1… the blocks, the last the final norm and the head."""

    dense: DenseModel
    recipe: Recipe
    walker: Walker
    run: RunFolder
    state: State
    tables: dict[str, Step]
    """What quantises the embedding and the head."""
    head_hessian: Hessian | None
    """Of the inputs of a tied table."""
    grids: Mapping[str, Grid]
    """Of tables by module name, where a step allotted them."""
    layer_table: LayerTable | None
    """Of a model whose layers have inputs of their own, where a step quantises it."""

    def run_to_end(self) -> dict[str, Tensor]:
        """Everything that the state does not count as done; the tensors behind the blocks as the file means them."""
        if self.state.next_block is None:
            self.begin()
        for index in range(self.state.next_block or 0, len(self.dense.description.layers)):
            self.block(index)
        return self.finish()

    def begin(self) -> None:
        begun = time.perf_counter()
        name = self.dense.description.embedding
        embedding = self.dense.embedding()
        require_finite(name, embedding)
        # Stored under the embedding's name, as transformers does, whichever of the two a tied checkpoint held.
        tensors, compressed = {name: embedding}, None
        self.state.count({"load": time.perf_counter() - begun})
        if "embedding" in self.tables:
            tensors, compressed = self._quantised_table("embedding", name, embedding, self.head_hessian)
        tensors |= self.dense.per_layer_tensors() if self.layer_table is None else self.layer_table.tensors()
        self.run.write(self.state, 0, tensors)
        self.walker.begin(embedding, compressed)
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
        tensors, dtypes = self.dense.read_block(index, experts=False), self.dense.dtypes(index)
        loaded = time.perf_counter() - begun
        shard: dict[str, Tensor] = {}

        def keep(result: PartResult, read: Mapping[str, Tensor]) -> None:
            shard.update(self._packed_part(index, result, read, dtypes))

        result = self.walker.block(
            index, tensors, dtypes, Experts(lambda expert: self.dense.read_expert(index, expert), keep)
        )
        writing = time.perf_counter()
        keep(result, tensors)
        self.run.write(self.state, index + 1, shard)
        self.state.blocks.append(
            {
                "index": index,
                "output_error": result.block_error,
                "seconds": time.perf_counter() - begun,
                "notes": result.notes,
                "permutations": result.permutations,
                "activity": result.activity,
                "experts": None if result.expert_tokens is None else dataclasses.asdict(result.expert_tokens),
            }
        )
        self.state.count(result.seconds | {"load": loaded, "write": time.perf_counter() - writing})
        attention = attention_spec(result.attention)
        self.state.attention = None if attention is None else attention.to_json()
        self.state.next_block = index + 1
        self.run.commit(self.state)
        self.walker.forget(index)

    def _packed_part(
        self, index: int, result: PartResult, read: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]
    ) -> dict[str, Tensor]:
        """The tensors by full name that stand for a block without its experts, or for an expert, of what was read; its
        linears join the report."""
        prefix = self.dense.description.layers[index].prefix
        shard = {prefix + name: t.cpu().to(dtypes[name]) for name, t in {**read, **result.tensors}.items()}
        holders: dict[tuple[int, ...], str] = {}
        for linear in result.linears:
            dtype = shard.pop(f"{linear.name}.weight").dtype
            holder = holders.setdefault(tuple(map(id, linear.transform)), linear.name)
            spec = spec_of(linear, dtype, None if holder == linear.name else holder)
            shard |= self._packed(linear, spec, dtype)
            self.state.linears.append(linear_report(linear, spec, index, result, dtype))
        return shard

    def _packed(self, linear: LinearState, spec: LinearSpec, dtype: torch.dtype) -> dict[str, Tensor]:
        """A linear's tensors by full name; its spec goes into the state where a plain weight does not say all."""
        packed = packed_tensors(linear, spec, dtype)
        if spec.transform_of is None:
            packed |= transform_tensors(linear)
        packed |= input_tensors(linear)
        if "weight" not in packed or spec.transform or spec.input_bits is not None or spec.input_sparsity:
            self.state.specs[linear.name] = spec.to_json()
        return {f"{linear.name}.{suffix}": tensor for suffix, tensor in packed.items()}

    def _quantised_table(
        self, role: str, name: str, table: Tensor, hessian: Hessian | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The packed tensors of a table by full name, and what they mean ``[V, d]``."""
        begun, step = time.perf_counter(), self.tables[role]
        module = name.removesuffix(".weight")
        linear = quantise_table(step, role, module, table, hessian, self.grids.get(module))
        spec = spec_of(linear, table.dtype)
        packed = self._packed(linear, spec, table.dtype)
        seconds = time.perf_counter() - begun
        self.state.count({step.name: seconds})
        self.state.tables.append(table_report(linear, spec, relative_error(table, linear.weight), seconds))
        return packed, linear.weight

    def finish(self) -> dict[str, Tensor]:
        """Writes what stands behind the blocks, and the folder's small files; the report is not among them.

        Returns the tensors behind the blocks by full name, a head in codes unpacked.
        """
        tensors = self.dense.closing()
        for name, tensor in tensors.items():
            require_finite(name, tensor)
        head, closing = self.dense.description.head, dict(tensors)
        if "head" in self.tables and head in tensors:
            hessian = head_hessian(self.dense.description, *self.walker.outputs(), tensors, "cpu")
            in_codes, closing[head] = self._quantised_table("head", head, tensors.pop(head), hessian)
            tensors |= in_codes
        folder = self.run.folder
        self.run.write(self.state, len(self.dense.description.layers) + 1, tensors)
        write_index(folder, self.state.shards, self.state.packed_bytes)
        attention = None if self.state.attention is None else AttentionSpec.from_json(self.state.attention)
        packed = QuantizationConfig(self.state.specs_of_linears(), self.recipe.to_json(), attention)
        config = self.dense.checkpoint.config | {"quantization_config": packed.to_json()}
        if config.get("tie_word_embeddings") and not self.dense.tied:
            config["tie_word_embeddings"] = False
        write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
        copy_companions(self.dense.checkpoint.source.tokenizer, folder)
        return closing

    def predicted(self, windows: Sequence[Batch], closing: Mapping[str, Tensor], device: str) -> Tensor:
        """The walk's losses of the next tokens of ``windows``, beginnings of its first batches: nats ``[N]``;
        ``closing`` as :meth:`finish` gives it."""
        model = self.dense.description
        outer = {name: t.to(device, torch.float32) for name, t in closing.items() if name != model.head}
        hidden = [
            found[: window.tokens.shape[0], : window.tokens.shape[1]].to(device)
            for window, found in zip(windows, self.walker.outputs()[1], strict=False)
        ]
        return losses(model, windows, hidden, outer, self._head(closing))

    def _head(self, closing: Mapping[str, Tensor]) -> Rows:
        if self.dense.tied and "embedding" in self.tables:
            # A run that was killed may have made it. Where it is wrong, the first block's inputs are, too.
            return PackedDecoder(Checkpoint.open(self.run.folder)).head
        table = self.dense.embedding() if self.dense.tied else closing[self.dense.description.head]
        return lambda start, stop: table[start:stop].float()


def _left_as_stored(dense: DenseModel, quantised: LayerTable | None) -> list[str]:
    """A line for what gives layers inputs of their own, but for a table that is ``quantised``."""
    done = () if quantised is None else (quantised.name,)
    names = [name for name in dense.description.per_layer_tensors() if name not in done]
    stored = {name: dense.checkpoint.info(name).bytes for name in names}
    return [f"left as stored: {', '.join(stored)} ({sum(stored.values()):,} bytes)"] if stored else []


def _calibration_facts(text: Text, tokens: Sequence[Tensor]) -> dict[str, Any]:
    return {
        "source": list(text.source),
        "samples": len(tokens),
        "tokens": sum(map(len, tokens)),
        "length": max(map(len, tokens)),
    }


def _fingerprint(
    checkpoint: Checkpoint, recipe: Recipe, tokens: Sequence[Tensor], seed: int, dtype: torch.dtype
) -> str:
    """Equal for runs that must end with the same bytes."""
    digest = hashlib.sha256()
    facts = [metadata.version("tulle"), checkpoint.source.identity(), recipe.to_json(), seed, str(dtype)]
    digest.update(json.dumps(facts, sort_keys=True).encode())
    for t in tokens:
        digest.update(t.numpy().tobytes() + b"|")
    return digest.hexdigest()

"""Compressed folder → a format that others read; checked before the command says done.

The check loads the export in a process of its own that never imports Tulle, and compares its logits with those
of the packed model. A folder that fails it is removed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tulle.errors import UserError
from tulle.export import check, compressed_tensors, dense, gguf
from tulle.export.folder import whole_folder, write_entries
from tulle.export.plan import Plan
from tulle.hf import packed_linears, require_packed_tensors
from tulle.models.checkpoint import Checkpoint, copy_companions, write_text
from tulle.models.pickled import Pickled
from tulle.models.renamed import base_model, is_base_model
from tulle.models.source import INDEX, SINGLE, TensorSource, pickles_of

FORMATS = ("compressed-tensors", "dense", "gguf")
FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def export(
    model: str | Path,
    to: str,
    output: str | Path,
    dtype: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Writes the compressed folder ``model`` to the new folder ``output`` in the format ``to``.

    ``dtype`` (float32, float16, bfloat16) is that of the tensors written as floating point; None keeps the dtypes
    of the checkpoint. Memory: one tensor while writing, the float32 model while checking. Returns what was written
    and how far the logits are from the packed model's, as a share of the largest logit. Raises ``UserError`` when
    the model cannot be expressed in the format, the folder cannot be written, or the check fails; then nothing is
    left behind.
    """
    started = time.perf_counter()
    source, target = Path(model), Path(output)
    if to not in FORMATS:
        raise UserError(f"expected --to {' or '.join(FORMATS)}, found {to!r}; choose one of them")
    if dtype is not None and dtype not in FLOATS:
        raise UserError(f"expected --dtype {', '.join(FLOATS)}, found {dtype!r}; choose one of them")
    checkpoint = _opened(source, to)
    if to == "gguf":
        return _to_gguf(checkpoint, target, dtype, progress) | {"seconds": time.perf_counter() - started}
    # A dense folder of Hugging Face's own has nothing to unpack.
    linears = {} if to == "dense" and not checkpoint.source.plain else packed_linears(checkpoint)
    require_packed_tensors(checkpoint, linears)
    exporter = dense if to == "dense" else compressed_tensors
    plan = exporter.plan(checkpoint, linears, FLOATS[dtype] if dtype else None)
    report = progress or (lambda stage, done, total: None)
    with whole_folder(target) as folder:
        written = write_entries(folder, plan.entries, lambda done, total: report("write", done, total))
        copy_companions(checkpoint.source.tokenizer, folder)
        write_text(folder / "config.json", json.dumps(plan.config, indent=2) + "\n")
        report("check", 0, 1)
        found = check.check(checkpoint, folder, plan)
        report("check", 1, 1)
    return {
        "format": to,
        "output": str(target),
        "tensors": len(plan.entries),
        "bytes": written,
        "notes": [*checkpoint.source.notes, *plan.notes],
        **found,
        "seconds": time.perf_counter() - started,
    }


def _opened(path: Path, to: str) -> Checkpoint:
    """The model; pickled weights, which no other command opens, for a dense export."""
    whole = [path / name for name in (SINGLE, INDEX)]
    if to == "dense" and path.is_dir() and pickles_of(path) and not any(file.is_file() for file in whole):
        pickled: TensorSource = Pickled(path)
        checkpoint = Checkpoint(base_model(pickled) if is_base_model(pickled) else pickled)
        checkpoint.describe()
        return checkpoint
    return Checkpoint.open(path)


def _to_gguf(
    checkpoint: Checkpoint, target: Path, dtype: str | None, progress: Callable[[str, int, int], None] | None
) -> dict[str, Any]:
    """One file, read back: every tensor is compared value for value, then logits."""
    if dtype is not None:
        raise UserError("expected no --dtype with --to gguf, found one; every tensor keeps its values")
    if target.suffix != ".gguf":
        raise UserError(f"expected -o to name a .gguf file, found {target}; try -o {target.name}.gguf")
    if target.exists():
        raise UserError(f"expected a new file, found {target}; choose another -o")
    report = progress or (lambda stage, done, total: None)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        written = gguf.write(checkpoint, target, lambda done, total: report("write", done, total))
    except OSError as error:
        raise UserError(f"expected to write {target}, found: {error}; free some space or choose another -o") from None
    try:
        report("check", 0, 1)
        tensors = gguf.check(checkpoint, target)
        plan = Plan([], {}, torch.float32, None)
        again = Checkpoint.open(target)
        most = min(check.LENGTH, again.config["max_position_embeddings"])
        found = check.compare(checkpoint, check.logits_of(again, checkpoint, most), plan, most)
        report("check", 1, 1)
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    return {
        "format": "gguf",
        "output": str(target),
        "tensors": tensors,
        "bytes": target.stat().st_size,
        "types": written.types,
        "notes": [*checkpoint.source.notes, *written.notes],
        **found,
    }

"""Multiple-choice and last-word tasks from JSONL files, scored by log-likelihood.

Three kinds of row (the keys decide):

* ``query``, ``choices``, ``gold``, or HellaSwag's ``ctx``, ``endings``, ``label``: which choice is likeliest;
* ``context_options``, ``continuation``, ``gold``: after which context the continuation is likeliest (Winogrande);
* ``context``, ``continuation``: is the continuation what greedy decoding would give (LAMBADA).

Context and continuation are joined by one space and tokenized together; the continuation's tokens are those that end
after the context's last character. Accuracy is by the sum of log-likelihoods; ``accuracy_norm`` by the sum per byte of
the continuation, which does not favour short choices. Standard error: √(p(1−p)/(n−1)).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from tulle.errors import UserError
from tulle.evaluate.scoring import score_sequences
from tulle.evaluate.text import bos_id, encode_with_offsets

ROW_KINDS = "query+choices+gold, context_options+continuation+gold, or context+continuation"


class TaskScore(TypedDict):
    """Accuracies in [0, 1]; ``accuracy_norm`` is None for tasks without choices, standard errors for a single row."""

    task: str
    accuracy: float
    accuracy_stderr: float | None
    accuracy_norm: float | None
    accuracy_norm_stderr: float | None
    examples: int
    protocol: str


@dataclass(frozen=True)
class Example:
    """(context, continuation) pairs, of which ``gold`` should be likeliest; a single pair is to be greedy."""

    pairs: tuple[tuple[str, str], ...]
    gold: int


def read_examples(file: Path, limit: int | None = None) -> list[Example]:
    """The rows of a JSONL file. Raises ``UserError`` naming the first line that is not one of the three kinds."""
    examples: list[Example] = []
    try:
        content = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"expected UTF-8 text in {file}, found it unreadable ({error}); convert it first") from None
    for number, line in enumerate(content.split("\n"), 1):
        if limit is not None and len(examples) == limit:
            break
        if line.strip():
            try:
                examples.append(_example(json.loads(line)))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise UserError(
                    f"expected rows of {ROW_KINDS}, found another in {file}, line {number}; mend that line"
                ) from None
    if not examples:
        raise UserError(f"expected rows of {ROW_KINDS}, found none in {file}; check the file")
    return examples


def _example(row: dict[str, Any]) -> Example:
    if "endings" in row:
        row = {"query": row["ctx"], "choices": row["endings"], "gold": row["label"]}
    if "choices" in row:
        pairs = tuple((row["query"], choice) for choice in row["choices"])
    elif "context_options" in row:
        pairs = tuple((context, row["continuation"]) for context in row["context_options"])
    else:
        return Example((_checked(row["context"], row["continuation"]),), 0)
    gold = int(row["gold"])
    if len(pairs) < 2 or not 0 <= gold < len(pairs):
        raise ValueError(f"gold {gold} of {len(pairs)} choices")
    return Example(tuple(_checked(*pair) for pair in pairs), gold)


def _checked(context: str, continuation: str) -> tuple[str, str]:
    if not context.strip() or not continuation.strip():
        raise ValueError("an empty context or continuation")
    return context, continuation


def encode_pair(context: str, continuation: str, tokenizer: Any, longest: int) -> tuple[list[int], int]:
    """Ids (BOS first if there is one, cut from the left at ``longest``) and how many of them are context."""
    context = context.rstrip()
    ids, offsets = encode_with_offsets(f"{context} {continuation}", tokenizer)
    start = next((k for k, (_, end) in enumerate(offsets) if end > len(context) + 1), len(ids) - 1)
    first = bos_id(tokenizer)
    bos = [] if first is None else [first]
    keep = longest - len(bos)
    dropped = max(0, len(ids) - keep)
    ids, start = [*bos, *ids[dropped:]], max(0, start - dropped) + len(bos)
    return ids, max(1, start)  # without BOS and context the first token has nothing before it


def evaluate_task(
    model: Any,
    tokenizer: Any,
    file: Path,
    *,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TaskScore:
    """Accuracy on a JSONL task; ``limit``: only the first rows. ``model`` as for ``score_sequences``."""
    examples = read_examples(file, limit)
    longest = getattr(model.config, "max_position_embeddings", 2048)
    encoded = [encode_pair(*pair, tokenizer, longest) for e in examples for pair in e.pairs]
    scores = iter(score_sequences(model, [ids for ids, _ in encoded], [n for _, n in encoded], progress))
    raw, normalised, choices = 0, 0, len(examples[0].pairs) > 1
    for example in examples:
        found = [next(scores) for _ in example.pairs]
        if len(found) == 1:
            raw += found[0].greedy
            continue
        sums = [s.log_likelihood for s in found]
        per_byte = [s / max(1, len(pair[1].encode())) for s, pair in zip(sums, example.pairs, strict=True)]
        raw += sums.index(max(sums)) == example.gold
        normalised += per_byte.index(max(per_byte)) == example.gold
    n = len(examples)
    return TaskScore(
        task=file.stem,
        accuracy=raw / n,
        accuracy_stderr=_standard_error(raw / n, n),
        accuracy_norm=normalised / n if choices else None,
        accuracy_norm_stderr=_standard_error(normalised / n, n) if choices else None,
        examples=n,
        protocol=f"{file.name}: {n} rows, 0-shot, "
        + ("log-likelihood of each choice after its context" if choices else "continuation equals greedy decoding"),
    )


def _standard_error(p: float, n: int) -> float | None:
    return math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else None

"""What structured output costs: a mask by itself, and a decoding step with masks beside one without.

    python benchmarks/structured_output.py MODEL [--sequences 1 8] [--tokens 96] [--rounds 5] [--json FILE]

Masks: the grammar's texts are written by the model itself; then masks along them are timed alone, on one thread. Steps:
the same number of sequences decode with and without a grammar, in turns; medians over the rounds of the mean step. The
difference holds all that a grammar costs: what the mask takes that is not beside the forward pass, its use in sampling,
and accepting the token. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from tulle.engine import Engine, Request, Sampling
from tulle.engine.grammar import Grammar, Grammars

PROMPT = "Here is a list of people with name, age, address and interests, as JSON:\n"
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 3},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "kind": {"enum": ["customer", "supplier", "friend"]},
        "address": {"type": "object", "properties": {"street": {"type": "string"}, "zip": {
            "type": "string", "pattern": "^[0-9]{5}$"}}, "required": ["street", "zip"], "additionalProperties": False},
        "interests": {"type": "array", "items": {"type": "string", "maxLength": 40}, "maxItems": 5},
    },
    "required": ["name", "age", "kind", "address", "interests"],
    "additionalProperties": False,
}  # fmt: skip
GRAMMARS = {
    "schema": Grammar("json_schema", json.dumps({"type": "array", "items": PERSON, "minItems": 1000})),
    "any JSON": Grammar("json_schema", json.dumps({"type": "array", "items": {"type": "object"}, "minItems": 1000})),
    "regex": Grammar("regex", r"(- [A-Z][a-z ]{2,40}: [0-9]{1,3}\n)+"),
    "arithmetic": Grammar("gbnf", 'root ::= term ([-+*/] term)*\nterm ::= [0-9]{1,4} | "(" root ")"\n'),
}
"""None ends by itself within the tokens that are asked for."""


def decode(engine: Engine, sequences: int, tokens: int, constraint: Any) -> tuple[float, list[list[int]]]:
    """Seconds per step of so many sequences, prompts not counted; the tokens."""
    scheduler, prompt = engine.scheduler, engine.text.encode(PROMPT)
    running = [
        scheduler.add(Request(prompt, tokens, Sampling(0.8, 40, 0.95, seed=n), constraint=constraint, ignore_end=True))
        for n in range(sequences)
    ]
    while any(not s.tokens and s.finish is None for s in running):
        scheduler.step()
    steps, begun = 0, time.perf_counter()
    while all(s.finish is None for s in running):
        scheduler.step()
        steps += 1
    seconds = (time.perf_counter() - begun) / max(steps, 1)
    while not scheduler.idle:
        scheduler.step()
    return seconds, [s.tokens for s in running]


def masks(make: Any, texts: list[list[int]]) -> list[float]:
    """Seconds of every mask along these texts."""
    found = []
    for tokens in texts:
        matcher = make()
        for token in tokens:
            begun = time.perf_counter()
            matcher.mask()
            found.append(time.perf_counter() - begun)
            matcher.accept(token)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result: dict[str, Any] = {}
    for sequences in options.sequences:
        engine = Engine(options.model, options.threads, 1024, sequences)
        grammars = Grammars(engine.text, vocabulary=engine.vocabulary)
        grammars.compile(Grammar("json_object"))
        for name, grammar in GRAMMARS.items():
            begun = time.perf_counter()
            make = grammars.compile(grammar)
            compiled = time.perf_counter() - begun
            plain, held, texts = [], [], []
            for _ in range(options.rounds):
                plain.append(decode(engine, sequences, options.tokens, None)[0])
                seconds, texts = decode(engine, sequences, options.tokens, make)
                held.append(seconds)
            alone = masks(make, texts)
            step, more = statistics.median(plain), statistics.median(held)
            cell = {
                "compile_ms": compiled * 1e3,
                "mask_us_mean": float(np.mean(alone)) * 1e6,
                "mask_us_p95": float(np.quantile(alone, 0.95)) * 1e6,
                "mask_us_most": max(alone) * 1e6,
                "step_ms": step * 1e3,
                "step_ms_with": more * 1e3,
                "masks_share_of_step": float(np.mean(alone)) * sequences / step,
                "overhead": more / step - 1,
            }
            result[f"{name}, {sequences}"] = cell
            print(
                f"{name:12} {sequences:3} at once: mask {cell['mask_us_mean']:.0f} us (p95 {cell['mask_us_p95']:.0f}, "
                f"most {cell['mask_us_most']:.0f}), step {cell['step_ms']:.2f} -> {cell['step_ms_with']:.2f} ms "
                f"({100 * cell['overhead']:+.1f} %), compiled in {cell['compile_ms']:.1f} ms",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

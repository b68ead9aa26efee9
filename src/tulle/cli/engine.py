"""``tulle generate``, ``chat`` and ``bench``: the native engine. None of them imports torch or transformers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tulle.cli import common
from tulle.errors import UserError

if TYPE_CHECKING:
    from tulle.engine import Engine, Generation, Sampling

Threads = Annotated[int | None, typer.Option("--threads", metavar="N", min=1, help="[all physical cores]")]
Context = Annotated[
    int | None, typer.Option("--context", metavar="T", min=1, help="Tokens, prompt included [the model's, up to 4096].")
]
Cache = Annotated[
    str, typer.Option("--cache", metavar="KIND", help="Keys and values in bf16, f32, int8, int4, or as fits the model.")
]
Activations = Annotated[
    str,
    typer.Option(
        "--activations",
        metavar="KIND",
        help="Inputs of integer weights: 'as quantised' (by the recipe, else 16 bits) or int8 (faster, rougher).",
    ),
]
Head = Annotated[str, typer.Option("--head", metavar="KIND", help="Output head in int8, int4, bf16, or 'as stored'.")]
Layout = Annotated[
    str,
    typer.Option(
        "--layout", metavar="KIND", help="sparse, dense, input-major, dense input-major, or auto: the fastest here."
    ),
]
Weights = Annotated[
    str, typer.Option("--weights", metavar="KIND", help="Of a Scaling Transformer: f32, bf16, int8, or 'as stored'.")
]
Tokens = Annotated[int, typer.Option("--tokens", "-n", metavar="N", min=1, help="Generate at most so many.")]
Temperature = Annotated[float, typer.Option("--temperature", metavar="X", help="0 takes the likeliest token.")]
TopK = Annotated[int, typer.Option("--top-k", metavar="K", help="Only the K likeliest tokens; 0: all.")]
TopP = Annotated[float, typer.Option("--top-p", metavar="P", help="Only the likeliest tokens that add up to P.")]
MinP = Annotated[float, typer.Option("--min-p", metavar="P", help="Only tokens P times as likely as the likeliest.")]
Penalty = Annotated[float, typer.Option("--repetition-penalty", metavar="X", help="Above 1 avoids what occurred.")]
Seed = Annotated[int, typer.Option("--seed", metavar="S", help="Equal seeds give equal texts.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", metavar="TEXT", help="End before this; may be repeated.")]


def generate(
    model: common.Model,
    prompt: Annotated[str, typer.Option("--prompt", "-p", metavar="TEXT", help="What to continue; - reads it.")],
    tokens: Tokens = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = 0,
    stop: Stop = None,
    threads: Threads = None,
    context: Context = None,
    cache: Cache = "auto",
    activations: Activations = "as quantised",
    head: Head = "int8",
    layout: Layout = "auto",
    weights: Weights = "as stored",
    json_file: common.JsonFile = None,
) -> None:
    """Continue a text; tokens appear as they are made.

    Example: tulle generate reference -p 'def fibonacci(n):' -n 64
    """
    sampling = _sampling(temperature, top_k, top_p, repetition_penalty, seed, min_p)
    engine = _engine(model, threads, context, cache, activations, head, layout, weights)
    text = _read_input() if prompt == "-" else prompt
    quiet = str(json_file) == "-"
    engine.text.encode(text)  # a prompt that is no UTF-8 is refused before it is shown
    if not quiet:
        _write(text)
    found = engine.generate(text, tokens, sampling, stop or (), None if quiet else _write)
    if not quiet:
        _write("\n")
        print(_speed(found), file=sys.stderr)
    common.write_json(json_file, {"model": model, "prompt": text} | vars(found))


def chat(
    model: common.Model,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="What comes before the talk.")] = None,
    tokens: Tokens = 512,
    temperature: Temperature = 0.7,
    top_k: TopK = 40,
    top_p: TopP = 0.95,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = 0,
    threads: Threads = None,
    context: Context = None,
    cache: Cache = "auto",
    activations: Activations = "as quantised",
    head: Head = "int8",
    layout: Layout = "auto",
    weights: Weights = "as stored",
) -> None:
    """Talk to a model that has a chat template; an empty line or Ctrl-D ends it.

    Example: tulle chat out --system 'Answer briefly.'
    """
    from tulle.text.tokenizer import not_utf8

    sampling = _sampling(temperature, top_k, top_p, repetition_penalty, seed, min_p)
    engine = _engine(model, threads, context, cache, activations, head, layout, weights)
    messages = [{"role": "system", "content": system}] if system else []
    engine.text.chat([*messages, {"role": "user", "content": "?"}])  # fails now where there is no template
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise not_utf8(error.object) from None
        if not line.strip():
            return
        messages.append({"role": "user", "content": line})
        prompt = engine.text.encode(engine.text.chat(messages), special=False)
        room = engine.context - len(prompt)
        if room < 1:
            raise UserError(f"expected a conversation within {engine.context} tokens, found more; raise --context")
        found = engine.generate(prompt, min(tokens, room), sampling, (), _write)
        _write("\n")
        if sys.stdin.isatty():
            print(_speed(found), file=sys.stderr)
        messages.append({"role": "assistant", "content": found.text})


def bench(
    model: common.Model,
    prompt: Annotated[
        int | None,
        typer.Option("--prompt", metavar="T", min=1, help="Tokens of the prompt [512, or what the context holds]."),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option("--tokens", metavar="N", min=1, help="Tokens to decode [64, or half of a context that is short]."),
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", metavar="R", min=1, help="Medians of so many.")] = 5,
    threads: Threads = None,
    cache: Cache = "auto",
    activations: Activations = "as quantised",
    head: Head = "int8",
    layout: Layout = "auto",
    weights: Weights = "as stored",
    json_file: common.JsonFile = None,
) -> None:
    """Prefill and decode speed, and how near the memory's that is.

    Example: tulle bench out --prompt 256 --tokens 64
    """
    from tulle.engine.bench import fitting, measure

    engine = _engine(model, threads, None, cache, activations, head, layout, weights)
    length, count = fitting(engine.context, prompt, tokens)
    found = measure(engine, length, count, rounds)
    # What was not chosen, to see what the choice is worth.
    left_out = [name for name in engine.layouts if name != engine.layout] if layout == "auto" else []
    others = [
        measure(_engine(model, threads, None, cache, activations, head, name, weights), length, count, rounds)
        for name in left_out
    ]
    if str(json_file) != "-":
        from rich.table import Table

        shown = [found, *others]
        table = Table("", title=f"{model}, {found['threads']} threads, {found['isa']}")
        for speed in shown:
            table.add_column(speed["layout"] if len(engine.layouts) > 1 else "", justify="right")
        table.add_row(f"prefill of {length}, tokens/s", *(f"{speed['prefill_tokens_per_s']:.1f}" for speed in shown))
        table.add_row(f"decode of {count}, tokens/s", *(f"{speed['decode_tokens_per_s']:.1f}" for speed in shown))
        table.add_row("MB of weights per token", *(f"{speed['weight_bytes'] / 1e6:.1f}" for speed in shown))
        if any(speed["read_bytes"] < 0.99 * speed["weight_bytes"] for speed in shown):
            table.add_row("of which it reads", *(f"{speed['read_bytes'] / 1e6:.1f}" for speed in shown))
        table.add_row(
            "GB/s of weights (reading alone)",
            *(f"{speed['bandwidth_gb_s']:.1f} ({speed['read_gb_s']:.1f})" for speed in shown),
        )
        common.console().print(table)
    result = {"model": model} | dict(found)
    common.write_json(json_file, result | ({"other_layouts": [dict(other) for other in others]} if others else {}))


def _sampling(temperature: float, top_k: int, top_p: float, penalty: float, seed: int, min_p: float) -> Sampling:
    from tulle.engine import Sampling

    return Sampling(temperature, top_k, top_p, penalty, seed, min_p)


def _engine(
    model: str,
    threads: int | None,
    context: int | None,
    cache: str,
    activations: str,
    head: str,
    layout: str,
    weights: str,
) -> Engine:
    from tulle.engine import Engine
    from tulle.models.hub import local_folder

    folder: Path = local_folder(model)
    with common.progress_bars() as progress:
        options: dict[str, Any] = {
            "cache": cache,
            "activations": activations,
            "head": head,
            "layout": layout,
            "weights": weights,
        }
        return Engine(folder, threads, context, 1, **options, progress=progress)


def _read_input() -> str:
    """What standard input holds, without a mark of UTF-8 at its beginning. Raises ``UserError`` for other bytes."""
    from tulle.text.tokenizer import not_utf8

    # A stream that somebody put in its place may have no bytes.
    content = sys.stdin.buffer.read() if hasattr(sys.stdin, "buffer") else sys.stdin.read().encode()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise not_utf8(content) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _write(text: str) -> None:
    try:
        sys.stdout.write(text)
    except UnicodeEncodeError:  # a terminal of another encoding
        encoding = sys.stdout.encoding
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def _speed(found: Generation) -> str:
    cached = f" ({found.cached_tokens} from the cache)" if found.cached_tokens else ""
    first = f"{found.prompt_tokens} prompt tokens{cached} in {found.prefill_seconds:.2f} s"
    rest = len(found.tokens) - 1
    if rest < 1 or found.decode_seconds <= 0:
        return first
    return f"{first}, then {rest / found.decode_seconds:.1f} tokens/s"

"""``tulle serve``: models over HTTP. It imports neither torch nor transformers."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tulle.serve.registry import Registry


def _option(name: str, metavar: str, help: str, **more: Any) -> Any:
    return typer.Option(name, metavar=metavar, help=help, **more)


def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL...", help="Folders, .gguf files, 'reference' or hub ids; the first loads at once."
        ),
    ] = None,
    host: Annotated[
        str | None, _option("--host", "ADDRESS", "Where to listen; 0.0.0.0: everywhere [127.0.0.1].")
    ] = None,
    port: Annotated[int | None, _option("--port", "N", "0 takes a free one [8080].")] = None,
    served_name: Annotated[
        list[str] | None, _option("--served-name", "NAME", "What clients call a model; may be repeated, in order.")
    ] = None,
    api_key: Annotated[
        list[str] | None, _option("--api-key", "KEY", "A key clients must send; may be repeated.")
    ] = None,
    api_key_file: Annotated[Path | None, _option("--api-key-file", "FILE", "Keys, one per line.")] = None,
    threads: Annotated[int | None, _option("--threads", "N", "Of the engine [all physical cores].")] = None,
    sequences: Annotated[int | None, _option("--sequences", "N", "Run at once; others wait [16].")] = None,
    context: Annotated[
        int | None, _option("--context", "T", "Tokens of a sequence, prompt included [the model's, up to 4096].")
    ] = None,
    cache_memory: Annotated[
        str | None, _option("--cache-memory", "SIZE", "For keys, values, states, such as 4GB [what --sequences need].")
    ] = None,
    cache: Annotated[
        str | None, _option("--cache", "KIND", "Keys and values in f32, bf16, int8, int4 [as fits the model].")
    ] = None,
    queue: Annotated[
        int | None, _option("--queue", "N", "Sequences that wait at most; then clients get 503 [128].")
    ] = None,
    timeout: Annotated[
        float | None, _option("--timeout", "S", "Seconds of a request that says nothing [none].")
    ] = None,
    memory: Annotated[
        str | None, _option("--memory", "SIZE", "Of all loaded models; unused ones make room [no bound].")
    ] = None,
    cors: Annotated[
        list[str] | None, _option("--cors", "ORIGIN", "Web pages that may read answers; may be repeated.")
    ] = None,
    allow_host: Annotated[
        list[str] | None, _option("--allow-host", "NAME", "A name of this server, for one behind a proxy.")
    ] = None,
    max_body: Annotated[str | None, _option("--max-body", "SIZE", "Of a request [8MB].")] = None,
    log_prompts: Annotated[bool | None, typer.Option("--log-prompts", help="Write prompts and answers too.")] = None,
    drain_timeout: Annotated[
        float | None, _option("--drain-timeout", "S", "Seconds running requests get after SIGTERM [60].")
    ] = None,
    activations: Annotated[str | None, _option("--activations", "KIND", "As for generate.")] = None,
    head: Annotated[str | None, _option("--head", "KIND", "As for generate.")] = None,
    layout: Annotated[str | None, _option("--layout", "KIND", "As for generate.")] = None,
    weights: Annotated[str | None, _option("--weights", "KIND", "As for generate.")] = None,
    deterministic: Annotated[
        bool | None,
        typer.Option("--deterministic", help="Equal bits whatever else runs, of Scaling Transformers too; slower."),
    ] = None,
    config: Annotated[Path | None, _option("--config", "FILE", "These options in YAML; those given here win.")] = None,
) -> None:
    """Serve models over HTTP, as OpenAI's and Anthropic's clients expect.

    Example: tulle serve reference --port 8080
    """
    given = {name: value for name, value in locals().items() if name != "config" and value is not None}
    from tulle.serve.server import serve as run
    from tulle.serve.settings import load

    settings = load(config, given)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s")
    run(settings, _tell)


def _tell(address: str, registry: Registry) -> None:
    names = ", ".join(registry.entries)
    print(f"Tulle serves {names} on {address}", file=sys.stderr, flush=True)

"""The engine: a model folder, packed by tulle or dense, run by the native kernels. No torch, no transformers."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tulle import _native
from tulle.core.paley import hadamard_block
from tulle.engine.files import TensorFile
from tulle.engine.prepare import Progress, Source, hadamard, prepared, transform_facts
from tulle.engine.sampling import Sampler, Sampling
from tulle.engine.text import Stream, Text
from tulle.errors import UserError
from tulle.format.spec import HeadSpec, LinearSpec

BATCH = 256
"""Tokens of one forward pass; longer prompts take several."""
NO_GRID = {"bits": 0, "symmetric": True, "clip": 1.0}
GATES = {"silu": "silu", "swish": "silu", "relu2": "relu2", "gelu_pytorch_tanh": "gelu_tanh"}
CONTEXT = 4096
"""Tokens, where the model allows more and nothing else is asked."""


@dataclass
class Generation:
    """What :meth:`Engine.generate` returns."""

    text: str
    tokens: list[int]
    prompt_tokens: int
    prefill_seconds: float
    """From the prompt to the first token."""
    decode_seconds: float
    """Of the tokens after the first."""
    finish: Literal["length", "end", "stop"] = "length"


@dataclass
class _Running:
    """One sequence of a batch."""

    number: int
    slot: int
    tokens: list[int]
    sampler: Sampler
    stream: Stream
    left: int
    given: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    finish: Literal["length", "end", "stop"] = "length"


class Engine:
    """A model in memory, ready to generate.

    ``threads`` [all cores]; ``context`` tokens per sequence [the model's, at most 4096]; ``sequences`` that run at
    once; ``cache``: keys and values in bf16, f32 or int8 [int8 where the model quantises them anyway, else bf16];
    ``activations``: ``recorded`` (as the recipe said; 16 bits where it left the inputs of integer weights unquantised)
    or ``int8`` (8 bits per token there, faster); ``head``: the output head in int8, bf16, or as stored. Raises
    ``UserError`` for a folder that is broken or a model that is not supported.
    """

    def __init__(
        self,
        path: str | Path,
        threads: int | None = None,
        context: int | None = None,
        sequences: int = 1,
        cache: str = "auto",
        activations: str = "recorded",
        head: str = "int8",
        progress: Progress | None = None,
    ):
        folder = Path(path)
        if activations not in ("recorded", "int8"):
            raise UserError(f"expected activations recorded or int8, found {activations!r}")
        if cache not in ("auto", "bf16", "f32", "int8"):
            raise UserError(f"expected a cache in auto, bf16, f32 or int8, found {cache!r}")
        if sequences < 1 or (threads is not None and threads < 1) or (context is not None and context < 1):
            raise UserError("expected at least one thread, sequence and token of context, found fewer")
        source, file, facts = prepared(folder, head, progress)
        if cache == "auto":
            # Codes of quantised keys and values are what they are in a cache of bytes.
            attention = source.packed.attention if source.packed else None
            cache = "int8" if attention and attention.key and attention.value else "bf16"
        limit = source.config.get("max_position_embeddings")
        if context is not None and isinstance(limit, int) and context > limit:
            raise UserError(f"expected a context of at most {limit} tokens, as the model has, found {context}")
        self.folder = folder
        self.context = context or min(limit if isinstance(limit, int) else CONTEXT, CONTEXT)
        self.sequences, self.threads = sequences, threads or os.cpu_count() or 1
        self.vocabulary = source.anatomy.vocabulary
        self.config = source.config
        self._text: Text | None = None
        settings = settings_of(source, file, facts, 16 if activations == "recorded" else 8)
        try:
            self._native = _native.Engine(settings, sequences, self.context, BATCH, cache, self.threads)
        except ValueError as error:
            raise UserError(f"expected a model that the engine can run in {folder}, found {error}") from None

    @property
    def text(self) -> Text:
        """The tokenizer, read when it is first used."""
        if self._text is None:
            self._text = Text(self.folder)
        return self._text

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that one token reads."""
        return int(self._native.weight_bytes)

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values, once the context is full."""
        return int(self._native.cache_bytes)

    def forward(
        self,
        tokens: Sequence[int],
        slots: Sequence[int] | int = 0,
        positions: Sequence[int] | int = 0,
        wanted: Sequence[int] | None = None,
    ) -> NDArray[np.float32]:
        """Logits ``[len(wanted), V]`` (default: of every token), keys and values being kept.

        Token i stands at ``positions[i]`` of sequence ``slots[i]``; one number stands for one sequence, or for
        consecutive positions from there on. Raises ``UserError`` for tokens or positions out of range.
        """
        n = len(tokens)
        ids = np.asarray(tokens, np.int32)
        slot = np.full(n, slots, np.int32) if isinstance(slots, int) else np.asarray(slots, np.int32)
        places = range(positions, positions + n) if isinstance(positions, int) else positions
        place = np.asarray(places, np.int32)
        rows = np.arange(n) if wanted is None else np.asarray(wanted, np.int64)
        logits = np.empty((len(rows), self.vocabulary), np.float32)
        for start in range(0, n, BATCH):
            part = slice(start, min(start + BATCH, n))
            first, last = np.searchsorted(rows, [part.start, part.stop])
            here = np.ascontiguousarray(rows[first:last] - start, np.int32)
            try:
                self._native.forward(ids[part], slot[part], place[part], here, logits[first:last])
            except ValueError as error:
                raise UserError(str(error)) from None
        return logits

    def generate(
        self,
        prompt: str | Sequence[int],
        max_tokens: int = 128,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        on_text: Callable[[str], None] | None = None,
        ignore_end: bool = False,
    ) -> Generation:
        """Continues a prompt (text or tokens). ``on_text`` gets the text piece by piece as it becomes certain."""
        tokens = self.text.encode(prompt) if isinstance(prompt, str) else list(prompt)
        begun = time.perf_counter()
        run = self._run([tokens], max_tokens, [sampling or Sampling()], stop, on_text, ignore_end)
        found = next(run)
        first = time.perf_counter()
        for _ in run:
            pass
        ended = time.perf_counter()
        return Generation("".join(found.pieces), found.given, len(tokens), first - begun, ended - first, found.finish)

    def generate_many(
        self,
        prompts: Sequence[str | Sequence[int]],
        max_tokens: int = 128,
        sampling: Sampling | Sequence[Sampling] | None = None,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """Continuations of several prompts, up to ``sequences`` of them at once. A sequence gets the text that it gets
        alone, up to rounding."""
        tokens = [self.text.encode(p) if isinstance(p, str) else list(p) for p in prompts]
        each = [sampling or Sampling()] * len(tokens) if not isinstance(sampling, Sequence) else list(sampling)
        if len(each) != len(tokens):
            raise UserError(f"expected one sampling per prompt, found {len(each)} for {len(tokens)}")
        texts = [""] * len(tokens)
        for running in self._run(tokens, max_tokens, each, stop, None, False):
            texts[running.number] = "".join(running.pieces)
        return texts

    def _run(
        self,
        prompts: Sequence[list[int]],
        max_tokens: int,
        sampling: Sequence[Sampling],
        stop: Sequence[str],
        on_text: Callable[[str], None] | None,
        ignore_end: bool,
    ) -> Iterator[_Running]:
        """Yields a sequence whenever it got a token. Waiting prompts take the slots of finished ones."""
        for tokens in prompts:
            if not tokens:
                raise UserError("expected a prompt of at least one token, found none")
            if len(tokens) + max_tokens > self.context:
                raise UserError(
                    f"expected prompt and continuation within {self.context} tokens, found {len(tokens)} and "
                    f"{max_tokens}; raise the context or ask for fewer tokens"
                )
        if max_tokens < 1:
            raise UserError(f"expected at least one token to generate, found {max_tokens}")
        waiting = list(range(len(prompts)))[::-1]
        active: list[_Running] = []
        free = list(range(self.sequences))[::-1]
        ends = frozenset() if ignore_end else self.text.end_tokens
        while waiting or active:
            while waiting and free:
                number = waiting.pop()
                stream = Stream(self.text, stop)
                new = _Running(number, free.pop(), list(prompts[number]), Sampler(sampling[number]), stream, max_tokens)
                logits = self.forward(new.tokens, new.slot, 0, [len(new.tokens) - 1])
                yield self._take(new, logits[0], ends, on_text)
                if new.left:
                    active.append(new)
                else:
                    free.append(new.slot)
            if not active:
                continue
            logits = self.forward(
                [r.tokens[-1] for r in active], [r.slot for r in active], [len(r.tokens) - 1 for r in active]
            )
            for running, row in zip(active, logits, strict=True):
                yield self._take(running, row, ends, on_text)
            free += [r.slot for r in active if not r.left]
            active = [r for r in active if r.left]

    def _take(
        self,
        running: _Running,
        logits: NDArray[np.float32],
        ends: frozenset[int],
        on_text: Callable[[str], None] | None,
    ) -> _Running:
        """Chooses the sequence's next token and keeps its text; ``left`` 0 says that it was the last."""
        token = running.sampler.choose(logits, running.tokens)
        running.tokens.append(token)
        running.left -= 1
        if token in ends:
            running.left, running.finish, piece = 0, "end", ""
        else:
            running.given.append(token)
            piece = running.stream.add(token)
            if running.stream.stopped:
                running.left, running.finish = 0, "stop"
        if running.left == 0:
            piece += running.stream.finish()
        if piece:
            running.pieces.append(piece)
            if on_text:
                on_text(piece)
        return running


def settings_of(source: Source, file: TensorFile, facts: Mapping[str, Any], unquantised: int) -> dict[str, Any]:
    """The model as the native engine takes it; inputs of integer weights that the file leaves unquantised get
    ``unquantised`` bits."""
    model, config, packed = source.anatomy, source.config, source.packed
    specs = packed.linears if packed else {}
    attention = packed.attention if packed else None
    gate = GATES.get(config.get("hidden_act", "silu"))
    if gate is None:
        raise UserError(f"expected hidden_act of {', '.join(GATES)}, found {config['hidden_act']!r}")

    def linear(name: str, key: str, spec: LinearSpec | None) -> dict[str, Any]:
        found = facts[key]
        grid = dict(NO_GRID)
        if spec is not None and spec.input_bits is not None:
            grid = {"bits": spec.input_bits, "symmetric": spec.input_symmetric, "clip": spec.input_clip}
        elif found["kind"].startswith("codes"):
            grid["bits"] = unquantised
        arrays = {
            suffix: file.tensor(f"{key}.{suffix}") if f"{key}.{suffix}" in file else None
            for suffix in ("values", "masks", "offsets", "scales", "zeros")
        }
        bias = source.floats(f"{name}.bias", (found["rows"],)) if f"{name}.bias" in source else None
        return dict(found) | arrays | {"bias": bias, "input": grid}

    def group(prefix: str, names: Sequence[str]) -> dict[str, Any]:
        full = [prefix + name for name in names]
        spec = specs.get(full[0])
        if any((s.transform if (s := specs.get(n)) else ()) != (spec.transform if spec else ()) for n in full):
            raise UserError(f"expected the same transforms in front of {', '.join(full)}, found different ones")
        transforms = transform_facts(spec, source, spec.transform_of or full[0]) if spec else []
        return {"transforms": transforms, "linears": [linear(n, n, specs.get(n)) for n in full]}

    rows = {row.role: row for row in model.rows}
    layers = []
    for index in range(model.layers):
        prefix = model.block_prefix(index)

        def gain(name: str | None, size: int, prefix: str = prefix) -> NDArray[np.float32] | None:
            return None if name is None else source.floats(f"{prefix}{name}.weight", (size,))

        query, key = model.query_key_norms or (None, None)
        layers.append(
            {role: group(prefix, row.linears) for role, row in rows.items()}
            | {
                "input_norm": gain(rows["qkv"].norm, model.hidden),
                "post_norm": gain(rows["gate_up"].norm, model.hidden),
                "query_norm": gain(query, model.head_dim),
                "key_norm": gain(key, model.head_dim),
                "window": window(config, index),
            }
        )
    head = model.architecture.embedding if model.tied else model.architecture.head
    embedding = source.tensor(model.architecture.embedding, (model.vocabulary, model.hidden))
    bf16 = source.dtype(model.architecture.embedding) == "BF16"
    frequencies, scale = rope(config, model.head_dim)
    rotation = None
    if attention and attention.hadamard and hadamard_block(model.head_dim) > 1:
        rotation = {"kind": "hadamard", "channels": model.head_dim} | hadamard(hadamard_block(model.head_dim))
    return {
        "hidden": model.hidden,
        "intermediate": model.intermediate,
        "heads": model.heads,
        "kv_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "vocabulary": model.vocabulary,
        "eps": float(config.get("rms_norm_eps", 1e-6)),
        "gate": gate,
        "inverse_frequencies": frequencies.tolist(),
        "rope_scale": scale,
        "query": _head(attention.query if attention else None),
        "key": _head(attention.key if attention else None),
        "value": _head(attention.value if attention else None),
        "head_rotation": rotation,
        "embedding_kind": "bf16" if bf16 else "f32",
        "embedding": (embedding if bf16 else embedding.astype(np.float32)).reshape(-1),
        "norm": source.floats(model.architecture.final_norm, (model.hidden,)),
        "head": {"transforms": [], "linears": [linear(head.removesuffix(".weight"), "head", None)]},
        "layers": layers,
    }


def _head(spec: HeadSpec | None) -> dict[str, Any]:
    return NO_GRID if spec is None else {"bits": spec.bits, "symmetric": spec.symmetric, "clip": spec.clip}


def window(config: Mapping[str, Any], layer: int) -> int:
    """Tokens that attention of a layer reaches back, 0 for all."""
    size = config.get("sliding_window")
    if not isinstance(size, int):
        return 0
    kinds = config.get("layer_types")
    if isinstance(kinds, list):
        return size if layer < len(kinds) and kinds[layer] == "sliding_attention" else 0
    if config.get("model_type") == "mistral":
        return size
    if not config.get("use_sliding_window", False):
        return 0
    return size if layer >= int(config.get("max_window_layers", 0)) else 0


def rope(config: Mapping[str, Any], head_dim: int) -> tuple[NDArray[np.float32], float]:
    """Inverse frequencies ``[head_dim/2]`` and the factor on cosines and sines.

    Plain, ``linear`` and ``llama3`` scaling. Raises ``UserError`` for another.
    """
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(found.get("rope_theta", config.get("rope_theta", 10000.0)))
    inverse = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    kind = found.get("rope_type", found.get("type", "default"))
    if kind == "linear":
        inverse /= float(found["factor"])
    elif kind == "llama3":
        factor, low, high = (float(found[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
        turns = float(found["original_max_position_embeddings"]) * inverse / (2 * math.pi)
        smooth = ((turns - low) / (high - low)).clip(0, 1)
        inverse = (1 - smooth) * inverse / factor + smooth * inverse
    elif kind != "default":
        raise UserError(f"expected rotary embeddings of type default, linear or llama3, found {kind!r}")
    return inverse.astype(np.float32), 1.0

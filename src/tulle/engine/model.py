"""The engine: a model folder, packed by tulle or dense, run by the native kernels. No torch, no transformers."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tulle import _native
from tulle.cache import FOLDER
from tulle.engine import scaling
from tulle.engine.checkpoint import Checkpoint, Source
from tulle.engine.choose import check_layout, choose_layout, layouts_for
from tulle.engine.native_model import consecutive_pages
from tulle.engine.prepare import Progress, prepared
from tulle.engine.sampling import Sampler, Sampling
from tulle.engine.settings import settings_of
from tulle.errors import UserError
from tulle.models.description import describe, families
from tulle.models.source import open_source
from tulle.text.tokenizer import ModelTokenizer, TextStream
from tulle.text.tokenizer_folder import read_tokenizer

BATCH = 256
"""Tokens of one forward pass; longer prompts take several."""
FINE_CACHE = 1 << 28
"""Bytes up to which keys and values stay in float32."""
AS_QUANTISED = "as quantised"
"""Inputs of integer weights as the recipe quantised them; in 16 bits where it did not."""
CONTEXT = 4096
"""Tokens, where the model allows more and nothing else is asked."""


def default_threads() -> int:
    """Physical cores that this process may use: two threads on one core only take turns at its memory."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    allowed = os.sched_getaffinity(0)
    cores = set()
    for cpu in allowed:
        try:
            siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
        except OSError:
            return len(allowed)
        cores.add(siblings.strip())
    return max(len(cores), 1)


def _limit(config: Mapping[str, Any]) -> int | None:
    """Tokens that a model is said to support."""
    if config.get("model_type") in families():
        return describe(config).context
    found = config.get("max_position_embeddings")
    return found if isinstance(found, int) else None


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
    stream: TextStream
    left: int
    given: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    finish: Literal["length", "end", "stop"] = "length"


class Engine:
    """A model in memory, ready to generate.

    ``threads`` [all physical cores]; ``context`` tokens per sequence [the model's, at most 4096]; ``sequences`` that
    run at once; ``cache``: keys and values in f32, bf16, int8 or int4 [int8 where the model quantises them
    anyway, else f32 up to 256 MB, then bf16]; ``activations``: ``as quantised`` (as the recipe said; 16 bits where it left the inputs of
    integer weights unquantised) or ``int8`` (8 bits per token there, faster); ``head``: the output head in int8, int4
    (not of a Scaling Transformer), bf16, or as stored; ``layout`` of the weights: ``sparse``, ``dense`` (pruned ones
    densified), ``input-major``, ``dense input-major`` (inputs that are left out are not read) or what is faster here,
    which is tried once [``auto``];
    ``weights`` of a Scaling Transformer: f32, bf16, int8 [as stored], int8 with inputs of 8 bits whatever
    ``activations`` says (see :mod:`tulle.engine.scaling`). Raises ``UserError`` for a folder that is broken or a model
    that is not supported.
    """

    def __init__(
        self,
        path: str | Path,
        threads: int | None = None,
        context: int | None = None,
        sequences: int = 1,
        cache: str = "auto",
        activations: str = AS_QUANTISED,
        head: str = "int8",
        layout: str = "auto",
        progress: Progress | None = None,
        weights: str = "as stored",
    ):
        folder = Path(path)
        if activations not in (AS_QUANTISED, "int8"):
            hint = f"; its name is {AS_QUANTISED} now" if activations == "recorded" else ""
            raise UserError(f"expected activations {AS_QUANTISED} or int8, found {activations!r}{hint}")
        if cache not in ("auto", "bf16", "f32", "int8", "int4"):
            raise UserError(f"expected a cache in auto, bf16, f32, int8 or int4, found {cache!r}")
        if sequences < 1 or (threads is not None and threads < 1) or (context is not None and context < 1):
            raise UserError("expected at least one thread, sequence and token of context, found fewer")
        self.sequences, self.threads = sequences, threads or default_threads()
        self.folder, self._stored = folder, open_source(folder)
        self.config = self._stored.config
        limit = _limit(self.config)
        if context is not None and limit is not None and context > limit:
            raise UserError(f"expected a context of at most {limit} tokens, as the model has, found {context}")
        self.context = context or min(limit or CONTEXT, CONTEXT)
        self._tables = consecutive_pages(self.sequences, self.context)
        self._text: ModelTokenizer | None = None
        try:
            if self.config.get("model_type") == scaling.MODEL_TYPE:
                self._open_scaling(cache, weights, head, layout, progress)
            else:
                self._open(cache, activations, head, layout, weights, progress)
        except ValueError as error:
            raise UserError(
                f"expected a model that the engine can run in {folder}, found {error}; if its {FOLDER} folder was "
                "changed, delete that"
            ) from None

    def _open(
        self, cache: str, activations: str, head: str, layout: str, weights: str, progress: Progress | None
    ) -> None:
        if weights != scaling.WEIGHTS[0]:
            raise UserError(
                f"expected weights {scaling.WEIGHTS[0]} for a model that is no Scaling Transformer, found {weights!r}; "
                "tulle compress makes others"
            )
        source, bits = Source(self._stored), 16 if activations == AS_QUANTISED else 8
        chosen = choose_layout(source, layout, head, bits, self.threads)
        self.layouts, self.layout = [str(name) for name in layouts_for(source)], str(chosen)
        file, facts = prepared(source, head, chosen, progress)
        model = source.description
        mixer = model.layers[0].mixer
        if cache == "auto":
            # Codes of quantised keys and values are what they are in a cache of bytes.
            attention = source.packed.attention if source.packed else None
            plain = self._fine_or_bf16(len(model.layers) * mixer.kv_heads * mixer.head_dim)
            cache = "int8" if attention and attention.key and attention.value else plain
        self.vocabulary = model.vocabulary
        settings = settings_of(source, file, facts, bits, range(len(model.layers)))
        self._native: _native.Engine | _native.ScalingEngine
        self._native = _native.Engine(
            settings, self._tables.size, self.sequences, self.context, BATCH, cache, self.threads
        )

    def _open_scaling(self, cache: str, weights: str, head: str, layout: str, progress: Progress | None) -> None:
        check_layout(layout)
        shape, settings = scaling.settings_of(Checkpoint(self._stored), weights, head, progress)
        self.layouts, self.layout, self.vocabulary = ["dense"], "dense", shape.vocabulary
        if cache == "auto":
            cache = self._fine_or_bf16(shape.layers * shape.hidden)
        self._native = _native.ScalingEngine(
            settings, self._tables.size, self.sequences, self.context, BATCH, cache, self.threads
        )

    def _fine_or_bf16(self, numbers: int) -> str:
        """Of a cache with so many keys, and as many values, per token."""
        return "f32" if 8 * numbers * self.context * self.sequences <= FINE_CACHE else "bf16"

    @property
    def text(self) -> ModelTokenizer:
        """The tokenizer, read when it is first used."""
        if self._text is None:
            self._text = read_tokenizer(self._stored.tokenizer)
        return self._text

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that one token reads."""
        return int(self._native.weight_bytes)

    def take_bytes_per_token(self) -> float:
        """Bytes of weights that a token read, on average over the passes of one token since the last call (0 without
        any): less than ``weight_bytes`` where weights are input-major and tokens leave inputs out, or where chosen
        units of a Scaling Transformer are at zero."""
        return float(self._native.take_bytes_per_token())

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
                self._native.forward(ids[part], slot[part], place[part], self._tables, here, logits[first:last])
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
                stream = self.text.stream(prompts[number], stop)
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
            if running.stream.stopped:
                running.finish = "stop"
        if piece:
            running.pieces.append(piece)
            if on_text:
                on_text(piece)
        return running

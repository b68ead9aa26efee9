"""The engine: a model folder, packed by tulle or dense, run by the native kernels. No torch, no transformers."""

from __future__ import annotations

import os
import threading
import time
from collections import abc, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tulle import _native
from tulle.cache import FOLDER
from tulle.engine import scaling
from tulle.engine.checkpoint import Checkpoint, Source
from tulle.engine.choose import check_layout, choose_layout, layouts_for
from tulle.engine.kv_cache import PAGE, KVCache, PageTable
from tulle.engine.prepare import Progress, prepared
from tulle.engine.request import Event, Finish, Request
from tulle.engine.runnable import kept_of
from tulle.engine.sampling import Sampling
from tulle.engine.scheduler import Scheduler
from tulle.engine.settings import settings_of
from tulle.errors import UserError
from tulle.models.description import describe, families
from tulle.models.source import open_source
from tulle.text.tokenizer import ModelTokenizer
from tulle.text.tokenizer_folder import read_tokenizer

BATCH = 256
"""Tokens of one forward pass; longer prompts take several."""
FINE_CACHE = 1 << 28
"""Bytes up to which keys and values stay in float32."""
AS_QUANTISED = "as quantised"
"""Inputs of integer weights as the recipe quantised them; in 16 bits where it did not."""
CACHES = ("f32", "bf16", "int8", "int4")
"""How keys and values are kept."""
SNAPSHOTS, SNAPSHOT_MEMORY = 4, 1 << 27
"""Recurrent states that are kept for others to go on from: so many beside one per sequence that runs at once, or as
many as fit into so many bytes, where that is more."""
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


def _page_bytes(cache: str, heads: int, numbers: int) -> int:
    """Of a page of keys and values, so many numbers per token and head; with steps and zero points where they are
    quantised."""
    bits, steps = {"f32": (32, 0), "bf16": (16, 0), "int8": (8, 16), "int4": (4, 16)}[cache]
    return PAGE * heads * (numbers * bits // 8 + steps)


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
    finish: Finish = "length"
    cached_tokens: int = 0
    """Of the prompt, that were found in the cache."""


class Engine:
    """A model in memory, ready to generate.

    ``threads`` [all physical cores]; ``context`` tokens per sequence [the model's, at most 4096]; ``sequences`` that
    run at once; ``cache``: keys and values in f32, bf16, int8 or int4 [int8 where the model quantises them anyway,
    else f32 up to 256 MB, then bf16]; ``activations``: ``as quantised`` (as the recipe said; 16 bits where it left the
    inputs of integer weights unquantised) or ``int8`` (8 bits per token there, faster); ``head``: the output head in
    int8, int4 (not of a Scaling Transformer), bf16, or as stored (one in codes is, unless int4 is asked for and it has
    more bits); ``layout`` of the weights: ``sparse``, ``dense``
    (pruned ones densified), ``input-major``, ``dense input-major`` (inputs that are left out are not read) or what is
    faster here, which is tried once [``auto``]; ``weights`` of a Scaling Transformer: f32, bf16, int8 [as stored], int8
    with inputs of 8 bits whatever ``activations`` says (see :mod:`tulle.engine.scaling`); ``cache_memory``: bytes of
    keys and values, and of recurrent states [what ``sequences`` need]; ``deterministic``: a sequence gets the same bits
    whatever else runs with it and however its prompt is cut into passes, for one number of threads. Without it that
    holds as well, but for Scaling Transformers with matrices of floats, which are faster so.

    Several threads may use an engine: one waits for the other. Raises ``UserError`` for a folder that is broken or a
    model that is not supported.
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
        cache_memory: int | None = None,
        deterministic: bool = False,
    ):
        folder = Path(path)
        if activations not in (AS_QUANTISED, "int8"):
            hint = f"; its name is {AS_QUANTISED} now" if activations == "recorded" else ""
            raise UserError(f"expected activations {AS_QUANTISED} or int8, found {activations!r}{hint}")
        if cache not in ("auto", *CACHES):
            raise UserError(f"expected a cache in auto, {', '.join(CACHES)}, found {cache!r}")
        if sequences < 1 or (threads is not None and threads < 1) or (context is not None and context < 1):
            raise UserError("expected at least one thread, sequence and token of context, found fewer")
        self.sequences, self.threads = sequences, threads or default_threads()
        self.folder, self._stored = folder, open_source(folder)
        self.config = self._stored.config
        limit = _limit(self.config)
        if context is not None and limit is not None and context > limit:
            raise UserError(f"expected a context of at most {limit} tokens, as the model has, found {context}")
        self.context = context or min(limit or CONTEXT, CONTEXT)
        self._text: ModelTokenizer | None = None
        self._scheduler: Scheduler | None = None
        # Of :meth:`forward`: whose past lies where.
        self._tables = np.full((sequences, -(-self.context // PAGE)), -1, np.int32)
        self._pages: dict[int, PageTable] = {}
        self._lengths: dict[int, int] = {}
        self._lock = threading.RLock()
        self._cache_memory, self._deterministic = cache_memory, deterministic
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
        kept = kept_of(source)
        if cache == "auto":
            # Codes of quantised keys and values are what they are in a cache of bytes.
            attention = source.packed.attention if source.packed else None
            plain = self._fine_or_bf16(sum(one.heads * (one.key_dim + one.value_dim) for one in kept))
            cache = "int8" if attention and attention.key and attention.value else plain
        self.vocabulary, self.cache_kind = model.vocabulary, cache
        settings = settings_of(source, file, facts, bits, range(len(model.layers)), self.context)
        page_bytes = sum(_page_bytes(cache, one.heads, one.key_dim + one.value_dim) for one in kept)
        state_bytes = settings.state_bytes
        pages, snapshots = self._count_pages(page_bytes, state_bytes)
        self._native: _native.Engine | _native.ScalingEngine
        self._native = _native.Engine(
            settings, pages, self.sequences, self.context, BATCH, cache, self.threads, snapshots
        )
        self._kv, self.hidden = KVCache(pages, snapshots, recurrent=state_bytes > 0), model.hidden

    def _open_scaling(self, cache: str, weights: str, head: str, layout: str, progress: Progress | None) -> None:
        check_layout(layout)
        shape, settings = scaling.settings_of(Checkpoint(self._stored), weights, head, progress)
        self.layouts, self.layout, self.vocabulary = ["dense"], "dense", shape.vocabulary
        if cache == "auto":
            cache = self._fine_or_bf16(2 * shape.layers * shape.hidden)
        self.cache_kind = cache
        pages, _ = self._count_pages(_page_bytes(cache, shape.layers * shape.heads, 2 * shape.hidden // shape.heads))
        # Every page's end may be where another sequence goes on.
        self._native = _native.ScalingEngine(
            settings, pages, self.sequences, self.context, BATCH, cache, self.threads, pages, self._deterministic
        )
        self._kv, self.hidden = KVCache(pages, pages if self._native.state_bytes else 0), shape.hidden

    def _count_pages(self, page_bytes: int, state_bytes: int = 0) -> tuple[int, int]:
        """Pages, and snapshots of recurrent states of so many bytes, that fit into the memory for both beside the
        states of the sequences that run, or that all sequences need. Raises ``UserError`` where not even one page
        fits."""
        whole = self.sequences * -(-self.context // PAGE)
        wanted = max(SNAPSHOTS + self.sequences, SNAPSHOT_MEMORY // state_bytes) if state_bytes else 0
        if self._cache_memory is None:
            return whole, min(wanted, whole)
        left = self._cache_memory - self.sequences * state_bytes
        # Half for the states: pages alone would know texts that no sequence can go on from.
        snapshots = min(wanted, max(left, 0) // 2 // state_bytes) if state_bytes else 0
        pages = (left - snapshots * state_bytes) // page_bytes
        if pages < 1:
            beside = f" beside {self.sequences} recurrent states of {state_bytes}" if state_bytes else ""
            raise UserError(
                f"expected memory for at least one page of {page_bytes} bytes of keys and values{beside}, found "
                f"{self._cache_memory}; give more"
            )
        return pages, min(snapshots, pages)

    def _fine_or_bf16(self, numbers: int) -> str:
        """Of a cache with so many numbers per token."""
        return "f32" if 4 * numbers * self.context * self.sequences <= FINE_CACHE else "bf16"

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

    @property
    def recurrent(self) -> bool:
        """A sequence goes on from a state, which cannot be taken back by a few tokens as keys and values can."""
        return self._kv.recurrent

    def take_bytes_per_token(self) -> float:
        """Bytes of weights that a token read, on average over the passes of one token since the last call (0 without
        any): less than ``weight_bytes`` where weights are input-major and tokens leave inputs out, or where chosen
        units of a Scaling Transformer are at zero."""
        return float(self._native.take_bytes_per_token())

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values, once the context is full, and of recurrent states."""
        return int(self._native.cache_bytes)

    def reserve_cache(self) -> None:
        """Takes the memory of all pages from the system now, not when they are first written to: what a server does
        before it says that it is ready. For an engine that has not run yet."""
        with self._lock:
            self._check_idle()
            for page in range(self._kv.pages):
                self._native.copy_page(0, page)
            for snapshot in range(self._kv.snapshots):
                self._native.save_state(0, snapshot)
            for slot in range(self.sequences if self._kv.snapshots else 0):
                self._native.load_state(0, slot)

    @property
    def scheduler(self) -> Scheduler:
        """Runs requests; made on first use. What prompts left in the cache serves the next ones."""
        if self._scheduler is None:
            self._scheduler = Scheduler(
                self._native,
                self._kv,
                self.text,
                slots=self.sequences,
                context=self.context,
                batch=BATCH,
                vocabulary=self.vocabulary,
                hidden=self.hidden,
            )
        return self._scheduler

    def forward(
        self,
        tokens: abc.Sequence[int],
        slots: abc.Sequence[int] | int = 0,
        positions: abc.Sequence[int] | int = 0,
        wanted: abc.Sequence[int] | None = None,
    ) -> NDArray[np.float32]:
        """Logits ``[len(wanted), V]`` (default: of every token), keys and values being kept until text is generated.

        Token i stands at ``positions[i]`` of sequence ``slots[i]``; one number stands for one sequence, or for
        consecutive positions from there on. Raises ``UserError`` for tokens or positions out of range, for a position
        whose past was not given, and while requests run.
        """
        n = len(tokens)
        ids = np.asarray(tokens, np.int32)
        slot = np.full(n, slots, np.int32) if isinstance(slots, int) else np.asarray(slots, np.int32)
        places = range(positions, positions + n) if isinstance(positions, int) else positions
        place = np.asarray(places, np.int32)
        rows = np.arange(n) if wanted is None else np.asarray(wanted, np.int64)
        logits = np.empty((len(rows), self.vocabulary), np.float32)
        with self._lock:
            self._check_idle()
            for start in range(0, n, BATCH):
                part = slice(start, min(start + BATCH, n))
                first, last = np.searchsorted(rows, [part.start, part.stop])
                here = np.ascontiguousarray(rows[first:last] - start, np.int32)
                self._make_room(slot[part], place[part])
                try:
                    self._native.forward(ids[part], slot[part], place[part], self._tables, here, logits[first:last])
                except ValueError as error:
                    raise UserError(str(error)) from None
                for one, position in zip(slot[part].tolist(), place[part].tolist(), strict=True):
                    self._lengths[one] = position + 1
        return logits

    def _make_room(self, slots: NDArray[np.int32], positions: NDArray[np.int32]) -> None:
        """Pages for tokens of :meth:`forward`; what is out of range is left to the native engine to refuse."""
        lengths = dict(self._lengths)
        for slot, position in zip(slots.tolist(), positions.tolist(), strict=True):
            if not (0 <= slot < self.sequences and 0 <= position < self.context):
                return
            # What a recurrent state goes on from, the native engine knows better.
            if position > lengths.get(slot, 0) and not self._kv.recurrent:
                raise UserError(
                    f"position of sequence {slot}: expected at most {lengths.get(slot, 0)}, up to where its past was "
                    f"given, found {position}"
                )
            lengths[slot] = position + 1
        for slot, length in lengths.items():
            if slot not in self._pages:
                self._pages[slot] = PageTable(self._kv, self._tables[slot])
            if not self._pages[slot].grow(length):
                raise UserError(f"expected a cache with room for {length} tokens of a sequence, found it full")

    def _check_idle(self) -> None:
        if self._scheduler is not None and not self._scheduler.idle:
            raise UserError("expected an engine that does nothing else, found one whose scheduler runs requests")

    def _forget(self) -> None:
        """Gives back the pages of :meth:`forward`."""
        for table in self._pages.values():
            table.close()
        self._pages.clear()
        self._lengths.clear()

    def generate(
        self,
        prompt: str | abc.Sequence[int],
        max_tokens: int = 128,
        sampling: Sampling | None = None,
        stop: abc.Sequence[str] = (),
        on_text: Callable[[str], None] | None = None,
        ignore_end: bool = False,
    ) -> Generation:
        """Continues a prompt (text or tokens). ``on_text`` gets the text piece by piece as it becomes certain."""
        tokens = self.text.encode(prompt) if isinstance(prompt, str) else list(prompt)
        request = Request(tokens, max_tokens, sampling or Sampling(), stop, ignore_end)
        begun = time.perf_counter()
        first = None
        pieces = []
        for event in self._run([request]):
            first = first or time.perf_counter()
            if event.text:
                pieces.append(event.text)
                if on_text:
                    on_text(event.text)
        ended = time.perf_counter()
        sequence = event.sequence
        return Generation(
            text="".join(pieces),
            tokens=sequence.tokens,
            prompt_tokens=len(tokens),
            prefill_seconds=(first or ended) - begun,
            decode_seconds=ended - (first or ended),
            finish=sequence.finish or "length",
            cached_tokens=sequence.cached_tokens,
        )

    def generate_many(
        self,
        prompts: abc.Sequence[str | abc.Sequence[int]],
        max_tokens: int = 128,
        sampling: Sampling | abc.Sequence[Sampling] | None = None,
        stop: abc.Sequence[str] = (),
    ) -> list[str]:
        """Continuations of several prompts, up to ``sequences`` of them at once. A sequence gets the text that it gets
        alone, up to rounding."""
        tokens = [self.text.encode(p) if isinstance(p, str) else list(p) for p in prompts]
        each = [sampling or Sampling()] * len(tokens) if not isinstance(sampling, abc.Sequence) else list(sampling)
        if len(each) != len(tokens):
            raise UserError(f"expected one sampling per prompt, found {len(each)} for {len(tokens)}")
        requests = [Request(t, max_tokens, own, stop) for t, own in zip(tokens, each, strict=True)]
        texts: dict[int, str] = defaultdict(str)
        numbers: list[int] = []
        for event in self._run(requests, numbers):
            texts[event.sequence.number] += event.text
        return [texts[number] for number in numbers]

    def _run(self, requests: abc.Sequence[Request], numbers: list[int] | None = None) -> Iterator[Event]:
        """The events of requests until all have ended; none is left where the caller stops early. ``numbers`` gets the
        sequences' numbers."""
        with self._lock:
            self._check_idle()
            self._forget()
            scheduler = self.scheduler
            sequences = []
            try:
                for request in requests:
                    sequences.append(scheduler.add(request))
                if numbers is not None:
                    numbers += [sequence.number for sequence in sequences]
                while not scheduler.idle:
                    for event in scheduler.step():
                        if event.finish == "error":
                            raise UserError(event.sequence.error or "expected a sequence to end, found a fault")
                        yield event
            finally:
                for sequence in sequences:
                    scheduler.cancel(sequence)
                while not scheduler.idle:
                    scheduler.step()

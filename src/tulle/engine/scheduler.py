"""Continuous batching: many sequences share each forward pass, and come and go between passes.

Every :meth:`Scheduler.step` is one pass. It holds one token of every sequence that generates, and parts of waiting
prompts: as many tokens as the pass may take without keeping the others waiting for longer than ``MAX_STEP`` seconds.
Prompts are served in order of arrival, and begin with what the cache knows of them.

A recurrent state is kept where others may go on: at the last page's end of every prompt, where a prompt leaves what is
known already or what one that waits begins with, and at the last full page of text that grows.

Where memory for keys and values runs out, the sequence that came last gives its pages back and waits. What it had
computed is often still in the cache when its turn comes again; its text does not change.
"""

from __future__ import annotations

import logging
import time
from collections import abc, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tulle.engine.kv_cache import PAGE, KVCache, Node, PageTable
from tulle.engine.request import Constraint, Event, Finish, Request, Sequence, TokenLogprobs
from tulle.engine.sampling import Sampler, log_probabilities
from tulle.errors import UserError
from tulle.text.tokenizer import ModelTokenizer, TextStream

MAX_STEP = 0.1
"""Seconds that sequences which generate are kept waiting for a part of a prompt, at most."""
LEAST_PART = PAGE
"""Tokens of a prompt that are always taken, however slow they are."""
LOGPROB_ROWS = 64
"""Tokens of a prompt in one pass where the log-probabilities of all of them are wanted: bounds the logits' memory."""

logger = logging.getLogger(__name__)
Integers = NDArray[np.int32]
Floats = NDArray[np.float32]


class QueueFull(UserError):
    """More requests than may wait."""


class Model(Protocol):
    """What the scheduler needs of a native engine; shapes as there (native/include/tulle/engine.hpp)."""

    def forward(
        self, tokens: Integers, slots: Integers, positions: Integers, tables: Integers, rows: Integers, logits: Floats
    ) -> None: ...

    def embed(
        self, tokens: Integers, slots: Integers, positions: Integers, tables: Integers, rows: Integers, hidden: Floats
    ) -> None: ...

    def save_state(self, slot: int, snapshot: int) -> None: ...

    def load_state(self, snapshot: int, slot: int) -> None: ...


@dataclass
class Stats:
    """What a scheduler has done so far."""

    prompt_tokens: int = 0
    """Of requests whose prompt was computed, with those that were found in the cache."""
    cached_tokens: int = 0
    """Of these, tokens that were found in the cache."""
    computed_tokens: int = 0
    """Tokens that passes computed: prompts, generated tokens, and what was computed again."""
    generated_tokens: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    preempted: int = 0
    """Sequences that gave back their pages for another one."""
    finished: dict[Finish, int] = field(default_factory=dict)


@dataclass(eq=False)
class _Run:
    """A sequence that has a slot, or had one and waits to go on."""

    sequence: Sequence
    tokens: list[int]
    """Prompt and generated."""
    sampler: Sampler
    stream: TextStream
    left: int
    """Tokens that it may still get."""
    constraint: Constraint | None = None
    mask: Future[NDArray[np.uint32] | None] | None = None
    slot: int = -1
    table: PageTable | None = None
    done: int = 0
    """Tokens whose keys and values are in the cache."""
    counted: bool = False
    """Its prompt is in the statistics."""
    hidden: NDArray[np.float64] | None = None
    stops: set[int] = field(default_factory=set)
    """Numbers of tokens behind which the recurrent state is worth keeping."""
    passing: Node | None = None
    """Where this sequence kept its state last, if that is worth little once it has come further."""

    @property
    def request(self) -> Request:
        return self.sequence.request

    @property
    def all_rows(self) -> bool:
        """Logits of every token of the prompt are wanted."""
        return self.request.prompt_logprobs is not None and not self.sequence.tokens

    @property
    def pending(self) -> int:
        """Tokens to compute before the next one can be chosen."""
        return len(self.tokens) - self.done

    @property
    def generates(self) -> bool:
        return self.pending == 1 and self.request.embedding is None


_Part = tuple[_Run, int]
"""A sequence, and how many of its tokens a pass computes."""


class Scheduler:
    """Runs requests on one model. For use by one thread.

    ``slots`` sequences at once, of up to ``context`` tokens; ``batch``: tokens of one pass, at most; ``hidden``:
    channels; ``queue_limit``: requests that may wait (None: any number).
    """

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        text: ModelTokenizer,
        *,
        slots: int,
        context: int,
        batch: int,
        vocabulary: int,
        hidden: int,
        queue_limit: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.stats, self.queue_limit = Stats(), queue_limit
        self._model, self._cache, self._text, self._clock = model, cache, text, clock
        self._context, self._batch, self._hidden = context, batch, hidden
        self.tables = np.full((slots, -(-context // PAGE)), -1, np.int32)
        self._free = list(range(slots))[::-1]
        self._waiting: deque[_Run] = deque()
        self._running: list[_Run] = []
        self._ended: list[Event] = []
        self._arrivals = 0
        self._logits = np.empty((0, vocabulary), np.float32)
        self._seconds_per_token = 0.0
        """Of prompts, lately."""
        self._decode_seconds = 0.0
        """Of a pass without prompts, lately."""
        self._masks: ThreadPoolExecutor | None = None

    @property
    def waiting(self) -> int:
        """Requests that have not begun, or that gave their pages back."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def idle(self) -> bool:
        """Nothing to do, and nothing to tell."""
        return not (self._waiting or self._running or self._ended)

    @property
    def cache(self) -> KVCache:
        return self._cache

    def add(self, request: Request) -> Sequence:
        """Puts a request at the end of the queue. Raises ``UserError`` for one that can never run, ``QueueFull`` where
        too many wait."""
        room = min(self._context, self._cache.pages * PAGE)
        prompt, wanted = len(request.prompt), request.max_tokens
        if prompt + (1 if wanted is None else wanted) > room:
            found = f"{prompt}" if wanted is None else f"{prompt} and {wanted}"
            raise UserError(
                f"expected prompt and continuation within {room} tokens, found {found}; raise the context or ask for "
                "fewer tokens"
            )
        if self.queue_limit is not None and len(self._waiting) - len(self._free) >= self.queue_limit:
            raise QueueFull(f"expected at most {self.queue_limit} requests to wait, found more; try again later")
        vocabulary = self._logits.shape[1]
        if wrong := [token for token in request.prompt if not 0 <= token < vocabulary]:
            raise UserError(f"expected tokens below {vocabulary} and at least 0, found {wrong[0]}")
        request.sampling.check(vocabulary)
        sequence = Sequence(request, self._arrivals, added=self._clock())
        tokens = list(request.prompt)
        sampler = Sampler(request.sampling, self._text)
        stream = self._text.stream(tokens, request.stop, keep_special=request.keep_special)
        constraint = request.constraint() if request.constraint is not None else None
        left = room - prompt if wanted is None else wanted
        self._arrivals += 1
        self._waiting.append(_Run(sequence, tokens, sampler, stream, left, constraint))
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """Ends a sequence; the next :meth:`step` gives its last event. One that has ended stays as it is."""
        for run in (*self._running, *self._waiting):
            if run.sequence is sequence:
                self._end(run, "cancelled")

    def step(self) -> list[Event]:
        """One pass: what it gave, in order of arrival. Nothing where there is nothing to do."""
        self._end_what_is_late()
        self._admit()
        begun = self._clock()
        events: list[Event] = []
        batches = self._choose_batch()
        for batch in batches:
            if batch:
                events += self._pass(batch)
        if any(batches):
            self._learn([part for batch in batches for part in batch], self._clock() - begun)
        ended, self._ended = self._ended, []
        return ended + events

    # What runs

    def _end_what_is_late(self) -> None:
        now = self._clock()
        for run in (*self._running, *self._waiting):
            if run.request.deadline is not None and now >= run.request.deadline:
                self._end(run, "deadline")

    def _admit(self) -> None:
        """Gives slots to those that wait, in order; not to one whose beginning another one is about to compute."""
        for run in list(self._waiting):
            if not self._free:
                return
            if self._soon_known(run):
                continue
            slot = self._free.pop()
            table = PageTable(self._cache, self.tables[slot])
            # The last token's logits are wanted, so that it is computed in any case.
            known = 0 if run.request.prompt_logprobs is not None else table.begin(run.tokens, len(run.tokens) - 1)
            if run.request.embedding == "mean":
                table.close()
                known = 0
            if self._running and table.missing(len(run.tokens) + 1) > self._cache.available:
                table.close()
                self._free.append(slot)
                return
            self._waiting.remove(run)
            run.slot, run.table, run.done = slot, table, known
            if self._cache.recurrent:
                run.stops = {(len(run.tokens) - 1) // PAGE * PAGE, self._cache.known(run.tokens, len(run.tokens) - 1)}
            if known and table.node is not None and table.node.snapshot is not None:
                self._cache.use_snapshot(table.node)
                self._model.load_state(table.node.snapshot, slot)
            if not run.counted:
                run.counted = True
                run.sequence.cached_tokens = known
                self.stats.prompt_tokens += len(run.request.prompt)
                self.stats.cached_tokens += known
            # In order of arrival, so that who gave back its pages does not come last.
            place = next((i for i, other in enumerate(self._running) if _older(run, other)), len(self._running))
            self._running.insert(place, run)

    def _soon_known(self, run: _Run) -> bool:
        """Another sequence computes more of this one's beginning than the cache knows."""
        if run.request.prompt_logprobs is not None or run.request.embedding == "mean":
            return False
        limit = len(run.tokens) - 1
        known: int | None = None
        for other in self._running:
            if other.generates:
                continue
            shared = _shared_pages(run.tokens, other.tokens, min(limit, len(other.tokens))) * PAGE
            if shared <= other.done // PAGE * PAGE:
                continue
            if known is None:
                known = len(self._cache.match(run.tokens, limit)) * PAGE
            if shared > known:
                other.stops.add(shared)
                return True
        return False

    def _choose_batch(self) -> tuple[list[_Part], list[_Part]]:
        """Sequences and how many tokens of each: those whose logits are wanted, and those whose hidden states are. All
        have room for their tokens."""
        generating = [run for run in self._running if run.generates]
        prompts = [run for run in self._running if not run.generates]
        chosen = [(run, 1) for run in generating]
        left = self._prompt_tokens(len(generating))
        for number, run in enumerate(prompts):
            if left <= 0:
                break
            part = min(run.pending, left)
            if part < run.pending and number + 1 < len(prompts):
                # A long prompt leaves half to those behind it.
                part = min(part, max(left // 2, LEAST_PART))
            if run.all_rows:
                part = min(part, LOGPROB_ROWS)
            if self._cache.recurrent:
                part = self._to_a_snapshot(run, part)
            left -= part
            chosen.append((run, part))
        found = []
        for run, part in sorted(chosen, key=lambda item: item[0].sequence.number):
            # A sequence may have lost its place to an older one by now.
            if run.table is not None and self._make_room(run, run.done + part):
                found.append((run, part))
        found = [item for item in found if item[0].table is not None]
        logits = [item for item in found if item[0].request.embedding is None]
        return logits, [item for item in found if item[0].request.embedding is not None]

    def _prompt_tokens(self, generating: int) -> int:
        """Tokens of prompts that a pass may hold beside so many sequences that generate."""
        left = self._batch - generating
        if self._seconds_per_token == 0:
            return left
        # Nobody waits for a token, but the next request or cancellation waits for the pass.
        seconds = 0.8 * MAX_STEP - self._decode_seconds if generating else 4 * MAX_STEP
        fitting = max(int(seconds / self._seconds_per_token), 0)
        return min(left, max(fitting // PAGE * PAGE, LEAST_PART))

    def _to_a_snapshot(self, run: _Run, part: int) -> int:
        """Ends a part of a prompt where its state is worth keeping, or else at the end of a page."""
        end = run.done + part
        stop = min((stop for stop in run.stops if stop > run.done), default=end)
        if end >= stop:
            return stop - run.done
        whole = end // PAGE * PAGE
        return whole - run.done if whole > run.done else part

    def _keep_state(self, run: _Run) -> None:
        """The state of a sequence that has come to the end of a page."""
        assert run.table is not None and run.table.node is not None
        place = self._cache.snapshot(run.table.node, run.passing)
        if place is not None:
            self._model.save_state(run.slot, place)
            run.passing = None if run.done in run.stops else run.table.node

    def _make_room(self, run: _Run, length: int) -> bool:
        """Pages for ``length`` tokens; younger sequences give theirs back where there are none. False: it waits."""
        assert run.table is not None
        while not run.table.grow(length):
            youngest = self._running[-1]
            self._preempt(youngest)
            if youngest is run:
                return False
        return True

    def _preempt(self, run: _Run) -> None:
        self._leave(run)
        run.done = 0
        run.hidden = run.passing = None
        run.sequence.prompt_logprobs.clear()
        self._waiting.appendleft(run)
        self.stats.preempted += 1

    def _leave(self, run: _Run) -> None:
        """Gives back slot and pages."""
        self._running.remove(run)
        assert run.table is not None
        run.table.close()
        run.table = None
        self._free.append(run.slot)

    def _end(self, run: _Run, finish: Finish) -> None:
        """Ends a sequence that runs or waits, with what is left of its text."""
        if run.table is not None:
            self._leave(run)
        elif run in self._waiting:
            self._waiting.remove(run)
        self._count_end(run, finish)
        self._ended.append(Event(run.sequence, text=run.stream.finish(), finish=finish))

    def _count_end(self, run: _Run, finish: Finish) -> None:
        run.sequence.finish = finish
        self.stats.finished[finish] = self.stats.finished.get(finish, 0) + 1

    # One pass

    def _pass(self, batch: list[_Part]) -> list[Event]:
        now = self._clock()
        tokens: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        embeds = batch[0][0].request.embedding is not None
        for run, part in batch:
            if run.sequence.started is None:
                run.sequence.started = now
            end = run.done + part
            first = len(tokens)
            tokens += run.tokens[run.done : end]
            slots += [run.slot] * part
            positions += range(run.done, end)
            if run.all_rows or run.request.embedding == "mean":
                rows += range(first, len(tokens))
            elif end == len(run.tokens):
                rows.append(len(tokens) - 1)
            if end == len(run.tokens) and run.constraint is not None:
                run.mask = self._pool().submit(run.constraint.mask)
        arrays = [np.asarray(part, np.int32) for part in (tokens, slots, positions)]
        wanted = np.asarray(rows, np.int32)
        if embeds:
            given = np.empty((len(rows), self._hidden), np.float32)
        else:
            if len(rows) > len(self._logits):
                self._logits = np.empty((max(len(rows), len(self.tables)), self._logits.shape[1]), np.float32)
            given = self._logits[: len(rows)]
        call = self._model.embed if embeds else self._model.forward
        try:
            call(arrays[0], arrays[1], arrays[2], self.tables, wanted, given)
        except ValueError as error:
            # No request's fault: what a request may say was checked when it came.
            logger.error("a pass of %d tokens failed: %s", len(tokens), error)
            return [self._fail(run, str(error)) for run, _ in batch]
        self.stats.steps += 1
        self.stats.computed_tokens += len(tokens)
        events: list[Event] = []
        at = 0
        for run, part in batch:
            count = part if run.all_rows or run.request.embedding == "mean" else int(run.pending == part)
            try:
                found = self._took(run, part, given[at : at + count])
            except UserError as error:
                found = self._fail(run, str(error))
            if found is not None:
                events.append(found)
            at += count
        return events

    def _took(self, run: _Run, part: int, given: Floats) -> Event | None:
        """The pass computed ``part`` tokens of a sequence; ``given``: logits, or hidden states, of those wanted."""
        assert run.table is not None
        run.done += part
        run.table.enter(run.tokens, run.done)
        if self._cache.recurrent and run.done % PAGE == 0:
            self._keep_state(run)
        if run.request.embedding is not None:
            return self._embedded(run, given)
        if run.all_rows:
            self._score_prompt(run, given)
        if run.pending:
            return None
        if run.left == 0:
            return self._finish(run, "length")
        return self._choose(run, given[-1])

    def _embedded(self, run: _Run, hidden: Floats) -> Event | None:
        if len(hidden):
            total = hidden.astype(np.float64).sum(0)
            run.hidden = total if run.hidden is None else run.hidden + total
        if run.pending:
            return None
        assert run.hidden is not None
        count = len(run.tokens) if run.request.embedding == "mean" else 1
        run.sequence.embedding = (run.hidden / count).astype(np.float32)
        return self._finish(run, "length")

    def _score_prompt(self, run: _Run, logits: Floats) -> None:
        """Log-probabilities of the tokens that follow those of the pass, as far as they are the prompt's."""
        found = run.sequence.prompt_logprobs
        if not found:
            found.append(None)
        top = run.request.prompt_logprobs or 0
        for row in logits:
            if len(found) < len(run.request.prompt):
                found.append(log_probabilities(row, run.tokens[len(found)], top))

    def _choose(self, run: _Run, logits: Floats) -> Event:
        """The sequence's next token."""
        allowed = None
        if run.mask is not None:
            allowed, run.mask = run.mask.result(), None
        token = run.sampler.choose(logits, run.tokens, allowed)
        sequence, request = run.sequence, run.request
        now = self._clock()
        sequence.last_token = now
        if sequence.first_token is None:
            sequence.first_token = now
        if token in self._text.end_tokens and not request.ignore_end:
            return self._finish(run, "end")
        logprobs: TokenLogprobs | None = None
        if request.logprobs is not None:
            logprobs = log_probabilities(logits, token, request.logprobs)
        run.tokens.append(token)
        sequence.tokens.append(token)
        self.stats.generated_tokens += 1
        run.left -= 1
        text = run.stream.add(token)
        finish: Finish | None = None
        if run.constraint is not None:
            run.constraint.accept(token)
            if run.constraint.finished:
                finish = "end"
        if run.stream.stopped:
            finish = "stop"
        elif finish is None and run.left == 0:
            finish = "length"
        if finish is None:
            return Event(sequence, token, text, logprobs)
        return self._finish(run, finish, token, text, logprobs)

    def _finish(
        self,
        run: _Run,
        finish: Finish,
        token: int | None = None,
        text: str = "",
        logprobs: TokenLogprobs | None = None,
    ) -> Event:
        """The last event of a sequence that ended by itself."""
        self._leave(run)
        text += run.stream.finish()
        if run.stream.stopped:
            finish = "stop"
        self._count_end(run, finish)
        return Event(run.sequence, token, text, logprobs, finish)

    def _fail(self, run: _Run, message: str) -> Event:
        run.sequence.error = message
        self._leave(run)
        self._count_end(run, "error")
        return Event(run.sequence, finish="error")

    def _learn(self, batch: abc.Sequence[_Part], seconds: float) -> None:
        """How long passes take, for how much of a prompt the next one may hold."""
        self.stats.step_seconds += seconds
        prompt = sum(part for _, part in batch if part > 1)
        if prompt == 0:
            self._decode_seconds += 0.2 * (seconds - self._decode_seconds)
        elif prompt >= LEAST_PART:
            decode = self._decode_seconds if len(batch) > 1 else 0.0
            per_token = max(seconds - decode, 0.2 * seconds) / prompt
            known = self._seconds_per_token
            self._seconds_per_token = per_token if known == 0 else known + 0.3 * (per_token - known)

    def _pool(self) -> ThreadPoolExecutor:
        """Masks are computed there, beside the pass."""
        if self._masks is None:
            self._masks = ThreadPoolExecutor(1, "tulle-masks")
        return self._masks


def _older(run: _Run, other: _Run) -> bool:
    return run.sequence.number < other.sequence.number


def _shared_pages(a: abc.Sequence[int], b: abc.Sequence[int], limit: int) -> int:
    """Full pages at the beginning of both."""
    count = 0
    while (count + 1) * PAGE <= limit and a[count * PAGE : (count + 1) * PAGE] == b[count * PAGE : (count + 1) * PAGE]:
        count += 1
    return count

"""The engine's thread: requests go in, the events of every step come out on the event loop.

One thread per loaded model is the only one that touches its scheduler. All events of a step cross to the event loop in
one call, and a job wakes its reader once per step, so that a token costs the loop a few microseconds.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Protocol

from tulle.engine.kv_cache import KVCache
from tulle.engine.request import Event, Request
from tulle.engine.request import Sequence as Running
from tulle.engine.scheduler import Stats
from tulle.errors import UserError
from tulle.serve.errors import ApiError, busy

MOST_PENDING = 4096
"""Events that wait for a slow reader before its sequences are cancelled."""
logger = logging.getLogger("tulle.serve")


class Scheduler(Protocol):
    """What the thread uses of :class:`tulle.engine.scheduler.Scheduler`."""

    def add(self, request: Request) -> Running: ...

    def step(self) -> list[Event]: ...

    def cancel(self, sequence: Running) -> None: ...

    @property
    def idle(self) -> bool: ...

    @property
    def waiting(self) -> int: ...

    @property
    def running(self) -> int: ...

    @property
    def stats(self) -> Stats: ...

    @property
    def cache(self) -> KVCache: ...


class Observer(Protocol):
    """Is told what happens, on the event loop. See :mod:`tulle.serve.metrics`."""

    def first_token(self, seconds: float) -> None: ...

    def next_token(self, seconds: float) -> None: ...

    def finished(self, reason: str) -> None: ...


class Job:
    """Sequences of one request, read on the event loop: ``events()`` until ``done``."""

    def __init__(self, worker: Worker, requests: Sequence[Request]):
        self._worker = worker
        self.requests = requests
        self.sequences: list[Running] = []
        """In the order of the requests, once they were accepted."""
        self.open = len(requests)
        """Sequences whose last event has not come."""
        self.created = time.monotonic()
        self.first_token: float | None = None
        self.cancelled: Literal["", "gone", "slow", "drain"] = ""
        """Why it was cancelled: its client went away, reads too slowly, or the server stops."""
        self.on_cancel: Callable[[], object] | None = None
        """Called on the event loop when the job is cancelled because its reader does not read."""
        self._pending: list[tuple[int, Event]] = []
        self._error: Exception | None = None
        self._last: list[float | None] = [None] * len(requests)
        self._waiter: asyncio.Future[None] | None = None
        self.accepted: asyncio.Future[None] = worker.loop.create_future()
        """Done when the scheduler took all sequences; raises its ``UserError``."""

    @property
    def done(self) -> bool:
        """All events have been given, and no error is to be raised."""
        return self.open == 0 and not self._pending and self._error is None

    async def events(self) -> list[tuple[int, Event]]:
        """What came since the last call, as (number of the sequence, event); waits for it. Empty after
        :meth:`nudge`. Raises ``ApiError`` where the engine failed."""
        if not self._pending and self._error is None:
            self._waiter = self._worker.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        found, self._pending = self._pending, []
        if not found and self._error is not None:
            raise self._error
        return found

    def nudge(self) -> None:
        """Lets a reader that waits go on without events."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def cancel(self, why: Literal["gone", "slow", "drain"] = "gone") -> None:
        """Ends its sequences before the next step. Does nothing to what has ended."""
        if self.open and not self.cancelled:
            self.cancelled = why
            self._worker.cancel(self)
        if why == "slow" and self.on_cancel is not None:
            self.on_cancel()

    def _fail(self, error: Exception) -> None:
        self.open, self._error = 0, error
        if not self.accepted.done():
            self.accepted.set_exception(error)
            self.accepted.exception()  # seen, whether anybody waits or not
        self.nudge()


class Worker:
    """A scheduler on a thread of its own. Everything but the thread's own loop is called on the event loop.

    ``most``: sequences at once, running and waiting; beyond, ``submit`` raises an ``ApiError`` of 503.
    """

    def __init__(self, scheduler: Scheduler, most: int, observer: Observer, loop: asyncio.AbstractEventLoop):
        self.scheduler, self.loop = scheduler, loop
        self._most, self._observer = most, observer
        self.live = 0
        """Sequences that have not ended."""
        self.jobs: set[Job] = set()
        self._of: dict[Running, tuple[Job, int]] = {}
        self._commands: list[tuple[str, Any]] = []
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="tulle-engine", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[Request]) -> Job:
        """Queues requests, all or none. Their events come from the job."""
        if len(requests) > self._most:
            raise ApiError(400, f"expected at most {self._most} answers of one request, found {len(requests)}")
        if self.live + len(requests) > self._most:
            raise busy(f"expected room in the queue for {len(requests)} more, found {self.live} requests; try later")
        job = Job(self, requests)
        self.live += len(requests)
        self.jobs.add(job)
        self._send("add", job)
        return job

    def cancel(self, job: Job) -> None:
        """See :meth:`Job.cancel`."""
        self._send("cancel", job)

    def stop(self) -> None:
        """Ends the thread after its step; what still runs fails."""
        with self._wake:
            self._stopping = True
            self._wake.notify()

    def join(self) -> None:
        """Waits for the thread's end."""
        self._thread.join()

    def _send(self, what: str, job: Job) -> None:
        with self._wake:
            self._commands.append((what, job))
            self._wake.notify()

    # On the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        owned: dict[Job, list[Running]] = {}
        while True:
            with self._wake:
                while not self._commands and not self._stopping and self.scheduler.idle:
                    self._wake.wait()
                commands, self._commands = self._commands, []
                stopping = self._stopping
            if stopping:
                jobs = [*owned, *(job for what, job in commands if what == "add")]
                for sequences in owned.values():
                    self._forget(sequences)
                self._call(self._fail, jobs, ApiError(503, "expected a running model, found it unloaded; try again"))
                return
            accepted, refused = self._obey(commands, owned)
            if accepted or refused:
                # Before the step: a stream begins while its prompt is computed.
                self._call(self._deliver, accepted, refused, [])
            try:
                events = self.scheduler.step()
            except Exception as error:  # the request's fault would be a UserError of add: this one is ours
                logger.exception("the engine failed")
                failed = list(owned)
                for sequences in owned.values():
                    self._forget(sequences)
                owned.clear()
                self._call(self._fail, failed, ApiError(500, f"expected a step of the engine, found {error!r}"))
                continue
            for event in events:
                if event.finish is not None:
                    self._drop(event.sequence, owned)
            if events:
                self._call(self._deliver, [], [], events)

    def _obey(
        self, commands: Iterable[tuple[str, Job]], owned: dict[Job, list[Running]]
    ) -> tuple[list[tuple[Job, list[Running]]], list[tuple[Job, Exception]]]:
        accepted: list[tuple[Job, list[Running]]] = []
        refused: list[tuple[Job, Exception]] = []
        for what, job in commands:
            if what == "cancel":
                self._forget(owned.get(job, []))
                continue
            sequences: list[Running] = []
            try:
                for request in job.requests:
                    sequences.append(self.scheduler.add(request))
            except Exception as error:
                if not isinstance(error, UserError):
                    logger.exception("the engine failed")
                self._forget(sequences)
                refused.append((job, error))
                continue
            owned[job] = list(sequences)
            accepted.append((job, sequences))
        return accepted, refused

    def _forget(self, sequences: Iterable[Running]) -> None:
        for sequence in list(sequences):
            try:
                self.scheduler.cancel(sequence)
            except Exception:
                logger.exception("the engine failed")

    @staticmethod
    def _drop(sequence: Running, owned: dict[Job, list[Running]]) -> None:
        for job, sequences in owned.items():
            if sequence in sequences:
                sequences.remove(sequence)
                if not sequences:
                    del owned[job]
                return

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        try:
            self.loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop was closed: nobody is left to be told
            pass

    # On the event loop -------------------------------------------------------------------------------------------

    def _deliver(
        self,
        accepted: list[tuple[Job, list[Running]]],
        refused: list[tuple[Job, Exception]],
        events: list[Event],
    ) -> None:
        now = time.monotonic()
        for job, sequences in accepted:
            job.sequences = sequences
            for number, sequence in enumerate(sequences):
                self._of[sequence] = (job, number)
            if not job.accepted.done():
                job.accepted.set_result(None)
        for job, error in refused:
            self.live -= len(job.requests)
            self.jobs.discard(job)
            wrong = UserError if isinstance(error, UserError) else None
            job._fail(error if wrong else ApiError(500, f"expected the engine to take a request, found {error!r}"))
        touched: dict[Job, None] = {}
        for event in events:
            found = self._of.get(event.sequence)
            if found is None:
                continue
            job, number = found
            touched[job] = None
            job._pending.append((number, event))
            if event.token is not None:
                last = job._last[number]
                job._last[number] = now
                if last is None:
                    job.first_token = job.first_token or now
                    self._observer.first_token(now - job.created)
                else:
                    self._observer.next_token(now - last)
            if event.finish is not None:
                del self._of[event.sequence]
                job.open -= 1
                self.live -= 1
                self._observer.finished(event.finish)
                if job.open == 0:
                    self.jobs.discard(job)
        for job in touched:
            job.nudge()
            if len(job._pending) > MOST_PENDING:
                job.cancel("slow")

    def _fail(self, jobs: list[Job], error: ApiError) -> None:
        for job in jobs:
            if job in self.jobs:
                self.jobs.discard(job)
                self.live -= job.open
                job._fail(error)
            for sequence in job.sequences:
                self._of.pop(sequence, None)

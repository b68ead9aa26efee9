"""Models by name: loaded when they are asked for, unloaded where others need their memory."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from tulle.engine import Engine
from tulle.errors import UserError
from tulle.models.hub import local_folder
from tulle.serve.errors import ApiError, busy
from tulle.serve.facts import Facts, file_bytes, read_facts
from tulle.serve.metrics import Metrics
from tulle.serve.served import EngineLike, ServedModel
from tulle.serve.settings import Settings
from tulle.serve.worker import Worker

logger = logging.getLogger("tulle.serve")
Opener = Callable[[Path, Settings], EngineLike]


def open_engine(folder: Path, settings: Settings) -> Engine:
    """An engine as the settings want it, its memory taken. Raises ``UserError``."""
    engine = Engine(
        folder,
        threads=settings.threads,
        context=settings.context,
        sequences=settings.sequences,
        cache=settings.cache,
        activations=settings.activations,
        head=settings.head,
        layout=settings.layout,
        weights=settings.weights,
        cache_memory=settings.cache_memory,
        deterministic=settings.deterministic,
    )
    engine.reserve_cache()
    return engine


@dataclass(eq=False)
class Entry:
    """A model that may be loaded."""

    name: str
    folder: Path
    stored: int
    """Bytes of its files."""
    created: int
    """When they were written, in seconds since 1970."""
    served: ServedModel | None = None
    engine: EngineLike | None = None
    """Opened, and not yet served."""
    users: int = 0
    """Requests that run on it."""
    used: float = 0.0
    memory: int = 0
    """Bytes that it takes, once it was loaded."""


class Registry:
    """All models of a server. Raises ``UserError`` where one cannot be opened, or where two have one name."""

    def __init__(self, settings: Settings, opener: Opener = open_engine):
        self.settings, self._open = settings, opener
        self.metrics = Metrics(self.loaded)
        self.entries: dict[str, Entry] = {}
        self._loading = asyncio.Lock()
        self.draining = False
        names = [*settings.served_name, *[""] * len(settings.models)]
        if len(settings.served_name) > len(settings.models):
            raise UserError(
                f"expected at most one served name per model, found {len(settings.served_name)} for "
                f"{len(settings.models)}"
            )
        for model, name in zip(settings.models, names, strict=False):
            folder = local_folder(model)
            name = name or (model if "/" not in model.strip("/") else folder.resolve().stem)
            if name in self.entries:
                raise UserError(f"expected models of different names, found {name!r} twice; give --served-name to each")
            entry = Entry(name, folder, file_bytes(folder), int(folder.stat().st_mtime))
            if settings.memory is not None and entry.stored > settings.memory:
                raise UserError(
                    f"expected models of at most {settings.memory} bytes, found {entry.stored} of {name}; raise it"
                )
            self.entries[name] = entry

    def open_first(self) -> None:
        """Opens the first model's engine, before there is an event loop."""
        first = next(iter(self.entries.values()))
        first.engine = self._open(first.folder, self.settings)

    def loaded(self) -> list[ServedModel]:
        return [entry.served for entry in self.entries.values() if entry.served is not None]

    def entry(self, name: str) -> Entry:
        """By name; the first one for no name. Raises ``ApiError`` (404)."""
        if not name:
            return next(iter(self.entries.values()))
        found = self.entries.get(name)
        if found is None:
            known = ", ".join(self.entries)
            raise ApiError(404, f"expected a model of {known}, found {name!r}", param="model", code="model_not_found")
        return found

    @asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[ServedModel]:
        """A loaded model that is not unloaded meanwhile. Raises ``ApiError``."""
        served = await self.take(name)
        try:
            yield served
        finally:
            self.give_back(served)

    async def take(self, name: str) -> ServedModel:
        """See :meth:`use`; to be given back."""
        if self.draining:
            raise busy("expected a running server, found one that stops; try another one")
        entry = self.entry(name)
        entry.users += 1
        try:
            served = entry.served or await self._load(entry)
        except BaseException:
            entry.users -= 1
            raise
        entry.used = time.monotonic()
        return served

    def give_back(self, served: ServedModel) -> None:
        """The opposite of :meth:`take`."""
        entry = self.entries[served.name]
        entry.users -= 1
        entry.used = time.monotonic()

    async def load_first(self) -> None:
        """Serves the first model."""
        first = next(iter(self.entries.values()))
        if first.served is None:
            await self._load(first)

    async def close(self) -> None:
        """Unloads everything."""
        for entry in self.entries.values():
            await self._unload(entry)

    async def _load(self, entry: Entry) -> ServedModel:
        async with self._loading:
            if entry.served is not None:
                return entry.served
            await self._make_room(entry)
            begun = time.monotonic()
            try:
                engine = entry.engine
                if engine is None:
                    engine = await asyncio.to_thread(self._open, entry.folder, self.settings)
                facts = await asyncio.to_thread(self._facts, entry, engine)
            except UserError as error:
                logger.error("model %s cannot be loaded: %s", entry.name, error)
                raise ApiError(503, f"expected the model {entry.name} to load, found: {error}") from None
            entry.engine = None
            settings = self.settings
            worker = Worker(
                engine.scheduler,
                settings.sequences + settings.queue,
                self.metrics.observer(entry.name),
                asyncio.get_running_loop(),
            )
            entry.memory = max(entry.stored, facts.weight_bytes) + facts.cache_bytes
            served = await asyncio.to_thread(ServedModel, entry.name, engine, worker, entry.folder, facts)
            entry.served = served
            logger.info("model=%s loaded in %.1f s", entry.name, time.monotonic() - begun)
            return served

    def _facts(self, entry: Entry, engine: EngineLike) -> Facts:
        facts = read_facts(entry.name, entry.folder)
        facts.context, facts.sequences = engine.context, self.settings.sequences
        facts.threads = getattr(engine, "threads", 0)
        facts.layout = getattr(engine, "layout", "")
        facts.weight_bytes = getattr(engine, "weight_bytes", 0)
        facts.cache_bytes = getattr(engine, "cache_bytes", 0)
        facts.cache = getattr(engine, "cache_kind", self.settings.cache)
        return facts

    async def _make_room(self, entry: Entry) -> None:
        """Unloads what was unused for longest until ``entry`` fits."""
        most = self.settings.memory
        if most is None:
            return
        need = entry.memory or entry.stored
        while sum(other.memory for other in self.entries.values() if other.served) + need > most:
            idle = [other for other in self.entries.values() if other.served is not None and other.users == 0]
            if not idle:
                raise busy(f"expected memory for {entry.name}, found it taken by models that answer; try later")
            await self._unload(min(idle, key=lambda other: other.used))

    async def _unload(self, entry: Entry) -> None:
        served, entry.served = entry.served, None
        if served is None:
            return
        served.worker.stop()
        await asyncio.to_thread(served.worker.join)
        del served
        # A server's process has exempted what was there when it started.
        exempted = gc.get_freeze_count() > 0
        gc.unfreeze()
        gc.collect()
        if exempted:
            gc.freeze()
        logger.info("model=%s unloaded", entry.name)

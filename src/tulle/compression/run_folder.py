"""The folder of a run that survives being killed.

Everything is built under ``OUT.partial``: ``model/`` gets one shard per block, ``work/`` holds the hidden states and
``state.json``. A block counts once ``state.json`` names the next one; it is replaced last and atomically, so a run
killed anywhere continues at the last finished block. ``model/`` becomes ``OUT`` in one rename, so that nothing
half-written ever stands where a model is expected.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from tulle import machine
from tulle.errors import UserError
from tulle.format.spec import LinearSpec
from tulle.models.checkpoint import read_json, write_shard, write_text


@dataclasses.dataclass
class State:
    """What a resumed run must know; ``work/state.json``."""

    fingerprint: str
    next_block: int | None = None
    """None until the embedding has been written."""
    linears: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    tables: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Embedding and head, where they are quantised."""
    specs: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    attention: dict[str, Any] | None = None
    blocks: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    shards: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    packed_bytes: int = 0
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    peak_memory_bytes: int = 0

    def count(self, seconds: dict[str, float]) -> None:
        for stage, value in seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + value

    def specs_of_linears(self) -> dict[str, LinearSpec]:
        return {name: LinearSpec.from_json(spec) for name, spec in self.specs.items()}


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Where one run writes; ``shards`` files of weights in the end."""

    output: Path
    fingerprint: str
    """Equal for runs that must end with the same bytes."""
    shards: int

    @property
    def partial(self) -> Path:
        return self.output.with_name(self.output.name + ".partial")

    @property
    def folder(self) -> Path:
        return self.partial / "model"

    @property
    def work(self) -> Path:
        return self.partial / "work"

    def shard(self, number: int) -> Path:
        return self.folder / f"model-{number + 1:05d}-of-{self.shards:05d}.safetensors"

    def write(self, state: State, number: int, tensors: dict[str, Tensor]) -> None:
        """Writes shard ``number`` and enters it in ``state``."""
        file = self.shard(number)
        write_shard(file, tensors)
        state.shards[file.name] = sorted(tensors)
        state.packed_bytes += sum(t.numel() * t.element_size() for t in tensors.values())

    def commit(self, state: State) -> None:
        """From here on a resumed run starts at ``state.next_block``."""
        state.peak_memory_bytes = max(state.peak_memory_bytes, machine.peak_memory())
        write_text(self.work / "state.json", json.dumps(dataclasses.asdict(state)))

    def publish(self) -> None:
        """``model/`` becomes ``OUT``, and the rest goes; so do a library's hidden files of a write that was killed."""
        for stray in self.folder.glob(".*"):
            stray.unlink()
        if self.output.exists():
            self.output.rmdir()
        self.folder.rename(self.output)
        shutil.rmtree(self.partial)

    @contextmanager
    def claimed(self, resume: bool) -> Iterator[State | None]:
        """The state to start from, with the output locked against a second run; None when ``OUT`` is finished."""
        if self._is_finished():
            if not resume:
                raise in_use(self.output)
            shutil.rmtree(self.partial, ignore_errors=True)
            yield None
            return
        if self.partial.exists() and not resume:
            raise UserError(
                f"expected no unfinished run, found {self.partial}; continue it with --resume, or remove it"
            )
        for folder in (self.folder, self.work):
            folder.mkdir(parents=True, exist_ok=True)
        with locked(self.partial):
            state = self._state()
            try:
                yield state
            except BaseException as error:
                self._leave(error)
                raise

    def _leave(self, error: BaseException) -> None:
        """After a failure: what has been done stays, and the error says what to do with it; nothing done, nothing
        stays."""
        if any(self.folder.iterdir()) or any(self.work.iterdir()):
            error.add_note(
                f"what was done so far is in {self.partial}: repeat the command with --resume to go on from there, or "
                "remove that folder"
            )
        else:
            shutil.rmtree(self.partial, ignore_errors=True)

    def require_space(self, needed: int) -> None:
        """Raises ``UserError`` when the disk has fewer than ``needed`` bytes free."""
        free = shutil.disk_usage(self.partial).free
        if free < needed:
            raise UserError(
                f"expected {needed / 1e9:.2f} GB free for {self.output}, found {free / 1e9:.2f} GB; free some space or "
                "choose another disk, then add --resume"
            )

    def _is_finished(self) -> bool:
        if not has_content(self.output):
            return False
        report = self.output / "report.json"
        if report.exists() and read_json(report, "a report").get("fingerprint") == self.fingerprint:
            return True
        raise UserError(
            f"expected an empty or new output folder, found {self.output} with other content; "
            "choose another or remove it"
        )

    def _state(self) -> State:
        file = self.work / "state.json"
        if not file.exists():
            return State(self.fingerprint)
        state = State(**read_json(file, "a run's state"))
        if state.fingerprint != self.fingerprint:
            raise UserError(
                f"expected to resume the same run, found {self.partial} of another model, recipe, text or seed; "
                "repeat the first command, or remove the folder"
            )
        return state


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a second run out of ``folder``. Raises ``UserError`` where another run has it."""
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"expected {folder} free, found another run writing it; wait for it") from None
        yield


def has_content(output: Path) -> bool:
    """Whether a folder is there and not empty. Raises ``UserError`` for a file."""
    if output.is_file():
        raise UserError(f"expected an output folder, found the file {output}; choose another name")
    return output.exists() and any(output.iterdir())


def in_use(output: Path) -> UserError:
    return UserError(f"expected an empty or new output folder, found {output} in use; choose another or remove it")


@contextmanager
def disk_errors(output: Path) -> Iterator[None]:
    """Raises a full disk as a ``UserError``; the run can be resumed."""
    try:
        yield
    except OSError as error:
        full = (
            error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            or "No space left" in str(error)
            or "too large" in str(error)
        )
        if not full:
            raise
        raise UserError(
            f"expected space to write {output}, found the disk full ({error}); free some and run again with --resume"
        ) from None

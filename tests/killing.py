"""Kills a compressing process with SIGKILL at random moments and resumes it, until enough kills have been survived.

``python killing.py FOLDER KILLS`` prints one line of JSON. A fork server: everything is imported once, each attempt is a
forked child, so that an attempt costs the run and not the imports.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from checkpoints import PROSE, write_checkpoint

from tulle.compress import compress
from tulle.texts import Text

RECIPE = {
    "steps": [{"sparsegpt": {"sparsity": 0.5}}, {"gptq": {"bits": 4, "group_size": 16}}],
    "calibration": {"samples": 6, "length": 48},
}


def attempt(model: Path, output: Path, kill_after: float | None) -> bool:
    """Runs one child; True when it finished by itself."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            compress(model, RECIPE, output, calibration=Text((PROSE,), False), resume=True)
        except BaseException as error:  # a child must never return into the parent's loop
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    deadline = time.monotonic() + (kill_after if kill_after is not None else 300)
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if status:
                raise SystemExit(f"a resumed run failed with status {status}")
            return True
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def digest(folder: Path) -> dict[str, str]:
    files = [f for f in folder.iterdir() if not f.name.startswith("report")]
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def main() -> None:
    folder, wanted = Path(sys.argv[1]), int(sys.argv[2])
    source = os.fork()
    if source == 0:  # torch must not start its threads in the parent: a forked child could not use them
        write_checkpoint(folder / "model", num_hidden_layers=6)
        os._exit(0)
    os.waitpid(source, 0)
    begun = time.monotonic()
    assert attempt(folder / "model", folder / "undisturbed", None)
    duration = time.monotonic() - begun
    expected = digest(folder / "undisturbed")
    moments = random.Random(0)
    kills = finished = equal = 0
    while kills < wanted or not finished:
        output = folder / f"run{finished}"
        if attempt(folder / "model", output, moments.uniform(0.02, 0.6 * duration)):
            finished += 1
            equal += digest(output) == expected and not output.with_name(output.name + ".partial").exists()
            continue
        kills += 1
        # What stands where a model is expected is whole, or nothing.
        if output.exists():
            assert digest(output) == expected
    print(json.dumps({"kills": kills, "finished": finished, "equal": equal, "seconds": duration}))


main()

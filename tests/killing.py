"""Kills a compressing process with SIGKILL at random moments and resumes it, until enough kills have been survived.

``python killing.py FOLDER KILLS`` prints one line of JSON. A fork server: everything is imported and run once, and each
attempt is a forked child, so that an attempt costs the run and not the imports. Moments are drawn in CPU seconds of the
child, so that they fall all over the run on a busy machine too.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

# One thread: a forked child waits for ever for threads that its parent had, and for locks that they held.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
import psutil  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))

from checkpoints import PROSE, write_checkpoint  # noqa: E402
from tulle.compression.job import compress  # noqa: E402
from tulle.text.reading import Text  # noqa: E402

RECIPE = {
    "steps": [{"sparsegpt": {"sparsity": 0.5}}, {"gptq": {"bits": 4, "group_size": 16}}],
    "calibration": {"samples": 6, "length": 48},
}


PATIENCE = 120.0
"""Seconds after which a child that is not done hangs: its stack is printed, and the test fails."""


def attempt(model: Path, output: Path, kill_after: float | None) -> float | None:
    """Runs one child; the CPU seconds it took, or None when it was killed after ``kill_after`` of them."""
    assert psutil.Process().num_threads() == 1
    child = os.fork()
    if child == 0:
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        try:
            compress(model, RECIPE, output, calibration=Text((PROSE,), False), resume=True)
        except BaseException as error:  # a child must never return into the parent's loop
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    process = psutil.Process(child)
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            if status:
                raise SystemExit(f"a run failed with status {status}")
            return usage.ru_utime + usage.ru_stime
        used = process.cpu_times()
        if kill_after is not None and used.user + used.system > kill_after:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.002)


def digest(folder: Path) -> dict[str, str]:
    """Every file but the report, which holds times."""
    files = [f for f in folder.iterdir() if not f.name.startswith("report")]
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def main() -> None:
    folder, wanted = Path(sys.argv[1]), int(sys.argv[2])
    write_checkpoint(folder / "model", num_hidden_layers=6)
    compress(folder / "model", RECIPE, folder / "undisturbed", calibration=Text((PROSE,), False))
    duration = attempt(folder / "model", folder / "timed", None)
    assert duration is not None
    expected = digest(folder / "undisturbed")
    moments = random.Random(0)
    kills = finished = equal = 0
    while kills < wanted or not finished:
        output = folder / f"run{finished}"
        if attempt(folder / "model", output, moments.uniform(0.0, 0.8 * duration)) is None:
            kills += 1
            # What stands where a model is expected is whole, or nothing.
            assert not output.exists() or digest(output) == expected
            continue
        finished += 1
        equal += digest(output) == expected and not output.with_name(output.name + ".partial").exists()
    print(json.dumps({"kills": kills, "finished": finished, "equal": equal, "cpu_seconds": round(duration, 2)}))


main()

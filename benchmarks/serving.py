"""A ``tulle serve`` of its own for a benchmark."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

LOG = Path("build") / "serve.log"


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def start(model: str, options: Sequence[str], port: int) -> subprocess.Popen[bytes]:
    """Once it answers. Raises ``SystemExit`` where it does not within 5 minutes."""
    LOG.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tulle", "serve", model, "--port", str(port), *options]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OMP_")}
    with open(LOG, "ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=2)
            return process
        except OSError:
            if process.poll() is not None:
                break
            time.sleep(0.5)
    raise SystemExit(f"expected tulle serve to answer, found that it does not; see {LOG}")


@contextmanager
def started(model: str, options: Sequence[str]) -> Iterator[int]:
    """Its port."""
    port = free_port()
    process = start(model, options, port)
    try:
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)

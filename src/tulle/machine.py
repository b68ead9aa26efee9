"""What a figure was measured on, for reports and benchmark results."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import sys
from pathlib import Path

from tulle.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h. The second is at most 32 MB."""


def describe() -> dict[str, str | int]:
    """CPU model, usable cores, instruction set the native module chose, versions."""
    import torch

    from tulle import native

    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "isa": native.isa,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def cache_bytes() -> int | None:
    """Size of the largest cache of the first processor, where the system tells it."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        if text[:-1].isdigit() and text[-1] in "KMG":
            sizes.append(int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]])
    return max(sizes, default=None)


def memory_bytes() -> int:
    """Memory that this process may use at most: the machine's, or its control group's limit where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = Path(file).read_text().strip()
        except OSError:
            continue
        if limit.isdigit():
            total = min(total, int(limit))
    return total


def peak_memory() -> int:
    """Largest resident size of this process so far, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def keep_freed_memory() -> None:
    """Asks the C library (glibc; others are left alone) to keep what tensors free, up to 1 GB, for the next ones.

    By default it gives every large block back to the system, which fills it with zeros for the next allocation: half of
    the time of a training step on large matrices.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    for option, value in ((M_MMAP_THRESHOLD, 32 << 20), (M_TRIM_THRESHOLD, 1 << 30)):
        mallopt(option, value)


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def require_device(device: str) -> None:
    """Raises ``UserError`` for a device that torch does not have here."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"expected a device that torch has here, found {device!r} ({str(error).splitlines()[0]}); try cpu"
        ) from None

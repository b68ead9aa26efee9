"""Runs all fuzz targets one after the other, each for its share of the time, and says what they reached.

    make fuzz SECONDS=60

Half of the time is the engine's (by instruction set, as far as this CPU has them), half the Python readers'. Inputs
that reached something new stay in build/fuzz/TARGET and are where the next run begins; an input that is a finding lies
in build/fuzz/findings. Exit code 1 where there is one. ``--only native``, or a reader's name, runs one target alone.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import readers
import seeds

from tulle.native import supported_isas

HERE = Path(__file__).parent
BUILD = HERE.parent / "build"
CORPUS, FINDINGS = BUILD / "fuzz", BUILD / "fuzz" / "findings"
DONE = re.compile(r"#(\d+)\s+DONE(?:\s+cov: (\d+))?.* corp: (\d+)/")
LIMITS = ["-timeout=10", "-rss_limit_mb=4096", "-entropic=0", "-reload=0"]
"""``entropic`` spends more time on bookkeeping than a run of the engine takes."""


def run(name: str, corpus: Path, command: list[str], seconds: int, **environment: str) -> bool:
    """One target; prints a line, and the end of its output where it found something. Returns whether it did not."""
    corpus.mkdir(parents=True, exist_ok=True)
    options = [f"-max_total_time={seconds}", *LIMITS, f"-artifact_prefix={FINDINGS}/{name}-", str(corpus)]
    with open(CORPUS / f"{name}.log", "w+", encoding="utf-8", errors="replace") as log:
        code = subprocess.run([*command, *options], stdout=log, stderr=log, env=os.environ | environment).returncode
        log.seek(0)
        lines = log.readlines()
    found = [match for line in lines if (match := DONE.match(line))]
    if code != 0 or not found:
        print(f"{name}: a finding\n" + "".join(lines[-40:]))
        return False
    runs, coverage, inputs = found[-1].groups(default="0")
    rate = int(runs) / max(seconds, 1)
    print(f"{name:24} {int(runs):>9} runs {rate:>8.0f}/s   coverage {coverage:>6}   corpus {inputs:>5}", flush=True)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--only", choices=["native", *readers.READERS])
    options = parser.parse_args()
    seeds.write(CORPUS)
    FINDINGS.mkdir(parents=True, exist_ok=True)
    isas = [isa for isa in supported_isas() if isa != "amx"] if options.only in (None, "native") else []
    names = [name for name in readers.READERS if options.only in (None, name)]
    share = options.seconds // (1 if options.only else 2)
    right = True
    for isa in isas:
        target = [str(BUILD / "fuzz-native" / "tulle_fuzz"), "-max_len=512"]
        sanitizer = "allocator_may_return_null=1:quarantine_size_mb=1:malloc_context_size=4"
        each = max(share // len(isas), 1)
        right &= run(f"native-{isa}", CORPUS / "native", target, each, TULLE_ISA=isa, ASAN_OPTIONS=sanitizer)
    for name in names:
        target = [sys.executable, str(HERE / "readers.py"), name, "-max_len=16384"]
        right &= run(name, CORPUS / name, target, max(share // len(names), 1), OMP_NUM_THREADS="1")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())

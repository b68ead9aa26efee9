"""``tulle serve`` beside llama.cpp's server: throughput, time to the first token, time between tokens.

    python benchmarks/serve_peer.py --model FOLDER --gguf FILE --peer LLAMA_SERVER [--clients 1,4,8,16] [--rounds 3]

LLAMA_SERVER is llama.cpp's ``llama-server``, built for this machine (it is in the source package of llama-cpp-python).
Both servers hold the same shape of model, get the same prompts of 64 to 512 random token ids as ids, and generate 128
tokens, end tokens ignored. They take turns: the one that is not measured is stopped by a signal. The clients run on the
same machine. Medians over rounds; every round has prompts of its own, so that nothing is found in a cache.

A second part measures a shared beginning of 1000 tokens on Tulle: the time to the first token with it in the cache,
against the same lengths without.

Prints a table; adds to results/serve_peer.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from load import load, random_prompts, summary
from tulle import machine

TOKENS, LEAST, MOST = 128, 64, 512
PORTS = {"tulle": 18431, "llama.cpp": 18432}
EXTRA = {"tulle": {"ignore_eos": True}, "llama.cpp": {"ignore_eos": True, "cache_prompt": True}}
RESULTS = Path(__file__).parent / "results" / "serve_peer.json"


def start(name: str, command: list[str]) -> subprocess.Popen[bytes]:
    """A server, once it answers."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OMP_")}
    log = open(f"build/{name.replace('.', '')}-server.log", "wb")
    process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{PORTS[name]}/health", timeout=2)
            return process
        except OSError:
            if process.poll() is not None:
                raise SystemExit(f"expected {name}'s server to run, found that it ended; see {log.name}") from None
            time.sleep(0.5)
    raise SystemExit(f"expected {name}'s server to answer within 5 minutes, found nothing; see {log.name}")


def measured(name: str, clients: int, prompts: list[list[int]], tokens: int = TOKENS) -> dict[str, float]:
    answers, seconds = asyncio.run(load(PORTS[name], clients, prompts, tokens, "default", EXTRA[name]))
    found = summary(answers, seconds)
    expected = tokens * len(prompts)
    if found["tokens"] != expected:
        raise SystemExit(f"expected {expected} tokens of {name}, found {found['tokens']} in its usage")
    return found


def compare(options: argparse.Namespace, servers: dict[str, subprocess.Popen[bytes]]) -> list[dict[str, Any]]:
    rows = []
    for clients in map(int, options.clients.split(",")):
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
        for number in range(options.rounds):
            for name in servers if number % 2 == 0 else reversed(servers):
                for other, process in servers.items():
                    process.send_signal(signal.SIGCONT if other == name else signal.SIGSTOP)
                seed = 1000 * clients + number
                count = max(2 * clients, 6)
                prompts = random_prompts(count, LEAST, MOST, options.vocabulary, seed)
                rounds[name].append(measured(name, clients, prompts))
        row: dict[str, Any] = {"clients": clients}
        for name, found in rounds.items():
            row[name] = {key: statistics.median(one[key] for one in found) for key in found[0]}
            row[name]["rounds"] = [one["tokens_per_s"] for one in found]
        pairs = zip(rounds["tulle"], rounds["llama.cpp"], strict=True)
        row["throughput_ratio"] = statistics.median(a["tokens_per_s"] / b["tokens_per_s"] for a, b in pairs)
        row["first_p95_ratio"] = row["tulle"]["first_p95"] / row["llama.cpp"]["first_p95"]
        rows.append(row)
    for process in servers.values():
        process.send_signal(signal.SIGCONT)
    return rows


def shared_prefix(options: argparse.Namespace, servers: dict[str, subprocess.Popen[bytes]]) -> dict[str, float]:
    """Time to the first token of a prompt of 1000 shared tokens and 20 of its own, medians of ten, in turn."""
    servers["llama.cpp"].send_signal(signal.SIGSTOP)
    system = random_prompts(1, 1000, 1000, options.vocabulary, 7)[0]
    own = random_prompts(11, 20, 20, options.vocabulary, 8)
    others = random_prompts(10, 1020, 1020, options.vocabulary, 9)
    measured("tulle", 1, [[*system, *own[10]]], 2)
    times: dict[str, list[float]] = {"with": [], "without": []}
    for part, other in zip(own[:10], others, strict=True):
        for name, prompt in (("with", [*system, *part]), ("without", other)):
            answers, _ = asyncio.run(load(PORTS["tulle"], 1, [prompt], 2, "default", EXTRA["tulle"]))
            times[name].append(answers[0].first)
    servers["llama.cpp"].send_signal(signal.SIGCONT)
    found = {name: statistics.median(each) for name, each in times.items()}
    return found | {"ratio": found["without"] / found["with"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--gguf", required=True)
    parser.add_argument("--peer", required=True)
    parser.add_argument("--name", required=True, help="under which the results are kept")
    parser.add_argument("--clients", default="1,4,8,16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--option", action="append", default=[], help="one more of tulle serve, such as --layout=dense")
    options = parser.parse_args()
    Path("build").mkdir(exist_ok=True)
    slots, context = 16, 1152
    common = ["--host", "127.0.0.1", "--port"]
    commands = {
        "tulle": [
            sys.executable, "-m", "tulle", "serve", options.model, *common, str(PORTS["tulle"]), "--served-name",
            "default", "--threads", str(options.threads), "--sequences", str(slots), "--context", str(context),
            *options.option,
        ],
        "llama.cpp": [
            options.peer, "-m", options.gguf, *common, str(PORTS["llama.cpp"]), "-t", str(options.threads), "-tb",
            str(options.threads), "-np", str(slots), "-c", str(slots * context), "-cb", "--no-webui",
        ],
    }  # fmt: skip
    servers: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, command in commands.items():
            servers[name] = start(name, command)
        warm = random_prompts(4, 100, 300, options.vocabulary, 1)
        for name in servers:
            measured(name, 4, warm)
        rows = compare(options, servers)
        shared = shared_prefix(options, servers)
    finally:
        for process in servers.values():
            process.send_signal(signal.SIGCONT)
            process.terminate()
            process.wait(30)
    table = Table(title=f"{options.name}: {options.threads} threads, {TOKENS} tokens after {LEAST} to {MOST}")
    for column in ("clients", "", "tokens/s", "first token p50", "p95, ms", "between p50", "p95, ms", "throughput"):
        table.add_column(column, justify="right")
    for row in rows:
        for name in PORTS:
            one = row[name]
            times = [f"{1000 * one[key]:.0f}" for key in ("first_p50", "first_p95", "gap_p50", "gap_p95")]
            ratio = f"{row['throughput_ratio']:.2f} ×" if name == "tulle" else ""
            table.add_row(str(row["clients"]), name, f"{one['tokens_per_s']:.0f}", *times, ratio)
    Console().print(table)
    print(f"shared 1000 tokens: first token after {shared['with']:.3f} s, {shared['without']:.3f} s without")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[options.name] = {
        "options": options.option, "rows": rows, "shared_prefix": shared, "machine": machine.describe(),
    }  # fmt: skip
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

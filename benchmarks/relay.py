"""Compares fedqueue with a minimal relay, which bounds its speed: ratio of updates per second.

    python benchmarks/relay.py [--quick] [--repeats 3] [--json FILE]

The relay is a loop of bare redis-py against the same kind of server, with as many processes, that does only
what each update requires: each of four workers fetches a model of M bytes and stores a delta of M bytes; a coordinator
reads the delta and stores a model of M bytes. The relay neither checks, merges, leases nor records anything. fedqueue
runs with four workers whose training is instant. The processes of both are forked from one, as those of `fedqueue run`
are, so that shared pages are in the processor's caches only once. Relay and fedqueue take turns, so that a change of
the machine's speed affects both.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from live_federation import live_federation, size_options, spread

from fedqueue.transport.connection import connect
from fedqueue.transport.store import Store
from fedqueue_coordinator.operator.embedded_server import EmbeddedServer

WORKERS = 4
SIZES = (100_000, 1_000_000, 10_000_000, 100_000_000)
MODES = {
    "fedasync": ["aggregation.strategy=fedasync"],
    "fedbuff K=10": ["aggregation.strategy=fedbuff", "aggregation.buffer_size=10"],
}


def relay(nbytes: int, seconds: float, at_least: int) -> float:
    """Return the updates per second of the relay."""
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        server = EmbeddedServer(Path(folder) / "redis")
        stop = fork.Event()
        try:
            Store(connect(server.url), "relay").write_blob("model", np.ones(nbytes, np.uint8))
            workers = [
                fork.Process(target=_relay_worker, args=(server.url, nbytes, i, stop), daemon=True)
                for i in range(WORKERS)
            ]
            passed = fork.Value("q", 0)
            workers.append(fork.Process(target=_relay_coordinator, args=(server.url, nbytes, passed, stop)))
            for worker in workers:
                worker.start()
            _until(lambda: passed.value >= 2 * WORKERS)
            start, before = time.monotonic(), passed.value
            _until(lambda: time.monotonic() > start + seconds and passed.value >= before + at_least)
            rate = float(passed.value - before) / (time.monotonic() - start)
            stop.set()
            for worker in workers:
                worker.join()
        finally:
            server.stop()
    return rate


def _until(condition: Any) -> None:
    while not condition():
        time.sleep(0.02)


def _relay_worker(url: str, nbytes: int, number: int, stop: Any) -> None:
    store, buffer = Store(connect(url), "relay"), np.empty(nbytes, np.uint8)
    while not stop.is_set():
        store.read_blob("model", buffer)
        store.write_blob(f"delta:{number}", buffer)
        store.redis.rpush("done", number)
        store.redis.blpop([f"next:{number}"], timeout=1)


def _relay_coordinator(url: str, nbytes: int, passed: Any, stop: Any) -> None:
    store, buffer = Store(connect(url), "relay"), np.empty(nbytes, np.uint8)
    while not stop.is_set():
        answer: Any = store.redis.blpop(["done"], timeout=1)
        if answer:
            number = answer[1].decode()
            store.read_blob(f"delta:{number}", buffer)
            store.write_blob("model", buffer)
            store.redis.rpush(f"next:{number}", 1)
            passed.value += 1


def measure(nbytes: int, modes: list[str], repeats: int, seconds: float, at_least: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"bytes": nbytes, "mode": mode, "relay": [], "fedqueue": []} for mode in modes]
    for _ in range(repeats):
        for row in rows:
            row["relay"].append(relay(nbytes, seconds, at_least))
            with live_federation(nbytes, WORKERS, MODES[row["mode"]], forked=True) as running:
                row["fedqueue"].append(running.measure(seconds, at_least).per_second)
    for row in rows:
        row["ratios"] = [f / r for f, r in zip(row["fedqueue"], row["relay"], strict=True)]
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| model | mode | relay, updates/s | fedqueue, updates/s | ratio |", "|---|---|---|---|---|"]
    for row in rows:
        size = f"{row['bytes'] / 1e6:g} MB"
        ratio = f"{statistics.median(row['ratios']):.2f}"
        lines.append(f"| {size} | {row['mode']} | {spread(row['relay'])} | {spread(row['fedqueue'])} | {ratio} |")
    return "\n".join(lines)


def main() -> None:
    options = size_options(__doc__, SIZES)
    modes = list(MODES)[:1] if options.quick else list(MODES)
    rows: list[dict[str, Any]] = []
    for nbytes in options.sizes:
        found = measure(nbytes, modes, options.repeats, options.seconds, at_least=20)
        print("\n".join(table(found).splitlines()[2:]), flush=True)
        rows += found
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Measures the end-to-end cost of signatures: updates per second of a signed federation relative to an unsigned one.

    python benchmarks/signing.py [--quick] [--repeats 3] [--json FILE]

Two federations of two workers whose training is instant take turns: one signs and verifies everything, the other
nothing. The table also has the CPU time of coordinator and workers for one update. The last line is the speed of
hashing with this machine's OpenSSL, which is nearly all of the cost.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from typing import Any

from live_federation import live_federation, size_options, spread

WORKERS = 2
SIZES = (1_000_000, 10_000_000, 100_000_000)
SETTINGS = {"unsigned": ['security.signatures="off"'], "signed": []}
HASHES = ("sha256", "sha512", "blake2b", "blake2s")


def measure(nbytes: int, repeats: int, seconds: float, at_least: int) -> dict[str, Any]:
    row: dict[str, Any] = {"bytes": nbytes, **{kind: [] for kind in SETTINGS}}
    cpu: dict[str, list[tuple[float, float]]] = {kind: [] for kind in SETTINGS}
    for _ in range(repeats):
        for kind, settings in SETTINGS.items():
            with live_federation(nbytes, WORKERS, ["aggregation.strategy=fedasync", *settings], forked=True) as running:
                figures = running.measure(seconds, at_least)
            row[kind].append(figures.per_second)
            cpu[kind].append((figures.coordinator_cpu / figures.updates, figures.worker_cpu / figures.updates))
    row["ratios"] = [s / u for s, u in zip(row["signed"], row["unsigned"], strict=True)]
    for i, part in enumerate(("coordinator", "workers")):
        used = {kind: statistics.median(pair[i] for pair in pairs) for kind, pairs in cpu.items()}
        row[f"{part}_ms"] = 1000 * (used["signed"] - used["unsigned"])
    return row


def hash_rates(nbytes: int = 50_000_000, times: int = 3) -> dict[str, float]:
    """Return algorithm → GB/s, the best of `times` measurements."""
    data, rates = bytes(nbytes), {}
    for name in HASHES:
        best = float("inf")
        for _ in range(times):
            began = time.perf_counter()
            hashlib.new(name, data).digest()
            best = min(best, time.perf_counter() - began)
        rates[name] = nbytes / best / 1e9
    return rates


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | unsigned, updates/s | signed, updates/s | ratio | more CPU per update, coordinator / workers |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = f"{statistics.median(row['ratios']):.2f} ({min(row['ratios']):.2f} to {max(row['ratios']):.2f})"
        cpu = f"{row['coordinator_ms']:.1f} / {row['workers_ms']:.1f} ms"
        lines.append(
            f"| {row['bytes'] / 1e6:g} MB | {spread(row['unsigned'])} | {spread(row['signed'])} | {ratio} | {cpu} |"
        )
    return "\n".join(lines)


def main() -> None:
    options = size_options(__doc__, SIZES)
    rows = []
    for nbytes in options.sizes:
        rows.append(measure(nbytes, options.repeats, options.seconds, at_least=20))
        print(table(rows).splitlines()[-1], flush=True)
    print(table(rows))
    print(", ".join(f"{name} {rate:.2f} GB/s" for name, rate in hash_rates().items()))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()

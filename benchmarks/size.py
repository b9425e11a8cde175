"""Trains models of 400 MB and 1.6 GB: peak memory of coordinator, worker and server, in model sizes above idle.

    python benchmarks/size.py [--quick] [--sizes 400000000,1600000000] [--json FILE]

One worker, one job at a time, at least five updates. The idle peaks are those of a federation whose model is 1 KB. A
worker's peak includes the task's module, besides fedqueue's own base and update.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from live_federation import Figures, live_federation

SIZES = (400_000_000, 1_600_000_000)
IDLE = 1_000
UPDATES = 5
MODES = {
    "fedasync, delta": ["aggregation.strategy=fedasync", "aggregation.mixing=delta"],
    "fedbuff K=3": ["aggregation.strategy=fedbuff", "aggregation.buffer_size=3"],
    "fedasync, delta, int8 up": [
        "aggregation.strategy=fedasync",
        "aggregation.mixing=delta",
        "compression.uplink=int8",
    ],
}
LONG = ["dispatch.lease_seconds=120", "dispatch.stall_seconds=600"]


def measure(nbytes: int, mode: str) -> Figures:
    with live_federation(nbytes, 1, [*MODES[mode], *LONG], at_work=1) as running:
        return running.measure(0.0, UPDATES)


def rows(sizes: list[int], modes: list[str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for mode in modes:
        idle = measure(IDLE, mode)
        for nbytes in sizes:
            figures = measure(nbytes, mode)
            row = {
                "mode": mode,
                "bytes": nbytes,
                "updates": figures.updates,
                "seconds": figures.seconds,
                "coordinator": (figures.coordinator_peak - idle.coordinator_peak) / nbytes,
                "worker": (figures.worker_peak - idle.worker_peak) / nbytes,
                "server": (figures.server_peak - idle.server_peak) / nbytes,
            }
            found.append(row)
            print(table([row]).splitlines()[-1], flush=True)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| mode | model | updates | seconds each | coordinator | worker | server |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        peaks = " | ".join(f"{row[part]:.2f}" for part in ("coordinator", "worker", "server"))
        each = row["seconds"] / row["updates"]
        lines.append(f"| {row['mode']} | {row['bytes'] / 1e6:g} MB | {row['updates']} | {each:.1f} | {peaks} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small size, as a smoke test")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="model sizes in bytes, by commas")
    parser.add_argument("--modes", default=";".join(MODES), help="names of modes, by semicolons")
    parser.add_argument("--json", type=Path, help="write the rows there")
    options = parser.parse_args()
    sizes = [2_000_000] if options.quick else [int(size) for size in options.sizes.split(",")]
    found = rows(sizes, list(MODES)[:1] if options.quick else options.modes.split(";"))
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()

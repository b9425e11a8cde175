"""Measures what keepers cost: updates per second with 0 to 3 keepers, and the work, bytes and memory of each role.

    python benchmarks/secure.py [--quick] [--repeats 3] [--sizes 1000,1000000] [--keepers 0,1,2] [--json FILE]

Federations of two worker processes for forty clients, whose training is instant, take turns: FedBuff with ten updates
to a version, signed, with no keeper and with one to three. CPU time is that of all processes of a role, for one merged
update. Bytes are those that the server received and sent, for one merged update. With everything on one machine, the
keepers take time from the workers; on machines of their own they would not.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from live_federation import QUICK_SECONDS, live_federation, spread

WORKERS, CLIENTS, BUFFER = 2, 40, 10
SIZES = (1_000, 100_000, 1_000_000, 10_000_000, 100_000_000)
NAMES = ("university", "audit-office", "foundation")
SETTINGS = [
    "aggregation.strategy=fedbuff",
    f"aggregation.buffer_size={BUFFER}",
    "dispatch.lease_seconds=60",
    "dispatch.stall_seconds=300",
]
ROLES = ("coordinator", "worker", "keeper", "server")


def measure(nbytes: int, counts: list[int], repeats: int, seconds: float, versions: int) -> list[dict[str, Any]]:
    """Return a row for each number of keepers, with all repetitions."""
    rows: list[dict[str, Any]] = [{"bytes": nbytes, "keepers": count, "figures": []} for count in counts]
    for _ in range(repeats):
        for row in rows:
            keepers = NAMES[: row["keepers"]]
            with live_federation(nbytes, WORKERS, SETTINGS, CLIENTS, forked=True, keepers=keepers) as running:
                row["figures"].append(running.measure(seconds, versions * BUFFER))
    plain = next((row for row in rows if row["keepers"] == 0), None)
    for row in rows:
        row["per_second"] = [f.per_second for f in row["figures"]]
        if plain:
            row["ratios"] = [m / p for m, p in zip(row["per_second"], plain["per_second"], strict=True)]
        for role in ROLES:
            row[f"{role}_ms"] = statistics.median(1000 * getattr(f, f"{role}_cpu") / f.updates for f in row["figures"])
            row[f"{role}_peak"] = max(getattr(f, f"{role}_peak") for f in row["figures"])
        row["moved"] = statistics.median(f.moved / f.updates for f in row["figures"])
        row["versions"] = sum(f.updates for f in row["figures"]) / BUFFER
        del row["figures"]
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | keepers | updates/s | ratio | CPU per update: coordinator / workers / keepers / server, ms "
        "| MB moved per update | peak of coordinator / keeper, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = f"{statistics.median(row['ratios']):.2f}" if "ratios" in row else ""
        cpu = " / ".join(f"{row[f'{role}_ms']:.1f}" for role in ROLES)
        peaks = f"{row['coordinator_peak'] / 1e6:.0f} / {row['keeper_peak'] / 1e6:.0f}"
        lines.append(
            f"| {size_of(row['bytes'])} | {row['keepers']} | {spread(row['per_second'])} | {ratio} | {cpu} | "
            f"{row['moved'] / 1e6:.3g} | {peaks} |"
        )
    return "\n".join(lines)


def size_of(nbytes: int) -> str:
    return f"{nbytes / 1e6:g} MB" if nbytes >= 100_000 else f"{nbytes / 1e3:g} KB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small size, 0 and 1 keeper, as a smoke test")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="model sizes in bytes, by commas")
    parser.add_argument("--keepers", default="0,1,2,3", help="numbers of keepers, by commas")
    parser.add_argument("--seconds", type=float, default=8.0, help="duration of each measurement")
    parser.add_argument("--json", type=Path, help="write the rows there")
    options = parser.parse_args()
    sizes, counts = ([int(n) for n in words.split(",")] for words in (options.sizes, options.keepers))
    if options.quick:
        sizes, counts, options.repeats, options.seconds = [100_000], [0, 1], 1, QUICK_SECONDS
    rows: list[dict[str, Any]] = []
    for nbytes in sizes:
        found = measure(nbytes, counts, options.repeats, options.seconds, versions=1 if options.quick else 3)
        print("\n".join(table(found).splitlines()[2:]), flush=True)
        rows += found
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()

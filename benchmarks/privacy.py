"""Measures what [privacy.clients] costs: updates per second with noise and without, with the same keepers.

    python benchmarks/privacy.py [--quick] [--repeats 3] [--sizes 1000000,10000000] [--keepers 1,2] [--json FILE]

Federations of two worker processes for forty clients, whose training is instant, take turns: FedBuff with ten updates
to a version, masked, with and without differential privacy of clients. CPU time is that of all processes of a role, for
one merged update. With everything on one machine, the keepers take time from the workers.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from live_federation import QUICK_SECONDS, live_federation, spread
from secure import BUFFER, CLIENTS, NAMES, ROLES, SETTINGS, WORKERS, size_of

SIZES = (1_000_000, 10_000_000)
NOISE = [
    "privacy.clients.clip_norm=1.0",
    "privacy.clients.noise_multiplier=1.0",
    "privacy.clients.max_participations=1000000",  # no client's budget is used up while it is measured
    "privacy.clients.delta=1e-5",
]


def measure(nbytes: int, keepers: int, repeats: int, seconds: float, versions: int) -> dict[str, Any]:
    """Return the updates per second and the CPU time of each role, without noise and with it."""
    figures: dict[str, list[Any]] = {"without": [], "with": []}
    for number in range(repeats):
        for kind in ("without", "with") if number % 2 == 0 else ("with", "without"):
            settings = SETTINGS + (NOISE if kind == "with" else [])
            with live_federation(nbytes, WORKERS, settings, CLIENTS, forked=True, keepers=NAMES[:keepers]) as running:
                figures[kind].append(running.measure(seconds, versions * BUFFER))
    row: dict[str, Any] = {"bytes": nbytes, "keepers": keepers}
    for kind, measured in figures.items():
        row[kind] = [one.per_second for one in measured]
        for role in ROLES:
            row[f"{role}_ms_{kind}"] = statistics.median(
                1000 * getattr(one, f"{role}_cpu") / one.updates for one in measured
            )
    row["ratios"] = [noisy / plain for noisy, plain in zip(row["with"], row["without"], strict=True)]
    return row


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | keepers | updates/s without noise | with noise | ratio of a pair "
        "| keepers' CPU per update without and with noise, ms |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {size_of(row['bytes'])} | {row['keepers']} | {spread(row['without'])} | {spread(row['with'])} "
        f"| {spread(row['ratios'])} | {row['keeper_ms_without']:.1f}, {row['keeper_ms_with']:.1f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small size and one keeper, as a smoke test")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="model sizes in bytes, by commas")
    parser.add_argument("--keepers", default="1,2", help="numbers of keepers, by commas")
    parser.add_argument("--seconds", type=float, default=8.0, help="duration of each measurement")
    parser.add_argument("--json", type=Path, help="write the rows there")
    options = parser.parse_args()
    sizes, counts = ([int(n) for n in words.split(",")] for words in (options.sizes, options.keepers))
    if options.quick:
        sizes, counts, options.repeats, options.seconds = [100_000], [1], 1, QUICK_SECONDS
    versions = 1 if options.quick else 3
    rows = [measure(size, count, options.repeats, options.seconds, versions) for size in sizes for count in counts]
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()

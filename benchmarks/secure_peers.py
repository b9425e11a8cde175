"""Compares fedqueue's secure aggregation with its peers' as they ship it: what a round of ten clients costs.

    python benchmarks/secure_peers.py [--quick] [--install] [--only NAME,…] [--sizes 100000,1000000] [--repeats 3]
        [--json FILE]

Each round runs in one process of the system's own environment, one thread, without a network: what all clients, the
server and the keepers compute from ten float32 vectors to their mean. The systems take turns. Seconds of a client
divided by the parameters are its nanoseconds per parameter. The error is the largest of the mean's elements, whose
updates have the standard deviation 0.01. What was tried against each system's masks is told with its result. A peer
that is not installed is skipped, with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from live_federation import spread
from peers.environments import APPFL, FLOWER, FOLDER, HERE, PEERS, Peer

SIZES = (100_000, 1_000_000)
CONTENDERS: dict[str, tuple[Peer | None, str, tuple[str, ...]]] = {
    # name: (environment, script, arguments behind the number of parameters)
    "fedqueue, 2 keepers": (None, "fedqueue_masks.py", ("2",)),
    "fedqueue, 3 keepers": (None, "fedqueue_masks.py", ("3",)),
    "Flower SecAgg+, masks with 9 others": (FLOWER, "flower_masks.py", ("10",)),
    "Flower SecAgg+, masks with 4 others": (FLOWER, "flower_masks.py", ("5",)),
    "APPFL": (APPFL, "appfl_masks.py", ()),
}
Row = dict[str, Any]


def measure(name: str, parameters: int) -> Row:
    """One round; raises RuntimeError with the last line of what a failed round wrote."""
    peer, script, options = CONTENDERS[name]
    python = str(peer.python) if peer else sys.executable
    path = peer.path if peer else os.environ.get("PYTHONPATH", "")
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    done = subprocess.run(
        [python, str(HERE / script), str(parameters), *options], capture_output=True, text=True, check=False,
        env={**os.environ, **threads, "PYTHONPATH": path},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return found


def table(record: Row) -> str:
    lines: list[str] = []
    for size, rows in record["sizes"].items():
        lines += [
            f"\n{int(size):,} parameters\n",
            "| | client, ns per parameter | server, s | keeper, s | round, s | bytes per parameter | error |",
            "|---" * 7 + "|",
        ]
        for name, found in rows.items():
            keepers = spread([row["keepers"] for row in found]) if "keepers" in found[0] else "–"
            cells = [
                spread([row["clients"] / int(size) * 1e9 for row in found], 0),
                spread([row["server"] for row in found]), keepers, spread([row["round"] for row in found]),
                f"{found[0]['bytes']:.1f}", f"{max(row['error'] for row in found):.1e}",
            ]  # fmt: skip
            lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["\n| tried | succeeded |", "|---|---|"]
    tried = {
        f"{name.split(',')[0]}: {what}": success
        for rows in record["sizes"].values()
        for name, found in rows.items()
        for what, success in found[0]["tried"].items()
    }
    lines += [f"| {what} | {'yes' if success else 'no'} |" for what, success in tried.items()]
    lines += [f"\n{name}: skipped: {why}" for name, why in record["skipped"].items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fedqueue alone, a small size, once, as a smoke test")
    parser.add_argument("--install", action="store_true", help="install the peers first, below .peers/")
    parser.add_argument("--only", default="", help="only systems whose name starts with one of these, by commas")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="numbers of parameters, by commas")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    if options.quick:
        options.sizes, options.repeats = "1000", 1
    if options.install:
        FOLDER.mkdir(exist_ok=True)
        for peer in PEERS.values():
            peer.install()
    starts = tuple(options.only.lower().split(","))
    chosen = [name for name in CONTENDERS if not options.only or name.lower().startswith(starts)]
    record: Row = {"sizes": {}, "skipped": {}}
    for name in chosen:
        if installed := CONTENDERS[name][0]:
            why = "not with --quick" if options.quick and installed.python.exists() else installed.missing()
            record["skipped"].update({name: why} if why else {})
    for size in options.sizes.split(","):
        rows = record["sizes"].setdefault(size, {})
        for _ in range(options.repeats):
            for name in chosen:
                if name in record["skipped"]:
                    continue
                try:
                    rows.setdefault(name, []).append(measure(name, int(size)))
                except RuntimeError as error:
                    record["skipped"][name] = str(error)
                    continue
                print(f"{size} {name}: {rows[name][-1]['round']:.2f} s", file=sys.stderr, flush=True)
                if options.json:
                    options.json.write_text(json.dumps(record, indent=2) + "\n")
    print(table(record))


if __name__ == "__main__":
    main()

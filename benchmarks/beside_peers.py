"""Compares fedqueue with its peers: updates per second and memory by model size, and seconds to a target accuracy.

    python benchmarks/beside_peers.py [--quick] [--install] [--only NAME,…] [--what sizes,digits] [--repeats 3]
        [--json FILE]

The server and each client are separate processes on this machine. Sizes: 4 clients whose training is instant and
returns the model plus a little noise. Digits: 8 clients, Dirichlet 0.3, five local epochs and a sleep of 0.05 s (four
clients) to 2 s; the result is the time in seconds from the first merged update to 95 % on a central test set. Peak
memory is that of the largest server or client process: all resident pages, and the same without the other processes'
proportional part of shared pages. The systems take turns. A peer that is not installed is skipped, with the reason. New
figures of a system replace its old ones in FILE; those of other systems stay.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from live_federation import QUICK_SECONDS, live_federation, spread
from peers import work
from peers.environments import FOLDER, PEERS
from peers.running import MIB, rate, seconds_to
from peers.systems import SYSTEMS, Work

from fedqueue import Client
from fedqueue.task import load_task

EXAMPLE = Path(__file__).parents[1] / "examples" / "digits"
SIZES = (100_000, 1_000_000, 10_000_000, 100_000_000)
CLIENTS, SITES = 4, 8
LIMIT = {"sizes": 300.0, "digits": 200.0}  # seconds of one measurement
CONTENDERS = {
    # name: (system, mode)
    "fedqueue fedasync": ("fedqueue", "fedasync"),
    "fedqueue fedbuff": ("fedqueue", "fedbuff"),
    "APPFL FedAsync": ("appfl", "fedasync"),
    "APPFL FedBuff": ("appfl", "fedbuff"),
    "APPFL FedAsync (made fast)": ("appfl made fast", "fedasync"),
    "APPFL FedBuff (made fast)": ("appfl made fast", "fedbuff"),
    "Flower FedAvg (SuperLink)": ("flower", "fedavg"),
}
SETTINGS = {
    "fedasync": ["aggregation.strategy=fedasync"],
    "fedbuff": ["aggregation.strategy=fedbuff", f"aggregation.buffer_size={work.BUFFER}"],
}
PEAKS = {
    "peak MiB, server / client / Redis": ("server", "client", "redis"),
    "the same, shared memory in parts": ("server_own", "client_own"),
}
Row = dict[str, Any]


def measure_size(name: str, nbytes: int, seconds: float, at_least: int) -> Row:
    system, mode = CONTENDERS[name]
    if system == "fedqueue":
        with live_federation(nbytes, CLIENTS, SETTINGS[mode], forked=True) as running:
            found = running.measure(seconds, at_least)
        return {
            "rate": found.per_second,
            "server": found.coordinator_peak / MIB,
            "client": found.worker_peak / MIB,
            "redis": found.server_peak / MIB,
            "server_own": (found.coordinator_peak - found.coordinator_shared) / MIB,
            "client_own": (found.worker_peak - found.worker_shared) / MIB,
        }
    with tempfile.TemporaryDirectory() as folder, SYSTEMS[system](Work(nbytes, CLIENTS, mode), Path(folder)) as running:
        reached = rate(running, 2 * CLIENTS, seconds, 2 * CLIENTS if system == "flower" else at_least, LIMIT["sizes"])
        peaks = {role: running.peak_mib(role) for role in ("server", "client")}
        return {"rate": reached, **peaks, **{f"{role}_own": running.own_mib(role) for role in peaks}}


def measure_digits(name: str, seed: int) -> Row:
    system, mode = CONTENDERS[name]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "digits.npz"
        write_digits(data, seed)
        work_ = Work(0, SITES, mode, seed, str(data))
        with SYSTEMS[system](work_, Path(folder)) as running:
            found = seconds_to(running, work.TARGET, LIMIT["digits"])
    return {"seconds": found}


def write_digits(path: Path, seed: int) -> None:
    """Write the split of the digits example for processes that do not import fedqueue."""
    task = load_task("task.py:DigitsTask", {"seed": seed}, EXAMPLE)
    parts = {i: task.train_data(Client(f"client-{i}", i, SITES)).tensors for i in range(SITES)}
    arrays = {
        f"{kind}-{i}": part[j].numpy() for i, part in parts.items() for j, kind in enumerate(("images", "labels"))
    }
    images, labels = task.test_data().tensors
    np.savez(path, **arrays, **{"images-test": images.numpy(), "labels-test": labels.numpy()})


def run(name: str, what: str, point: int, options: argparse.Namespace) -> Row | str:
    """Return one measurement, or the reason for its failure."""
    try:
        if what == "digits":
            found = measure_digits(name, point)
        else:
            found = measure_size(name, point, options.seconds, options.at_least)
        return {**found, "load": os.getloadavg()[0]}  # load of the machine, including other work
    except (RuntimeError, TimeoutError, AssertionError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return f"failed: {str(error).splitlines()[0]}"


def table(record: Row) -> str:
    lines: list[str] = []
    if sizes := record.get("sizes"):
        points = sorted({int(p) for rows in sizes.values() for p in rows})
        head = " | ".join(f"{point / 1e6:g} MB" for point in points)
        lines += [f"| updates/s | {head} |", "|---" * (len(points) + 1) + "|"]
        lines += [_line(name, [_cell(rows.get(str(p), []), "rate") for p in points]) for name, rows in sizes.items()]
        for title, roles in PEAKS.items():
            lines += ["", f"| {title} | {head} |", "|---" * (len(points) + 1) + "|"]
            lines += [
                _line(name, [_peaks(rows.get(str(p), []), roles) for p in points]) for name, rows in sizes.items()
            ]
    if digits := record.get("digits"):
        seeds = sorted({int(seed) for rows in digits.values() for seed in rows})
        lines += ["", _line("seconds to 95 %", [f"seed {seed}" for seed in seeds]), "|---" * (len(seeds) + 1) + "|"]
        for name, rows in digits.items():
            lines += [_line(name, [_cell(rows.get(str(seed), []), "seconds", 1) for seed in seeds])]
    lines += [f"\n{name}: skipped: {why}" for name, why in record["skipped"].items()]
    return "\n".join(lines)


def _line(name: str, cells: list[str]) -> str:
    return f"| {name} | {' | '.join(cells)} |"


def _cell(found: list[Row | str], key: str, digits: int = 2) -> str:
    numbers = [row[key] for row in found if isinstance(row, dict) and row[key] is not None]
    if numbers:
        return spread(numbers, digits)
    failures = [row for row in found if isinstance(row, str)]
    return failures[0] if failures else "not reached" if found else "–"


def _peaks(found: list[Row | str], roles: tuple[str, ...]) -> str:
    rows = [row for row in found if isinstance(row, dict)]
    present = [role for role in roles if rows and role in rows[0]]
    return " / ".join(f"{max(row[role] for row in rows):.0f}" for role in present) or "–"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fedqueue alone, one small size, as a smoke test")
    parser.add_argument("--install", action="store_true", help="install the peers first, below .peers/")
    parser.add_argument("--only", default="", help="only systems whose name starts with one of these, by commas")
    parser.add_argument("--what", default="sizes,digits")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="model sizes in bytes, by commas")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="minimum duration of each measurement of a size")
    parser.add_argument("--at-least", type=int, default=20, help="minimum updates in each measurement of a size")
    parser.add_argument("--json", type=Path, help="file with earlier figures, which is updated")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that exit handlers end the started processes
    if options.quick:
        options.what, options.sizes, options.repeats, options.seconds = "sizes", "100000", 1, QUICK_SECONDS
    if options.install:
        FOLDER.mkdir(exist_ok=True)
        for peer in PEERS.values():
            peer.install()
    record: Row = json.loads(options.json.read_text()) if options.json and options.json.exists() else {"skipped": {}}
    chosen = [n for n in CONTENDERS if not options.only or n.lower().startswith(tuple(options.only.lower().split(",")))]
    for family in sorted({CONTENDERS[name][0].split()[0] for name in chosen} & set(PEERS)):
        why = "not with --quick" if options.quick and PEERS[family].python.exists() else PEERS[family].missing()
        named = [name for name in CONTENDERS if CONTENDERS[name][0].startswith(family)]
        record["skipped"] = {n: w for n, w in record["skipped"].items() if n not in named}
        record["skipped"].update(dict.fromkeys(named if why else [], why))
    chosen = [name for name in chosen if name not in record["skipped"]]
    for what in options.what.split(","):
        points = (options.seeds if what == "digits" else options.sizes).split(",")
        section = record.setdefault(what, {})
        for point in points:
            for name in chosen:
                section.setdefault(name, {})[point] = []
            for _ in range(1 if what == "digits" else options.repeats):
                for name in chosen:
                    found = run(name, what, int(point), options)
                    section[name][point].append(found)
                    print(f"{what} {point} {name}: {found}", flush=True)
                    if options.json:
                        options.json.write_text(json.dumps(record, indent=2) + "\n")
    print(table(record))


if __name__ == "__main__":
    main()

"""Measures the cost of an update apart from its bytes: a model of 1 KB, four workers whose training is instant.

    python benchmarks/control.py [--quick] [--metrics | --watched] [--repeats 3] [--json FILE]

Prints updates per second, the CPU time of coordinator, workers and server for each update, and the share of each step
in the coordinator's CPU time. The shares come from a second federation whose coordinator runs under a profiler; the
times come from the first.

With `--metrics`, it measures what metrics cost instead, and with `--watched` what everything costs that watches a run:
metrics scraped each second, a page with one reader, an event file of TensorBoard, and logs as JSON. Federations with
and without it take turns. The watchers' own CPU time comes out of the same cores.
"""

from __future__ import annotations

import argparse
import json
import pstats
import statistics
import tempfile
from pathlib import Path
from typing import Any

from live_federation import QUICK_SECONDS, Watched, live_federation, spread

WORKERS, BYTES = 4, 1_000
MODES = {
    "fedasync": ["aggregation.strategy=fedasync"],
    "fedbuff K=10": ["aggregation.strategy=fedbuff", "aggregation.buffer_size=10"],
}
STEPS = {
    "wait for entries and read them": ("coordinator_store.py", "receive"),
    "open them: msgpack, signature, bounds": ("entry_verifier.py", "to_event"),
    "sign the order": ("coordinator_store.py", "pack_order"),
    "make RQ's record of it": ("rq_jobs.py", "record"),
    "open the job and put it into its queue": ("coordinator_store.py", "dispatch"),
    "read the payload, check its digest": ("coordinator_store.py", "read_payload"),
    "admit, weigh, merge, step": ("federation.py", "handle"),
    "publish: sign, blobs, one script": ("coordinator_store.py", "publish"),
}


def measure(mode: str, seconds: float, at_least: int, watched: Watched = "") -> dict[str, float]:
    with live_federation(BYTES, WORKERS, MODES[mode], forked=True, watched=watched) as running:
        figures = running.measure(seconds, at_least)
    return {
        "per_second": figures.per_second,
        "coordinator_ms": 1e3 * figures.coordinator_cpu / figures.updates,
        "worker_ms": 1e3 * figures.worker_cpu / figures.updates,
        "server_ms": 1e3 * figures.server_cpu / figures.updates,
    }


def shares(mode: str, seconds: float, at_least: int) -> dict[str, float]:
    """Return step → share of the CPU time of the coordinator's main thread in its loop."""
    with tempfile.TemporaryDirectory() as folder:
        profile = Path(folder) / "profile"
        with live_federation(BYTES, WORKERS, MODES[mode], profile=profile, forked=True) as running:
            running.measure(seconds, at_least)
        times = pstats.Stats(str(profile)).stats  # type: ignore[attr-defined]
    cumulative = {(Path(file).name, name): entry[3] for (file, _, name), entry in times.items()}
    loop = cumulative["coordinator.py", "_loop"]
    parts = {step: cumulative[function] / loop for step, function in STEPS.items()}
    return {**parts, "the rest": 1 - sum(parts.values())}


def pairs(mode: str, seconds: float, repeats: int, watched: Watched) -> dict[str, Any]:
    """Return the figures of federations that alternate: not watched, and watched."""
    figures: dict[Watched, list[dict[str, float]]] = {"": [], watched: []}
    for number in range(repeats):
        for which in ("", watched) if number % 2 == 0 else (watched, ""):
            figures[which].append(measure(mode, seconds, at_least=20, watched=which))
    return {"mode": mode, "without": figures[""], "with": figures[watched]}


def table_of_pairs(rows: list[dict[str, Any]], watched: Watched) -> str:
    """Medians of each figure of both kinds, and the median ratio of a pair; CPU times are ms for each update."""
    what = "metrics" if watched == "metrics" else "everything"
    lines = [f"| mode | figure | without | with {what} | ratio of a pair |", "|---|---|---|---|---|"]
    for row in rows:
        for figure in ("per_second", "coordinator_ms", "worker_ms"):
            before, after = ([f[figure] for f in row[which]] for which in ("without", "with"))
            ratios = [a / b for a, b in zip(after, before, strict=True)]
            lines.append(f"| {row['mode']} | {figure} | {spread(before)} | {spread(after)} | {spread(ratios)} |")
    return "\n".join(lines)


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| mode | updates/s | coordinator, ms of CPU | workers | server |", "|---|---|---|---|---|"]
    for row in rows:
        figures = [spread([f[key] for f in row["figures"]]) for key in row["figures"][0]]
        lines.append(f"| {row['mode']} | {' | '.join(figures)} |")
    lines += ["", f"| step | {' | '.join(row['mode'] for row in rows)} |", f"|---|{'---|' * len(rows)}"]
    for step in rows[0]["shares"]:
        whole = [statistics.median(f["coordinator_ms"] for f in row["figures"]) for row in rows]
        parts = [f"{1e3 * ms * row['shares'][step]:.0f} µs" for ms, row in zip(whole, rows, strict=True)]
        lines.append(f"| {step} | {' | '.join(parts)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one mode, once, as a smoke test")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--metrics", action="store_const", dest="watched", const="metrics", help="pairs with metrics")
    kinds.add_argument("--watched", action="store_const", const="all", help="pairs with everything that watches a run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="duration of each measurement")
    parser.add_argument("--json", type=Path, help="write the rows there")
    options = parser.parse_args()
    repeats, seconds = (1, QUICK_SECONDS) if options.quick else (options.repeats, options.seconds)
    modes = list(MODES)[:1] if options.quick else list(MODES)
    rows: list[dict[str, Any]] = [
        pairs(mode, seconds, repeats, options.watched)
        if options.watched
        else {
            "mode": mode,
            "figures": [measure(mode, seconds, at_least=20) for _ in range(repeats)],
            "shares": shares(mode, seconds, at_least=20),
        }
        for mode in modes
    ]
    print(table_of_pairs(rows, options.watched) if options.watched else table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()

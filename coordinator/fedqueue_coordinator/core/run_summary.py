"""What a run came to, computed from its ledger: the numbers in `summary.json` agree with it by construction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fedqueue.tensors.frame import Frame


@dataclass(frozen=True)
class RunResult:
    """The end of a run: its model (the version that reached the target, else the newest), and why it ended."""

    version: int
    model: Frame
    stopped_because: str
    failed: bool
    ledger: list[dict[str, Any]]
    refused: dict[str, int]
    jobs_dispatched: int


def summarize(
    run: str,
    mode: str,
    seed: int,
    stopped_because: str,
    ledger: Iterable[Mapping[str, Any]],
    refused: Mapping[str, int],
) -> dict[str, Any]:
    """The summary of a run; `seconds` is the time of its last record, on the run's clock."""
    records = list(ledger)
    merged = [line for r in records if r["kind"] == "version" for line in r["merged"]]
    evaluations = [r for r in records if r["kind"] == "evaluation"]
    rejected = Counter(r["reason"] for r in records if r["kind"] == "rejected")
    abandoned = Counter(r["reason"] for r in records if r["kind"] == "abandoned")
    staleness = [line["staleness"] for line in merged]
    clients = Counter(line["client"] for line in merged)
    seconds = max((r["seconds"] for r in records), default=0.0)
    return {
        "run": run,
        "mode": mode,
        "seed": seed,
        "versions": sum(r["kind"] == "version" for r in records),
        "updates_merged": len(merged),
        "updates_rejected": dict(sorted(rejected.items())),
        "jobs_abandoned": sum(abandoned.values()),
        "abandoned_because": dict(sorted(abandoned.items())),
        "posts_refused": {reason: count for reason, count in refused.items() if count},
        "seconds": round(seconds, 3),
        "updates_per_second": round(len(merged) / seconds, 3) if seconds else 0.0,
        "staleness": {
            "mean": round(sum(staleness) / len(staleness), 4) if staleness else 0.0,
            "max": max(staleness, default=0),
            "histogram": {str(tau): n for tau, n in sorted(Counter(staleness).items())},
        },
        "clients": dict(sorted(clients.items())),
        "shares": {client: round(count / len(merged), 4) for client, count in sorted(clients.items())},
        "metrics": evaluations[-1]["metrics"] if evaluations else {},
        "history": [{"version": r["version"], "seconds": round(r["seconds"], 3), **r["metrics"]} for r in evaluations],
        "stopped_because": stopped_because,
    }

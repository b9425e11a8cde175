"""Checks of the summary and the ledger that hold for every run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any


def check_agreement(summary: Mapping[str, Any], ledger: Sequence[Mapping[str, Any]]) -> None:
    """Check that the summary equals the totals of the ledger, and that each job ended exactly once."""
    merged = [line for record in ledger if record["kind"] == "version" for line in record["merged"]]
    rejected = Counter(r["reason"] for r in ledger if r["kind"] == "rejected")
    assert summary["versions"] == len([r for r in ledger if r["kind"] == "version"])
    assert summary["updates_merged"] == len(merged) == sum(summary["clients"].values())
    assert summary["updates_rejected"] == dict(rejected)
    assert summary["jobs_abandoned"] == len([r for r in ledger if r["kind"] == "abandoned"])
    assert sum(summary["staleness"]["histogram"].values()) == len(merged)
    assert [r["version"] for r in ledger if r["kind"] == "version"] == list(range(1, summary["versions"] + 1))
    endings = [line["job"] for line in merged] + [r["job"] for r in ledger if r["kind"] in ("rejected", "abandoned")]
    assert len(endings) == len(set(endings)), "a job ended twice"
    numbers = sorted(int(job.split("-")[-2]) for job in endings)
    assert numbers == list(range(1, len(numbers) + 1)), "a job has no ending in the ledger"

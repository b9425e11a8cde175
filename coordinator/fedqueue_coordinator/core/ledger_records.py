"""The records of the ledger: what became of every job, and every version. Plain maps, for msgpack and JSON.

Seconds are of the run's own clock. PROTOCOL.md lists the fields; the store adds its fencing token to a version's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedqueue.protocol.messages import Update
from fedqueue_coordinator.core.events import UpdateArrived

LedgerRecord = dict[str, Any]


def merged_line(
    arrived: UpdateArrived, header: Update, *, staleness: int, weight: float, norm: float, seconds: float
) -> LedgerRecord:
    """One update of a version's record, in the order in which it was added."""
    return {
        "job": arrived.job, "client": arrived.client, "attempt": arrived.attempt, "base": arrived.base,
        "staleness": staleness, "examples": header.examples, "weight": weight, "norm": norm, "at": seconds,
        "training_seconds": header.seconds, "metrics": dict(header.metrics),
        **({"digest": header.digest} if header.digest else {}),
    }  # fmt: skip


def version_record(version: int, merged: Sequence[LedgerRecord], seconds: float) -> LedgerRecord:
    return {"kind": "version", "version": version, "seconds": seconds, "merged": list(merged)}


def rejected_record(arrived: UpdateArrived, reason: str, detail: str, version: int, seconds: float) -> LedgerRecord:
    return {
        "kind": "rejected", "job": arrived.job, "client": arrived.client, "attempt": arrived.attempt,
        "base": arrived.base, "reason": reason, "detail": detail, "version": version, "seconds": seconds,
    }  # fmt: skip


def abandoned_record(job: str, client: str, reason: str, error: str, version: int, seconds: float) -> LedgerRecord:
    """`reason`: lapsed, returned, late, failed, refused, forged, foreign, run_ended or epoch_lost."""
    return {
        "kind": "abandoned", "job": job, "client": client, "reason": reason, "error": error,
        "version": version, "seconds": seconds,
    }  # fmt: skip


def evaluation_record(version: int, metrics: Mapping[str, float], seconds: float) -> LedgerRecord:
    return {"kind": "evaluation", "version": version, "metrics": dict(metrics), "seconds": seconds}


def epoch_record(epoch: int, version: int, job_number: int, seconds: float) -> LedgerRecord:
    """Where a new epoch starts: what was recorded after this version is lost."""
    return {"kind": "epoch", "epoch": epoch, "version": version, "job_number": job_number, "seconds": seconds}

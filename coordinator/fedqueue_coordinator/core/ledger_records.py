"""Makes the records of the ledger: the outcome of every job, and every version. Plain maps, for msgpack and JSON.

Seconds are of the run's own clock. PROTOCOL.md lists the fields. The store adds its fencing token to a version's
record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedqueue.protocol.messages import Update
from fedqueue.protocol.stream_entry import StreamEntry
from fedqueue_coordinator.core.events import Evaluated, UpdateArrived
from fedqueue_coordinator.core.reasons import AbandonReason, RejectionReason

LedgerRecord = dict[str, Any]


def merged_update(
    arrived: UpdateArrived, header: Update, *, staleness: int, weight: float, norm: float, seconds: float
) -> LedgerRecord:
    """Describe one update of a version's record."""
    return {
        "job": arrived.job, "client": arrived.client, "attempt": arrived.attempt, "base": arrived.base,
        "staleness": staleness, "examples": header.examples, "weight": weight, "norm": norm, "at": seconds,
        "training_seconds": header.seconds, "metrics": dict(header.metrics),
        **({"digest": header.digest} if header.digest else {}),
    }  # fmt: skip


def masked_update(
    arrived: UpdateArrived, header: Update, offer: str, *, staleness: int, level: int, weight: float, seconds: float
) -> LedgerRecord:
    """Describe one masked update of a version's record; nothing in it depends on the update's content.

    `offer` is the digest by which the cohort names it, `level` its integer weight in the sum.
    """
    return {
        "job": arrived.job, "client": arrived.client, "attempt": arrived.attempt, "base": arrived.base,
        "staleness": staleness, "examples": header.examples, "weight": weight, "level": level, "offer": offer,
        "at": seconds, "training_seconds": header.seconds, "metrics": {},
        **({"digest": header.digest} if header.digest else {}),
    }  # fmt: skip


def version_record(
    version: int, merged: Sequence[LedgerRecord], seconds: float, step_seconds: Mapping[str, float] | None = None
) -> LedgerRecord:
    """Describe a version; `merged` are its updates, in the order in which they were added.

    `step_seconds` are the speeds that were measured since the version before: client → seconds per local step.
    """
    record = {"kind": "version", "version": version, "seconds": seconds, "merged": list(merged)}
    return {**record, "step_seconds": dict(step_seconds)} if step_seconds else record


def spend_record(version: int, cohort: str, privacy: Mapping[str, Any], seconds: float) -> LedgerRecord:
    """Describe what the clients of a cohort spend, which the keepers are now asked about.

    `version` is the one that the cohort would make, and `cohort` the digest of its members with their weights.
    """
    return {"kind": "spend", "version": version, "cohort": cohort, **privacy, "seconds": seconds}


def rejected_record(
    arrived: UpdateArrived | StreamEntry, reason: RejectionReason, detail: str, version: int, seconds: float
) -> LedgerRecord:
    """Describe an update, or an invalid entry, that is not merged; `version` is the newest one."""
    return {
        "kind": "rejected", "job": arrived.job, "client": arrived.client, "attempt": arrived.attempt,
        "base": arrived.base, "reason": str(reason), "detail": detail, "version": version, "seconds": seconds,
    }  # fmt: skip


def abandoned_record(
    job: str, client: str, reason: AbandonReason, error: str, version: int, seconds: float
) -> LedgerRecord:
    """Describe a job that ended without an update; `version` is the newest one."""
    return {
        "kind": "abandoned", "job": job, "client": client, "reason": str(reason), "error": error,
        "version": version, "seconds": seconds,
    }  # fmt: skip


def unavailable_record(client: str, error: str, version: int, seconds: float) -> LedgerRecord:
    """Describe a client whose worker cannot load its data; `version` is the newest one."""
    return {"kind": "unavailable", "client": client, "error": error, "version": version, "seconds": seconds}


def evaluation_record(evaluated: Evaluated, seconds: float) -> LedgerRecord:
    """Describe an evaluation that has finished or failed; one that failed has an `error` and no metrics."""
    return {
        "kind": "evaluation", "version": evaluated.version, "metrics": dict(evaluated.metrics), "seconds": seconds,
        **({"error": evaluated.error} if evaluated.error else {}),
    }  # fmt: skip


def epoch_record(epoch: int, version: int, job_number: int, seconds: float) -> LedgerRecord:
    """Describe the start of a new epoch: Redis lost all records after this version."""
    return {"kind": "epoch", "epoch": epoch, "version": version, "job_number": job_number, "seconds": seconds}

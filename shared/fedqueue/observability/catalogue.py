"""Every metric that a process of fedqueue exposes. docs/reference/metrics.md is generated from this module.

Names and units follow Prometheus' conventions: one prefix, base units, `_total` for what only grows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """One metric: a counter, a gauge or a histogram, with its labels."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram's buckets."""
    together: Literal["livesum", "max"] = "max"
    """What a gauge of several worker processes is at their one address: the sum over living processes, or the
    largest."""


SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)

RUN_INFO = Metric("fedqueue_run_info", "gauge", "1; the labels name the run and its strategy.", ("run", "strategy"))
VERSION = Metric("fedqueue_version", "gauge", "The newest committed version of the model.")
SECONDS_SINCE_VERSION = Metric(
    "fedqueue_seconds_since_version",
    "gauge",
    "Seconds since the newest version was committed, or since this process began to lead the run.",
)
UPDATES_MERGED = Metric(
    "fedqueue_updates_merged_total", "counter", "Updates that are part of a committed version.", ("client",)
)
REJECTED = Metric("fedqueue_rejected_total", "counter", "Updates that were rejected.", ("reason",))
ABANDONED = Metric("fedqueue_jobs_abandoned_total", "counter", "Jobs that ended without an update.", ("reason",))
DISPATCHED = Metric("fedqueue_jobs_dispatched_total", "counter", "Jobs that were put into a client's queue.")
STALENESS = Metric(
    "fedqueue_staleness", "histogram", "Versions between the base of a merged update and its merge.",
    buckets=(0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89),
)  # fmt: skip
UPDATE_NORM = Metric(
    "fedqueue_update_norm", "histogram", "L2 norm of a merged delta; none in a run with keepers.",
    buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0),
)  # fmt: skip
UPDATE_BYTES = Metric("fedqueue_update_bytes_total", "counter", "Bytes of payloads of updates that were read.")
TRAINING_SECONDS = Metric(
    "fedqueue_training_seconds", "histogram", "Seconds of training, as the site of a merged update states them.",
    buckets=SECONDS,
)  # fmt: skip
JOBS_OPEN = Metric("fedqueue_jobs_open", "gauge", "Jobs that are dispatched and whose update has not arrived.")
BUFFERED = Metric("fedqueue_buffered_updates", "gauge", "Updates that wait for the next version.")
CLIENTS_ALIVE = Metric("fedqueue_clients_alive", "gauge", "Clients with a worker.")
CLIENTS_EXPECTED = Metric("fedqueue_clients_expected", "gauge", "Clients in the run's configuration.")
CLIENT_ALIVE = Metric(
    "fedqueue_client_alive", "gauge", "1 if the client has a worker, else 0; absent in runs of more than 100 clients.",
    ("client",),
)  # fmt: skip
KEEPER_AWAITED = Metric(
    "fedqueue_keeper_awaited_seconds",
    "gauge",
    "Seconds for which the run has waited for this keeper; 0 unless it is the one that is awaited for longest.",
    ("keeper",),
)
EVALUATION = Metric("fedqueue_evaluation", "gauge", "Newest value of a metric of the central evaluation.", ("metric",))
EVALUATIONS_FAILED = Metric("fedqueue_evaluations_failed_total", "counter", "Central evaluations that failed.")
REDIS_OUTAGES = Metric(
    "fedqueue_redis_outages_total", "counter", "Times that an error of Redis made the coordinator resume the run."
)
REDIS_USED = Metric("fedqueue_redis_memory_used_bytes", "gauge", "Memory that Redis uses.")
REDIS_LIMIT = Metric("fedqueue_redis_memory_limit_bytes", "gauge", "maxmemory of Redis; 0 without a limit.")

WORKER_JOBS = Metric(
    "fedqueue_worker_jobs_total",
    "counter",
    "Attempts by how they ended: posted, late (the post was refused), failed, refused (by this site), closed (during "
    "the training), handed_back, not_begun.",
    ("client", "ending"),
)
WORKER_TRAINING = Metric(
    "fedqueue_worker_training_seconds", "histogram", "Seconds of one training.", ("client",), SECONDS
)
WORKER_RECEIVED = Metric(
    "fedqueue_worker_received_bytes_total", "counter", "Bytes of model versions that were downloaded.", ("client",)
)
WORKER_SENT = Metric("fedqueue_worker_sent_bytes_total", "counter", "Bytes of updates that were uploaded.", ("client",))
WORKER_PHASE = Metric(
    "fedqueue_worker_phase",
    "gauge",
    "Worker processes in this phase: idle, fetching, training or sending.",
    ("phase",),
    together="livesum",
)
WORKER_LAST_UPDATE = Metric(
    "fedqueue_worker_last_update_timestamp_seconds",
    "gauge",
    "Unix time at which the client's last update was posted.",
    ("client",),
)

KEEPER_OPENED = Metric("fedqueue_keeper_offers_total", "counter", "Updates that the coordinator has offered.")
KEEPER_REFUSED = Metric(
    "fedqueue_keeper_refusals_total",
    "counter",
    "Offers and cohorts that this keeper has refused; an ask that is repeated counts again.",
    ("ask", "reason"),
)
KEEPER_RELEASED = Metric("fedqueue_keeper_cohorts_released_total", "counter", "Sums of masks that were released.")
KEEPER_LAST_RELEASE = Metric(
    "fedqueue_keeper_last_release_timestamp_seconds", "gauge", "Unix time of the newest release of a sum of masks."
)

COORDINATOR = (
    RUN_INFO, VERSION, SECONDS_SINCE_VERSION, UPDATES_MERGED, REJECTED, ABANDONED, DISPATCHED, STALENESS, UPDATE_NORM,
    UPDATE_BYTES, TRAINING_SECONDS, JOBS_OPEN, BUFFERED, CLIENTS_ALIVE, CLIENTS_EXPECTED, CLIENT_ALIVE, KEEPER_AWAITED,
    EVALUATION, EVALUATIONS_FAILED, REDIS_OUTAGES, REDIS_USED, REDIS_LIMIT,
)  # fmt: skip
WORKER = (WORKER_JOBS, WORKER_TRAINING, WORKER_RECEIVED, WORKER_SENT, WORKER_PHASE, WORKER_LAST_UPDATE)
KEEPER = (KEEPER_OPENED, KEEPER_REFUSED, KEEPER_RELEASED, KEEPER_LAST_RELEASE)

"""Reasons that the ledger names, and the states of a job. The values are part of the protocol (PROTOCOL.md)."""

from __future__ import annotations

from enum import StrEnum


class RejectionReason(StrEnum):
    """Why an update is not merged."""

    MALFORMED = "malformed"
    """The header is not one of this protocol, or the payload is not a frame."""
    UNKNOWN_JOB = "unknown_job"
    """No job of this name and client is open."""
    WRONG_BASE = "wrong_base"
    """The job cannot have trained from this base version."""
    WRONG_ENCODING = "wrong_encoding"
    """The encoding is not the one of the run's `[compression]`."""
    WRONG_SIZE = "wrong_size"
    """The payload is not one frame of the run's manifest."""
    NO_EXAMPLES = "no_examples"
    """The update states that it was trained on 0 examples."""
    TOO_MANY_EXAMPLES = "too_many_examples"
    """The update states more examples than its client registered."""
    LATE = "late"
    """The round was closed before the update arrived."""
    STALE = "stale"
    """The staleness is above `aggregation.max_staleness`."""
    NON_FINITE = "non_finite"
    """The payload contains NaN or infinity."""
    UNREADABLE = "unreadable"
    """The payload, or a part of it, is not in the store."""
    TOO_LARGE = "too_large"
    """The delta's norm is above the limit of `[admission]`."""
    OUTLIER_NORM = "norm"
    """The delta's norm is above `aggregation.filter.norm_factor` times the median of the last merged ones."""
    OUTLIER_DIRECTION = "direction"
    """The delta's cosine with the mean direction is below `aggregation.filter.min_cosine`."""
    FORGED = "forged"
    """The signature is missing or invalid."""
    FOREIGN = "foreign"
    """The client is not enrolled, or was revoked."""
    SUPERSEDED = "superseded"
    """The message is from a worker process that another one of the same client has replaced."""
    TAMPERED = "tampered"
    """The payload is not the one that was signed."""
    UNMASKABLE = "unmaskable"
    """A keeper cannot open the seed of its mask."""
    KEEPER_LOST = "keeper_lost"
    """A keeper has lost the key that the seed of its mask is encrypted to."""
    SPENT = "spent"
    """A keeper has released its mask in another cohort, which Redis has lost."""
    BUDGET = "budget"
    """Its client has used up the budget of `[privacy.clients]`."""
    COHORT_NORM = "cohort_norm"
    """The unmasked sum of its cohort is longer than sums of clipped updates are: a client or a keeper was not honest,
    and nothing tells which."""
    RUN_ENDED = "run_ended"
    """The run ended before the update could be part of a version."""


NO_FAULT = frozenset(
    {
        RejectionReason.STALE,
        RejectionReason.LATE,
        RejectionReason.KEEPER_LOST,
        RejectionReason.SPENT,
        RejectionReason.BUDGET,
        RejectionReason.COHORT_NORM,
        RejectionReason.RUN_ENDED,
    }
)
"""Reasons without a penalty: a client that is slow, or without blame, gets its next job at once."""
FORGEABLE = frozenset({RejectionReason.FORGED, RejectionReason.FOREIGN, RejectionReason.TAMPERED})
"""Faults that any Redis writer could forge; they cause a pause, not an exclusion."""
OUTLIER = frozenset({RejectionReason.OUTLIER_NORM, RejectionReason.OUTLIER_DIRECTION})
"""Rejections by the outlier filter, which has strikes and a quarantine of its own."""


class AbandonReason(StrEnum):
    """Why a job ended without an update."""

    LAPSED = "lapsed"
    """Its lease expired; LapseCause says why."""
    RETURNED = "returned"
    """Its worker handed it back, or left before it began the job."""
    LATE = "late"
    """Its round was closed."""
    FAILED = "failed"
    """The task raised an exception."""
    REFUSED = "refused"
    """The site's policy does not allow it."""
    FORGED = "forged"
    """The signature of the job's ending is missing or invalid."""
    FOREIGN = "foreign"
    """The client of the job's ending is not enrolled, or was revoked."""
    SUPERSEDED = "superseded"
    """The job's ending is from a worker process that another one of the same client has replaced."""
    RUN_ENDED = "run_ended"
    """The run ended while the job was open."""
    EPOCH_LOST = "epoch_lost"
    """Redis lost the run, and a new epoch began without the job."""


class LapseCause(StrEnum):
    """Why the lease of a job expired."""

    PROCESS_DIED = "process_died"
    """No heartbeat came: the worker process died, or its line was away for longer than the lease."""
    NO_PROGRESS = "no_progress"
    """Heartbeats came, and said that training made no progress for `dispatch.stall_seconds`."""
    SLOW_TRANSFER = "slow_transfer"
    """Heartbeats came, and said that a transfer moved no bytes for `dispatch.stall_seconds`."""
    NOT_BEGUN = "not_begun"
    """A living worker never began the job: the job was lost on its way."""


WORKER_FAULT = frozenset({AbandonReason.FAILED, AbandonReason.REFUSED})
"""Endings that a worker states and that count towards setting its client aside."""


FORGEABLE_ENDINGS = frozenset({AbandonReason.FORGED, AbandonReason.FOREIGN})
"""Endings that any Redis writer could forge; they cause a pause, not an exclusion."""


class JobState(StrEnum):
    """State of a job that the ledger does not contain yet."""

    OPEN = "open"
    """Dispatched: in its client's queue, or being trained."""
    POSTED = "posted"
    """Its update or its ending waits in the client's stream."""

"""What a job that ends without a merge means for its client: nothing, a rest, or one step towards being set aside."""

from __future__ import annotations

from fedqueue_coordinator.core.admission import NO_FAULT, NOT_ITS_OWN
from fedqueue_coordinator.core.dispatch import Backoff
from fedqueue_coordinator.core.outlier_filter import REASONS, OutlierFilter


def penalize_rejection(backoff: Backoff, outliers: OutlierFilter, client: str, reason: str, now: float) -> str:
    """Count a rejected update; returns what the record of it is to say beyond its detail."""
    if reason in REASONS:
        if seconds := outliers.strike(client):
            backoff.rest(client, now + seconds)
            return f"; quarantined for {seconds:g} s"
    elif reason in NOT_ITS_OWN:
        backoff.pause(client, now)
    elif reason not in NO_FAULT:
        backoff.rejected(client, now)
    return ""


def penalize_ending(backoff: Backoff, client: str, reason: str, now: float) -> None:
    """Count a job that its worker ended."""
    if reason in ("failed", "refused"):
        backoff.failed(client, now)
    elif reason in NOT_ITS_OWN:
        backoff.pause(client, now)

"""Says why the lease of a job expired, from what its worker last reported."""

from __future__ import annotations

from dataclasses import dataclass

from fedqueue.config.dispatch import DispatchConfig
from fedqueue.protocol.phase import Phase
from fedqueue_coordinator.core.reasons import LapseCause

DOING = {
    Phase.FETCHING: "it downloaded the model",
    Phase.TRAINING: "it trained",
    Phase.SENDING: "it uploaded its update",
}


@dataclass(frozen=True)
class LastReport:
    """What the store knows about a job whose lease has ended, as the job's worker last reported it."""

    begun: bool
    """A worker has claimed the job."""
    alive: bool
    """The worker that held the job still sends heartbeats."""
    stalled: bool
    """Its last heartbeat reported no progress."""
    phase: Phase | None
    """What the attempt did; None if no valid phase was reported."""


def lapse_cause(report: LastReport, dispatch: DispatchConfig) -> tuple[LapseCause, str]:
    """Return the cause, and a sentence that says what was seen and what to check."""
    doing = DOING[report.phase] if report.phase else "it held the job"
    if not report.alive:
        when = f"while {doing}" if report.begun else "before it began the job"
        return LapseCause.PROCESS_DIED, f"its worker's heartbeats ended {when}: its process died, or its line is away"
    if not report.begun:
        return LapseCause.NOT_BEGUN, "its worker is alive and never began it: the job was lost on its way"
    if not report.stalled:
        return LapseCause.PROCESS_DIED, f"its worker stopped to renew it while {doing}, and reported no ending"
    for_seconds = f"for dispatch.stall_seconds = {dispatch.stall_seconds:g}"
    if report.phase is Phase.TRAINING:
        why = f"its worker is alive, but no batch ended {for_seconds}: check data loader, device, progress() calls"
        return LapseCause.NO_PROGRESS, why
    why = f"its worker is alive, but while {doing} no byte moved {for_seconds}: check its line"
    return LapseCause.SLOW_TRANSFER, why

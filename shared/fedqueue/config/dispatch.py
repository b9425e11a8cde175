"""The section `[dispatch]`: which client trains when, and for how long the coordinator waits for it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedqueue.config.sections import AUTO, OFF, Count, Positive, Section, refuse


class FedCompassConfig(Section):
    """With `dispatch.schedule = "fedcompass"`: bounds for the local steps of a job, which the scheduler chooses so that
    the clients of a group finish together."""

    min_steps: Count = 20
    """Fewest local steps of a job; also the steps of a client's first job, which measures its speed."""
    max_steps: Count = 100
    """Most local steps of a job."""
    latest_factor: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.5
    """λ: a group waits for its members until this multiple of its expected duration has passed."""
    speed_momentum: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Weight of a job's measured speed in the client's speed estimate; the earlier estimate has the rest."""

    @model_validator(mode="after")
    def _ordered(self) -> FedCompassConfig:
        if self.max_steps < self.min_steps:
            raise refuse(
                f"max_steps is {self.max_steps}, below min_steps, {self.min_steps}",
                "raise max_steps or lower min_steps",
            )
        return self


class DispatchConfig(Section):
    """Which client trains when, and for how long the coordinator waits for it."""

    concurrency: Annotated[Count | None, AUTO] = None
    """Open jobs at a time; `auto`: one for each client. Ignored behind a barrier."""
    selection: str = "uniform"
    """Chooses the next client: `uniform`, `round_robin`, `stalest` (oldest last contribution) or `examples` (with
    probability in proportion to its number of examples)."""
    max_share: Annotated[Annotated[float, Field(gt=0, lt=1)] | None, OFF] = None
    """Cap on one client's fraction of the updates in the last `share_window` versions; `off`: no cap."""
    share_window: Count = 20
    """Number of versions in which shares are counted (W)."""
    over_selection: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    """Behind a barrier: selects this multiple of the cohort, and closes the round when a whole cohort is merged."""
    round_deadline_seconds: Annotated[Positive | None, OFF] = None
    """Behind a barrier: closes the round after this time with the updates that arrived; `off`: waits for all."""
    schedule: Literal["async", "fedcompass"] = "async"
    """`async`: a client gets its next job at once; `fedcompass`: clients finish in groups, with local steps by speed
    (arXiv 2309.14675), not with `fedasync` or a barrier."""
    lease_seconds: Positive = 10.0
    """Abandons a job whose worker has sent no heartbeat for this time, except in a long transfer."""
    stall_seconds: Positive = 120.0
    """Abandons a job that has finished no batch, or moved no byte of a transfer, for this time; the line of a site may
    break for as long during a transfer."""
    max_client_failures: Count = 5
    """Excludes a client whose task has raised, or made no progress, this many times in a row."""
    backoff_seconds: Positive = 1.0
    """Pause of a client whose task raised; each further failure in a row doubles the pause."""
    leader_lease_seconds: Positive = 5.0
    """A coordinator that has not renewed its lease for this time is replaced by another one."""
    fedcompass: FedCompassConfig = FedCompassConfig()

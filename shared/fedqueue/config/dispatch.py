"""The settings of who trains when: slots, leases, selections, shares, deadlines and groups."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedqueue.config.sections import Count, NonNegative, Positive, Section


class FedCompassConfig(Section):
    """With `schedule = "compass"`: how many local steps a client may get, so that groups arrive together."""

    min_steps: Count = 20
    """Also those of a client's first job, which shows its speed."""
    max_steps: Count = 100
    latest_factor: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.5
    """λ: a group waits for its members until this many times its expected duration is over."""
    speed_momentum: Annotated[float, Field(gt=0, le=1)] = 0.9
    """How much a job's measured speed counts against what was known before."""

    @model_validator(mode="after")
    def _ordered(self) -> FedCompassConfig:
        if self.max_steps < self.min_steps:
            raise ValueError(f"max_steps is {self.max_steps}, which is below min_steps, {self.min_steps}")
        return self


class DispatchConfig(Section):
    concurrency: int = Field(default=0, ge=0)
    """How many jobs are open at once; 0: one for each client."""
    selection: str = "uniform"
    """Who trains next: `uniform`, `round_robin`, `stalest` (oldest last contribution), `examples` (in proportion)."""
    max_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """At most this share of the updates in the last `share_window` versions is one client's; 1: no cap."""
    share_window: Count = 20
    """Over how many versions shares are counted (W)."""
    over_selection: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    """Behind a barrier: ask so many times the cohort, and close the round when a cohort's worth is merged."""
    deadline_seconds: NonNegative = 0.0
    """Behind a barrier: close the round after so long with those that came; 0: never."""
    schedule: Literal["free", "compass"] = "free"
    """`free`: train on at once; `compass`: wait for a group, with steps by speed (arXiv 2309.14675); no `fedasync`."""
    lease_seconds: Positive = 10.0
    """A job whose worker is not heard of for so long is abandoned."""
    stall_seconds: Positive = 120.0
    """A job that makes no progress (no batch done) for so long is abandoned."""
    max_client_failures: Count = 5
    """A client whose task raised so many times in a row is set aside."""
    backoff_seconds: Positive = 1.0
    """A client whose task raised rests so long, twice as long after each further failure."""
    leader_seconds: Positive = 5.0
    """A coordinator that is not heard of for so long loses the lead."""
    compass: FedCompassConfig = FedCompassConfig()

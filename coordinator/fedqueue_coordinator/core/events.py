"""What happens to a federation (events), and what it wants done (actions). Plain data on both sides.

Times are seconds of the run's own clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedqueue.protocol.messages import Update
from fedqueue.tensors.frame import Delta, Frame

# Events


@dataclass(frozen=True)
class ClientJoined:
    client: str
    examples: int


@dataclass(frozen=True)
class ClientLeft:
    """It said so, or its aliveness ran out.

    `keeps_job`: its job ends as its own lease does, because the worker fell silent, or another one serves it now.
    """

    client: str
    keeps_job: bool = False


@dataclass(frozen=True)
class UpdateArrived:
    """The header of an update: its payload is not read yet."""

    entry: str
    job: str
    attempt: int
    client: str
    base: int
    body: bytes
    distrust: tuple[str, str] | None = None
    """Reason and detail, where it is not what its client signed."""


@dataclass(frozen=True)
class UpdateLoaded:
    """The payload that `Load` asked for; `base` is the base version's frame where it was asked for."""

    load: Load
    frame: Delta
    base: Frame | None


@dataclass(frozen=True)
class UpdateUnreadable:
    load: Load
    detail: str
    reason: str


@dataclass(frozen=True)
class JobEnded:
    """A worker handed the job back or refused it, its task raised, or the entry is not what its client signed."""

    entry: str
    job: str
    client: str
    reason: str
    error: str


@dataclass(frozen=True)
class JobLapsed:
    """The lease is over and the job is closed: a fact, nothing is left to do but to go on."""

    job: str
    client: str


@dataclass(frozen=True)
class JobStays:
    """The job was to be taken back for that reason, but its update was posted before: it will arrive."""

    job: str
    client: str
    reason: str = "returned"


@dataclass(frozen=True)
class Evaluated:
    version: int
    metrics: Mapping[str, float]
    error: str = ""
    """Type and message of the exception where the task's evaluation raised."""


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


Event = (
    ClientJoined | ClientLeft | UpdateArrived | UpdateLoaded | UpdateUnreadable | JobEnded | JobLapsed
    | JobStays | Evaluated | Tick
)  # fmt: skip

# Actions


@dataclass(frozen=True)
class Dispatch:
    """Open job number `number` for the client: `steps` batches of local training, or as configured where it is 0."""

    job: str
    number: int
    client: str
    steps: int = 0


@dataclass(frozen=True)
class Load:
    """Read the update's payload, and its base version where the aggregation needs it."""

    arrived: UpdateArrived
    header: Update
    with_base: bool


@dataclass(frozen=True)
class Commit:
    """`Federation.model` is version `version` now: write it down with its ledger record."""

    version: int
    merged: tuple[UpdateArrived, ...]
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Close:
    """End a job that is not merged; `entry` is the stream entry to acknowledge."""

    job: str
    entry: str
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Acknowledge:
    """Acknowledge an entry that ends no job, with a ledger record where there is one."""

    entry: str
    record: Mapping[str, Any] | None


@dataclass(frozen=True)
class Evaluate:
    """Measure `Federation.model`, which is version `version`, beside the merging."""

    version: int


@dataclass(frozen=True)
class Stop:
    because: str
    failed: bool = False


Action = Dispatch | Load | Commit | Close | Acknowledge | Evaluate | Stop

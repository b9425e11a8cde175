"""Events (what happened to a federation) and actions (what its caller must do). Both are plain data.

Times are seconds of the run's own clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fedqueue.config.schema import Config
from fedqueue.protocol.messages import Cohort, Order, Update
from fedqueue.protocol.messages import Offer as OfferMessage
from fedqueue.protocol.stream_entry import StreamEntry
from fedqueue.tensors.frame import Delta, Frame
from fedqueue_coordinator.core.reasons import AbandonReason, LapseCause, RejectionReason

# Events


@dataclass(frozen=True)
class ClientJoined:
    """A worker registered the client, with its number of examples."""

    client: str
    examples: int | None
    """None for a stream, whose examples are counted in training."""


@dataclass(frozen=True)
class ClientLeft:
    """The client has no worker any more, or another one than the worker that reports this."""

    client: str
    announced: bool = True
    """The worker said that it leaves. Else its lease expired, or the client was revoked."""
    served: bool = False
    """Another worker serves the client already."""


@dataclass(frozen=True)
class ClientUnavailable:
    """A worker reported that it cannot load the client's data, and serves the client no longer."""

    entry: str
    client: str
    error: str
    served: bool = False
    """Another worker serves the client already."""


@dataclass(frozen=True)
class UpdateArrived:
    """The header of an update was read from its client's stream; the payload is still in the store."""

    entry: StreamEntry
    body: bytes
    """The header as the client packed it: the body of `entry` without its signature."""
    distrust: tuple[RejectionReason, str] | None = None
    """Reason and detail if the signature is invalid."""

    @property
    def job(self) -> str:
        """Name of the job, as the entry states it."""
        return self.entry.job

    @property
    def attempt(self) -> int:
        """Number of the attempt, from 1."""
        return self.entry.attempt

    @property
    def client(self) -> str:
        """The client in whose stream the entry is."""
        return self.entry.client

    @property
    def base(self) -> int:
        """The version that the job trained from; −1 if the entry states no number."""
        return self.entry.base


class MaskedVector(Protocol):
    """A vector of integers modulo 2³², uint32 [`Ring.words`]: a masked update, or a sum of masks."""

    def pieces(self) -> Iterable[npt.NDArray[np.uint32]]:
        """Yield consecutive pieces, which together are the whole vector; each is valid until the next one."""
        ...


@dataclass(frozen=True)
class WholeWords:
    """A masked vector in memory: uint32 [`Ring.words`]."""

    words: npt.NDArray[np.uint32]
    rest: npt.NDArray[np.uint32] = field(default_factory=lambda: np.empty(0, np.uint32))
    """The last words, where they lie elsewhere."""

    def pieces(self) -> Iterable[npt.NDArray[np.uint32]]:
        """As `MaskedVector.pieces`."""
        return (self.words, self.rest)


@dataclass(frozen=True)
class UpdateLoaded:
    """The payload that `Load` asked for was read."""

    load: Load
    delta: Delta
    base: Frame | None
    """The frame of the base version, if `load.with_base`."""


@dataclass(frozen=True)
class MaskedUpdateLoaded:
    """The masked payload that `Load` asked for was read."""

    load: Load
    masked: MaskedVector


@dataclass(frozen=True)
class UpdateUnreadable:
    """The payload that `Load` asked for cannot be read, or is not the one that was signed."""

    load: Load
    reason: RejectionReason
    detail: str


@dataclass(frozen=True)
class KeepersAbsent:
    """These keepers have stored no encryption key for this run instance, so that no client can mask an update."""

    keepers: frozenset[str]


@dataclass(frozen=True)
class UpdateOpened:
    """A keeper has answered an `Offer`: it can take the update's mask off, or says why it never will."""

    keeper: str
    offer: str
    """Digest of the offer."""
    refusal: str = ""
    """As `Opened.refusal`."""
    detail: str = ""


@dataclass(frozen=True)
class MasksReleased:
    """A keeper has released the weighted sum of the masks of the cohort that `Unmask` has shown to it."""

    keeper: str
    cohort: str
    """The cohort's id."""
    masks: MaskedVector
    sealed: Mapping[str, Any]
    """What the ledger keeps of the keeper's answer: `digest` of the sum, and the signed `answer`."""


@dataclass(frozen=True)
class CohortRefused:
    """A keeper releases no masks for the cohort that `Unmask` has shown to it."""

    keeper: str
    reason: str
    """As `MaskRefused.reason`."""
    detail: str
    offers: frozenset[str] = frozenset()
    """Digests of the members that the refusal is about; empty if it is about the whole cohort."""


@dataclass(frozen=True)
class InvalidEntry:
    """A stream entry is no valid message. No job ends with it."""

    entry: StreamEntry
    reason: RejectionReason
    detail: str


@dataclass(frozen=True)
class JobEnded:
    """A worker reported the end of its job without an update, or that report has an invalid signature."""

    entry: str
    job: str
    client: str
    reason: AbandonReason
    error: str
    final: bool = False
    """Whether the client's site will refuse every further job of the run."""


@dataclass(frozen=True)
class LeaseExpired:
    """The lease of a job is over; the store has not closed the job yet."""

    job: str
    cause: LapseCause
    detail: str = ""
    """The cause, and a sentence about it, for the ledger."""


@dataclass(frozen=True)
class JobLapsed:
    """The lease expired and the store has closed the job."""

    job: str
    client: str
    cause: LapseCause
    detail: str = ""
    """As the ledger has it."""


@dataclass(frozen=True)
class JobStays:
    """A job could not be taken back for `reason`, because its update is already posted and will arrive."""

    job: str
    client: str
    reason: AbandonReason = AbandonReason.RETURNED


@dataclass(frozen=True)
class Evaluated:
    """A central evaluation has finished."""

    version: int
    metrics: Mapping[str, float]
    error: str = ""
    """Type and message of the exception that the task's evaluation raised."""


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


Event = (
    ClientJoined | ClientLeft | ClientUnavailable | UpdateArrived | UpdateLoaded | UpdateUnreadable
    | KeepersAbsent | UpdateOpened | MaskedUpdateLoaded | MasksReleased | CohortRefused
    | InvalidEntry | JobEnded | LeaseExpired | JobLapsed | JobStays | Evaluated | Tick
)  # fmt: skip

# Actions


@dataclass(frozen=True)
class Dispatch:
    """Open job number `number` for the client."""

    job: str
    number: int
    client: str
    steps: int = 0
    """Batches of local training; 0: as configured."""


@dataclass(frozen=True)
class Offer:
    """Show the header of a masked update to every keeper; each answers by an `UpdateOpened`, in its own time."""

    arrived: UpdateArrived
    offer: OfferMessage


@dataclass(frozen=True)
class Unmask:
    """Ask every keeper for the masks of this cohort, and record what its clients spend before a keeper can see it.

    Each answers by `MasksReleased` or `CohortRefused`, in its own time.
    """

    cohort: Cohort
    record: Mapping[str, Any] | None = None
    """What its clients spend; None if nothing is charged, or was when a former coordinator proposed the cohort."""


@dataclass(frozen=True)
class Load:
    """Read the update's payload, and its base version if `with_base`; the next event is its outcome."""

    arrived: UpdateArrived
    header: Update
    with_base: bool


@dataclass(frozen=True)
class Commit:
    """`Federation.model` is now version `version`: store it with its ledger record."""

    version: int
    merged: tuple[UpdateArrived, ...]
    record: Mapping[str, Any]
    publish_now: bool = False
    """The jobs that are dispatched next must train from this version (a barrier). Else it may wait for later ones."""


class CloseCondition(StrEnum):
    """Which jobs a `Close` may end, as the store finds them."""

    ANY = "any"
    LAPSED = "lapsed"
    """Only if the lease has not been renewed. The outcome is `JobLapsed`, or no event."""
    UNPOSTED = "unposted"
    """Only if no update is posted. The outcome is `JobStays` if one is."""


@dataclass(frozen=True)
class Close:
    """End a job that is not merged."""

    job: str
    entry: str
    """ID of the stream entry to acknowledge with it, or an empty string."""
    record: Mapping[str, Any]
    only_if: CloseCondition = CloseCondition.ANY
    lapse_cause: LapseCause | None = None
    """With CloseCondition.LAPSED: the cause."""


@dataclass(frozen=True)
class Acknowledge:
    """Acknowledge a stream entry that ends no job, and append its ledger record if it has one."""

    entry: str
    record: Mapping[str, Any] | None


@dataclass(frozen=True)
class Evaluate:
    """Evaluate `Federation.model`, which is version `version`, while merging continues."""

    version: int


@dataclass(frozen=True)
class Stop:
    """The run has ended."""

    because: str
    failed: bool = False
    version: int | None = None
    """The version that reached the target; None if the run stops for another reason."""
    resumable: bool = False
    """The run failed for a reason outside of it, and may be resumed."""


Action = Dispatch | Offer | Load | Unmask | Commit | Close | Acknowledge | Evaluate | Stop


def order_seed(config: Config, number: int) -> int:
    """Return the seed of the job with this number. It differs from job to job and from run to run."""
    return (config.seed * 1_000_003 + number) % 2**53


def make_order(config: Config, dispatch: Dispatch) -> Order:
    """Make the order that the client's worker gets."""
    steps = {"local_steps": dispatch.steps} if dispatch.steps else {}
    return Order(
        run=config.name,
        job=dispatch.job,
        client=dispatch.client,
        seed=order_seed(config, dispatch.number),
        training=config.training.model_copy(update=steps),
        privacy=config.example_privacy,
    )

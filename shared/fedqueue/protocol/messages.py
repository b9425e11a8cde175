"""Every message that crosses Redis, typed and bounded: msgpack in transit, pydantic after validation.

A message has at most `MAX_MESSAGE` bytes. Tensors are stored separately, in chunks (`blob_store.py`).
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedqueue.config.names import ClientId, KeeperName, RunName
from fedqueue.config.privacy import ExamplePrivacyConfig
from fedqueue.config.secure import MAX_KEEPERS, MAX_MEMBERS
from fedqueue.config.training import TrainingConfig
from fedqueue.errors import WireError
from fedqueue.protocol.msgpack import pack, unpack

MAX_METRICS = 64
MAX_METRIC_NAME = 64  # characters
MAX_OPENED = 64  # offers in one answer of a keeper
MAX_OFFER_DETAIL = 200  # characters; MAX_OPENED of them fit into a message
MAX_PIECES, PIECE_BYTES = 64, 48 * 1024  # of a site's answer to a question
NO_EXAMPLES = "no examples"
"""The error of an `Unavailable` client that takes no part, because it has nothing to train on."""
SITE_POLICY = "this site's policy: "
"""How the error of an `Unavailable` begins where the policy of the site does not let the client take part."""

Metrics = Annotated[
    dict[Annotated[str, Field(max_length=MAX_METRIC_NAME)], float],
    Field(max_length=MAX_METRICS),
]
Natural = Annotated[int, Field(ge=0, lt=2**53)]  # Lua and JSON represent these exactly
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
EncodingName = Annotated[str, Field(pattern=r"^(float32|float16|bfloat16|int8|topk|randomk|ring32)(\+zstd)?$")]
JobId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,100}$")]
Traceparent = Annotated[str, Field(pattern=r"^(00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2})?$")]
"""A span of OpenTelemetry, as the W3C's Trace Context writes it; empty for none."""


class Message(BaseModel):
    """The base of all messages: frozen, strict about types, and without unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True)

    def pack(self) -> bytes:
        """The message as msgpack; raises WireError for more than MAX_MESSAGE bytes."""
        return pack(self.model_dump())


class Order(Message):
    """A training job: identifiers and settings, without tensors and without code."""

    run: RunName
    job: JobId
    client: ClientId
    seed: Natural
    training: TrainingConfig
    privacy: ExamplePrivacyConfig | None = None
    """[privacy.examples]; None where it is off."""
    traceparent: Traceparent = ""
    """The coordinator's span of the dispatch, of which the worker's spans are children."""


class HistogramRange(Message):
    """Where the histogram of a column is asked for: `bins` equal bins from `low` to `high`."""

    low: Annotated[float, Field(allow_inf_nan=False)]
    high: Annotated[float, Field(allow_inf_nan=False)]
    bins: Annotated[int, Field(ge=1, le=1024)]
    public: bool = False
    """Whether `low` and `high` are public bounds, which the configuration names."""


class Question(Message):
    """What `fedqueue describe` asks of each site before a run begins."""

    run: RunName
    instance: Annotated[str, Field(min_length=16, max_length=64)]
    """Random, and new for each description: answers are signed for it."""
    part: Literal[1, 2]
    """1: counts, sums and ranges. 2: histograms of the columns in `ranges`."""
    min_count: Annotated[int, Field(ge=1, lt=2**53)]
    ranges: Annotated[dict[Annotated[str, Field(max_length=64)], HistogramRange], Field(max_length=256)] = {}


class AnswerPiece(Message):
    """A piece of a site's answer to a `Question`: the pieces' bodies together are JSON, or `refusal` says why not."""

    client: ClientId
    part: Literal[1, 2]
    piece: Annotated[int, Field(ge=0, lt=MAX_PIECES)]
    pieces: Annotated[int, Field(ge=1, le=MAX_PIECES)]
    body: Annotated[bytes, Field(max_length=PIECE_BYTES)] = b""
    refusal: Annotated[str, Field(max_length=2000)] = ""


class Registration(Message):
    """A worker's statement that it serves a client, and how many examples the client has."""

    client: ClientId
    examples: Natural | None
    """None for a stream without a length, whose examples are counted in training; 0 where their number is hidden."""


class Unavailable(Message):
    """A worker's statement that it leaves a client out: its data cannot be loaded, or the site's policy forbids it."""

    client: ClientId
    error: Annotated[str, Field(max_length=4000)]
    """As that of an `Ending`; NO_EXAMPLES for a client whose data has no examples, SITE_POLICY and why for a policy."""


class Update(Message):
    """The header of an update; its payload is a frame in this encoding, of `nbytes` bytes in `chunks` chunks."""

    examples: Natural
    encoding: EncodingName = "float32"
    nbytes: Natural
    chunks: Annotated[int, Field(ge=0, le=2**20)]
    metrics: Metrics = {}
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """Training time on the client."""
    digest: Digest | Literal[""] = ""
    """SHA-256 of the payload; empty in an unsigned run."""
    traceparent: Traceparent = ""
    """The worker's span of the job; that of the order where the worker makes none."""


class SealedSeed(Message):
    """The seed of one mask of an update, encrypted to the keeper that holds this component."""

    component: Annotated[int, Field(ge=0, lt=MAX_KEEPERS)]
    keeper: KeeperName
    key: Annotated[str, Field(max_length=16)]
    """The id of the keeper's encryption key that the seed is encrypted to."""
    sealed: Annotated[bytes, Field(max_length=2048)]


class MaskedUpdate(Update):
    """The header of an update in a run with keepers: its payload is masked, and the keepers can take the masks off."""

    model: Digest
    """The digest of the encoded base version that the update was trained from."""
    seeds: Annotated[tuple[SealedSeed, ...], Field(min_length=1, max_length=MAX_KEEPERS, strict=False)]
    """One seed for each component, in their order."""


class KeeperKey(Message):
    """A keeper's statement of the public key that seeds of its component are encrypted to in this run instance."""

    public: Annotated[bytes, Field(max_length=2048)]
    component: Annotated[int, Field(ge=0, lt=MAX_KEEPERS)]


class Offer(Message):
    """The header of an update as its client signed it, for the keepers."""

    client: ClientId
    job: JobId
    attempt: Natural
    base: Natural
    header: Annotated[bytes, Field(max_length=48 * 1024)]
    """The signed envelope of the client's `MaskedUpdate`."""


class OpenedOffer(Message):
    """A keeper's answer to an `Offer`: it can take the mask off, or `refusal` says why it never will."""

    header: Digest
    """The digest of the offer (`secure/cohort.py`)."""
    refusal: Literal["", "unmaskable", "keeper_lost", "foreign", "model", "spent"] = ""
    detail: Annotated[str, Field(max_length=MAX_OFFER_DETAIL)] = ""


class Opened(Message):
    """A keeper's answers to the offers that it has read together, under one signature."""

    offers: Annotated[tuple[OpenedOffer, ...], Field(min_length=1, max_length=MAX_OPENED, strict=False)]


class Cohort(Message):
    """The coordinator's statement of the updates whose weighted sum makes a version."""

    version: Natural
    """The version that the updates are merged into: an update's staleness is this number minus its base."""
    members: Annotated[
        tuple[Annotated[tuple[Digest, Annotated[int, Field(ge=1, le=255)]], Field(strict=False)], ...],
        Field(min_length=1, max_length=MAX_MEMBERS, strict=False),
    ]
    """The digest of each member's offer, with its integer weight."""


class Masked(Message):
    """A keeper's answer to a `Cohort`: the weighted sum of the members' masks is stored, in `chunks` chunks."""

    cohort: Digest
    """The cohort's id (`secure/cohort.py`)."""
    digest: Digest
    nbytes: Natural
    chunks: Annotated[int, Field(ge=0, le=2**20)]


class MaskRefused(Message):
    """A keeper's refusal of a `Cohort`; another cohort may be proposed without the members that `headers` names."""

    cohort: Digest
    """The cohort's id (`secure/cohort.py`)."""
    reason: Literal["version", "unknown", "weight", "crowd", "model", "spent", "budget", "size"]
    detail: Annotated[str, Field(max_length=500)] = ""
    headers: Annotated[tuple[Digest, ...], Field(max_length=MAX_MEMBERS, strict=False)] = ()


class Ending(Message):
    """The end of a job without an update: handed back, refused by the site's policy, or failed in the task's code."""

    reason: Literal["returned", "failed", "refused"]
    error: Annotated[str, Field(max_length=4000)] = ""
    """Type, message and last frames of the exception, or what the policy forbids; never data."""
    final: bool = False
    """Whether the site will refuse every further job of the run, because a privacy budget of the client is used up."""


class Evaluation(Message):
    """The result of an evaluation by the coordinator, which writes it to its own stream."""

    version: Natural
    metrics: Metrics
    error: Annotated[str, Field(max_length=4000)] = ""


M = TypeVar("M", bound=Message)


def read(kind: type[M], data: bytes) -> M:
    """The message of type `kind` in `data`; raises WireError, which names the first invalid field."""
    value = unpack(data)
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, problem["loc"])) or "message"
        raise WireError(f"{kind.__name__}: {field}: {problem['msg']}") from None

"""Every message that crosses Redis, typed and bounded: msgpack in transit, pydantic after validation.

A message has at most `MAX_MESSAGE` bytes. Tensors are stored separately, in chunks (`blob_store.py`).
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedqueue.config.names import ClientId, RunName
from fedqueue.config.training import TrainingConfig
from fedqueue.errors import WireError
from fedqueue.protocol.msgpack import pack, unpack

MAX_METRICS = 64
MAX_METRIC_NAME = 64  # characters
NO_EXAMPLES = "no examples"
SITE_POLICY = "this site's policy: "
"""How the error of an `Unavailable` begins where the policy of the site does not let the client take part."""
"""The error of an `Unavailable` client that takes no part, because it has nothing to train on."""

Metrics = Annotated[
    dict[Annotated[str, Field(max_length=MAX_METRIC_NAME)], float],
    Field(max_length=MAX_METRICS),
]
Natural = Annotated[int, Field(ge=0, lt=2**53)]  # Lua and JSON represent these exactly
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
EncodingName = Annotated[str, Field(pattern=r"^(float32|float16|bfloat16|int8|topk|randomk)(\+zstd)?$")]
JobId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,100}$")]


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


class Registration(Message):
    """A worker's statement that it serves a client, and how many examples the client has."""

    client: ClientId
    examples: Natural | None
    """None for a stream without a length, whose examples are counted in training."""


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


class Ending(Message):
    """The end of a job without an update: handed back, refused by the site's policy, or failed in the task's code."""

    reason: Literal["returned", "failed", "refused"]
    error: Annotated[str, Field(max_length=4000)] = ""
    """Type, message and last frames of the exception, or what the policy forbids; never data."""


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

"""Every message that crosses Redis, typed and bounded; msgpack in, pydantic out, never anything else.

A message is at most `MAX_MESSAGE` bytes; tensors travel apart, in chunks (`store.py`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgpack
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedqueue.config.sections import ClientId, RunName
from fedqueue.config.training import TrainingConfig
from fedqueue.errors import WireError

MAX_MESSAGE = 64 * 1024  # bytes
MAX_RECORD = 16 * 1024 * 1024  # bytes of what only coordinators write: a ledger record, totals, a configuration
MAX_DEPTH = 16  # maps and lists inside each other
MAX_METRICS = 64

Metrics = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[float, Field(allow_inf_nan=False)]],
    Field(max_length=MAX_METRICS),
]
Natural = Annotated[int, Field(ge=0, lt=2**53)]  # what Lua and JSON hold exactly
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
EncodingName = Annotated[str, Field(pattern=r"^(float32|float16|bfloat16|int8|topk|randomk)(\+zstd)?$")]
JobId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,100}$")]


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True)

    def pack(self) -> bytes:
        return pack(self.model_dump())


class Order(Message):
    """A training job: identifiers and settings. It carries no tensors and no code."""

    run: RunName
    job: JobId
    client: ClientId
    seed: Natural
    training: TrainingConfig


class Registration(Message):
    """What a worker says of a client it serves."""

    client: ClientId
    examples: Natural


class Update(Message):
    """The header of an update; its payload is a frame, encoded so, of `nbytes` bytes in `chunks` chunks."""

    examples: Natural
    encoding: EncodingName = "float32"
    nbytes: Natural
    chunks: Annotated[int, Field(ge=0, le=2**20)]
    metrics: Metrics = {}
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """Time the client spent training."""
    digest: Digest | Literal[""] = ""
    """SHA-256 of the payload, where updates are signed."""


class Ending(Message):
    """A job that ends without an update: handed back, refused by the site, or failed with the task's own exception."""

    reason: Literal["returned", "failed", "refused"]
    error: Annotated[str, Field(max_length=4000)] = ""
    """Type, message and last frames of the exception, or what the site does not agree to; never data."""


class Evaluation(Message):
    """A finished central evaluation; the coordinator's own."""

    version: Natural
    metrics: Metrics
    error: Annotated[str, Field(max_length=4000)] = ""


M = TypeVar("M", bound=Message)


def pack(value: Any) -> bytes:
    """msgpack of plain values; raises WireError for what the protocol does not carry or what is too large."""
    try:
        data: bytes = msgpack.packb(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise WireError(f"cannot be sent: {error}") from error
    if len(data) > MAX_MESSAGE:
        raise WireError(f"message of {len(data)} bytes; at most {MAX_MESSAGE} are allowed")
    return data


def unpack(data: bytes, limit: int = MAX_MESSAGE) -> Any:
    """The inverse of `pack`, for at most `limit` bytes, which take at most some 100 times as much memory.

    Extension types, nesting beyond MAX_DEPTH, bad UTF-8 and trailing bytes raise WireError. A length that a header
    claims is held against the bytes that are there before memory is taken for it.
    """
    if len(data) > limit:
        raise WireError(f"message of {len(data)} bytes; at most {limit} are allowed")
    try:
        value = msgpack.unpackb(data, ext_hook=_refuse_extension, timestamp=0)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise WireError(f"not msgpack of this protocol: {type(error).__name__}: {error}") from error
    _require_shallow(value)
    return value


def unpack_record(data: bytes) -> dict[str, Any]:
    """A map that a coordinator wrote, of at most MAX_RECORD bytes; raises WireError for anything else."""
    value = unpack(data, MAX_RECORD)
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise WireError(f"expected a map of names, got {type(value).__name__}")
    return value


def read(kind: type[M], data: bytes) -> M:
    """The message in `data`; raises WireError that names the first field that is wrong."""
    value = unpack(data)
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, problem["loc"])) or "message"
        raise WireError(f"{kind.__name__}: {field}: {problem['msg']}") from None


def _require_shallow(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise WireError(f"nested more than {MAX_DEPTH} levels deep")


def _refuse_extension(code: int, data: bytes) -> Any:
    raise ValueError(f"extension type {code} is not part of the protocol")

"""Messages have bounded fields, and anything outside the protocol is refused."""

from __future__ import annotations

import datetime
from typing import Any

import msgpack
import pytest
from pydantic import ValidationError

from fedqueue.config.training import TrainingConfig
from fedqueue.errors import WireError
from fedqueue.protocol.messages import (
    MAX_METRICS,
    Cohort,
    Ending,
    Evaluation,
    KeeperKey,
    Masked,
    MaskedUpdate,
    MaskRefused,
    Offer,
    Opened,
    Order,
    Registration,
    Update,
    read,
)
from fedqueue.protocol.msgpack import MAX_MESSAGE, pack, unpack

UPDATE = {"examples": 10, "encoding": "float32", "nbytes": 64, "chunks": 1, "metrics": {"loss": 0.5}, "seconds": 1.5}
ORDER = {"run": "r", "job": "r-1", "client": "c", "seed": 3, "training": TrainingConfig().model_dump()}
DIGEST = "ab" * 32
SEED = {"component": 0, "keeper": "k", "key": "0" * 16, "sealed": b"sealed"}
GOOD: dict[Any, dict[str, Any]] = {
    Update: UPDATE,
    Order: ORDER,
    Registration: {"client": "c", "examples": 0},
    Ending: {"reason": "failed", "error": "E: no"},
    Evaluation: {"version": 3, "metrics": {"accuracy": 1.0}, "error": ""},
    MaskedUpdate: {**UPDATE, "encoding": "ring32", "digest": DIGEST, "model": DIGEST, "seeds": [SEED]},
    KeeperKey: {"public": b"public", "component": 2},
    Offer: {"client": "c", "job": "r-1", "attempt": 1, "base": 3, "header": b"header"},
    Opened: {"offers": ({"header": DIGEST, "refusal": "spent", "detail": "d"},)},
    Cohort: {"version": 3, "members": [[DIGEST, 8], ["0" * 64, 1]]},
    Masked: {"cohort": DIGEST, "digest": DIGEST, "nbytes": 64, "chunks": 1},
    MaskRefused: {"cohort": DIGEST, "reason": "weight", "detail": "d", "headers": [DIGEST]},
}


@pytest.mark.parametrize("kind", GOOD)
def test_message_round_trips(kind: type[Any]) -> None:
    message = kind.model_validate(GOOD[kind])
    assert read(kind, message.pack()) == message


@pytest.mark.parametrize("kind", GOOD)
def test_unknown_field_is_refused(kind: type[Any]) -> None:
    with pytest.raises(WireError, match=f"{kind.__name__}: surplus: "):
        read(kind, pack({**GOOD[kind], "surplus": 1}))


@pytest.mark.parametrize("kind", GOOD)
def test_missing_field_is_named(kind: type[Any]) -> None:
    first = next(iter(GOOD[kind]))
    with pytest.raises(WireError, match=f"{kind.__name__}: {first}: Field required"):
        read(kind, pack({k: v for k, v in GOOD[kind].items() if k != first}))


@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize("value", [None, 5, [], "text", [["examples", 1]]])
def test_non_map_value_is_refused(kind: type[Any], value: int | list[Any] | str | None) -> None:
    with pytest.raises(WireError, match=f"^{kind.__name__}: "):
        read(kind, pack(value))


@pytest.mark.parametrize("kind", GOOD)
def test_message_cannot_be_changed(kind: type[Any]) -> None:
    message = kind.model_validate(GOOD[kind])
    with pytest.raises(ValidationError, match="frozen"):
        setattr(message, next(iter(GOOD[kind])), 1)


BAD_UPDATES = [
    ("examples", -1),
    ("examples", 2**53),
    ("examples", "10"),
    ("examples", 10.0),
    ("examples", True),
    ("examples", None),
    ("nbytes", -1),
    ("chunks", 2**20 + 1),
    ("encoding", "pickle"),
    ("encoding", 5),
    ("seconds", -0.1),
    ("seconds", float("nan")),
    ("seconds", float("inf")),
    ("seconds", "1"),
    ("metrics", {"loss": "0.5"}),
    ("metrics", {"loss": [0.5]}),
    ("metrics", {"x" * 65: 0.5}),
    ("metrics", {str(i): 0.0 for i in range(MAX_METRICS + 1)}),
    ("metrics", [["loss", 0.5]]),
    ("metrics", None),
]


def test_metrics_may_be_nan_or_infinite() -> None:
    metrics = {"loss": float("nan"), "gain": float("-inf")}
    again = read(Update, pack({**UPDATE, "metrics": metrics})).metrics
    assert repr(again) == repr(metrics)


@pytest.mark.parametrize(("field", "value"), BAD_UPDATES, ids=[f"{f}={v!r:.20}" for f, v in BAD_UPDATES])
def test_update_out_of_bounds_is_refused_and_its_field_named(field: str, value: Any) -> None:
    with pytest.raises(WireError, match=f"^Update: {field}"):
        read(Update, pack({**UPDATE, field: value}))


def test_values_at_the_bounds_are_accepted() -> None:
    metrics = {f"{i:064}": 0.0 for i in range(MAX_METRICS)}
    update = {**UPDATE, "examples": 2**53 - 1, "chunks": 2**20, "seconds": 0.0, "metrics": metrics}
    assert read(Update, pack(update)).metrics == metrics


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("run", "a:b"),
        ("run", ""),
        ("client", "../x"),
        ("client", "c" * 65),
        ("job", ""),
        ("job", "a/b"),
        ("job", "a" * 101),
        ("job", "a\n"),
        ("seed", -1),
        ("training", {"local_epochs": 0}),
        ("training", {"unknown": 1}),
        ("training", None),
    ],
)
def test_order_with_a_bad_name_or_setting_is_refused(field: str, value: dict[str, Any] | int | str | None) -> None:
    with pytest.raises(WireError, match=f"^Order: {field}"):
        read(Order, pack({**ORDER, field: value}))


def test_order_has_settings_and_identifiers_only() -> None:
    settings = {"training", "privacy"}
    assert set(Order.model_fields) == {"run", "job", "client", "seed", "traceparent", *settings}


def test_ending_has_one_of_two_reasons_and_a_short_error() -> None:
    for bad in ({"reason": "gone"}, {"reason": "failed", "error": "x" * 4001}):
        with pytest.raises(WireError):
            read(Ending, pack(bad))
    assert len(read(Ending, pack({"reason": "failed", "error": "x" * 4000})).error) == 4000


# The envelope


@pytest.mark.parametrize("value", [object(), {1, 2}, 1j, datetime.date(2026, 1, 1), "\ud800", 2**64, -(2**63) - 1])
def test_value_of_an_unsupported_type_cannot_be_sent(value: Any) -> None:
    with pytest.raises(WireError, match="cannot be sent"):
        pack([value])


def test_endless_nesting_cannot_be_sent() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(WireError, match="cannot be sent"):
        pack(value)


def test_message_may_be_as_large_as_the_limit_and_no_larger() -> None:
    overhead = len(pack(b"x" * 60_000)) - 60_000
    largest = b"x" * (MAX_MESSAGE - overhead)
    data = pack(largest)
    assert len(data) == MAX_MESSAGE
    assert unpack(data) == largest
    with pytest.raises(WireError, match=f"message of {MAX_MESSAGE + 1} bytes; at most {MAX_MESSAGE}"):
        pack(largest + b"x")
    with pytest.raises(WireError, match=f"message of {MAX_MESSAGE + 1} bytes"):
        unpack(data + b"\x00")


REFUSED = {
    "nothing": b"",
    "half a message": pack({"a": [1, 2, 3]})[:-1],
    "trailing bytes": pack({"a": 1}) + b"\x00",
    "an extension type": msgpack.packb(msgpack.ExtType(5, b"data")),
    "an extension inside": msgpack.packb([{"a": msgpack.ExtType(0, b"")}]),
    "bad UTF-8": b"\xa2\xff\xfe",
    "the byte that is never used": b"\xc1",
    "a map key that is a list": b"\x81\x90\x01",
    "a map key that is a number": b"\x81\x05\x01",
    "deep nesting": b"\x91" * 5000 + b"\x90",
    "a length far beyond the data": b"\xdd\xff\xff\xff\xff",
    "a map beyond the data": b"\xdf\xff\xff\xff\xff",
    "a string beyond the data": b"\xdb\xff\xff\xff\xff",
    "a pickle": b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
}


@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED.keys())
def test_invalid_message_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(WireError, match="not msgpack of this protocol"):
        unpack(data)


def test_no_message_field_accepts_a_timestamp() -> None:
    """A timestamp is msgpack's own extension type: decoding one runs no code, and no field accepts the value."""
    stamp = msgpack.packb({**UPDATE, "seconds": msgpack.Timestamp(5, 0)})
    with pytest.raises(WireError, match="Update: seconds"):
        read(Update, stamp)


def test_error_shows_no_part_of_the_message() -> None:
    with pytest.raises(WireError) as caught:
        read(Update, pack({**UPDATE, "encoding": "SECRET"}))
    assert "SECRET" not in str(caught.value)

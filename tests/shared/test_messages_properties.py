"""Properties of parsing messages from arbitrary bytes and arbitrary values."""

from __future__ import annotations

from typing import Any

import msgpack
from hypothesis import given
from hypothesis import strategies as st

from fedqueue.config.training import TrainingConfig
from fedqueue.errors import WireError
from fedqueue.protocol.messages import Ending, Evaluation, Message, Order, Registration, Update, read
from fedqueue.protocol.msgpack import pack, unpack

KINDS = (Update, Order, Registration, Ending, Evaluation)
kinds = st.sampled_from(KINDS)
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4) | st.binary(max_size=4), inner),
    max_leaves=10,
)
naturals = st.integers(0, 2**53 - 1)
finite = st.floats(allow_nan=False, allow_infinity=False)
metrics = st.dictionaries(st.text(max_size=64), finite, max_size=8)
names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", fullmatch=True)
errors = st.text(max_size=100)
messages = st.one_of(
    st.builds(
        Update,
        examples=naturals,
        nbytes=naturals,
        chunks=st.integers(0, 2**20),
        metrics=metrics,
        seconds=finite.filter(lambda s: s >= 0),
    ),
    st.builds(
        Order,
        run=names,
        job=st.from_regex(r"[A-Za-z0-9_-]{1,100}", fullmatch=True),
        client=names,
        seed=naturals,
        training=st.builds(TrainingConfig, local_epochs=st.integers(1, 99), proximal_mu=st.floats(0, 10)),
    ),
    st.builds(Registration, client=names, examples=naturals),
    st.builds(Ending, reason=st.sampled_from(["returned", "failed"]), error=errors),
    st.builds(Evaluation, version=naturals, metrics=metrics, error=errors),
)


@given(messages)
def test_any_message_round_trips(message: Message) -> None:
    assert read(type(message), message.pack()) == message


@given(kinds, st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_wire_error(kind: type[Any], data: bytes) -> None:
    try:
        message = read(kind, data)
    except WireError:
        return
    assert isinstance(message, kind)


@given(kinds, plain)
def test_any_value_is_a_message_or_a_wire_error(kind: type[Any], value: Any) -> None:
    try:
        message = read(kind, msgpack.packb(value))
    except WireError:
        return
    assert isinstance(message, kind)


@given(kinds, st.data())
def test_any_value_of_any_field_is_accepted_or_a_wire_error(kind: type[Any], data: st.DataObject) -> None:
    fields = {name: data.draw(plain | naturals, name) for name in kind.model_fields}
    try:
        message = read(kind, msgpack.packb(fields))
    except WireError:
        return
    assert read(kind, message.pack()) == message


@given(messages, st.integers(0, 10_000), st.integers(0, 255))
def test_message_with_a_changed_byte_reads_or_raises_wire_error(message: Any, place: int, byte: int) -> None:
    data = bytearray(message.pack())
    data[place % len(data)] = byte
    try:
        read(type(message), bytes(data))
    except WireError:
        return


@given(plain)
def test_plain_values_round_trip_through_the_envelope(value: Any) -> None:
    try:
        data = pack(value)
        back = unpack(data)
    except WireError:
        return
    assert msgpack.packb(back) == data

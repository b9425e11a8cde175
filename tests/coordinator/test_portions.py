"""Portions of stream entries: their limits and order, and one line in the log for many clients."""

from __future__ import annotations

from collections.abc import Iterable

import structlog
from hypothesis import given
from hypothesis import strategies as st

from fedqueue.protocol.stream_entry import StreamEntry
from fedqueue_coordinator.core.events import ClientJoined, ClientLeft, ClientUnavailable, Event, InvalidEntry
from fedqueue_coordinator.core.reasons import RejectionReason
from fedqueue_coordinator.service.portions import FEW, PRESENCE, TOGETHER, log_events, log_gone, portions

ENTRIES = st.lists(
    st.builds(
        lambda kind, client, number: StreamEntry(f"{number}-0@{client}", kind, b"", client),
        st.sampled_from(["joined", "left", "unavailable", "update", "ended", "evaluated", "?"]),
        st.sampled_from("abcdef"),
        st.integers(0, 10**6),
    ),
    max_size=40,
)


def joins(count: int) -> list[StreamEntry]:
    return [StreamEntry(f"{i}-0@c{i}", "joined", b"", f"c{i}") for i in range(count)]


@given(ENTRIES)
def test_portions_keep_every_entry_and_their_order(entries: list[StreamEntry]) -> None:
    divided = list(portions(entries))
    assert [entry for portion in divided for entry in portion] == entries
    for portion in divided:
        assert len(portion) == 1 or {entry.kind for entry in portion} <= PRESENCE
        assert len({entry.client for entry in portion}) == len(portion)


def test_portion_of_joins_is_bounded_and_ends_at_an_update() -> None:
    update = StreamEntry("1-1@u", "update", b"", "u")
    divided = list(portions([*joins(2 * TOGETHER + 1), update, *joins(3)]))
    assert [len(portion) for portion in divided] == [TOGETHER, TOGETHER, 1, 1, 3]
    assert divided[3] == [update]


def test_second_entry_of_a_client_begins_a_portion() -> None:
    """Whether it is valid depends on the first one: only the worker that registered a client last may let it leave."""
    left = StreamEntry("9-0@c1", "left", b"", "c1")
    assert [len(portion) for portion in portions([*joins(3), left])] == [3, 1]


def logged(events: Iterable[Event]) -> list[dict[str, object]]:
    with structlog.testing.capture_logs() as lines:
        log_events(events)
    return [{key: value for key, value in line.items() if key != "log_level"} for line in lines]


def test_few_joins_have_a_line_each() -> None:
    lines = logged([ClientJoined("a", 3), ClientJoined("b", None), ClientLeft("c")])
    assert lines == [
        {"event": "client joined", "client": "a", "examples": 3},
        {"event": "client joined", "client": "b", "examples": None},
        {"event": "client left", "client": "c"},
    ]


def test_many_joins_are_counted_in_one_line() -> None:
    count = FEW + 1
    named = f"c0, c1, c2, c3, c4 and {count - 5} more"
    assert logged(ClientJoined(f"c{i}", 1) for i in range(count)) == [
        {"event": "clients joined", "count": count, "clients": named}
    ]
    assert logged(ClientUnavailable(f"1-0@c{i}", f"c{i}", f"no file {i}") for i in range(count)) == [
        {"event": "clients unavailable", "count": count, "clients": named, "first_error": "no file 0"}
    ]
    invalid = [InvalidEntry(entry, RejectionReason.FORGED, "no such key") for entry in joins(count)]
    assert [line["event"] for line in logged(invalid)] == ["ignoring invalid stream entries"]


def test_many_expired_leases_are_counted_in_one_line() -> None:
    with structlog.testing.capture_logs() as lines:
        log_gone(["r"], [f"c{i}" for i in range(1000)])
    assert [(line["log_level"], line["event"], line.get("count")) for line in lines] == [
        ("warning", "client was revoked; it gets no further job", None),
        ("warning", "leases of clients expired", 1000),
    ]

"""The inbox: reports arrive with and without a notification, and spurious notifications cost no read."""

from __future__ import annotations

from typing import Any

import pytest

from fedqueue_coordinator.service import inbox
from fedqueue_coordinator.service.inbox import LONGEST_NAME, Inbox
from tests.support.sample_run import SampleRun


def test_report_of_a_worker_wakes_the_waiting_coordinator(run: SampleRun) -> None:
    assert run.coordinator.unacknowledged() == []
    run.join()
    run.posted()
    assert [e.kind for e in run.coordinator.receive(60.0)] == ["joined", "update"]
    run.worker().leave(["c0"])
    assert [e.kind for e in run.coordinator.receive(60.0)] == ["left"]
    run.coordinator.report("evaluated", b"")
    assert [e.kind for e in run.coordinator.receive(60.0)] == ["evaluated"]


def test_periodic_sweep_finds_an_entry_without_notification(run: SampleRun) -> None:
    run.join()
    run.coordinator.unacknowledged()
    run.client.xadd(run.keys.updates("c0"), {"kind": "left", "body": b""})
    assert run.coordinator.receive(0.0) == []
    assert [e.kind for e in run.coordinator.sweep()] == ["left"]
    assert run.coordinator.sweep() == []


def test_only_the_streams_named_by_notifications_are_read(run: SampleRun, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(20):
        run.join(f"c{i}", token=f"t{i}")
    run.coordinator.unacknowledged()
    read = []
    whole = Inbox._read

    def noted(self: Inbox, streams: Any, count: Any) -> Any:
        read.append(set(streams))
        return whole(self, streams, count)

    monkeypatch.setattr(Inbox, "_read", noted)
    run.posted(1, "c7", token="t7")
    assert [e.client for e in run.coordinator.receive(60.0)] == ["c7"]
    assert read == [{run.keys.updates("c7")}]


def test_spurious_notification_reads_and_stores_nothing(run: SampleRun) -> None:
    run.coordinator.unacknowledged()
    for name in (b"", b"\xff", b"somewhere else", run.keys.updates("nobody").encode(), b"x" * (10 * LONGEST_NAME)):
        run.client.publish(run.keys.wakeup, name)
    assert run.coordinator.receive(0.0) == []
    assert run.coordinator._inbox._last == {}


def test_long_stream_is_read_to_the_end_without_more_wakeups(run: SampleRun) -> None:
    run.coordinator.unacknowledged()
    for i in range(5):
        run.coordinator.report("evaluated", b"%d" % i)
    bodies = [[e.body for e in run.coordinator.receive(0.0, count=2)] for _ in range(3)]
    assert bodies == [[b"0", b"1"], [b"2", b"3"], [b"4"]]


def test_read_finds_an_entry_older_than_the_subscription(run: SampleRun) -> None:
    run.join()
    assert [e.kind for e in run.coordinator.receive(0.0)] == ["joined"]


def test_repeated_sweep_finds_an_entry_of_any_client(run: SampleRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox, "SWEPT", 10)
    for i in range(700):
        run.client.sadd(run.keys.clients, f"c{i}")
    run.coordinator.unacknowledged()
    run.client.xadd(run.keys.updates("c123"), {"kind": "left", "body": b""})
    found = [entry.client for _ in range(200) for entry in run.coordinator.sweep_some([])]
    assert found == ["c123"]


def test_each_sweep_reads_the_streams_of_clients_with_a_job(run: SampleRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox, "SWEPT", 1)
    for i in range(700):
        run.client.sadd(run.keys.clients, f"c{i}")
    run.coordinator.unacknowledged()
    run.client.xadd(run.keys.updates("c7"), {"kind": "left", "body": b""})
    run.client.xadd(run.keys.updates(""), {"kind": "evaluated", "body": b""})
    assert {"c7", ""} <= {entry.client for entry in run.coordinator.sweep_some(["c7"])}


def test_silent_subscription_is_renewed(run: SampleRun) -> None:
    """A proxy has dropped the subscription without closing it, so entries arrive without a notification."""
    now = [0.0]
    reader = Inbox(run.client, run.keys, lambda: now[0])
    run.join()
    reader.unacknowledged()
    first = reader._wakeup
    for seconds, same in ((1.0, True), (inbox.SILENT_SECONDS + 1, False)):
        now[0] += seconds
        run.client.xadd(run.keys.updates("c0"), {"kind": "left", "body": b""})
        assert [e.kind for e in reader.sweep_some(["c0"])] == ["left"]
        assert reader.receive(0.0) == []
        assert (reader._wakeup is first) == same
    reader.close()

"""What workers report reaches the coordinator: rung for, found without a ring, and not looked for in vain."""

from __future__ import annotations

from fedqueue_coordinator.service.inbox import LONGEST_NAME, Inbox


def test_report_of_a_worker_ends_the_wait_for_it(run):
    assert run.coordinator.unacknowledged() == []
    run.join()
    run.posted()
    assert [e.kind for e in run.coordinator.receive(60.0)] == ["joined", "update"]
    run.worker().leave(["c0"])
    assert [e.kind for e in run.coordinator.receive(60.0)] == ["left"]
    run.coordinator.report("evaluated", b"")
    assert [e.kind for e in run.coordinator.receive(60.0)] == ["evaluated"]


def test_entry_for_which_nobody_rang_is_found_by_the_sweep(run):
    run.join()
    run.coordinator.unacknowledged()
    run.client.xadd(run.keys.updates("c0"), {"kind": "left", "body": b""})
    assert run.coordinator.receive(0.0) == []
    assert [e.kind for e in run.coordinator.sweep()] == ["left"]
    assert run.coordinator.sweep() == []


def test_only_the_streams_that_were_rung_for_are_read(run, monkeypatch):
    for i in range(20):
        run.join(f"c{i}", token=f"t{i}")
    run.coordinator.unacknowledged()
    read = []
    whole = Inbox._read
    monkeypatch.setattr(
        Inbox, "_read", lambda self, streams, count: read.append(set(streams)) or whole(self, streams, count)
    )
    run.posted(1, "c7", token="t7")
    assert [e.client for e in run.coordinator.receive(60.0)] == ["c7"]
    assert read == [{run.keys.updates("c7")}]


def test_ring_in_vain_reads_nothing_and_remembers_nothing(run):
    run.coordinator.unacknowledged()
    for name in (b"", b"\xff", b"somewhere else", run.keys.updates("nobody").encode(), b"x" * (10 * LONGEST_NAME)):
        run.client.publish(run.keys.wakeup, name)
    assert run.coordinator.receive(0.0) == []
    assert run.coordinator._inbox._last == {}


def test_stream_with_more_entries_than_asked_for_is_read_on_without_another_ring(run):
    run.coordinator.unacknowledged()
    for i in range(5):
        run.coordinator.report("evaluated", b"%d" % i)
    bodies = [[e.body for e in run.coordinator.receive(0.0, count=2)] for _ in range(3)]
    assert bodies == [[b"0", b"1"], [b"2", b"3"], [b"4"]]


def test_what_is_rung_for_before_the_first_look_is_found_by_it(run):
    run.join()
    assert [e.kind for e in run.coordinator.receive(0.0)] == ["joined"]

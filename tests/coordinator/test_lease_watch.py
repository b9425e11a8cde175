"""The lease watch: which clients' leases are read, and when."""

from __future__ import annotations

from fedqueue_coordinator.service.lease_watch import LeaseWatch


def test_client_is_checked_once_at_its_time() -> None:
    watch = LeaseWatch()
    watch.set("a", 2.0)
    watch.set("b", 1.0)
    assert watch.due(0.9, 9) == []
    assert watch.due(1.0, 9) == ["b"]
    assert watch.due(5.0, 9) == ["a"]
    assert watch.due(9.0, 9) == []


def test_renewed_client_is_checked_at_its_later_time_only() -> None:
    watch = LeaseWatch()
    watch.set("a", 1.0)
    watch.set("a", 3.0)
    assert watch.due(2.0, 9) == []
    assert watch.due(3.0, 9) == ["a"]


def test_client_that_left_is_checked_no_longer() -> None:
    watch = LeaseWatch()
    watch.set("a", 1.0)
    watch.discard("a")
    watch.discard("never there")
    assert watch.due(9.0, 9) == []

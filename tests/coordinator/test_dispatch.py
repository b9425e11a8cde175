"""Dispatch and backoff: selection of clients for jobs, and pauses after failures."""

from __future__ import annotations

from collections import Counter

from fedqueue.protocol.keys import job_name
from fedqueue_coordinator.core.backoff import Backoff
from fedqueue_coordinator.core.events import Dispatch
from tests.support.builders import of_kind
from tests.support.federation_run import start

# Backoff


def test_backoff_doubles_with_each_consecutive_failure() -> None:
    backoff = Backoff(first_seconds=1.0, max_failures=5)
    now, ends = 0.0, []
    for _ in range(4):
        backoff.failed("a", now)
        assert not backoff.allows("a")
        end = backoff.next_end()
        assert end is not None
        assert backoff.rested(end - 1e-9) == []
        assert backoff.rested(end) == ["a"]
        assert backoff.allows("a")
        ends.append(end - now)
        now = end
    assert ends == [1.0, 2.0, 4.0, 8.0]


def test_success_resets_the_backoff() -> None:
    backoff = Backoff(1.0, 5)
    backoff.failed("a", 0.0)
    backoff.failed("a", 0.0)
    backoff.rested(100.0)
    backoff.succeeded("a")
    backoff.failed("a", 100.0)
    assert backoff.next_end() == 101.0


def test_success_ends_an_exclusion() -> None:
    backoff = Backoff(1.0, max_failures=5, max_rejections=1)
    backoff.rejected("a", 0.0)
    assert backoff.set_aside("a")
    backoff.succeeded("a")
    assert backoff.allows("a")


def test_longer_of_two_backoffs_applies() -> None:
    backoff = Backoff(1.0, 5)
    backoff.failed("a", 0.0)
    backoff.failed("a", 0.5)
    backoff.rested(1.0)
    assert not backoff.allows("a")
    backoff.rested(2.5)
    assert backoff.allows("a")


def test_client_with_too_many_failures_is_excluded() -> None:
    backoff = Backoff(1.0, 2)
    backoff.failed("a", 0.0)
    assert not backoff.set_aside("a")
    backoff.failed("a", 10.0)
    assert backoff.set_aside("a")
    backoff.rested(1e9)
    assert not backoff.allows("a")
    assert backoff.next_end() is None
    assert backoff.allows("b")


# In a run


def test_concurrency_sets_the_number_of_open_jobs() -> None:
    run = start("c0", "c1", "c2", "c3", dispatch={"concurrency": 2})
    assert len(run.jobs) == 2
    for _ in range(10):
        run.post(next(c for c in run.alive if run.has_job(c)), 1.0)
        assert len(run.jobs) == 2


def test_default_concurrency_is_one_job_per_client() -> None:
    run = start("c0", "c1", "c2", "c3")
    assert sorted(run.jobs.values()) == ["c0", "c1", "c2", "c3"]
    run.join("c0")
    assert sorted(run.jobs.values()) == ["c0", "c1", "c2", "c3"]


def test_clients_beyond_the_configured_count_wait_for_a_slot() -> None:
    run = start("c0", "c1", "c2", clients={"count": 2})
    assert len(run.jobs) == 2


def test_slot_is_filled_before_the_payload_is_loaded() -> None:
    run = start("c0", "c1")
    assert [type(action).__name__ for action in run.post("c0", 1.0)] == ["Dispatch", "Load", "Commit"]


def test_training_starts_at_the_minimum_number_of_clients() -> None:
    run = start("c0", clients={"count": 4, "min_available": 3})
    assert not run.jobs
    run.join("c1")
    assert not run.jobs
    run.join("c2")
    assert len(run.jobs) == 3


def test_started_training_continues_below_the_minimum() -> None:
    run = start("c0", "c1", clients={"count": 4, "min_available": 2})
    run.leave("c1")
    run.post("c0", 1.0)
    assert run.has_job("c0")


def test_every_client_is_eventually_selected() -> None:
    run = start("c0", "c1", "c2", "c3", dispatch={"concurrency": 1})
    for _ in range(200):
        (client,) = run.jobs.values()
        run.post(client, 0.0)
    counts = Counter(line["client"] for line in run.merged)
    assert len(counts) == 4
    assert min(counts.values()) > 25


def test_job_names_have_the_run_and_an_increasing_number() -> None:
    run = start("c0", name="heart")
    run.post("c0", 1.0)
    dispatched = of_kind(run.actions, Dispatch)
    assert [(d.job, d.number) for d in dispatched] == [
        (job_name("heart", 0, number, dispatched[number - 1].client), number) for number in (1, 2)
    ]
    assert dispatched[0].job.startswith("heart-00000001-")

"""Clients whose sites refuse every further job, because their privacy budget is used up."""

from __future__ import annotations

from fedqueue_coordinator.core.events import Dispatch, Stop
from tests.support.builders import of_kind
from tests.support.federation_run import start
from tests.support.masked_federation import start_masked

SPENT = "max_epsilon: the job would bring c0 to ε = 8.1"


def test_client_that_declines_gets_no_further_job() -> None:
    run = start("c0", "c1")
    run.end("c0", "refused", SPENT, final=True)
    run.post("c1")
    assert [d.client for _ in range(5) for d in of_kind(run.tick(1000.0), Dispatch)] == []
    assert run.has_job("c1")
    assert not run.has_job("c0")


def test_merge_of_an_earlier_update_gives_no_job_to_it() -> None:
    run = start("c0", "c1", aggregation={"strategy": "fedbuff", "buffer_size": 2}, dispatch={"concurrency": 2})
    run.post("c0")
    run.end("c0", "refused", SPENT, final=True)
    run.post("c1")
    assert run.federation.version == 1
    run.tick(1000.0)
    assert not run.has_job("c0")


def test_run_ends_well_once_every_site_declines() -> None:
    run = start("c0", "c1")
    run.post("c0")
    run.end("c0", "refused", SPENT, final=True)
    [stop] = of_kind(run.end("c1", "refused", SPENT, final=True), Stop)
    assert not stop.failed
    assert stop.because == f"no site trains further jobs: c0: job refused by its site: {SPENT}"


def test_run_that_merged_nothing_before_that_has_failed() -> None:
    run = start("c0")
    [stop] = of_kind(run.end("c0", "refused", SPENT, final=True), Stop)
    assert stop.failed


def test_run_with_keepers_ends_well_once_no_crowd_is_left() -> None:
    run = start_masked("c0", "c1", "c2", min_cohort=3)
    for client in ("c0", "c1", "c2"):
        run.post_masked(client, 1.0)
    assert run.federation.version == 1
    assert not of_kind(run.end("c2", "refused", SPENT, final=True), Stop)
    run.post_masked("c0", 1.0)
    run.post_masked("c1", 1.0)
    actions = [*run.post_masked("c0", 1.0), *run.post_masked("c1", 1.0), *run.tick(2.0)]
    [stop] = of_kind(actions, Stop)
    assert not stop.failed
    assert stop.because.startswith("the privacy budgets of 1 of 3 clients are used up, and a version needs 3 clients")
    assert SPENT in stop.because


def test_used_up_budgets_are_no_dead_end() -> None:
    run = start_masked("c0", "c1", "c2", min_cohort=3)
    for client in ("c0", "c1", "c2"):
        run.post_masked(client, 1.0)
    run.end("c2", "refused", SPENT, final=True)
    assert not run.federation.dead_end(gone=set())


def test_lost_workers_are_a_dead_end_in_spite_of_budgets() -> None:
    run = start_masked("c0", "c1", "c2", "c3", min_cohort=3)
    for client in ("c0", "c1", "c2"):
        run.post_masked(client, 1.0)
    run.end("c3", "refused", SPENT, final=True)
    assert "2 clients are left that can train" in run.federation.dead_end(gone={"c2"})

"""Failures by kind, what a run waits for, and when it cannot go on."""

from __future__ import annotations

from typing import Any

import pytest

from fedqueue.protocol.messages import NO_EXAMPLES, SITE_POLICY
from fedqueue_coordinator.core.events import ClientUnavailable, Stop
from fedqueue_coordinator.core.failures import MAX_KINDS, OTHER, Failures
from fedqueue_coordinator.core.run_summary import NO_UPDATE_IN_TIME, NO_WORKER, summarize
from tests.support.builders import of_kind
from tests.support.federation_run import Run, start

BARRIER = {"strategy": "fedavg"}


def unavailable(run: Run, client: str, error: str = "OSError: no disk") -> list[Any]:
    return run.tell(ClientUnavailable("1-0", client, error))


# Kinds


def test_failures_of_other_clients_and_numbers_are_one_kind() -> None:
    failures = Failures()
    for number in range(1000):
        failures.abandoned(f"c{number}", "failed", f"OSError: /data/c{number}.csv line {number} at 0x7f{number:x}")
    [kind] = failures.kinds.values()
    assert (kind.client, kind.count, len(kind.clients)) == ("c0", 1000, 1000)


def test_another_type_text_or_reason_is_another_kind() -> None:
    failures = Failures()
    failures.abandoned("a", "failed", "ValueError: x")
    failures.abandoned("a", "failed", "KeyError: x")
    failures.abandoned("a", "refused", "KeyError: x")
    failures.rejected("a", "non_finite", "NaN")
    assert len(failures.kinds) == 4


def test_endless_kinds_are_counted_as_other_failures() -> None:
    failures = Failures()
    for number in range(MAX_KINDS + 20):
        failures.abandoned("a", "failed", "x" * number)
    assert len(failures.kinds) == MAX_KINDS + 1
    assert failures.kinds[OTHER, ""].count == 20


@pytest.mark.parametrize("reason", ["returned", "run_ended", "epoch_lost"])
def test_normal_endings_are_no_failures(reason: str) -> None:
    failures = Failures()
    failures.abandoned("a", reason, "")
    failures.rejected("a", "run_ended", "")
    assert not failures.kinds


def test_federation_notes_every_way_to_fail() -> None:
    run = start("c0", "c1", "c2", "c3", "c4", dispatch={"max_client_failures": 1})
    run.end("c0", "failed", "ValueError: no")
    run.post("c1", float("nan"))
    run.lapse("c2")
    unavailable(run, "c3")
    unavailable(run, "c4", f"{SITE_POLICY}max_leak: rows: 0.09")
    lines = [kind.line for kind in run.federation.failures.kinds.values()]
    assert lines[0] == "c0: training failed: ValueError: no"
    assert lines[1].startswith("c0: set aside: it gets no further job, because of 1 failures; the last one: training")
    assert lines[2].startswith("c1: update rejected (non_finite): ")
    assert lines[3].startswith("c2: job lapsed: its worker was silent")
    assert lines[4] == "c3: cannot load its data: OSError: no disk"
    assert lines[5] == "c4: takes no part: this site's policy: max_leak: rows: 0.09"


# Clients that cannot load their data


def test_unavailable_client_is_recorded_and_left_out() -> None:
    run = start("c0", "c1")
    job = run.job_of("c1")
    unavailable(run, "c1")
    assert run.ledger[-1] == {
        "kind": "unavailable", "client": "c1", "error": "OSError: no disk", "version": 0, "seconds": 0.0,
    }  # fmt: skip
    assert list(run.federation.clients) == ["c0"]
    assert run.endings[job] == "returned"


def test_unavailable_client_may_join_later() -> None:
    run = start("c0")
    unavailable(run, "c1")
    run.join("c1")
    assert not run.federation.unavailable
    assert run.has_job("c1")


def test_report_on_a_client_served_elsewhere_is_recorded() -> None:
    run = start("c0")
    run.tell(ClientUnavailable("1-0", "c0", "OSError: no disk", served=True))
    assert list(run.federation.clients) == ["c0"]
    assert not run.federation.unavailable


# Waiting


def test_barrier_names_the_clients_that_it_waits_for() -> None:
    run = start("client-0", aggregation=BARRIER)
    waits = run.federation.waiting_for(0.0)
    assert waits == "1 of 4 clients alive, waiting for 4 (missing: client-1, client-2, client-3)"
    unavailable(run, "client-2")
    assert run.federation.waiting_for(0.0).endswith("; client-2 cannot load its data: OSError: no disk")


def test_barrier_names_a_client_that_a_policy_leaves_out() -> None:
    run = start("client-0", aggregation=BARRIER)
    unavailable(run, "client-2", f"{SITE_POLICY}min_keepers: the run has no keepers")
    assert run.federation.waiting_for(0.0).endswith(
        "; client-2 takes no part: this site's policy: min_keepers: the run has no keepers"
    )


def test_run_with_a_job_under_way_waits_for_nothing() -> None:
    run = start("client-0")
    assert run.federation.waiting_for(0.0) == ""


def test_run_without_a_client_says_so() -> None:
    run = start("client-0")
    run.leave("client-0")
    assert run.federation.waiting_for(0.0).startswith("no client is alive, waiting for a worker (missing: client-0")


def test_rest_after_a_failure_is_waited_for() -> None:
    run = start("client-0")
    run.end("client-0", "failed", "E")
    assert run.federation.waiting_for(0.0) == "the clients rest after failures, until 1.0 s"


def test_run_does_not_wait_for_clients_set_aside() -> None:
    run = start("client-0", "client-1", dispatch={"max_client_failures": 1})
    run.leave("client-1")
    run.end("client-0", "failed", "E")
    assert run.federation.waiting_for(0.0).startswith("every client that is alive is set aside, waiting for another")
    assert run.federation.stopped is None
    assert run.federation.dead_end({"client-1", "client-2", "client-3"}).startswith("no client is left that can train")


def test_barrier_that_can_never_be_complete_is_a_dead_end() -> None:
    run = start("client-0", aggregation=BARRIER)
    assert run.federation.dead_end(set()) == ""
    unavailable(run, "client-2", "OSError: no disk")
    assert run.federation.dead_end({"client-2"}) == (
        "3 of 4 clients can take part, and 4 are needed for each version of fedavg (missing: client-2); "
        "client-2 cannot load its data: OSError: no disk"
    )


def test_buffered_run_goes_on_without_a_client() -> None:
    run = start("client-0", aggregation={"strategy": "fedbuff", "buffer_size": 2})
    assert run.federation.dead_end({"client-1", "client-2", "client-3"}) == ""


# The end


def test_limit_without_a_merged_update_is_a_failure() -> None:
    run = start("c0", stop={"seconds": 5.0})
    run.end("c0", "failed", "ValueError: no")
    [stop] = of_kind(run.tick(5.0), Stop)
    assert stop == Stop("seconds: 5; no update was merged: c0: training failed: ValueError: no", failed=True)


def test_run_whose_clients_are_all_set_aside_names_the_cause() -> None:
    run = start("c0", dispatch={"max_client_failures": 1})
    [stop] = of_kind(run.end("c0", "failed", "ValueError: no"), Stop)
    assert stop.failed
    assert stop.because.endswith("was set aside: c0: training failed: ValueError: no")


def test_summary_says_why_each_client_contributed_nothing() -> None:
    run = start("a", "b", "c", "d")
    run.post("a", 1.0)
    run.end("b", "failed", "ValueError: no")
    run.tick(10.0)
    run.end("b", "failed", "ValueError: no")
    unavailable(run, "d")
    run.stop()
    summary = summarize("run", "", 0, "", run.ledger, {}, ["a", "b", "c", "d", "e"], ["a", "b", "c"])
    assert summary["clients_without_update"] == {
        "b": "training failed: ValueError: no (2 failures)",
        "c": NO_UPDATE_IN_TIME,
        "d": "cannot load its data: OSError: no disk",
        "e": NO_WORKER,
    }
    assert {"what": "training failed", "text": "ValueError: no", "first": "b", "count": 2, "clients": 1} in summary[
        "failures"
    ]


def test_metric_that_is_not_finite_is_told_once_for_each_name() -> None:
    failures, nan = Failures(), float("nan")
    for version in range(3):
        failures.evaluated(version, {"loss": 0.1, "auc": nan}, "")
        failures.trained(f"client-{version}", version, {"loss": nan})
    assert [kind.line for kind in failures.kinds.values()] == [
        "metric not finite: evaluate returned auc nan at version 0",
        "client-0: metric not finite: fit returned loss nan at version 0",
    ]
    assert all(kind.mild and kind.count == 3 for kind in failures.kinds.values())
    assert failures.most_frequent is None  # no reason why nothing was merged


def test_failed_evaluation_is_told_once_for_each_kind() -> None:
    failures = Failures()
    for version in (4, 5):
        failures.evaluated(version, {}, "OSError: stale; in evaluate (task.py:20)")
    failures.evaluated(6, {}, "RuntimeError: out of memory")
    assert [kind.line for kind in failures.kinds.values()] == [
        "evaluation failed: version 4: OSError: stale; in evaluate (task.py:20)",
        "evaluation failed: version 6: RuntimeError: out of memory",
    ]
    assert not any(kind.mild for kind in failures.kinds.values())


# Clients without examples


def test_cohort_does_not_wait_for_a_client_without_examples() -> None:
    run = start(aggregation=BARRIER, clients={"count": 3})
    run.join("client-0", "client-2")
    assert not run.federation.open_jobs
    unavailable(run, "client-1", NO_EXAMPLES)
    assert sorted(run.federation.open_jobs.values()) == ["client-0", "client-2"]
    assert not run.federation.unavailable
    [kind] = run.federation.failures.kinds.values()
    assert (kind.client, kind.what, kind.text) == ("client-1", "takes no part", "it has no examples")


def test_configured_minimum_of_clients_stays_what_it_is() -> None:
    run = start(aggregation=BARRIER, clients={"count": 3, "min_available": 3})
    unavailable(run, "client-1", NO_EXAMPLES)
    run.join("client-0", "client-2")
    assert not run.federation.open_jobs
    run.join("client-1")
    assert len(run.federation.open_jobs) == 3

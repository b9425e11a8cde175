"""Synchronous rounds: over-selection, the deadline, and late jobs."""

from __future__ import annotations

from typing import Any

import pytest

from fedqueue_coordinator.core.events import Close, Commit, Dispatch
from tests.support.builders import of_kind, same_bits
from tests.support.federation_run import Run, start

FIVE = ("a", "b", "c", "d", "e")
ROUND = {"strategy": "fedavg", "cohort_size": 3}


def start_round(**dispatch: Any) -> Run:
    return start(*FIVE, aggregation=ROUND, clients={"count": 5}, dispatch=dispatch)


def training(run: Run) -> list[str]:
    return sorted(client for client in run.alive if run.has_job(client))


def lateness(run: Run) -> list[Any]:
    return [(r["client"], r["reason"]) for r in run.ledger if r["kind"] == "abandoned"]


@pytest.mark.parametrize(("factor", "asked"), [(1.0, 3), (1.3, 4), (1.6, 5), (3.0, 5)])
def test_over_selection_multiplies_the_cohort_and_rounds_up(factor: float, asked: int) -> None:
    assert len(start_round(over_selection=factor).jobs) == asked


def test_round_closes_with_its_cohort_and_withdraws_late_jobs() -> None:
    run = start_round(over_selection=1.3)
    first = training(run)
    for client in first[:2]:
        run.post(client, 2.0)
    actions = run.post(first[2], 5.0)
    kinds = [type(action) for action in actions if not isinstance(action, Dispatch)]
    assert kinds[-2:] == [Commit, Close]
    assert (run.federation.version, run.x) == (1, 3.0)
    assert lateness(run) == [(first[3], "late")]
    assert run.federation.abandoned == {"late": 1}
    assert len(run.jobs) == 4  # the jobs of the next round, which may include the late client


def test_late_client_is_not_penalized() -> None:
    run = start_round(over_selection=1.3, max_client_failures=1)
    late = training(run)[3]
    for _ in range(12):
        run.post(next(client for client in training(run) if client != late), 1.0)
    assert ("late", late) in {(reason, client) for client, reason in lateness(run)}
    assert not run.federation.stopped
    for other in FIVE:
        if other != late:
            run.leave(other)
    run.tick()
    assert run.has_job(late)


def test_update_read_after_its_round_closed_is_late() -> None:
    """The update is posted before its round closes, and read after. Reading ends the job without a merge."""
    run = start_round(over_selection=1.3)
    first = training(run)
    run.post(first[3], 100.0, unread=True)
    for client in first[:3]:
        run.post(client, 1.0)
    assert run.x == 1.0
    run.read()
    assert run.rejections == ["late"]
    assert lateness(run) == []
    assert run.federation.abandoned["late"] == 0
    for client in training(run)[:3]:
        run.post(client, 1.0)
    assert (run.federation.version, run.x) == (2, 2.0)


def test_payload_loaded_after_its_round_closed_is_late() -> None:
    run = start_round(over_selection=1.3)
    run.holds_loads = True
    for client in training(run):
        run.post(client, 1.0)
    for _ in range(4):
        run.load_next()
    assert run.federation.version == 1
    assert run.rejections == ["late"]
    assert all(line["staleness"] == 0 for line in run.merged)


def test_deadline_closes_the_round_with_the_arrived_updates() -> None:
    run = start_round(round_deadline_seconds=10.0)
    first, second, third = training(run)
    run.tick(4.0)
    run.post(first, 2.0)
    run.post(second, 4.0)
    assert run.federation.next_deadline() == 10.0
    run.tick(5.0)
    assert run.federation.version == 0
    run.tick(1.0)
    assert (run.federation.version, run.x) == (1, 3.0)
    assert lateness(run) == [(third, "late")]
    assert len(run.jobs) == 3


def test_empty_round_past_its_deadline_closes_with_one_update() -> None:
    run = start_round(round_deadline_seconds=10.0)
    assert run.federation.next_deadline() is None  # without an update the round cannot close
    run.tick(25.0)
    assert run.federation.version == 0
    run.post(training(run)[0], 2.0)
    run.tick()
    assert (run.federation.version, run.x) == (1, 2.0)
    assert [reason for _, reason in lateness(run)] == ["late", "late"]


def test_each_round_has_a_deadline_of_its_own() -> None:
    run = start_round(round_deadline_seconds=10.0)
    run.tick(8.0)
    for client in training(run):
        run.post(client, 1.0)
    run.tick(1.0)
    run.post(training(run)[0], 1.0)
    assert run.federation.next_deadline() == 18.0
    run.tick(8.9)
    assert run.federation.version == 1
    run.tick(0.2)
    assert run.federation.version == 2


def test_successor_keeps_the_round_deadline() -> None:
    run = start_round(round_deadline_seconds=10.0)
    run.tick(8.0)
    for client in training(run):
        run.post(client, 1.0)
    run.tick(3.0)
    run.post(training(run)[0], 1.0)
    run.restart()
    assert run.federation.next_deadline() == 18.0


def test_over_selection_without_late_clients_changes_no_bit() -> None:
    """The same three of four selected clients arrive, so the fourth does not change the merged versions."""
    models = []
    for factor in (1.0, 1.3):
        run = start(*"abcd", aggregation=ROUND, clients={"count": 4}, dispatch={"over_selection": factor})
        for value in (0.1, 0.7, 0.3):
            run.post(training(run)[0], value)
        models.append(run.federation.model)
    assert same_bits(*models)


def test_async_run_ignores_over_selection_and_deadline() -> None:
    run = start(
        *FIVE, clients={"count": 5}, dispatch={"over_selection": 2.0, "round_deadline_seconds": 1.0, "concurrency": 2}
    )
    assert len(run.jobs) == 2
    assert run.federation.next_deadline() is None
    run.post(training(run)[0], 1.0)
    run.tick(5.0)
    assert not of_kind(run.actions, Close)

"""Stop conditions: the first limit reached, and the description of that limit."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest

from fedqueue.config.schema import StopConfig
from fedqueue.config.target import goals
from fedqueue.errors import ConfigurationError
from fedqueue_coordinator.core.evaluation import MAX_FAILED_EVALUATIONS
from fedqueue_coordinator.core.events import Close, Evaluated, Stop
from fedqueue_coordinator.core.stop_conditions import require_usable_target, stop_reason, target_reached
from tests.support.builders import of_kind
from tests.support.federation_run import start

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("limits", "version", "updates", "seconds", "reason"),
    [
        ({"versions": 3}, 2, 99, 99.0, ""),
        ({"versions": 3}, 3, 0, 0.0, "versions: 3 of 3"),
        ({"updates": 10}, 99, 9, 99.0, ""),
        ({"updates": 10}, 0, 11, 0.0, "updates: 11 of 10"),
        ({"seconds": 2.5}, 99, 99, 2.4, ""),
        ({"seconds": 2.5}, 0, 0, 2.5, "seconds: 2.5"),
        ({"versions": 3, "updates": 5, "seconds": 9}, 2, 5, 1.0, "updates: 5 of 5"),
        ({"seconds": 2.5}, 0, 0, None, ""),  # the clients have not begun to train
        ({"target": {"accuracy": 0.9}}, 10**6, 10**6, 1e6, ""),
    ],
)
def test_first_reached_limit_is_described(
    limits: dict[str, Any], version: int, updates: int, seconds: float | None, reason: str
) -> None:
    assert stop_reason(StopConfig(**limits), version, updates, seconds) == reason


@pytest.mark.parametrize(
    ("target", "metrics", "reached"),
    [
        ({"accuracy": 0.95}, {"accuracy": 0.95}, True),
        ({"accuracy": 0.95}, {"accuracy": 0.9499}, False),
        ({"loss": 0.2}, {"loss": 0.2}, True),
        ({"loss": 0.2}, {"loss": 0.21}, False),
        ({"test_error": 0.1}, {"test_error": 0.05}, True),
        ({"accuracy": 0.9, "loss": 0.2}, {"accuracy": 0.95, "loss": 0.3}, False),
        ({"accuracy": 0.9, "loss": 0.2}, {"accuracy": 0.95, "loss": 0.1}, True),
        ({"accuracy": 0.9}, {"loss": 0.0}, False),  # not measured, so not reached
        ({"accuracy": 0.9}, {"accuracy": NAN}, False),
        ({"loss": 0.2}, {"loss": NAN}, False),
        ({"loss": 0.2}, {"loss": -INF}, True),
        ({"mse": 0.05}, {"mse": 36.1}, False),
        ({"depth": {"above": 3}}, {"depth": 3.0}, True),
        ({"depth": {"below": 3}}, {"depth": 3.1}, False),
        ({}, {"accuracy": 1.0}, False),
    ],
)
def test_target_is_reached_when_all_metrics_reach_theirs(
    target: dict[str, Any], metrics: dict[str, Any], reached: bool
) -> None:
    words = target_reached(goals(target), Evaluated(7, metrics))
    assert bool(words) == reached
    if reached:
        assert words.startswith("target: ")
        assert words.endswith("at version 7")


@pytest.mark.parametrize("metrics", [{}, {"acc": 1.0, "loss": 0.1}])
def test_target_without_its_metric_lists_the_names_that_came(metrics: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="accuracy is not measured") as caught:
        require_usable_target(goals({"accuracy": 0.9}), Evaluated(0, metrics))
    assert (", ".join(metrics) or "no metric") in str(caught.value)


@pytest.mark.parametrize(("version", "mse", "refused"), [(0, 0.04, True), (0, 36.1, False), (1, 0.04, False)])
def test_target_that_version_0_meets_is_refused(version: int, mse: float, refused: bool) -> None:
    with (
        pytest.raises(ConfigurationError, match=r"before any training already has mse 0\.04.*mse ≤ 0\.05")
        if (refused)
        else nullcontext()
    ):
        require_usable_target(goals({"mse": 0.05}), Evaluated(version, {"mse": mse}))


# In a run


def test_run_stops_at_its_version() -> None:
    run = start("c0", "c1", stop={"versions": 2})
    assert not of_kind(run.post("c0", 1.0), Stop)
    assert of_kind(run.post("c1", 1.0), Stop) == [Stop("versions: 2 of 2")]
    assert run.federation.version == 2


def test_run_stops_at_its_number_of_merged_updates() -> None:
    run = start("c0", "c1", aggregation={"strategy": "fedbuff", "buffer_size": 2}, stop={"updates": 3})
    for _ in range(4):
        run.post("c0", 1.0)
    assert run.federation.stopped == Stop("updates: 4 of 3")  # a buffer is merged as a whole


def test_rejected_updates_do_not_count_towards_the_limit() -> None:
    run = start("c0", "c1", stop={"updates": 1})
    run.post("c0", float("nan"))
    assert run.federation.stopped is None
    run.post("c1", 1.0)
    assert run.federation.stopped == Stop("updates: 1 of 1")


def test_run_stops_at_its_time_limit() -> None:
    run = start("c0", stop={"seconds": 5.0})
    run.post("c0", 1.0)
    assert run.federation.next_deadline() == 5.0
    assert not of_kind(run.tick(4.9), Stop)
    assert of_kind(run.tick(0.1), Stop) == [Stop("seconds: 5")]


def test_run_stops_when_the_evaluation_reaches_the_target() -> None:
    run = start("c0", evaluates=True, stop={"target": {"loss": 0.5}})
    run.tell(Evaluated(0, {"loss": 0.7}))
    assert run.federation.stopped is None
    run.tell(Evaluated(1, {"loss": 0.4}))
    assert run.federation.stopped == Stop("target: loss 0.4000 (target 0.5) at version 1", version=1)


def test_time_limit_counts_from_the_first_job() -> None:
    run = start(stop={"seconds": 5.0})
    assert run.federation.next_deadline() is None
    run.tick(100.0)
    run.join("c0")
    assert run.federation.next_deadline() == 105.0
    assert not of_kind(run.tick(4.9), Stop)
    assert of_kind(run.tick(0.1), Stop)


def test_time_limit_counts_from_the_first_job_after_a_restart() -> None:
    run = start(stop={"seconds": 50.0})
    run.tick(20.0)
    run.join("c0")
    run.tick(10.0)
    run.post("c0", 1.0)
    run.restart()
    assert run.federation.next_deadline() == 70.0


def test_run_stops_as_failed_when_the_first_evaluation_raises() -> None:
    run = start("c0", evaluates=True)
    run.tell(Evaluated(0, {}, "ValueError: no"))
    assert run.federation.stopped == Stop("the evaluation failed: ValueError: no", failed=True)


def test_later_failures_of_the_evaluation_do_not_stop_the_run() -> None:
    run = start("c0", evaluates=True)
    run.tell(Evaluated(0, {"loss": 1.0}))
    for _ in range(3):
        for version in (1, 2, 3, 4):
            run.tell(Evaluated(version, {}, "OSError: stale"))
        run.tell(Evaluated(5, {"loss": 0.5}))
    assert run.federation.stopped is None
    assert run.federation.evaluated == Evaluated(5, {"loss": 0.5})  # what is shown while evaluations fail


def test_run_may_be_resumed_after_evaluations_failed_in_a_row() -> None:
    run = start("c0", evaluates=True)
    run.tell(Evaluated(0, {"loss": 1.0}))
    for version in range(1, MAX_FAILED_EVALUATIONS + 1):
        assert run.federation.stopped is None
        run.tell(Evaluated(version, {}, f"OSError: stale {version}"))
    because = f"the evaluation failed {MAX_FAILED_EVALUATIONS} times in a row, at last with OSError: stale"
    assert run.federation.stopped == Stop(f"{because} {version}", failed=True, resumable=True)


def test_first_evaluation_of_a_resumed_run_may_fail() -> None:
    run = start("c0", evaluates=True)
    run.post("c0", 1.0)
    run.restart()
    run.tell(Evaluated(1, {}, "OSError: stale"))
    assert run.federation.stopped is None


def test_unusable_target_is_refused_at_the_first_evaluation() -> None:
    run = start("c0", evaluates=True, stop={"target": {"accuracy": 0.9}})
    with pytest.raises(ConfigurationError, match=r"evaluate returned acc, loss"):
        run.tell(Evaluated(0, {"acc": 0.5, "loss": 1.0}))


def test_resumed_run_may_meet_its_target_at_once() -> None:
    run = start("c0", evaluates=True, stop={"target": {"loss": 0.5}})
    run.post("c0", 1.0)
    run.restart()
    run.tell(Evaluated(1, {"loss": 0.4}))
    assert run.federation.stopped is not None
    assert run.federation.stopped.version == 1


def test_ending_the_run_ends_every_job() -> None:
    run = start("c0", "c1", "c2", aggregation={"strategy": "fedbuff", "buffer_size": 3})
    run.post("c0", 1.0)
    actions = run.stop("the operator said so")
    assert [type(action) for action in actions] == [Close] * 4 + [Stop]
    assert not run.jobs
    assert sorted(run.endings.values()) == ["run_ended"] * 4
    assert {record["kind"] for record in run.ledger} == {"rejected", "abandoned"}


def test_payload_that_comes_after_the_end_is_rejected() -> None:
    run = start("c0", aggregation={"strategy": "fedasync"})
    run.holds_loads = True
    job = run.job_of("c0")
    run.post("c0", 1.0)
    run.stop()
    run.load_next()
    assert run.endings[job] == "run_ended"
    assert (run.rejections, run.x, run.federation.version) == (["run_ended"], 0.0, 0)


def test_ended_run_performs_no_actions() -> None:
    run = start("c0", stop={"versions": 1}, evaluates=True)
    run.post("c0", 1.0)
    ended = len(run.actions)
    run.join("c1")
    run.leave("c0")
    run.tell(Evaluated(0, {"loss": 1.0}))
    run.tick(1e9)
    assert len(run.actions) == ended

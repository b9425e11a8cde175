"""Central evaluation: of a snapshot, beside the merging, one at a time, and what it reports."""

from __future__ import annotations

import threading

import pytest
import torch
from builders import of_kind, start

from fedqueue.task import Task
from fedqueue.tensors.frame import Frame, Manifest
from fedqueue_coordinator.core.events import Commit, Evaluate, Evaluated
from fedqueue_coordinator.service.evaluator import Evaluator, evaluate

CPU = torch.device("cpu")


class WeightTask(Task):
    """The metric is the weight of a model that has only one."""

    def __init__(self, metrics=None):
        self.metrics = metrics

    def model(self):
        return torch.nn.Linear(1, 1, bias=False)

    def evaluate(self, model, data):
        if isinstance(self.metrics, Exception):
            raise self.metrics
        return self.metrics or {"weight": model.weight.item(), "data": data}


def weighing(value):
    frame = Frame(Manifest.from_module(WeightTask().model()))
    frame.parameters.fill_(value)
    return frame


def test_task_measures_the_version_that_it_is_given():
    result = evaluate(WeightTask(), 7, weighing(2.5), CPU)
    assert (result.metrics, result.error) == ({"weight": 2.5, "data": 7.0}, "")


def test_metrics_that_are_not_finite_are_left_out():
    metrics = {"loss": float("nan"), "perplexity": float("inf"), "accuracy": torch.tensor(0.5)}
    assert evaluate(WeightTask(metrics), None, weighing(0.0), CPU).metrics == {"accuracy": 0.5}


@pytest.mark.parametrize(
    ("metrics", "error"),
    [
        (ValueError("no labels"), "ValueError: no labels"),
        ({"loss": "low"}, "TypeError"),
        ({f"metric-{i}": 1.0 for i in range(1000)}, "ValidationError"),
        ({"x" * 1000: 1.0}, "ValidationError"),
    ],
)
def test_evaluation_that_goes_wrong_is_reported_as_an_error(metrics, error):
    result = evaluate(WeightTask(metrics), None, weighing(0.0), CPU)
    assert result.metrics == {}
    assert result.error.startswith(error)


def test_model_may_change_while_its_snapshot_is_evaluated():
    merged, results = threading.Event(), []

    class Waiting(WeightTask):
        def evaluate(self, model, data):
            assert merged.wait(30)
            return super().evaluate(model, data)

    model = weighing(1.0)
    evaluator = Evaluator(Waiting(), 0, CPU, results.append)
    evaluator.start(3, model)
    model.parameters.fill_(99.0)
    assert results == []  # `start` did not wait for it
    merged.set()
    evaluator.join()
    (result,) = results
    assert (result.version, result.metrics["weight"]) == (3, 1.0)
    version, snapshot = evaluator.snapshot
    assert (version, snapshot.parameters.item()) == (3, 1.0)


def test_evaluations_are_reported_in_their_order():
    results = []
    evaluator = Evaluator(WeightTask(), 0, CPU, results.append)
    for version in (1, 2, 3):
        evaluator.start(version, weighing(version))
    evaluator.join()
    evaluator.join()
    assert [(r.version, r.metrics["weight"]) for r in results] == [(1, 1.0), (2, 2.0), (3, 3.0)]


# When a federation wants one


def evaluations(actions):
    return [action.version for action in of_kind(actions, Evaluate)]


def evaluated(run, version):
    return evaluations(run.tell(Evaluated(version, {"loss": 1.0})))


def test_first_version_is_evaluated_and_then_every_nth():
    run = start("c0", evaluates=True, evaluation={"every": 3})
    assert evaluations(run.actions) == [0]
    evaluated(run, 0)
    for _ in range(7):
        for version in evaluations(run.post("c0", 1.0)):
            evaluated(run, version)
    assert evaluations(run.actions) == [0, 3, 6]


def test_one_evaluation_at_a_time_and_the_newest_version_next():
    run = start("c0", evaluates=True, evaluation={"every": 1})
    for _ in range(5):
        run.post("c0", 1.0)
    assert evaluations(run.actions) == [0]
    assert evaluated(run, 0) == [5]


def test_evaluation_by_time_waits_for_a_new_version():
    run = start("c0", evaluates=True, evaluation={"every": 0, "seconds": 10.0})
    assert run.federation.next_deadline() == 10.0
    assert evaluations(run.tick(10.0)) == [0]
    evaluated(run, 0)
    assert run.federation.next_deadline() is None
    assert evaluations(run.tick(10.0)) == []  # version 0 has been measured
    run.post("c0", 1.0)
    assert evaluations(run.actions) == [0, 1]


def test_evaluation_by_time_is_due_so_long_after_the_last():
    run = start("c0", evaluates=True, evaluation={"every": 0, "seconds": 10.0})
    run.tick(10.0)
    evaluated(run, 0)
    assert evaluations(run.post("c0", 1.0)) == []
    assert run.federation.next_deadline() == 20.0
    assert evaluations(run.tick(9.9)) == []
    assert evaluations(run.tick(0.1)) == [1]


def test_version_is_measured_before_an_update_that_is_on_its_way_changes_it():
    """It is due as an update's header arrives: the action comes before the load, for the load may commit."""
    run = start("c0", evaluates=True, evaluation={"every": 0, "seconds": 10.0})
    run.now = 10.0
    actions = run.post("c0", 1.0)
    wanted = [action for action in actions if isinstance(action, Evaluate | Commit)]
    assert [(type(action), action.version) for action in wanted] == [(Evaluate, 0), (Commit, 1)]


def test_successor_measures_the_version_that_it_starts_from_under_its_own_number():
    run = start("c0", "c1", evaluates=True, aggregation={"mode": "fedbuff", "buffer_size": 2})
    run.post("c0", 1.0)
    run.restart()  # `Run` checks that the label is the version
    run.post("c1", 1.0)
    assert evaluations(run.actions) == [0, 0]
    assert evaluated(run, 0) == [1]


def test_nothing_is_evaluated_where_the_task_has_no_test_data():
    run = start("c0", evaluation={"every": 1, "seconds": 1.0})
    run.post("c0", 1.0)
    run.tick(100.0)
    assert evaluations(run.actions) == []
    assert run.federation.next_deadline() is None  # a deadline that no evaluation moves would keep the loop spinning


def test_newest_evaluation_is_kept():
    run = start("c0", evaluates=True)
    evaluated(run, 0)
    assert run.federation.evaluated == Evaluated(0, {"loss": 1.0})

"""Central evaluation: one at a time, of a snapshot, in a thread, with a reported result."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch

from fedqueue.errors import ConfigurationError, TaskError
from fedqueue.protocol.messages import Evaluation, read
from fedqueue.task import Task
from fedqueue.tensors.frame import Frame
from fedqueue.tensors.manifest import Manifest
from fedqueue_coordinator.core.evaluation import evaluate, load_test_data, require_test_data
from fedqueue_coordinator.core.events import Commit, Evaluate, Evaluated
from fedqueue_coordinator.service.evaluator import Evaluator
from tests.support.builders import of_kind
from tests.support.federation_run import Run, start

CPU = torch.device("cpu")


class WeightTask(Task):
    """A task whose metric is the single weight of the model."""

    def __init__(self, metrics: Any = None) -> None:
        self.metrics = metrics

    def model(self) -> Any:
        return torch.nn.Linear(1, 1, bias=False)

    def evaluate(self, model: Any, data: int | None) -> dict[str, Any]:
        if isinstance(self.metrics, BaseException):
            raise self.metrics
        return self.metrics or {"weight": model.weight.item(), "data": data}


def weighing(value: float) -> Frame:
    frame = Frame(Manifest.from_module(WeightTask().model()))
    frame.parameters.fill_(value)
    return frame


def test_task_evaluates_the_given_version() -> None:
    result = evaluate(WeightTask(), 7, weighing(2.5), CPU)
    assert (result.metrics, result.error) == ({"weight": 2.5, "data": 7.0}, "")


def test_metrics_that_are_not_finite_are_kept() -> None:
    metrics = {"loss": float("nan"), "perplexity": float("inf"), "accuracy": torch.tensor(0.5)}
    result = read(Evaluation, evaluate(WeightTask(metrics), None, weighing(0.0), CPU).pack())
    assert list(result.metrics) == list(metrics)
    assert math.isnan(result.metrics["loss"])
    assert (result.metrics["perplexity"], result.metrics["accuracy"]) == (float("inf"), 0.5)


@pytest.mark.parametrize(
    ("metrics", "error"),
    [
        (ValueError("no labels"), "ValueError: no labels; in evaluate (test_evaluation.py:"),
        (SystemExit(3), "SystemExit: 3; in evaluate (test_evaluation.py:"),
        ({"loss": "low"}, "TaskError: evaluate returned 'loss' as str: expected a number"),
        ({f"metric-{i}": 1.0 for i in range(1000)}, "TaskError: evaluate returned 1000 metrics"),
        ({"x" * 1000: 1.0}, "TaskError: evaluate returned 'xxx"),
        ({"seconds": 1.0}, "TaskError: evaluate returned the metric 'seconds'"),
    ],
)
def test_failed_evaluation_is_reported_as_an_error(metrics: Any, error: str) -> None:
    result = evaluate(WeightTask(metrics), None, weighing(0.0), CPU)
    assert result.metrics == {}
    assert result.error.startswith(error)


def test_model_may_change_while_its_snapshot_is_evaluated() -> None:
    merged = threading.Event()
    results: list[Any] = []

    class Waiting(WeightTask):
        def evaluate(self, model: Any, data: Any) -> Any:
            assert merged.wait(30)
            return super().evaluate(model, data)

    model = weighing(1.0)
    evaluator = Evaluator(Waiting(), 0, CPU, results.append)
    evaluator.start(3, model)
    model.parameters.fill_(99.0)
    assert results == []  # `start` returns before the evaluation ends
    merged.set()
    evaluator.join()
    (result,) = results
    assert (result.version, result.metrics["weight"]) == (3, 1.0)
    assert evaluator.snapshot is not None
    version, snapshot = evaluator.snapshot
    assert (version, snapshot.parameters.item()) == (3, 1.0)


def test_evaluations_are_reported_in_order() -> None:
    results: list[Any] = []
    evaluator = Evaluator(WeightTask(), 0, CPU, results.append)
    for version in (1, 2, 3):
        evaluator.start(version, weighing(version))
    evaluator.join()
    evaluator.join()
    assert [(r.version, r.metrics["weight"]) for r in results] == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_keyboard_interrupt_of_a_task_is_a_failed_evaluation() -> None:
    results: list[Any] = []
    evaluator = Evaluator(WeightTask(KeyboardInterrupt()), 0, CPU, results.append)
    evaluator.start(4, weighing(1.0))
    evaluator.join()
    (result,) = results
    assert (result.version, result.error.partition(";")[0]) == (4, "KeyboardInterrupt")
    assert evaluator.snapshot is None


def test_evaluate_has_eval_mode_and_no_gradients() -> None:
    seen = []

    class Looking(WeightTask):
        def evaluate(self, model: Any, data: Any) -> Any:
            seen.append((model.training, torch.is_grad_enabled()))
            return super().evaluate(model, data)

    evaluate(Looking(), 0, weighing(1.0), CPU)
    assert seen == [(False, False)]
    assert torch.is_grad_enabled()


def test_state_left_by_an_evaluation_does_not_reach_the_next() -> None:
    class Counting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.register_buffer("changed", torch.zeros(1), persistent=False)
            self.register_buffer("assigned", torch.zeros(1), persistent=False)

    class Keeping(WeightTask):
        """A task whose `model` returns the same module each time."""

        module = Counting()

        def model(self) -> Any:
            return self.module

        def evaluate(self, model: Any, data: Any) -> dict[str, Any]:
            model.train()
            model.changed += 1
            model.assigned = model.assigned + 1
            return {"changed": model.changed, "assigned": model.assigned}

    frame = Frame(Manifest.from_module(Counting()))
    Keeping.module.train()
    for _ in range(2):
        assert evaluate(Keeping(), 0, frame, CPU).metrics == {"changed": 1.0, "assigned": 1.0}
    assert Keeping.module.training


def test_test_data_that_raises_is_an_error_with_its_place() -> None:
    class Missing(Task):
        def test_data(self) -> None:
            raise FileNotFoundError("test.csv")

    with pytest.raises(TaskError, match=r"test_data\(\) raised FileNotFoundError: test.csv; in test_data \(test_eval"):
        load_test_data(Missing())


def test_target_without_test_data_is_refused() -> None:
    require_test_data({}, None)
    require_test_data({"accuracy": 0.9}, [1])
    with pytest.raises(ConfigurationError, match="nothing measures accuracy"):
        require_test_data({"accuracy": 0.9}, None)


# Schedule of evaluations


def evaluations(actions: list[Any]) -> list[Any]:
    return [action.version for action in of_kind(actions, Evaluate)]


def evaluated(run: Run, version: int) -> list[Any]:
    return evaluations(run.tell(Evaluated(version, {"loss": 1.0})))


def test_first_version_is_evaluated_and_then_every_nth() -> None:
    run = start("c0", evaluates=True, evaluation={"every_versions": 3})
    assert evaluations(run.actions) == [0]
    evaluated(run, 0)
    for _ in range(7):
        for version in evaluations(run.post("c0", 1.0)):
            evaluated(run, version)
    assert evaluations(run.actions) == [0, 3, 6]


def test_evaluations_run_one_at_a_time_on_the_newest_version() -> None:
    run = start("c0", evaluates=True, evaluation={"every_versions": 1})
    for _ in range(5):
        run.post("c0", 1.0)
    assert evaluations(run.actions) == [0]
    assert evaluated(run, 0) == [5]


def test_evaluation_by_time_waits_for_a_new_version() -> None:
    run = start("c0", evaluates=True, evaluation={"every_versions": "off", "every_seconds": 10.0})
    assert run.federation.next_deadline() == 10.0
    assert evaluations(run.tick(10.0)) == [0]
    evaluated(run, 0)
    assert run.federation.next_deadline() is None
    assert evaluations(run.tick(10.0)) == []  # version 0 has been measured
    run.post("c0", 1.0)
    assert evaluations(run.actions) == [0, 1]


def test_evaluation_by_time_is_due_an_interval_after_the_last() -> None:
    run = start("c0", evaluates=True, evaluation={"every_versions": "off", "every_seconds": 10.0})
    run.tick(10.0)
    evaluated(run, 0)
    assert evaluations(run.post("c0", 1.0)) == []
    assert run.federation.next_deadline() == 20.0
    assert evaluations(run.tick(9.9)) == []
    assert evaluations(run.tick(0.1)) == [1]


def test_due_evaluation_precedes_the_next_merge() -> None:
    """The evaluation is due when the header of an update arrives; a later event merges the update."""
    run = start("c0", evaluates=True, evaluation={"every_versions": "off", "every_seconds": 10.0})
    run.now = 10.0
    actions = run.post("c0", 1.0)
    wanted = [action for action in actions if isinstance(action, Evaluate | Commit)]
    assert [(type(action), action.version) for action in wanted] == [(Evaluate, 0), (Commit, 1)]


def test_successor_evaluates_its_first_version() -> None:
    run = start("c0", "c1", evaluates=True, aggregation={"strategy": "fedbuff", "buffer_size": 2})
    run.post("c0", 1.0)
    run.restart()  # `Run` checks that the label is the version
    run.post("c1", 1.0)
    assert evaluations(run.actions) == [0, 0]
    assert evaluated(run, 0) == [1]


def test_task_without_test_data_is_never_evaluated() -> None:
    run = start("c0", evaluation={"every_versions": 1, "every_seconds": 1.0})
    run.post("c0", 1.0)
    run.tick(100.0)
    assert evaluations(run.actions) == []
    assert run.federation.next_deadline() is None  # a deadline that no evaluation moves would make the loop busy-wait


def test_evaluation_that_failed_is_repeated_after_a_pause() -> None:
    run = start("c0", evaluates=True)
    evaluated(run, 0)
    run.post("c0", 1.0)
    for pause, version in ((5.0, 1), (10.0, 2), (20.0, 3)):
        assert evaluations(run.actions)[-1] == version
        run.tell(Evaluated(version, {}, "OSError: stale"))
        run.post("c0", 1.0)
        assert run.federation.next_deadline() == run.now + pause
        assert evaluations(run.tick(pause - 0.1)) == []
        assert evaluations(run.tick(0.1)) == [version + 1]


def test_newest_evaluation_is_kept() -> None:
    run = start("c0", evaluates=True)
    evaluated(run, 0)
    assert run.federation.evaluated == Evaluated(0, {"loss": 1.0})


def test_evaluated_model_draws_what_the_workers_model_draws() -> None:
    class Projected(WeightTask):
        def model(self) -> Any:
            module = super().model()
            module.register_buffer("projection", torch.rand(3), persistent=False)
            return module

        def evaluate(self, model: Any, data: Any) -> dict[str, Any]:
            return {"first": float(model.projection[0])}

    drawn = [evaluate(Projected(), None, weighing(0.0), CPU, seed).metrics["first"] for seed in (7, 7, 8)]
    assert drawn[0] == drawn[1] != drawn[2]

"""Whatever the task's code raises is a failure of that job, or of loading that client, and is reported at once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from fedqueue import Task
from fedqueue.config.client import Client
from fedqueue.errors import LoadFailed, TaskError
from fedqueue.exception_text import exception_text, exception_with_place
from fedqueue.metrics import as_metrics
from fedqueue.protocol.messages import Ending, Unavailable, read
from fedqueue_worker.process import Worker, new_token
from tests.support.sample_run import SampleRun
from tests.support.training_site import TrainingSite

pytestmark = pytest.mark.usefixtures("logs", "process_restored")


class NoText(Exception):
    def __str__(self) -> str:
        raise RuntimeError


RAISED = [
    (SystemExit(3), "SystemExit: 3"),
    (KeyboardInterrupt(), "KeyboardInterrupt"),
    (GeneratorExit(), "GeneratorExit"),
    (ValueError("caf\udce9 \x1b[31m\x00"), "ValueError: caf\\udce9 \\x1b[31m\\x00"),
    (NoText(), "NoText: (its text cannot be made: RuntimeError)"),
    (ValueError("x" * 100_000), "ValueError: " + "x" * 500),
]
NAMES = ["exit", "interrupt", "generator-exit", "surrogate", "no-text", "long"]


@pytest.mark.parametrize(("error", "text"), RAISED, ids=NAMES)
def test_exception_has_a_text_that_can_be_sent(error: Any, text: str) -> None:
    assert exception_text(error) == text
    assert exception_text(error).encode()


@pytest.mark.parametrize(("error", "text"), RAISED, ids=NAMES)
def test_job_whose_training_raises_ends_as_failed(fake_run: SampleRun, error: Any, text: str) -> None:
    site = TrainingSite(fake_run)

    def raising(progress: Any) -> None:
        raise error.with_traceback(None)

    site.task.during = raising
    [entry] = site.train()
    ending = read(Ending, entry.body)
    assert ending.reason == "failed"
    assert ending.error.startswith(f"{text}; in raising (test_failing_task.py:")
    assert site.runner.without_update() == {"c0": f"failed: {ending.error}"}


def test_accepted_update_is_a_contribution(fake_run: SampleRun) -> None:
    site = TrainingSite(fake_run)
    site.train()
    assert site.runner.without_update() == {}


def test_traceback_of_a_failure_is_logged_once(fake_run: SampleRun, logs: list[Any]) -> None:
    site = TrainingSite(fake_run)

    def raising(progress: Any) -> None:
        raise ValueError("no")

    site.task.during = raising
    site.train(1)
    site.train(2)
    failures = [entry for entry in logs if entry["event"] == "training failed"]
    assert [bool(entry["exc_info"]) for entry in failures] == [True, False]


def test_place_names_the_users_own_frame_first() -> None:
    library: dict[Any, Any] = {}
    exec(compile("def deep(n):\n    return deep(n - 1) if n else 1 / 0", "<library>", "exec"), library)
    with pytest.raises(ZeroDivisionError) as caught:
        library["deep"](9)
    places = exception_with_place(caught.value).rpartition("; in ")[2].split(" < ")
    assert places[0].startswith("test_place_names_the_users_own_frame_first (test_failing_task.py:")
    assert places[1:] == ["deep (<library>:2)"] * 2


def test_error_that_fedqueue_raises_on_purpose_has_no_place() -> None:
    with pytest.raises(TaskError) as caught:
        as_metrics({"mine": "good"}, "fit")
    assert caught.value.__traceback__ is not None
    own = caught.value.with_traceback(caught.value.__traceback__.tb_next)  # without the frame of this test
    assert exception_with_place(own) == exception_text(own)
    assert "'mine' as str" in exception_text(own)


# Loading


class Rows(Task):
    def __init__(self, broken: set[Any], error: Any) -> None:
        self.broken, self.error = broken, error
        self.hook: Callable[[], object] = lambda: None

    def model(self) -> Any:
        return torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))

    def train_data(self, client: Client) -> TensorDataset:
        self.hook()
        if client.id in self.broken:
            raise self.error.with_traceback(None)
        return TensorDataset(torch.randn(10, 3), torch.randint(0, 2, (10,)))


def serve(run: SampleRun, task: Rows, clients: list[str], **options: Any) -> tuple[Any, ...]:
    worker = Worker(run.config, task, run.worker(new_token()))
    return worker.run([[client] for client in clients], **options), worker


def reports(run: SampleRun) -> list[Any]:
    return [(entry.kind, entry.client) for entry in run.coordinator.unacknowledged()]


@pytest.mark.parametrize(("error", "text"), RAISED, ids=NAMES)
def test_unloadable_client_is_reported_and_others_serve(fake_run: SampleRun, error: Any, text: str) -> None:
    serve(fake_run, Rows({"client-1"}, error), ["client-0", "client-1", "client-2"], burst=True)
    [report] = [entry for entry in fake_run.coordinator.unacknowledged() if entry.kind == "unavailable"]
    unavailable = read(Unavailable, report.body)
    assert unavailable.client == report.client == "client-1"
    assert unavailable.error.startswith(f"{text}; in train_data (test_failing_task.py:")
    assert sorted(client for kind, client in reports(fake_run) if kind == "joined") == ["client-0", "client-2"]


def test_no_client_is_registered_while_another_one_loads(fake_run: SampleRun) -> None:
    task = Rows(set(), None)
    seen = []
    task.hook = lambda: seen.append(reports(fake_run))
    serve(fake_run, task, ["client-0", "client-1", "client-2"], burst=True)
    assert seen == [[], [], []]


def test_worker_without_a_loaded_client_fails(fake_run: SampleRun) -> None:
    with pytest.raises(LoadFailed, match="client-0: OSError: no disk; in train_data"):
        serve(fake_run, Rows({"client-0"}, OSError("no disk")), ["client-0"])
    assert reports(fake_run) == [("unavailable", "client-0")]


def test_exit_of_the_tasks_model_is_an_error_of_the_task(fake_run: SampleRun, monkeypatch: pytest.MonkeyPatch) -> None:
    task = Rows(set(), None)
    monkeypatch.setattr(task, "model", lambda: sys.exit("bye"))
    with pytest.raises(TaskError, match=r"Rows.model\(\): SystemExit: bye"):
        serve(fake_run, task, ["client-0"])

"""Loading and constructing a user's task, and the defaults of a task."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from fedqueue import Client, Progress, Task, TrainResult
from fedqueue.config.training import TrainingConfig
from fedqueue.errors import TaskError
from fedqueue.task import load_task

SOURCE = """
from fedqueue import Task
from neighbour import ANSWER

class Mine(Task):
    def __init__(self, answer=ANSWER):
        if answer == "bad":
            raise ValueError("no such answer")
        self.answer = answer

class Other(Task):
    pass

class NoTask:
    pass
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [n for n in sys.modules if n.startswith(("fedqueue.config.own_code.", "neighbour"))]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "mine.py").write_text(SOURCE)
    (tmp_path / "neighbour.py").write_text("ANSWER = 42\n")
    yield tmp_path
    for name in [n for n in sys.modules if n.startswith(("fedqueue.config.own_code.", "neighbour"))]:
        del sys.modules[name]


def problem(entrypoint: str, folder: Path, **options: Any) -> str:
    with pytest.raises(TaskError) as caught:
        load_task(entrypoint, options, folder)
    return str(caught.value)


# Loading


def test_task_file_is_relative_to_the_configuration(folder: Path) -> None:
    assert vars(load_task("mine.py:Mine", {}, folder))["answer"] == 42
    (folder / "inner").mkdir()
    assert vars(load_task("../mine.py:Mine", {}, folder / "inner"))["answer"] == 42


def test_absolute_task_path_is_found(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert vars(load_task(f"{folder / 'mine.py'}:Mine", {}, tmp_path_factory.mktemp("elsewhere")))["answer"] == 42


def test_task_in_a_module_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(folder))
    assert vars(load_task("mine:Mine", {"answer": 1}, Path("/nowhere")))["answer"] == 1


def test_options_are_the_constructors_keyword_arguments(folder: Path) -> None:
    assert vars(load_task("mine.py:Mine", {"answer": "given"}, folder))["answer"] == "given"


@pytest.mark.parametrize("entrypoint", ["mine.py", ":Mine", "mine.py:", "mine.py:not a name", "", "mine.py:Mine:"])
def test_malformed_entrypoint_error_shows_the_expected_form(folder: Path, entrypoint: str) -> None:
    message = problem(entrypoint, folder)
    assert message == f"task.entrypoint = {entrypoint!r}: expected path/to/task.py:Class or package.module:Class"


def test_missing_file_is_named(folder: Path) -> None:
    assert problem("absent.py:Mine", folder) == f"task.entrypoint: there is no file {folder / 'absent.py'}"


def test_missing_module_is_named(folder: Path) -> None:
    assert problem("no.such.module:Mine", folder).startswith("task.entrypoint: importing no.such.module: Module")


@pytest.mark.parametrize("module", [".relative", "two words", "a..b"])
def test_invalid_module_name_is_an_error(folder: Path, module: str) -> None:
    assert problem(f"{module}:Mine", folder).startswith(f"task.entrypoint: importing {module}: ")


@pytest.mark.parametrize("name", ["Absent", "NoTask", "ANSWER"])
def test_missing_task_class_error_lists_the_available_ones(folder: Path, name: str) -> None:
    assert problem(f"mine.py:{name}", folder) == f"mine.py has no Task named {name!r}; it has: Mine, Other"


def test_file_without_a_task_is_an_error(folder: Path) -> None:
    assert problem("neighbour.py:T", folder) == "neighbour.py has no Task named 'T'; it has: none"


@pytest.mark.parametrize("how", ["file", "module"])
def test_exception_of_the_task_module_is_shown_as_the_cause(
    folder: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    (folder / "halfway.py").write_text("import neighbour\nraise RuntimeError('no licence')\n")
    monkeypatch.syspath_prepend(str(folder))
    with pytest.raises(TaskError, match="RuntimeError: no licence") as caught:
        load_task("halfway.py:T" if how == "file" else "halfway:T", {}, folder)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert not [name for name in sys.modules if "halfway" in name], "a partly executed module stayed in sys.modules"


@pytest.mark.parametrize(
    ("options", "shown"),
    [({"answr": 1}, "TypeError: .*answr"), ({"answer": "bad"}, "ValueError: no such answer")],
)
def test_exception_of_the_constructor_is_shown_with_its_options(
    folder: Path, options: dict[str, Any], shown: str
) -> None:
    with pytest.raises(TaskError, match=rf"Mine\(\*\*task\.options\) with .*{shown}") as caught:
        load_task("mine.py:Mine", options, folder)
    assert caught.value.__cause__ is not None


# Required and optional methods


@pytest.mark.parametrize(("method", "arguments"), [("model", ()), ("train_data", (Client("c"),))])
def test_missing_required_method_is_named(method: str, arguments: tuple[Any, ...]) -> None:
    class Empty(Task):
        pass

    with pytest.raises(NotImplementedError, match=f"Empty must define {method}"):
        getattr(Empty(), method)(*arguments)


def test_task_without_test_data_is_not_evaluated() -> None:
    assert Task().test_data() is None


class Fixed(torch.nn.Module):
    """A model whose scores do not depend on training."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.trained_in: list[Any] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.trained_in.append(self.training)
        return self.scale * torch.stack([x[:, 0], -x[:, 0]], dim=1)


def test_default_loss_is_the_cross_entropy() -> None:
    x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([0, 1])
    expected = -(torch.tensor([2.0, -4.0]).sigmoid().log()).mean()
    torch.testing.assert_close(Task().loss(Fixed(), (x, y)), expected)


def test_default_evaluation_is_loss_and_accuracy() -> None:
    x = torch.cat([torch.ones(700, 1), -torch.ones(100, 1)])  # more than one batch, of different sizes
    y = torch.zeros(800, dtype=torch.int64)
    model = Fixed()
    metrics = Task().evaluate(model, TensorDataset(x, y))
    assert metrics["accuracy"] == 700 / 800
    right, wrong = (-torch.tensor(v).sigmoid().log() for v in (2.0, -2.0))
    assert metrics["loss"] == pytest.approx(float(right * 700 + wrong * 100) / 800)
    assert not any(model.trained_in)
    assert model.scale.grad is None


def test_evaluation_on_empty_data_is_an_error() -> None:
    with pytest.raises(TaskError, match=r"test_data\(\) is empty"):
        Task().evaluate(Fixed(), TensorDataset(torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64)))


def test_examples_are_counted_by_len() -> None:
    assert Task().num_examples([1, 2, 3]) == 3
    with pytest.raises(TaskError, match="generator has no len"):
        Task().num_examples(x for x in [0])


def test_default_fit_trains_and_reports_the_number_of_examples() -> None:
    data = TensorDataset(torch.ones(6, 1), torch.zeros(6, dtype=torch.int64))
    calls = []
    fit = Task().fit(Fixed(), data, TrainingConfig(batch_size=4, device="cpu"), Progress(lambda: calls.append(1)))
    assert isinstance(fit, TrainResult)
    assert (fit.num_examples, len(calls)) == (6, 2)

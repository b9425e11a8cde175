"""The default local training, compared with gradients computed by hand."""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from fedqueue.config.training import TrainingConfig
from fedqueue.errors import ConfigurationError, JobClosed, TaskError
from fedqueue.task import Task
from fedqueue.training import choose_device, make_optimizer, train


class Weight(torch.nn.Module):
    """A model of one parameter w, which predicts w · x."""

    def __init__(self, w: float = 0.0) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([w], dtype=torch.float64))
        self.modes: list[bool] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.modes.append(self.training)
        return self.w * x


class Squares(Task):
    """A task with loss ½ (w·x − y)², whose gradient is (w·x − y)·x, averaged over the batch."""

    def __init__(self) -> None:
        self.batches: list[Any] = []

    def loss(self, model: torch.nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
        x, y = batch
        self.batches.append(x.tolist())
        half_square: torch.Tensor = 0.5 * ((model(x) - y) ** 2).mean()
        return half_square


def points(*pairs: tuple[Any, ...]) -> TensorDataset:
    return TensorDataset(*(torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True)))


def settings(**fields: Any) -> TrainingConfig:
    return TrainingConfig(**{"device": "cpu", "learning_rate": 0.1, "batch_size": 8, **fields})


def run(task: Any, model: Weight, data: Any, **fields: Any) -> tuple[Any, ...]:
    calls = []
    fit = train(task, model, data, settings(**fields), lambda: calls.append(float(model.w.detach())))
    return fit, calls


def test_one_epoch_of_one_batch_is_one_gradient_step() -> None:
    model = Weight(1.0)
    fit, calls = run(Squares(), model, points((1.0, 3.0), (2.0, 0.0)))
    # gradient = mean((1−3)·1, (2−0)·2) = (−2 + 4) / 2 = 1
    assert calls == [pytest.approx(0.9)]
    # loss = ½ · mean(4, 4)
    assert fit.metrics == {"loss": pytest.approx(2.0)}
    assert fit.num_examples == 2


def test_epochs_are_passes_over_all_examples() -> None:
    task = Squares()
    _, calls = run(task, Weight(), points((1.0, 1.0), (2.0, 1.0), (3.0, 1.0)), local_epochs=4, batch_size=2)
    assert len(calls) == 8
    assert [sorted(task.batches[2 * i] + task.batches[2 * i + 1]) for i in range(4)] == [[1.0, 2.0, 3.0]] * 4


def test_examples_come_in_an_order_that_follows_the_seed() -> None:
    def order(seed: Any) -> Any:
        task = Squares()
        torch.manual_seed(seed)
        run(task, Weight(), points(*((float(i), 0.0) for i in range(20))), batch_size=20)
        return task.batches[0]

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert order(1) != sorted(order(1))


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 6])
def test_local_steps_count_batches_over_repeated_passes(steps: int) -> None:
    task = Squares()
    _, calls = run(
        task, Weight(), points((1.0, 1.0), (2.0, 1.0), (3.0, 1.0)), local_steps=steps, local_epochs=9, batch_size=2
    )
    assert len(calls) == len(task.batches) == steps


def test_proximal_term_pulls_towards_the_initial_parameters() -> None:
    model = Weight(1.0)
    fit, calls = run(Squares(), model, points((1.0, 3.0)), local_steps=2, proximal_mu=5.0)
    # step 1: w = base, so the term vanishes: gradient −2 → w = 1.2
    # step 2: gradient (1.2 − 3) + 5 · (1.2 − 1) = −0.8 → w = 1.28
    assert calls == [pytest.approx(1.2), pytest.approx(1.28)]
    # the metric is the task's own loss: ½·4 and ½·1.8²
    assert fit.metrics["loss"] == pytest.approx((2.0 + 1.62) / 2)


def test_proximal_gradient_matches_autograd() -> None:
    """The reference is autograd of f(x) + μ/2 ‖x − x_b‖² in float64."""
    mu, rate, data = 0.7, 0.05, points((1.0, 2.0), (3.0, -1.0))
    model = Weight(0.4)
    run(Squares(), model, data, local_epochs=6, proximal_mu=mu, learning_rate=rate)
    w, base = torch.tensor(0.4, dtype=torch.float64), 0.4
    x, y = data.tensors
    for _ in range(6):
        w = w - rate * (((w * x - y) * x).mean() + mu * (w - base))
    assert model.w.item() == pytest.approx(float(w), abs=1e-12)


def test_progress_runs_after_each_batch_and_may_end_training() -> None:
    model, calls = Weight(), []

    def progress() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise JobClosed("no longer ours")

    with pytest.raises(JobClosed):
        train(Squares(), model, points(*[(1.0, 1.0)] * 9), settings(batch_size=1), progress)
    assert len(calls) == 2


def test_model_trains_in_training_mode() -> None:
    model = Weight()
    model.eval()
    run(Squares(), model, points((1.0, 1.0)))
    assert model.modes == [True]


def test_gradients_are_reset_between_batches() -> None:
    model = Weight(0.0)
    _, calls = run(Squares(), model, points((1.0, 1.0)), local_epochs=2)
    assert calls == [pytest.approx(0.1), pytest.approx(0.19)]


def test_local_steps_on_empty_data_are_an_error() -> None:
    empty = TensorDataset(torch.zeros(0), torch.zeros(0))
    with pytest.raises(TaskError, match="no examples"):
        run(Squares(), Weight(), empty, local_steps=3)


# Formats of batches


class Dictionaries(Dataset[Any]):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, i: int) -> dict[str, Any]:
        number = torch.tensor(i)
        return {"x": number.float(), "more": [number, "text"], "pair": (number, number)}


class Named(typing.NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


class Rows(Dataset[Any]):
    def __init__(self, row: Any) -> None:
        self.row = row

    def __len__(self) -> int:
        return 2

    def __getitem__(self, i: int) -> Any:
        return self.row


@pytest.mark.parametrize(
    ("data", "form"),
    [
        (Dictionaries(), lambda b: b["x"].shape == (3,) and b["more"][1] == ("text",) * 3 and len(b["pair"]) == 2),
        (Rows(torch.zeros(4)), lambda b: b.shape == (2, 4)),
        (Rows((torch.zeros(1), torch.ones(1))), lambda b: len(b) == 2),
        (Rows(Named(torch.zeros(1), torch.ones(1))), lambda b: b.y.shape == (2, 1)),
    ],
    ids=["dictionary", "tensor", "tuple", "named tuple"],
)
def test_batch_reaches_the_loss_in_its_own_format(data: Dictionaries | Rows, form: Callable[..., Any]) -> None:
    seen = []

    class AnyTask(Task):
        def loss(self, model: Any, batch: Any) -> Any:
            seen.append(batch)
            return model(torch.ones(1)).sum()

    run(AnyTask(), Weight(), data)
    assert form(seen[0])


def test_model_and_batches_move_to_the_device() -> None:
    """Every machine has the device `meta`, whose tensors have shapes but no values."""

    class Shapes(Task):
        def loss(self, model: Any, batch: Any) -> torch.Tensor:
            assert {t.device.type for t in (batch["x"], *batch["pair"], model.w)} == {"meta"}
            raise JobClosed("far enough")

    with pytest.raises(JobClosed):
        run(Shapes(), Weight(), Dictionaries(), device="meta")


@pytest.mark.parametrize("available", [True, False])
def test_auto_device_is_the_accelerator_if_there_is_one(monkeypatch: pytest.MonkeyPatch, available: bool) -> None:
    found = torch.device("cuda") if available else None
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
    assert choose_device("auto") == (found or torch.device("cpu"))


def test_device_is_found_by_its_name() -> None:
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    assert choose_device("cpu") == torch.device("cpu")


def test_unknown_device_is_an_error_that_names_the_key() -> None:
    with pytest.raises(ConfigurationError, match=r"training\.device = 'gpu': not a torch device; use auto, cpu"):
        choose_device("gpu")


# Optimizers by name


@pytest.mark.parametrize(
    ("name", "cls"),
    [("sgd", "SGD"), ("Adam", "Adam"), ("ADAMW", "AdamW"), ("adagrad", "Adagrad"), ("rmsprop", "RMSprop")],
)
def test_optimizer_is_found_by_its_name_in_any_case(name: str, cls: str) -> None:
    made = make_optimizer(name, Weight().parameters(), 0.25, {"weight_decay": 0.5})
    assert type(made) is getattr(torch.optim, cls)
    assert (made.defaults["lr"], made.defaults["weight_decay"]) == (0.25, 0.5)


@pytest.mark.parametrize(
    ("section", "key"), [("training", "training.optimizer"), ("server_optimizer", "server_optimizer.name")]
)
def test_unknown_optimizer_error_names_the_key_and_the_choices(section: str, key: str) -> None:
    with pytest.raises(
        ConfigurationError, match=rf"^{key} = 'sdg': not an optimizer of torch\.optim; known: .*adam, .*sgd"
    ) as caught:
        make_optimizer("sdg", Weight().parameters(), 0.1, {}, key=section)
    assert "optimizer," not in caught.value.hint


@pytest.mark.parametrize("options", [{"momentun": 0.9}, {"momentum": -1.0}])
def test_refused_optimizer_options_are_an_error_with_the_key(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"training\.optimizer_options = \{'moment.*: torch\.optim\.sgd: "):
        make_optimizer("sgd", Weight().parameters(), 0.1, options)


class Singly(torch.utils.data.Dataset[Any]):
    """A dataset of the same examples, fetched one at a time."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> Any:
        return len(self.data)

    def __getitem__(self, i: Any) -> Any:
        return self.data[i]


class Doubled(TensorDataset):
    """A TensorDataset whose examples differ from its tensors."""

    def __getitem__(self, i: Any) -> tuple[Any, ...]:
        x, y = (column[i] for column in self.tensors)
        return 2 * x, y


@pytest.mark.parametrize("kind", [TensorDataset, Doubled])
def test_batched_and_single_fetches_train_the_same_bits(kind: Any) -> None:
    torch.manual_seed(0)
    data = kind(torch.randn(50, 3), torch.randint(0, 2, (50,)))
    models = []
    for given in (data, Singly(data)):
        torch.manual_seed(1)
        model = torch.nn.Linear(3, 2)
        train(Task(), model, given, TrainingConfig(batch_size=8, local_epochs=3, device="cpu"), lambda: None)
        models.append(model.weight)
    assert torch.equal(*models)

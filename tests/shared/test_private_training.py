"""DP-SGD in the default training: gradients of single rows, clipping, noise, and what may not leave."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import structlog
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fedqueue import Client, Progress, Task, TrainResult
from fedqueue.config.privacy import ExamplePrivacyConfig
from fedqueue.config.training import TrainingConfig
from fedqueue.errors import ConfigurationError, TaskError
from fedqueue.local_model import LocalModel
from fedqueue.local_update import compute_update
from fedqueue.privacy.spending import charge_of_job, countable_rows
from fedqueue.private_training import check_example_privacy, rows_of_steps, simulated_key
from fedqueue.protocol.messages import Order, Update
from fedqueue.row_gradients import RowGradients
from fedqueue.tensors.frame import Frame
from fedqueue.tensors.manifest import Manifest

CPU = torch.device("cpu")
ROWS = 50
KEY = bytes(32)


@pytest.fixture(autouse=True)
def logs() -> Iterator[Any]:
    with structlog.testing.capture_logs() as captured:
        yield captured


def rows(count: int = ROWS) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 16, generator=generator)
    return TensorDataset(inputs, (inputs[:, 0] > 0).long())


def perceptron() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))


def convolution() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Unflatten(1, (1, 4, 4)), torch.nn.Conv2d(1, 4, 3), torch.nn.GroupNorm(2, 4), torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.Linear(16, 2),
    )  # fmt: skip


class Tied(torch.nn.Module):
    """Two layers with one weight, and one that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.last = (torch.nn.Linear(16, n, bias=False) for n in (16, 16, 2))
        self.two.weight = self.one.weight
        self.last.weight.requires_grad_(False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.last(self.two(self.one(inputs).tanh()))  # type: ignore[no-any-return]


class Plain(Task):
    def __init__(self, make: Any = perceptron) -> None:
        self.make = make

    def model(self) -> torch.nn.Module:
        torch.manual_seed(0)
        module: torch.nn.Module = self.make()
        return module

    def train_data(self, client: Client) -> Any:
        return rows()


def gradients_by_hand(task: Task, model: torch.nn.Module, data: Any) -> torch.Tensor:
    """Backward on batches of one row, with the task's own collate_fn: float32 (rows, parameters)."""
    found = []
    for row in data:
        model.zero_grad()
        torch.autograd.backward(task.loss(model, task.collate_fn([row])))
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    return torch.stack(found)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("make", [perceptron, convolution, Tied])
def test_gradients_are_those_of_single_rows(make: Any, together: bool) -> None:
    task, data = Plain(make), rows(12)
    model = task.model()
    found = RowGradients(task, model, data, CPU, together).of(np.arange(12))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), gradients_by_hand(task, model, data), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("make", [perceptron, convolution])
def test_gradients_are_those_of_opacus(make: Any) -> None:
    opacus = pytest.importorskip("opacus")
    task, data = Plain(make), rows(12)
    model = task.model()
    found = RowGradients(task, model, data, CPU, together=True).of(np.arange(12))
    wrapped = opacus.GradSampleModule(model, loss_reduction="sum")
    inputs, labels = data.tensors
    torch.autograd.backward(torch.nn.functional.cross_entropy(wrapped(inputs), labels, reduction="sum"))
    expected = torch.cat([p.grad_sample.reshape(12, -1) for p in wrapped.parameters()], 1)
    torch.testing.assert_close(found.float(), expected, atol=1e-6, rtol=1e-5)


class Pairs(Dataset[Any]):
    """Rows that are mappings, of different lengths if `ragged`."""

    def __init__(self, ragged: bool) -> None:
        self.ragged = ragged

    def __len__(self) -> int:
        return 6

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        x = torch.ones(16 if not self.ragged else 16 * (1 + row % 2)) * (row - 2.5)
        return {"x": x, "y": torch.tensor(row % 2)}


class Mapped(Plain):
    def loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        x = batch["x"].reshape(-1, 16)
        return torch.nn.functional.cross_entropy(model(x), batch["y"].repeat(len(x)))


@pytest.mark.parametrize("ragged", [False, True])
def test_rows_may_be_mappings_of_different_lengths(ragged: bool) -> None:
    task, data = Mapped(), Pairs(ragged)
    model = task.model()
    gradients = RowGradients(task, model, data, CPU, together=True)
    expected = gradients_by_hand(task, model, [data[i] for i in range(6)])
    torch.testing.assert_close(gradients.of(np.arange(6)).float(), expected, atol=1e-6, rtol=1e-5)
    assert gradients._together is not ragged


def test_loss_that_vmap_cannot_take_is_computed_row_by_row(logs: Any) -> None:
    class Branching(Plain):
        def loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
            loss = super().loss(model, batch)
            return loss * (2.0 if float(loss.detach()) > 0.7 else 1.0)

    task, data = Branching(), rows(12)
    model = task.model()
    found = RowGradients(task, model, data, CPU, together=True).of(np.arange(12))
    torch.testing.assert_close(found.float(), gradients_by_hand(task, model, data), atol=1e-6, rtol=1e-5)
    assert any("row by row" in line["event"] for line in logs)


@pytest.mark.parametrize("together", [True, False])
def test_no_row_adds_more_than_the_norm(together: bool) -> None:
    task, data = Plain(), rows(20)
    data.tensors[0][3] *= 30
    data.tensors[1][3] = 1 - data.tensors[1][3]
    model = task.model()
    gradients = RowGradients(task, model, data, CPU, together)
    single = gradients.of(np.arange(20))
    clip = float(single.norm(dim=1).median())
    expected = sum(g * (clip / max(float(g.norm()), clip)) for g in single)
    torch.testing.assert_close(gradients.clipped_sum(np.arange(20), clip), expected)
    for row in range(20):
        assert gradients.clipped_sum(np.array([row]), clip).norm() <= clip * (1 + 1e-9)


def test_row_without_finite_gradient_adds_nothing() -> None:
    task, data = Plain(), rows(5)
    data.tensors[0][2] = torch.nan
    gradients = RowGradients(task, task.model(), data, CPU, together=True)
    total = gradients.clipped_sum(np.arange(5), 1.0)
    torch.testing.assert_close(total, gradients.clipped_sum(np.array([0, 1, 3, 4]), 1.0))
    assert gradients.clipped_sum(np.array([], np.int64), 1.0).abs().max() == 0


# A whole job


class Site:
    """Trains jobs of one client, as a worker and the simulation do."""

    def __init__(self, task: Task, training: dict[str, Any] | None = None, **privacy: Any) -> None:
        settings = {"max_grad_norm": 1.0, "noise_multiplier": 1.0, "delta": 1e-5, **privacy}
        self.task, self.data = task, task.train_data(Client("c"))
        self.training = TrainingConfig(**{"device": "cpu", "batch_size": 10, "learning_rate": 0.5, **(training or {})})
        self.privacy = ExamplePrivacyConfig(**settings)
        module = task.model()
        self.manifest = Manifest.from_module(module)
        self.base = Frame(self.manifest)
        self.base.read(module)
        self.model = LocalModel(task, module, self.manifest)
        self.order = Order(run="r", job="j", client="c", seed=5, training=self.training, privacy=self.privacy)

    def job(self, key: bytes = KEY) -> tuple[Update, torch.Tensor]:
        """The header of an update, and the delta of its parameters."""
        local, progress = Frame(self.manifest), self.model.progress(Client("c"), 0, lambda: None)
        update = compute_update(self.task, self.model, self.data, self.order, self.base, local, progress, key)
        return update, local.parameters.clone()


ONE_STEP: dict[str, Any] = {"local_steps": 1, "batch_size": ROWS}  # every row, so that only the noise is random


def test_step_is_the_clipped_mean_with_noise_of_the_stated_size() -> None:
    """Over 300 keys, each parameter's change has mean −η · Σ clipped / n and deviation η · z · C / n."""
    site = Site(Plain(), ONE_STEP, max_grad_norm=0.2, noise_multiplier=3.0)
    model = site.task.model()
    single = gradients_by_hand(site.task, model, site.data).double()
    clipped = single * torch.clamp(0.2 / single.norm(dim=1, keepdim=True), max=1.0)
    expected = -0.5 * clipped.sum(0) / ROWS
    deltas = torch.stack([site.job(os.urandom(32))[1] for _ in range(300)]).double()
    deviation = 0.5 * 3.0 * 0.2 / ROWS
    assert float((deltas - expected).std()) == pytest.approx(deviation, rel=0.02)
    assert float((deltas.mean(0) - expected).abs().max()) < 5 * deviation / 300**0.5


def test_noise_does_not_depend_on_the_seed_of_the_order() -> None:
    """The coordinator chooses that seed, and could subtract noise that followed from it."""
    site = Site(Plain())
    first, second = site.job(os.urandom(32))[1], site.job(os.urandom(32))[1]
    assert not torch.equal(first, second)
    again = site.job(KEY)[1]
    site.order = site.order.model_copy(update={"seed": 6})
    assert torch.equal(again, site.job(KEY)[1]), "nothing but the key is random"


def test_divisor_is_the_expected_batch_and_empty_ones_add_noise() -> None:
    site = Site(Plain(), {"local_steps": 4, "batch_size": 1}, noise_multiplier=50.0, max_grad_norm=1e-3)
    deltas = torch.cat([site.job(os.urandom(32))[1] for _ in range(20)]).double()
    assert float(deltas.std()) == pytest.approx(0.5 * 50.0 * 1e-3 * 4**0.5, rel=0.05), "each of four steps has noise"


def test_header_has_no_metrics_and_the_number_of_all_rows() -> None:
    update, _ = Site(Plain()).job()
    assert update.metrics == {}
    assert update.examples == ROWS


@pytest.mark.parametrize("make", [perceptron, convolution, Tied])
def test_both_backends_give_the_same_update(make: Any) -> None:
    deltas = [Site(Plain(make), backend=backend).job()[1] for backend in ("vmap", "loop")]
    torch.testing.assert_close(*deltas, atol=1e-6, rtol=1e-5)


def test_training_learns_despite_the_noise() -> None:
    site = Site(Plain(), {"local_steps": 40, "learning_rate": 1.0}, noise_multiplier=0.5)
    _, delta = site.job()
    module = site.task.model()
    with torch.no_grad():
        vector = torch.nn.utils.parameters_to_vector(module.parameters()) + delta
        torch.nn.utils.vector_to_parameters(vector, module.parameters())
        accuracy = (module(site.data.tensors[0]).argmax(1) == site.data.tensors[1]).float().mean()
    assert accuracy > 0.85


def test_proximal_term_pulls_back_to_the_base() -> None:
    without, with_term = (
        Site(Plain(), {"local_steps": 30, "proximal_mu": mu}, noise_multiplier=0.001).job()[1].norm()
        for mu in (0.0, 1.5)
    )
    assert with_term < 0.8 * without


def test_optimizer_and_its_options_act_on_the_noisy_gradient() -> None:
    site = Site(Plain(), {**ONE_STEP, "optimizer": "adam", "learning_rate": 0.01})
    assert float(site.job()[1].abs().max()) == pytest.approx(0.01, rel=1e-3), "Adam's first step has length η"


def test_rows_of_steps_are_those_that_the_job_reads() -> None:
    read = []

    class Watched(TensorDataset):
        def __getitem__(self, row: Any) -> Any:
            read.append(row)
            return tuple(tensor[row] for tensor in self.tensors)

    site = Site(Plain(), {"local_steps": 3})
    site.data = Watched(*rows().tensors)
    site.job()
    paid = charge_of_job(site.privacy, site.training, ROWS)
    assert sorted(set(read)) == rows_of_steps(KEY, paid, ROWS).tolist()


def test_simulated_keys_differ_from_job_to_job_and_run_to_run() -> None:
    order = Site(Plain()).order
    others = [order.model_copy(update=change) for change in ({"seed": 6}, {"client": "d"}, {"run": "s"})]
    keys = [simulated_key(0, order), simulated_key(1, order), *(simulated_key(0, other) for other in others)]
    assert len(set(keys)) == len(keys)


# A fit of the task's own


class Around(Plain):
    """Evaluates before and after the default training, and returns what it found."""

    def fit(self, model: torch.nn.Module, data: Any, config: TrainingConfig, progress: Progress) -> TrainResult:
        fit = super().fit(model, data, config, progress)
        return TrainResult(3, {**fit.metrics, "mean_age": 61.3})


class TrainsAfter(Plain):
    def fit(self, model: torch.nn.Module, data: Any, config: TrainingConfig, progress: Progress) -> TrainResult:
        fit = super().fit(model, data, config, progress)
        with torch.no_grad():
            next(model.parameters()).add_(data.tensors[0].mean())
        return fit


class TrainsBefore(Plain):
    def fit(self, model: torch.nn.Module, data: Any, config: TrainingConfig, progress: Progress) -> TrainResult:
        with torch.no_grad():
            next(model.parameters()).add_(data.tensors[0].mean())
        return super().fit(model, data, config, progress)


class TrainsTwice(Plain):
    def fit(self, model: torch.nn.Module, data: Any, config: TrainingConfig, progress: Progress) -> TrainResult:
        super().fit(model, data, config, progress)
        return super().fit(model, data, config, progress)


class Bypasses(Plain):
    def fit(self, model: torch.nn.Module, data: Any, config: TrainingConfig, progress: Progress) -> TrainResult:
        return super().fit(model, data, config, Progress())


class Replaces(Plain):
    def fit(self, model: torch.nn.Module, data: Any, config: TrainingConfig, progress: Progress) -> TrainResult:
        return TrainResult(len(data))


class TrainsLonger(Plain):
    def fit(self, model: torch.nn.Module, data: Any, config: TrainingConfig, progress: Progress) -> TrainResult:
        return super().fit(model, data, config.model_copy(update={"local_steps": 99, "batch_size": 50}), progress)


def test_fit_around_the_default_one_adds_nothing_to_the_update() -> None:
    update, delta = Site(Around()).job()
    assert update.metrics == {}
    assert update.examples == ROWS
    assert torch.equal(delta, Site(Plain()).job()[1])


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        (TrainsAfter, "TrainsAfter changes '0.weight' outside of the private steps"),
        (TrainsBefore, "TrainsBefore changes '0.weight' outside of the private steps"),
        (TrainsTwice, "TrainsTwice.fit trains twice"),
        (Bypasses, "Bypasses.fit did not train by Task.fit"),
        (Replaces, "Replaces.fit did not train by Task.fit"),
    ],
)
def test_fit_that_trains_without_noise_makes_no_update(kind: type[Plain], problem: str) -> None:
    with pytest.raises(TaskError, match=problem):
        Site(kind()).job()


def test_fit_cannot_train_longer_than_was_paid_for() -> None:
    assert torch.equal(Site(TrainsLonger()).job()[1], Site(Plain()).job()[1])


@pytest.mark.parametrize("persistent", [True, False])
def test_buffer_that_rows_change_makes_no_update(persistent: bool) -> None:
    class Counting(torch.nn.Module):
        seen: torch.Tensor

        def __init__(self, persistent: bool) -> None:
            super().__init__()
            self.inner = perceptron()
            self.register_buffer("seen", torch.zeros(()), persistent)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            self.seen += inputs.detach().sum()
            return self.inner(inputs)  # type: ignore[no-any-return]

    with pytest.raises(TaskError, match="'seen' outside of the private steps"):
        Site(Plain(lambda: Counting(persistent)), backend="loop").job()


# Before the run


class Embedded(torch.nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(4, 2, **options)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (
            lambda: torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)),
            r"BatchNorm1d \(1\), which mixes",
        ),
        (lambda: torch.nn.BatchNorm2d(2, track_running_stats=False), r"BatchNorm2d \(the model itself\), which mixes"),
        (lambda: torch.nn.InstanceNorm2d(2, track_running_stats=True), "InstanceNorm2d"),
        (lambda: Embedded(sparse=True), r"Embedding \(table\) with sparse"),
        (lambda: Embedded(max_norm=1.0), r"Embedding \(table\) with max_norm"),
    ],
)
def test_model_whose_rows_cannot_be_protected_is_refused(make: Any, problem: str) -> None:
    site = Site(Plain())
    with pytest.raises(ConfigurationError, match=problem):
        check_example_privacy(site.privacy, site.task, make())
    check_example_privacy(ExamplePrivacyConfig(), site.task, make())


@pytest.mark.parametrize(("kind", "refused"), [(Plain, False), (Around, False), (Replaces, True)])
def test_fit_that_never_calls_the_default_one_is_refused(kind: type[Plain], refused: bool) -> None:
    site = Site(Plain())
    if not refused:
        check_example_privacy(site.privacy, kind(), perceptron())
        return
    with pytest.raises(ConfigurationError, match=r"Replaces has a fit of its own.*super\(\).fit"):
        check_example_privacy(site.privacy, kind(), perceptron())


def test_state_of_a_client_in_the_model_is_refused() -> None:
    task = Plain()
    task.stateful_clients = True
    with pytest.raises(ConfigurationError, match=r"Plain.stateful_clients is set"):
        check_example_privacy(Site(Plain()).privacy, task, perceptron())


class Stream(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(())


@pytest.mark.parametrize(("data", "problem"), [(Stream(), "is a stream"), (DataLoader(rows()), "is a DataLoader")])
def test_rows_must_have_numbers(data: Any, problem: str) -> None:
    with pytest.raises(TaskError, match=problem):
        countable_rows(data)
    assert countable_rows(rows()) == ROWS

"""The settings of [training] beside optimizer and rate, and the kinds of data, compared with gradients by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import structlog
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from fedqueue import Client, Progress, Task, TrainingConfig
from fedqueue.errors import ConfigurationError, TaskError
from fedqueue.training import check_device, check_training, clip_grad_norm, train

CPU = torch.device("cpu")


class Line(torch.nn.Module):
    """w · x with w = 0 at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x: Any) -> Any:
        return self.w * x


class Slopes(Task):
    """The loss is −w·x, so the gradient of a batch is minus the mean of its x."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def loss(self, model: Any, batch: Any) -> Any:
        (x,) = batch
        self.seen.append(x.tolist())
        return -model(x).mean()


def rows(*values: Any) -> TensorDataset:
    return TensorDataset(torch.tensor(values, dtype=torch.float64))


def trained(data: Any, task: Any = None, progress: Any = None, **settings: Any) -> tuple[Any, ...]:
    """Return w after the training, the result and the task."""
    config = TrainingConfig(**{"device": "cpu", "learning_rate": 1.0, "batch_size": 1, **settings})
    model, task = Line(), task or Slopes()
    fit = train(task, model, data, config, progress or Progress())
    return model.w.item(), fit, task


# The optimizer's steps


def test_accumulated_step_is_on_the_mean_of_its_gradients() -> None:
    assert trained(rows(1.0, 3.0), accumulate_batches=2)[0] == 2.0
    # Two batches make a step with mean 2 and the third one a step of its own.
    calls = []
    w, _, _ = trained(rows(2.0, 2.0, 2.0), accumulate_batches=2, progress=Progress(lambda: calls.append(1)))
    assert (w, len(calls)) == (4.0, 3)


def test_gradient_above_the_norm_is_scaled_down() -> None:
    assert trained(rows(8.0), max_grad_norm=0.5)[0] == pytest.approx(0.5)
    assert trained(rows(0.25), max_grad_norm=0.5)[0] == 0.25


def test_accumulated_gradient_is_clipped_once() -> None:
    assert trained(rows(8.0, 8.0), accumulate_batches=2, max_grad_norm=3)[0] == pytest.approx(3)


def test_sparse_and_dense_gradients_are_clipped_together() -> None:
    embedding = torch.nn.Embedding(4, 1, sparse=True)
    weight = torch.nn.Parameter(torch.zeros(1))
    (embedding(torch.tensor([1, 1, 2])).sum() * 1.5 + 4 * weight.sum()).backward()
    clip_grad_norm([embedding.weight, weight], 1.0)
    whole = math.sqrt(3.0**2 + 1.5**2 + 4.0**2)  # row 1 twice, row 2 once
    assert embedding.weight.grad is not None
    assert weight.grad is not None
    assert embedding.weight.grad.to_dense().flatten().tolist() == pytest.approx([0, 3 / whole, 1.5 / whole, 0])
    assert weight.grad.item() == pytest.approx(4 / whole)


class Words(Task):
    def model(self) -> Any:
        return torch.nn.Embedding(5, 2, sparse=True)

    def loss(self, model: Any, batch: Any) -> Any:
        return model(batch[0]).pow(2).mean()


WORDS = TensorDataset(torch.tensor([0, 1, 1, 4]))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize(
    "settings",
    [{}, {"proximal_mu": 0.1}, {"max_grad_norm": 0.1}, {"accumulate_batches": 2}, {"optimizer": "adagrad"},
     {"optimizer_options": {"momentum": 0.9}}],
)  # fmt: skip
def test_sparse_gradients_train_with(settings: dict[str, Any]) -> None:
    task = Words()
    model = task.model()
    before = model.weight.detach().clone()
    train(task, model, WORDS, TrainingConfig(device="cpu", batch_size=2, local_epochs=2, **settings), Progress())
    changed = (model.weight != before).any(dim=1).tolist()
    assert changed == [True, True, False, False, True]


@pytest.mark.parametrize("settings", [{"optimizer": "adam"}, {"optimizer_options": {"weight_decay": 0.1}}])
def test_optimizer_that_refuses_sparse_gradients_is_named(settings: dict[str, Any]) -> None:
    task = Words()
    with pytest.raises(TaskError, match=r"training\.optimizer = '(adam|sgd)': .*sparse gradients: use sgd without"):
        train(task, task.model(), WORDS, TrainingConfig(device="cpu", **settings), Progress())


# Learning rates


def test_rate_follows_the_base_version() -> None:
    halved = {"name": "exponentiallr", "schedule_options": {"gamma": 0.5}}
    for version, rate in ((0, 1.0), (3, 0.125), (1, 0.5)):
        assert trained(rows(1.0), schedule=halved, progress=Progress(version=version))[0] == rate


def test_rate_within_a_job_changes_from_step_to_step() -> None:
    halved = {"name": "exponentiallr", "schedule_options": {"gamma": 0.5}}
    assert trained(rows(1.0, 1.0, 1.0), local_schedule=halved)[0] == 1 + 0.5 + 0.25
    both = trained(rows(1.0, 1.0), local_schedule=halved, schedule=halved, progress=Progress(version=2))
    assert both[0] == 0.25 + 0.125


# Optimizer state


def test_momentum_is_kept_between_jobs_where_the_key_says_so() -> None:
    memory: dict[str, Any] = {}
    settings = {"optimizer_options": {"momentum": 0.5}, "keep_optimizer_state": True}
    first = trained(rows(1.0), progress=Progress(memory=memory), **settings)[0]
    second = trained(rows(1.0), progress=Progress(memory=memory), **settings)[0]
    assert (first, second) == (1.0, 1.5)
    assert trained(rows(1.0), progress=Progress(memory=memory), optimizer_options={"momentum": 0.5})[0] == 1.0


def test_kept_state_gets_the_rate_of_the_new_job() -> None:
    memory: dict[str, Any] = {}
    trained(rows(1.0), progress=Progress(memory=memory), keep_optimizer_state=True, optimizer="adam")
    w = trained(
        rows(1.0), progress=Progress(memory=memory), keep_optimizer_state=True, optimizer="adam", learning_rate=1e-3
    )[0]
    assert w == pytest.approx(1e-3, rel=1e-6)


# Precision


@pytest.mark.parametrize(("precision", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_mixed_precision_computes_in_the_smaller_dtype(precision: str, dtype: torch.dtype) -> None:
    seen = []

    class Wide(Task):
        def loss(self, model: Any, batch: Any) -> Any:
            out = model(batch[0])
            seen.append(out.dtype)
            return out.float().mean()

    model = torch.nn.Linear(8, 4)
    before = model.weight.detach().clone()
    config = TrainingConfig(device="cpu", precision=precision)
    train(Wide(), model, TensorDataset(torch.ones(4, 8)), config, Progress())
    assert (seen, model.weight.dtype) == ([dtype], torch.float32)
    assert torch.allclose(before - model.weight, torch.full((4, 8), 0.1 / 4), atol=1e-3)


# Data


class Stream(IterableDataset[Any]):
    def __init__(self, *values: Any) -> None:
        self.values = values

    def __iter__(self) -> Any:
        return ((torch.tensor(value, dtype=torch.float64),) for value in self.values)


def test_stream_is_read_in_its_order_and_counted() -> None:
    _, fit, task = trained(Stream(1.0, 2.0, 3.0), batch_size=2, local_epochs=2)
    assert task.seen == [[1.0, 2.0], [3.0], [1.0, 2.0], [3.0]]
    assert fit.num_examples == 3


def test_steps_on_a_stream_count_what_was_seen() -> None:
    assert trained(Stream(1.0, 2.0, 3.0), local_steps=2)[1].num_examples == 2
    assert trained(Stream(1.0, 2.0, 3.0), local_steps=7)[1].num_examples == 3


@pytest.mark.parametrize("settings", [{"local_steps": 3}, {"local_epochs": 2}])
def test_stream_without_rows_is_an_error(settings: dict[str, Any]) -> None:
    with pytest.raises(TaskError, match="no examples"):
        trained(Stream(), **settings)


def test_loader_is_used_as_it_is() -> None:
    _, fit, task = trained(DataLoader(rows(1.0, 2.0, 3.0), batch_size=2), batch_size=64, local_epochs=1)
    assert [len(batch) for batch in task.seen] == [2, 1]
    assert fit.num_examples == 3


def test_drop_last_leaves_out_the_short_batch() -> None:
    _, fit, task = trained(rows(1.0, 2.0, 3.0), batch_size=2, drop_last=True)
    assert [len(batch) for batch in task.seen] == [2]
    assert fit.num_examples == 3
    with pytest.raises(TaskError, match=r"drop_last leaves no batch: the client has 3 examples, and .* is 4"):
        trained(rows(1.0, 2.0, 3.0), batch_size=4, drop_last=True)


@pytest.mark.parametrize("assigned", [False, True])
def test_collate_fn_of_the_task_makes_the_batches(assigned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def padded(examples: Any) -> tuple[Any, ...]:
        return (torch.nn.utils.rnn.pad_sequence([row for (row,) in examples], batch_first=True),)

    class Padded(Slopes):
        def collate_fn(self, examples: Any) -> Any:
            return padded(examples)

    task = Slopes() if assigned else Padded()
    if assigned:
        monkeypatch.setattr(task, "collate_fn", padded)
    data = [(torch.ones(n, dtype=torch.float64),) for n in (1, 3)]
    trained(data, task=task, batch_size=2)
    assert sorted(task.seen[0]) == [[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]]


@pytest.mark.parametrize("data", [None, {"x": [1]}, 3, iter([1, 2])])
def test_data_of_another_kind_is_refused_by_its_type(data: Any) -> None:
    with pytest.raises(TaskError, match=rf"type {type(data).__name__}: return a torch\.utils\.data\.Dataset"):
        trained(data)


def test_float64_rows_get_a_hint() -> None:
    data = TensorDataset(torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2).long())
    with pytest.raises(TaskError, match=r"data is float64, and the model is float32: convert it .*torch\.float32"):
        train(Task(), torch.nn.Linear(3, 2), data, TrainingConfig(device="cpu"), Progress())


@pytest.mark.parametrize(("loss", "shown"), [(lambda out: out, r"shape \(2, 1\)"), (lambda out: 0.5, "float")])
def test_loss_that_is_no_scalar_is_refused(loss: Callable[..., Any], shown: str) -> None:
    class Odd(Task):
        def loss(self, model: Any, batch: Any) -> Any:
            return loss(model(batch[0]))

    with pytest.raises(TaskError, match=rf"Odd\.loss returned .*{shown}.*mean over the batch"):
        train(Odd(), torch.nn.Linear(3, 1), TensorDataset(torch.zeros(2, 3)), TrainingConfig(device="cpu"), Progress())


# A last batch of one row


def normed(rows: Any, client: Any, **settings: Any) -> tuple[Any, ...]:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    data = TensorDataset(torch.randn(rows, 3), torch.zeros(rows).long())
    config = TrainingConfig(**{"device": "cpu", "batch_size": 4, **settings})
    calls = []
    with structlog.testing.capture_logs() as logs:
        progress = Progress(lambda: calls.append(1), Client(client))
        fits = [train(Task(), model, data, config, progress) for _ in range(2)]
    return len(calls), fits[0].num_examples, [line["client"] for line in logs]


def test_last_batch_of_one_row_is_left_out_before_batch_norm() -> None:
    assert normed(9, "one row left") == (4, 9, ["one row left"])  # two jobs of two batches; said once
    assert normed(10, "two rows left") == (6, 10, [])


@pytest.mark.parametrize(("rows", "batch_size"), [(1, 4), (3, 1)])
def test_client_without_a_batch_for_batch_norm_is_an_error(rows: int, batch_size: int) -> None:
    with pytest.raises(TaskError, match=r"BatchNorm layers need batches of two rows"):
        normed(rows, "too few", batch_size=batch_size)


def test_one_row_is_trained_where_batch_norm_takes_it() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.Flatten())
    data = TensorDataset(torch.randn(1, 1, 4, 4), torch.zeros(1).long())
    assert train(Task(), model, data, TrainingConfig(device="cpu"), Progress()).num_examples == 1


# Before the run


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"optimizer": "lbfgs"}, r"training\.optimizer = 'lbfgs': torch\.optim\.LBFGS .*; name another .* sgd"),
        ({"optimizer": "sparseadam"}, r"training\.optimizer = 'sparseadam': torch\.optim\.SparseAdam "),
        ({"optimizer_options": {"momentun": 0.9}}, r"training\.optimizer_options = .*momentun"),
        ({"optimizer": "adam", "optimizer_options": {"betas": "high"}}, r"training\.optimizer_options = .*high"),
        ({"optimizer": "adam", "optimizer_options": {"betas": [0.9]}}, r"training\.optimizer_options = .*0\.9"),
        ({"schedule": {"name": "cosine"}}, r"training\.schedule\.name = 'cosine': unknown schedule"),
        ({"local_schedule": {"name": "steplr"}}, r"training\.local_schedule\.schedule_options = "),
    ],
)
def test_setting_that_cannot_train_is_refused_beforehand(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        check_training(TrainingConfig(**settings), CPU)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ("sgd", {}), ("adam", {"betas": [0.9, 0.99], "amsgrad": True}), ("adafactor", {"eps": ["none", 1e-3]}),
        ("sgd", {"momentum": 0.9, "nesterov": True, "foreach": "none"}), ("rprop", {"etas": [0.5, 1.2]}),
    ],
)  # fmt: skip
def test_options_may_be_lists_booleans_and_none(optimizer: str, options: dict[str, Any]) -> None:
    config = TrainingConfig(optimizer=optimizer, optimizer_options=options)
    check_training(config, CPU, torch.nn.Linear(2, 2))
    assert TrainingConfig.model_validate(config.model_dump()) == config


def test_optimizer_that_does_not_fit_the_shapes_is_refused() -> None:
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    config = TrainingConfig(optimizer="muon")
    check_training(config, CPU, torch.nn.Linear(2, 2, bias=False))
    with pytest.raises(ConfigurationError, match=r"torch\.optim\.muon: Muon only supports 2D"):
        check_training(config, CPU, torch.nn.Linear(2, 2))


@pytest.mark.parametrize("kind", [torch.nn.Embedding, torch.nn.EmbeddingBag])
@pytest.mark.parametrize("optimizer", ["adam", "sparseadam"])
def test_optimizer_that_refuses_sparse_gradients_is_refused(kind: Any, optimizer: str) -> None:
    model = torch.nn.Sequential(kind(5, 2, sparse=True), torch.nn.Linear(2, 2))
    with pytest.raises(ConfigurationError, match=rf"training\.optimizer = '{optimizer}': .* sparse=False"):
        check_training(TrainingConfig(optimizer=optimizer), CPU, model)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # torch's, once in a process
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "sparseadam"])
def test_optimizer_that_takes_sparse_gradients_passes(optimizer: str) -> None:
    check_training(TrainingConfig(optimizer=optimizer), CPU, torch.nn.Embedding(5, 2, sparse=True))


def test_embedding_that_is_frozen_has_no_sparse_gradient() -> None:
    frozen = torch.nn.Embedding(5, 2, sparse=True).requires_grad_(False)
    check_training(TrainingConfig(optimizer="adam"), CPU, torch.nn.Sequential(frozen, torch.nn.Linear(2, 2)))


def test_device_that_this_machine_lacks_is_named_with_its_key() -> None:
    absent = "cuda:99" if torch.cuda.is_available() else "cuda"
    with pytest.raises(
        ConfigurationError, match=rf"training\.device = '{absent}': torch .* cannot use .*; use auto, cpu"
    ):
        check_device(absent)
    assert check_device("cpu") == CPU


def test_settings_of_a_machine_do_not_travel() -> None:
    config = TrainingConfig(device="cuda:1", threads=3, loader_workers=2, batch_size=7)
    received = TrainingConfig.model_validate(config.model_dump())
    assert (received.device, received.threads, received.loader_workers, received.batch_size) == ("auto", 1, 0, 7)
    here = received.on_machine(TrainingConfig(device="cpu", threads=2, batch_size=99))
    assert (here.device, here.threads, here.batch_size) == ("cpu", 2, 7)

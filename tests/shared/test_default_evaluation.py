"""The default evaluation: the loss of any batches, and accuracy only where scores and labels have its shapes."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from fedqueue import Task
from fedqueue.batches import rows_in, to_device
from fedqueue.errors import TaskError
from fedqueue.evaluation import eval_mode

META = torch.device("meta")
Pair = namedtuple("Pair", "inputs labels")


class Fixed(torch.nn.Module):
    """Returns the same scores for every batch of their length."""

    def __init__(self, scores: Any) -> None:
        super().__init__()
        self.scores = scores
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, inputs: Any) -> Any:
        return self.scores


def with_loss(function: Any) -> Any:
    class Mine(Task):
        def loss(self, model: Any, batch: Any) -> Any:
            return function(model, batch)

    return Mine()


def zero_loss(model: Any, batch: Any) -> torch.Tensor:
    model(batch[0])
    return torch.zeros(())


def metrics(scores: Any, labels: Any, loss: Any = zero_loss) -> Any:
    """Evaluate a model that returns `scores` against `labels`."""
    data = TensorDataset(torch.zeros(len(labels), 1), labels)
    return with_loss(loss).evaluate(Fixed(scores), data)


def scored(*shape: Any) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


# Accuracy


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("shape", [(50, 3), (50, 3, 7), (50, 3, 4, 5)])
def test_accuracy_compares_the_classes_of_dimension_1(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    scores = scored(*shape)
    labels = torch.randint(0, 3, (shape[0], *shape[2:]), dtype=dtype)
    best = torch.stack(scores.unbind(1), -1).max(-1).indices  # the classes moved to the last dimension
    expected = float((best == labels).double().mean())
    assert metrics(scores, labels)["accuracy"] == pytest.approx(expected)


def test_ignored_labels_do_not_count() -> None:
    scores = torch.tensor([[2.0, 1.0], [2.0, 1.0], [2.0, 1.0], [2.0, 1.0]])
    assert metrics(scores, torch.tensor([0, 1, 1, -100]))["accuracy"] == pytest.approx(1 / 3)
    assert "accuracy" not in metrics(scores, torch.full((4,), -100))


@pytest.mark.parametrize(
    ("scores", "labels"),
    [
        (scored(8, 1), torch.zeros(8, 1)),  # regression
        (scored(8, 1), (scored(8, 1) > 0).float()),  # one logit
        (scored(8), torch.zeros(8).long()),
        (scored(8, 1), torch.zeros(8).long()),
        (scored(8, 1), torch.zeros(8, 1).long()),
        (scored(8, 3), torch.zeros(8, 1).long()),
        (scored(8, 3), torch.zeros(8, 3).long()),  # multi-label, or one-hot
        (scored(8, 3), torch.zeros(8, 3)),
        (scored(8, 3), torch.zeros(8)),
        (scored(8, 3), torch.zeros(8).bool()),
        (scored(8, 5, 3), torch.zeros(8, 5).long()),  # the classes are in the last dimension
        (scored(8, 5, 5), torch.zeros(8, 5).long()),  # which dimension has the classes?
        (scored(8, 3).long(), torch.zeros(8).long()),
        (scored(8, 3), torch.full((8,), 3)),  # no class
        (scored(8, 3), torch.full((8,), -1)),
        ((scored(8, 3), scored(8, 2)), torch.zeros(8).long()),
        ({"logits": scored(8, 3)}, torch.zeros(8).long()),
    ],
)
def test_accuracy_is_left_out_where_it_means_nothing(scores: Any, labels: Any) -> None:
    assert list(metrics(scores, labels)) == ["loss"]


def test_default_loss_says_which_dimension_has_the_classes() -> None:
    scores, labels = scored(8, 5, 5), torch.zeros(8, 5).long()
    data = TensorDataset(torch.zeros(8, 1), labels)
    expected = float((scores.argmax(1) == labels).double().mean())
    assert Task().evaluate(Fixed(scores), data)["accuracy"] == pytest.approx(expected)


def test_one_batch_without_accuracy_leaves_it_out() -> None:
    labels = [torch.zeros(4).long(), torch.zeros(4)]
    batches: Any = [(torch.zeros(4, 1), label) for label in labels]
    loader: DataLoader[Any] = DataLoader(batches, batch_size=None)
    assert list(with_loss(zero_loss).evaluate(Fixed(scored(4, 3)), loader)) == ["loss"]


@pytest.mark.parametrize(
    "loss",
    [
        lambda model, batch: model(batch[0] / 255).sum(),  # other inputs than those of the batch
        lambda model, batch: (model(batch[0]) - model(batch[0])).sum(),
        lambda model, batch: model.weight.sum(),
    ],
)
def test_accuracy_is_that_of_the_scores_of_the_loss(loss: Callable[..., Any]) -> None:
    assert list(metrics(scored(8, 3), torch.zeros(8).long(), loss)) == ["loss"]


def test_model_is_called_once_for_each_batch() -> None:
    calls = []

    class Counting(Fixed):
        def forward(self, inputs: Any) -> Any:
            calls.append(len(inputs))
            return super().forward(inputs)

    data = TensorDataset(torch.zeros(8, 1), torch.zeros(8).long())
    assert set(Task().evaluate(Counting(scored(8, 3)), data)) == {"loss", "accuracy"}
    assert calls == [8]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_scripted_model_is_evaluated() -> None:
    torch.manual_seed(0)
    model, data = torch.nn.Linear(4, 3), TensorDataset(torch.randn(20, 4), torch.randint(0, 3, (20,)))
    scripted = torch.jit.script(model)
    assert Task().evaluate(scripted, data) == pytest.approx(Task().evaluate(model, data))


# Loss


def test_loss_is_the_mean_over_rows() -> None:
    torch.manual_seed(0)
    model, data = torch.nn.Linear(4, 3), TensorDataset(torch.randn(700, 4), torch.randint(0, 3, (700,)))
    expected = float(functional.cross_entropy(model(data.tensors[0]), data.tensors[1]).detach())
    assert Task().evaluate(model, data)["loss"] == pytest.approx(expected, rel=1e-5)
    loader = DataLoader(data, batch_size=300)
    assert Task().evaluate(model, loader)["loss"] == pytest.approx(expected, rel=1e-5)


def test_stream_of_examples_is_evaluated() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([(torch.ones(2) * i, torch.tensor(i % 2)) for i in range(5)])

    torch.manual_seed(0)
    model = torch.nn.Linear(2, 2)
    whole = TensorDataset(torch.arange(5.0).unsqueeze(1).repeat(1, 2), torch.arange(5) % 2)
    assert Task().evaluate(model, Stream()) == pytest.approx(Task().evaluate(model, whole))


def test_dict_batches_are_evaluated_by_their_loss() -> None:
    class Rows(Dataset[Any]):
        def __len__(self) -> int:
            return 600

        def __getitem__(self, i: Any) -> dict[str, Any]:
            return {"text": "unused", "values": torch.tensor([float(i)]), "labels": torch.tensor(i)}

    task = with_loss(lambda model, batch: batch["values"].mean() + model.weight.sum())
    assert task.evaluate(Fixed(None), Rows()) == pytest.approx({"loss": 299.5})


def test_model_without_parameters_is_evaluated() -> None:
    data = TensorDataset(torch.eye(3), torch.arange(3))
    assert Task().evaluate(torch.nn.Identity(), data)["accuracy"] == 1.0


def test_empty_test_data_is_an_error() -> None:
    with pytest.raises(TaskError, match="test_data"):
        Task().evaluate(Fixed(None), TensorDataset(torch.zeros(0, 1), torch.zeros(0).long()))


def test_loss_that_is_no_scalar_is_named() -> None:
    with pytest.raises(TaskError, match=r"^Task\.loss returned 'loss' as Tensor of shape \(8,\)"):
        metrics(scored(8, 3), torch.zeros(8).long(), lambda model, batch: torch.zeros(8))


# Mode and state of the model


def test_mode_of_each_module_is_restored() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.5))
    model[1].eval()
    with eval_mode(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        model.train()
    assert [module.training for module in model.modules()] == [True, True, False]


def test_evaluation_has_no_dropout_and_changes_no_statistics() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = TensorDataset(torch.randn(64, 2), torch.randint(0, 8, (64,)))
    assert Task().evaluate(model, data) == Task().evaluate(model, data)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training


# Batches


@dataclass(frozen=True)
class Graph:
    nodes: torch.Tensor
    name: str = "g"


class Output(OrderedDict[str, Any]):
    """A mapping whose keys are attributes too and that refuses `update`, as ModelOutput of Hugging Face does."""

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def update(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("update is refused")


class Movable:
    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    def to(self, device: Any) -> Movable:
        return Movable(self.tensor.to(device))


def output(**values: Any) -> Any:
    made = Output()
    for key, value in values.items():
        made[key] = value
    return made


x = torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("batch", "tensor"),
    [
        (x, lambda b: b),
        ((x, 1), lambda b: b[0]),
        ([1, [x]], lambda b: b[1][0]),
        (Pair("a", x), lambda b: b.labels),
        ({"a": {"b": (x,)}, "text": ["s"]}, lambda b: b["a"]["b"][0]),
        (OrderedDict(a=x), lambda b: b["a"]),
        (UserDict(a=x), lambda b: b["a"]),
        (output(logits=x), lambda b: b.logits),
        (Graph(x), lambda b: b.nodes),
        (Movable(x), lambda b: b.tensor),
        (torch.nn.utils.rnn.pack_sequence([x]), lambda b: b.data),
    ],
)
def test_batch_is_moved_and_keeps_its_type(batch: Any, tensor: Callable[..., Any]) -> None:
    moved = to_device(batch, META)
    assert type(moved) is type(batch)
    assert tensor(moved).device == META
    assert tensor(batch).device.type == "cpu"


@pytest.mark.parametrize("value", ["text", 3, None, Movable, frozenset({1})])
def test_value_without_a_tensor_stays_as_it_is(value: Any) -> None:
    assert to_device(value, META) is value


@pytest.mark.parametrize(
    ("batch", "rows"),
    [
        (x, 3),
        ((torch.tensor(1.0), x), 3),
        ({"text": ["a"], "ids": x}, 3),
        (Graph(x), 3),
        ("text", 1),
        (torch.tensor(1.0), 1),
    ],
)
def test_rows_are_those_of_the_first_tensor(batch: Any, rows: int) -> None:
    assert rows_in(batch) == rows


class Observed(torch.nn.Module):
    """Has a buffer that the first batch gives its shape, as an observer of quantization has."""

    low: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)
        self.register_buffer("low", torch.tensor([]))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        self.low.resize_(2).copy_(self.linear(rows).amin(0))
        scores: torch.Tensor = self.linear(rows)
        return scores


def test_buffer_that_evaluation_gave_a_shape_is_put_back() -> None:
    model = Observed()
    Task().evaluate(model, torch.utils.data.TensorDataset(torch.ones(4, 3), torch.zeros(4).long()))
    assert model.low.shape == (0,)


class Penalised(Task):
    """Has a loss with the gradient of the scores in it."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled

    def loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        with torch.set_grad_enabled(self.enabled or torch.is_grad_enabled()):
            rows = batch[0].requires_grad_()
            (gradient,) = torch.autograd.grad(model(rows).sum(), rows)
            square: torch.Tensor = gradient.pow(2).mean()
            return square


def test_loss_that_needs_gradients_is_told_how_to_get_them() -> None:
    model, data = torch.nn.Linear(3, 2), torch.utils.data.TensorDataset(torch.ones(4, 3), torch.zeros(4).long())
    with pytest.raises(TaskError, match=r"under torch\.enable_grad\(\); RuntimeError: .* < loss \(test_default_eval"):
        Penalised(enabled=False).evaluate(model, data)
    assert Penalised(enabled=True).evaluate(model, data)["loss"] > 0

"""The default local training, held to gradients worked out by hand."""

from __future__ import annotations

import typing

import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from fedqueue.config.training import TrainingConfig
from fedqueue.errors import ConfigurationError, JobClosed
from fedqueue.task import Task
from fedqueue.training import choose_device, make_optimizer, train


class Weight(torch.nn.Module):
    """One number w; its prediction for x is w · x."""

    def __init__(self, w: float = 0.0) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([w], dtype=torch.float64))
        self.modes: list[bool] = []

    def forward(self, x):
        self.modes.append(self.training)
        return self.w * x


class Squares(Task):
    """Loss ½ (w·x − y)², so the gradient is (w·x − y)·x, averaged over the batch."""

    def __init__(self):
        self.batches = []

    def loss(self, model, batch):
        x, y = batch
        self.batches.append(x.tolist())
        return 0.5 * ((model(x) - y) ** 2).mean()


def points(*pairs):
    return TensorDataset(*(torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True)))


def settings(**fields):
    return TrainingConfig(**{"device": "cpu", "learning_rate": 0.1, "batch_size": 8, **fields})


def run(task, model, data, **fields):
    calls = []
    fit = train(task, model, data, settings(**fields), lambda: calls.append(float(model.w.detach())))
    return fit, calls


def test_one_epoch_of_one_batch_is_one_gradient_step():
    model = Weight(1.0)
    fit, calls = run(Squares(), model, points((1.0, 3.0), (2.0, 0.0)))
    # gradient = mean((1−3)·1, (2−0)·2) = (−2 + 4) / 2 = 1
    assert calls == [pytest.approx(0.9)]
    # loss = ½ · mean(4, 4)
    assert fit.metrics == {"loss": pytest.approx(2.0)}
    assert fit.num_examples == 2


def test_epochs_are_passes_over_all_examples():
    task = Squares()
    _, calls = run(task, Weight(), points((1.0, 1.0), (2.0, 1.0), (3.0, 1.0)), epochs=4, batch_size=2)
    assert len(calls) == 8
    assert [sorted(task.batches[2 * i] + task.batches[2 * i + 1]) for i in range(4)] == [[1.0, 2.0, 3.0]] * 4


def test_examples_come_in_an_order_that_follows_the_seed():
    def order(seed):
        task = Squares()
        torch.manual_seed(seed)
        run(task, Weight(), points(*((float(i), 0.0) for i in range(20))), batch_size=20)
        return task.batches[0]

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert order(1) != sorted(order(1))


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 6])
def test_steps_are_batches_of_as_many_passes_as_that_takes(steps):
    task = Squares()
    _, calls = run(task, Weight(), points((1.0, 1.0), (2.0, 1.0), (3.0, 1.0)), steps=steps, epochs=9, batch_size=2)
    assert len(calls) == len(task.batches) == steps


def test_proximal_term_pulls_towards_the_parameters_at_the_start():
    model = Weight(1.0)
    fit, calls = run(Squares(), model, points((1.0, 3.0)), steps=2, proximal_mu=5.0)
    # step 1: w = base, so the term vanishes: gradient −2 → w = 1.2
    # step 2: gradient (1.2 − 3) + 5 · (1.2 − 1) = −0.8 → w = 1.28
    assert calls == [pytest.approx(1.2), pytest.approx(1.28)]
    # the metric is the task's own loss: ½·4 and ½·1.8²
    assert fit.metrics["loss"] == pytest.approx((2.0 + 1.62) / 2)


def test_proximal_gradient_is_that_of_the_formula():
    """Against autograd of f(x) + μ/2 ‖x − x_b‖², written apart, in float64."""
    mu, rate, data = 0.7, 0.05, points((1.0, 2.0), (3.0, -1.0))
    model = Weight(0.4)
    run(Squares(), model, data, epochs=6, proximal_mu=mu, learning_rate=rate)
    w, base = torch.tensor(0.4, dtype=torch.float64), 0.4
    x, y = data.tensors
    for _ in range(6):
        w = w - rate * (((w * x - y) * x).mean() + mu * (w - base))
    assert model.w.item() == pytest.approx(float(w), abs=1e-12)


def test_progress_is_called_after_each_batch_and_what_it_raises_ends_the_training():
    model, calls = Weight(), []

    def progress():
        calls.append(1)
        if len(calls) == 2:
            raise JobClosed("no longer ours")

    with pytest.raises(JobClosed):
        train(Squares(), model, points(*[(1.0, 1.0)] * 9), settings(batch_size=1), progress)
    assert len(calls) == 2


def test_model_trains_in_training_mode():
    model = Weight()
    model.eval()
    run(Squares(), model, points((1.0, 1.0)))
    assert model.modes == [True]


def test_gradients_do_not_add_up_over_batches():
    model = Weight(0.0)
    _, calls = run(Squares(), model, points((1.0, 1.0)), epochs=2)
    assert calls == [pytest.approx(0.1), pytest.approx(0.19)]


def test_empty_data_trains_nothing_or_says_so():
    empty = TensorDataset(torch.zeros(0), torch.zeros(0))
    with pytest.raises(ValueError, match="num_samples"):
        run(Squares(), Weight(), empty, steps=3)


# Batches of any form


class Dictionaries(Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, i):
        number = torch.tensor(i)
        return {"x": number.float(), "more": [number, "text"], "pair": (number, number)}


class Named(typing.NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


class Rows(Dataset):
    def __init__(self, row):
        self.row = row

    def __len__(self):
        return 2

    def __getitem__(self, i):
        return self.row


@pytest.mark.parametrize(
    ("data", "form"),
    [
        (Dictionaries(), lambda b: b["x"].shape == (3,) and b["more"][1] == ["text"] * 3 and len(b["pair"]) == 2),
        (Rows(torch.zeros(4)), lambda b: b.shape == (2, 4)),
        (Rows((torch.zeros(1), torch.ones(1))), lambda b: len(b) == 2),
        (Rows(Named(torch.zeros(1), torch.ones(1))), lambda b: b.y.shape == (2, 1)),
    ],
    ids=["dictionary", "tensor", "tuple", "named tuple"],
)
def test_batch_reaches_the_loss_in_its_own_form(data, form):
    seen = []

    class Any(Task):
        def loss(self, model, batch):
            seen.append(batch)
            return model(torch.ones(1)).sum()

    run(Any(), Weight(), data)
    assert form(seen[0])


def test_model_and_batches_move_to_the_device():
    """`meta` is a device on every machine: it has shapes and no values."""

    class Shapes(Task):
        def loss(self, model, batch):
            assert {t.device.type for t in (batch["x"], *batch["pair"], model.w)} == {"meta"}
            raise JobClosed("far enough")

    with pytest.raises(JobClosed):
        run(Shapes(), Weight(), Dictionaries(), device="meta")


@pytest.mark.parametrize("available", [True, False])
def test_auto_takes_cuda_where_there_is_one(monkeypatch, available):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert choose_device("auto") == torch.device("cuda" if available else "cpu")


def test_device_by_name():
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    assert choose_device("cpu") == torch.device("cpu")


def test_unknown_device_is_an_error_that_names_the_key():
    with pytest.raises(ConfigurationError, match=r"training\.device = 'gpu': a torch device, such as auto, cpu"):
        choose_device("gpu")


# Optimizers by name


@pytest.mark.parametrize(
    ("name", "cls"),
    [("sgd", "SGD"), ("Adam", "Adam"), ("ADAMW", "AdamW"), ("adagrad", "Adagrad"), ("rmsprop", "RMSprop")],
)
def test_optimizer_is_found_by_its_name_in_any_case(name, cls):
    made = make_optimizer(name, Weight().parameters(), 0.25, {"weight_decay": 0.5})
    assert type(made) is getattr(torch.optim, cls)
    assert (made.defaults["lr"], made.defaults["weight_decay"]) == (0.25, 0.5)


@pytest.mark.parametrize(
    ("section", "key"), [("training", "training.optimizer"), ("server_optimizer", "server_optimizer.name")]
)
def test_unknown_optimizer_is_an_error_that_names_the_key_and_the_known_ones(section, key):
    with pytest.raises(ConfigurationError, match=rf"^{key} = 'sdg': known: .*adam, .*sgd") as caught:
        make_optimizer("sdg", Weight().parameters(), 0.1, {}, key=section)
    assert "optimizer," not in caught.value.accepted


@pytest.mark.parametrize("options", [{"momentun": 0.9}, {"momentum": -1.0}])
def test_options_that_the_optimizer_refuses_are_an_error_that_names_the_key(options):
    with pytest.raises(ConfigurationError, match=r"training\.options = \{'moment.*: torch\.optim\.sgd: "):
        make_optimizer("sgd", Weight().parameters(), 0.1, options)


class Singly(torch.utils.data.Dataset):
    """The same examples, for whoever asks for one at a time."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return self.data[i]


class Doubled(TensorDataset):
    """A TensorDataset whose examples are not what its tensors hold."""

    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return 2 * x, y


@pytest.mark.parametrize("kind", [TensorDataset, Doubled])
def test_batches_fetched_whole_train_to_the_bits_of_examples_fetched_one_by_one(kind):
    torch.manual_seed(0)
    data = kind(torch.randn(50, 3), torch.randint(0, 2, (50,)))
    models = []
    for given in (data, Singly(data)):
        torch.manual_seed(1)
        model = torch.nn.Linear(3, 2)
        train(Task(), model, given, TrainingConfig(batch_size=8, epochs=3, device="cpu"), lambda: None)
        models.append(model.weight)
    assert torch.equal(*models)

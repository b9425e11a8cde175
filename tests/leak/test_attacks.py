"""Each attack succeeds where nothing protects, and is at chance on rows that were never trained on."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from fedqueue import Client, Progress
from fedqueue.config.loading import parse_config
from fedqueue.errors import ConfigurationError, TaskError
from fedqueue.leak.layers import first_and_last
from fedqueue.leak.measurement import Measurement, above, leak_record, parse_limits
from fedqueue.leak.membership import rmia_scores
from fedqueue.leak.rehearsal import rehearse
from fedqueue.leak.row_data import hold_out, matched, rows_of, rows_of_job
from fedqueue.leak.rows import best_matches, candidates
from fedqueue.local_update import load_data
from fedqueue.protocol.messages import Order
from fedqueue.training import set_seed
from tests.support.leaking_task import LeakingTask, WordsTask, pictures

CLIENT = Client("client-0", 0, 2)


def configured(**training: Any) -> Any:
    return parse_config(
        {
            "name": "leaking",
            "task": {"entrypoint": "t:T"},
            "stop": {"versions": 2},
            "clients": {"count": 2},
            "training": {"learning_rate": 0.1, "device": "cpu", **training},
        }
    )


def measured(task: Any = None, compare: bool = False, **training: Any) -> tuple[Any, ...]:
    task, config = task or LeakingTask(), configured(**training)
    data, _ = load_data(task, CLIENT, config.seed)
    done = rehearse(config, task, CLIENT, data, compare=compare)
    return {(m.attack, m.protection): m for m in done.measurements}, done


def test_labels_are_read_from_an_unprotected_update() -> None:
    found, _ = measured(batch_size=8)
    assert found["labels", "none"].value > 0.8
    assert abs(found["labels", "none"].control) < 0.2


def test_a_row_trained_on_alone_is_read_and_no_other_row() -> None:
    found, done = measured(batch_size=1, local_steps=1)
    rows = found["rows", "none"]
    assert (rows.value, rows.rows) == (1.0, 8)
    assert rows.control < 0.05
    [gallery] = done.galleries
    for pair in gallery.pairs:
        assert torch.allclose(pair.recovered, pair.true, atol=1e-3)


def test_large_batches_mix_the_rows() -> None:
    assert measured(batch_size=40, local_epochs=1)[0]["rows", "none"].value < 0.1


def test_membership_is_told_and_at_chance_on_the_control() -> None:
    found, _ = measured(LeakingTask(rows=60), batch_size=4, local_steps=1)
    assert found["membership", "none"].value > 0.65
    assert found["membership", "none"].interval[0] > 0.55
    assert found["membership", "none"].control == pytest.approx(0.5, abs=0.03)


def test_encodings_are_compared_and_top_k_hides_rows() -> None:
    found, _ = measured(compare=True, batch_size=1, local_steps=1)
    assert {protection for _, protection in found} == {"none", "int8", "top-k 1 %"}
    assert found["rows", "top-k 1 %"].value == 0.0
    assert not found["rows", "int8"].configured


def test_without_test_data_a_quarter_of_the_rows_is_held_out() -> None:
    found, done = measured(LeakingTask(test=False, rows=200), batch_size=8)
    assert "held out" in done.control
    assert found["membership", "none"].rows == 8 * 150


@pytest.mark.parametrize(
    ("task", "attack", "why"),
    [
        (LeakingTask(first="convolution"), "rows", "the first layer is Conv1d, not Linear"),
        (LeakingTask(first="no bias"), "rows", "the first layer has no bias"),
        (WordsTask(), "rows", "a row is no pair of a floating tensor and an integer label"),
        (WordsTask(), "labels", "a row is no pair of a floating tensor and an integer label"),
    ],
)
def test_attack_that_does_not_apply_says_why(task: LeakingTask | WordsTask, attack: str, why: str) -> None:
    found, _ = measured(task, batch_size=8)
    assert (found[attack, "none"].value, found[attack, "none"].not_applicable) == (None, why)
    assert found["membership", "none"].value is not None


def test_too_few_rows_to_hold_out_are_an_error() -> None:
    with pytest.raises(TaskError, match="7 rows are too few"):
        hold_out(pictures(7, 0, False), 0)


def test_control_rows_have_the_classes_of_the_client() -> None:
    task = LeakingTask()
    rows = rows_of(task, pictures(300, 1, True), 0)
    control = matched(rows_of(task, pictures(500, 0, False), 0), rows, 0)
    assert rows.labels is not None
    assert control.labels is not None
    before, after = (torch.bincount(labels, minlength=5) / len(labels) for labels in (rows.labels, control.labels))
    assert torch.allclose(before, after, atol=0.03)
    assert len(control) > 50


def test_rows_of_a_job_are_those_that_the_training_sees() -> None:
    seen: list[torch.Tensor] = []

    class Watching(LeakingTask):
        def loss(self, model: Any, batch: Any) -> Any:
            seen.append(batch[0])
            return super().loss(model, batch)

    task, data = Watching(), pictures(40, 5, True)
    training = configured(batch_size=3, local_steps=4).training
    model = task.model()
    set_seed(123)
    task.fit(model, data, training, Progress())
    order = Order(run="r", job="j", client="c", seed=123, training=training)
    indices = rows_of_job(task, data, order)
    assert torch.equal(torch.cat(seen), data.tensors[0][indices])
    assert rows_of_job(task, data, order.model_copy(update={"training": configured(batch_size=3).training})) is None


def test_drawn_rows_contain_those_that_were_trained_on() -> None:
    task, data = LeakingTask(), pictures(100, 5, True)
    assert set(rows_of(task, data, 0, np.array([7, 99]), most=10).indices) >= {7, 99}


def test_candidates_of_a_unit_with_one_row_are_the_row() -> None:
    row = torch.rand(6)
    weight, bias = torch.outer(torch.tensor([2.0, 0.0, -1.0]), row), torch.tensor([2.0, 0.0, -1.0])
    found = candidates(weight, bias)
    assert len(found) == 2
    similarity, _ = best_matches(found, torch.stack([row, torch.ones(6)]))
    assert similarity == pytest.approx([1.0, 0.0])


def test_rmia_score_is_the_share_of_dominated_pairs() -> None:
    rng = np.random.default_rng(1)
    x, out, z, z_out = (rng.uniform(0.1, 1.0, n) for n in (7, 7, 11, 11))

    def ratio(p: float, q: float) -> float:
        return p / (0.65 * q + 0.35)

    expected = [np.mean([ratio(a, b) / ratio(c, d) >= 1 for c, d in zip(z, z_out, strict=True)]) for a, b in
                zip(x, out, strict=True)]  # fmt: skip
    assert rmia_scores(x, out, z, z_out) == pytest.approx(expected)


def test_layers_are_found_by_the_order_of_calls() -> None:
    class Turned(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = torch.nn.Linear(8, 5), torch.nn.Linear(20, 8)

        def forward(self, x: Any) -> Any:
            return self.last(self.first(x))

    task = LeakingTask()
    first, last = first_and_last(task, Turned(), rows_of(task, pictures(9, 0, False), 0))
    assert (first.name, last.name) == ("first", "last")


# Limits and leak.json


def test_limits_compare_what_the_run_does_with_its_control() -> None:
    found = [
        Measurement("rows", "coordinator", "none", 0.05, 0.02, (0.0, 0.1)),
        Measurement("rows", "coordinator", "int8", 0.9, 0.0, (0.0, 1.0), configured=False),
        Measurement("labels", "coordinator", "none", not_applicable="no labels"),
    ]
    assert above(found, {"rows": 0.04, "labels": 0.0}) == []
    [line] = above(found, {"rows": 0.02})
    assert line == "rows: 0.050 for the coordinator, 0.030 above its control; at most 0.02 is allowed"


@pytest.mark.parametrize("text", ["rows", "rows=", "rows=x", "rows=2", "rows=nan", "lines=0.1", ""])
def test_invalid_limit_is_one_line(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"--at-most = .*write ATTACK=NUMBER, 0 to 1, with labels, rows"):
        parse_limits([text], "--at-most")


def test_record_has_every_field_and_is_json() -> None:
    found, _ = measured(batch_size=8)
    record = json.loads(json.dumps(leak_record({"subject": "x"}, list(found.values()))))
    assert set(record) == {"format", "subject", "attacks", "measurements"}
    for measurement in record["measurements"]:
        assert measurement["attack"] in record["attacks"]
        assert set(measurement) == {
            "attack", "view", "protection", "value", "control", "interval", "rows", "updates", "seconds",
            "not_applicable", "configured",
        }  # fmt: skip
        low, high = measurement["interval"]
        assert low <= measurement["value"] <= high or measurement["attack"] == "membership_tpr"

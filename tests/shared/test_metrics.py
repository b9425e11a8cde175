"""What a task may return as metrics."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from fedqueue.errors import TaskError
from fedqueue.metrics import as_metrics


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (0.5, 0.5),
        (3, 3.0),
        (True, 1.0),
        (Fraction(1, 4), 0.25),
        (Decimal("0.25"), 0.25),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3.0),
        (np.bool_(True), 1.0),
        (np.array(0.5), 0.5),
        (np.array([[0.5]]), 0.5),
        (torch.tensor(0.5), 0.5),
        (torch.tensor([0.5]), 0.5),
        (torch.tensor(0.5, requires_grad=True), 0.5),
        (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
        (torch.tensor(7), 7.0),
    ],
)
def test_number_of_any_kind_is_a_metric(value: Any, number: float) -> None:
    [(name, metric)] = as_metrics({"mine": value}, "evaluate").items()
    assert (name, metric, type(metric)) == ("mine", number, float)


@pytest.mark.parametrize("value", [math.nan, np.float64("nan"), torch.tensor(math.nan)])
def test_nan_is_a_metric(value: Any) -> None:
    assert math.isnan(as_metrics({"auc": value}, "evaluate")["auc"])


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("0.5", "str"),
        (b"0.5", "bytes"),
        (None, "None"),
        ({"a": 1.0}, "dict"),
        ([0.5], "list"),
        (1j, "complex"),
        (10**400, "int"),
        (torch.tensor([0.5, 0.1]), r"Tensor of shape \(2,\)"),
        (torch.tensor(1j), r"Tensor of shape \(\)"),
        (np.array([[0.5, 0.1]]), r"ndarray of shape \(1, 2\)"),
        (np.array([]), r"ndarray of shape \(0,\)"),
        (np.str_("0.5"), r"str_ of shape \(\)"),
        (object(), "object"),
    ],
)
def test_metric_that_is_no_number_is_named_with_its_type(value: Any, kind: str) -> None:
    with pytest.raises(TaskError, match=f"^fit returned 'mine' as {kind}: expected a number"):
        as_metrics({"loss": 0.1, "mine": value}, "fit")


@pytest.mark.parametrize("metrics", [None, 0.5, [0.5], (0.5, {"acc": 1.0}), "loss"])
def test_metrics_that_are_no_mapping_are_refused(metrics: Any) -> None:
    with pytest.raises(TaskError, match=r"^evaluate returned \S+ as metrics: expected a dict"):
        as_metrics(metrics, "evaluate")


def test_metric_names_are_bounded() -> None:
    assert as_metrics({"n" * 64: 1, 0: 2}, "fit") == {"n" * 64: 1.0, "0": 2.0}
    for name in ("n" * 65, ""):
        with pytest.raises(TaskError, match="1 to 64 characters"):
            as_metrics({name: 1}, "fit")
    with pytest.raises(TaskError, match="65 metrics: expected at most 64"):
        as_metrics({str(i): i for i in range(65)}, "fit")

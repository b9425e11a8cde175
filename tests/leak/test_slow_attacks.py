"""The attacks that have to be asked for: rows by optimisation, and LiRA on the last model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from fedqueue.config.client import Client
from fedqueue.leak import optimisation
from fedqueue.leak.attacks import Attacks, Seen
from fedqueue.leak.membership import lira_scores
from fedqueue.leak.row_data import rows_of
from fedqueue.leak.statistics import auc
from fedqueue.tensors.frame import Frame
from fedqueue.tensors.manifest import Manifest
from tests.support.leaking_task import LeakingTask


def one_step_update(task: LeakingTask, rows: int, noise: float = 0.0) -> tuple[Attacks, Seen]:
    """What a client posts that has made one step on its first rows."""
    torch.manual_seed(0)
    model, data = task.model(), task.train_data(Client("c0", 0, 1))
    base = Frame(Manifest.from_module(model))
    base.read(model)
    trained = np.arange(rows)
    members = rows_of(task, data, 0)
    batch = [data.tensors[0][:rows], data.tensors[1][:rows]]  # type: ignore[attr-defined]
    gradients = torch.autograd.grad(task.loss(model, batch), list(model.parameters()))
    delta = base.copy()
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    spread = noise * flat.norm() / len(flat) ** 0.5
    delta.parameters.copy_(-0.1 * (flat + spread * torch.randn(len(flat))))
    control = rows_of(task, task.test_data(), 0)
    return Attacks(task, model, {"c0": members}, {"c0": control}, 0), Seen(base, delta, {"c0": trained})


@pytest.mark.parametrize(("first", "rows"), [("convolution", 1), ("linear", 2)])
def test_rows_are_found_by_optimisation(first: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimisation, "STEPS", 300)
    attacks, seen = one_step_update(LeakingTask(first=first), rows)
    (found,) = attacks.by_optimisation([seen], "coordinator", "none", lambda seconds: None)
    assert found.value == 1.0
    assert found.control is not None
    assert found.control < 0.2


def test_noise_defeats_the_optimisation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimisation, "STARTS", 1)
    attacks, seen = one_step_update(LeakingTask(first="convolution"), 1, noise=3.0)
    (found,) = attacks.by_optimisation([seen], "coordinator", "none", lambda seconds: None)
    assert found.value == 0.0


def test_updates_of_many_rows_are_left_to_other_attacks() -> None:
    attacks, seen = one_step_update(LeakingTask(), 9)
    (found,) = attacks.by_optimisation([seen], "coordinator", "none", lambda seconds: None)
    assert "more than 4 rows" in found.not_applicable


def test_each_update_says_how_long_the_others_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedqueue.leak.attacks.rows_by_optimisation", lambda *arguments: torch.zeros(1, 20))
    attacks, seen = one_step_update(LeakingTask(), 1)
    said: list[float] = []
    attacks.by_optimisation([seen] * 20, "coordinator", "none", said.append)
    assert len(said) == optimisation.MOST_UPDATES
    assert said[0] == 0.0
    assert all(seconds > 0 for seconds in said[1:])


def confidences(shift: float, models: int, seed: int = 0) -> tuple[Any, Any]:
    """Likelihoods of 400 rows, which differ in how hard they are: under the target, and under models without them."""
    rng = np.random.default_rng(seed)
    hardness, spread = rng.normal(0, 3, 400), rng.uniform(0.3, 2.0, 400)
    target = hardness + spread * rng.normal(size=400) + shift * spread
    out = hardness + spread * rng.normal(size=(models, 400))
    return 1 / (1 + np.exp(-target)), 1 / (1 + np.exp(-out))


def test_lira_score_is_the_deviation_from_models_without_a_row() -> None:
    target, out = np.array([0.9, 0.5]), np.array([[0.5, 0.4], [0.6, 0.7], [0.7, 0.3]])
    confidence, others = stats.logistic.ppf(target), stats.logistic.ppf(out)
    pooled = np.sqrt(others.var(0).mean())
    np.testing.assert_allclose(lira_scores(target, out), (confidence - others.mean(0)) / pooled)


@pytest.mark.parametrize("models", [16, 64])
def test_lira_tells_members_that_hardness_hides(models: int) -> None:
    members, control = confidences(1.5, models), confidences(0.0, models, seed=1)
    plain = auc(members[0], control[0])
    with_lira = auc(lira_scores(*members), lira_scores(*control))
    assert with_lira > plain + 0.15
    assert abs(auc(lira_scores(*confidences(0.0, models, seed=2)), lira_scores(*control)) - 0.5) < 0.06


def test_many_models_are_worth_a_spread_of_each_row() -> None:
    members, control = confidences(1.5, 64), confidences(0.0, 64, seed=1)
    own = auc(lira_scores(*members), lira_scores(*control))
    few = auc(lira_scores(members[0], members[1][:16]), lira_scores(control[0], control[1][:16]))
    assert own > few


def test_certain_models_give_finite_scores() -> None:
    assert np.isfinite(lira_scores(np.array([1.0, 0.0]), np.ones((4, 2)))).all()

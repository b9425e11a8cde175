"""Attacks on updates of a run whose rows are protected: what succeeds without noise fails with it."""

from __future__ import annotations

from typing import Any

import pytest

from fedqueue.leak.measurement import Measurement
from fedqueue.leak.rehearsal import rehearse
from fedqueue.local_update import load_data
from tests.leak.test_attacks import CLIENT, configured
from tests.support.leaking_task import LeakingTask

ONE_ROW = {"batch_size": 1, "local_steps": 1}


def attacked(noise_multiplier: float) -> dict[str, Measurement]:
    privacy: dict[str, Any] = {"examples": {}}
    if noise_multiplier:
        privacy["examples"] = {"max_grad_norm": 1.0, "noise_multiplier": noise_multiplier, "delta": 1e-4}
    plain = configured(**ONE_ROW)
    config = type(plain).model_validate({**plain.model_dump(), "privacy": privacy})
    task = LeakingTask()
    data, _ = load_data(task, CLIENT, config.seed)
    found = rehearse(config, task, CLIENT, data, jobs=24, compare=False).measurements
    return {m.attack: m for m in found if m.configured}


@pytest.mark.parametrize(("noise", "protection"), [(0.0, "none"), (1.0, "noise for rows")])
def test_table_names_the_noise(noise: float, protection: str) -> None:
    assert {m.protection for m in attacked(noise).values()} == {protection}


def test_a_single_row_is_read_without_noise_only() -> None:
    """Some of the private steps draw no row, and count as steps from which none is read."""
    assert attacked(0.0)["rows"].value == 1.0
    found = attacked(1.0)["rows"]
    assert found.value == 0.0
    assert found.rows > 5


def test_classes_are_read_without_noise_only() -> None:
    plain, noisy = attacked(0.0)["labels"], attacked(2.0)["labels"]
    assert plain.value is not None
    assert noisy.value is not None
    assert plain.value > 0.9
    assert abs(noisy.value) < 0.4

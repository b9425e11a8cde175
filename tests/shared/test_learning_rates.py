"""Learning rates by version: closed forms, rates after recovery, and rejected schedules."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedqueue.config.schedule import ScheduleConfig
from fedqueue.errors import ConfigurationError
from fedqueue.learning_rates import learning_rates
from tests.support.builders import make_frame, same_bits
from tests.support.federation_run import Died, start


def rates(count: Any, name: str = "off", rate: float = 0.5, made: int = 0, **options: Any) -> Any:
    schedule = ScheduleConfig(name=name, schedule_options=options)
    return list(itertools.islice(learning_rates(rate, schedule, "server_optimizer.schedule", made), count))


CLOSED_FORMS: dict[str, tuple[str, dict[str, Any], Callable[[int], float]]] = {
    "constant": ("off", {}, lambda t: 0.5),
    "exponential": ("ExponentialLR", {"gamma": 0.9}, lambda t: 0.5 * 0.9**t),
    "steps": ("steplr", {"step_size": 3, "gamma": 0.1}, lambda t: 0.5 * 0.1 ** (t // 3)),
    "cosine": ("cosineannealinglr", {"T_max": 20}, lambda t: 0.25 * (1 + math.cos(math.pi * t / 20))),
    "warm-up": (
        "linearlr", {"start_factor": 0.25, "total_iters": 4}, lambda t: 0.5 * (0.25 + 0.75 * min(t, 4) / 4)
    ),
    "milestones": ("multisteplr", {"milestones": (2, 5), "gamma": 0.5}, lambda t: 0.5 * 0.5 ** ((t >= 2) + (t >= 5))),
    "inverse square root": ("inverse_sqrt", {"decay": 4.0}, lambda t: 0.5 * math.sqrt(4 / (4 + t))),
    "with warm-up": (
        "inverse_sqrt", {"warmup": 3}, lambda t: 0.5 * ((t + 1) / 4 if t < 3 else 1 / math.sqrt(t - 2))
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_learning_rate_matches_the_closed_form(name: str) -> None:
    schedule, options, exact = CLOSED_FORMS[name]
    assert rates(12, schedule, **options) == pytest.approx([exact(t) for t in range(12)], rel=1e-9)


@pytest.mark.parametrize("name", CLOSED_FORMS)
@given(made=st.integers(0, 30))
def test_restored_schedule_continues_with_the_same_bits(name: str, made: Any) -> None:
    schedule, options, _ = CLOSED_FORMS[name]
    assert rates(5, schedule, made=made, **options) == rates(made + 5, schedule, **options)[made:]


def test_scheduled_rates_apply_across_a_crash() -> None:
    schedule = {"schedule": {"name": "exponentiallr", "schedule_options": {"gamma": 0.5}}}
    whole, broken = (start("client-0", model=make_frame(0.0), server_optimizer=schedule) for _ in range(2))
    broken.dies_before = 7
    for _ in range(4):
        whole.post("client-0", 1.0)
        try:
            broken.post("client-0", 1.0)
        except Died:
            broken.restart()
    assert whole.x == 1 + 0.5 + 0.25 + 0.125
    assert same_bits(whole.federation.model, broken.federation.model)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        (
            "cosine",
            {},
            r"schedule\.name = 'cosine': unknown schedule; known: .*cosineannealinglr.*inverse_sqrt.*steplr",
        ),
        ("ReduceLROnPlateau", {}, "known: "),
        ("steplr", {}, r"schedule\.schedule_options = \{\}: torch\.optim\.lr_scheduler\.StepLR: .*step_size"),
        ("steplr", {"step_size": 3, "speed": 1}, "speed"),
        ("inverse_sqrt", {"decay": 0}, "decay, a number > 0"),
        ("inverse_sqrt", {"rise": 3}, "takes warmup"),
    ],
)
def test_unknown_schedule_or_invalid_options_are_refused(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        rates(1, name, **options)

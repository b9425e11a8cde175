"""The section [privacy.examples]: what it needs, and what does not go together with it."""

from __future__ import annotations

from typing import Any

import pytest

from fedqueue.config.privacy import ExamplePrivacyConfig
from fedqueue.errors import ConfigurationError
from fedqueue_coordinator.core.events import Dispatch, make_order
from tests.support.builders import make_config

NOISE = {"max_grad_norm": 1.0, "noise_multiplier": 1.1, "delta": 1e-5}
BUDGET = {"max_grad_norm": 1.0, "epsilon": 8.0, "jobs": 20, "delta": 1e-5}


def examples(**changes: Any) -> dict[str, Any]:
    return {"examples": {key: value for key, value in {**NOISE, **changes}.items() if value is not None}}


def test_section_is_off_by_default_and_orders_then_have_none() -> None:
    config = make_config()
    assert config.example_privacy is None
    assert make_order(config, Dispatch("run-1", 1, "client-0")).privacy is None
    assert config.privacy.examples.sentence == "no differential privacy"


@pytest.mark.parametrize("given", [NOISE, BUDGET])
def test_orders_carry_the_section(given: dict[str, Any]) -> None:
    config = make_config(privacy={"examples": given})
    order = make_order(config, Dispatch("run-1", 1, "client-0"))
    assert type(order).model_validate(order.model_dump()).privacy == ExamplePrivacyConfig(**given)


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        (examples(noise_multiplier=None), "sets max_grad_norm, delta but no noise"),
        (examples(max_grad_norm=None), "max_grad_norm is missing; set it"),
        (examples(delta=None), "delta is missing; set it"),
        (examples(epsilon=1.0, jobs=2), "sets both noise_multiplier and epsilon; leave one of them out"),
        (examples(noise_multiplier=None, epsilon=1.0), "epsilon needs jobs"),
        (examples(jobs=3), "jobs has no effect without epsilon"),
        (examples(delta=1.0), "delta = 1.0: must be less than 1"),
        (examples(noise_multiplier=1e-9), "noise_multiplier = 1e-09: must be greater than or equal to 0.001"),
        (examples(noise_multiplier=float("nan")), "noise_multiplier = nan: must be"),
        (examples(max_grad_norm=1e300), "max_grad_norm = 1e+300: must be less than or equal to 1000000"),
        (examples(noise_multiplier=None, epsilon=float("inf"), jobs=1), "epsilon = inf: must be less than or equal"),
        (examples(backend="jax"), "backend = 'jax'"),
        (examples(sampling="shuffle"), "sampling = 'shuffle': unknown key"),
    ],
)
def test_incomplete_section_says_what_it_lacks(section: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        make_config(privacy=section)
    assert str(caught.value).startswith("privacy.examples")
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    "training", [{"accumulate_batches": 2}, {"precision": "bfloat16"}, {"drop_last": True}, {"max_grad_norm": 1.0}]
)
def test_settings_that_contradict_private_steps_are_refused(training: dict[str, Any]) -> None:
    [name] = training
    with pytest.raises(
        ConfigurationError, match=rf"training.{name} is .* does not go together .*; leave training.{name} out"
    ):
        make_config(privacy=examples(), training=training)
    make_config(training=training)
    make_config(privacy=examples(), training={"optimizer": "adam", "proximal_mu": 0.1, "local_steps": 3})

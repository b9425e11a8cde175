"""Environment variables: settings, names that look like a setting, and names of other programs."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from fedqueue.config import loading
from fedqueue.config.loading import override_config
from fedqueue.errors import ConfigurationError

KUBERNETES = {
    "FEDQUEUE_PORT": "tcp://10.0.0.7:6379",
    "FEDQUEUE_PORT_6379_TCP": "tcp://10.0.0.7:6379",
    "FEDQUEUE_PORT_6379_TCP_ADDR": "10.0.0.7",
    "FEDQUEUE_SERVICE_HOST": "10.0.0.7",
    "FEDQUEUE_SERVICE_PORT": "6379",
    "FEDQUEUE_SERVICE_PORT_REDIS": "6379",
    "FEDQUEUE_REDIS_SERVICE_HOST": "10.0.0.8",
    "FEDQUEUE_REDIS_PORT_6379_TCP_PROTO": "tcp",
}


@pytest.fixture(autouse=True)
def _nothing_said_yet() -> None:
    loading._say_if_meant.cache_clear()


def load(environment: Any) -> Any:
    return override_config({"task": {"entrypoint": "task.py:T"}, "stop": {"versions": 3}}, [], environment)


def test_variables_of_a_kubernetes_service_are_ignored(caplog: pytest.LogCaptureFixture) -> None:
    assert load(KUBERNETES) == load({})
    assert not caplog.records


def test_name_and_seed_need_no_section() -> None:
    config = load({"FEDQUEUE_NAME": "digits", "FEDQUEUE_SEED": "7"})
    assert (config.name, config.seed) == ("digits", 7)


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("FEDQUEUE_REDIS_URL", "FEDQUEUE_REDIS__URL"),
        ("FEDQUEUE_TRAINING_LOCAL_EPOCHS", "FEDQUEUE_TRAINING__LOCAL_EPOCHS"),
        ("FEDQUEUE_SEEDS", "FEDQUEUE_SEED"),
    ],
)
def test_variable_that_looks_like_a_setting_is_named_once(
    caplog: pytest.LogCaptureFixture, variable: str, meant: str
) -> None:
    with caplog.at_level(logging.WARNING):
        assert load({variable: "1"}) == load({})
        load({variable: "1"})
    assert [record.getMessage() for record in caplog.records] == [
        f"fedqueue: {variable} is no setting and is ignored; did you mean {meant}?"
    ]


@pytest.mark.parametrize("variable", ["FEDQUEUE_A__B", "FEDQUEUE_STOP__VERSION", "FEDQUEUE_STOP__VERSIONS"])
def test_error_names_the_variable(variable: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load({variable: "many"})
    assert caught.value.key == variable


def test_error_about_another_key_does_not_name_the_variable() -> None:
    with pytest.raises(ConfigurationError) as caught:
        override_config({"task": {"entrypoint": "t:T"}, "stop": {"versions": -1}}, [], {"FEDQUEUE_STOP__SECONDS": "3"})
    assert caught.value.key == "stop.versions"

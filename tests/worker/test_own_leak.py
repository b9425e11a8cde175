"""A site measures its own update, and joins no run that leaks more than its policy allows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedqueue import Client
from fedqueue.config.training import TrainingConfig
from fedqueue.errors import ConfigurationError, PolicyRefusal
from fedqueue.protocol.messages import Order
from fedqueue_worker import cli
from fedqueue_worker.policy import ALLOW_ALL, Policy, load_policy
from tests.leak.test_attacks import configured
from tests.support.builders import make_config
from tests.support.command_line import CommandLine
from tests.support.leaking_task import LeakingTask

ROOT = Path(__file__).parents[2]
CLIENT = Client("client-0", 0, 2)
NOISE = {"max_grad_norm": 1.0, "noise_multiplier": 1.0, "delta": 1e-5}
LEAKY, MIXED = {"batch_size": 1, "local_steps": 1}, {"batch_size": 40, "local_epochs": 1}


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> CommandLine:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    entrypoint = f"{ROOT}/tests/support/leaking_task.py:LeakingTask"
    (tmp_path / "federation.toml").write_text(
        f'[task]\nentrypoint = "{entrypoint}"\n[clients]\ncount = 2\n[stop]\nversions = 1\n'
        '[training]\nbatch_size = 1\nlocal_steps = 1\ndevice = "cpu"\n'
    )
    return CommandLine("fedqueue-worker", cli.main, monkeypatch, capsys)


def test_site_measures_its_own_update_without_redis(call: CommandLine, tmp_path: Path) -> None:
    code, out, err = call("federation.toml", "--client", "client-1", "--leak", "mine")
    assert code == 0, err
    record = json.loads((tmp_path / "mine" / "leak.json").read_text())
    assert (record["kind"], record["client"]) == ("site", "client-1")
    rows = next(m for m in record["measurements"] if m["attack"] == "rows")
    assert rows["value"] == 1.0
    assert (tmp_path / "mine" / "leak.png").exists()
    assert "nothing is sent" in err
    assert "what an update tells" in out


def test_site_above_its_limit_is_told_the_number(call: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text("max_leak = { rows = 0.01 }\n")
    code, _, err = call("federation.toml", "--partition", "0/2", "--policy", "policy.toml", "--leak", "mine")
    assert code == 1
    assert "client-0 would not join: max_leak: rows: 1.000 for the coordinator" in err


def test_leak_needs_a_client(call: CommandLine) -> None:
    code, _, err = call("federation.toml", "--leak", "mine")
    assert (code, err.count("\n")) == (2, 1)
    assert err == "fedqueue: --leak = 'mine': needs a client; name the site's own with --client ID\n"


def refusal(limits: Any, **training: Any) -> str:
    task = LeakingTask(rows=60)
    with pytest.raises(PolicyRefusal) as caught:
        Policy(max_leak=limits).check_leak(configured(**training), task, CLIENT, task.train_data(CLIENT))
    return str(caught.value)


def test_policy_refuses_a_run_that_leaks_more_than_it_allows() -> None:
    line = refusal({"rows": 0.01}, **LEAKY)
    assert line.startswith("max_leak: rows: 1.000 for the coordinator, ")
    assert line.endswith("above its control; at most 0.01 is allowed")
    assert "membership: " in refusal({"membership": 0.05}, **LEAKY)


def test_policy_allows_a_run_that_leaks_less() -> None:
    task = LeakingTask(rows=60)
    data = task.train_data(CLIENT)
    Policy(max_leak={"rows": 0.1}).check_leak(configured(**MIXED), task, CLIENT, data)
    ALLOW_ALL.check_leak(configured(**LEAKY), task, CLIENT, object())  # measures nothing


def test_measuring_keeps_to_the_other_limits() -> None:
    task = LeakingTask(rows=60)
    limited = Policy(max_leak={"rows": 0.1}, max_epochs=5)
    with pytest.raises(PolicyRefusal, match="max_epochs: the job asks for 10000000, this site allows at most 5"):
        limited.check_leak(configured(local_epochs=10**7), task, CLIENT, task.train_data(CLIENT))


def test_job_with_other_settings_than_measured_is_refused() -> None:
    limited = Policy(max_leak={"rows": 0.01})
    measured = make_config(training={"batch_size": 32}, privacy={"examples": NOISE})
    order = Order(
        run="r", job="j", client="c", seed=1, training=measured.training, privacy=measured.example_privacy
    )  # fmt: skip
    limited.check_settings(order, measured)
    other = order.model_copy(update={"training": TrainingConfig(batch_size=1)})
    ALLOW_ALL.check_settings(other, measured)
    with pytest.raises(PolicyRefusal, match="max_leak: measured with batch_size = 32, the job asks for 1"):
        limited.check_settings(other, measured)
    with pytest.raises(PolicyRefusal, match=r"max_leak: measured with privacy.examples = .*, the job asks for None"):
        limited.check_settings(order.model_copy(update={"privacy": None}), measured)


@pytest.mark.parametrize("text", ["{ lines = 0.1 }", "{ rows = 2.0 }", "{ model = 0.1 }", "0.1"])
def test_invalid_limit_in_a_policy_names_the_key(tmp_path: Path, text: str) -> None:
    (tmp_path / "policy.toml").write_text(f"max_leak = {text}\n")
    with pytest.raises(ConfigurationError, match=r"policy.toml: max_leak"):
        load_policy(tmp_path / "policy.toml")

"""`fedqueue run` starts a server, a coordinator and worker processes on this machine."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedqueue.config.loading import load_config
from fedqueue.task import load_task
from tests.support.ledger_checks import check_agreement
from tests.support.programs import Program, descendants, read_results, worker_pids
from tests.support.retrace import retrace
from tests.support.waiting import alive, wait_until, wait_until_ended

pytestmark = [pytest.mark.slow, pytest.mark.server, pytest.mark.timeout(600)]

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_run_leaves_results_that_agree_and_no_process(
    config: Path, start: Callable[..., Program], tmp_path: Path
) -> None:
    program = start("fedqueue_coordinator", "run", config, "--workers", 2, "--output", "out", "--seed", 3)
    offspring = wait_until(
        lambda: found if len(found := descendants(program.pid)) >= 4 else [], "a server, two workers, their parent"
    )
    assert program.wait() == 0, program.text
    summary, ledger = read_results(tmp_path / "out")
    check_agreement(summary, ledger)
    assert (summary["versions"], summary["seed"], summary["strategy"]) == (12, 3, "fedbuff")
    assert summary["stopped_because"] == "versions: 12 of 12"
    assert summary["history"][-1]["version"] == 12
    assert summary["metrics"]["accuracy"] > 0.6
    settings = load_config(config, ["seed=3"])
    task = load_task(settings.task.entrypoint, settings.task.options, tmp_path)
    saved = load_file(tmp_path / "out" / "model.safetensors")
    task.model().load_state_dict(saved)
    retraced = retrace(settings, task, ledger).state_dict()  # training in this process gives the workers' bits
    assert all(torch.equal(saved[name], retraced[name]) for name in saved)
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert not any(map(alive, offspring))
    assert not (tmp_path / "out" / "redis").exists()
    assert "report:" in program.text


def test_compressed_digits_reach_95_percent_despite_a_kill(start: Callable[..., Program], tmp_path: Path) -> None:
    """Uses int8 uplink and bfloat16 downlink; the audit replays every merge of encoded payloads to the same bits."""
    program = start(
        "fedqueue_coordinator", "run", EXAMPLES / "digits" / "federation.toml", "--output", "out",
        "--set", "clients.slowdown={client-0=20, client-4=20}", "--set", "dispatch.lease_seconds=3",
        "--set", "compression.uplink=int8", "--set", "compression.uplink_lossless=zstd",
        "--set", "compression.downlink=bfloat16", "--set", "compression.downlink_lossless=zstd",
        "--set", "ledger.keep_payloads=true",
    )  # fmt: skip
    log = tmp_path / "out" / "coordinator.log"
    wait_until(lambda: log.read_text().count("client joined") >= 8, "all clients joined")
    workers = worker_pids(tmp_path / "out", 4)
    assert len(set(workers)) == 4
    os.kill(workers[1], signal.SIGKILL)
    assert program.wait() == 0, program.text
    summary, ledger = read_results(tmp_path / "out")
    check_agreement(summary, ledger)
    assert summary["metrics"]["accuracy"] >= 0.95
    assert f"worker 1 (pid {workers[1]}) ended with -9: " in program.text
    audit = start("fedqueue_coordinator", "audit", "out")
    assert audit.wait() == 0, audit.text
    assert f"({summary['updates_merged']} updates)" in audit.text


def test_ctrl_c_keeps_the_model_so_far_and_leaves_no_process(
    config: Path, fork: Callable[..., Program], tmp_path: Path
) -> None:
    program = fork(
        "fedqueue_coordinator", "run", config, "--workers", 2, "--output", "out", "--set", "stop.versions=1000000"
    )
    wait_until(
        lambda: "version" in (tmp_path / "out" / "coordinator.log").read_text() or "updates" in program.text, "start"
    )
    wait_until(lambda: "accuracy" in program.text, "an evaluation")
    offspring = descendants(program.pid)
    program.send(signal.SIGINT)
    assert program.wait() == 130, program.text
    summary, ledger = read_results(tmp_path / "out")
    check_agreement(summary, ledger)
    assert summary["stopped_because"] == "interrupted"
    assert load_file(tmp_path / "out" / "model.safetensors")
    assert not any(map(alive, offspring))


def test_workers_and_server_end_when_the_runner_is_killed(
    config: Path, start: Callable[..., Program], tmp_path: Path
) -> None:
    program = start("fedqueue_coordinator", "run", config, "--output", "out", "--set", "stop.versions=1000000")
    workers = worker_pids(tmp_path / "out", 4)
    offspring = descendants(program.pid)
    assert set(workers) < set(offspring)
    program.send(signal.SIGKILL)
    program.wait()
    wait_until_ended(offspring)


def test_local_run_fails_when_the_task_raises_everywhere(
    config: Path, fork: Callable[..., Program], tmp_path: Path
) -> None:
    program = fork(
        "fedqueue_coordinator", "run", config, "--output", "out", "--workers", 2, "--set", "task.options.raises='*'",
        "--set", "dispatch.max_client_failures=2", "--set", "dispatch.backoff_seconds=0.1",
        "--set", "clients.min_available=4",
    )  # fmt: skip
    assert program.wait() == 1, program.text
    summary, ledger = read_results(tmp_path / "out")
    check_agreement(summary, ledger)
    assert "every client" in summary["stopped_because"]
    assert summary["abandoned_because"]["failed"] == 8
    failure = next(r for r in ledger if r["kind"] == "abandoned" and r["reason"] == "failed")
    assert "RuntimeError: the scanner is on fire; in fit (toy_task.py:" in failure["error"]


@pytest.mark.parametrize("mode", ["fedasync", "fedavg"])
def test_every_mode_trains(config: Path, fork: Callable[..., Program], tmp_path: Path, mode: str) -> None:
    program = fork(
        "fedqueue_coordinator", "run", config, "--output", "out", "--workers", 2, "--quiet",
        "--set", f"aggregation.strategy={mode}",
    )  # fmt: skip
    assert program.wait() == 0, program.text
    summary, ledger = read_results(tmp_path / "out")
    check_agreement(summary, ledger)
    assert summary["strategy"] == mode
    assert program.text == ""
    if mode == "fedavg":
        assert summary["staleness"]["max"] == 0
        assert all(len(r["merged"]) == 4 for r in ledger if r["kind"] == "version")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_run_that_died_or_was_interrupted_goes_on_with_resume(
    config: Path, fork: Callable[..., Program], tmp_path: Path, how: Any
) -> None:
    endless = ("--set", "stop.versions=1000000")
    first = fork("fedqueue_coordinator", "run", config, "--workers", 2, "--output", "out", *endless)
    wait_until(lambda: "accuracy" in first.text and "version 0 " not in first.text.splitlines()[-1], "a version")
    offspring = descendants(first.pid)
    first.send(how)
    first.wait()
    wait_until_ended(offspring)
    second = fork(
        "fedqueue_coordinator", "run", "--resume", "out", "--set", "stop.versions=off", "--set", "stop.seconds=1"
    )
    assert second.wait() == 0, second.text
    summary, _ = read_results(tmp_path / "out")
    assert summary["versions"] >= 1
    assert summary["stopped_because"] == "seconds: 1"
    audit = fork("fedqueue_coordinator", "audit", "out")
    assert audit.wait() == 0, audit.text
    again = fork("fedqueue_coordinator", "run", "--resume", "out")
    assert again.wait() == 2
    assert "cannot be resumed" in again.text

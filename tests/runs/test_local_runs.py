"""`fedqueue run`: a server, a coordinator and worker processes on this machine."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
from retrace import retrace
from safetensors.torch import load_file

from conftest import alive, descendants, read_results, wait_until, wait_until_ended, worker_pids
from fedqueue.config.loading import load_config
from fedqueue.task import load_task

pytestmark = [pytest.mark.slow, pytest.mark.server, pytest.mark.timeout(600)]

EXAMPLES = Path(__file__).parents[2] / "examples"


def check_agreement(summary, ledger):
    """Every number of the summary that can be counted in the ledger's lines is that count."""
    merged = [line for record in ledger if record["kind"] == "version" for line in record["merged"]]
    rejected = Counter(r["reason"] for r in ledger if r["kind"] == "rejected")
    assert summary["versions"] == len([r for r in ledger if r["kind"] == "version"])
    assert summary["updates_merged"] == len(merged) == sum(summary["clients"].values())
    assert summary["updates_rejected"] == dict(rejected)
    assert summary["jobs_abandoned"] == len([r for r in ledger if r["kind"] == "abandoned"])
    assert sum(summary["staleness"]["histogram"].values()) == len(merged)
    assert [r["version"] for r in ledger if r["kind"] == "version"] == list(range(1, summary["versions"] + 1))
    endings = [line["job"] for line in merged] + [r["job"] for r in ledger if r["kind"] in ("rejected", "abandoned")]
    assert len(endings) == len(set(endings)), "a job ended twice"
    numbers = sorted(int(job.split("-")[-2]) for job in endings)
    assert numbers == list(range(1, len(numbers) + 1)), "a job vanished without an ending"


def test_run_leaves_results_that_agree_and_no_process(config, start, tmp_path):
    program = start("fedqueue_coordinator", "run", config, "--workers", 2, "--output", "out", "--seed", 3)
    offspring = wait_until(
        lambda: len(found := descendants(program.process.pid)) >= 4 and found, "a server, two workers, their parent"
    )
    assert program.wait() == 0, program.text
    summary, ledger = read_results(tmp_path / "out")
    check_agreement(summary, ledger)
    assert (summary["versions"], summary["seed"], summary["mode"]) == (12, 3, "fedbuff")
    assert summary["stopped_because"] == "versions: 12 of 12"
    assert summary["history"][-1]["version"] == 12
    assert summary["metrics"]["accuracy"] > 0.6
    settings = load_config(config, ["seed=3"])
    task = load_task(settings.task.entrypoint, settings.task.options, tmp_path)
    saved = load_file(tmp_path / "out" / "model.safetensors")
    task.model().load_state_dict(saved)
    retraced = retrace(settings, task, ledger).state_dict()  # what is trained here has the bits of what workers trained
    assert all(torch.equal(saved[name], retraced[name]) for name in saved)
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert not any(map(alive, offspring))
    assert not (tmp_path / "out" / "redis").exists()
    assert "report:" in program.text


def test_compressed_digits_reach_95_percent_with_a_worker_killed_in_the_middle(start, tmp_path):
    """int8 up and bfloat16 down; afterwards the audit replays every merge of the encoded payloads to the same bits."""
    program = start(
        "fedqueue_coordinator", "run", EXAMPLES / "digits" / "federation.toml", "--output", "out",
        "--set", "clients.slowdown={client-0=20, client-4=20}", "--set", "dispatch.lease_seconds=3",
        "--set", "compression.up=int8", "--set", "compression.up_lossless=zstd", "--set", "compression.down=bfloat16",
        "--set", "compression.down_lossless=zstd", "--set", "ledger.keep_payloads=true",
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


def test_ctrl_c_keeps_the_model_so_far_and_leaves_no_process(config, start, tmp_path):
    program = start(
        "fedqueue_coordinator", "run", config, "--workers", 2, "--output", "out", "--set", "stop.versions=1000000"
    )
    wait_until(
        lambda: "version" in (tmp_path / "out" / "coordinator.log").read_text() or "updates" in program.text, "start"
    )
    wait_until(lambda: "accuracy" in program.text, "an evaluation")
    offspring = descendants(program.process.pid)
    program.send(signal.SIGINT)
    assert program.wait() == 130, program.text
    summary, ledger = read_results(tmp_path / "out")
    check_agreement(summary, ledger)
    assert summary["stopped_because"] == "interrupted"
    assert load_file(tmp_path / "out" / "model.safetensors")
    assert not any(map(alive, offspring))


def test_workers_and_server_end_when_the_runner_is_killed(config, start, tmp_path):
    program = start("fedqueue_coordinator", "run", config, "--output", "out", "--set", "stop.versions=1000000")
    workers = worker_pids(tmp_path / "out", 4)
    offspring = descendants(program.process.pid)
    assert set(workers) < set(offspring)
    program.send(signal.SIGKILL)
    program.wait()
    wait_until_ended(offspring)


def test_run_fails_with_the_reason_when_every_client_s_task_raises(config, start, tmp_path):
    program = start(
        "fedqueue_coordinator", "run", config, "--output", "out", "--workers", 2, "--set", "task.options.raises='*'",
        "--set", "dispatch.max_client_failures=2", "--set", "dispatch.backoff_seconds=0.1",
        "--set", "clients.minimum=4",
    )  # fmt: skip
    assert program.wait() == 1, program.text
    summary, ledger = read_results(tmp_path / "out")
    check_agreement(summary, ledger)
    assert "every client" in summary["stopped_because"]
    assert summary["abandoned_because"]["failed"] == 8
    failure = next(r for r in ledger if r["kind"] == "abandoned" and r["reason"] == "failed")
    assert "RuntimeError: the scanner is on fire; in fit (toy_task.py:" in failure["error"]


@pytest.mark.parametrize("mode", ["fedasync", "fedavg"])
def test_every_mode_trains(config, start, tmp_path, mode):
    program = start(
        "fedqueue_coordinator", "run", config, "--output", "out", "--workers", 2, "--quiet",
        "--set", f"aggregation.mode={mode}",
    )  # fmt: skip
    assert program.wait() == 0, program.text
    summary, ledger = read_results(tmp_path / "out")
    check_agreement(summary, ledger)
    assert summary["mode"] == mode
    assert program.text == ""
    if mode == "fedavg":
        assert summary["staleness"]["max"] == 0
        assert all(len(r["merged"]) == 4 for r in ledger if r["kind"] == "version")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_run_that_died_or_was_interrupted_goes_on_with_resume(config, start, tmp_path, how):
    endless = ("--set", "stop.versions=1000000")
    first = start("fedqueue_coordinator", "run", config, "--workers", 2, "--output", "out", *endless)
    wait_until(lambda: "accuracy" in first.text and "version 0 " not in first.text.splitlines()[-1], "a version")
    offspring = descendants(first.process.pid)
    first.send(how)
    first.wait()
    wait_until_ended(offspring)
    second = start(
        "fedqueue_coordinator", "run", "--resume", "out", "--set", "stop.versions=0", "--set", "stop.seconds=1"
    )
    assert second.wait() == 0, second.text
    summary, _ = read_results(tmp_path / "out")
    assert summary["versions"] >= 1
    assert summary["stopped_because"] == "seconds: 1"
    audit = start("fedqueue_coordinator", "audit", "out")
    assert audit.wait() == 0, audit.text
    again = start("fedqueue_coordinator", "run", "--resume", "out")
    assert again.wait() == 2
    assert "there is nothing to go on with" in again.text

"""`fedqueue remove`: what is deleted in Redis and on disk, what stays, and when it is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import redis

from fedqueue.errors import RunExists
from fedqueue_coordinator.operator import runs
from fedqueue_coordinator.operator.removal import plan_removal
from fedqueue_coordinator.operator.run_folder import Launch, RunFolder
from tests.support.command_line import CommandLine
from tests.support.sample_run import SampleRun


@pytest.fixture
def ended(fake_run: SampleRun, monkeypatch: pytest.MonkeyPatch) -> SampleRun:
    """Return a run that has ended, on the only server that is found; another run is on it too."""
    monkeypatch.setattr("fedqueue_coordinator.operator.removal.reachable_servers", lambda url: [fake_run.client])
    fake_run.join("c0")
    fake_run.posted(1)
    fake_run.coordinator.end("versions: 0 of 0", 3600, 1)
    fake_run.coordinator.release_lead()
    SampleRun(fake_run.client, "other").coordinator.release_lead()
    return fake_run


def keys_of(client: redis.Redis, run: str) -> list[bytes]:
    return [key for key in client.scan_iter() if run.encode() in key]


def results(folder: Path, run: str = "sample", **files: str) -> RunFolder:
    """Write a folder of results with files of fedqueue and others."""
    made = RunFolder(folder)
    with made.opened(Launch(Path("/f.toml"), [], run=run)):
        for name in ("summary.json", "model.safetensors", "replay/head.bin", "checkpoint.safetensors"):
            (made.unfinished / name).parent.mkdir(exist_ok=True)
            (made.unfinished / name).touch()
        made.publish(("summary.json", "model.safetensors", "replay"), complete=True)
    for name in ("logs/worker-0.log", "logs/workers.log", "coordinator.log"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    return made


def test_run_is_deleted_in_redis_and_on_disk(call: CommandLine, ended: SampleRun, folder: Path) -> None:
    results(folder / "runs" / "sample")
    others = keys_of(ended.client, "other")
    code, out, _ = call("remove", "sample", "--yes")
    assert code == 0
    assert "version 0 (ended: versions: 0 of 0)" in out
    assert "in runs/sample: logs/worker-0.log, logs/workers.log, summary.json, model.safetensors, replay/, unfi" in out
    assert out.endswith("sample is deleted\n")
    assert keys_of(ended.client, "sample") == []
    assert keys_of(ended.client, "other") == others
    assert not (folder / "runs" / "sample").exists()
    assert call("remove", "sample", "--yes")[::2] == (
        1, "fedqueue: no run named 'sample' on this server; `fedqueue list` lists those there are\n",
    )  # fmt: skip


def test_name_is_free_after_the_removal(call: CommandLine, ended: SampleRun) -> None:
    assert call("remove", "sample", "--yes")[0] == 0
    again = SampleRun(ended.client)
    assert again.coordinator.info().version == 0


@pytest.mark.usefixtures("ended")
def test_keys_egress_logs_and_other_files_stay(call: CommandLine, folder: Path) -> None:
    results(folder / "out")
    mine = [folder / "out" / name for name in ("keys/coordinator.key", "egress/c0.jsonl", "logs/mine.log", "notes.txt")]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    code, out, _ = call("remove", "sample", "--output", "out", "--yes")
    assert code == 0
    assert "kept in out: egress/, keys/, logs/, notes.txt" in out
    assert sorted(path for path in (folder / "out").rglob("*") if path.is_file()) == sorted(mine)


@pytest.mark.parametrize(("answer", "code", "left"), [("y\n", 0, 0), ("n\n", 1, 10), ("\n", 1, 10)])
def test_question_decides(
    call: CommandLine, ended: SampleRun, monkeypatch: pytest.MonkeyPatch, answer: str, code: int, left: int
) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.confirm", lambda question: answer.startswith("y"))
    assert call("remove", "sample")[0] == code
    assert bool(keys_of(ended.client, "sample")) == bool(left)


def test_without_a_terminal_yes_is_required(call: CommandLine, ended: SampleRun) -> None:
    code, out, err = call("remove", "sample")
    assert (code, out) == (2, "")
    assert (
        err == "fedqueue: --yes: missing, and there is no terminal to ask on; pass --yes to delete without a question\n"
    )
    assert keys_of(ended.client, "sample")


def test_run_with_a_leader_is_refused(call: CommandLine, ended: SampleRun, folder: Path) -> None:
    made = results(folder / "runs" / "sample")
    assert ended.coordinator.lead(60)
    before = keys_of(ended.client, "sample")
    code, _, err = call("remove", "sample", "--yes")
    assert (code, err) == (1, "fedqueue: run 'sample' is led by a coordinator; stop that coordinator first\n")
    assert keys_of(ended.client, "sample") == before
    assert (made.path / "summary.json").exists()


def test_leader_that_comes_after_the_question_is_safe(ended: SampleRun, folder: Path) -> None:
    removal = plan_removal("sample", "", None)
    assert ended.coordinator.lead(60)
    with pytest.raises(RunExists, match="is led by a coordinator"):
        removal.carry_out()
    assert keys_of(ended.client, "sample")


@pytest.mark.usefixtures("ended")
def test_folder_of_another_run_is_refused(call: CommandLine, folder: Path) -> None:
    results(folder / "out", run="other")
    assert "has run 'other', not 'sample'" in call("remove", "sample", "--output", "out", "--yes")[2]
    (folder / "mine").mkdir()
    assert "has no launch.json of a run" in call("remove", "sample", "--output", "mine", "--yes")[2]
    results(folder / "runs" / "sample", run="other")
    assert call("remove", "sample", "--yes")[0] == 0
    assert (folder / "runs" / "sample" / "summary.json").exists()


def test_results_without_redis_are_removed(call: CommandLine, folder: Path) -> None:
    assert runs.reachable_servers("") == []
    results(folder / "runs" / "sample")
    assert call("remove", "sample", "--yes")[0] == 0
    assert not (folder / "runs" / "sample").exists()

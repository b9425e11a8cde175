"""`fedqueue status`, `list` and `export`, on a real server and in the folders of finished runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
import torch
from safetensors.torch import load_file, save_file

from fedqueue.transport.store import Store
from fedqueue_coordinator.operator.embedded_server import EmbeddedServer
from tests.support.command_line import CommandLine
from tests.support.sample_run import SampleRun


@pytest.fixture
def live(server_client: redis.Redis) -> SampleRun:
    """Return a run on the real server: two versions, one client, one rejection, one failure, one evaluation."""
    run = SampleRun(server_client)
    run.join("c0")
    run.publish(1)
    run.publish(2)
    run.posted(1)
    run.coordinator.close("sample-00000001", {"kind": "rejected", "reason": "stale"}, 1)
    run.dispatch(2)
    run.coordinator.close(
        "sample-00000002", {"kind": "abandoned", "reason": "failed", "client": "c0", "error": "E: no"}, 1
    )
    run.coordinator.report("evaluated", b"")
    evaluation = {"kind": "evaluation", "version": 2, "metrics": {"accuracy": 0.5}}
    run.coordinator.ack([(run.coordinator.unacknowledged()[-1].id, evaluation)])
    run.dispatch(3)
    return run


@pytest.fixture
def finished(folder: Path) -> Path:
    """Write the files that a finished run leaves under runs/."""
    results = folder / "runs" / "old"
    results.mkdir(parents=True)
    summary = {"run": "old", "versions": 7, "model_version": 6, "metrics": {"loss": 0.25}, "history": [1, 2, 3]}
    (results / "summary.json").write_text(json.dumps(summary))
    save_file({"w": torch.tensor([1.0, 2.0])}, results / "model.safetensors")
    return results


# status


@pytest.mark.server
def test_status_of_the_only_run_is_shown(call: CommandLine, live: SampleRun, server: EmbeddedServer) -> None:
    code, out, err = call("status", "--redis", server.url)
    assert (code, err) == (0, "")
    assert "sample" in out
    for key, value in {"state": "running", "version": "2", "open jobs": "1", "clients alive": "c0"}.items():
        assert [line for line in out.splitlines() if key in line and value in line], key


@pytest.mark.server
def test_status_as_json_has_everything(call: CommandLine, live: SampleRun, server: EmbeddedServer) -> None:
    live.coordinator.renew_lead(60, "waiting for keeper university")
    code, out, _ = call("status", "--redis", server.url, "--run", "sample", "--json")
    assert code == 0
    shown = json.loads(out)
    expected = {
        "run": "sample", "state": "running", "leader": "owner-a", "version": 2, "updates_merged": 2,
        "clients_alive": ["c0"], "open_jobs": 1, "updates_rejected": {"stale": 1}, "jobs_abandoned": {"failed": 1},
        "posts_refused": {}, "waiting": "waiting for keeper university",
        "metrics": {"accuracy": 0.5}, "last_failure": "c0: E: no",
    }  # fmt: skip
    assert {key: shown[key] for key in expected} == expected


@pytest.mark.server
def test_status_finds_the_server_in_the_environment(
    call: CommandLine, live: SampleRun, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDQUEUE_REDIS__URL", server.url)
    assert json.loads(call("status", "--json")[1])["run"] == "sample"


@pytest.mark.server
def test_status_finds_the_server_of_a_local_run(
    call: CommandLine, live: SampleRun, server: EmbeddedServer, folder: Path
) -> None:
    (folder / "runs" / "sample").mkdir(parents=True)
    (folder / "runs" / "sample" / "redis.url").write_text(server.url)
    (folder / "runs" / "dead").mkdir()
    (folder / "runs" / "dead" / "redis.url").write_text(f"unix://{folder}/dead.sock")
    assert json.loads(call("status", "--json")[1])["run"] == "sample"


@pytest.mark.server
def test_status_and_list_write_nothing(call: CommandLine, live: SampleRun, server: EmbeddedServer) -> None:
    before = live.contents()
    call("status", "--redis", server.url)
    call("list", "--redis", server.url)
    assert live.contents() == before


@pytest.mark.server
def test_status_of_an_unknown_run_is_exit_code_1(call: CommandLine, live: SampleRun, server: EmbeddedServer) -> None:
    code, out, err = call("status", "--redis", server.url, "--run", "nobody")
    assert (code, out) == (1, "")
    assert err == "fedqueue: no run named 'nobody' on this server; `fedqueue list` lists those there are\n"


@pytest.mark.server
def test_status_of_one_of_several_runs_needs_a_name(call: CommandLine, live: SampleRun, server: EmbeddedServer) -> None:
    type(live)(live.client, "second")
    assert call("status", "--redis", server.url)[0] == 1
    assert json.loads(call("status", "--redis", server.url, "--run", "second", "--json")[1])["version"] == 0


@pytest.mark.server
def test_status_ignores_an_expired_run(call: CommandLine, live: SampleRun, server: EmbeddedServer) -> None:
    gone = type(live)(live.client, "gone")
    for name in gone.names():
        live.client.delete(f"fedqueue:{{gone}}:{name}")
    assert json.loads(call("status", "--redis", server.url, "--json")[1])["run"] == "sample"
    assert [row["run"] for row in json.loads(call("list", "--redis", server.url, "--json")[1])] == ["sample"]


def test_status_without_any_run_is_exit_code_1(call: CommandLine) -> None:
    code, _, err = call("status")
    assert (code, err.count("\n")) == (1, 1)
    assert "--run" in err


@pytest.mark.parametrize("arguments", [[], ["--run", "old"]])
def test_status_of_a_finished_run_is_its_summary(call: CommandLine, finished: Path, arguments: list[Any]) -> None:
    shown = json.loads(call("status", "--json", *arguments)[1])
    assert (shown["run"], shown["state"], shown["versions"], shown["folder"]) == ("old", "ended", 7, "runs/old")
    assert "history" not in shown
    assert "0.25" in call("status", *arguments)[1]


# list


def test_list_reports_that_there_are_no_runs(call: CommandLine) -> None:
    code, out, _ = call("list")
    assert (code, out) == (0, "no runs found on a Redis server or under runs/; `fedqueue run CONFIG.toml` starts one\n")
    assert json.loads(call("list", "--json")[1]) == []


@pytest.mark.server
def test_list_shows_runs_on_the_server_and_in_folders(
    call: CommandLine, live: SampleRun, server: EmbeddedServer, finished: Path
) -> None:
    rows = json.loads(call("list", "--redis", server.url, "--json")[1])
    assert rows == [
        {"run": "sample", "state": "running", "version": 2, "where": "Redis"},
        {"run": "old", "state": "ended", "version": 7, "where": "runs/old"},
    ]
    out = call("list", "--redis", server.url)[1]
    assert "sample" in out
    assert "runs/old" in out


# export


@pytest.mark.server
def test_export_writes_the_newest_version_as_a_plain_state_dict(
    call: CommandLine, live: SampleRun, server: EmbeddedServer, folder: Path
) -> None:
    code, out, _ = call("export", "sample", "--redis", server.url, "--output", folder / "deep" / "model.safetensors")
    assert (code, out) == (
        0,
        f"version 2 of sample is in {folder}/deep/model.safetensors (not verified: the run is not signed)\n",
    )
    state = load_file(folder / "deep" / "model.safetensors")
    assert {n: (t.dtype, t.shape) for n, t in state.items()} == {
        n: (t.dtype, t.shape) for n, t in live.module.state_dict().items()
    }
    assert set(state["0.weight"].flatten().tolist()) == {2.0}
    live.module.load_state_dict(state)


@pytest.mark.server
def test_export_writes_an_older_stored_version(
    call: CommandLine, live: SampleRun, server: EmbeddedServer, folder: Path
) -> None:
    live.worker().claim("sample-00000003", 60)
    live.publish(3)
    code, _, _ = call("export", "sample", "--version", 2, "--redis", server.url, "--output", "m.safetensors")
    assert code == 0
    assert set(load_file(folder / "m.safetensors")["0.weight"].flatten().tolist()) == {2.0}


@pytest.mark.server
def test_export_of_a_deleted_version_lists_the_stored_ones(
    call: CommandLine, live: SampleRun, server: EmbeddedServer, folder: Path
) -> None:
    code, _, err = call("export", "sample", "--version", 1, "--redis", server.url, "--output", "m.safetensors")
    assert (code, err) == (1, "fedqueue: version 1 of sample is no longer stored; stored versions: 2\n")
    assert not (folder / "m.safetensors").exists()


def test_export_of_an_unknown_run_is_exit_code_1(call: CommandLine) -> None:
    code, _, err = call("export", "nobody", "--output", "m.safetensors")
    assert code == 1
    assert err.startswith("fedqueue: no run named 'nobody'")


def test_export_of_a_finished_run_copies_its_model(call: CommandLine, finished: Path, folder: Path) -> None:
    code, out, _ = call("export", "old", "--output", "copy/m.safetensors")
    assert (code, out) == (0, "version 6 of old is in copy/m.safetensors\n")
    assert load_file(folder / "copy" / "m.safetensors")["w"].tolist() == [1.0, 2.0]
    assert call("export", "old", "--version", 6, "--output", "again.safetensors")[0] == 0


def test_export_of_a_missing_version_names_the_stored_one(call: CommandLine, finished: Path) -> None:
    code, _, err = call("export", "old", "--version", 3, "--output", "m.safetensors")
    assert (code, err) == (1, "fedqueue: run old has ended, and runs/old holds only version 6\n")


# Start-up time

LEAN = """
import sys
HEAVY = {"torch", "matplotlib", "sklearn", "numpy", "rq", "structlog"}
def lean(what, without):
    heavy = without & set(sys.modules)
    assert not heavy, f"{what} imports {heavy}"
import fedqueue
fedqueue.Task, fedqueue.Client, fedqueue.TrainResult
lean("import fedqueue", HEAVY | {"redis", "pydantic", "typer"})
from fedqueue_coordinator.cli.main import app
from fedqueue_worker.cli import app as worker
def call(app, *arguments, without):
    try:
        app(list(arguments))
    except SystemExit as ended:
        assert not ended.code
    lean(" ".join(arguments), without)
call(app, "--help", without=HEAVY | {"redis", "cryptography", "pydantic"})
for words in (["run", "--help"], ["init", "fresh"]):  # typer takes pydantic for the types of options
    call(app, *words, without=HEAVY | {"redis", "cryptography"})
call(worker, "--help", without=HEAVY | {"redis", "cryptography"})
call(app, "list", "--redis", URL, without=HEAVY | {"cryptography.hazmat", "fedqueue.config.schema"})
call(app, "status", "--redis", URL, without=HEAVY | {"cryptography.hazmat", "fedqueue.config.schema"})
for words in (["acl", "sample", "--client", "c0"], ["certs", "tls"], ["enroll", "c0"], ["revoke", "c0"]):
    call(app, *words, without=HEAVY - {"numpy"})
import fedqueue_keeper.process
lean("a keeper", {"torch", "matplotlib", "sklearn", "rq"})
"""


@pytest.mark.slow
@pytest.mark.server
def test_commands_that_train_nothing_import_no_heavy_module(
    live: SampleRun, server: EmbeddedServer, folder: Path
) -> None:
    source = f"URL = {server.url!r}\n{LEAN}"
    done = subprocess.run([sys.executable, "-c", source], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert np.all([word in done.stdout for word in ("Usage", "sample", "running")])


def test_store_reads_a_run_without_a_leader(fake_run: SampleRun) -> None:
    assert Store(fake_run.client, "sample").info().version == 0

"""`fedqueue track`: the hooks' calls from a ledger that grows in Redis, and from a folder of results."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import redis

import fedqueue
from fedqueue.errors import ConfigurationError, FedqueueError, RunNotFound, StoreError
from fedqueue.protocol.msgpack import pack_record
from fedqueue.transport.ledger_tail import LedgerReplaced, LedgerTail
from fedqueue_coordinator.operator import track
from fedqueue_coordinator.operator.track import track_run
from tests.support.sample_run import SampleRun
from tests.tracking.test_feed import Line, Recorder, evaluation, version

CALLS: list[Recorder] = []


class Seen(Recorder):
    """Hooks that the test can reach."""

    def __init__(self) -> None:
        super().__init__()
        CALLS.append(self)


class Broken(fedqueue.RunHooks):
    def on_version(self, record: Mapping[str, Any]) -> None:
        raise ValueError("no ink")


SEEN, BROKEN = f"{__name__}:Seen", f"{__name__}:Broken"


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    CALLS.clear()
    return tmp_path


@pytest.fixture
def live(run: SampleRun, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> SampleRun:
    """Return a run on the only server that there is."""
    monkeypatch.setattr(track, "reachable_servers", lambda url: [redis_client])
    return run


class Looks:
    """In place of the wait between two looks: carries out a step each time."""

    def __init__(self, *steps: Callable[[], object]) -> None:
        self.steps = list(steps)

    def __call__(self, seconds: float) -> None:
        self.steps.pop(0)()


def append(run: SampleRun, *records: Mapping[str, Any]) -> None:
    for record in records:
        run.client.xadd(run.keys.ledger, {"record": pack_record(record)})


def end(run: SampleRun) -> None:
    run.client.hset(run.keys.config, mapping={"state": "ended", "stopped_because": "versions: 3 of 3"})


def story() -> list[tuple[str, Any]]:
    """Return the calls of the hooks, with the version where there is one."""
    [hooks] = CALLS
    return [(name, progress.version) for name, _, progress in hooks.calls]


def test_live_run_is_followed_until_it_ends(live: SampleRun) -> None:
    append(live, version(1, 2))
    looks = Looks(lambda: append(live, version(2, 3), evaluation(1, 2.5)), lambda: end(live))
    assert track_run("sample", "", [SEEN], False, looks)
    assert story() == [("start", 0), ("version", 1), ("version", 2), ("evaluation", 1), ("end", 2)]
    assert [progress.updates for _, _, progress in CALLS[0].calls] == [0, 2, 5, 2, 5]
    [begun], [summary] = CALLS[0].of("start"), CALLS[0].of("end")
    assert begun.config["stop"]["versions"] == 99
    assert (summary["run"], summary["updates_merged"], summary["stopped_because"]) == ("sample", 5, "versions: 3 of 3")
    assert looks.steps == []


def test_tracking_reads_no_record_twice_and_writes_nothing(live: SampleRun, monkeypatch: pytest.MonkeyPatch) -> None:
    append(live, *(version(number) for number in range(1, 4)))
    read: list[int] = []
    whole = LedgerTail.read

    def counted(tail: Any, *arguments: Any) -> Any:
        records = whole(tail, *arguments)
        read.append(len(records))
        return records

    monkeypatch.setattr(LedgerTail, "read", counted)
    before: dict[str, Any] = {}
    looks = Looks(lambda: before.update(live.contents()), lambda: append(live, version(4)), lambda: end(live))
    track_run("sample", "", [SEEN], False, looks)
    assert [count for count in read if count] == [3, 1]
    ended = {"fedqueue:{sample}:config", "fedqueue:{sample}:ledger"}
    assert {name: value for name, value in live.contents().items() if name not in ended} == {
        name: value for name, value in before.items() if name not in ended
    }


def test_restored_ledger_is_not_told_twice(live: SampleRun) -> None:
    """The checkpoint had version 1; version 2 was made again under another epoch."""
    epoch = {"kind": "epoch", "epoch": 1, "version": 1, "job_number": 1, "seconds": 1.0}

    def lose() -> None:
        live.client.delete(live.keys.ledger)
        live.client.hset(live.keys.config, "epoch", 1)
        append(live, version(1, 2), epoch, version(2, 5))

    append(live, version(1, 2), version(2, 3))
    track_run("sample", "", [SEEN], False, Looks(lose, lambda: end(live)))
    assert story() == [("start", 0), ("version", 1), ("version", 2), ("version", 2), ("end", 2)]
    assert CALLS[0].calls[-1][2].updates == 2 + 5


def test_another_run_of_the_same_name_ends_the_tracking(live: SampleRun) -> None:
    def replace() -> None:
        live.client.delete(live.keys.ledger)
        append(live, version(1))

    append(live, version(1), version(2))
    with pytest.raises(LedgerReplaced, match="another run of the same name"):
        track_run("sample", "", [SEEN], False, Looks(replace))
    assert CALLS[0].of("end")[0]["complete"] is False


def test_interrupt_ends_the_story_for_the_trackers(live: SampleRun) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    append(live, version(1))
    with pytest.raises(KeyboardInterrupt):
        track_run("sample", "", [SEEN], False, Looks(interrupt))
    [summary] = CALLS[0].of("end")
    assert (summary["complete"], summary["stopped_because"]) == (False, "no longer followed")


def test_failed_tracker_is_left_out_and_the_others_go_on(live: SampleRun) -> None:
    append(live, version(1))
    end(live)
    assert not track_run("sample", "", [BROKEN, SEEN], False, Looks())
    assert story() == [("start", 0), ("version", 1), ("end", 1)]


def test_tracking_ends_with_the_last_tracker(live: SampleRun) -> None:
    append(live, version(1))
    with pytest.raises(FedqueueError, match="no tracker is left"):
        track_run("sample", "", [BROKEN], False, Looks())


# Results


def finished(folder: Path) -> fedqueue.RunResult:
    return fedqueue.simulate(
        Line, clients=3, aggregation={"buffer_size": 2}, versions=3, folder=folder, training={"learning_rate": 0.5}
    )


def test_results_tell_the_same_story_as_the_run(own_folder: Path) -> None:
    result = finished(own_folder / "out")
    assert track_run("out", "", [SEEN], False)
    assert CALLS[0].of("version") == [r for r in result.ledger if r["kind"] == "version"]
    assert [v for v, _ in CALLS[0].of("evaluation")] == [e["version"] for e in result.history]
    assert CALLS[0].of("end")[0]["folder"] == "out"


def test_metric_that_is_not_finite_is_a_number_again(own_folder: Path) -> None:
    finished(own_folder / "out")
    ledger = own_folder / "out" / "ledger.jsonl"
    record = {"kind": "evaluation", "version": 0, "seconds": 0.0, "metrics": {"auc": None}}
    ledger.write_text(json.dumps(record) + "\n" + ledger.read_text())
    track_run("out", "", [SEEN], False)
    value = CALLS[0].of("evaluation")[0][1]["auc"]
    assert math.isnan(value)


def test_local_run_whose_server_is_gone_ends_in_its_results(
    live: SampleRun, own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A local run's server ends with it; what followed the last look is in its folder."""
    folder = own_folder / "runs" / "sample"
    result = finished(own_folder / "made")
    ledger = result.ledger
    folder.mkdir(parents=True)
    (folder / "redis.url").write_text("unix:///gone.sock")

    def stop_server() -> None:
        (folder / "redis.url").unlink()
        monkeypatch.setattr(live.client, "xrange", gone)
        monkeypatch.setattr(live.client, "pipeline", gone)

    def deliver() -> None:
        for name in ("summary.json", "ledger.jsonl"):
            (folder / name).write_bytes((own_folder / "made" / name).read_bytes())

    append(live, *ledger[:4])
    assert track_run("sample", "", [SEEN], False, Looks(stop_server, deliver))
    assert CALLS[0].of("version") == [r for r in ledger if r["kind"] == "version"]
    assert CALLS[0].of("end")[0]["folder"] == "runs/sample"


def gone(*arguments: Any, **options: Any) -> Any:
    raise redis.ConnectionError("No such file or directory")


def test_local_run_that_left_no_results_is_said(
    live: SampleRun, own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The results in its folder are those of an earlier run."""
    folder = own_folder / "runs" / "sample"
    finished(folder)
    (folder / "redis.url").write_text("unix:///gone.sock")

    def stop_server() -> None:
        (folder / "redis.url").unlink()
        monkeypatch.setattr(live.client, "xrange", gone)
        monkeypatch.setattr(live.client, "pipeline", gone)

    append(live, version(1))
    looks = Looks(stop_server, *[lambda: None] * track.LOOKS_FOR_RESULTS)
    with pytest.raises(StoreError, match="has left no results: see runs/sample"):
        track_run("sample", "", [SEEN], False, looks)
    assert CALLS[0].of("end")[0]["complete"] is False


# What is refused


def test_unknown_run_is_named(live: SampleRun) -> None:
    with pytest.raises(RunNotFound, match="no run named 'nobody'"):
        track_run("nobody", "", [SEEN], False)


@pytest.mark.parametrize(
    ("to", "says"),
    [
        ("tensorbord:x", r"is no tracker; did you mean 'tensorboard'\?"),
        ("visdom", "is no tracker; write tensorboard:…, mlflow:…, wandb:… or path/to/file.py:Class"),
        ("absent.py:Mine", "cannot be loaded: --to: there is no file"),
        ("mlflow:https://me:secret@host/", "uri has a password; set MLFLOW_TRACKING_USERNAME"),
    ],
)
def test_unsuitable_tracker_is_named(to: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says) as refused:
        track_run("any", "", [to], False)
    assert "secret" not in str(refused.value)

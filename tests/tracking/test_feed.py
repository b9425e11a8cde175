"""Hooks follow a run without being in its way: raising, hanging and slow ones, and the calls that each one gets."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import redis
import structlog
import torch

import fedqueue
from fedqueue import RunHooks, RunProgress, RunResult, RunStart
from fedqueue.transport.store import Store
from fedqueue_coordinator.core.observer import RunObserver
from fedqueue_coordinator.core.run_counters import RunCounters
from fedqueue_coordinator.tracking import feed as feeds
from fedqueue_coordinator.tracking.feed import HookFeed
from tests.support import scripted_run
from tests.support.builders import make_config, same_bits
from tests.support.scripted_run import Workers, lead, scripted_config


class Line(fedqueue.Task):
    def model(self) -> Any:
        return torch.nn.Linear(1, 1)

    def train_data(self, client: fedqueue.Client) -> Any:
        x = torch.linspace(0, 1 + (client.partition or 0), 64).unsqueeze(1)
        return torch.utils.data.TensorDataset(x, 2 * x + 1)

    def test_data(self) -> Any:
        return torch.zeros(4, 1)

    def loss(self, model: Any, batch: Any) -> Any:
        return torch.nn.functional.mse_loss(model(batch[0]), batch[1])

    def evaluate(self, model: Any, data: Any) -> dict[str, float]:
        return {"offset": float(model(data).detach().mean())}


class Recorder(RunHooks):
    """Keeps each call with its progress."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any, RunProgress]] = []

    def _keep(self, name: str, what: Any) -> None:
        self.calls.append((name, what, self.progress))

    def on_start(self, run: RunStart) -> None:
        self._keep("start", run)

    def on_version(self, record: Mapping[str, Any]) -> None:
        self._keep("version", record)

    def on_evaluation(self, version: int, metrics: Mapping[str, float]) -> None:
        self._keep("evaluation", (version, metrics))

    def on_rejection(self, record: Mapping[str, Any]) -> None:
        self._keep("rejection", record)

    def on_client(self, record: Mapping[str, Any]) -> None:
        self._keep("client", record)

    def on_end(self, summary: Mapping[str, Any]) -> None:
        self._keep("end", summary)

    def of(self, name: str) -> list[Any]:
        return [what for kind, what, _ in self.calls if kind == name]


class Raising(RunHooks):
    def __init__(self) -> None:
        self.calls = 0

    def on_version(self, record: Mapping[str, Any]) -> None:
        self.calls += 1
        raise ValueError("the plotter has no ink")


class Leaving(RunHooks):
    def on_start(self, run: RunStart) -> None:
        raise SystemExit(3)


class Blocked(Recorder):
    """Hangs in its first version until it is set free."""

    def __init__(self) -> None:
        super().__init__()
        self.reached, self.free = threading.Event(), threading.Event()

    def on_version(self, record: Mapping[str, Any]) -> None:
        super().on_version(record)
        self.reached.set()
        self.free.wait()


@pytest.fixture
def blocked() -> Iterator[Blocked]:
    hooks = Blocked()
    yield hooks
    hooks.free.set()


def simulate(*hooks: RunHooks, **settings: Any) -> RunResult:
    described: dict[str, Any] = {"clients": 4, "strategy": "fedbuff", "aggregation": {"buffer_size": 3}, "versions": 6}
    return fedqueue.simulate(Line, hooks=hooks, **{**described, **settings})


class Counted:
    """What `HookFeed.begins` reads of a federation."""

    version = 0
    run_counters = RunCounters()


def begun(*hooks: RunHooks, clock: Any = None, end_seconds: float = 30.0) -> HookFeed:
    """Return the feed of a run that has begun."""
    config = make_config(name="fed", trackers={"end_seconds": end_seconds})
    named = [(type(of_name).__name__, of_name) for of_name in hooks]
    feed = HookFeed(config, named, **({"clock": clock} if clock else {}))
    federation: Any = Counted()
    feed.begins(federation, 0.0)
    return feed


def version(number: int, updates: int = 1) -> dict[str, Any]:
    line = {"client": "c0", "staleness": 0}
    return {"kind": "version", "version": number, "seconds": float(number), "merged": [line] * updates}


def evaluation(number: int, seconds: float) -> dict[str, Any]:
    return {"kind": "evaluation", "version": number, "metrics": {"accuracy": 0.5}, "seconds": seconds}


def summary(**fields: Any) -> dict[str, Any]:
    return {"stopped_because": "versions", "complete": True, "seconds": 0.0, "folder": None, **fields}


# What hooks are told


def test_hooks_get_what_the_ledger_has_in_its_order() -> None:
    hooks = Recorder()
    result = simulate(hooks)
    assert hooks.of("version") == [r for r in result.ledger if r["kind"] == "version"]
    told = [(e["version"], {"offset": e["offset"]}) for e in result.history]
    assert hooks.of("evaluation") == told
    assert [name for name, _, _ in hooks.calls][:2] == ["start", "evaluation"]
    assert [name for name, _, _ in hooks.calls][-1] == "end"
    [run] = hooks.of("start")
    assert (run.name, run.strategy, run.version) == ("Line", "fedbuff", 0)
    assert run.config["aggregation"]["buffer_size"] == 3
    [end] = hooks.of("end")
    assert (end["versions"], end["complete"], end["folder"]) == (6, True, None)
    assert end["stopped_because"] == result.stopped_because


def test_progress_counts_updates_at_the_version_of_the_call() -> None:
    hooks = Recorder()
    feed = begun(hooks)
    for record in (version(1, 3), version(2, 4), evaluation(1, 2.5), version(3, 5)):
        feed.recorded(record)
    feed.end(summary(seconds=9.0))
    seen = [(name, p.version, p.updates, p.seconds) for name, _, p in hooks.calls]
    assert seen == [
        ("start", 0, 0, 0.0), ("version", 1, 3, 1.0), ("version", 2, 7, 2.0), ("evaluation", 1, 3, 2.5),
        ("version", 3, 12, 3.0), ("end", 3, 12, 9.0),
    ]  # fmt: skip


def test_rejections_are_counted_by_reason() -> None:
    hooks = Recorder()
    feed = begun(hooks)
    for reason in ("stale", "norm", "stale"):
        feed.recorded({"kind": "rejected", "client": "c0", "reason": reason, "version": 0, "seconds": 1.0})
    feed.end(summary())
    assert [record["reason"] for record in hooks.of("rejection")] == ["stale", "norm", "stale"]
    assert [p.rejected for name, _, p in hooks.calls if name in ("start", "end")] == [{}, {"stale": 2, "norm": 1}]


def test_evaluation_that_failed_is_no_call() -> None:
    hooks = Recorder()
    feed = begun(hooks)
    feed.recorded({**evaluation(0, 1.0), "metrics": {}, "error": "ValueError: no"})
    feed.end(summary())
    assert [name for name, _, _ in hooks.calls] == ["start", "end"]


def test_run_without_a_result_ends_for_its_hooks_too() -> None:
    hooks = Recorder()
    feed = begun(hooks)
    feed.recorded(version(1, 2))
    with pytest.raises(KeyError), feed:
        raise KeyError("lost")
    [end] = hooks.of("end")
    assert (end["complete"], end["stopped_because"], end["versions"], end["updates_merged"]) == (False, "'lost'", 1, 2)


def test_hooks_learn_of_one_beginning_and_one_end() -> None:
    hooks = Recorder()
    federation: Any = Counted()
    with begun(hooks) as feed:
        feed.begins(federation, 5.0)  # as after an outage
        feed.end(summary())
    assert [name for name, _, _ in hooks.calls] == ["start", "end"]


class Kept(RunObserver):
    def __init__(self) -> None:
        self.records: list[Mapping[str, Any]] = []
        self.begun: list[int] = []

    def begins(self, federation: Any, now: float) -> None:
        self.begun.append(federation.version)

    def recorded(self, record: Mapping[str, Any]) -> None:
        self.records.append(record)


def test_coordinator_tells_its_observer_what_redis_has(
    redis_client: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Kept()
    coordinator = functools.partial(scripted_run.Coordinator, observer=kept)  # type: ignore[attr-defined]
    monkeypatch.setattr(scripted_run, "Coordinator", coordinator)
    config = scripted_config()
    lead(redis_client, Workers(redis_client, config), config, tmp_path, lambda point: None)
    ledger = Store(redis_client, config.name).ledger()
    assert {record["kind"] for record in ledger} >= {"version", "rejected", "abandoned"}
    assert [without_token(record) for record in kept.records] == [without_token(record) for record in ledger]
    assert kept.begun == [0]


def without_token(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "token"}


# Hooks that fail


@pytest.mark.parametrize("kind", ["raising", "leaving", "hanging", "slow", "recording"])
def test_no_hook_changes_a_bit_of_the_run(kind: str, blocked: Blocked) -> None:
    settings = {"trackers": {"end_seconds": 0.05}}
    alone = simulate(**settings)
    hooks = {
        "raising": Raising(), "leaving": Leaving(), "hanging": blocked, "slow": Slow(), "recording": Recorder(),
    }[kind]  # fmt: skip
    followed = simulate(hooks, **settings)
    assert same_bits(alone.model, followed.model)
    assert alone.ledger == followed.ledger


class Slow(RunHooks):
    def on_version(self, record: Mapping[str, Any]) -> None:
        threading.Event().wait(0.01)


def test_raising_hooks_are_reported_once_and_left_out() -> None:
    raising, other = Raising(), Recorder()
    with structlog.testing.capture_logs() as logs:
        simulate(raising, other)
    [entry] = [entry for entry in logs if "tracker" in entry]
    assert entry["event"] == "tracker failed and is left out; the run is not affected"
    assert (entry["log_level"], entry["tracker"], entry["call"]) == ("warning", "Raising", "on_version")
    assert entry["error"].startswith("ValueError: the plotter has no ink; in on_version (test_feed.py:")
    assert raising.calls == 1
    assert len(other.of("version")) == 6


def test_hanging_hooks_hold_the_end_up_for_a_set_time(blocked: Blocked) -> None:
    other = Recorder()
    with structlog.testing.capture_logs() as logs:
        simulate(blocked, other, trackers={"end_seconds": 0.2})
    said = [entry for entry in logs if entry.get("tracker") == "Blocked"]
    assert [entry["event"] for entry in said] == [
        "tracker did not come to its end within trackers.end_seconds, and is left out",
        "calls were left out for a tracker that is slower than the run",
    ]
    assert (said[0]["call"], said[0]["end_seconds"]) == ("on_version", 0.2)
    assert said[1]["lacks"].startswith("5 of 6 versions")
    assert len(other.of("end")) == 1


# Hooks that are slow


def test_full_queue_thins_versions_out_and_keeps_evaluations(blocked: Blocked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "MOST_WAITING", 20)
    with structlog.testing.capture_logs() as logs:
        feed = begun(blocked)
        for number in range(1, 101):
            feed.recorded(version(number))
            if number % 10 == 0:
                feed.recorded(evaluation(number, float(number)))
        blocked.free.set()
        feed.end(summary())
    versions = [record["version"] for record in blocked.of("version")]
    assert [number for number, _ in blocked.of("evaluation")] == list(range(10, 101, 10))
    assert len(blocked.of("end")) == 1
    assert versions == sorted(versions)
    assert versions[-1] == 100
    assert len(versions) <= 21
    assert [p.updates for name, _, p in blocked.calls if name == "version"] == versions
    first, last = [entry for entry in logs if "tracker" in entry]
    assert "versions are left out for it, evaluations and the end are not" in first["event"]
    assert last["lacks"] == f"{100 - len(versions)} of 100 versions"


def test_versions_still_waiting_at_the_end_give_way_to_it(blocked: Blocked) -> None:
    times = iter([0.0])

    def clock() -> float:
        """Be past half of `end_seconds` as soon as the end waits."""
        now = next(times, 20.0)
        if now:
            blocked.free.set()
        return now

    feed = begun(blocked, clock=clock)
    feed.recorded(version(1))
    assert blocked.reached.wait(60)
    for number in range(2, 50):
        feed.recorded(version(number))
    feed.recorded(evaluation(49, 49.0))
    with structlog.testing.capture_logs() as logs:
        feed.end(summary())
    assert [name for name, _, _ in blocked.calls] == ["start", "version", "evaluation", "end"]
    assert [entry["lacks"] for entry in logs] == ["48 of 49 versions"]


def test_queue_is_bounded_by_the_updates_in_it(blocked: Blocked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "MOST_WAITING", 100)
    feed = begun(blocked)
    for number in range(1, 50):
        feed.recorded(version(number, updates=24))
    blocked.free.set()
    feed.end(summary())
    assert len(blocked.of("version")) <= 5


# How hooks are given


def test_class_in_place_of_an_instance_is_named() -> None:
    with pytest.raises(fedqueue.ConfigurationError, match=r"hooks: Recorder is no fedqueue.RunHooks; pass an instance"):
        simulate(Recorder)  # type: ignore[arg-type]

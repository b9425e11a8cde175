"""Leadership of a run that Redis has lost: only a coordinator with the run's checkpoint may lead the run."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import redis
import torch

from fedqueue import Task
from fedqueue.config.loading import parse_config
from fedqueue.errors import ConfigurationError, RunExists, RunLost, ServerUnavailable
from fedqueue.protocol.stream_entry import StreamEntry
from fedqueue_coordinator.service.checkpoint import CHECKPOINT_FILENAME, load_checkpoint
from fedqueue_coordinator.service.coordinator import Coordinator
from fedqueue_coordinator.service.coordinator_store import CoordinatorStore
from fedqueue_coordinator.service.leader_election import acquire_leadership
from tests.support.sample_run import SampleRun
from tests.support.scripted_run import result_of


class Losing(CoordinatorStore):
    """A store whose Redis loses all data once, just before the lease is acquired."""

    lost = False

    def lead(self, lease_seconds: float) -> bool:
        if not self.lost:
            self.lost = True
            self.redis.flushall()
        return super().lead(lease_seconds)


class Patient:
    """A process that is told to stop after a number of waits."""

    def __init__(self, waits: int) -> None:
        self.left = waits

    def sleep(self, seconds: float) -> None:
        self.left -= 1

    def stopped(self) -> bool:
        return self.left <= 0


def take(
    run: SampleRun, store: Any, checkpoint: Any, known: bool = False, standby: bool = True, waits: int = 100
) -> Any:
    patient = Patient(waits)
    return acquire_leadership(store, run.config, checkpoint, known, standby, patient.stopped, patient.sleep)


def test_standby_does_not_recreate_a_lost_run(run: SampleRun, tmp_path: Path) -> None:
    run.coordinator.release_lead()
    standby = Losing(run.client, run.name, "standby")
    assert not take(run, standby, tmp_path / CHECKPOINT_FILENAME)
    assert CoordinatorStore(run.client, run.name, "another").lead(60), "the standby did not release the lease"


def test_standby_with_a_checkpoint_leads_a_lost_run(run: SampleRun, tmp_path: Path) -> None:
    run.coordinator.release_lead()
    (tmp_path / CHECKPOINT_FILENAME).touch()
    assert take(run, Losing(run.client, run.name, "standby"), tmp_path / CHECKPOINT_FILENAME)


def test_last_leader_comes_before_an_older_checkpoint(run: SampleRun, tmp_path: Path) -> None:
    """Each has a checkpoint on its own disk; the standby has waited behind the leader for three leases."""
    checkpoint = tmp_path / CHECKPOINT_FILENAME
    checkpoint.touch()
    standby, log = CoordinatorStore(run.client, run.name, "standby"), []

    def sleep(seconds: float) -> None:
        log.append(standby.exists())
        if len(log) == 60:
            run.client.flushall()
        elif len(log) == 75:  # the standby would have led since the next look at an empty server
            assert take(run, run.coordinator, checkpoint, known=True)

    assert not acquire_leadership(standby, run.config, checkpoint, False, True, lambda: len(log) > 150, sleep)
    assert run.client.hget(run.keys.leader, "owner") == b"owner-a"


def test_standby_leads_if_the_last_leader_stays_away(run: SampleRun, tmp_path: Path) -> None:
    (tmp_path / CHECKPOINT_FILENAME).touch()
    run.client.flushall()
    standby = CoordinatorStore(run.client, run.name, "standby")
    assert not take(run, standby, tmp_path / CHECKPOINT_FILENAME, waits=15)
    assert take(run, standby, tmp_path / CHECKPOINT_FILENAME, waits=25)


@pytest.mark.parametrize(("known", "leads"), [(False, True), (True, False)])
def test_coordinator_leads_on_an_empty_server_if_run_is_new(
    run: SampleRun, tmp_path: Path, known: bool, leads: bool
) -> None:
    run.client.flushall()
    fresh = CoordinatorStore(run.client, run.name, "fresh")
    assert take(run, fresh, tmp_path / CHECKPOINT_FILENAME, known, standby=False, waits=1) == leads


def test_fresh_standby_waits_one_lease_on_an_empty_server(run: SampleRun, tmp_path: Path) -> None:
    run.client.flushall()
    fresh = CoordinatorStore(run.client, run.name, "fresh")
    assert not take(run, fresh, tmp_path / CHECKPOINT_FILENAME, waits=15)
    assert take(run, fresh, tmp_path / CHECKPOINT_FILENAME, waits=25)


def test_lost_run_and_led_run_are_distinct_errors(run: SampleRun, tmp_path: Path) -> None:
    another = CoordinatorStore(run.client, run.name, "another")
    with pytest.raises(RunExists, match="is led by another coordinator"):
        take(run, another, tmp_path / CHECKPOINT_FILENAME, standby=False)
    run.client.flushall()
    with pytest.raises(RunLost, match=r"'sample'.*checkpoint\.safetensors.*start it again"):
        take(run, another, tmp_path / CHECKPOINT_FILENAME, known=True, standby=False)


class Line(Task):
    def model(self) -> Any:
        return torch.nn.Linear(2, 1)


class Scripted(CoordinatorStore):
    """A store that runs one scripted step where the coordinator would wait for entries."""

    steps: list[Callable[[], object]]

    def receive(self, block_seconds: float, count: int = 32) -> list[StreamEntry]:
        self.steps.pop(0)()
        return []


def coordinator_of(
    client: Any,
    folder: Any,
    *steps: Any,
    seconds: int | str = "off",
    store_class: Any = Scripted,
    on_wait: Any = None,
    reopen: bool = False,
    **sections: Any,
) -> Coordinator:
    """Return a coordinator of a run without clients; the coordinator is paused after the steps."""
    config = parse_config(
        {
            "name": "line",
            "task": {"entrypoint": "task.py:Line"},
            "checkpoint": {"every_seconds": seconds},
            "stop": {"versions": 9},
            **sections,
        }
    )
    store = store_class(client, "line", "me")
    clock = itertools.count(1.0).__next__
    coordinator = Coordinator(
        config, Line(), store, folder, clock=clock, sleep=lambda seconds: None,
        on_wait=on_wait or (lambda: None), reopen=reopen,
    )  # fmt: skip
    store.steps = [*steps, coordinator.pause]
    return coordinator


def test_leader_without_a_checkpoint_reports_a_lost_run(redis_client: redis.Redis, tmp_path: Path) -> None:
    coordinator = coordinator_of(redis_client, tmp_path, redis_client.flushall)
    with pytest.raises(RunLost):
        coordinator.run()


def test_leader_with_a_checkpoint_begins_a_new_epoch(redis_client: redis.Redis, tmp_path: Path) -> None:
    idle = [lambda: None] * 3
    coordinator = coordinator_of(redis_client, tmp_path, *idle, redis_client.flushall, seconds=2)
    assert coordinator.run() is None, "the coordinator was not paused after the loss"
    assert coordinator.store.info().epoch == 1


PARTS = ["head", "config", "model"]


def evict(client: Any, store: Any, part: Any) -> None:
    """Delete one part of the run, as a server does that frees memory."""
    version = store.info().version
    client.delete({"head": store.keys.head, "config": store.keys.config}.get(part, f"{store.keys.model(version)}:0"))


@pytest.mark.parametrize("part", PARTS)
def test_run_that_lost_a_part_continues_from_its_checkpoint(
    redis_client: redis.Redis, tmp_path: Path, part: str
) -> None:
    coordinator = coordinator_of(redis_client, tmp_path, *[lambda: None] * 4, seconds=2)
    coordinator.run()
    assert (tmp_path / CHECKPOINT_FILENAME).exists()
    evict(redis_client, coordinator.store, part)
    successor = coordinator_of(redis_client, tmp_path, lambda: None, seconds=2)
    assert successor.run() is None
    assert successor.store.info().epoch == 1
    assert [record["kind"] for record in successor.store.ledger()] == ["epoch"]


@pytest.mark.parametrize("part", ["head", "model"])
def test_lost_part_is_named_where_no_checkpoint_exists(redis_client: redis.Redis, tmp_path: Path, part: str) -> None:
    coordinator = coordinator_of(redis_client, tmp_path)
    coordinator.run()
    evict(redis_client, coordinator.store, part)
    kept = redis_client.keys()
    with pytest.raises(RunLost, match=f"({part}|{part}:0:0 is not stored).*`fedqueue remove line`"):
        coordinator_of(redis_client, tmp_path).run()
    assert set(redis_client.keys()) == set(kept), "the rest was deleted"


def test_leader_whose_head_is_lost_begins_a_new_epoch(redis_client: redis.Redis, tmp_path: Path) -> None:
    """The commit of the next version notices it."""

    def lose_head() -> None:
        redis_client.delete(coordinator.store.keys.head)
        redis_client.hset(coordinator.store.keys.head, "job_number", 9)  # as the next dispatch does
        coordinator.store.publish(1, np.zeros(8, np.uint8), np.zeros(0, np.uint8), [{"kind": "version"}], {}, [])

    coordinator = coordinator_of(redis_client, tmp_path, *[lambda: None] * 4, lose_head, seconds=2)
    assert coordinator.run() is None
    assert coordinator.store.info().epoch == 1


def test_checkpoint_is_kept_when_redis_loses_the_run(redis_client: redis.Redis, tmp_path: Path) -> None:
    """Redis loses its data after the coordinator has renewed its lease, before the ledger is read."""

    class Forgetful(Scripted):
        reads = 0

        def ledger(self) -> Any:
            self.reads += 1
            if self.reads == 2:
                self.redis.flushall()
            return super().ledger()

    def write_down() -> None:
        redis_client.xadd(
            coordinator.store.keys.ledger, {"record": msgpack.packb({"kind": "evaluation", "version": 0})}
        )

    idle = [lambda: None] * 50
    coordinator = coordinator_of(redis_client, tmp_path, write_down, *idle, seconds=2, store_class=Forgetful)
    coordinator.run()
    assert isinstance(coordinator.store, Forgetful)
    assert coordinator.store.reads > 2
    checkpoint = load_checkpoint(tmp_path / CHECKPOINT_FILENAME)
    assert checkpoint is not None
    assert checkpoint.epoch == coordinator.store.info().epoch == 1
    assert [record["kind"] for record in coordinator.store.ledger()] == ["evaluation", "epoch"]


@pytest.mark.parametrize("end", [Coordinator.interrupt, Coordinator.fail])
def test_ended_run_is_reopened_from_its_checkpoint(redis_client: redis.Redis, tmp_path: Path, end: Any) -> None:
    first = coordinator_of(redis_client, tmp_path)
    assert isinstance(first.store, Scripted)
    first.store.steps = [lambda: end(first, "enough")]
    assert result_of(first).failed == (end is Coordinator.fail)
    assert first.checkpoint_saved
    again = coordinator_of(redis_client, tmp_path)
    with pytest.raises(RunExists, match=r"has ended \(enough\); `fedqueue remove line`"):
        again.run()
    reopened = coordinator_of(redis_client, tmp_path, reopen=True)
    assert reopened.run() is None
    info = reopened.store.info()
    assert (info.state, info.epoch) == ("running", 1)
    assert redis_client.ttl(reopened.store.keys.config) == -1


def test_stop_seconds_hold_during_an_outage(redis_client: redis.Redis, tmp_path: Path) -> None:
    """The disk of Redis is full, and the clock rises by one second with each look."""
    waits = []

    class Full(Scripted):
        def receive(self, block_seconds: float, count: int = 32) -> list[StreamEntry]:
            raise redis.ResponseError("MISCONF Errors writing to the AOF file: No space left on device")

    coordinator = coordinator_of(
        redis_client, tmp_path, store_class=Full, stop={"seconds": 40}, on_wait=lambda: waits.append("waits")
    )
    with pytest.raises(ServerUnavailable, match=r"stop.seconds = 40 have passed .*cannot save to its disk"):
        coordinator.run()
    assert waits


def test_resumed_settings_that_differ_are_named_alone(redis_client: redis.Redis, tmp_path: Path) -> None:
    assert coordinator_of(redis_client, tmp_path).run() is None
    changed = coordinator_of(redis_client, tmp_path, training={"learning_rate": 0.5}, seed=7)
    with pytest.raises(ConfigurationError) as caught:
        changed.run()
    assert str(caught.value) == (
        "seed, training.learning_rate: cannot change during a run (seed is 0 in the run, 7 here; "
        "training.learning_rate is 0.1 in the run, 0.5 here); restore the run's value, or start another run"
    )

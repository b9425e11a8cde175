"""Bursts: thousands of clients that join, leave or vanish at once delay no update, and are not delayed for ever."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import redis

from fedqueue.protocol.stream_entry import StreamEntry
from fedqueue.transport import rq_jobs
from fedqueue_coordinator.operator.access.enrolment import enroll_missing
from fedqueue_coordinator.service import inbox
from fedqueue_coordinator.service.coordinator import Coordinator
from fedqueue_coordinator.service.inbox import STREAMS_AT_ONCE, Inbox
from tests.support.chaos.crash_points import StoreWithPoints
from tests.support.crowd import Crowd
from tests.support.mortal_coordinator import Killed
from tests.support.sample_run import SampleRun
from tests.support.scene import RUN, Scene


def names(count: int, prefix: str = "x") -> list[str]:
    return [f"{prefix}{i}" for i in range(count)]


# The inbox


def heard(run: SampleRun, urgent: int, others: int) -> None:
    """Let the notifications of that many streams arrive: a server delivers them after the step that publishes them."""
    reader = run.coordinator._inbox
    while (len(reader._urgent), len(reader._named)) != (urgent, others):
        reader._hear(0.0)


def test_stream_of_a_client_with_a_job_is_read_first(run: SampleRun) -> None:
    run.join()
    run.coordinator.unacknowledged()
    run.coordinator.read_first({"c0"})
    crowd = Crowd(run.client, run.name)
    crowd.join(names(300))
    run.posted()
    heard(run, 1, 300)
    first = run.coordinator.receive(0.0)
    assert [entry.kind for entry in first].count("update") == 1
    assert len(first) == STREAMS_AT_ONCE + 1
    assert {entry.client for entry in first} == {"c0", *names(STREAMS_AT_ONCE)}, "the first joins are not read first"
    rest = [entry.client for _ in range(4) for entry in run.coordinator.receive(0.0)]
    assert sorted(rest) == sorted({*names(300)} - {*names(STREAMS_AT_ONCE)})


def test_updates_of_many_clients_leave_room_for_joins(run: SampleRun) -> None:
    busy = names(2 * STREAMS_AT_ONCE, "busy")
    run.coordinator.read_first({*busy})
    run.coordinator.unacknowledged()
    crowd = Crowd(run.client, run.name)
    crowd.join(busy)
    crowd.join(names(3))
    heard(run, 2 * STREAMS_AT_ONCE, 3)
    first = run.coordinator.receive(0.0)
    assert {*names(3)} <= {entry.client for entry in first}
    assert len(first) == STREAMS_AT_ONCE + 3


def test_client_that_gets_a_job_moves_ahead_of_the_burst(run: SampleRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox, "STREAMS_AT_ONCE", 2)
    busy: set[str] = set()
    run.coordinator.read_first(busy)
    run.coordinator.unacknowledged()
    crowd = Crowd(run.client, run.name)
    crowd.join(names(9))
    heard(run, 0, 9)
    assert [entry.client for entry in run.coordinator.receive(0.0)] == ["x0", "x1"]
    busy.add("x8")
    crowd.leave(["x8"])
    heard(run, 1, 6)
    assert [(entry.client, entry.kind) for entry in run.coordinator.receive(0.0)] == [
        ("x2", "joined"), ("x3", "joined"), ("x8", "joined"), ("x8", "left"),
    ]  # fmt: skip


def test_entries_behind_a_lost_subscription_are_read(run: SampleRun) -> None:
    """redis-py subscribes again by itself; notifications in between are lost."""
    run.join()
    reader = Inbox(run.client, run.keys)
    reader.unacknowledged()
    assert reader._wakeup is not None
    assert reader._wakeup.connection is not None
    reader._wakeup.connection.disconnect()
    run.client.xadd(run.keys.updates("c0"), {"kind": "left", "body": b""})
    rounds = (reader.receive(0.05) for _ in range(100))
    assert [entry.kind for entry in next(filter(None, rounds))] == ["left"]
    reader.close()


def test_successor_reads_the_streams_of_others_later(run: SampleRun) -> None:
    run.join()
    run.posted()
    Crowd(run.client, run.name).join(names(2 * STREAMS_AT_ONCE))
    run.coordinator.report("evaluated", b"")
    successor = Inbox(run.client, run.keys)
    entries = successor.unacknowledged(["c0", "x5"])
    assert [(e.client, e.kind) for e in entries] == [
        ("c0", "joined"), ("c0", "update"), ("x5", "joined"), ("", "evaluated"),
    ]  # fmt: skip
    rest = [entry.client for _ in range(3) for entry in successor.receive(0.0)]
    successor.close()
    assert sorted(rest) == sorted({*names(2 * STREAMS_AT_ONCE)} - {"x5"})


# The store


def test_entries_are_acknowledged_together_and_once(run: SampleRun) -> None:
    crowd = Crowd(run.client, run.name)
    crowd.join(names(5))
    entries = run.coordinator.unacknowledged()
    records = [None if i % 2 else {"kind": "unavailable", "error": str(i)} for i in range(5)]
    handled = [(entry.id, record) for entry, record in zip(entries, records, strict=True)]
    assert run.coordinator.ack(handled[:2]) == 2
    assert run.coordinator.ack(handled) == 3
    assert run.coordinator.ack(handled) == 0
    assert [record["error"] for record in run.coordinator.ledger()] == ["0", "2", "4"]
    assert run.coordinator.unacknowledged() == []


def test_only_clients_whose_lease_has_ended_expire_together(run: SampleRun) -> None:
    crowd = Crowd(run.client, run.name)
    crowd.join(["a", "b"], lease_seconds=-1)
    crowd.join(["c", "d"])
    assert run.coordinator.expire_clients(["c", "a", "d", "b", "nobody"]) == ["a", "b", "nobody"]
    assert run.coordinator.alive_clients() == ["c", "d"]
    assert run.coordinator.served(["a", "b", "c", "nobody"]) == {"c"}


# The coordinator


class Stage(StoreWithPoints):
    """Runs one step before each read, while there are steps, and then `watch` before each further read."""

    steps: list[Callable[[], object]]
    watch: Callable[[], None]

    def receive(self, block_seconds: float, count: int = 32) -> list[StreamEntry]:
        if self.steps:
            self.steps.pop(0)()
        else:
            self.watch()
        return super().receive(0.0, count)


class Play:
    """A coordinator that leads, one round after another, until `over`; `marks` has (version, clients) of each round."""

    def __init__(self, scene: Scene, *steps: Callable[[], object]) -> None:
        self.store = Stage(scene.redis, RUN, f"stage {id(self)}", scene.identity() if scene.signed else None)
        self.store.steps, self.store.watch = list(steps), self._watch
        self.now = 0.0
        self.coordinator = Coordinator(scene.config, scene.task, self.store, scene.folder, clock=lambda: self.now)
        self.marks: list[tuple[int, int]] = []

    def until(self, over: Callable[[], bool]) -> None:
        self._over = over
        self.coordinator.run()

    def _watch(self) -> None:
        self.marks.append((self.coordinator.federation.version, len(self.clients)))
        assert len(self.marks) < 2000, "the coordinator does not come to an end"
        if self._over():
            self.coordinator.pause()

    @property
    def clients(self) -> Mapping[str, int | None]:
        return self.coordinator.federation.clients


@pytest.fixture
def scene(redis_client: redis.Redis, tmp_path: Path) -> Scene:
    dispatch = {"lease_seconds": 3600, "leader_lease_seconds": 3600, "concurrency": 1, "selection": "examples"}
    return Scene(redis_client, tmp_path, signed=False, clients={"names": ["c0"]}, dispatch=dispatch)


def test_update_amid_2000_joins_is_merged_before_they_end(scene: Scene) -> None:
    site, crowd = scene.site("c0"), Crowd(scene.redis, RUN)

    def burst() -> None:
        crowd.join(names(1000, "before"))
        site.post()
        crowd.join(names(1000, "after"))

    play = Play(scene, site.join, lambda: None, burst)
    play.until(lambda: len(play.clients) == 2001)
    assert next(clients for version, clients in play.marks if version == 1) < 500, "the update waited for the joins"
    assert {*names(1000, "before"), *names(1000, "after")} < {*play.clients}
    assert crowd.left_entries([*names(1000, "before"), *names(1000, "after")]) == 0


def test_burst_of_leaves_is_taken_in_portions(scene: Scene) -> None:
    """The clients that another worker serves by now keep their places: only the others are taken back."""
    site, crowd = scene.site("c0"), Crowd(scene.redis, RUN)

    def burst() -> None:
        crowd.leave(names(200))
        crowd.leave(names(200, "y"), error="OSError: no such file")
        site.post()

    play = Play(scene, site.join, lambda: crowd.join([*names(200), *names(200, "y")]), *[lambda: None] * 9, burst)
    play.until(lambda: len(play.clients) == 1)
    assert next(clients for version, clients in play.marks if version == 1) > 200, "the update waited for the leaves"
    assert {*play.coordinator.federation.unavailable} == {*names(200, "y")}
    assert sorted(r["client"] for r in scene.store.ledger() if r["kind"] == "unavailable") == sorted(names(200, "y"))
    assert crowd.left_entries([*names(200), *names(200, "y")]) == 0


def test_forged_registration_amid_a_burst_joins_nobody(redis_client: redis.Redis, tmp_path: Path) -> None:
    """Forged entries are in the same portion as genuine ones: each signature is verified for itself."""
    scene = Scene(redis_client, tmp_path)
    sites = names(12)
    enroll_missing(scene.key_folder, sites)

    def burst() -> None:
        for client in sites[:6]:
            scene.site(client).join()
        genuine = scene.entries("x0")[0][1]
        for client in sites[6:]:
            redis_client.sadd(scene.keys.clients, client)
            redis_client.xadd(scene.keys.updates(client), genuine)  # type: ignore[arg-type]
            redis_client.publish(scene.keys.wakeup, scene.keys.updates(client))

    play = Play(scene, burst)
    play.until(lambda: not Crowd(redis_client, RUN).left_entries(sites))
    assert {*play.clients} == {*sites[:6]}
    assert scene.reasons() == ["forged"] * 6


def test_thousand_expired_leases_delay_no_update(scene: Scene) -> None:
    site, crowd = scene.site("c0"), Crowd(scene.redis, RUN)

    def silence() -> None:
        play.now += 1000  # the next look at the leases is due
        site.post()

    joined = [lambda: crowd.join(names(1000), lease_seconds=-1), *[lambda: None] * 20]
    play = Play(scene, site.join, *joined, silence)
    play.until(lambda: len(play.clients) == 1)
    assert next(clients for version, clients in play.marks if version == 1) > 500, "the update waited for the leases"
    assert scene.store.alive_clients() == ["c0"]


# Crashes


@pytest.mark.parametrize("point", ["before ack.lua", "after ack.lua"])
def test_crash_amid_a_portion_loses_no_client(scene: Scene, point: str) -> None:
    """The coordinator dies at its third portion; its successor takes what that has not acknowledged."""
    crowd = Crowd(scene.redis, RUN)

    def burst() -> None:
        crowd.join(names(100))
        crowd.leave(names(40, "y"), error="OSError: no such file")

    play = Play(scene, lambda: crowd.join(names(40, "y")), burst)
    passages = itertools.count(1)

    def die(passed: str) -> None:
        if passed == point and next(passages) == 3:
            raise Killed(point)

    play.store.at = die
    with pytest.raises(Killed):
        play.until(lambda: False)
    assert crowd.left_entries([*names(100), *names(40, "y")]) > 0
    scene.redis.hset(scene.keys.leader, "expires", 0)
    successor = Play(scene)
    successor.until(lambda: True)
    assert {*successor.clients} == {*names(100)}
    assert sorted(r["client"] for r in scene.store.ledger() if r["kind"] == "unavailable") == sorted(names(40, "y"))
    assert crowd.left_entries([*names(100), *names(40, "y")]) == 0


def test_crash_amid_dispatches_opens_no_job_twice(redis_client: redis.Redis, tmp_path: Path) -> None:
    dispatch = {"lease_seconds": 3600, "leader_lease_seconds": 3600, "concurrency": 5}
    clients = {"names": ["c0"], "min_available": 1}
    scene = Scene(redis_client, tmp_path, signed=False, clients=clients, dispatch=dispatch)
    crowd = Crowd(redis_client, RUN)
    play = Play(scene, lambda: crowd.join(names(50)))
    passages = itertools.count(1)

    def die(passed: str) -> None:
        if passed == "after dispatch.lua" and next(passages) == 3:
            raise Killed(passed)

    play.store.at = die
    with pytest.raises(Killed):
        play.until(lambda: False)
    assert crowd.left_entries(names(50)) == 50, "a part of the portion was acknowledged"
    redis_client.hset(scene.keys.leader, "expires", 0)
    successor = Play(scene)
    successor.until(lambda: True)
    assert {*successor.clients} == {*names(50)}
    assert len(successor.coordinator.federation.open_jobs) == len(successor.store.jobs()) == 5
    assert crowd.left_entries(names(50)) == 0


# A successor


def test_successor_merges_before_all_clients_have_returned(scene: Scene) -> None:
    """Some of the clients are known and alive, others have left, others have joined meanwhile."""
    site, crowd = scene.site("c0"), Crowd(scene.redis, RUN)
    known, gone, new = names(700), names(300, "gone"), names(300, "new")
    first = Play(scene, site.join, lambda: crowd.join([*known, *gone]))
    first.until(lambda: len(first.clients) == 1001)
    site.post()
    crowd.leave(gone)
    crowd.join(new)
    successor = Play(scene)
    successor.until(lambda: {*successor.clients} == {"c0", *known, *new} and not crowd.left_entries([*gone, *new]))
    merged = [clients for version, clients in successor.marks if version == 1]
    assert merged[0] < 600, "the update waited until the clients had returned"


def test_successor_verifies_each_client_that_returns(redis_client: redis.Redis, tmp_path: Path) -> None:
    """The record of c1, a registration, was forged by a writer of Redis; c0's is genuine."""
    scene = Scene(redis_client, tmp_path)
    first = Play(scene, scene.site("c0").join, scene.site("c1").join)
    first.until(lambda: len(first.clients) == 2)
    genuine = redis_client.hget(scene.keys.site("c0"), "registration")
    redis_client.hset(scene.keys.site("c1"), "registration", genuine)
    successor = Play(scene, lambda: None)
    successor.until(lambda: True)
    assert {*successor.clients} == {"c0"}


# The end


def test_end_asks_rq_only_about_clients_that_had_a_job(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    site, crowd = scene.site("c0"), Crowd(scene.redis, RUN)
    asked = []
    monkeypatch.setattr(rq_jobs, "delete_queue", lambda client, queue: asked.append(queue))
    play = Play(scene, site.join, lambda: crowd.join(names(300)), *[lambda: None] * 9)
    play.store.steps.append(lambda: play.coordinator.interrupt("enough"))
    play.until(lambda: False)
    assert asked == [scene.keys.queue("c0")]
    assert all(scene.redis.ttl(key) > 0 for key in scene.redis.scan_iter("fedqueue:{*") if not key.endswith(b":leader"))

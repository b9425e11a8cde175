"""Faults by name. Each acts at once; `Chaos.later` or the supervisor undoes it."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from fedqueue.protocol.messages import Update
from fedqueue.transport.worker_store import Claim, WorkerStore
from tests.support.chaos import crash_points
from tests.support.chaos.arena import LEADER_SECONDS, LEASE_SECONDS, Chaos
from tests.support.chaos.fleet import Member

DENSE = ("before commit.lua", "before dispatch.lua", "between blobs", "after load", "after commit.lua")
NEEDS_HAND_BACK = ("before close", "after ack.lua", "before close.lua")
NEEDS_DEATH = ("after close.lua", "before expire_clients.lua", "after expire_clients.lua")
ARMED_SECONDS = 8.0


class NotNow(Exception):
    """The fault has no target at the moment; for example, no coordinator leads."""


def kill_worker(chaos: Chaos) -> None:
    _worker(chaos).send(signal.SIGKILL)


def terminate_worker(chaos: Chaos) -> None:
    _worker(chaos).send(signal.SIGTERM)


def stop_continue_worker(chaos: Chaos) -> None:
    """Stop a worker until its lease expires; on waking, the worker posts its old update."""
    _stop_continue(chaos, _worker(chaos))


def kill_coordinator(chaos: Chaos) -> None:
    leader = _leader(chaos)
    chaos.later(chaos.rng.uniform(0.0, 0.2), lambda: leader.send(signal.SIGKILL))


def stop_continue_coordinator(chaos: Chaos) -> None:
    """Stop the leader in the middle of its work; when it wakes, another coordinator leads."""
    leader = _leader(chaos)
    leader.arm(chaos.rng.choice(DENSE), chaos.rng.randint(1, 3), signal.SIGSTOP)
    chaos.later(LEADER_SECONDS + chaos.rng.uniform(1.0, 1.5), lambda: leader.send(signal.SIGCONT))


def kill_coordinator_at(point: str) -> Callable[[Chaos], None]:
    def fault(chaos: Chaos) -> None:
        leader = _leader(chaos)
        leader.arm(point, chaos.rng.randint(1, 3) if point in DENSE else 1, signal.SIGKILL)
        if point in NEEDS_HAND_BACK:
            terminate_worker(chaos)
        elif point in NEEDS_DEATH:
            kill_worker(chaos)
        before = leader.restarts
        chaos.wait(lambda: not leader.alive or leader.restarts > before, f"death {point}", ARMED_SECONDS)

    return fault


def restart_redis(chaos: Chaos) -> None:
    chaos.server.kill()

    def undo() -> None:
        if chaos.server.process.poll() is not None:  # two of these faults may overlap
            chaos.server.start()

    chaos.later(chaos.rng.uniform(0.0, 0.6), undo)


def drop_connections(chaos: Chaos) -> None:
    if chaos.rng.random() < 0.5:
        chaos.proxy.drop()
    else:
        chaos.proxy.cut_after(chaos.rng.randrange(1, 5000))


def delay_connections(chaos: Chaos) -> None:
    chaos.proxy.delay = chaos.rng.uniform(0.05, 0.3)

    def undo() -> None:
        chaos.proxy.delay = 0.0

    chaos.later(1.0, undo)


def duplicate_post(chaos: Chaos) -> None:
    """Post three duplicates: of an update not merged yet, of a merged update, and one for another worker's open job."""
    store, keys = chaos.store, chaos.store.keys
    intruder = WorkerStore(store.redis, store.run, "intruder")
    jobs = store.jobs()
    entries = store.redis.xrevrange(keys.ledger, count=20)
    records = [msgpack.unpackb(fields[b"record"]) for _, fields in entries]  # type: ignore[union-attr, index]
    merged = [(line["job"], line["attempt"]) for r in records if r["kind"] == "version" for line in r["merged"]]
    waiting = [(job.job, job.attempt) for job in jobs if job.state == "posted"]
    others = [(job.job, job.attempt + 7) for job in jobs if job.state == "open"]
    for job, attempt in [*waiting[:1], *merged[:1], *others[:1]]:
        stored: list[Any] = store.redis.mget(f"{keys.payload(job, attempt)}:0", f"{keys.kept_payload(job, attempt)}:0")
        payload = next(filter(None, stored), bytes(344))
        update = Update(examples=96, nbytes=len(payload), chunks=1, seconds=0.1)
        claim = Claim(job, attempt, max(0, chaos.version()), 0)
        if not intruder.post(claim, update, np.frombuffer(payload, np.uint8)):
            chaos.accepted.append(job)


def skew_clock(chaos: Chaos) -> None:
    """Shift the wall clock of a process by up to a day, and its monotonic clock by up to five minutes."""
    one = chaos.rng.choice(chaos.fleet.members)
    one.wall.value = chaos.rng.uniform(-86_400, 86_400)
    one.monotonic.value += chaos.rng.uniform(0, 300)


def kill_keeper(chaos: Chaos) -> None:
    _keeper(chaos).send(signal.SIGKILL)


def terminate_keeper(chaos: Chaos) -> None:
    _keeper(chaos).send(signal.SIGTERM)


def stop_continue_keeper(chaos: Chaos) -> None:
    """Stop a keeper for longer than the leases of coordinators and clients."""
    _stop_continue(chaos, _keeper(chaos))


def kill_all_keepers_and_the_coordinator(chaos: Chaos) -> None:
    kill_coordinator(chaos)
    for keeper in chaos.fleet.keepers:
        keeper.send(signal.SIGKILL)


def lose_a_keepers_file(chaos: Chaos) -> None:
    """Kill a keeper and delete its encryption key and its log, as a lost disk does."""
    keeper = _keeper(chaos)
    keeper.send(signal.SIGKILL)
    chaos.wait(lambda: not keeper.alive, "the keeper is dead")
    shutil.rmtree(Path(keeper.arguments[keeper.arguments.index("--keys") + 1]) / "state")


KINDS: dict[str, Callable[[Chaos], None]] = {
    "kill_worker": kill_worker,
    "terminate_worker": terminate_worker,
    "stop_continue_worker": stop_continue_worker,
    "kill_coordinator": kill_coordinator,
    "stop_continue_coordinator": stop_continue_coordinator,
    "restart_redis": restart_redis,
    "drop_connections": drop_connections,
    "delay_connections": delay_connections,
    "duplicate_post": duplicate_post,
    "skew_clock": skew_clock,
}
AT_POINTS = {
    f"kill_coordinator_at:{point}": kill_coordinator_at(point) for point in crash_points.SERVICE + crash_points.STORE
}
FAULTS = {**KINDS, **AT_POINTS}
KEEPER_FAULTS: dict[str, Callable[[Chaos], None]] = {
    "kill_keeper": kill_keeper,
    "terminate_keeper": terminate_keeper,
    "stop_continue_keeper": stop_continue_keeper,
    "kill_all_keepers_and_the_coordinator": kill_all_keepers_and_the_coordinator,
    "lose_a_keepers_file": lose_a_keepers_file,
    **{f"kill_coordinator_at:{point}": kill_coordinator_at(point) for point in crash_points.WITH_KEEPERS},
}
"""For a federation with keepers."""


def _stop_continue(chaos: Chaos, member: Member) -> None:
    """Stop a process until leases have expired."""
    member.stopped = True
    member.send(signal.SIGSTOP)

    def undo() -> None:
        member.stopped = False
        member.send(signal.SIGCONT)

    chaos.later(LEASE_SECONDS + chaos.rng.uniform(0.3, 1.0), undo)


def _keeper(chaos: Chaos) -> Member:
    able = [one for one in chaos.fleet.keepers if one.alive and not one.stopped]
    if not able:
        raise NotNow
    return chaos.rng.choice(able)


def _worker(chaos: Chaos) -> Member:
    able = [one for one in chaos.fleet.workers if one.alive and not one.stopped]
    if not able:
        raise NotNow
    return chaos.rng.choice(able)


def _leader(chaos: Chaos) -> Member:
    leader = chaos.leader()
    if leader is None:
        raise NotNow
    return leader

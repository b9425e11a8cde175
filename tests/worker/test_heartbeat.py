"""The heartbeat: renewed leases, handling of the reply, and the end. The tests move the clock."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import redis
import structlog

from fedqueue.errors import ClientTaken, JobClosed, RunNotFound
from fedqueue.protocol.messages import Registration
from fedqueue.protocol.phase import Phase
from fedqueue.transport.worker_store import Claim
from fedqueue_coordinator.core.lapses import lapse_cause
from fedqueue_worker.heartbeat import Heartbeat
from tests.support.redis_commands import stored_field
from tests.support.sample_run import SampleRun

STALL = 30.0


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def logs() -> Iterator[Any]:
    with structlog.testing.capture_logs() as captured:
        yield captured


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ended() -> list[Any]:
    """Return the reasons with which the heartbeat told the worker to stop."""
    return []


@pytest.fixture
def worker(fake_run: SampleRun) -> Any:
    return fake_run.join("c0")


@pytest.fixture
def heartbeat(worker: Any, clock: Clock, ended: list[Any]) -> Heartbeat:
    return Heartbeat(worker, ["c0"], 60, STALL, ended.append, clock)


def lapsed(run: SampleRun) -> Any:
    return run.coordinator.find_expired()


# The lease follows the progress


def test_heartbeat_renews_the_lease_during_progress(
    fake_run: SampleRun, worker: Any, heartbeat: Heartbeat, clock: Clock
) -> None:
    claim = worker.claim(fake_run.dispatch(), 0)
    assert lapsed(fake_run) == [claim.job]
    heartbeat.begin(claim)
    clock.now += STALL - 1
    heartbeat.beat()
    assert lapsed(fake_run) == []


def test_stalled_training_loses_its_lease_and_is_logged(
    fake_run: SampleRun, worker: Any, heartbeat: Heartbeat, clock: Clock, logs: Any
) -> None:
    claim = worker.claim(fake_run.dispatch(), 0)
    heartbeat.begin(claim)
    heartbeat.enter(Phase.TRAINING)
    clock.now += STALL
    heartbeat.beat()
    assert lapsed(fake_run) == [claim.job]
    assert [entry["event"] for entry in logs] == [
        "training makes no progress: the job's lease is not renewed; check data loader and device"
    ]


def test_progress_ends_a_stall(fake_run: SampleRun, worker: Any, heartbeat: Heartbeat, clock: Clock) -> None:
    claim = worker.claim(fake_run.dispatch(), 0)
    heartbeat.begin(claim)
    clock.now += STALL
    heartbeat.progress()
    heartbeat.beat()
    assert lapsed(fake_run) == []


def test_idle_time_before_a_job_is_not_a_stall(
    fake_run: SampleRun, worker: Any, heartbeat: Heartbeat, clock: Clock, logs: Any
) -> None:
    clock.now += 3600
    claim = worker.claim(fake_run.dispatch(), 0)
    heartbeat.begin(claim)
    heartbeat.beat()
    assert lapsed(fake_run) == []
    assert logs == []


def test_idle_worker_stays_alive_without_a_warning(
    fake_run: SampleRun, heartbeat: Heartbeat, clock: Clock, logs: Any
) -> None:
    clock.now += 3600
    fake_run.client.hset(fake_run.keys.site("c0"), "alive", 0)
    heartbeat.beat()
    assert fake_run.coordinator.alive_clients() == ["c0"]
    assert logs == []


def test_finished_job_is_not_renewed(fake_run: SampleRun, worker: Any, heartbeat: Heartbeat) -> None:
    claim = worker.claim(fake_run.dispatch(), 0)
    heartbeat.begin(claim)
    heartbeat.finish()
    heartbeat.beat()
    assert lapsed(fake_run) == [claim.job]


def test_waiting_jobs_are_renewed_while_the_running_one_stalls(
    fake_run: SampleRun, clock: Clock, ended: list[Any]
) -> None:
    worker = fake_run.join("c0")
    fake_run.join("c1")
    heartbeat = Heartbeat(worker, ["c0", "c1"], 60, STALL, ended.append, clock)
    claim = worker.claim(fake_run.dispatch(1, "c0"), 0)
    waiting = fake_run.dispatch(2, "c1", lease=0)
    heartbeat.begin(claim)
    clock.now += STALL
    heartbeat.beat()
    assert waiting not in lapsed(fake_run)


# Transfers


def lease_left(run: SampleRun, claim: Any) -> float:
    """Return the seconds until the end of the job's lease."""
    seconds, micros = map(int, run.client.time())
    return float(stored_field(run.client, run.keys.attempt(claim.job), "lease")) / 1000 - seconds - micros / 1e6


@pytest.fixture
def patient(worker: Any, clock: Clock, ended: list[Any]) -> Heartbeat:
    """Return a heartbeat whose lease is shorter than the stall."""
    return Heartbeat(worker, ["c0"], 10, STALL, ended.append, clock)


@pytest.mark.parametrize("phase", [Phase.FETCHING, Phase.SENDING])
def test_lease_of_a_long_transfer_outlives_a_break_of_the_line(
    fake_run: SampleRun, worker: Any, patient: Heartbeat, clock: Clock, phase: Phase
) -> None:
    claim = worker.claim(fake_run.dispatch(), 10)
    patient.begin(claim)
    patient.enter(phase)
    clock.now += 2
    patient.progress()
    patient.beat()
    assert lease_left(fake_run, claim) == pytest.approx(STALL, abs=1)
    clock.now += 12  # the line is away, and returns: no byte has moved yet
    patient.beat()
    assert lease_left(fake_run, claim) == pytest.approx(STALL - 12, abs=1)


def test_lease_is_short_in_training_and_in_a_short_transfer(
    fake_run: SampleRun, worker: Any, patient: Heartbeat, clock: Clock
) -> None:
    claim = worker.claim(fake_run.dispatch(), 0)
    patient.begin(claim)
    clock.now += 0.5
    patient.beat()
    assert lease_left(fake_run, claim) == pytest.approx(10, abs=1)
    clock.now += 60
    patient.enter(Phase.TRAINING)
    clock.now += 2
    patient.beat()
    assert lease_left(fake_run, claim) == pytest.approx(10, abs=1)


def test_piece_renews_the_lease_if_the_heartbeat_is_late(
    fake_run: SampleRun, worker: Any, patient: Heartbeat, clock: Clock
) -> None:
    claim = worker.claim(fake_run.dispatch(), 0)
    patient.begin(claim)
    clock.now += 2
    patient.after_piece()
    assert lapsed(fake_run) == [claim.job], "a heartbeat is not due yet"
    clock.now += 2
    patient.after_piece()
    assert lease_left(fake_run, claim) == pytest.approx(STALL, abs=1)


def test_piece_of_a_closed_job_raises(fake_run: SampleRun, worker: Any, patient: Heartbeat, clock: Clock) -> None:
    claim = worker.claim(fake_run.dispatch(), 0)
    patient.begin(claim)
    fake_run.coordinator.close(claim.job, {"kind": "abandoned"}, 1, if_lapsed=True)
    clock.now += 4
    with pytest.raises(JobClosed):
        patient.after_piece()


def test_piece_outlives_a_heartbeat_that_fails(
    fake_run: SampleRun, worker: Any, patient: Heartbeat, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient.begin(worker.claim(fake_run.dispatch(), 10))
    clock.now += 4

    def cut(*args: Any) -> None:
        raise redis.ConnectionError("cut")

    monkeypatch.setattr(worker, "heartbeat", cut)
    patient.after_piece()


@pytest.mark.parametrize(
    ("phase", "warning"),
    [(Phase.FETCHING, "download moves no bytes"), (Phase.SENDING, "upload moves no bytes")],
)
def test_stalled_transfer_is_logged_as_one(
    fake_run: SampleRun, worker: Any, heartbeat: Heartbeat, clock: Clock, logs: Any, phase: Phase, warning: str
) -> None:
    heartbeat.begin(worker.claim(fake_run.dispatch(), 0))
    heartbeat.enter(phase)
    clock.now += STALL
    heartbeat.beat()
    assert [entry["event"].partition(":")[0] for entry in logs] == [warning]


# Why a job lapsed


def cause(run: SampleRun, claim: Any) -> str:
    return lapse_cause(run.coordinator.last_report(claim.job, "c0"), run.config.dispatch)[0]


@pytest.mark.parametrize(
    ("phase", "expected"),
    [
        (Phase.FETCHING, "slow_transfer"),
        (Phase.TRAINING, "no_progress"),
        (Phase.SENDING, "slow_transfer"),
    ],
)
def test_lapse_of_a_living_worker_says_what_stalled(
    fake_run: SampleRun, worker: Any, heartbeat: Heartbeat, clock: Clock, phase: Phase, expected: str
) -> None:
    claim = worker.claim(fake_run.dispatch(), 0)
    heartbeat.begin(claim)
    heartbeat.enter(phase)
    clock.now += STALL
    heartbeat.beat()
    assert cause(fake_run, claim) == expected


def test_lapse_without_heartbeats_says_that_the_process_died(
    fake_run: SampleRun, worker: Any, heartbeat: Heartbeat
) -> None:
    claim = worker.claim(fake_run.dispatch(), 0)
    heartbeat.begin(claim)
    heartbeat.beat()
    fake_run.client.hset(fake_run.keys.site("c0"), "alive", 0)
    assert cause(fake_run, claim) == "process_died"


def test_lapse_of_a_replaced_worker_says_that_the_process_died(fake_run: SampleRun, worker: Any) -> None:
    claim = worker.claim(fake_run.dispatch(), 0)
    fake_run.client.hset(fake_run.keys.site("c0"), "holder", "another worker")
    assert cause(fake_run, claim) == "process_died"


def test_lapse_of_a_job_that_was_never_claimed_says_so(fake_run: SampleRun, worker: Any) -> None:
    claim = Claim(fake_run.dispatch(lease=0), 0, 0)
    assert cause(fake_run, claim) == "not_begun"


def test_forged_phase_is_no_phase(fake_run: SampleRun, worker: Any) -> None:
    claim = worker.claim(fake_run.dispatch(), 0)
    for phase in ("x" * 1_000_000, "resting", b"\xff"):
        fake_run.client.hset(fake_run.keys.attempt(claim.job), mapping={"phase": phase, "stalled": 1})
        assert fake_run.coordinator.last_report(claim.job, "c0").phase is None


# Lost jobs


def test_job_that_was_closed_raises_at_the_next_progress(
    fake_run: SampleRun, worker: Any, heartbeat: Heartbeat
) -> None:
    claim = worker.claim(fake_run.dispatch(), 60)
    heartbeat.begin(claim)
    heartbeat.progress()
    fake_run.coordinator.close(claim.job, {"kind": "abandoned"}, 1)
    heartbeat.progress()
    heartbeat.beat()
    with pytest.raises(JobClosed):
        heartbeat.progress()


def test_job_taken_by_a_second_attempt_raises(fake_run: SampleRun, worker: Any, heartbeat: Heartbeat) -> None:
    claim = worker.claim(fake_run.dispatch(), 60)
    heartbeat.begin(claim)
    fake_run.worker("worker-b").claim(claim.job, 60)
    heartbeat.beat()
    with pytest.raises(JobClosed):
        heartbeat.progress()


def test_lost_job_does_not_affect_the_next_one(fake_run: SampleRun, worker: Any, heartbeat: Heartbeat) -> None:
    heartbeat.begin(Claim("sample-00000404", 1, 0))
    heartbeat.beat()
    heartbeat.finish()
    heartbeat.begin(worker.claim(fake_run.dispatch(), 60))
    heartbeat.progress()
    heartbeat.beat()
    heartbeat.progress()


def test_late_reply_for_an_ended_job_does_not_lose_the_next_one(
    fake_run: SampleRun, worker: Any, heartbeat: Heartbeat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reply to a heartbeat arrives after the main thread has begun another job."""
    old = Claim("sample-00000404", 1, 0)
    new = worker.claim(fake_run.dispatch(), 60)
    heartbeat.begin(old)
    original = worker.heartbeat

    def slow_answer(*arguments: Any) -> Any:
        pulse = original(*arguments)
        heartbeat.finish()
        heartbeat.begin(new)
        return pulse

    monkeypatch.setattr(worker, "heartbeat", slow_answer)
    heartbeat.beat()
    heartbeat.progress()


# Lost clients


def test_expired_client_is_registered_again(
    fake_run: SampleRun, worker: Any, heartbeat: Heartbeat, ended: list[Any]
) -> None:
    heartbeat.register(Registration(client="c0", examples=10))
    fake_run.client.hset(fake_run.keys.site("c0"), "alive", 0)
    assert fake_run.coordinator.expire_clients(["c0"])
    fake_run.coordinator.receive(0.001)
    heartbeat.beat()
    assert fake_run.coordinator.alive_clients() == ["c0"]
    assert [(e.kind, e.client) for e in fake_run.coordinator.receive(0.001)] == [("joined", "c0")]
    assert ended == []


def test_registration_that_failed_is_repeated_by_the_next_beat(
    fake_run: SampleRun, worker: Any, heartbeat: Heartbeat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client has joined by then, so the reply to the next beat does not name it as lost."""
    heartbeat.register(Registration(client="c0", examples=10))
    fake_run.client.hset(fake_run.keys.site("c0"), "alive", 0)
    fake_run.coordinator.expire_clients(["c0"])
    fake_run.coordinator.receive(0.001)

    def no_answer(registration: Any) -> None:
        raise redis.ConnectionError

    with monkeypatch.context() as patch:
        patch.setattr(worker, "register", no_answer)
        with pytest.raises(redis.ConnectionError):
            heartbeat.beat()
    for joined in ([("joined", "c0")], []):
        heartbeat.beat()
        assert [(e.kind, e.client) for e in fake_run.coordinator.receive(0.001)] == joined


def test_unregistered_client_only_joins_again_after_expiry(
    fake_run: SampleRun, worker: Any, heartbeat: Heartbeat
) -> None:
    fake_run.client.delete(fake_run.keys.site("c0"))
    fake_run.coordinator.receive(0.001)
    heartbeat.beat()
    assert fake_run.coordinator.alive_clients() == ["c0"]
    assert fake_run.coordinator.receive(0.001) == []


def test_worker_stops_when_another_one_serves_its_client(
    fake_run: SampleRun, worker: Any, heartbeat: Heartbeat, ended: list[Any]
) -> None:
    fake_run.client.hset(fake_run.keys.site("c0"), "alive", 0)
    fake_run.coordinator.expire_clients(["c0"])
    fake_run.join("c0", "worker-b")
    heartbeat.beat()
    assert ended == ["another worker now serves client c0"]


def test_registration_of_a_taken_client_is_an_error(fake_run: SampleRun, worker: Any, heartbeat: Heartbeat) -> None:
    fake_run.client.hset(fake_run.keys.site("c0"), "holder", "worker-b")
    with pytest.raises(ClientTaken, match="c0"):
        heartbeat.register(Registration(client="c0", examples=10))


# The end


def test_worker_stops_once_when_the_run_has_ended(fake_run: SampleRun, heartbeat: Heartbeat, ended: list[Any]) -> None:
    fake_run.coordinator.end("target reached", 60, 1)
    heartbeat.beat()
    heartbeat.beat()
    assert ended == ["the run has ended"]


def test_worker_waits_for_a_lost_run_and_joins_its_new_epoch(
    fake_run: SampleRun, worker: Any, heartbeat: Heartbeat, ended: list[Any]
) -> None:
    heartbeat.register(Registration(client="c0", examples=10))
    fake_run.client.flushdb()
    heartbeat.beat()
    assert ended == []
    assert fake_run.names() == set(), "the worker wrote into a run without a coordinator"
    fake_run.coordinator.lead(60)
    fake_run.coordinator.create(fake_run.config.model_dump_json(), fake_run.manifest, epoch=1)
    heartbeat.beat()
    assert fake_run.coordinator.alive_clients() == ["c0"]
    assert [(e.kind, e.client) for e in fake_run.coordinator.unacknowledged()] == [("joined", "c0")]


def test_lost_run_is_logged_once_until_it_is_back(
    fake_run: SampleRun, worker: Any, heartbeat: Heartbeat, logs: Any
) -> None:
    config = fake_run.client.dump(fake_run.keys.config)
    assert config is not None
    for _ in range(2):
        fake_run.client.delete(fake_run.keys.config)
        heartbeat.beat()
        heartbeat.beat()
        fake_run.client.restore(fake_run.keys.config, 0, config)
        heartbeat.beat()
    lost = {"event": "run missing from Redis: waiting for its coordinator to restore it", "log_level": "warning"}
    assert [entry for entry in logs if "missing" in entry["event"]] == [lost, lost]


def test_worker_of_an_ended_run_does_not_join_again(
    fake_run: SampleRun, worker: Any, heartbeat: Heartbeat, ended: list[Any]
) -> None:
    fake_run.coordinator.end("target reached", 60, 1)
    heartbeat.beat()
    assert not fake_run.client.hmget(fake_run.keys.site("c0"), "alive", "holder")[0]


def beats(monkeypatch: pytest.MonkeyPatch, heartbeat: Any, outcomes: Any) -> Any:
    """Run the heartbeat's thread through `outcomes` (errors to raise, or None); return the number of heartbeats."""
    done, seen = threading.Event(), []

    def beat() -> None:
        seen.append(1)
        outcome = outcomes.pop(0)
        if not outcomes:
            done.set()
            heartbeat._done.set()
        if outcome:
            raise outcome

    monkeypatch.setattr(heartbeat, "beat", beat)
    heartbeat.start()
    assert done.wait(10)
    heartbeat.stop()
    assert not heartbeat._thread.is_alive()
    return len(seen)


def test_thread_continues_after_an_error_of_redis(
    worker: Any, ended: list[Any], monkeypatch: pytest.MonkeyPatch, logs: Any
) -> None:
    heartbeat = Heartbeat(worker, ["c0"], 0.003, STALL, ended.append)
    outcomes = [redis.ConnectionError("gone"), redis.TimeoutError("slow"), redis.ResponseError("LOADING")]
    assert beats(monkeypatch, heartbeat, [*outcomes, RunNotFound("sample"), None]) == 5
    assert ended == []
    assert {entry["log_level"] for entry in logs} == {"warning"}


def test_stopping_before_starting_is_harmless(heartbeat: Heartbeat) -> None:
    heartbeat.stop()


def test_stopping_on_the_heartbeat_thread_does_not_deadlock(fake_run: SampleRun, worker: Any) -> None:
    stopped = threading.Event()

    def on_end(because: Any) -> None:
        beating.stop()
        stopped.set()

    beating = Heartbeat(worker, ["c0"], 0.003, STALL, on_end)
    fake_run.coordinator.end("done", 60, 1)
    beating.start()
    assert stopped.wait(10)
    beating.stop()

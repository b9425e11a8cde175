"""The heartbeat: renewed leases, handling of the reply, and the end. The tests move the clock."""

from __future__ import annotations

import threading

import pytest
import redis
import structlog

from fedqueue.errors import ClientTaken, JobClosed, RunNotFound
from fedqueue.protocol.messages import Registration
from fedqueue.transport.worker_store import Claim
from fedqueue_worker.heartbeat import Heartbeat

STALL = 30.0


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def logs():
    with structlog.testing.capture_logs() as captured:
        yield captured


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def ended():
    """Return the reasons with which the heartbeat told the worker to stop."""
    return []


@pytest.fixture
def worker(fake_run):
    return fake_run.join("c0")


@pytest.fixture
def heartbeat(worker, clock, ended):
    return Heartbeat(worker, ["c0"], 60, STALL, ended.append, clock)


def lapsed(run):
    return run.coordinator.find_expired()[0]


# The lease follows the progress


def test_heartbeat_renews_the_lease_during_progress(fake_run, worker, heartbeat, clock):
    claim = worker.claim(fake_run.dispatch(), 0)
    assert lapsed(fake_run) == [claim.job]
    heartbeat.begin(claim)
    clock.now += STALL - 1
    heartbeat.beat()
    assert lapsed(fake_run) == []


def test_stalled_training_loses_its_lease_and_is_logged(fake_run, worker, heartbeat, clock, logs):
    claim = worker.claim(fake_run.dispatch(), 0)
    heartbeat.begin(claim)
    clock.now += STALL
    heartbeat.beat()
    assert lapsed(fake_run) == [claim.job]
    assert [entry["event"] for entry in logs] == [
        "training makes no progress: the job's lease is not renewed; check data loader and device"
    ]


def test_progress_ends_a_stall(fake_run, worker, heartbeat, clock):
    claim = worker.claim(fake_run.dispatch(), 0)
    heartbeat.begin(claim)
    clock.now += STALL
    heartbeat.progress()
    heartbeat.beat()
    assert lapsed(fake_run) == []


def test_idle_time_before_a_job_is_not_a_stall(fake_run, worker, heartbeat, clock, logs):
    clock.now += 3600
    claim = worker.claim(fake_run.dispatch(), 0)
    heartbeat.begin(claim)
    heartbeat.beat()
    assert lapsed(fake_run) == []
    assert logs == []


def test_idle_worker_stays_alive_without_a_warning(fake_run, heartbeat, clock, logs):
    clock.now += 3600
    fake_run.client.hset(fake_run.keys.site("c0"), "alive", 0)
    heartbeat.beat()
    assert fake_run.coordinator.alive_clients() == ["c0"]
    assert logs == []


def test_finished_job_is_not_renewed(fake_run, worker, heartbeat):
    claim = worker.claim(fake_run.dispatch(), 0)
    heartbeat.begin(claim)
    heartbeat.finish()
    heartbeat.beat()
    assert lapsed(fake_run) == [claim.job]


def test_waiting_jobs_are_renewed_while_the_running_one_stalls(fake_run, clock, ended):
    worker = fake_run.join("c0")
    fake_run.join("c1")
    heartbeat = Heartbeat(worker, ["c0", "c1"], 60, STALL, ended.append, clock)
    claim = worker.claim(fake_run.dispatch(1, "c0"), 0)
    waiting = fake_run.dispatch(2, "c1", lease=0)
    heartbeat.begin(claim)
    clock.now += STALL
    heartbeat.beat()
    assert waiting not in lapsed(fake_run)


# Lost jobs


def test_job_that_was_closed_raises_at_the_next_progress(fake_run, worker, heartbeat):
    claim = worker.claim(fake_run.dispatch(), 60)
    heartbeat.begin(claim)
    heartbeat.progress()
    fake_run.coordinator.close(claim.job, {"kind": "abandoned"}, 1)
    heartbeat.progress()
    heartbeat.beat()
    with pytest.raises(JobClosed):
        heartbeat.progress()


def test_job_taken_by_a_second_attempt_raises(fake_run, worker, heartbeat):
    claim = worker.claim(fake_run.dispatch(), 60)
    heartbeat.begin(claim)
    fake_run.worker("worker-b").claim(claim.job, 60)
    heartbeat.beat()
    with pytest.raises(JobClosed):
        heartbeat.progress()


def test_lost_job_does_not_affect_the_next_one(fake_run, worker, heartbeat):
    heartbeat.begin(Claim("sample-00000404", 1, 0))
    heartbeat.beat()
    heartbeat.finish()
    heartbeat.begin(worker.claim(fake_run.dispatch(), 60))
    heartbeat.progress()
    heartbeat.beat()
    heartbeat.progress()


def test_late_reply_for_an_ended_job_does_not_lose_the_next_one(fake_run, worker, heartbeat, monkeypatch):
    """The reply to a heartbeat arrives after the main thread has begun another job."""
    old = Claim("sample-00000404", 1, 0)
    new = worker.claim(fake_run.dispatch(), 60)
    heartbeat.begin(old)
    original = worker.heartbeat

    def slow_answer(*arguments):
        pulse = original(*arguments)
        heartbeat.finish()
        heartbeat.begin(new)
        return pulse

    monkeypatch.setattr(worker, "heartbeat", slow_answer)
    heartbeat.beat()
    heartbeat.progress()


# Lost clients


def test_expired_client_is_registered_again(fake_run, worker, heartbeat, ended):
    heartbeat.register(Registration(client="c0", examples=10))
    fake_run.client.hset(fake_run.keys.site("c0"), "alive", 0)
    assert fake_run.coordinator.expire_client("c0")
    fake_run.coordinator.receive(0.001)
    heartbeat.beat()
    assert fake_run.coordinator.alive_clients() == ["c0"]
    assert [(e.kind, e.client) for e in fake_run.coordinator.receive(0.001)] == [("joined", "c0")]
    assert ended == []


def test_registration_that_failed_is_repeated_by_the_next_beat(fake_run, worker, heartbeat, monkeypatch):
    """The client has joined by then, so the reply to the next beat does not name it as lost."""
    heartbeat.register(Registration(client="c0", examples=10))
    fake_run.client.hset(fake_run.keys.site("c0"), "alive", 0)
    fake_run.coordinator.expire_client("c0")
    fake_run.coordinator.receive(0.001)

    def no_answer(registration):
        raise redis.ConnectionError

    with monkeypatch.context() as patch:
        patch.setattr(worker, "register", no_answer)
        with pytest.raises(redis.ConnectionError):
            heartbeat.beat()
    for joined in ([("joined", "c0")], []):
        heartbeat.beat()
        assert [(e.kind, e.client) for e in fake_run.coordinator.receive(0.001)] == joined


def test_unregistered_client_only_joins_again_after_expiry(fake_run, worker, heartbeat):
    fake_run.client.delete(fake_run.keys.site("c0"))
    fake_run.coordinator.receive(0.001)
    heartbeat.beat()
    assert fake_run.coordinator.alive_clients() == ["c0"]
    assert fake_run.coordinator.receive(0.001) == []


def test_worker_stops_when_another_one_serves_its_client(fake_run, worker, heartbeat, ended):
    fake_run.client.hset(fake_run.keys.site("c0"), "alive", 0)
    fake_run.coordinator.expire_client("c0")
    fake_run.join("c0", "worker-b")
    heartbeat.beat()
    assert ended == ["another worker now serves client c0"]


def test_registration_of_a_taken_client_is_an_error(fake_run, worker, heartbeat):
    fake_run.client.hset(fake_run.keys.site("c0"), "holder", "worker-b")
    with pytest.raises(ClientTaken, match="c0"):
        heartbeat.register(Registration(client="c0", examples=10))


# The end


def test_worker_stops_once_when_the_run_has_ended(fake_run, heartbeat, ended):
    fake_run.coordinator.end("target reached", 60, 1)
    heartbeat.beat()
    heartbeat.beat()
    assert ended == ["the run has ended"]


def test_worker_waits_for_a_lost_run_and_joins_its_new_epoch(fake_run, worker, heartbeat, ended):
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


def test_worker_of_an_ended_run_does_not_join_again(fake_run, worker, heartbeat, ended):
    fake_run.coordinator.end("target reached", 60, 1)
    heartbeat.beat()
    assert not fake_run.client.hmget(fake_run.keys.site("c0"), "alive", "holder")[0]


def beats(monkeypatch, heartbeat, outcomes):
    """Run the heartbeat's thread through `outcomes` (errors to raise, or None); return the number of heartbeats."""
    done, seen = threading.Event(), []

    def beat():
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


def test_thread_continues_after_an_error_of_redis(worker, ended, monkeypatch, logs):
    heartbeat = Heartbeat(worker, ["c0"], 0.003, STALL, ended.append)
    outcomes = [redis.ConnectionError("gone"), redis.TimeoutError("slow"), redis.ResponseError("LOADING")]
    assert beats(monkeypatch, heartbeat, [*outcomes, RunNotFound("sample"), None]) == 5
    assert ended == []
    assert {entry["log_level"] for entry in logs} == {"warning"}


def test_stopping_before_starting_is_harmless(heartbeat):
    heartbeat.stop()


def test_stopping_on_the_heartbeat_thread_does_not_deadlock(fake_run, worker):
    stopped = threading.Event()

    def on_end(because):
        heartbeat.stop()
        stopped.set()

    heartbeat = Heartbeat(worker, ["c0"], 0.003, STALL, on_end)
    fake_run.coordinator.end("done", 60, 1)
    heartbeat.start()
    assert stopped.wait(10)
    heartbeat.stop()

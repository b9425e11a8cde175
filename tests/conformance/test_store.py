"""Every script and every method of the stores, on fakeredis and on a real server.

The scripts read the server's clock, and a lease of 0 or fewer seconds is over at once, so no test sleeps.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
import pytest
import redis

import fedqueue.tensors.blobs
import fedqueue.transport.blob_store
from fedqueue.errors import BlobMissing, Fenced, JobClosed, RunNotFound, StoreError
from fedqueue.protocol.keys import RUNS
from fedqueue.protocol.messages import Ending, Order, Registration, read
from fedqueue.protocol.stream_entry import StreamEntry
from fedqueue.tensors.codec import Codec
from fedqueue.transport.connection import connect
from fedqueue.transport.store import Store, list_runs
from fedqueue_coordinator.service.coordinator_store import CoordinatorStore
from tests.support.sample_run import SampleRun


@pytest.fixture(params=[1, 4], ids=["one chunk", "several chunks"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return the number of chunks of a model of the sample run."""
    if request.param > 1:
        monkeypatch.setattr(fedqueue.tensors.blobs, "CHUNK", 20)  # a model has 72 bytes
    number: int = request.param
    return number


def other(run: SampleRun, owner: str = "owner-b") -> CoordinatorStore:
    return CoordinatorStore(run.client, run.name, owner)


def dethroned(run: SampleRun) -> CoordinatorStore:
    """Depose `run.coordinator` without its knowledge; return the current leader."""
    run.coordinator.lead(-1)
    successor = other(run)
    assert successor.lead(60)
    return successor


# Leadership


def test_only_the_first_coordinator_acquires_the_lease(run: SampleRun) -> None:
    second = other(run)
    assert run.coordinator.token > 0
    assert (second.lead(60), second.token) == (False, 0)


def test_expired_lease_passes_on_with_a_higher_token(run: SampleRun) -> None:
    successor = dethroned(run)
    assert successor.token == run.coordinator.token + 1
    assert not run.coordinator.lead(60)


def test_leader_keeps_its_token_on_renewal(run: SampleRun) -> None:
    token = run.coordinator.token
    assert run.coordinator.lead(60)
    run.coordinator.renew_lead(60)
    assert run.coordinator.token == token


def test_renewed_lease_excludes_a_second_coordinator(run: SampleRun) -> None:
    run.coordinator.lead(-1)
    run.coordinator.renew_lead(60)
    assert not other(run).lead(60)


def test_status_reads_what_the_leader_waits_for(run: SampleRun) -> None:
    assert run.coordinator.waiting() == ""
    run.coordinator.renew_lead(60, "waiting for keeper university")
    run.coordinator.renew_lead(60)
    assert Store(run.coordinator.redis, run.coordinator.run).waiting() == "waiting for keeper university"
    run.coordinator.renew_lead(60, "")
    assert run.coordinator.waiting() == ""


def test_leader_may_renew_an_expired_lease_that_is_still_free(run: SampleRun) -> None:
    run.coordinator.lead(-1)
    run.coordinator.renew_lead(60)
    run.publish(1)


def test_renewal_by_a_deposed_leader_is_fenced(run: SampleRun) -> None:
    dethroned(run)
    with pytest.raises(Fenced, match="sample"):
        run.coordinator.renew_lead(60)


def test_released_lease_can_be_acquired_at_once(run: SampleRun) -> None:
    run.coordinator.release_lead()
    successor = other(run)
    assert successor.lead(60)
    assert successor.token == run.coordinator.token + 1


def test_leader_of_a_lost_run_is_fenced_from_a_namesake(run: SampleRun) -> None:
    run.client.flushall()
    assert SampleRun(run.client).coordinator.token != run.coordinator.token
    with pytest.raises(Fenced):
        run.publish(1)


def test_release_by_another_coordinator_changes_nothing(run: SampleRun) -> None:
    other(run).release_lead()
    assert not other(run).lead(60)


def test_info_names_the_leader_until_it_releases(run: SampleRun) -> None:
    assert run.coordinator.info().leader == "owner-a"
    run.coordinator.release_lead()
    assert run.coordinator.info().leader == ""


STALE_WRITES = {
    "dispatch": lambda run, entry: run.dispatch(9),
    "publish": lambda run, entry: run.publish(1, [entry]),
    "close": lambda run, entry: run.coordinator.close(entry.job, {"kind": "rejected"}, 1, entry.id),
    "note": lambda run, entry: run.coordinator.ack([(entry.id, {"kind": "evaluation"})]),
    "end": lambda run, entry: run.coordinator.end("whim", 60, 1),
}


@pytest.mark.parametrize("write", STALE_WRITES)
def test_deposed_leader_writes_are_refused_without_a_trace(run: SampleRun, write: str) -> None:
    run.join()
    run.posted()
    [entry] = run.updates()
    dethroned(run)
    before = run.contents()
    with pytest.raises(Fenced):
        STALE_WRITES[write](run, entry)
    assert run.contents() == before


def test_deposed_leader_cannot_overwrite_a_version(chunks: int, run: SampleRun) -> None:
    """A former leader stages blobs before its commit is refused; these must not overwrite the successor's blobs."""
    successor = dethroned(run)
    good = run.payload(7.0)
    successor.publish(1, good, np.frombuffer(b"good", np.uint8), [{"kind": "version"}], {}, [])
    with pytest.raises(Fenced):
        run.publish(1, state=b"evil")
    assert successor.info().version == 1
    model = successor.read_model(1, Codec(run.manifest))
    np.testing.assert_array_equal(model.buffer, good)
    assert successor.read_optimizer_state(1) == b"good"


def test_staged_chunks_of_a_dead_leader_are_removed(chunks: int, run: SampleRun) -> None:
    run.coordinator.write_blob(run.keys.staged_model(run.coordinator.token), run.payload(), 60)
    run.coordinator.write_blob(run.keys.staged_state(run.coordinator.token), run.payload(), 60)
    successor = dethroned(run)
    state = np.zeros(run.manifest.nbytes, np.uint8)
    successor.publish(1, run.payload(), state, [{"kind": "version"}], {}, [])
    assert not [name for name in run.names() if "staged" in name]


def test_deposed_leader_consumes_no_stream_entries(run: SampleRun) -> None:
    """A former leader reads the stream once more before learning that another coordinator leads."""
    worker = run.join()
    claim = worker.claim(run.dispatch(), 60)
    successor = dethroned(run)
    assert [e.kind for e in successor.unacknowledged()] == ["joined"]
    assert run.post(worker, claim) == ""
    worker.leave(["c0"])
    assert len(run.coordinator.receive(0.001)) == 3
    assert [e.kind for e in successor.receive(0.001)] == ["update", "left"]


# The run as a whole


def test_run_exists_from_its_first_version(redis_client: redis.Redis, run: SampleRun) -> None:
    stranger = CoordinatorStore(redis_client, "stranger", "owner")
    assert run.coordinator.exists()
    assert not stranger.exists()
    stranger.lead(60)
    stranger.create("{}", run.manifest)
    assert not stranger.exists()


def test_info_has_what_was_created_and_committed(run: SampleRun) -> None:
    info = run.coordinator.info()
    assert info.config == run.config.model_dump(mode="json")
    assert info.manifest == run.manifest.pack()
    assert (info.run, info.state, info.version, info.stopped_because) == ("sample", "running", 0, "")
    run.publish(1)
    assert run.coordinator.info().totals == {"updates": 1}


def test_info_of_an_unknown_run_names_it(redis_client: redis.Redis) -> None:
    with pytest.raises(RunNotFound, match="nobody"):
        Store(redis_client, "nobody").info()


def test_runs_are_listed_until_they_expire(run: SampleRun) -> None:
    run.client.sadd(RUNS, "expired")
    assert list_runs(run.client) == ["sample"]


def test_every_key_of_a_run_carries_its_hash_tag(run: SampleRun) -> None:
    run.join()
    run.posted(1)
    run.dispatch(2, "c0")
    run.worker().claim("sample-00000002", 60)
    run.publish(1, state=b"momentum")
    run.coordinator.close("sample-00000001", {"kind": "rejected"}, 1)
    stray = {key.decode() for key in run.client.scan_iter() if b"{sample}" not in key and not key.startswith(b"rq:")}
    assert stray == {RUNS}


def test_ended_run_leaves_only_keys_that_expire(run: SampleRun) -> None:
    worker = run.join()
    run.posted(1)
    open_claim = worker.claim(run.dispatch(2), 60)
    run.publish(1, state=b"momentum")
    run.coordinator.close(open_claim.job, {"kind": "abandoned"}, 1)
    run.coordinator.end("target reached", 90, 1)
    assert {run.client.ttl(run.keys.pattern.replace("*", name)) for name in run.names()} <= {89, 90}
    assert run.names() >= {"config", "head", "ledger", "clients", "model:1:0", "leader"}
    assert not [n for n in run.names() if n.startswith(("jobs", "updates:"))]
    assert set(run.client.hgetall(run.keys.site("c0"))) == {b"registration"}
    info = run.coordinator.info()
    assert (info.state, info.stopped_because, info.version) == ("ended", "target reached", 1)
    late: list[Callable[[], object]] = [
        lambda: worker.leave(["c0"]),
        lambda: worker.heartbeat(["c0"], 60, open_claim, progressing=True),
        lambda: run.post(worker, open_claim),
        lambda: other(run).lead(60),
    ]
    for act in late:  # a late report leaves no key without an expiry
        act()
    assert -1 not in {run.client.ttl(run.keys.pattern.replace("*", name)) for name in run.names()}


def test_ending_a_run_is_idempotent(run: SampleRun) -> None:
    run.coordinator.end("first", 60, 1)
    run.coordinator.end("first", 60, 1)
    assert run.coordinator.info().stopped_because == "first"


def test_ended_run_keeps_the_head_and_the_requested_versions(run: SampleRun) -> None:
    """A job pinned its base and was closed after the last commit; the base must not stay stored."""
    run.join()
    run.coordinator.pin_version(0)
    run.posted(1)
    run.publish(1)
    claim = run.worker().claim(run.dispatch(2), 60)
    assert claim.version == 1
    run.publish(2)
    assert run.coordinator.stored_versions() == [0, 1, 2]
    run.coordinator.close(claim.job, {"kind": "abandoned"}, 1)
    run.coordinator.end("enough", 60, 1, [0])
    assert run.coordinator.stored_versions() == [0, 2]
    assert {name for name in run.names() if name.startswith("model:")} == {"model:0:0", "model:2:0"}


# Serving clients


def test_worker_takes_the_first_unserved_candidate(run: SampleRun) -> None:
    assert run.worker("a").join(["c0", "c1"], 60) == "c0"
    assert run.worker("b").join(["c0", "c1"], 60) == "c1"
    assert run.worker("c").join(["c0", "c1"], 60) is None


def test_worker_that_joins_again_keeps_its_client(run: SampleRun) -> None:
    worker = run.worker()
    assert worker.join(["c0"], 60) == worker.join(["c0"], 60) == "c0"


def test_client_of_a_silent_worker_is_free(run: SampleRun) -> None:
    run.worker("dead").join(["c0"], 0)
    assert run.worker("b").join(["c0"], 60) == "c0"


def test_registration_is_stored_and_posted(run: SampleRun) -> None:
    run.join("c0")
    assert run.coordinator.registrations() == {"c0": {"client": "c0", "examples": 10}}
    assert run.coordinator.alive_clients() == ["c0"]
    [entry] = run.coordinator.receive(0.001)
    assert (entry.kind, entry.client) == ("joined", "c0")
    assert read(Registration, entry.body).examples == 10


def test_registration_of_a_taken_client_is_refused(run: SampleRun) -> None:
    run.join("c0", "a")
    assert not run.worker("b").register(Registration(client="c0", examples=99))
    assert run.coordinator.registrations()["c0"]["examples"] == 10


def test_leaving_is_posted_and_frees_the_client(run: SampleRun) -> None:
    worker = run.join()
    run.coordinator.receive(0.001)
    worker.leave(["c0", "never-mine"])
    assert run.coordinator.alive_clients() == []
    assert [(e.kind, e.client) for e in run.coordinator.receive(0.001)] == [("left", "c0")]
    assert run.worker("b").join(["c0"], 60) == "c0"


def test_worker_cannot_leave_for_another_one(run: SampleRun) -> None:
    run.join("c0", "a")
    run.worker("b").leave(["c0"])
    assert run.coordinator.alive_clients() == ["c0"]


def test_leaving_without_clients_posts_nothing(run: SampleRun) -> None:
    run.worker().leave([])
    assert run.coordinator.unacknowledged() == []


def test_client_with_an_expired_lease_is_expired(run: SampleRun) -> None:
    run.join("c0", lease=0)
    run.join("c1", "worker-b", lease=60)
    leases = run.coordinator.client_leases(["c1", "c0", "c2"], most_seconds=30)
    assert leases == {"c1": 30.0, "c0": 0.0}
    assert run.coordinator.alive_clients() == ["c1"]
    assert run.coordinator.expire_clients(["c0"])
    assert run.coordinator.client_leases(["c0"]) == {}
    assert run.worker().heartbeat(["c0"], 60, None, True).lost_clients == ("c0",)


def test_returned_client_is_not_expired(run: SampleRun) -> None:
    worker = run.join("c0", lease=0)
    worker.heartbeat(["c0"], 60, None, True)
    assert not run.coordinator.expire_clients(["c0"])
    assert run.coordinator.alive_clients() == ["c0"]


# Jobs


def test_dispatched_job_is_open_assigned_and_leased(run: SampleRun) -> None:
    run.join()
    job = run.dispatch(1)
    [listed] = run.coordinator.jobs()
    assert (listed.job, listed.client, listed.state, listed.attempt) == (job, "c0", "open", 0)
    assert read(Order, listed.order) == run.order(1)
    assert run.coordinator.open_jobs() == 1
    assert run.coordinator.job_number() == 1
    assert run.coordinator.find_expired() == []


def test_dispatch_is_idempotent(run: SampleRun) -> None:
    run.join()
    run.dispatch(1, lease=60)
    run.worker().claim("sample-00000001", 60)
    before = run.contents()
    run.dispatch(1, lease=-5)
    assert run.contents() == before


def test_job_passes_from_dispatch_to_merge(chunks: int, run: SampleRun) -> None:
    worker = run.join()
    job = run.dispatch()
    claim = worker.claim(job, 60)
    assert (claim.job, claim.attempt, claim.version) == (job, 1, 0)
    base = np.ones(run.manifest.nbytes, np.uint8)
    worker.fetch(claim.version, base)
    np.testing.assert_array_equal(base, run.payload(0.0))
    assert worker.heartbeat(["c0"], 60, claim, True).owns_job
    payload = run.payload(3.0)
    assert worker.post(claim, run.update(payload), payload) == ""
    assert len([n for n in run.names() if n.startswith("payload:")]) == chunks
    joined, entry = run.coordinator.receive(0.001)
    assert (joined.kind, entry.kind, entry.client, entry.base, entry.attempt) == ("joined", "update", "c0", 0, 1)
    arrived = np.zeros(run.manifest.nbytes, np.uint8)
    run.coordinator.read_blob(run.keys.payload(job, entry.attempt), arrived)
    np.testing.assert_array_equal(arrived, payload)
    assert run.coordinator.open_jobs() == 0

    assert run.publish(1, [entry], b"momentum") == {1}
    assert run.coordinator.jobs() == []
    assert not [n for n in run.names() if n.startswith(("payload:", "job:", "attempt:"))]
    assert [e.kind for e in run.coordinator.unacknowledged()] == ["joined"]
    assert [r["version"] for r in run.coordinator.ledger()] == [1]
    assert run.coordinator.read_optimizer_state(1) == b"momentum"
    assert run.coordinator.info().version == 1
    model = run.coordinator.read_model(1, Codec(run.manifest))
    np.testing.assert_array_equal(model.buffer, run.payload(1.0))


def test_only_posted_payloads_outlive_their_expiry(chunks: int, run: SampleRun) -> None:
    worker = run.join()
    claim = worker.claim(run.dispatch(), 60)
    prefix = run.keys.payload(claim.job, claim.attempt)
    worker.write_blob(prefix, run.payload(), 77)
    assert {run.client.ttl(f"{prefix}:{i}") for i in range(chunks)} <= {76, 77}
    assert run.post(worker, claim) == ""
    assert {run.client.ttl(f"{prefix}:{i}") for i in range(chunks)} == {-1}


def test_claim_of_an_unknown_or_ended_job_is_refused(run: SampleRun) -> None:
    run.join()
    run.posted(1)
    for job in ("sample-00000001", "sample-00000404"):
        with pytest.raises(JobClosed, match=job):
            run.worker().claim(job, 60, "c0")
    assert run.coordinator.refused() == {"closed": 2}


def test_claim_has_the_newest_version_and_renews_the_lease(run: SampleRun) -> None:
    run.join()
    job = run.dispatch(lease=0)
    run.publish(1)
    assert run.coordinator.find_expired() == [job]
    assert run.worker().claim(job, 60).version == 1
    assert run.coordinator.find_expired() == []


def test_second_attempt_takes_the_job_from_the_first(chunks: int, run: SampleRun) -> None:
    first = run.worker().claim(run.dispatch(), 60)
    second = run.worker("worker-b").claim(first.job, 60)
    assert (first.attempt, second.attempt) == (1, 2)
    assert run.post(run.worker(), first) == "attempt"
    assert not [n for n in run.names() if n.startswith("payload:")], "the refused payload was not deleted"
    assert run.coordinator.refused()["attempt"] == 1
    assert run.post(run.worker("worker-b"), second) == ""
    assert [e.attempt for e in run.updates()] == [2]


def test_update_posted_twice_counts_once_and_keeps_its_payload(chunks: int, run: SampleRun) -> None:
    run.join()
    claim = run.worker().claim(run.dispatch(), 60)
    assert run.post(run.worker(), claim) == ""
    assert run.post(run.worker(), claim) == "replayed"
    assert len(run.updates()) == 1
    prefix = run.keys.payload(claim.job, claim.attempt)
    assert {run.client.ttl(f"{prefix}:{i}") for i in range(chunks)} == {-1}
    assert run.coordinator.refused() == {"replayed": 1}


def test_update_of_a_merged_job_is_refused_and_leaves_nothing(chunks: int, run: SampleRun) -> None:
    claim = run.posted()
    run.publish(1, run.updates())
    assert run.post(run.worker(), claim) == "closed"
    assert run.updates() == []
    assert not [n for n in run.names() if n.startswith("payload:")]


def test_update_posted_after_its_lease_is_over_is_refused(chunks: int, run: SampleRun) -> None:
    worker = run.join()
    claim = worker.claim(run.dispatch(), 0)
    assert run.coordinator.close(claim.job, {"kind": "abandoned"}, chunks, if_lapsed=True)
    assert run.post(worker, claim) == "closed"
    assert not [n for n in run.names() if n.startswith("payload:")]
    assert run.coordinator.refused()["closed"] == 1


def test_update_with_missing_chunks_is_refused_and_deleted(chunks: int, run: SampleRun) -> None:
    worker = run.join()
    claim = worker.claim(run.dispatch(), 60)
    payload = run.payload()
    claimed = run.update(payload, chunks=chunks + 1)
    assert worker.post(claim, claimed, payload) == "payload"
    assert run.updates() == []
    assert not [n for n in run.names() if n.startswith("payload:")]
    assert run.post(worker, claim) == "", "the job did not stay open for a complete update"


def test_ending_is_posted_and_closes_the_attempt(run: SampleRun) -> None:
    claim = run.worker().claim(run.dispatch(), 60)
    assert run.worker().end(claim, Ending(reason="failed", error="ValueError: no rows")) == ""
    [entry] = run.coordinator.unacknowledged()
    assert (entry.kind, entry.job, entry.client) == ("ended", claim.job, "c0")
    assert read(Ending, entry.body).error == "ValueError: no rows"
    assert run.worker().end(claim, Ending(reason="returned")) == "replayed"


# Heartbeats


def test_heartbeat_renews_clients_and_the_current_job(run: SampleRun) -> None:
    worker = run.join(lease=0)
    claim = worker.claim(run.dispatch(), 0)
    pulse = worker.heartbeat(["c0"], 60, claim, progressing=True)
    assert (pulse.run_state, pulse.owns_job, pulse.lost_clients) == ("running", True, ())
    assert run.coordinator.find_expired() == []


def test_heartbeat_without_progress_lets_the_job_lease_expire(run: SampleRun) -> None:
    worker = run.join()
    claim = worker.claim(run.dispatch(), 0)
    assert worker.heartbeat(["c0"], 60, claim, progressing=False).owns_job
    assert run.coordinator.find_expired() == [claim.job]


def test_only_a_busy_worker_renews_its_queued_jobs(run: SampleRun) -> None:
    worker = run.join("c0")
    run.join("c1")
    claim = worker.claim(run.dispatch(1, "c0"), 60)
    waiting = run.dispatch(2, "c1", lease=0)
    worker.heartbeat(["c0", "c1"], 60, None, True)
    assert run.coordinator.find_expired() == [waiting]
    worker.heartbeat(["c0", "c1"], 60, claim, progressing=False)
    assert run.coordinator.find_expired() == []


def test_heartbeat_does_not_renew_a_job_of_another_attempt(run: SampleRun) -> None:
    worker = run.join()
    first = worker.claim(run.dispatch(), 60)
    run.worker("worker-b").claim(first.job, 0)
    assert not worker.heartbeat(["c0"], 60, first, True).owns_job
    assert run.coordinator.find_expired() == [first.job]


def test_heartbeat_names_clients_taken_by_another_worker(run: SampleRun) -> None:
    run.join("c0", "slow", lease=0)
    run.join("c0", "quick")
    assert run.worker("slow").heartbeat(["c0"], 60, None, True).lost_clients == ("c0",)
    assert run.worker("quick").heartbeat(["c0"], 60, None, True).lost_clients == ()


def test_heartbeat_reports_an_ended_or_unknown_run(run: SampleRun) -> None:
    worker = run.join()
    run.coordinator.end("done", 60, 1)
    assert worker.heartbeat(["c0"], 60, None, True).run_state == "ended"
    run.client.flushdb()
    assert worker.heartbeat(["c0"], 60, None, True).run_state == ""


# Endings


def test_only_an_open_job_past_its_lease_is_closed_as_expired(run: SampleRun) -> None:
    run.join()
    leased, lapsed, posted = run.dispatch(1, lease=60), run.dispatch(2, lease=0), run.posted(3).job
    closed = [
        run.coordinator.close(job, {"kind": "abandoned", "job": job}, 1, if_lapsed=True)
        for job in (leased, lapsed, posted)
    ]
    assert closed == [False, True, False]
    assert [r["job"] for r in run.coordinator.ledger()] == [lapsed]


def test_job_whose_record_was_evicted_is_closed_once(run: SampleRun) -> None:
    run.join()
    job = run.dispatch(lease=0)
    run.client.delete(run.keys.job(job))
    record = {"kind": "abandoned", "job": job, "client": "c0"}
    assert run.coordinator.find_expired() == [job]
    assert run.coordinator.close(job, record, 1, if_lapsed=True)
    assert not run.coordinator.close(job, record, 1, if_lapsed=True)
    assert run.coordinator.ledger() == [record]


def test_job_closed_twice_ends_once(chunks: int, run: SampleRun) -> None:
    run.posted()
    [entry] = run.updates()
    record = {"kind": "rejected", "job": entry.job}
    assert run.coordinator.close(entry.job, record, chunks, entry.id)
    assert not run.coordinator.close(entry.job, record, chunks, entry.id)
    assert run.coordinator.ledger() == [record]
    assert run.coordinator.unacknowledged() == []
    assert not [n for n in run.names() if n.startswith(("payload:", "job:", "attempt:"))]


def test_closing_a_job_leaves_only_its_ledger_record(run: SampleRun) -> None:
    run.join()
    before = run.names()
    job = run.dispatch()
    run.worker().claim(job, 60)
    run.coordinator.close(job, {"kind": "abandoned"}, 1)
    assert run.names() == before | {"ledger", "counts", "last_jobs"}
    assert run.client.hget(run.keys.site("c0"), "job") is None


def test_closing_keeps_the_assignment_of_a_newer_job(run: SampleRun) -> None:
    run.join()
    old, new = run.dispatch(1), run.dispatch(2)
    run.coordinator.close(old, {"kind": "abandoned"}, 1)
    assert run.client.hget(run.keys.site("c0"), "job") == new.encode()


def test_closing_deletes_the_payloads_of_all_attempts(chunks: int, run: SampleRun) -> None:
    worker = run.join()
    first = worker.claim(run.dispatch(), 60)
    worker.write_blob(run.keys.payload(first.job, first.attempt), run.payload(), 60)  # the worker dies before its post
    second = worker.claim(first.job, 60)
    oversized = np.zeros(3 * run.manifest.nbytes, np.uint8)
    assert worker.post(second, run.update(oversized), oversized) == ""
    [entry] = run.updates()
    run.coordinator.close(entry.job, {"kind": "rejected"}, chunks, entry.id)
    assert not [n for n in run.names() if n.startswith("payload:")]


def test_closing_acknowledges_an_entry_whose_job_is_gone(run: SampleRun) -> None:
    run.posted()
    [entry] = run.updates()
    run.client.delete(run.keys.job(entry.job))
    assert not run.coordinator.close(entry.job, {"kind": "rejected"}, 1, entry.id)
    assert run.coordinator.unacknowledged() == []
    assert run.coordinator.ledger() == []


def test_job_with_a_posted_update_is_not_closed_as_unposted(run: SampleRun) -> None:
    run.join()
    posted, still_open = run.posted(1).job, run.dispatch(2)
    assert (run.coordinator.is_posted(posted), run.coordinator.is_posted(still_open)) == (True, False)
    assert not run.coordinator.is_posted("sample-00000404")
    record = {"kind": "abandoned"}
    assert [run.coordinator.close(job, record, 1, unless_posted=True) for job in (posted, still_open)] == [False, True]
    assert len(run.updates()) == 1


def test_ack_with_a_record_is_written_once(run: SampleRun) -> None:
    run.coordinator.report("evaluated", b"body")
    [entry] = run.coordinator.receive(0.001)
    assert (entry.kind, entry.body) == ("evaluated", b"body")
    assert run.coordinator.ack([(entry.id, {"kind": "evaluation"})])
    assert not run.coordinator.ack([(entry.id, {"kind": "evaluation"})])
    assert run.coordinator.ledger() == [{"kind": "evaluation"}]


def test_ack_without_a_record_writes_no_ledger_record(run: SampleRun) -> None:
    run.coordinator.report("evaluated", b"")
    [entry] = run.coordinator.receive(0.001)
    assert run.coordinator.ack([(entry.id, None)])
    assert run.coordinator.ledger() == []
    assert run.coordinator.unacknowledged() == []


# Versions


@pytest.mark.parametrize("version", [0, 3, 7])
def test_commit_that_does_not_follow_the_head_is_refused(run: SampleRun, version: int) -> None:
    run.publish(1)
    with pytest.raises(StoreError, match=f"version {version} does not follow"):
        run.publish(version)
    assert run.coordinator.info().version == 1
    assert not [n for n in run.names() if "staged" in n], "the refused commit left staged chunks"


def test_committed_version_does_not_expire(chunks: int, run: SampleRun) -> None:
    """Staged chunks expire, while committed chunks stay until a later commit deletes them."""
    run.publish(1, state=bytes(40))
    blobs = [name for name in run.names() if name.startswith(("model:", "state:"))]
    assert len(blobs) > chunks
    assert {run.client.ttl(run.keys.pattern.replace("*", name)) for name in blobs} == {-1}


def test_commit_repeated_by_its_leader_changes_nothing(run: SampleRun) -> None:
    run.posted()
    entries = run.updates()
    assert run.publish(1, entries) == {1}
    ledger = run.coordinator.ledger()
    assert run.publish(1, entries) == {1}
    assert run.coordinator.ledger() == ledger
    assert run.coordinator.info().version == 1


def several(run: SampleRun, last: int, records: int, merged: list[Any]) -> set[Any]:
    lines = [{"kind": "version", "version": last - i, "merged": []} for i in reversed(range(records))]
    none = np.zeros(0, np.uint8)
    return run.coordinator.publish(last, run.payload(float(last)), none, lines, {"updates": last}, merged)


def test_intermediate_versions_are_recorded_but_not_stored(run: SampleRun) -> None:
    run.join()
    for number, client in ((1, "c0"), (2, "c0"), (3, "c0")):
        run.posted(number, client)
    updates = run.updates()
    assert several(run, 3, 3, updates) == {3}
    assert [r["version"] for r in run.coordinator.ledger()] == [1, 2, 3]
    assert run.updates() == []
    assert run.coordinator.info().version == 3
    assert run.coordinator.stored_versions() == [3]
    assert several(run, 3, 3, updates) == {3}, "a repeated commit, as after a lost reply, had another result"
    assert [r["version"] for r in run.coordinator.ledger()] == [1, 2, 3]


@pytest.mark.parametrize(("last", "records"), [(2, 1), (3, 2), (2, 3), (5, 1)])
def test_versions_that_do_not_follow_the_head_are_refused(run: SampleRun, last: int, records: int) -> None:
    with pytest.raises(StoreError, match="does not follow"):
        several(run, last, records, [])
    assert run.coordinator.ledger() == []


def test_commit_of_an_existing_version_is_refused(run: SampleRun) -> None:
    """A successor starts from the head, so no successor commits an existing version again."""
    run.publish(1)
    successor = dethroned(run)
    with pytest.raises(StoreError):
        successor.publish(1, run.payload(), np.zeros(0, np.uint8), [{"kind": "version"}], {}, [])


def test_commit_with_expired_chunks_changes_nothing(
    chunks: int, run: SampleRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.posted()
    before = run.contents()
    monkeypatch.setattr(CoordinatorStore, "begin_blob", lambda self, prefix, buffer, seconds: [])
    with pytest.raises(StoreError, match="not committed within"):
        run.publish(1, run.updates())
    assert run.contents() == before


def test_pins_of_many_open_jobs_are_checked_at_intervals(run: SampleRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedqueue_coordinator.service.coordinator_store.SCANNED_JOBS", 2)
    worker = run.join()
    claims = [worker.claim(run.dispatch(number), 60) for number in (1, 2, 3, 4, 5)]
    stored = [run.publish(version) for version in range(1, 7)]
    assert stored == [{0, 1}, {0, 1, 2}, {0, 3}, {0, 3, 4}, {0, 3, 4, 5}, {0, 6}], (
        "with five open jobs, pins are checked at every third commit"
    )
    for claim in claims[1:]:
        run.post(worker, claim)
    run.publish(7, run.updates())
    assert run.coordinator.stored_versions() == [0, 7], "with one open job, pins are checked at every commit"
    worker.release_base(claims[0])
    run.publish(8)
    models = {name for name in run.names() if name.startswith("model:")}
    assert (run.coordinator.stored_versions(), models) == ([8], {"model:8:0"})


def test_version_is_stored_exactly_while_a_job_pins_it(chunks: int, run: SampleRun) -> None:
    """I5: a version is not deleted during its download by a worker."""
    worker = run.join()
    claim = worker.claim(run.dispatch(1), 60)
    assert run.publish(1) == {0, 1}
    assert run.publish(2) == {0, 2}
    worker.fetch(0, np.empty(run.manifest.nbytes, np.uint8))
    assert run.post(worker, claim) == ""
    assert run.publish(3) == {0, 3}, "the base was deleted before the update was committed"
    assert run.publish(4, run.updates()) == {4}
    assert run.coordinator.stored_versions() == [4]
    models = {n for n in run.names() if n.startswith("model:")}
    assert models == {f"model:4:{i}" for i in range(chunks)}
    with pytest.raises(BlobMissing, match="model:0:0"):
        worker.fetch(0, np.empty(run.manifest.nbytes, np.uint8))


def test_released_base_is_not_pinned(run: SampleRun) -> None:
    worker = run.join()
    claim = worker.claim(run.dispatch(1), 60)
    worker.release_base(claim)
    assert run.publish(1) == {1}


def test_only_the_owning_attempt_can_release_its_base(run: SampleRun) -> None:
    worker = run.join()
    first = worker.claim(run.dispatch(1), 60)
    worker.claim(first.job, 60)
    worker.release_base(first)
    assert run.publish(1) == {0, 1}


def test_closed_job_pins_no_version(run: SampleRun) -> None:
    worker = run.join()
    claim = worker.claim(run.dispatch(1), 60)
    run.coordinator.close(claim.job, {"kind": "abandoned"}, 1)
    assert run.publish(1) == {1}


def test_only_the_newest_optimizer_state_is_stored(chunks: int, run: SampleRun) -> None:
    state = bytes(range(40))
    run.publish(1, state=state)
    run.publish(2, state=state[::-1])
    assert {n.split(":")[1] for n in run.names() if n.startswith("state:")} == {"2"}
    assert run.coordinator.read_optimizer_state(2) == state[::-1]


def test_optimizer_state_with_a_missing_chunk_is_an_error(chunks: int, run: SampleRun) -> None:
    run.publish(1, state=bytes(40))
    run.client.delete(f"{run.keys.state(1)}:0")
    with pytest.raises(StoreError, match="version 1"):
        run.coordinator.read_optimizer_state(1)


def test_error_of_a_piggybacked_command_does_not_affect_a_post(run: SampleRun) -> None:
    worker, payload = run.join(), run.payload()
    run.client.set("text", "no list")
    claim = worker.claim(run.dispatch(), 60)
    assert worker.post(claim, run.update(payload), payload, [("LREM", "text", 1, "job"), ("DEL", "text")]) == ""
    assert [entry.job for entry in run.updates()] == [claim.job]
    assert not run.client.exists("text")


def test_late_post_cannot_change_a_kept_payload(chunks: int, run: SampleRun) -> None:
    claim = run.posted()
    empty = np.zeros(0, np.uint8)
    run.coordinator.publish(1, run.payload(), empty, [{"kind": "version"}], {}, run.updates(), keep_payloads=True)
    assert run.post(run.worker(), claim, value=9.0) == "closed"
    kept = np.zeros(run.manifest.nbytes, np.uint8)
    run.coordinator.read_blob(run.keys.kept_payload(claim.job, claim.attempt), kept)
    np.testing.assert_array_equal(kept, run.payload(1.0))
    assert len([name for name in run.names() if name.startswith("payload:")]) == chunks


# Epochs: the coordinator restores a run that Redis has lost from a checkpoint


def new_epoch(run: SampleRun, version: int = 5) -> None:
    """Delete everything in Redis and let the running coordinator start epoch 1 from its checkpoint."""
    run.client.flushdb()
    assert run.coordinator.lead(60)
    run.coordinator.create(run.config.model_dump_json(), run.manifest, epoch=1)
    run.coordinator.restore(version, 40, [{"kind": "version", "version": version}, {"kind": "epoch", "epoch": 1}])
    assert not run.coordinator.exists()
    empty = np.zeros(0, np.uint8)
    run.coordinator.publish(version, run.payload(float(version)), empty, [], {"updates": 9}, [])


def test_restored_run_keeps_version_ledger_and_job_number(run: SampleRun) -> None:
    new_epoch(run)
    info = run.coordinator.info()
    assert (info.epoch, info.version, info.totals, info.state) == (1, 5, {"updates": 9}, "running")
    assert run.coordinator.exists()
    assert run.coordinator.job_number() == 40
    assert [r["kind"] for r in run.coordinator.ledger()] == ["version", "epoch"]
    assert run.publish(6) == {6}


def test_update_of_an_old_epoch_is_refused(run: SampleRun) -> None:
    """The update is refused even if the same worker holds a job of the same name in the new epoch."""
    worker = run.join()
    stale = worker.claim(run.dispatch(1), 60)
    new_epoch(run)
    worker = run.join()
    fresh = worker.claim(run.dispatch(1), 60)
    assert (stale.epoch, fresh.epoch, stale.attempt, fresh.attempt) == (0, 1, 1, 1)
    assert run.post(worker, stale) == "old_epoch"
    assert worker.end(stale, Ending(reason="returned")) == "old_epoch"
    assert run.updates() == []
    assert not [name for name in run.names() if name.startswith("payload:")]
    assert run.post(worker, fresh) == ""


# Blobs


@pytest.mark.parametrize("nbytes", [0, 1, 15, 16, 17, 32, 33])
def test_blob_of_any_size_round_trips_through_chunks(
    run: SampleRun, monkeypatch: pytest.MonkeyPatch, nbytes: int
) -> None:
    monkeypatch.setattr(fedqueue.tensors.blobs, "CHUNK", 16)
    monkeypatch.setattr(fedqueue.transport.blob_store, "READ", 7)
    blob = np.arange(nbytes, dtype=np.uint8)
    assert run.coordinator.write_blob("fedqueue:{sample}:blob", blob) == -(-nbytes // 16)
    into = np.full(nbytes, 255, np.uint8)
    run.coordinator.read_blob("fedqueue:{sample}:blob", into)
    np.testing.assert_array_equal(into, blob)


def test_blob_with_a_missing_chunk_is_named(run: SampleRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fedqueue.tensors.blobs, "CHUNK", 16)
    monkeypatch.setattr(fedqueue.transport.blob_store, "READ", 7)
    run.coordinator.write_blob("fedqueue:{sample}:blob", np.zeros(40, np.uint8))
    run.client.delete("fedqueue:{sample}:blob:1")
    with pytest.raises(BlobMissing, match="blob:1"):
        run.coordinator.read_blob("fedqueue:{sample}:blob", np.zeros(40, np.uint8))


@pytest.mark.parametrize("size", [39, 41])
def test_blob_of_another_size_is_refused(run: SampleRun, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(fedqueue.tensors.blobs, "CHUNK", 16)
    monkeypatch.setattr(fedqueue.transport.blob_store, "READ", 7)
    run.coordinator.write_blob("fedqueue:{sample}:blob", np.zeros(size, np.uint8))
    with pytest.raises(StoreError, match="expected 8"):
        run.coordinator.read_blob("fedqueue:{sample}:blob", np.zeros(40, np.uint8))


def test_oversized_blob_is_read_for_at_most_one_extra_byte(run: SampleRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is allocated for the expected size, not for the stored size."""
    run.client.set("fedqueue:{sample}:blob:0", bytes(10_000_000))
    monkeypatch.setattr(run.client, "get", lambda key: pytest.fail("the whole of it was read"))
    tracemalloc.start()
    with pytest.raises(StoreError, match="41 or more bytes, expected 40"):
        run.coordinator.read_blob("fedqueue:{sample}:blob", np.zeros(40, np.uint8))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


@pytest.mark.server
def test_embedded_server_takes_no_value_larger_than_a_chunk(server_client: redis.Redis) -> None:
    with pytest.raises(redis.RedisError):
        connect("unix://" + server_client.connection_pool.connection_kwargs["path"], retries=0).set(
            "blob", bytes(fedqueue.tensors.blobs.CHUNK + 1)
        )
    assert server_client.set("blob", bytes(fedqueue.tensors.blobs.CHUNK))
    server_client.delete("blob")


@pytest.mark.parametrize("key", ["registration", "alive"])
def test_oversized_field_of_a_site_is_not_read(run: SampleRun, key: str) -> None:
    run.join()
    run.client.hset(run.keys.site("c0"), key, b"9" * 100_000)
    assert run.coordinator.registrations() == (
        {} if key == "registration" else {"c0": {"client": "c0", "examples": 10}}
    )
    assert run.coordinator.alive_clients() == ([] if key == "alive" else ["c0"])


# The stream of updates


def test_unacknowledged_entries_are_reread_in_order(run: SampleRun) -> None:
    run.join()
    for number in (1, 2, 3):
        run.posted(number)
    first = run.coordinator.receive(0.001)
    assert [e.kind for e in first] == ["joined", "update", "update", "update"]
    assert run.coordinator.receive(0.001) == []
    run.coordinator.ack([(first[0].id, None)])
    run.publish(1, [first[2]])

    successor = dethroned(run)
    assert successor.unacknowledged() == [first[1], first[3]]
    assert successor.receive(0.001) == []
    successor.report("evaluated", b"")
    assert [e.kind for e in successor.receive(0.001)] == ["evaluated"]


def test_reading_is_bounded_and_resumes_at_the_next_entry(run: SampleRun) -> None:
    for i in range(5):
        run.coordinator.report("evaluated", b"%d" % i)
    assert [e.body for e in run.coordinator.receive(0.001, count=3)] == [b"0", b"1", b"2"]
    assert [e.body for e in run.coordinator.receive(0.001, count=3)] == [b"3", b"4"]


def test_waiting_for_entries_times_out(run: SampleRun) -> None:
    assert run.coordinator.receive(0.0) == []


def test_entry_with_invalid_fields_is_returned() -> None:
    entry = StreamEntry.from_fields(
        "c0", (b"1-1", {b"kind": b"\xff\xfe", b"attempt": b"many", b"base": b"", b"\xff": b""})
    )
    assert (entry.id, entry.attempt, entry.base, entry.job, entry.body) == ("1-1@c0", 0, -1, "", b"")


# Memory


def test_number_of_keys_is_constant_over_many_versions(chunks: int, run: SampleRun) -> None:
    """I6: jobs that are merged, rejected, expired or posted late leave only ledger records."""
    run.join()
    counts = []
    for version in range(1, 13):
        base = 4 * version
        run.posted(base)
        merged = run.updates()[-1]
        run.posted(base + 1)
        rejected = run.updates()[-1]
        claim = run.worker().claim(run.dispatch(base + 2), 0)
        run.worker().claim(run.dispatch(base + 3), 60)
        run.publish(version, [merged], state=b"momentum")
        run.coordinator.close(rejected.job, {"kind": "rejected"}, chunks, rejected.id)
        run.coordinator.close(claim.job, {"kind": "abandoned"}, chunks, if_lapsed=True)
        run.coordinator.close(f"sample-{base + 3:08d}", {"kind": "abandoned"}, chunks)
        assert run.post(run.worker(), claim) == "closed"
        counts.append(len(run.names()))
    assert len(set(counts[1:])) == 1
    assert len(run.coordinator.ledger()) == 48
    assert run.coordinator.open_jobs() == 0
    assert run.coordinator.jobs() == []


def test_ledger_is_read_in_the_order_of_writing(run: SampleRun) -> None:
    for i in range(20):
        run.client.xadd(run.keys.ledger, {"record": msgpack.packb({"number": i})})
    assert [r["number"] for r in run.coordinator.ledger()] == list(range(20))


# Counts


def test_counts_are_what_the_ledger_adds_up_to(run: SampleRun) -> None:
    run.join()
    run.publish(0)
    run.coordinator.close(run.dispatch(1), {"kind": "abandoned", "client": "c0", "reason": "failed", "error": "why"}, 1)
    run.coordinator.close(run.dispatch(2), {"kind": "abandoned", "client": "c0", "reason": "late", "error": ""}, 1)
    run.posted(3)
    (entry,) = [entry for entry in run.coordinator.unacknowledged() if entry.kind == "update"]
    run.publish(1, merged=[entry])
    for _ in range(2):  # a repetition counts nothing
        run.coordinator.close(run.keys.job("x"), {"kind": "rejected", "client": "c0", "reason": "stale"}, 1)
    counts = run.coordinator.counts()
    assert (counts.merged_by, counts.rejected, counts.abandoned) == ({"c0": 1}, {}, {"failed": 1, "late": 1})
    assert counts.failure == {"kind": "abandoned", "client": "c0", "reason": "failed", "error": "why"}
    assert counts.evaluation is None


def test_restored_ledger_restores_the_counts(run: SampleRun) -> None:
    ledger: list[dict[str, Any]] = [
        {"kind": "version", "version": 1, "merged": [{"client": "c0"}, {"client": "c1"}, {"client": "c0"}]},
        {"kind": "rejected", "client": "c0", "reason": "stale"},
        {"kind": "evaluation", "metrics": {"loss": 1.0}},
        {"kind": "evaluation", "metrics": {"loss": 0.5}},
    ]
    run.coordinator.restore(1, 3, ledger)
    counts = run.coordinator.counts()
    assert (counts.merged_by, counts.rejected, counts.abandoned) == ({"c0": 2, "c1": 1}, {"stale": 1}, {})
    assert counts.evaluation == ledger[-1]

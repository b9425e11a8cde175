"""Stream entries that a coordinator has not read before a takeover or a decision are not lost."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import redis

from fedqueue.errors import Fenced
from fedqueue.protocol.messages import Registration, Update
from fedqueue.tensors.frame import Frame
from fedqueue.tensors.manifest import Manifest
from fedqueue.transport.worker_store import Claim, WorkerStore
from fedqueue_coordinator.service.coordinator_store import CoordinatorStore
from fedqueue_coordinator.service.leader_election import LeaseRenewal
from tests.support.builders import EXAMPLES
from tests.support.mortal_coordinator import Killed
from tests.support.sample_run import SampleRun
from tests.support.scripted_run import Workers, lead, scripted_config
from tests.support.small_task import SmallTask


def post(worker: WorkerStore, claim: Claim) -> str:
    payload = Frame(Manifest.from_module(SmallTask().model())).buffer
    return worker.post(claim, Update(examples=EXAMPLES, nbytes=payload.nbytes, chunks=1, seconds=0.1), payload)


class Idle(Workers):
    """Workers that joined, but act only when a test tells them to."""

    def act(self) -> None:
        return None


def test_update_posted_after_leaving_and_rejoining_is_merged(fake_client: redis.Redis, tmp_path: Path) -> None:
    """The successor reads first that the client left, and then that the queued job was completed."""
    config = scripted_config(aggregation={"strategy": "fedasync"}, stop={"versions": 1})
    workers = Idle(fake_client, config)

    def dies_once_jobs_are_open(point: str) -> None:
        if point == "before receive":
            raise Killed(point)

    with pytest.raises(Killed):
        lead(fake_client, workers, config, tmp_path, dies_once_jobs_are_open)
    store = CoordinatorStore(fake_client, config.name, "reader")
    job = store.jobs()[0]
    gone, back = (WorkerStore(fake_client, config.name, token) for token in ("workers", "back"))
    gone.leave([job.client])
    back.join([job.client], 3600)
    back.register(Registration(client=job.client, examples=EXAMPLES))
    assert post(back, back.claim(job.job, 3600)) == ""
    fake_client.hset(store.keys.leader, "expires", 0)
    result = lead(fake_client, workers, config, tmp_path, lambda point: None)
    merged = [line["job"] for record in result.ledger if record["kind"] == "version" for line in record["merged"]]
    assert merged == [job.job]
    assert [r["job"] for r in result.ledger if r.get("job") == job.job] == []


def test_kept_payload_survives_a_late_duplicate_of_its_post(run: SampleRun) -> None:
    worker = run.join()
    claim = run.posted()
    (entry,) = run.updates()
    run.coordinator.publish(
        1,
        run.payload(),
        run.payload()[:0],
        [{"kind": "version", "version": 1, "merged": []}],
        {},
        [entry],
        keep_payloads=True,
    )
    assert run.post(worker, claim, 9.0) == "closed"
    kept = run.payload(0.0)
    run.coordinator.read_blob(run.keys.kept_payload(claim.job, claim.attempt), kept)
    assert bytes(kept) == bytes(run.payload(1.0))
    assert run.client.ttl(f"{run.keys.kept_payload(claim.job, claim.attempt)}:0") == -1


class Renewals:
    """Stands in for the store: `renew` raises the given errors, then signals that it was called."""

    def __init__(self, *errors: Exception | None) -> None:
        self._errors = list(errors)
        self.called, self.enough = 0, threading.Event()

    def __call__(self, seconds: float) -> None:
        error = self._errors.pop(0) if self._errors else None
        self.called += 1
        if not self._errors:
            self.enough.set()
        if error:
            raise error


def test_busy_leader_renews_its_lease_even_after_an_outage() -> None:
    renewals = Renewals(None, redis.ConnectionError("gone"), None)
    with LeaseRenewal(renewals, 0.01):
        assert renewals.enough.wait(10)


def test_lead_that_another_one_has_is_not_renewed_again() -> None:
    renewals = Renewals(Fenced("another one leads"))
    with LeaseRenewal(renewals, 0.01) as keeping:
        assert renewals.enough.wait(10)
        keeping._thread.join(10)
        assert not keeping._thread.is_alive()
    assert renewals.called == 1

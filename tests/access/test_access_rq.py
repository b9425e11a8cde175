"""RQ's worker as its own Redis user, with valid, raising, withdrawn and invalid jobs: no command is denied."""

from __future__ import annotations

import signal
import uuid
import zlib
from collections.abc import Iterator
from typing import Any, cast

import msgpack
import pytest
import structlog

from fedqueue.protocol.keys import client_tag
from fedqueue.transport import rq_jobs
from fedqueue.transport.rq_jobs import TRAIN, client_queue
from fedqueue_worker.job_runner import JobRunner
from fedqueue_worker.rq_worker import TrainingWorker
from tests.support.acl_server import AclServer, tagged
from tests.support.sample_run import SampleRun

pytestmark = pytest.mark.server


@pytest.fixture(autouse=True)
def _signal_handlers_restored() -> Iterator[None]:
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


class Trainer:
    """Stands in for a job runner."""

    told_to_stop = False

    def __init__(self, raises: Exception | None = None) -> None:
        self.jobs: list[str] = []
        self._raises = raises

    def train(self, order: dict[str, Any], *rq: Any) -> None:
        self.jobs.append(order["job"])
        if self._raises:
            raise self._raises


def work(server: AclServer, run: SampleRun, trainer: Trainer) -> list[str]:
    """Run a worker of client c0, logged in as its Redis user, until its queue is empty; return the trained jobs."""
    name = f"fedqueue-{run.name}-{uuid.uuid4().hex[:12]}-{client_tag(run.name, 'c0')}"
    worker = TrainingWorker(cast(JobRunner, trainer), server.user("worker-c0"), [run.keys.queue("c0")], name)
    with structlog.testing.capture_logs():
        worker.work(burst=True, logging_level="CRITICAL")
    return trainer.jobs


def enqueue(run: SampleRun, number: int) -> str:
    order = tagged(run, number, "c0")
    run.dispatch_order(order, number)
    return str(order.job)


@pytest.mark.parametrize("error", [None, ValueError("no rows")], ids=["goes well", "raises"])
def test_worker_takes_a_job_and_posts_its_end(guarded: AclServer, led: SampleRun, error: Any) -> None:
    job = enqueue(led, 1)
    assert work(guarded, led, Trainer(error)) == [job]
    failed = client_queue(led.client, led.keys.queue("c0")).failed_job_registry.get_job_ids(cleanup=False)
    assert failed == ([job] if error else [])
    assert guarded.denied() == []


def test_job_withdrawn_by_the_coordinator_is_not_trained(guarded: AclServer, led: SampleRun) -> None:
    job = enqueue(led, 1)
    rq_jobs.forget(led.client, led.keys.queue("c0"), job)
    assert work(guarded, led, Trainer()) == []
    rq_jobs.delete_queue(led.client, led.keys.queue("c0"))
    assert guarded.denied() == []


PLANTED: dict[str, dict[Any, Any]] = {
    "a compression bomb": {"data": zlib.compress(bytes(2**24))},
    "another function": {"data": msgpack.packb(["os.system", None, [], {}])},
    "a garbage date": {"created_at": "yesterday"},
    "a garbage origin": {"origin": b"\xff"},
}


@pytest.mark.parametrize("what", PLANTED)
def test_invalid_job_is_dropped_and_the_next_one_trained(guarded: AclServer, led: SampleRun, what: str) -> None:
    admin, queue = guarded.user("admin"), led.keys.queue("c0")
    planted = tagged(led, 9, "c0").job
    good: dict[Any, Any] = {
        "data": msgpack.packb([TRAIN, None, [], {}]),
        "origin": queue,
        "status": "queued",
        "timeout": -1,
    }
    admin.hset(f"rq:job:{planted}", mapping={**good, "created_at": "2026-01-01T00:00:00.000000Z", **PLANTED[what]})
    admin.lpush(f"rq:queue:{queue}", planted)
    job = enqueue(led, 1)
    assert work(guarded, led, Trainer())[-1:] == [job]
    assert guarded.denied() == []


def test_worker_cannot_read_another_clients_job_in_its_queue(guarded: AclServer, led: SampleRun) -> None:
    other, queue = tagged(led, 5, "c1"), led.keys.queue("c0")
    led.dispatch_order(other, 5)
    guarded.user("admin").lpush(f"rq:queue:{queue}", other.job)
    job = enqueue(led, 1)
    first = work(guarded, led, Trainer())  # a denied command ends RQ's loop, and the worker starts the loop again
    assert [*first, *work(guarded, led, Trainer())] == [job]
    assert set(guarded.denied()) == {f"worker-c0: rq:job:{other.job}"}

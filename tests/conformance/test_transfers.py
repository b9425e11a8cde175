"""Uploads and downloads in pieces, on fakeredis and on a real server: resumed, and never mixed."""

from __future__ import annotations

import itertools
from typing import Any, cast

import numpy as np
import pytest
import redis

import fedqueue.tensors.blobs
from fedqueue.tensors.codec import Codec
from fedqueue.tensors.frame import Frame
from fedqueue.transport import line_speed
from fedqueue.transport.connection import connect
from fedqueue.transport.transfer import PAYLOAD_SECONDS, Download, Upload
from fedqueue_coordinator.operator.embedded_server import EmbeddedServer
from fedqueue_worker.retrying_store import RetryingStore
from tests.support.sample_run import SampleRun

PIECE = 16  # bytes; a model of the sample run has 72


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fedqueue.tensors.blobs, "CHUNK", 32)
    for bound in ("FIRST_PIECE", "LEAST_PIECE", "MOST_PIECE"):
        monkeypatch.setattr(line_speed, bound, PIECE)


def begin(run: SampleRun, lease: float = 60.0) -> tuple[Any, ...]:
    """Return the worker of c0, and its claim of a new job."""
    worker = run.join()
    return worker, worker.claim(run.dispatch(lease=lease), lease)


def stored(run: SampleRun, claim: Any) -> Any:
    prefix = run.keys.payload(claim.job, claim.attempt)
    chunks = cast(list[bytes | None], run.client.mget([f"{prefix}:{i}" for i in range(3)]))
    return b"".join(chunk or b"" for chunk in chunks)


def numbered(run: SampleRun) -> Any:
    """Return a payload whose bytes differ."""
    payload = run.payload()
    payload[:] = np.arange(payload.nbytes)
    return payload


def finish(transfer: Upload | Download) -> None:
    while transfer.step():
        pass


# Uploads


def test_pieces_add_up_to_the_payload_that_is_posted(run: SampleRun) -> None:
    worker, claim = begin(run)
    payload = numbered(run)
    upload = worker.upload(claim, payload)
    sizes = [len(stored(run, claim)) for _ in iter(upload.step, False)]
    assert sizes == [16, 32, 48, 64]
    assert worker.post(claim, run.update(payload), payload, upload=upload) == ""
    assert stored(run, claim) == payload.tobytes()
    assert [entry.attempt for entry in run.updates()] == [1]


def test_upload_continues_after_the_bytes_that_arrived(run: SampleRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reply to a piece is lost, and later one of the requests."""
    worker, claim = begin(run)
    payload, sent = numbered(run), []
    upload = worker.upload(claim, payload)
    store_piece, faults = upload._store_piece, {2: "after", 4: "before"}

    def faulty(start: Any, piece: Any, first: Any) -> Any:
        sent.append(start)
        fault = faults.get(len(sent))
        if fault == "before":
            raise redis.ConnectionError("cut")
        result = store_piece(start, piece, first)
        if fault == "after":
            raise redis.ConnectionError("cut")
        return result

    monkeypatch.setattr(upload, "_store_piece", faulty)
    for _ in range(8):
        try:
            finish(upload)
        except redis.ConnectionError:
            continue
    assert sent == [0, 16, 16, 32, 32, 48, 64]
    assert stored(run, claim) == payload.tobytes()


def test_upload_sends_again_what_redis_has_lost(run: SampleRun) -> None:
    worker, claim = begin(run)
    payload = numbered(run)
    upload = worker.upload(claim, payload)
    for _ in range(4):
        upload.step()
    run.client.delete(run.keys.payload(claim.job, claim.attempt) + ":0")
    finish(upload)
    assert worker.post(claim, run.update(payload), payload, upload=upload) == ""
    assert stored(run, claim) == payload.tobytes()


def test_repeated_piece_that_arrives_late_changes_nothing(run: SampleRun) -> None:
    worker, claim = begin(run)
    payload = numbered(run)
    late = worker.upload(claim, payload)
    finish(worker.upload(claim, payload))
    late.step()  # the first piece again
    assert stored(run, claim) == payload.tobytes()
    upload = worker.upload(claim, payload)
    assert worker.post(claim, run.update(payload), payload, upload=upload) == ""
    late.step()
    assert stored(run, claim) == payload.tobytes(), "a piece after the post"
    assert run.client.ttl(run.keys.payload(claim.job, claim.attempt) + ":0") == -1


def test_each_piece_renews_the_lease_and_every_expiry(run: SampleRun) -> None:
    worker, claim = begin(run, lease=0.0)
    assert run.coordinator.find_expired() == [claim.job]
    upload = worker.upload(claim, numbered(run), lambda: 60.0)
    prefix = run.keys.payload(claim.job, claim.attempt)
    for step in range(4):
        upload.step()
        if step == 2:
            run.client.expire(f"{prefix}:0", 5)
    assert run.coordinator.find_expired() == []
    assert all(PAYLOAD_SECONDS - 5 < run.client.ttl(f"{prefix}:{i}") <= PAYLOAD_SECONDS for i in range(2))


def test_attempts_do_not_mix_their_pieces(run: SampleRun) -> None:
    worker, first = begin(run)
    payload = numbered(run)
    early = worker.upload(first, payload)
    early.step()
    second = run.worker("worker-b").claim(first.job, 60)
    other = payload[::-1].copy()
    upload = run.worker("worker-b").upload(second, other)
    upload.step()
    assert not early.step(), "the job belongs to another attempt"
    assert stored(run, first) == b"", "the pieces of the first attempt stay"
    assert worker.post(first, run.update(payload), payload, upload=early) == "attempt"
    assert run.worker("worker-b").post(second, run.update(other), other, upload=upload) == ""
    assert stored(run, second) == other.tobytes()


def test_upload_of_a_closed_job_ends_and_leaves_nothing(run: SampleRun) -> None:
    worker, claim = begin(run, lease=0.0)
    payload = numbered(run)
    upload = worker.upload(claim, payload)
    upload.step()
    assert run.coordinator.close(claim.job, {"kind": "abandoned"}, 3, if_lapsed=True)
    assert not upload.step()
    assert worker.post(claim, run.update(payload), payload, upload=upload) == "closed"
    assert stored(run, claim) == b""
    assert run.coordinator.refused() == {"closed": 1}


def test_small_payload_travels_with_its_post(run: SampleRun, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, claim = begin(run)
    worker.uplink.piece = 1000
    monkeypatch.setattr(fedqueue.tensors.blobs, "CHUNK", 1000)
    payload = numbered(run)
    upload = worker.upload(claim, payload)
    assert not upload.step()
    assert len(upload.commands_for_post()) == 1
    assert worker.post(claim, run.update(payload), payload, upload=upload) == ""
    assert stored(run, claim) == payload.tobytes()


# Downloads


def test_download_continues_with_the_missing_piece(run: SampleRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run.publish(1)
    worker, claim = begin(run)
    download = worker.download(claim.version, into := np.zeros(72, np.uint8))
    read_span, asked = worker.read_span, []

    def faulty(prefix: Any, start: Any, part: Any, whole: Any, moved: Any) -> None:
        asked.append(start)
        if len(asked) == 3:
            raise redis.ConnectionError("cut")
        read_span(prefix, start, part, whole, moved)

    monkeypatch.setattr(worker, "read_span", faulty)
    with pytest.raises(redis.ConnectionError):
        finish(download)
    run.publish(2)  # the version that the claim holds stays stored
    finish(download)
    assert asked == [0, 16, 32, 32, 48, 64]
    np.testing.assert_array_equal(into, run.payload(1.0))


def test_outage_between_pieces_is_waited_for(run: SampleRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run.publish(1)
    worker, claim = begin(run)
    read_span, calls = worker.read_span, itertools.count()

    def flaky(*args: Any) -> None:
        if next(calls) % 2:
            raise redis.ConnectionError("cut")
        read_span(*args)

    monkeypatch.setattr(worker, "read_span", flaky)
    monkeypatch.setattr("fedqueue.transport.retry.FIRST_SECONDS", 0.0)
    retrying, pieces = RetryingStore(worker, lambda: False), []
    into = Frame(run.manifest)
    retrying.fetch_model(claim.version, Codec(run.manifest), into, lambda: None, lambda: pieces.append(1))
    np.testing.assert_array_equal(into.buffer, run.payload(1.0))
    assert len(pieces) == 4


@pytest.mark.server
def test_bytes_of_a_large_piece_are_progress_in_both_directions(
    server: EmbeddedServer, server_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = SampleRun(connect(server.url))
    worker, claim = begin(run)
    moved, size = [], 3_000_000
    worker.downlink.piece = worker.uplink.piece = size
    monkeypatch.setattr(fedqueue.tensors.blobs, "CHUNK", size)
    payload = np.zeros(size, np.uint8)
    upload = worker.upload(claim, payload, moved=lambda: moved.append("up"))
    assert worker.post(claim, run.update(payload), payload, upload=upload) == ""
    run.coordinator.write_blob(run.keys.model(7), payload)
    download = worker.download(7, payload, lambda: moved.append("down"))
    finish(download)
    assert moved.count("up") == -(-size // (256 * 1024))
    assert moved.count("down") > 1


# A worker that dies in a transfer


def test_lease_of_a_replaced_worker_process_has_ended(run: SampleRun) -> None:
    """The job's lease is long, because it was in a transfer; the next process serves the client sooner than that."""
    _, claim = begin(run, lease=600.0)
    assert run.coordinator.find_expired() == []
    assert not run.coordinator.close(claim.job, {"kind": "abandoned"}, 3, if_lapsed=True)
    run.client.hset(run.keys.site("c0"), "alive", 0)
    run.join(token="worker-b")
    assert run.coordinator.find_expired() == [claim.job]
    assert run.coordinator.close(claim.job, {"kind": "abandoned"}, 3, if_lapsed=True)


def test_job_that_waits_in_the_queue_stays_with_the_client(run: SampleRun) -> None:
    run.join()
    job = run.dispatch(lease=600.0)
    run.client.hset(run.keys.site("c0"), "alive", 0)
    run.join(token="worker-b")
    assert run.coordinator.find_expired() == []
    assert not run.coordinator.close(job, {"kind": "abandoned"}, 3, if_lapsed=True)

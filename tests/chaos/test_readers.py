"""A slow reader gets all of the version that it began with, in bounded memory, despite newer versions (I5)."""

from __future__ import annotations

import numpy as np
import pytest

import fedqueue.tensors.blobs
from fedqueue.errors import BlobMissing
from tests.support.redis_commands import stored
from tests.support.sample_run import SampleRun

CHUNKS = 9
NEWER = 20


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fedqueue.tensors.blobs, "CHUNK", 8)  # of 72 bytes


@pytest.mark.usefixtures("small_chunks")
def test_version_stays_until_its_slow_reader_is_done(run: SampleRun) -> None:
    run.publish(1)
    worker = run.join()
    claim = worker.claim(run.dispatch(), 60)
    expected, fetched, newer = run.payload(1.0), np.zeros(72, np.uint8), 1
    for chunk in range(CHUNKS):
        place = slice(chunk * 8, chunk * 8 + 8)
        fetched[place] = np.frombuffer(stored(run.client, f"{run.keys.model(claim.version)}:{chunk}"), np.uint8)
        for _ in range(NEWER // CHUNKS + 1):
            newer += 1
            kept = run.publish(newer)
            assert kept == {1, newer}, "a version is kept that is neither being fetched nor the newest"
    assert newer > NEWER
    assert np.array_equal(fetched, expected)
    worker.release_base(claim)
    assert run.publish(newer + 1) == {newer + 1}
    with pytest.raises(BlobMissing):
        worker.fetch(1, fetched)


@pytest.mark.usefixtures("small_chunks")
def test_version_that_nobody_holds_is_gone_with_the_next_commit(run: SampleRun) -> None:
    """Without a claim, which pins the version, the next commit deletes it."""
    run.publish(1)
    run.publish(2)
    with pytest.raises(BlobMissing):
        run.join().fetch(1, np.zeros(72, np.uint8))


@pytest.mark.usefixtures("small_chunks")
def test_slow_readers_keep_only_their_own_versions(run: SampleRun) -> None:
    claims = []
    for number in range(1, 5):
        worker = run.join(f"c{number}")
        claims.append(worker.claim(run.dispatch(number, f"c{number}"), 60))
        run.publish(number)
    stored = run.publish(5)
    assert stored == {0, 1, 2, 3, 5}
    for claim in claims:
        buffer = np.zeros(72, np.uint8)
        worker.fetch(claim.version, buffer)
        assert np.array_equal(buffer, run.payload(float(claim.version)))

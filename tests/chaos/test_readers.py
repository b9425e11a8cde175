"""A slow reader gets the version that it began with, whole, however many appear meanwhile (I5), in bounded memory."""

from __future__ import annotations

import numpy as np
import pytest

import fedqueue.transport.store
from fedqueue.errors import BlobMissing

CHUNKS = 9
NEWER = 20


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fedqueue.transport.store, "CHUNK", 8)  # of 72 bytes


@pytest.mark.usefixtures("small_chunks")
def test_version_stays_whole_while_a_slow_reader_fetches_it_and_goes_when_it_is_done(run):
    run.publish(1)
    worker = run.join()
    claim = worker.claim(run.dispatch(), 60)
    expected, fetched, newer = run.payload(1.0), np.zeros(72, np.uint8), 1
    for chunk in range(CHUNKS):
        place = slice(chunk * 8, chunk * 8 + 8)
        fetched[place] = np.frombuffer(run.client.get(f"{run.keys.model(claim.version)}:{chunk}"), np.uint8)
        for _ in range(NEWER // CHUNKS + 1):
            newer += 1
            stored = run.publish(newer)
            assert stored == {1, newer}, "the version that is being fetched and the head: no other one is kept"
    assert newer > NEWER
    assert np.array_equal(fetched, expected)
    worker.release_base(claim)
    assert run.publish(newer + 1) == {newer + 1}
    with pytest.raises(BlobMissing):
        worker.fetch(1, fetched)


@pytest.mark.usefixtures("small_chunks")
def test_version_that_nobody_holds_is_gone_with_the_next_commit(run):
    """Without the claim the reader would find nothing: the hold is what keeps the version."""
    run.publish(1)
    run.publish(2)
    with pytest.raises(BlobMissing):
        run.join().fetch(1, np.zeros(72, np.uint8))


@pytest.mark.usefixtures("small_chunks")
def test_several_slow_readers_keep_their_own_versions_and_no_more(run):
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

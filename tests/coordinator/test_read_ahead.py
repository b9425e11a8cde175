"""Prefetching returns the same bytes as direct reads, and prefetch errors have no effect."""

from __future__ import annotations

import fakeredis
import numpy as np
import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from fedqueue.errors import BlobMissing
from fedqueue.tensors import blobs as chunking
from fedqueue.transport.store import Store
from fedqueue_coordinator.service import read_ahead
from fedqueue_coordinator.service.read_ahead import ReadAhead


def blob(number: int, nbytes: int = 40) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, nbytes, np.uint8)


@pytest.fixture
def blobs(redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(read_ahead, "LEAST", 1)
    blobs = Store(redis_client, "run")
    for number in range(4):
        blobs.write_blob(f"blob-{number}", blob(number))
    return blobs


def wait_for_prefetch(ahead: ReadAhead) -> np.ndarray:
    assert ahead._coming is not None
    return ahead._coming[1].result()


def read(ahead: ReadAhead, number: int, start: int = 0, end: int = 40) -> np.ndarray:
    into = np.zeros(end - start, np.uint8)
    ahead.read_span(f"blob-{number}", start, into, 40)
    return into


def expected(*numbers: int) -> list[tuple[str, int]]:
    return [(f"blob-{number}", 40) for number in numbers]


def test_expected_blobs_are_prefetched_in_order(blobs: Store) -> None:
    ahead = ReadAhead(blobs)
    ahead.expect(expected(1, 2))
    wait_for_prefetch(ahead)
    blobs.redis.delete("blob-1:0")
    np.testing.assert_array_equal(read(ahead, 0), blob(0))
    np.testing.assert_array_equal(read(ahead, 1), blob(1))
    wait_for_prefetch(ahead)
    blobs.redis.delete("blob-2:0")
    np.testing.assert_array_equal(read(ahead, 2), blob(2))


def test_prefetched_blob_that_is_not_read_is_skipped(blobs: Store) -> None:
    ahead = ReadAhead(blobs)
    ahead.expect(expected(0, 1, 2))
    np.testing.assert_array_equal(read(ahead, 2), blob(2))
    ahead.expect(expected(3))
    ahead.expect(expected(1))
    np.testing.assert_array_equal(read(ahead, 1), blob(1))


def test_failed_prefetch_is_reported_when_the_blob_is_read(blobs: Store) -> None:
    ahead = ReadAhead(blobs)
    blobs.redis.delete("blob-1:0")
    ahead.expect(expected(1, 2))
    with pytest.raises(BlobMissing, match="blob-1:0"):
        read(ahead, 1)
    np.testing.assert_array_equal(read(ahead, 2), blob(2))


def test_prefetch_skips_small_blobs_and_stops_after_a_chunk(blobs: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "LEAST", 41)
    ahead = ReadAhead(blobs)
    ahead.expect(expected(1))
    assert ahead._coming is None
    monkeypatch.setattr(read_ahead, "LEAST", 40)
    monkeypatch.setattr(read_ahead, "MOST_AHEAD", 16)
    ahead.expect(expected(1))
    assert wait_for_prefetch(ahead).nbytes == ahead._memory.nbytes == 16
    np.testing.assert_array_equal(read(ahead, 1, 30), blob(1)[30:])  # the end is read before the beginning
    for start in range(0, 40, 8):
        np.testing.assert_array_equal(read(ahead, 1, start, start + 8), blob(1)[start : start + 8])


@given(data=st.data())
def test_prefetch_in_any_order_reads_the_stored_bytes(data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for module, size in ((chunking, "CHUNK"), (read_ahead, "MOST_AHEAD")):
            patch.setattr(module, size, data.draw(st.integers(1, 50)))
        patch.setattr(read_ahead, "LEAST", 1)
        blobs = Store(fakeredis.FakeRedis(), "run")
        for number in range(3):
            blobs.write_blob(f"blob-{number}", blob(number))
        ahead = ReadAhead(blobs)
        for _ in range(data.draw(st.integers(1, 12))):
            if data.draw(st.booleans()):
                ahead.expect(expected(*data.draw(st.lists(st.integers(0, 2), max_size=4))))
            number, start = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 39))
            end = data.draw(st.integers(start + 1, 40))
            np.testing.assert_array_equal(read(ahead, number, start, end), blob(number)[start:end])

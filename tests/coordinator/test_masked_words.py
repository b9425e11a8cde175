"""Masked words in Redis: read whole where they are small, streamed where they are large, and never added unchecked."""

from __future__ import annotations

import numpy as np
import pytest

from fedqueue.errors import BlobMissing, SignatureError
from fedqueue.protocol.signed_envelope import digest_of
from fedqueue.tensors.blobs import BlobBuffer
from fedqueue_coordinator.core.events import WholeWords
from fedqueue_coordinator.service import masked_words
from fedqueue_coordinator.service.masked_words import StreamedWords, read_words
from fedqueue_coordinator.service.payload_reader import PayloadChanged

WORDS = np.arange(11, dtype=np.uint32)


class Blob:
    """Bytes in a store that may change between two reads."""

    def __init__(self) -> None:
        self.data, self.reads = WORDS.copy().view(np.uint8), 0

    def read(self, start: int, into: BlobBuffer, whole: int) -> None:
        self.reads += 1
        if whole != len(self.data):
            raise BlobMissing("masks")
        into[:] = self.data[start : start + len(into)]


@pytest.fixture
def blob(monkeypatch: pytest.MonkeyPatch) -> Blob:
    monkeypatch.setattr(masked_words, "CHUNK", 16)
    monkeypatch.setattr(masked_words, "READ", 16)
    return Blob()


def test_large_words_are_streamed_in_pieces(blob: Blob) -> None:
    vector = read_words(blob.read, WORDS.nbytes, digest_of(WORDS.view(np.uint8)))
    assert isinstance(vector, StreamedWords)
    pieces = [piece.copy() for piece in vector.pieces()]
    assert [len(piece) for piece in pieces] == [4, 4, 3]
    assert np.array_equal(np.concatenate(pieces), WORDS)


def test_words_are_read_once_into_given_memory(blob: Blob) -> None:
    memory = np.empty(WORDS.nbytes, np.uint8)
    vector = read_words(blob.read, WORDS.nbytes, digest_of(WORDS.view(np.uint8)), memory)
    assert isinstance(vector, WholeWords)
    assert (blob.reads, np.shares_memory(vector.words, memory)) == (1, True)


def test_words_beyond_given_memory_lie_beside_it(blob: Blob) -> None:
    memory = np.empty(WORDS.nbytes - 4, np.uint8)
    vector = read_words(blob.read, WORDS.nbytes, digest_of(WORDS.view(np.uint8)), memory)
    assert isinstance(vector, WholeWords)
    assert np.shares_memory(vector.words, memory)
    assert np.array_equal(np.concatenate(list(vector.pieces())), WORDS)
    blob.data[-1] ^= 1
    with pytest.raises(SignatureError, match="its digest is"):
        read_words(blob.read, WORDS.nbytes, digest_of(WORDS.view(np.uint8)), memory)


@pytest.mark.parametrize("streamed", [True, False])
def test_words_with_another_digest_are_refused(blob: Blob, streamed: bool) -> None:
    memory = None if streamed else np.empty(WORDS.nbytes, np.uint8)
    with pytest.raises(SignatureError, match="its digest is"):
        read_words(blob.read, WORDS.nbytes, "0" * 64, memory)


def test_words_that_change_after_their_check_are_noticed(blob: Blob) -> None:
    vector = read_words(blob.read, WORDS.nbytes, digest_of(WORDS.view(np.uint8)))
    blob.data[0] ^= 1
    with pytest.raises(PayloadChanged, match="changed while they were added"):
        list(vector.pieces())


def test_words_that_vanish_after_their_check_are_noticed(blob: Blob) -> None:
    vector = read_words(blob.read, WORDS.nbytes, digest_of(WORDS.view(np.uint8)))
    blob.data = blob.data[:8]
    with pytest.raises(PayloadChanged):
        list(vector.pieces())

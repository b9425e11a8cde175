"""Masks: streams of pseudo-random words that a client adds to its update, and that keepers sum up.

A mask is AES-256-CTR of zeros under a key that HKDF-SHA256 derives from a seed of 32 bytes, as little-endian words. A
seed belongs to one update and one component. Whoever lacks one of an update's seeds cannot tell its words from random.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedqueue.secure.ring import PIECE, Words
from fedqueue.tensors.blobs import slices

SEED_BYTES = 32
MASK, ROUNDING = b"fedqueue/1 mask", b"fedqueue/1 rounding"
DITHER, DITHER_AGAIN = b"fedqueue/1 dither", b"fedqueue/1 dither again"
"""What a stream is for: streams of one seed for different uses are independent of each other."""
_ZEROS = memoryview(bytes(4 * PIECE))


def new_seed() -> bytes:
    """A seed out of the operating system's generator."""
    return os.urandom(SEED_BYTES)


class MaskStream:
    """The words of one seed, in order; the words do not depend on the sizes of the pieces that are asked for."""

    def __init__(self, seed: bytes, use: bytes = MASK) -> None:
        key = HKDF(SHA256(), SEED_BYTES, None, use).derive(seed)
        self._cipher = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()

    def next_into(self, words: Words) -> None:
        """Fill a contiguous array with the next words."""
        data = words.view(np.uint8)
        for part in slices(len(data), len(_ZEROS)):
            self._cipher.update_into(_ZEROS[: part.stop - part.start], data[part].data)


def add_masks(quantized: npt.NDArray[np.int32], seeds: Iterable[bytes]) -> Words:
    """The masked update: q + Σ mask mod 2³², in the memory of `quantized` (int32 [d])."""
    masked = quantized.view(np.uint32)
    streams = [MaskStream(seed) for seed in seeds]
    scratch = np.empty(min(PIECE, len(masked)), np.uint32)
    for where in slices(len(masked), PIECE):
        words, piece = scratch[: where.stop - where.start], masked[where]
        for stream in streams:
            stream.next_into(words)
            np.add(piece, words, out=piece)
    return masked


def weighted_mask_sum(
    seeds: Sequence[bytes], weights: Sequence[int], count: int, dither_seed: bytes, dither: int
) -> Iterator[Words]:
    """A keeper's answer, piece by piece: Σ w_i mask_i − u mod 2³², uint32 [count] in all.

    u is uniform over `dither` consecutive integers around 0, and a function of `dither_seed`. A piece is valid until
    the next one. Memory: a few pieces, and a cipher for each seed.
    """
    streams = [(MaskStream(seed), np.uint32(weight)) for seed, weight in zip(seeds, weights, strict=True)]
    noise = _Dither(dither_seed, dither)
    total, scratch, more = (np.empty(min(PIECE, count), np.uint32) for _ in range(3))
    for where in slices(count, PIECE):
        piece, words = total[: where.stop - where.start], scratch[: where.stop - where.start]
        piece.fill(0)
        for stream, weight in streams:
            stream.next_into(words)
            np.multiply(words, weight, out=words)
            np.add(piece, words, out=piece)
        if dither > 1:
            noise.next_into(words, more[: len(piece)])
            np.subtract(piece, words, out=piece)
        yield piece


class _Dither:
    """The dither of one cohort: integers that are uniform over `values` consecutive ones around 0."""

    def __init__(self, seed: bytes, values: int) -> None:
        self._words, self._again = MaskStream(seed, DITHER), MaskStream(seed, DITHER_AGAIN)
        self._values, self._offset = np.uint32(values), np.uint32((values - 1) // 2)
        self._limit = np.uint32(2**32 - 1 - 2**32 % values)  # of words that are uniform modulo `values`

    def next_into(self, words: Words, scratch: Words) -> None:
        """Fill `words` with the next integers, modulo 2³²; `scratch` has the same length."""
        self._words.next_into(words)
        while words.max() > self._limit:
            beyond = np.flatnonzero(words > self._limit)
            drawn = np.empty(len(beyond), np.uint32)
            self._again.next_into(drawn)
            words[beyond] = drawn
        np.floor_divide(words, self._values, out=scratch)
        np.multiply(scratch, self._values, out=scratch)
        np.subtract(words, scratch, out=words)
        np.subtract(words, self._offset, out=words)

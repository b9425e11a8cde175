"""Masks: the words of a seed, and a keeper's sum of them against Python's integers and another library."""

from __future__ import annotations

import hashlib
import hmac
import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

from fedqueue.secure.masks import DITHER, DITHER_AGAIN, MASK, MaskStream, add_masks, new_seed, weighted_mask_sum
from fedqueue.secure.ring import PIECE

SEEDS = [bytes([i]) * 32 for i in range(8)]
ASIDE = b"\xff" * 32
D = 840


def words_of(seed: bytes, count: int, use: bytes = MASK) -> list[int]:
    """The specification, step by step: HKDF out of HMAC (RFC 5869), then AES of each counter block."""
    extracted = hmac.digest(bytes(32), seed, hashlib.sha256)
    key = hmac.digest(extracted, use + b"\x01", hashlib.sha256)
    blocks = (count + 3) // 4
    ecb = Cipher(algorithms.AES256(key), modes.ECB()).encryptor()
    stream = b"".join(ecb.update(i.to_bytes(16, "big")) for i in range(blocks))
    return [int.from_bytes(stream[4 * i : 4 * i + 4], "little") for i in range(count)]


def words(seed: bytes, count: int, use: bytes = MASK) -> list[int]:
    array = np.empty(count, np.uint32)
    MaskStream(seed, use).next_into(array)
    return array.tolist()


def mask_sum(
    seeds: Sequence[bytes], weights: Sequence[int], count: int, dither: int = 1, aside: bytes = ASIDE
) -> list[int]:
    pieces = [piece.copy() for piece in weighted_mask_sum(seeds, weights, count, aside, dither)]
    return np.concatenate(pieces).tolist()  # type: ignore[no-any-return]


def test_a_seed_makes_the_words_of_the_specification() -> None:
    assert words(SEEDS[1], 37) == words_of(SEEDS[1], 37)


def test_the_words_do_not_depend_on_the_pieces() -> None:
    stream, whole = MaskStream(SEEDS[0]), words(SEEDS[0], 3 * PIECE)
    sizes = [1, 2, 3, 70_001, 5, 2 * PIECE]
    parts = [np.empty(size, np.uint32) for size in sizes]
    for part in parts:
        stream.next_into(part)
    assert np.concatenate(parts)[: 3 * PIECE].tolist() == whole[: sum(sizes)]


def test_streams_for_different_uses_differ() -> None:
    assert words(SEEDS[0], 8) != words(SEEDS[0], 8, DITHER)


def test_every_seed_is_new_and_has_256_bits() -> None:
    seeds = [new_seed() for _ in range(100)]
    assert len(set(seeds)) == 100
    assert {len(seed) for seed in seeds} == {32}
    assert len(set(zip(*seeds, strict=True))) == 32, "no byte repeats another one, or is constant"


def test_every_byte_of_a_seed_changes_the_mask() -> None:
    """A mask that depended on 32 bits of its seed only could be found by trying them all."""
    base = words(bytes(32), 4)
    for i in range(32):
        changed = bytearray(32)
        changed[i] = 1
        assert words(bytes(changed), 4) != base


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=40), st.integers(1, 3))
def test_masks_are_added_modulo_two_to_the_32(values: list[int], components: int) -> None:
    masked = add_masks(np.array(values, np.int32), SEEDS[:components])
    masks = [words(seed, len(values)) for seed in SEEDS[:components]]
    assert masked.tolist() == [(q + sum(column)) % 2**32 for q, *column in zip(values, *masks, strict=True)]


@given(st.lists(st.integers(1, 8), min_size=1, max_size=8), st.integers(1, 50))
def test_a_keepers_sum_is_that_of_python_integers(weights: list[int], count: int) -> None:
    seeds = SEEDS[: len(weights)]
    columns = zip(*(words(seed, count) for seed in seeds), strict=True)
    expected = [sum(w * x for w, x in zip(weights, column, strict=True)) % 2**32 for column in columns]
    assert mask_sum(seeds, weights, count) == expected


def test_a_long_sum_is_the_same_in_every_piece() -> None:
    count = 2 * PIECE + 17
    weights = [8, 3, 1]
    whole = mask_sum(SEEDS[:3], weights, count)
    masks = np.array([words(seed, count) for seed in SEEDS[:3]], np.uint64)
    assert whole == ((masks * np.array(weights, np.uint64)[:, None]).sum(axis=0) % 2**32).tolist()


def test_the_dither_is_the_same_for_the_same_seed_only() -> None:
    first = mask_sum(SEEDS[:2], [1, 8], 100, D)
    assert mask_sum(SEEDS[:2], [1, 8], 100, D) == first
    assert mask_sum(SEEDS[:2], [1, 8], 100, D, aside=bytes(32)) != first


def dithers(count: int, dither: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The integers that a keeper adds: its sum without dither minus its sum with it."""
    without, with_dither = mask_sum(SEEDS[:1], [1], count), mask_sum(SEEDS[:1], [1], count, dither)
    difference = (np.array(without, np.uint32) - np.array(with_dither, np.uint32)).view(np.int32)
    return difference.astype(np.int64)


@pytest.mark.parametrize("dither", [2, 6, 12, 60, 420, 840])
def test_the_dither_is_uniform_around_zero(dither: int) -> None:
    drawn = dithers(200_000, dither)
    assert (int(drawn.min()), int(drawn.max())) == (-((dither - 1) // 2), dither // 2)
    counts = np.bincount(drawn + (dither - 1) // 2, minlength=dither)
    expected = len(drawn) / dither
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert abs(statistic - (dither - 1)) < 6 * (2 * (dither - 1)) ** 0.5, "χ² has mean D − 1, variance 2 (D − 1)"


def test_words_that_would_bias_the_dither_are_drawn_again() -> None:
    """With 3 · 2³⁰ values, a quarter of the words is beyond them. The oracle draws again with Python's integers."""
    values, count = 3 * 2**30, 200
    drawn, spare = words_of(ASIDE, count, DITHER), iter(words_of(ASIDE, 4 * count, DITHER_AGAIN))
    while beyond := [i for i, word in enumerate(drawn) if word >= values]:
        for i in beyond:
            drawn[i] = next(spare)
    without, with_dither = mask_sum(SEEDS[:1], [1], count), mask_sum(SEEDS[:1], [1], count, values)
    expected = [(x - (word - (values - 1) // 2)) % 2**32 for x, word in zip(without, drawn, strict=True)]
    assert with_dither == expected


def test_one_level_has_no_dither() -> None:
    assert not dithers(1000, 1).any()


# Low bits: what an exact sum with integer weights tells of one update modulo a divisor of the others' weights

WEIGHTS = [5, 8, 8, 8, 8]
COUNT = 40_000


def unmasked(updates: np.ndarray[tuple[int, int], np.dtype[np.int32]], dither: int) -> list[int]:
    """The sum that a coordinator sees, with one keeper."""
    rows = [add_masks(update.copy(), [seed]).astype(np.uint64) for update, seed in zip(updates, SEEDS, strict=False)]
    masked = sum(np.uint64(w) * row for w, row in zip(WEIGHTS, rows, strict=True)) % np.uint64(2**32)
    taken = np.array(mask_sum(SEEDS[:5], WEIGHTS, COUNT, dither), np.uint32)
    return (masked.astype(np.uint32) - taken).view(np.int32).tolist()  # type: ignore[no-any-return]


def attacked(dither: int) -> float:
    """The share of coordinates in which the attack reads x_1 mod 8 out of the sum: 5 · 5 = 1 mod 8."""
    updates = np.random.default_rng(3).integers(-(2**20), 2**20, (5, COUNT)).astype(np.int32)
    guesses = [total * 5 % 8 for total in unmasked(updates, dither)]
    return float(np.mean(np.array(guesses) == updates[0] % 8))


def test_without_dither_the_low_bits_of_one_update_are_read() -> None:
    assert attacked(dither=1) == 1.0


def test_with_dither_the_low_bits_are_a_guess() -> None:
    assert attacked(dither=D) == pytest.approx(1 / 8, abs=6 * (7 / 64 / COUNT) ** 0.5)


def test_with_dither_the_sum_is_uniform_modulo_every_level() -> None:
    """For a fixed x_1, the sum modulo g tells nothing: χ² over the residues, for each g ≤ 8."""
    updates = np.zeros((5, COUNT), np.int32)
    updates[0] = 3
    totals = np.array(unmasked(updates, D))
    for g in range(2, 9):
        counts = np.bincount(totals % g, minlength=g)
        statistic = float(((counts - COUNT / g) ** 2 / (COUNT / g)).sum())
        assert statistic < (g - 1) + 6 * (2 * (g - 1)) ** 0.5


def test_masked_updates_show_no_bit_of_their_values() -> None:
    """Each of the 32 bits of a masked constant is 1 in half of the words, within six standard errors."""
    masked = add_masks(np.full(COUNT, 7, np.int32), [new_seed()])
    bits = np.unpackbits(masked.view(np.uint8).reshape(-1, 4), axis=1).mean(axis=0)
    assert np.abs(bits - 0.5).max() < 6 * 0.5 / COUNT**0.5


def test_without_one_component_equal_sums_give_equal_views() -> None:
    """For x and x' of one weighted sum there are masks of the missing component with which all other bytes agree.

    A coalition of the coordinator and all keepers but one sees the masked updates, the masks of its own components, and
    the missing keeper's sum. So it cannot tell x from x'.
    """
    rng, weights = np.random.default_rng(5), [2, 3]
    x = rng.integers(-1000, 1000, (2, 50))
    other = x + np.array([[3], [-2]]) * rng.integers(-100, 100, 50)  # 2 · 3 t − 3 · 2 t = 0
    assert not (x == other).all()
    for missing, known in itertools.permutations(range(2)):
        masks = rng.integers(0, 2**32, (2, 2, 50))  # update, component, parameter
        shifted = masks.copy()
        shifted[:, missing] = (masks[:, missing] + x - other) % 2**32
        views = []
        for values, drawn in ((x, masks), (other, shifted)):
            masked = (values + drawn.sum(axis=1)) % 2**32
            answer = sum(w * drawn[i, missing] for i, w in enumerate(weights)) % 2**32
            views.append((masked.tobytes(), drawn[:, known].tobytes(), answer.tobytes()))
        assert views[0] == views[1]

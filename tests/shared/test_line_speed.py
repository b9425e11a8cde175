"""The size of a piece follows the speed of the line, by a clock that the tests move."""

from __future__ import annotations

import pytest

from fedqueue.transport.line_speed import FIRST_PIECE, LEAST_PIECE, MOST_PIECE, PIECE_SECONDS, LineSpeed


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def move(speed: LineSpeed, clock: Clock, bytes_per_second: float, latency: float = 0.0) -> int:
    """Transfer one piece; return its size."""
    nbytes = speed.piece
    with speed.measured(nbytes):
        clock.now += latency + nbytes / bytes_per_second
    return nbytes


@pytest.mark.parametrize("bytes_per_second", [100_000, 250_000, 1_000_000, 10_000_000])
def test_piece_becomes_what_the_line_moves_in_two_seconds(bytes_per_second: int) -> None:
    clock = Clock()
    speed = LineSpeed(clock)
    for _ in range(8):
        move(speed, clock, bytes_per_second)
    assert speed.piece == pytest.approx(PIECE_SECONDS * bytes_per_second, rel=0.01)


def test_piece_stays_within_its_bounds() -> None:
    clock = Clock()
    fast, dead_slow = LineSpeed(clock), LineSpeed(clock)
    for _ in range(8):
        move(fast, clock, 1e9)
        move(dead_slow, clock, 100)
    assert (fast.piece, dead_slow.piece) == (MOST_PIECE, LEAST_PIECE)


def test_piece_changes_by_a_factor_of_four_at_most() -> None:
    clock = Clock()
    speed = LineSpeed(clock)
    sizes = [move(speed, clock, 1e9) for _ in range(3)]
    assert sizes == [FIRST_PIECE, 4 * FIRST_PIECE, 16 * FIRST_PIECE]
    move(speed, clock, 100)
    assert speed.piece == 16 * FIRST_PIECE


def test_lost_connection_makes_pieces_smaller() -> None:
    speed = LineSpeed(Clock())
    with pytest.raises(ConnectionError), speed.measured(FIRST_PIECE):
        raise ConnectionError
    assert speed.piece == LEAST_PIECE


def test_small_transfer_says_nothing_about_the_line() -> None:
    clock = Clock()
    speed = LineSpeed(clock)
    with speed.measured(100):
        clock.now += 0.5
    assert speed.piece == FIRST_PIECE

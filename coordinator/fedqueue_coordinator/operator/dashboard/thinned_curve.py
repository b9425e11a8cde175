"""A curve of bounded size: the longer the run, the farther apart its points."""

from __future__ import annotations

MOST_POINTS = 600


class ThinnedCurve:
    """Points (x, y) in the order of x; at most `most` of them, evenly spread over what was added, and the last one.

    >>> curve = ThinnedCurve(most=4)
    >>> for x in range(9):
    ...     curve.add(x, x * x)
    >>> curve.points
    [(0, 0), (4, 16), (8, 64)]
    """

    def __init__(self, most: int = MOST_POINTS) -> None:
        self._most = most
        self._stride = 1
        self._added = 0
        self._kept: list[tuple[float, float]] = []
        self._last: tuple[float, float] | None = None

    def add(self, x: float, y: float) -> None:
        """Add the next point."""
        self._last = x, y
        if self._added % self._stride == 0:
            self._kept.append(self._last)
            if len(self._kept) >= self._most:
                self._kept, self._stride = self._kept[::2], 2 * self._stride
        self._added += 1

    @property
    def points(self) -> list[tuple[float, float]]:
        """The points that are shown."""
        if self._last is None or self._kept[-1] == self._last:
            return list(self._kept)
        return [*self._kept, self._last]

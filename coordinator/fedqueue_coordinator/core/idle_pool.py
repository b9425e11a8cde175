"""The idle clients of a federation, in the order in which the selection takes them."""

from __future__ import annotations

from dataclasses import dataclass

from fedqueue_coordinator.core.weighted_set import WeightedSet


@dataclass(frozen=True)
class Place:
    """What decides when an idle client gets a job."""

    beyond_cap: int
    """0, or the client's number of updates if it has reached the cap on shares: below the cap comes first."""
    rank: float
    """Lower ranks come first."""
    weight: int
    """The probability among clients of the same cap and rank is in proportion to it."""


class IdlePool:
    """Idle clients with their places. Each operation takes O(log n) time for n idle clients.

    Clients of the same place are sorted by name, so that a choice does not depend on the order in which they came.
    """

    def __init__(self) -> None:
        self._places: dict[str, Place] = {}
        self._ordered: WeightedSet[tuple[int, float, str]] = WeightedSet()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, client: str) -> bool:
        return client in self._places

    def put(self, client: str, place: Place) -> None:
        """Insert the client at `place`, or move it there."""
        present = self._places.get(client)
        if present == place:
            return
        self.discard(client)
        self._places[client] = place
        self._ordered.add((place.beyond_cap, place.rank, client), place.weight)

    def discard(self, client: str) -> None:
        """Remove the client, if it is in the pool."""
        place = self._places.pop(client, None)
        if place is not None:
            self._ordered.remove((place.beyond_cap, place.rank, client))

    def first(self) -> tuple[str, Place] | None:
        """Return the first client by place and name; None if no client is idle."""
        key = self._ordered.first()
        return None if key is None else (key[2], self._places[key[2]])

    def drawn(self, draw: float) -> str:
        """Return a client with the cap and the rank of the first one, by its weight.

        It is the lowest by name for which the weights up to its own exceed `draw` · (the weight of all), where `draw`
        is in [0, 1); or the highest by name if no weights do. The pool must not be empty. Weights are integers, so the
        sums are exact.
        """
        first = self._ordered.first()
        assert first is not None
        end = (first[0], first[1] + 1, "")
        chosen = self._ordered.at(draw * self._ordered.weight_below(end))
        if chosen is None or chosen >= end:
            chosen = self._ordered.last_below(end)
            assert chosen is not None
        return chosen[2]

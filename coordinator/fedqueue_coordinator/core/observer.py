"""What follows a run without taking part in it: it is told what was recorded, and answers nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedqueue_coordinator.core.federation import Federation


class RunObserver:
    """Is told of a run by its coordinator or its simulation, on the thread that merges: a call must return at once.

    This one does nothing.
    """

    def begins(self, federation: Federation, now: float) -> None:
        """The run begins, or continues from `federation`, at `now` seconds of its clock; also after an outage."""

    def recorded(self, record: Mapping[str, Any]) -> None:
        """The ledger has a new record. The calls come in the order of the ledger, and `record` must not be changed."""

    def dispatched(self) -> None:
        """A job was put into its client's queue."""

    def received(self, nbytes: int) -> None:
        """The payload of an update was read: `nbytes` bytes."""

    def progressed(self, federation: Federation, now: float) -> None:
        """The coordinator has gone once round its loop, and the run's clock shows `now` seconds."""

    def measured_memory(self, used: int, limit: int) -> None:
        """Redis uses `used` bytes of memory, of at most `limit`; 0: of any number."""

    def lost_connection(self) -> None:
        """An error of Redis has interrupted the coordinator, which will resume the run."""


class Observers(RunObserver):
    """Several observers, each of which is told everything."""

    def __init__(self, *observers: RunObserver) -> None:
        self._observers = observers

    def begins(self, federation: Federation, now: float) -> None:
        """As `RunObserver.begins`."""
        for observer in self._observers:
            observer.begins(federation, now)

    def recorded(self, record: Mapping[str, Any]) -> None:
        """As `RunObserver.recorded`."""
        for observer in self._observers:
            observer.recorded(record)

    def dispatched(self) -> None:
        """As `RunObserver.dispatched`."""
        for observer in self._observers:
            observer.dispatched()

    def received(self, nbytes: int) -> None:
        """As `RunObserver.received`."""
        for observer in self._observers:
            observer.received(nbytes)

    def progressed(self, federation: Federation, now: float) -> None:
        """As `RunObserver.progressed`."""
        for observer in self._observers:
            observer.progressed(federation, now)

    def measured_memory(self, used: int, limit: int) -> None:
        """As `RunObserver.measured_memory`."""
        for observer in self._observers:
            observer.measured_memory(used, limit)

    def lost_connection(self) -> None:
        """As `RunObserver.lost_connection`."""
        for observer in self._observers:
            observer.lost_connection()

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

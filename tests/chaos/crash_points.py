"""Where a coordinator may die: the points that `service.py` names, and those around each step of its store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fedqueue.transport.store import BlobBuffer, Call
from fedqueue.transport.zero_copy import Command
from fedqueue_coordinator.service.coordinator_store import CoordinatorStore

SERVICE = (
    "before dispatch",
    "after load",
    "before commit",
    "after commit",
    "before close",
)
STORE = (
    "between blobs",
    "before commit.lua",
    "after commit.lua",
    "before dispatch.lua",
    "after dispatch.lua",
    "before close.lua",
    "after close.lua",
    "after note.lua",
    "before bury.lua",
    "after bury.lua",
    "after leader.lua",
)
POINTS = SERVICE + STORE


class StoreWithPoints(CoordinatorStore):
    """The real store; it says where it is before and after each script, and after each blob."""

    at: Callable[[str], None] = staticmethod(lambda point: None)

    def scripts(self, calls: Sequence[Call], first: Sequence[Command] = (), then: Sequence[Command] = ()) -> list[Any]:
        """What travels together goes one by one here: a connection may break between any two."""
        for command in first:
            self.redis.execute_command(*command)
            self.at("between blobs")
        answers = []
        for call in calls:
            self.at(f"before {call[0]}.lua")
            answers += super().scripts([call], (), then)
            self.at(f"after {call[0]}.lua")
        return answers

    def write_blob(self, prefix: str, buffer: BlobBuffer, seconds: int | None = None) -> int:
        chunks = super().write_blob(prefix, buffer, seconds)
        if prefix.startswith(self.keys.model_prefix):
            self.at("between blobs")  # of the model, and of the server optimizer's state
        return chunks

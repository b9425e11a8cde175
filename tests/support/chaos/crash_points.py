"""Names the crash points of a coordinator: those of `service.py`, and those around each step of the store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fedqueue.tensors.blobs import BlobBuffer
from fedqueue.transport.lua_scripts import Call
from fedqueue.transport.zero_copy import Command, Moved, ignore_moved
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
    "after ack.lua",
    "before expire_clients.lua",
    "after expire_clients.lua",
    "after leader.lua",
)
WITH_KEEPERS = ("before propose.lua", "after propose.lua")
"""Passed only in a run with keepers."""
POINTS = SERVICE + STORE + WITH_KEEPERS


class StoreWithPoints(CoordinatorStore):
    """The real store, which reports a crash point before and after each script, and after each blob."""

    at: Callable[[str], None] = staticmethod(lambda point: None)

    def scripts(
        self,
        calls: Sequence[Call],
        first: Sequence[Command] = (),
        then: Sequence[Command] = (),
        moved: Moved = ignore_moved,
    ) -> list[Any]:
        """Send the commands one by one: the real store pipelines them, and a connection may break between any two."""
        for command in first:
            self.redis.execute_command(*command)  # type: ignore[no-untyped-call]
            self.at("between blobs")
        answers = []
        for call in calls:
            self.at(f"before {call[0]}.lua")
            answers += super().scripts([call], (), then, moved)
            self.at(f"after {call[0]}.lua")
        return answers

    def write_blob(self, prefix: str, buffer: BlobBuffer, seconds: int | None = None) -> int:
        chunks = super().write_blob(prefix, buffer, seconds)
        if prefix.startswith(self.keys.model_prefix):
            self.at("between blobs")  # of the model, and of the server optimizer's state
        return chunks

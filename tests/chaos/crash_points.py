"""Where a coordinator may die: the points that `service.py` names, and those around each step of its store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fedqueue.coordinator_store import CoordinatorStore
from fedqueue.store import BlobBuffer

SERVICE = (
    "before dispatch",
    "between dispatch and enqueue",
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

    def script(self, name: str, keys: list[str], args: list[Any], after: Sequence[Sequence[Any]] = ()) -> Any:
        """What would travel with the script goes before it, one by one: a connection may break between any two."""
        for command in after:
            self.redis.execute_command(*command)
            self.at("between blobs")
        self.at(f"before {name}.lua")
        answer = super().script(name, keys, args)
        self.at(f"after {name}.lua")
        return answer

    def write_blob(self, prefix: str, buffer: BlobBuffer, seconds: int | None = None) -> int:
        chunks = super().write_blob(prefix, buffer, seconds)
        if prefix.startswith(self.keys.model_prefix):
            self.at("between blobs")  # of the model, and of the server optimizer's state
        return chunks

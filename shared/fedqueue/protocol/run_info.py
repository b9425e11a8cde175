"""What Redis stores about a run as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RunInfo:
    """A snapshot of a run: its description, its newest version and its leader."""

    run: str
    state: str  # "running" or "ended"
    config: dict[str, Any]
    manifest: bytes
    version: int
    totals: dict[str, Any]
    stopped_because: str
    epoch: int
    leader: str
    """The leader's owner name; empty while no coordinator leads."""
    descriptor: bytes = b""
    """The signed `RunDescriptor`; empty in an unsigned run."""
    config_digest: str = ""
    """SHA-256 of the configuration's text, in hex."""
    failed: bool = False
    """Whether the run has ended as failed."""

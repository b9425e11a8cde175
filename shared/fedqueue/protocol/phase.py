"""Phases of an attempt, which its worker reports with each heartbeat."""

from __future__ import annotations

from enum import StrEnum


class Phase(StrEnum):
    """What an attempt does."""

    FETCHING = "fetching"
    """It downloads its base version."""
    TRAINING = "training"
    """It trains, or encodes its update."""
    SENDING = "sending"
    """It uploads its update."""

"""When a version is to be measured: by versions, by time, and never two at once."""

from __future__ import annotations

from fedqueue.config.loading import EvaluationConfig


class EvaluationSchedule:
    """`enabled` is false where the task has nothing to measure with."""

    def __init__(self, config: EvaluationConfig, enabled: bool) -> None:
        self._config, self._enabled = config, enabled
        self._running = False
        self._last = (-1, 0.0)  # version, time

    def begin_if_due(self, version: int, now: float) -> bool:
        """Whether `version` is to be measured now; if so, it is the one that is being measured."""
        last, at = self._last
        due = (self._config.every and (last < 0 or version >= last + self._config.every)) or (
            self._config.seconds and version > last and now >= at + self._config.seconds
        )
        if not (due and self._enabled) or self._running:
            return False
        self._running = True
        self._last = (version, now)
        return True

    def finished(self) -> None:
        self._running = False

    def next_deadline(self, version: int) -> float | None:
        """When a measurement by time falls due; None where none does."""
        wants = self._enabled and not self._running and version > self._last[0]
        return self._last[1] + self._config.seconds if self._config.seconds and wants else None

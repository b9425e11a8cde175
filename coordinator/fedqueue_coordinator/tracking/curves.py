"""The numbers that every tracker shows of a run, by the names that it shows them under."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from fedqueue_coordinator.tracking.hooks import RunHooks, RunProgress, RunStart

ALL_SHOWN = 1000
"""The versions below this are all shown; from there to its double every second one, and so on."""


class CurveTracker(RunHooks):
    """Hooks that write numbers over versions; a subclass says where to.

    The versions that are shown grow with the logarithm of their number, so that the curves of a long run stay quick to
    read, and a run of many versions in a second is not slowed down by writing them. The last version is shown at the
    end. Evaluations are all shown.
    """

    one_axis: ClassVar[bool] = True
    """Whether a curve has one axis, so that metrics over updates need a curve of their own."""
    _shown = RunProgress()
    _waiting: tuple[Mapping[str, Any], RunProgress] | None = None

    def write(self, numbers: Mapping[str, float], now: RunProgress, step: int) -> None:
        """Write the numbers at `now`, with `step` on the axis of a curve."""
        raise NotImplementedError

    def on_start(self, run: RunStart) -> None:
        """Begin at the present progress."""
        self._shown = self.progress

    def on_version(self, record: Mapping[str, Any]) -> None:
        """Write the numbers of a version, if it is one that is shown."""
        self._waiting = record, self.progress
        if is_shown(self.progress.version):
            self.write_waiting()

    def on_evaluation(self, version: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics over versions, and over updates."""
        measured, now = {f"central/{name}": float(value) for name, value in metrics.items()}, self.progress
        self.write(measured, now, version)
        if self.one_axis:
            self.write({f"{name}_by_updates": value for name, value in measured.items()}, now, now.updates)

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """Write the numbers of the last version, and the last counts of rejections."""
        self.write_waiting()
        self.write(rejections(self.progress), self.progress, self.progress.version)

    def write_waiting(self) -> None:
        """Write the numbers of the newest version, unless they are written."""
        if self._waiting:
            (record, now), self._waiting = self._waiting, None
            self.write(version_numbers(record, self._shown, now), now, now.version)
            self._shown = now


def is_shown(version: int) -> bool:
    """Whether a version is shown before it is known to be the last.

    >>> [sum(map(is_shown, range(1, count + 1))) for count in (1000, 2000, 4000, 8000, 1_000_000)]
    [1000, 1500, 2000, 2500, 5976]
    """
    return version % (1 << (version // ALL_SHOWN).bit_length()) == 0


def version_numbers(record: Mapping[str, Any], before: RunProgress, now: RunProgress) -> dict[str, float]:
    """Describe a version by its ledger record; the rate is that since `before`, the version that was shown last.

    `privacy/…` are the numbers that the record has under `privacy`, such as the ε that was spent.
    """
    merged = record["merged"]
    scalars = {"run/updates": float(now.updates)}
    if now.seconds > before.seconds:
        scalars["run/versions_per_second"] = (now.version - before.version) / (now.seconds - before.seconds)
    if merged:
        scalars["buffer/staleness_mean"] = sum(line["staleness"] for line in merged) / len(merged)
        scalars["buffer/clients"] = float(len({line["client"] for line in merged}))
    spent = record.get("privacy")
    if isinstance(spent, Mapping):
        scalars |= {f"privacy/{name}": float(value) for name, value in spent.items() if isinstance(value, int | float)}
    return scalars | rejections(now)


def rejections(now: RunProgress) -> dict[str, float]:
    """The rejected updates so far, by reason."""
    return {f"rejected/{reason}": float(count) for reason, count in now.rejected.items()}


def parameters(config: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """The configuration as keys with their sections, such as `training.batch_size`, and plain values."""
    for name, value in config.items():
        key = f"{above}.{name}" if above else name
        if isinstance(value, Mapping):
            yield from parameters(value, key)
        else:
            yield key, value

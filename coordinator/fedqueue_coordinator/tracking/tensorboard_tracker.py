"""Writes a run as event files of TensorBoard."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedqueue.config.trackers import TensorBoardConfig
from fedqueue_coordinator.tracking.curves import CurveTracker, parameters
from fedqueue_coordinator.tracking.hooks import RunProgress, RunStart

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FLUSH_SECONDS = 10
"""How old what is not yet on the disk may be."""


class TensorBoardTracker(CurveTracker):
    """Writes to FOLDER/RUN/TIME-OF-THE-START; a run that continues is written to its newest folder.

    The step is the version, and in the curves `…_by_updates` the number of merged updates. The wall time is the run's.
    """

    def __init__(self, settings: TensorBoardConfig) -> None:
        self._folder = Path(settings.folder)
        self._writer: SummaryWriter
        self._zero = 0.0

    def on_start(self, run: RunStart) -> None:
        """Open the event file, and write the configuration as a table."""
        from torch.utils.tensorboard import SummaryWriter  # imports torch

        super().on_start(run)
        self._zero = run.started_at
        folder = _event_folder(self._folder / run.name, run)
        self._writer = SummaryWriter(str(folder), flush_secs=FLUSH_SECONDS)
        rows = "\n".join(f"| {key} | `{value}` |" for key, value in parameters(run.config))
        self._writer.add_text("configuration", f"| key | value |\n|---|---|\n{rows}", run.version)

    def write(self, numbers: Mapping[str, float], now: RunProgress, step: int) -> None:
        """As `CurveTracker.write`."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step, self._zero + now.seconds)

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """Write the last numbers and why the run stopped, and close the file."""
        super().on_end(summary)
        self._writer.add_text("stopped_because", summary["stopped_because"], self.progress.version)
        self._writer.close()


def _event_folder(folder: Path, run: RunStart) -> Path:
    """Return a new folder in `folder`, or the newest one of a run that continues; TensorBoard shows it as one run."""
    earlier = sorted(path for path in folder.glob("*") if path.is_dir())
    if run.version and earlier:
        return earlier[-1]
    name = time.strftime("%Y-%m-%d_%H-%M-%S")
    number = sum(path.name.startswith(name) for path in earlier)
    return folder / (f"{name}_{number + 1}" if number else name)

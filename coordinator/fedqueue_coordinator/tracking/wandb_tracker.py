"""Writes a run for Weights & Biases: into files for `wandb sync`, or to its server."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedqueue.config.trackers import WandbConfig
from fedqueue.errors import ConfigurationError
from fedqueue_coordinator.tracking.curves import CurveTracker
from fedqueue_coordinator.tracking.hooks import RunProgress, RunStart

if TYPE_CHECKING:
    import wandb

ARTIFACTS = ("summary.json", "report.png", "model.safetensors")


class WandbTracker(CurveTracker):
    """Makes a run in a project; a run of fedqueue that continues has the id of its newest run in the same folder.

    Each line has `version`, `updates` and `seconds`, so that each of them may be the axis of a chart.
    """

    one_axis = False

    def __init__(self, settings: WandbConfig) -> None:
        self._settings = settings
        self._run: wandb.Run

    def on_start(self, run: RunStart) -> None:
        """Make the run, with the configuration."""
        import wandb  # takes a second

        super().on_start(run)
        if self._settings.mode == "online" and not wandb.login(prompt=False):  # else it would ask on the terminal
            hint = "run `wandb login`, set WANDB_API_KEY, or write mode = 'offline'"
            raise ConfigurationError("trackers.wandb.mode", "online", "wandb knows no account on this machine", hint)
        folder = Path(self._settings.folder)
        folder.mkdir(parents=True, exist_ok=True)
        # What the terminal shows, the code, the machine and its load stay here.
        quiet = wandb.Settings(
            silent=True, console="off", disable_git=True, disable_code=True, x_disable_meta=True, x_disable_stats=True,
            x_disable_machine_info=True,
        )  # fmt: skip
        self._run = wandb.init(
            project=self._settings.project,
            name=run.name,
            id=_run_id(folder, run),
            dir=str(folder),
            mode=self._settings.mode,
            resume="allow" if self._settings.mode == "online" else None,
            config=dict(run.config),
            settings=quiet,
            reinit="create_new",
        )
        self._run.define_metric("*", step_metric="version")

    def write(self, numbers: Mapping[str, float], now: RunProgress, step: int) -> None:
        """As `CurveTracker.write`."""
        if numbers:
            self._run.log({"version": now.version, "updates": now.updates, "seconds": now.seconds, **numbers})

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """Write the last numbers and the files of the run, and finish."""
        import wandb

        super().on_end(summary)
        self._run.summary["stopped_because"] = summary["stopped_because"]
        if summary["folder"]:
            results = wandb.Artifact(f"{summary['run']}-results", type="results")
            for name in ARTIFACTS:
                if (path := Path(summary["folder"], name)).exists():
                    results.add_file(str(path), policy="immutable")
            self._run.log_artifact(results)
        self._run.finish(exit_code=0 if summary["complete"] else 1)


def _run_id(folder: Path, run: RunStart) -> str:
    """Return a new id, or that of the newest run of this name in `folder` if the run continues."""
    if run.version:
        begins = [(path, path.name.partition(f"-{run.name}.")) for path in folder.glob(f"wandb/*run-*-{run.name}.*")]
        if begins:
            _, (_, _, token) = max(begins, key=lambda found: found[0].stat().st_mtime)
            return f"{run.name}.{token}"
    return f"{run.name}.{secrets.token_hex(4)}"

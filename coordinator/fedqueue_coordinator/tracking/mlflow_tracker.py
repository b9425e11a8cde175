"""Writes a run to MLflow: to a folder of its own format, to a database, or to a tracking server."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fedqueue.config.trackers import MlflowConfig
from fedqueue_coordinator.tracking.curves import CurveTracker, parameters
from fedqueue_coordinator.tracking.hooks import RunProgress, RunStart

if TYPE_CHECKING:
    from mlflow import MlflowClient

RUN_TAG = "fedqueue.run"
LONGEST_VALUE = 500
"""Characters of a parameter's value, which every store of MLflow takes."""
MOST_PARAMETERS = 100
"""Parameters of one request, as MLflow limits them."""
ARTIFACTS = ("summary.json", "report.png", "model.safetensors")
_NOT_ALLOWED = re.compile(r"[^\w\-. /]")

T = TypeVar("T")


class MlflowTracker(CurveTracker):
    """Makes a run in an experiment; a run of fedqueue that continues is written to its newest run there.

    The step is the version, and in the curves `…_by_updates` the number of merged updates. The timestamp is the run's.
    """

    def __init__(self, settings: MlflowConfig) -> None:
        self._settings = settings
        self._client: MlflowClient
        self._run = ""
        self._zero = 0.0

    def on_start(self, run: RunStart) -> None:
        """Find or make the experiment and the run, and write the configuration as its parameters."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        if "://" not in self._settings.uri:  # MLflow 3 refuses a folder without this
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient  # takes seconds
        from mlflow.entities import Param

        super().on_start(run)
        self._zero = run.started_at
        self._client = MlflowClient(tracking_uri=self._settings.uri)
        experiment = self._client.get_experiment_by_name(self._settings.experiment)
        of = experiment.experiment_id if experiment else self._client.create_experiment(self._settings.experiment)
        if run.version:
            earlier = self._client.search_runs(
                [of], f"tags.`{RUN_TAG}` = '{run.name}'", max_results=1, order_by=["attributes.start_time DESC"]
            )
            if earlier:
                self._run = earlier[0].info.run_id
                self._client.update_run(self._run, status="RUNNING")
                return
        began = round(self._zero * 1000)
        self._run = self._client.create_run(of, began, {RUN_TAG: run.name}, run.name).info.run_id
        params = [Param(_name(key), str(value)[:LONGEST_VALUE]) for key, value in parameters(run.config)]
        for some in _portions(params, MOST_PARAMETERS):
            self._client.log_batch(self._run, params=some)

    def write(self, numbers: Mapping[str, float], now: RunProgress, step: int) -> None:
        """As `CurveTracker.write`."""
        from mlflow.entities import Metric

        at = round((self._zero + now.seconds) * 1000)
        if numbers:
            self._client.log_batch(self._run, [Metric(_name(name), value, at, step) for name, value in numbers.items()])

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """Write the last numbers, the files of the run as artifacts, and how the run ended."""
        super().on_end(summary)
        self._client.set_tag(self._run, "fedqueue.stopped_because", summary["stopped_because"])
        for name in ARTIFACTS if summary["folder"] else ():
            if (path := Path(summary["folder"], name)).exists():
                self._client.log_artifact(self._run, str(path))
        ended = round((self._zero + self.progress.seconds) * 1000)
        self._client.set_terminated(self._run, "FINISHED" if summary["complete"] else "FAILED", ended)


def _name(text: str) -> str:
    """`text` without the characters that MLflow refuses in a name."""
    return _NOT_ALLOWED.sub("_", text)


def _portions(items: Iterable[T], size: int) -> Iterator[list[T]]:
    whole = list(items)
    return (whole[start : start + size] for start in range(0, len(whole), size))

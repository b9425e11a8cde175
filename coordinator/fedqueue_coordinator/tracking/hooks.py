"""What follows a run from outside: the class that a user subclasses, and the data that its methods get."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RunStart:
    """The run that `RunHooks.on_start` is called for.

    >>> import fedqueue
    >>> class Announcer(fedqueue.RunHooks):
    ...     def on_start(self, run: fedqueue.RunStart) -> None:
    ...         print(run.name, run.strategy, run.config["training"]["batch_size"])
    >>> Announcer().on_start(fedqueue.RunStart("digits", "fedbuff", 0, ("a", "b"), {"training": {"batch_size": 32}}))
    digits fedbuff 32
    """

    name: str
    """The key `name` of its configuration."""
    strategy: str
    """The key `aggregation.strategy`."""
    seed: int
    clients: tuple[str, ...]
    """The configured clients."""
    config: Mapping[str, Any]
    """The configuration as tables of plain values, without what each machine has of its own, such as `redis.url`."""
    version: int = 0
    """The newest version: 0, or that from which the run continues."""
    started_at: float = 0.0
    """When the run's clock was at zero, in seconds since 1970."""


@dataclass(frozen=True)
class RunProgress:
    """Where a run was at the moment that a hook is told of: `RunHooks.progress`.

    >>> import fedqueue
    >>> class Clock(fedqueue.RunHooks):
    ...     def on_version(self, record):
    ...         print(f"{self.progress.updates} updates after {self.progress.seconds:.0f} s")
    >>> clock = Clock()
    >>> clock.progress = fedqueue.RunProgress(version=2, updates=8, seconds=3.0)
    >>> clock.on_version({"version": 2})
    8 updates after 3 s
    """

    version: int = 0
    """The newest version, or for `on_evaluation` the version that was evaluated."""
    updates: int = 0
    """The updates that were merged up to that version."""
    seconds: float = 0.0
    """Seconds of the run's clock; in a simulation, virtual seconds."""
    rejected: Mapping[str, int] = field(default_factory=dict)
    """Reason → updates that were rejected since `on_start`."""


class RunHooks:
    """Follows a run: subclass it, and override the methods that you need.

    An instance is an argument of `fedqueue.run` and `fedqueue.simulate`, or its class is named in the configuration
    (`trackers.use = ["hooks.py:Printer"]`). All calls of one run come from one thread, in the order of the run, and
    not from the thread that merges. No call holds up the run: one that raises is reported, and the hooks get no further
    calls; where calls take longer than the run, some of `on_version`, `on_rejection` and `on_client` are left out, and
    never `on_evaluation` and `on_end`.

    >>> import torch
    >>> import fedqueue
    >>> class Printer(fedqueue.RunHooks):
    ...     def on_start(self, run):
    ...         print(run.name, "with", len(run.clients), "clients")
    ...     def on_version(self, record):
    ...         print("version", record["version"], "of", len(record["merged"]), "updates")
    ...     def on_end(self, summary):
    ...         print(summary["stopped_because"], self.progress.updates)
    >>> class Line(fedqueue.Task):
    ...     def model(self):
    ...         return torch.nn.Linear(1, 1)
    ...     def train_data(self, client):
    ...         x = torch.linspace(client.partition, client.partition + 1, 64).unsqueeze(1)
    ...         return torch.utils.data.TensorDataset(x, 2 * x + 1)
    ...     def loss(self, model, batch):
    ...         return torch.nn.functional.mse_loss(model(batch[0]), batch[1])
    >>> result = fedqueue.simulate(Line, clients=4, aggregation={"buffer_size": 3}, versions=2, hooks=[Printer()])
    Line with 4 clients
    version 1 of 3 updates
    version 2 of 3 updates
    versions: 2 of 2 6
    """

    progress: RunProgress = RunProgress()
    """Where the run was at the moment that the present call is about. Set before each call."""

    def on_start(self, run: RunStart) -> None:
        """The run begins, or continues from an earlier version."""

    def on_version(self, record: Mapping[str, Any]) -> None:
        """A version was made: its ledger record, with `version`, `seconds`, and in `merged` a map for each update."""

    def on_evaluation(self, version: int, metrics: Mapping[str, float]) -> None:
        """The task's central evaluation of a version has finished. One that raised is in the ledger only."""

    def on_rejection(self, record: Mapping[str, Any]) -> None:
        """An update was rejected: its ledger record, with `client`, `reason`, `detail`, `version` and `seconds`."""

    def on_client(self, record: Mapping[str, Any]) -> None:
        """A client did not deliver: the ledger record of a job without an update, or of a client without data.

        `kind` is `abandoned` or `unavailable`; `client`, `error`, `version` and `seconds` say which and why. An
        abandoned job has a `reason` too.
        """

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """The run has ended, or its coordinator has: what `summary.json` contains, and its `folder`.

        `folder` is the path of the run's files as text, or None for a run without any. `complete` says whether the run
        came to its end, and `stopped_because` why it stopped. A coordinator that leaves its run unfinished passes these
        and `run`, `versions`, `updates_merged` and `seconds` only.
        """

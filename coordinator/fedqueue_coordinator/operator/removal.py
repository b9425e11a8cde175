"""`fedqueue remove`: deletes a run from Redis and from the folder of its results, after a question.

What fedqueue has not made stays, and so do egress logs and the keys that `fedqueue enroll` makes.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import redis

from fedqueue.errors import ConfigurationError, RunExists, RunNotFound
from fedqueue.transport.store import list_runs
from fedqueue_coordinator.operator.run_folder import (
    LAUNCH_CONFIG_FILENAME,
    LAUNCH_FILENAME,
    LOG_FILENAME,
    SCRIPT_COPY,
    UNFINISHED,
    URL_FILE,
    RunFolder,
)
from fedqueue_coordinator.operator.runs import RUNS_FOLDER, reachable_servers
from fedqueue_coordinator.service.coordinator_store import CoordinatorStore, new_owner

LEASE_SECONDS = 60.0
"""The leader lease while a run is deleted."""
FILENAMES = (
    "summary.json", "model.safetensors", "ledger.jsonl", "report.png", "comparison.md", "comparison.json",
    "comparison.png", "replay", UNFINISHED, LOG_FILENAME, LAUNCH_CONFIG_FILENAME, SCRIPT_COPY, URL_FILE,
    LAUNCH_FILENAME,
)  # fmt: skip
"""What fedqueue writes into a folder of results, besides logs; the marker of the folder is the last."""
LOG_PATTERNS = ("worker-*.log", "worker-*.log.1", "workers.log")


@dataclass(frozen=True)
class Removal:
    """What `remove` will delete: the run on some servers, and files of a folder."""

    run: str
    stores: Sequence[CoordinatorStore]
    folder: RunFolder
    files: Sequence[Path]

    def describe(self) -> Iterator[str]:
        """Say in one line for each place what will be deleted, and what stays in the folder."""
        for store in self.stores:
            info = store.info()
            state = f"ended: {info.stopped_because}" if store.has_ended() else "not ended"
            yield f"in Redis at {_address(store.redis)}: {len(store.all_keys())} keys, version {info.version} ({state})"
        if self.files:
            names = [f"{path.relative_to(self.folder.path)}{'/' if path.is_dir() else ''}" for path in self.files]
            yield f"in {self.folder.path}: {', '.join(names)}"
        if self.files and (kept := self._kept()):
            yield f"kept in {self.folder.path}: {', '.join(kept)}"

    def _kept(self) -> list[str]:
        deleted = {path.relative_to(self.folder.path).parts for path in self.files}
        kept = [path for path in sorted(self.folder.path.iterdir()) if (path.name,) not in deleted]
        logs = {path.name for path in self.files if path.parent == self.folder.logs}
        if self.folder.logs.is_dir() and {path.name for path in self.folder.logs.iterdir()} <= logs:
            kept.remove(self.folder.logs)
        return [f"{path.name}{'/' if path.is_dir() else ''}" for path in kept]

    def carry_out(self) -> None:
        """Delete all of it; raises RunExists, before anything is deleted, if a coordinator leads the run."""
        with contextlib.ExitStack() as stack:
            if self.files:
                stack.enter_context(self.folder.locked())
            for store in self.stores:
                if not store.lead(LEASE_SECONDS):
                    hint = "stop it first, or wait for the end of its lease (dispatch.leader_lease_seconds)"
                    raise RunExists(self.run, "is led by a coordinator", hint)
                stack.callback(store.release_lead)
            for store in self.stores:
                store.clear()
            for path in self.files:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
            for empty in (self.folder.logs, self.folder.path):
                with contextlib.suppress(OSError):  # absent, or it has files that stay
                    empty.rmdir()
        for store in self.stores:
            store.forget_leader()


def plan_removal(run: str, url: str, output: Path | None) -> Removal:
    """Find the run `run` on the servers (see `reachable_servers`) and in the folder `output`, by default runs/NAME.

    Raises RunNotFound if it is in neither place, RunExists while a coordinator leads it or a process writes to its
    folder, and ConfigurationError for an `output` with another run, or without one.
    """
    stores = [
        CoordinatorStore(client, run, new_owner()) for client in reachable_servers(url) if run in list_runs(client)
    ]
    folder = RunFolder(output or RUNS_FOLDER / run)
    launch = folder.launch()
    if output and (launch is None or launch.run != run):
        problem = f"has run {launch.run!r}, not {run!r}" if launch else f"has no {LAUNCH_FILENAME} of a run"
        raise ConfigurationError("--output", str(output), problem, f"pass the folder with the results of {run}")
    files = _files(folder) if launch and launch.run == run else []
    if not stores and not files:
        raise RunNotFound(run)
    for store in stores:
        _require_no_leader(store)
    if files:
        with folder.locked():
            pass
    return Removal(run, stores, folder, files)


def _address(client: redis.Redis) -> str:
    options = client.connection_pool.connection_kwargs
    return options.get("path") or f"{options.get('host', 'the primary of the sentinels')}:{options.get('port', '')}"


def _files(folder: RunFolder) -> list[Path]:
    logs = [path for pattern in LOG_PATTERNS for path in sorted(folder.logs.glob(pattern))]
    return logs + [folder.path / name for name in FILENAMES if (folder.path / name).exists()]


def _require_no_leader(store: CoordinatorStore) -> None:
    if store.is_led():
        raise RunExists(store.run, "is led by a coordinator", "stop that coordinator first")

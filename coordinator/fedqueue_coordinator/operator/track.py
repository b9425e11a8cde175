"""`fedqueue track`: tells hooks the story of a run from its ledger, in Redis or in the folder of its results.

Hooks are called on this thread, one record after another: nothing but this process waits for them. Nothing here writes
to Redis.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog
import typer
from pydantic import ValidationError

from fedqueue.config.entrypoint import is_entrypoint
from fedqueue.config.loading import load_config
from fedqueue.config.sections import Section
from fedqueue.config.trackers import BUILT_IN, MlflowConfig, TensorBoardConfig, WandbConfig
from fedqueue.errors import ConfigurationError, FedqueueError, RunNotFound, ServerUnavailable, StoreError
from fedqueue.exception_text import exception_with_place, one_line
from fedqueue.protocol.run_info import RunInfo
from fedqueue.transport.ledger_tail import LedgerReplaced, LedgerTail
from fedqueue.transport.retry import RedisRetry
from fedqueue.transport.store import Store, list_runs
from fedqueue_coordinator.core.run_summary import summarize
from fedqueue_coordinator.operator.run_folder import INTERRUPT, LAUNCH_FILENAME, UNFINISHED, URL_FILE, Launch
from fedqueue_coordinator.operator.runs import (
    RUNS_FOLDER,
    finished_runs,
    reachable_servers,
    read_ledger,
    read_summary,
)
from fedqueue_coordinator.tracking.feed import run_start
from fedqueue_coordinator.tracking.hooks import RunHooks, RunStart
from fedqueue_coordinator.tracking.narrator import HookCall, Narrator
from fedqueue_coordinator.tracking.registry import make_built_in, make_own

log = structlog.get_logger("fedqueue.coordinator")

LOOK_SECONDS = 1.0
"""Time between two looks at the ledger of a run that goes on."""
LOOKS_FOR_RESULTS = 60
"""Looks for the results of a local run whose server has ended."""
SETTINGS: dict[str, tuple[type[Section], str]] = {
    "tensorboard": (TensorBoardConfig, "folder"),
    "mlflow": (MlflowConfig, "uri"),
    "wandb": (WandbConfig, "project"),
}
"""Tracker → its section, and the key that stands behind its name in an option --to."""


def track_run(run: str, url: str, to: Sequence[str], online: bool, sleep: Callable[[float], None] = time.sleep) -> bool:
    """Tell the trackers `to` what the ledger of `run` has and gets; returns whether none of them failed.

    `run` is the folder of its results, or the name of a run in Redis or under runs/. `sleep` waits between two looks.
    Raises RunNotFound, ConfigurationError for a tracker that there is not, and MissingExtra.
    """
    audience = _Audience({text: _tracker(text, online) for text in to})
    folder = Path(run) if Path(run, "summary.json").is_file() else None
    store = None if folder else _store(run, url)
    if store:
        _follow(store, audience, sleep)
    elif folder := folder or finished_runs().get(run):
        _read(folder, audience)
    else:
        raise RunNotFound(run)
    return not audience.failed


def _tracker(text: str, online: bool) -> RunHooks:
    """Make the hooks that an option --to names."""
    name, _, where = text.partition(":")
    if name not in SETTINGS:
        near = difflib.get_close_matches(name, BUILT_IN, n=1)
        if is_entrypoint(text) and not near:
            return make_own(text, {}, Path.cwd(), "--to")
        forms = f"write {', '.join(f'{known}:…' for known in BUILT_IN)} or path/to/file.py:Class"
        hint = f"did you mean {near[0]!r}?" if near else forms
        raise ConfigurationError("--to", text, "is no tracker", hint)
    section, key = SETTINGS[name]
    values = {**({key: where} if where else {}), **({"mode": "online"} if online and name == "wandb" else {})}
    try:
        return make_built_in(name, section.model_validate(values))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise ConfigurationError("--to", name, problem["msg"], problem.get("ctx", {}).get("hint", "")) from None


def _store(run: str, url: str) -> Store | None:
    """The run in the first server that has it."""
    return next((Store(client, run) for client in reachable_servers(url) if run in list_runs(client)), None)


class _Audience:
    """The hooks that hear the story; those that raise are left out."""

    def __init__(self, hooks: Mapping[str, RunHooks]) -> None:
        self._hooks = dict(hooks)
        self._narrator = Narrator()
        self._last: Mapping[str, Any] | None = None
        self.heard = 0
        """Records of the ledger."""
        self.failed = False

    def start(self, run: RunStart) -> None:
        self._tell(self._narrator.start(run))

    def hear(self, records: Sequence[Mapping[str, Any]], silently: bool = False) -> None:
        """Tell the hooks of the records; `silently`: they know of them already."""
        for record in records:
            self.heard, self._last = self.heard + 1, record
            if (call := self._narrator.tell(record)) and not silently:
                self._tell(call)

    def restart(self) -> None:
        """Count from the beginning of a ledger that is read again."""
        self._narrator, self.heard, self._last = Narrator(), 0, None

    def knows_the_beginning_of(self, ledger: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the last record that was heard is where it would be in `ledger`."""
        if self._last is None or len(ledger) < self.heard:
            return False
        there = ledger[self.heard - 1]
        return all(there.get(name) == self._last.get(name) for name in ("kind", "version", "seconds", "job"))

    def end(self, summary: Mapping[str, Any]) -> None:
        self._tell(self._narrator.end(summary))
        progress, where = self._narrator.progress, ", ".join(self._hooks)
        if where:
            typer.echo(f"{summary['run']}: {progress.version} versions of {progress.updates} updates are in {where}")

    def leave(self, run: str, why: str) -> None:
        """End the story of a run that is no longer followed."""
        progress = self._narrator.progress
        self._tell(self._narrator.end({
            "run": run, "complete": False, "stopped_because": why, "versions": progress.version,
            "updates_merged": progress.updates, "seconds": progress.seconds, "folder": None,
        }))  # fmt: skip

    def _tell(self, call: HookCall) -> None:
        for name, hooks in list(self._hooks.items()):
            try:
                call.make(hooks)
            except Exception as error:
                del self._hooks[name]
                self.failed = True
                why = exception_with_place(error)
                log.error("tracker failed and is left out", tracker=name, call=call.method, error=why)
        if not self._hooks:
            raise FedqueueError("no tracker is left to show the run")


# A run in Redis


def _follow(store: Store, audience: _Audience, sleep: Callable[[float], None]) -> None:
    """Read the ledger on until the run has ended; that of a local run ends in the folder of its results."""
    address = RUNS_FOLDER / store.run / URL_FILE
    local = address.exists()
    retry, tail = RedisRetry(lambda: local and not address.exists(), sleep), LedgerTail(store)
    info = retry.call(store.info)
    audience.start(_start(info.run, info.config, time.time() - info.totals.get("seconds", 0.0)))
    if info.state == "running":
        typer.echo(f"following {info.run}, which is at version {info.version}; Ctrl-C stops following", err=True)
    try:
        while True:
            info = retry.call(store.info)
            try:
                records = retry.call(tail.read)
            except LedgerReplaced:
                tail = _behind_the_epoch(LedgerTail(store), audience, retry, info.epoch)
                continue
            audience.hear(records)
            if not records:
                if info.state == "ended":
                    break
                sleep(LOOK_SECONDS)
        audience.end(retry.call(lambda: _summary(store, info)))
    except BaseException as error:
        if local and not address.exists() and isinstance(error, ServerUnavailable | RunNotFound):
            _read_on(RUNS_FOLDER / store.run, audience, sleep)
            return
        with contextlib.suppress(FedqueueError):  # no tracker is left
            audience.leave(store.run, one_line(str(error) or "no longer followed"))
        raise


def _read_on(folder: Path, audience: _Audience, sleep: Callable[[float], None]) -> None:
    """Read the rest of a local run, whose server has ended with it, from the results that it leaves in `folder`."""
    for _ in range(LOOKS_FOR_RESULTS):
        for results in (folder, folder / UNFINISHED):
            with contextlib.suppress(StoreError):  # not there yet, or not as a whole
                summary, ledger = read_summary(results, "run", "versions", "seconds"), read_ledger(results)
                whole = summary["versions"] == sum(record["kind"] == "version" for record in ledger)
                if whole and audience.knows_the_beginning_of(ledger):
                    audience.hear([_with_numbers(record) for record in ledger[audience.heard :]])
                    audience.end({**summary, "folder": str(results)})
                    return
        sleep(LOOK_SECONDS)
    why = "the server of the local run has ended, and the run has left no results"
    audience.leave(folder.name, why)
    raise StoreError(f"{why}: see {folder}, and continue it with `fedqueue run --resume {folder}`")


def _behind_the_epoch(tail: LedgerTail, audience: _Audience, retry: RedisRetry, epoch: int) -> LedgerTail:
    """Read what the hooks know of a ledger that was written back from a checkpoint; raises LedgerReplaced for another.

    The record of the new epoch follows on what they know.
    """
    audience.restart()
    while records := retry.call(lambda: tail.read(1)):
        audience.hear(records, silently=True)
        if records[0]["kind"] == "epoch" and records[0]["epoch"] == epoch:
            return tail
    raise LedgerReplaced("the run was deleted, and its ledger is gone or is that of another run of the same name")


def _start(run: str, config: Mapping[str, Any], started_at: float) -> RunStart:
    """Describe a run by its configuration as it is in Redis, which may be of another version of fedqueue."""
    clients = config.get("clients", {})
    names = clients.get("names") or [f"client-{number}" for number in range(clients.get("count", 0))]
    strategy = config.get("aggregation", {}).get("strategy", "")
    return RunStart(run, strategy, config.get("seed", 0), tuple(names), config, 0, started_at)


def _summary(store: Store, info: RunInfo) -> dict[str, Any]:
    """What summary.json of the run contains, as far as Redis has it."""
    start = _start(info.run, info.config, 0.0)
    ledger, registered = store.ledger(), store.registrations()
    summary = summarize(
        info.run, start.strategy, start.seed, info.stopped_because, ledger, store.refused(), start.clients, registered
    )
    ended = info.version > 0 and not info.failed and info.stopped_because != INTERRUPT
    return {**summary, "model_version": info.version, "complete": ended, "folder": None}


# A folder of results


def _read(folder: Path, audience: _Audience) -> None:
    """Tell the whole story of a run that has ended."""
    summary = read_summary(folder, "run", "strategy", "seed", "clients", "seconds", "stopped_because", "complete")
    ledger = read_ledger(folder)
    began = (folder / "ledger.jsonl").stat().st_mtime - summary["seconds"]
    audience.start(_start_of_results(folder, summary, began))
    audience.hear([_with_numbers(record) for record in ledger])
    audience.end({**summary, "folder": str(folder)})


def _start_of_results(folder: Path, summary: Mapping[str, Any], began: float) -> RunStart:
    """Describe a run by the configuration that it was started with, or, without that file, by its summary."""
    launch = Launch.read(folder / LAUNCH_FILENAME)
    if launch:
        with contextlib.suppress(FedqueueError):
            return run_start(load_config(launch.config, launch.overrides), 0, began)
    typer.echo(f"{folder}: without its configuration, which is not where it was; the curves are complete", err=True)
    clients, known = tuple(summary["clients"]), {"name": summary["run"], "seed": summary["seed"]}
    return RunStart(summary["run"], summary["strategy"], summary["seed"], clients, known, 0, began)


def _with_numbers(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The record with the numbers that JSON does not have: a metric that is not finite was written as null."""
    if record["kind"] != "evaluation":
        return record
    metrics = {name: math.nan if value is None else value for name, value in record["metrics"].items()}
    return {**record, "metrics": metrics}

"""`fedqueue coordinator`: leads a run on a Redis server, and writes its results."""

from __future__ import annotations

import signal

import redis

from fedqueue.config.schema import Config
from fedqueue.errors import ServerUnavailable
from fedqueue.exit_codes import stop_signals
from fedqueue.observability.endpoint import Endpoint, own_registry
from fedqueue.protocol.coordinator_identity import CoordinatorIdentity
from fedqueue.task import Task
from fedqueue.tracing import start_tracing
from fedqueue_coordinator.core.federation import Federation
from fedqueue_coordinator.core.observer import Observers, RunObserver
from fedqueue_coordinator.core.run_summary import RunResult
from fedqueue_coordinator.operator.local_run import COORDINATOR_SERVICE, clear_ended, deliver_and_print
from fedqueue_coordinator.operator.progress_view import LiveView
from fedqueue_coordinator.operator.run_folder import INTERRUPT, RunFolder
from fedqueue_coordinator.service.coordinator import Coordinator
from fedqueue_coordinator.service.coordinator_store import CoordinatorStore, new_owner
from fedqueue_coordinator.tracking.feed import HookFeed
from fedqueue_coordinator.tracking.registry import make_trackers


def lead_run(
    config: Config,
    task: Task,
    connection: redis.Redis,
    identity: CoordinatorIdentity | None,
    folder: RunFolder,
    quiet: bool,
    standby: bool,
    resume: bool,
    overwrite: bool,
    endpoint: Endpoint | None = None,
) -> RunResult | None:
    """Lead the run to its end and write its results to `folder`, which is opened; None if SIGTERM ended this process.

    With `resume`, a run that has failed or was interrupted is continued from the checkpoint in `folder`; with
    `overwrite`, a run that has ended is deleted from Redis first. Its metrics are served at `endpoint`.
    Raises as `Coordinator.run`, and KeyboardInterrupt if Ctrl-C ended this process while Redis was away.
    """
    observer = RunObserver()
    if endpoint and (registry := own_registry(endpoint)):
        from fedqueue_coordinator.service.run_metrics import RunMetrics

        observer = RunMetrics(config, registry)
    with (
        HookFeed(config, make_trackers(config)) as feed,
        start_tracing(config.opentelemetry.traces, COORDINATOR_SERVICE) as tracing,
    ):
        store = CoordinatorStore(connection, config.name, new_owner(), identity)
        if overwrite:
            clear_ended(store, config.dispatch.leader_lease_seconds)
        view = LiveView(config, quiet)

        def on_progress(federation: Federation, now: float) -> None:
            if notice := folder.note(federation.version, now):
                view.warn(notice)
            view.update(federation, now)

        leading = Coordinator(
            config,
            task,
            store,
            folder.unfinished,
            on_progress,
            reopen=resume,
            owns_folder=folder.reclaim,
            deliver_ended=folder.has_unfinished_run,
            observer=Observers(feed, observer),
            tracing=tracing,
        )
        for signum in stop_signals():
            signal.signal(signum, lambda *_: leading.pause())
        signal.signal(signal.SIGINT, lambda *_: leading.interrupt(INTERRUPT))
        with view:
            try:
                result = leading.run(standby)
            except ServerUnavailable as error:
                if leading.paused:
                    return None
                if not leading.interrupted:
                    raise _with_way_out(error, config.name, folder) from error
                view.warn(str(_with_way_out(error, config.name, folder)))
                raise KeyboardInterrupt from error
        if result is None:
            return None
        return deliver_and_print(view, folder, config, result, leading.checkpoint_saved, feed.end)


def _with_way_out(error: ServerUnavailable, run: str, folder: RunFolder) -> ServerUnavailable:
    """Add to the error how to get what the run has made so far."""
    if not (version := folder.version()):
        return error
    return ServerUnavailable(
        f"{error}; Redis has version {version}: once Redis works again (free space on a full disk), start the "
        f"coordinator again, or `fedqueue export {run} --output FILE`"
    )

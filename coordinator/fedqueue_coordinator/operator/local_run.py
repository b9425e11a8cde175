"""`fedqueue run`: a whole federation on this machine: an embedded server, a coordinator, workers, and any keepers.

The coordinator runs in this process. `run_folder` says what is in the run's folder, and what `--resume` continues.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import redis

from fedqueue.config.privacy import NO_PRIVACY
from fedqueue.config.schema import Config
from fedqueue.errors import MissingExtra, RunExists, ServerUnavailable
from fedqueue.exception_text import one_line
from fedqueue.exit_codes import DONE, FAILED, INTERRUPTED, stop_signals
from fedqueue.logs import warnings_shown
from fedqueue.protocol.key_files import write_private
from fedqueue.tracing import Tracing, start_tracing
from fedqueue.transport.connection import check, connect
from fedqueue_coordinator.core.observer import Observers
from fedqueue_coordinator.operator.embedded_server import EmbeddedServer
from fedqueue_coordinator.operator.local_keepers import NO_PROTECTION, LocalKeepers
from fedqueue_coordinator.operator.local_metrics import LocalMetrics, shared_metrics
from fedqueue_coordinator.operator.local_workers import LocalWorkers
from fedqueue_coordinator.operator.run_folder import INTERRUPT, Launch, RunFolder
from fedqueue_coordinator.tracking.feed import HookFeed
from fedqueue_coordinator.tracking.registry import make_trackers

if TYPE_CHECKING:  # some of these import torch, which `run_federation` does while the workers do
    from fedqueue.task import Task
    from fedqueue_coordinator.core.federation import Federation
    from fedqueue_coordinator.core.run_summary import RunResult
    from fedqueue_coordinator.operator.progress_view import LiveView
    from fedqueue_coordinator.service.coordinator import Coordinator
    from fedqueue_coordinator.service.coordinator_store import CoordinatorStore
    from fedqueue_coordinator.tracking.hooks import RunHooks

COORDINATOR_SERVICE = "fedqueue-coordinator"
"""The service's name in traces."""


def run_local(
    config: Config, launch: Launch, folder: RunFolder, quiet: bool, resume: bool, verbose: bool, overwrite: bool
) -> int:
    """Run `config` as `run_federation` does; returns the exit code."""
    result = run_federation(config, launch, folder, quiet, resume, verbose=verbose, overwrite=overwrite)
    return INTERRUPTED if result is None else exit_code(result)


def run_federation(
    config: Config,
    launch: Launch,
    folder: RunFolder,
    quiet: bool,
    resume: bool,
    task: Task | None = None,
    verbose: bool = False,
    overwrite: bool = False,
    hooks: Sequence[RunHooks] = (),
) -> RunResult | None:
    """Run `config`, which was loaded from `launch.config`, until it ends; None if `_led` returns None.

    `folder` is opened. The coordinator uses `task`, or else the task that `config` names. Writes the results, whose
    folder is in the returned result, and stops the server and the workers on every exit path. With `resume`, continues
    from the server's data or the checkpoint in `folder`; with `overwrite`, a run that has ended is deleted from Redis
    first. With `verbose`, the workers log debug lines too. `hooks` follow the run, and the configuration's trackers.
    """
    with (
        shared_metrics(config) as metrics,
        HookFeed(config, make_trackers(config, hooks)) as feed,
        start_tracing(config.opentelemetry.traces, COORDINATOR_SERVICE) as tracing,
    ):
        return _run(config, launch, folder, quiet, resume, task, verbose, overwrite, feed, tracing, metrics)


def _run(
    config: Config,
    launch: Launch,
    folder: RunFolder,
    quiet: bool,
    resume: bool,
    task: Task | None,
    verbose: bool,
    overwrite: bool,
    feed: HookFeed,
    tracing: Tracing,
    metrics: LocalMetrics | None,
) -> RunResult | None:
    config = config.with_statistics()
    with contextlib.ExitStack() as stack:
        discard_if_not_started = stack.enter_context(contextlib.ExitStack())
        if not resume:
            discard_if_not_started.callback(folder.discard_server)
        url, server = config.redis.address(), None
        if not url:
            server = stack.enter_context(_embedded_server(folder.redis))
            url = server.url
        connection = stack.enter_context(_connected(url, config, folder))
        signed = config.security.signatures == "required"
        if signed:  # with keys that exist for this run only and are deleted with its server
            from fedqueue_coordinator.operator.access.enrolment import KEEPER, SITES, enroll_missing

            enroll_missing(folder.keys, config.secure.keepers, role=KEEPER)
            enroll_missing(folder.keys, config.clients.ids, folder.keys / SITES)
            folder.keep(*folder.keys.rglob("*"))
        # Started before the imports below, so that both import torch at the same time.
        workers = LocalWorkers(
            launch.config, launch.overrides, launch.workers, config.clients.ids, url, folder, verbose
        )
        stack.callback(workers.stop)
        keepers = LocalKeepers(launch.config, launch.overrides, config.secure.keepers, url, folder, verbose)
        stack.callback(keepers.stop)

        from fedqueue.protocol.coordinator_identity import load_coordinator_identity
        from fedqueue.task import load_task, prepare_task
        from fedqueue_coordinator.algorithms.registry import check_algorithms
        from fedqueue_coordinator.operator.progress_view import LiveView
        from fedqueue_coordinator.service.coordinator import Coordinator
        from fedqueue_coordinator.service.coordinator_store import CoordinatorStore, new_owner

        task = task or load_task(config.task.entrypoint, config.task.options, launch.config.parent)
        prepare_task(task, config)
        check_algorithms(config)
        identity = load_coordinator_identity(folder.keys, config.name, revocable=False) if signed else None
        view = stack.enter_context(LiveView(config, quiet))
        stack.enter_context(warnings_shown(view.warn))
        if config.secure.on:
            view.say(NO_PROTECTION)
        progress = _Progress(view, workers, keepers, folder, launch, server)
        store = CoordinatorStore(connection, config.name, new_owner(), identity)
        if overwrite:
            clear_ended(store, config.dispatch.leader_lease_seconds)
        coordinator = Coordinator(
            config,
            task,
            store,
            folder.unfinished,
            progress.update,
            on_wait=progress.wait,
            reopen=resume,
            owns_folder=folder.reclaim,
            deliver_ended=resume,
            observer=Observers(feed, metrics.serve(config)) if metrics else feed,
            tracing=tracing,
        )
        progress.fail = coordinator.fail
        stack.enter_context(_signals(coordinator))
        try:
            result = _led(coordinator, view, folder)
        finally:
            if progress.begun:
                discard_if_not_started.pop_all()
        workers.stop()
        keepers.stop()
    if result is None:
        return None
    return deliver_and_print(view, folder, config, result, coordinator.checkpoint_saved, _shown(feed, view))


def _shown(feed: HookFeed, view: LiveView) -> Callable[[Mapping[str, Any]], None]:
    """End the run for its trackers; what there is to say of them is shown on the console too."""

    def end(summary: Mapping[str, Any]) -> None:
        with warnings_shown(view.warn):
            feed.end(summary)

    return end


def _led(coordinator: Coordinator, view: LiveView, folder: RunFolder) -> RunResult | None:
    """Lead the run to its end; None if interrupted before version 0, or while the server does not answer."""
    try:
        return coordinator.run()
    except ServerUnavailable as error:
        if not coordinator.interrupted:
            raise _with_way_out(error, folder) from error
        view.warn(str(_with_way_out(error, folder)))
        return None


def _dead_end(federation: Federation, workers: LocalWorkers, keepers: LocalKeepers, folder: RunFolder) -> str:
    """Why the run can never go on, as no process but these serves its parties; an empty string if it can."""
    if why := keepers.dead_end():
        return why
    if workers.any_alive():
        return federation.dead_end(workers.lost_clients | federation.unavailable.keys())
    worst = federation.failures.most_frequent
    why = f": {worst.line}" if worst else ""
    return f"every worker process has ended{why}; see the logs in {folder.logs}"


class _Progress:
    """What happens after each round of the coordinator's loop in a local run."""

    def __init__(
        self,
        view: LiveView,
        workers: LocalWorkers,
        keepers: LocalKeepers,
        folder: RunFolder,
        launch: Launch,
        server: EmbeddedServer | None,
    ) -> None:
        self._view, self._workers, self._keepers = view, workers, keepers
        self._folder, self._launch, self._server = folder, launch, server
        self.begun = False
        """Whether the run has begun, or has continued."""
        self.fail: Callable[[str], None]

    def wait(self) -> None:
        """End the run if the coordinator waits for the embedded server, and that has ended."""
        if self._server and self._server.process.poll() is not None:
            self.fail(f"the embedded server has ended; see {self._server.log}")

    def update(self, federation: Federation, now: float) -> None:
        """Show the progress and the workers' messages; end the run if it can never go on."""
        if not self.begun:
            self._folder.continued(self._launch)
            self.begun = True
        if notice := self._folder.note(federation.version, now):
            self._view.warn(notice)
        self._view.update(federation, now)
        for message in (*self._workers.new_messages(), *self._keepers.new_messages()):
            self._view.warn(message)
        if not federation.stopped and (why := _dead_end(federation, self._workers, self._keepers, self._folder)):
            self.fail(why)


def _with_way_out(error: ServerUnavailable, folder: RunFolder) -> ServerUnavailable:
    """Add to the error how to get what the run has made so far."""
    if not (version := folder.version()):
        return error
    return ServerUnavailable(
        f"{error}; version {version} is in {folder.redis}: remove the cause (free space on a full disk), then "
        f"`fedqueue {folder.command_to_resume()}`"
    )


def clear_ended(store: CoordinatorStore, lease_seconds: float) -> None:
    """Delete a run from Redis that has ended; one that has not stays. Raises RunExists while a coordinator leads it."""
    if store.has_ended():
        if not store.lead(lease_seconds):
            raise RunExists(store.run, "is led by another coordinator", "stop that coordinator first")
        store.clear()
        store.release_lead()


def exit_code(result: RunResult) -> int:
    """Return the exit code of a run: 0 done, 1 failed, 130 interrupted."""
    if result.stopped_because == INTERRUPT:
        return INTERRUPTED
    return FAILED if result.failed else DONE


def deliver_and_print(
    view: LiveView,
    folder: RunFolder,
    config: Config,
    result: RunResult,
    checkpoint_saved: bool,
    end: Callable[[Mapping[str, Any]], None],
) -> RunResult:
    """Write the results of a run that has ended, and print them; returns `result` with the folder that has them.

    At last `end` gets what summary.json contains, and `folder`.
    """
    from fedqueue_coordinator.operator.results import deliver_results  # imports torch

    summary, result = deliver_results(folder, config, result, checkpoint_saved)
    assert result.folder is not None
    print_result(view, summary, result.folder, result.failed)
    print_what_is_left(view, folder, result.folder)
    end({**summary, "folder": str(result.folder)})
    return result


def print_result(view: LiveView, summary: dict[str, Any], folder: Path, failed: bool = False) -> None:
    """Print the final metrics, the paths of the result files, which clients contributed nothing, and why the run ended.

    In quiet mode: the clients that failed, and why a run failed.
    """
    from fedqueue_coordinator.core.run_summary import describe_client_privacy, describe_masking
    from fedqueue_coordinator.operator.progress_view import ERROR, WARNING

    metrics = ", ".join(f"{name} {value:.4f}" for name, value in summary["metrics"].items()) or "not evaluated"
    if summary["metrics"] and summary["metrics_version"] != summary["model_version"]:
        metrics += f" (measured at version {summary['metrics_version']})"
    merged = (
        f" after {summary['seconds']:.1f} s: {summary['versions']} versions of {summary['updates_merged']} updates "
        f"from {len(summary['clients'])} clients, mean staleness {summary['staleness']['mean']:.2f}"
    )
    view.say(f"{summary['run']}: {metrics}{merged if summary['versions'] else ', no update was merged'}", "bold")
    if masked := describe_masking(summary):
        view.say(masked)
    if spent := describe_client_privacy(summary):
        view.say(spent)
    if summary.get("privacy", NO_PRIVACY) != NO_PRIVACY:
        view.say(summary["privacy"])
    report = folder / "report.png"
    paths = [f"report: {report}"] if report.exists() else []
    paths += [f"model: {folder / 'model.safetensors'}", f"numbers: {folder / 'summary.json'}"]
    view.say("   ".join(paths))
    if not report.exists():
        view.say(str(MissingExtra("report.png", "matplotlib", "plots")))
    for line, failure in lines_without_update(summary["clients_without_update"]):
        view.say(line, WARNING if failure else "", even_if_quiet=failure)
    why = f"the run failed: {summary['stopped_because']}" if failed else f"stopped by {summary['stopped_because']}"
    view.say(why, ERROR if failed else "", even_if_quiet=failed)


def lines_without_update(reasons: Mapping[str, str]) -> Iterator[tuple[str, bool]]:
    """Say which clients contributed nothing, and why, with a line for each kind of reason.

    `reasons` is client → why. Yields each line, and whether its reason is a failure.
    """
    from fedqueue_coordinator.core.failures import kind_of
    from fedqueue_coordinator.core.run_summary import NO_UPDATE_IN_TIME
    from fedqueue_coordinator.core.waiting import names

    groups: dict[str, list[str]] = {}
    for client, reason in reasons.items():
        groups.setdefault(kind_of(client, reason), []).append(client)
    for clients in groups.values():
        reason = reasons[clients[0]]
        yield f"no update from {names(clients)}: {one_line(reason)}", reason != NO_UPDATE_IN_TIME


def print_what_is_left(view: LiveView, folder: RunFolder, results: Path) -> None:
    """Say which former results were kept, where results are that `folder` did not take, and what can be resumed."""
    lines = []
    if results == folder.unfinished:
        lines.append(f"the results of an earlier run that came to its end are still in {folder.path}")
    elif results != folder.path:
        lines.append(f"{folder.path} cannot be written: the results are in {results}")
    if interrupted := folder.interrupted():
        lines.append(f"the run {interrupted}: continue it with `fedqueue {folder.command_to_resume()}`")
    for line in lines:
        view.warn(line)


@contextlib.contextmanager
def _embedded_server(folder: Path) -> Iterator[EmbeddedServer]:
    server = EmbeddedServer(folder)
    try:
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def _connected(url: str, config: Config, folder: RunFolder) -> Iterator[redis.Redis]:
    """Connect to the run's server, whose address is in `folder.url_file` meanwhile for `fedqueue status`."""
    connection = connect(url, tls=config.redis.tls)
    check(connection, url)
    write_private(folder.url_file, url.encode())  # a URL may contain a password
    folder.keep(folder.url_file)
    try:
        yield connection
    finally:
        if folder.is_own():
            folder.url_file.unlink(missing_ok=True)
            folder.keep(folder.url_file)


@contextlib.contextmanager
def _signals(coordinator: Coordinator) -> Iterator[None]:
    """End the run on Ctrl-C, SIGTERM and SIGHUP, with the results so far."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        coordinator.interrupt(INTERRUPT)

    handled = threading.current_thread() is threading.main_thread()  # no other thread may set a handler
    previous = {s: signal.signal(s, interrupt) for s in stop_signals() if handled}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)

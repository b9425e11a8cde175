"""`fedqueue run`: a whole federation on this machine, with an embedded server, a coordinator and worker processes.

The coordinator runs in this process. `launch.json` in the run's folder records how the run was started, so that
`--resume DIR` can start it again.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from fedqueue.config.schema import Config
from fedqueue.errors import ConfigurationError, MissingExtra, RunExists, ServerUnavailable
from fedqueue.exception_text import one_line
from fedqueue.exit_codes import DONE, FAILED, INTERRUPTED, stop_signals
from fedqueue.logs import warnings_shown
from fedqueue.transport.connection import check, connect
from fedqueue_coordinator.operator.embedded_server import EmbeddedServer
from fedqueue_coordinator.operator.local_workers import EGRESS, KEYS, LOGS, LocalWorkers

if TYPE_CHECKING:  # some of these import torch, which `run_federation` does while the workers do
    import redis

    from fedqueue.task import Task
    from fedqueue_coordinator.core.federation import Federation
    from fedqueue_coordinator.core.run_summary import RunResult
    from fedqueue_coordinator.operator.progress_view import LiveView
    from fedqueue_coordinator.service.coordinator import Coordinator

URL_FILE = "redis.url"
LAUNCH_FILENAME = "launch.json"
INTERRUPT = "interrupted"


@dataclass(frozen=True)
class Launch:
    """How a local run was started."""

    config: Path
    """Absolute path of the configuration file."""
    overrides: Sequence[str]
    """KEY=VALUE texts, in the order given."""
    workers: int
    """Number of worker processes."""


def write_launch(folder: Path, launch: Launch) -> None:
    """Write `launch` to launch.json in `folder`."""
    record = {"config": str(launch.config), "overrides": list(launch.overrides), "workers": launch.workers}
    (folder / LAUNCH_FILENAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_launch(folder: Path, overrides: Sequence[str]) -> Launch:
    """Read the launch of the run in `folder` and append `overrides`.

    Raises ConfigurationError if `folder` contains no run, or a run that has ended.
    """
    try:
        record = json.loads((folder / LAUNCH_FILENAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        hint = "pass the folder of a run that `fedqueue run` started"
        raise ConfigurationError("--resume", str(folder), f"holds no {LAUNCH_FILENAME} of a run", hint) from error
    if not ((folder / "redis").exists() or (folder / "checkpoint.safetensors").exists()):
        hint = "leave out --resume to run it again from version 0"
        raise ConfigurationError(
            "--resume", str(folder), "the run in this folder has ended and cannot be resumed", hint
        )
    return Launch(Path(record["config"]), [*record["overrides"], *overrides], record["workers"])


def run_local(config: Config, launch: Launch, folder: Path, quiet: bool, resume: bool, verbose: bool) -> int:
    """Run `config` as `run_federation` does; returns the exit code."""
    result = run_federation(config, launch, folder, quiet, resume, verbose=verbose)
    return INTERRUPTED if result is None else exit_code(result)


def run_federation(
    config: Config,
    launch: Launch,
    folder: Path,
    quiet: bool,
    resume: bool,
    task: Task | None = None,
    verbose: bool = False,
) -> RunResult | None:
    """Run `config`, which was loaded from `launch.config`, until it ends; None if interrupted before version 0.

    The coordinator uses `task`, or else the task that `config` names. Writes the results to `folder`, and stops the
    server and the workers on every exit path. With `resume`, continues from the server's data or the checkpoint in
    `folder`. With `verbose`, the workers log debug lines too. Raises RunExists if a run in `folder` is still active.
    """
    _require_free(folder)
    if not resume:
        _remove(folder, URL_FILE, "redis", LOGS, KEYS, EGRESS)
    with contextlib.ExitStack() as stack:
        remove_if_not_started = stack.enter_context(contextlib.ExitStack())
        if not resume:
            remove_if_not_started.callback(_remove, folder, "redis", KEYS)
        url = config.redis.address() or stack.enter_context(_embedded_server(folder))
        connection = _connect(config, url)
        (folder / URL_FILE).write_text(url)
        (folder / URL_FILE).chmod(0o600)  # a URL may contain a password
        stack.callback((folder / URL_FILE).unlink, missing_ok=True)
        signed = config.security.signatures == "required"
        if signed:  # with keys that exist for this run only and are deleted with its server
            from fedqueue_coordinator.operator.access.enrolment import SITES, enroll_missing

            enroll_missing(folder / KEYS, config.clients.ids, folder / KEYS / SITES)
        # Started before the imports below, so that both import torch at the same time.
        workers = LocalWorkers(
            launch.config, launch.overrides, launch.workers, config.clients.ids, url, folder, verbose
        )
        stack.callback(workers.stop)

        from fedqueue.protocol.coordinator_identity import load_coordinator_identity
        from fedqueue.task import load_task
        from fedqueue_coordinator.algorithms.registry import check_algorithms
        from fedqueue_coordinator.operator.progress_view import LiveView
        from fedqueue_coordinator.operator.results import RESULT_FILENAMES, write_results
        from fedqueue_coordinator.service.checkpoint import CHECKPOINT_FILENAME as CHECKPOINT_FILE
        from fedqueue_coordinator.service.coordinator import Coordinator
        from fedqueue_coordinator.service.coordinator_store import CoordinatorStore, new_owner
        from fedqueue_coordinator.service.replay_archive import REPLAY_FOLDER

        task = task or load_task(config.task.entrypoint, config.task.options, launch.config.parent)
        check_algorithms(config)
        if not resume:
            _remove(folder, *RESULT_FILENAMES, CHECKPOINT_FILE, REPLAY_FOLDER)
        write_launch(folder, launch)
        remove_if_not_started.pop_all()
        identity = load_coordinator_identity(folder / KEYS, config.name) if signed else None
        view = stack.enter_context(LiveView(config, quiet))
        stack.enter_context(warnings_shown(view.warn))

        def on_progress(federation: Federation, now: float) -> None:
            view.update(federation, now)
            for message in workers.new_messages():
                view.warn(message)
            if not federation.stopped and (why := _dead_end(federation, workers, folder)):
                coordinator.fail(why)

        coordinator = Coordinator(
            config, task, CoordinatorStore(connection, config.name, new_owner(), identity), folder, on_progress
        )
        stack.enter_context(_signals(coordinator))
        result = coordinator.run()
        if result is None:
            return None
        workers.stop()
    _remove(folder, "redis", KEYS)
    summary = write_results(folder, config, result)
    print_result(view, summary, folder, result.failed)
    return result


def _connect(config: Config, url: str) -> redis.Redis:
    connection = connect(url, tls=config.redis.tls)
    check(connection, url)
    return connection


def _dead_end(federation: Federation, workers: LocalWorkers, folder: Path) -> str:
    """Why the run can never go on, as no process but `workers` serves its clients; an empty string if it can."""
    if workers.any_alive():
        return federation.dead_end(workers.lost_clients | federation.unavailable.keys())
    worst = federation.failures.most_frequent
    why = f": {worst.line}" if worst else ""
    return f"every worker process has ended{why}; see the logs in {folder / LOGS}"


def exit_code(result: RunResult) -> int:
    """Return the exit code of a run: 0 done, 1 failed, 130 interrupted."""
    if result.stopped_because == INTERRUPT:
        return INTERRUPTED
    return FAILED if result.failed else DONE


def print_result(view: LiveView, summary: dict[str, Any], folder: Path, failed: bool = False) -> None:
    """Print the final metrics, the paths of the result files, which clients contributed nothing, and why the run ended.

    In quiet mode: the clients that failed, and why a run failed.
    """
    from fedqueue_coordinator.operator.progress_view import ERROR, WARNING

    metrics = ", ".join(f"{name} {value:.4f}" for name, value in summary["metrics"].items()) or "not evaluated"
    merged = (
        f" after {summary['seconds']:.1f} s: {summary['versions']} versions of {summary['updates_merged']} updates "
        f"from {len(summary['clients'])} clients, mean staleness {summary['staleness']['mean']:.2f}"
    )
    view.say(f"{summary['run']}: {metrics}{merged if summary['versions'] else ', no update was merged'}", "bold")
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


def _require_free(folder: Path) -> None:
    """Raise RunExists if the server of a run in `folder` still answers."""
    address = folder / URL_FILE
    if address.exists():
        client = connect(address.read_text().strip(), retries=0)
        try:
            check(client, "")
        except ServerUnavailable:
            pass  # the server of that run has ended
        else:
            problem, hint = (
                f"is still active in {folder}",
                "wait for its end or stop it, or choose another --output DIR",
            )
            raise RunExists(folder.name, problem, hint)
        finally:
            client.close()


def _remove(folder: Path, *names: str) -> None:
    """Delete files and folders of an earlier run, if they exist."""
    for name in names:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name, ignore_errors=True)
        else:
            (folder / name).unlink(missing_ok=True)


@contextlib.contextmanager
def _embedded_server(folder: Path) -> Iterator[str]:
    server = EmbeddedServer(folder / "redis")
    try:
        yield server.url
    finally:
        server.stop()


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

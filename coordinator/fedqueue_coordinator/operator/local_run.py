"""`fedqueue run`: the whole federation on this machine. A server, a coordinator, and real worker processes."""

from __future__ import annotations

import contextlib
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from fedqueue.config.loading import Config
from fedqueue.errors import RunExists, ServerUnavailable
from fedqueue.terminal import DONE, FAILED, INTERRUPTED
from fedqueue.transport.connection import check, connect
from fedqueue_coordinator.operator.embedded_server import EmbeddedServer
from fedqueue_coordinator.operator.launch_record import Launch, write_launch
from fedqueue_coordinator.operator.local_workers import KEYS, LOGS, OUTBOX, LocalWorkers

if TYPE_CHECKING:  # they import torch: late, while the workers do
    from fedqueue_coordinator.core.federation import Federation
    from fedqueue_coordinator.core.run_summary import RunResult
    from fedqueue_coordinator.operator.progress_view import LiveView
    from fedqueue_coordinator.service.coordinator import Coordinator

URL_FILE = "redis.url"
INTERRUPT = "interrupted"


def run_local(config: Config, launch: Launch, folder: Path, quiet: bool, resume: bool) -> int:
    """Run `config`, which `launch` names, to its end; returns the exit code.

    Whatever happens, no process is left behind; the model so far and the report lie in `folder`. With `resume`, goes
    on from the server's data or the checkpoint that an earlier run left there.
    """
    _require_free(folder)
    if not resume:
        _remove(folder, URL_FILE, "redis", LOGS, KEYS, OUTBOX)
    with contextlib.ExitStack() as stack:
        not_begun = stack.enter_context(contextlib.ExitStack())
        if not resume:
            not_begun.callback(_remove, folder, "redis", KEYS)
        url = config.redis.address() or stack.enter_context(_embedded_server(folder))
        connection = connect(url, tls=config.redis.tls)
        check(connection, url)
        (folder / URL_FILE).write_text(url)
        (folder / URL_FILE).chmod(0o600)  # a URL may hold a password
        stack.callback((folder / URL_FILE).unlink, missing_ok=True)
        signed = config.security.signatures == "required"
        if signed:  # with keys of this run alone, made here and deleted with its server
            from fedqueue_coordinator.operator.access.enrolment import SITES, enroll_missing

            enroll_missing(folder / KEYS, config.clients.ids, folder / KEYS / SITES)
        sites = LocalWorkers(launch, url, folder, config.clients.ids)  # their import of torch goes on beside ours
        stack.callback(sites.stop)

        from fedqueue.protocol.coordinator_identity import load_coordinator_identity
        from fedqueue.task import load_task
        from fedqueue_coordinator.algorithms.registry import check_algorithms
        from fedqueue_coordinator.operator.audit.replay import REPLAY_FOLDER
        from fedqueue_coordinator.operator.progress_view import LiveView
        from fedqueue_coordinator.operator.results import RESULT_FILENAMES, write_results
        from fedqueue_coordinator.service.checkpoint import CHECKPOINT_FILENAME as CHECKPOINT_FILE
        from fedqueue_coordinator.service.coordinator import Coordinator
        from fedqueue_coordinator.service.coordinator_store import CoordinatorStore, new_owner

        task = load_task(config.task.entrypoint, config.task.options, launch.config.parent)
        check_algorithms(config)
        if not resume:
            _remove(folder, *RESULT_FILENAMES, CHECKPOINT_FILE, REPLAY_FOLDER)
        write_launch(folder, launch)
        not_begun.pop_all()
        identity = load_coordinator_identity(folder / KEYS, config.name) if signed else None
        view = stack.enter_context(LiveView(config, quiet))

        def on_progress(federation: Federation, now: float) -> None:
            view.update(federation, now)
            for message in sites.deaths():
                view.console.print(message, style="yellow", markup=False, highlight=False, soft_wrap=True)
            if not sites.any_alive() and not federation.stopped:
                coordinator.fail("every worker process has ended; their logs are in " + str(folder / LOGS))

        coordinator = Coordinator(
            config, task, CoordinatorStore(connection, config.name, new_owner(), identity), folder, on_progress
        )
        stack.enter_context(_signals(coordinator))
        result = coordinator.run()
        if result is None:  # interrupted before it had begun
            return INTERRUPTED
        sites.stop()
    _remove(folder, "redis", KEYS)
    summary = write_results(folder, config, result)
    print_result(view, summary, folder)
    return exit_code(result)


def exit_code(result: RunResult) -> int:
    if result.stopped_because == INTERRUPT:
        return INTERRUPTED
    return FAILED if result.failed else DONE


def print_result(view: LiveView, summary: dict[str, Any], folder: Path) -> None:
    """The last lines that a user sees: what came out, and where it lies."""
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in summary["metrics"].items()) or "not evaluated"
    view.console.print(
        f"[bold]{summary['run']}[/]: {metrics} after {summary['seconds']:.1f} s: {summary['versions']} versions of "
        f"{summary['updates_merged']} updates from {len(summary['clients'])} clients, "
        f"mean staleness {summary['staleness']['mean']:.2f}",
        highlight=False,
        soft_wrap=True,
    )
    view.console.print(f"stopped by {summary['stopped_because']}", highlight=False, soft_wrap=True)
    view.console.print(
        f"report: {folder / 'report.png'}   model: {folder / 'model.safetensors'}   numbers: {folder / 'summary.json'}",
        highlight=False,
        soft_wrap=True,
    )


def _require_free(folder: Path) -> None:
    """Raise RunExists where a run is still going on in `folder`."""
    address = folder / URL_FILE
    if address.exists():
        client = connect(address.read_text().strip(), retries=0)
        try:
            check(client, "")
        except ServerUnavailable:
            pass  # what served that run is gone
        else:
            raise RunExists(folder.name, f"is still going on in {folder}")
        finally:
            client.close()


def _remove(folder: Path, *names: str) -> None:
    """Files and folders of an earlier run, where there are any."""
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
    """Ctrl-C and SIGTERM end the run politely."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        coordinator.interrupt(INTERRUPT)

    previous = {s: signal.signal(s, interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)

"""Forks worker processes from one that has imported torch: one import, and its memory is shared."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np
import structlog
import torch

from fedqueue.config.entrypoint import import_entrypoint
from fedqueue.exit_codes import DONE, FAILED, exit_at_once, stop_signals
from fedqueue.logs import configure_logging, last_line, rotate
from fedqueue.observability.endpoint import Endpoint, SharedFolder, forget_process, serve_folder

PR_SET_PDEATHSIG = 1  # of Linux
LOG_SECONDS = 1.0  # between two looks at the sizes of the logs
GRACE_SECONDS = 30  # for a child to hand back its job after a signal, before it is killed


NUMBER = "_FEDQUEUE_WORKER_NUMBER"
"""The environment variable in which `fork` passes its number to a child that imports everything itself."""


def preload(entrypoint: str, folder: Path) -> bool:
    """Import what every worker needs: torch, what its first optimizer imports, RQ, and the task's module.

    Returns whether a forked child can work with these imports. Threads and the GPU do not survive a fork: a child that
    computes hangs where the task's module has computed with several threads, for example.

    Raises TaskError where the module cannot be imported. Opens no connection.
    """
    import fedqueue_worker.process  # noqa: F401 - imports RQ and everything else that a worker uses

    torch.set_num_threads(1)
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    import_entrypoint(entrypoint, folder, "task.entrypoint")
    if why := _lost_in_a_fork():
        structlog.get_logger("fedqueue.worker").info(
            "each worker imports torch and the task itself, which takes longer", because=f"importing the task {why}"
        )
    return not why


def _lost_in_a_fork() -> str:
    """What the import of the task's module did that a forked child cannot use; empty for nothing."""
    if threading.active_count() > 1:
        return "starts threads"
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return "uses the GPU"
    return "lets torch compute with several threads" if torch.get_num_threads() > 1 else ""


def number_of_this_child() -> int | None:
    """The number of a child that `fork` has started again with `fresh`; None in any other process."""
    number = os.environ.pop(NUMBER, None)
    return None if number is None else int(number)


def fork(
    count: int,
    logs: Path | None,
    configure: Callable[[], None] = configure_logging,
    fresh: bool = False,
    endpoint: Endpoint | None = None,
) -> int:
    """Fork `count` children. Returns in each child, with its number from 0; never returns in this process.

    With `fresh`, each child executes this process's command again, which gets its number from `number_of_this_child`.

    This process passes the signals of `stop_signals` on, kills a child that has not ended GRACE_SECONDS later, reports
    a child that ends by itself, and exits with the highest exit code once all have ended. A child gets SIGTERM when
    this process dies. With `logs`, child i writes to logs/worker-i.log, and calls `configure`
    to log there;
    this process moves a log that has become large to logs/worker-i.log.1. It serves the sums of the children's metrics
    at `endpoint`.
    """
    if logs:
        logs.mkdir(parents=True, exist_ok=True)
    metrics = SharedFolder() if endpoint else None
    sys.stdout.flush()
    sys.stderr.flush()
    gc.collect()
    gc.freeze()  # a collection in a child would write to every page that it shares
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals())  # until the child has its handlers
    parent, children = os.getpid(), dict[int, int]()
    for number in range(count):
        child = os.fork()
        if not child:
            _begin(parent, log_of(logs, number), configure)
            if endpoint:
                endpoint.close()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            if fresh:
                os.environ[NUMBER] = str(number)
                os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606  # nosec B606 - its own command
            return number
        children[child] = number
    if endpoint and metrics:
        serve_folder(endpoint, metrics)
    try:
        _supervise(children, logs)
    finally:
        if metrics:
            metrics.delete()


def log_of(logs: Path | None, number: int) -> Path | None:
    """The log file of child `number`."""
    return logs / log_name(number) if logs else None


def log_name(number: int) -> str:
    """The name of the log file of child `number`."""
    return f"worker-{number}.log"


def _begin(parent: int, log: Path | None, configure: Callable[[], None]) -> None:
    """Set up a child: signals, its log, and random numbers that differ from those of the other children."""
    for signum in stop_signals():
        signal.signal(signum, exit_at_once)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(FAILED)
    if log:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        configure()  # again, because stderr is a file now: no colours
    np.random.seed()  # as in a process of its own; Python's generator does that itself, torch's is seeded for each job


def _supervise(children: dict[int, int], logs: Path | None) -> NoReturn:
    """Wait for signals and children until no child is left. No handlers: a signal just before a wait would be lost."""
    running, told, worst = dict(children), False, DONE
    stops = stop_signals()
    watched = {*stops, signal.SIGCHLD, signal.SIGALRM}
    signal.signal(signal.SIGCHLD, lambda *_: None)  # an ignored signal cannot be waited for
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    if logs:
        paths = [logs / log_name(number) for number in children.values()]
        threading.Thread(target=_bound, args=(paths,), daemon=True).start()
    while True:
        for pid, code in _ended(running):
            number = running.pop(pid)
            forget_process(pid)
            worst = max(worst, code if code >= 0 else FAILED)
            if not told:
                log = log_of(logs, number)
                last = f": {last_line(log)}" if log else ""
                print(f"worker {number} (pid {pid}) ended with {code}{last}", file=sys.stderr, flush=True)  # noqa: T201
        if not running:
            sys.exit(worst)
        signum = signal.sigwait(watched)
        if signum in stops:
            told = True
            signal.alarm(GRACE_SECONDS)
            _send(signal.SIGTERM, running)
        elif signum == signal.SIGALRM:
            _send(signal.SIGKILL, running)


def _bound(logs: Iterable[Path]) -> NoReturn:
    """Keep the sizes of the children's logs bounded, whatever a task prints."""
    while True:
        time.sleep(LOG_SECONDS)
        for log in logs:
            rotate(log)


def _ended(running: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Children that have ended, with their exit codes. Processes that the task's module started are left alone."""
    for pid in list(running):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            yield pid, os.waitstatus_to_exitcode(status)


def _send(signum: signal.Signals, running: Iterable[int]) -> None:
    for pid in running:
        os.kill(pid, signum)

"""Forks worker processes from one that has imported torch: one import, and its memory is shared."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np
import structlog
import torch

from fedqueue.config.entrypoint import import_entrypoint
from fedqueue.exit_codes import DONE, FAILED, exit_at_once, stop_signals
from fedqueue.logs import configure_logging, last_line

PR_SET_PDEATHSIG = 1  # of Linux
GRACE_SECONDS = 30  # for a child to hand back its job after a signal, before it is killed


def preload(entrypoint: str, folder: Path) -> None:
    """Import what every worker needs: torch, what its first optimizer imports, RQ, and the task's module.

    Raises TaskError where the module cannot be imported. Opens no connection. Gives torch one thread, because a child
    may hang that is forked after its parent has computed with several.
    """
    import fedqueue_worker.process  # noqa: F401 - imports RQ and everything else that a worker uses

    torch.set_num_threads(1)
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    import_entrypoint(entrypoint, folder, "task.entrypoint")
    log = structlog.get_logger("fedqueue.worker")
    if threading.active_count() > 1:
        log.warning(
            "importing the task starts threads, which forked workers lack: start them later", entrypoint=entrypoint
        )
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        log.warning("importing the task uses the GPU, so forked workers cannot: use it later", entrypoint=entrypoint)


def fork(count: int, logs: Path | None, level: int = logging.INFO) -> int:
    """Fork `count` children. Returns in each child, with its number from 0; never returns in this process.

    This process passes the signals of `stop_signals` on, kills a child that has not ended GRACE_SECONDS later, reports
    a child that ends by itself, and exits with the highest exit code once all have ended. A child gets SIGTERM when
    this process dies. With `logs`, child i writes to logs/worker-i.log, from the log level `level` on.
    """
    if logs:
        logs.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    gc.collect()
    gc.freeze()  # a collection in a child would write to every page that it shares
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals())  # until the child has its handlers
    parent, children = os.getpid(), dict[int, int]()
    for number in range(count):
        child = os.fork()
        if not child:
            _begin(parent, log_of(logs, number), level)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            return number
        children[child] = number
    return _supervise(children, logs)


def log_of(logs: Path | None, number: int) -> Path | None:
    """The log file of child `number`."""
    return logs / f"worker-{number}.log" if logs else None


def _begin(parent: int, log: Path | None, level: int) -> None:
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
        configure_logging(level=level)  # again, because stderr is a file now: no colours
    np.random.seed()  # as in a process of its own; Python's generator does that itself, torch's is seeded for each job


def _supervise(children: dict[int, int], logs: Path | None) -> NoReturn:
    """Wait for signals and children until no child is left. No handlers: a signal just before a wait would be lost."""
    running, told, worst = dict(children), False, DONE
    stops = stop_signals()
    watched = {*stops, signal.SIGCHLD, signal.SIGALRM}
    signal.signal(signal.SIGCHLD, lambda *_: None)  # an ignored signal cannot be waited for
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    while True:
        for pid, code in _ended(running):
            number = running.pop(pid)
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


def _ended(running: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Children that have ended, with their exit codes. Processes that the task's module started are left alone."""
    for pid in list(running):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            yield pid, os.waitstatus_to_exitcode(status)


def _send(signum: signal.Signals, running: Iterable[int]) -> None:
    for pid in running:
        os.kill(pid, signum)

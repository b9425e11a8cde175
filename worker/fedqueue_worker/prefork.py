"""Several worker processes out of one that has imported torch: the import is paid once, and its memory is shared."""

from __future__ import annotations

import ctypes
import gc
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
from fedqueue.terminal import DONE, FAILED, configure_logging, exit_at_once, last_line

SIGNALS = (signal.SIGTERM, signal.SIGINT)
PR_SET_PDEATHSIG = 1  # of Linux
GRACE_SECONDS = 30  # to hand back its job; then a child that was told to end is killed


def preload(entrypoint: str, folder: Path) -> None:
    """Import once what every worker needs: torch, what its first optimizer brings, RQ, and the task's module.

    Raises TaskError where the module cannot be imported. No connection is opened. torch gets one thread: a child that
    is forked after its parent has computed with several may hang.
    """
    import fedqueue_worker.process  # noqa: F401 - RQ and all that a worker uses

    torch.set_num_threads(1)
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    import_entrypoint(entrypoint, folder, "task.entrypoint")
    log = structlog.get_logger("fedqueue.worker")
    if threading.active_count() > 1:
        log.warning("importing the task starts threads, which its worker processes do not have", entrypoint=entrypoint)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        log.warning("importing the task uses the GPU, so its worker processes cannot", entrypoint=entrypoint)


def fork(count: int, logs: Path | None) -> int:
    """The number of the worker that this process is from now on: `count` children return, this process never does.

    It passes SIGTERM and SIGINT on, kills what has not ended GRACE_SECONDS later, reports a child that ends by itself,
    and exits with the worst exit code once all have ended. A child gets SIGTERM when this process dies. With `logs`,
    child i writes to logs/worker-i.log.
    """
    if logs:
        logs.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    gc.collect()
    gc.freeze()  # a collection in a child would write to every page that it shares
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # none of them between a fork and its handlers
    parent, children = os.getpid(), dict[int, int]()
    for number in range(count):
        child = os.fork()
        if not child:
            _begin(parent, log_of(logs, number))
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            return number
        children[child] = number
    return _supervise(children, logs)


def log_of(logs: Path | None, number: int) -> Path | None:
    return logs / f"worker-{number}.log" if logs else None


def _begin(parent: int, log: Path | None) -> None:
    """In a child: what must not be its siblings' too."""
    for signum in SIGNALS:
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
        configure_logging()  # which looks whether stderr is a terminal
    np.random.seed()  # as in a process of its own; Python's generator does that itself, torch's is seeded for each job


def _supervise(children: dict[int, int], logs: Path | None) -> NoReturn:
    """Signals are waited for and not handled: one that came just before a blocking call would not interrupt it."""
    running, told, worst = dict(children), False, DONE
    watched = {*SIGNALS, signal.SIGCHLD, signal.SIGALRM}
    signal.signal(signal.SIGCHLD, lambda *_: None)  # what is ignored cannot be waited for
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    while True:
        for pid, code in _ended(running):
            number = running.pop(pid)
            worst = max(worst, code if code >= 0 else FAILED)
            if not told:
                log = log_of(logs, number)
                said = f": {last_line(log)}" if log else ""
                print(f"worker {number} (pid {pid}) ended with {code}{said}", file=sys.stderr, flush=True)  # noqa: T201
        if not running:
            sys.exit(worst)
        signum = signal.sigwait(watched)
        if signum in SIGNALS:
            told = True
            signal.alarm(GRACE_SECONDS)
            _send(signal.SIGTERM, running)
        elif signum == signal.SIGALRM:
            _send(signal.SIGKILL, running)


def _ended(running: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Those that have ended, with their exit codes; what the task's module has started is not ours to wait for."""
    for pid in list(running):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            yield pid, os.waitstatus_to_exitcode(status)


def _send(signum: signal.Signals, running: Iterable[int]) -> None:
    for pid in running:
        os.kill(pid, signum)

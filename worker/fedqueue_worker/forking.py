"""Several worker processes out of one that has imported torch: the import is paid once, and its memory is shared."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import NoReturn

import numpy as np
import structlog
import torch

from fedqueue.entrypoint import import_entrypoint
from fedqueue.terminal import DONE, FAILED, configure_logging, last_line

SIGNALS = (signal.SIGTERM, signal.SIGINT)
PR_SET_PDEATHSIG = 1  # of Linux


def preload(entrypoint: str, folder: Path) -> None:
    """Import once what every worker needs: torch, what its first optimizer brings, RQ, and the task's module.

    Raises TaskError where the module cannot be imported. No connection is opened. torch gets one thread: a child that
    is forked after its parent has computed with several may hang.
    """
    import fedqueue_worker.worker  # noqa: F401 - RQ and all that a worker uses

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

    It passes SIGTERM and SIGINT on, reports a child that ends by itself, and exits with the worst exit code once all
    have ended. A child gets SIGTERM when this process dies. With `logs`, child i writes to logs/worker-i.log.
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
    return _supervise(children, logs, before)


def log_of(logs: Path | None, number: int) -> Path | None:
    return logs / f"worker-{number}.log" if logs else None


def _begin(parent: int, log: Path | None) -> None:
    """In a child: what must not be its siblings' too."""
    for signum in SIGNALS:
        signal.signal(signum, lambda *_: sys.exit(DONE))
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


def _supervise(children: dict[int, int], logs: Path | None, mask: Iterable[int]) -> NoReturn:
    running, told, worst = dict(children), False, DONE

    def pass_on(signum: int, frame: FrameType | None) -> None:
        nonlocal told
        told = True
        for pid in running:
            os.kill(pid, signal.SIGTERM)

    for signum in SIGNALS:
        signal.signal(signum, pass_on)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    while running:
        pid, status = os.waitpid(-1, 0)
        number = running.pop(pid, None)
        if number is None:
            continue  # a process that the task's module started
        code = os.waitstatus_to_exitcode(status)
        worst = max(worst, code if code >= 0 else FAILED)
        if not told:
            log = log_of(logs, number)
            said = f": {last_line(log)}" if log else ""
            print(f"worker {number} (pid {pid}) ended with {code}{said}", file=sys.stderr, flush=True)  # noqa: T201
    sys.exit(worst)

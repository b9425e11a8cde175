"""Forks processes from one that has already imported torch and the product, so a start takes milliseconds."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
ROOT = Path(__file__).parents[2]


def warm_up() -> None:
    """Set what the fork server imports; call before the first process is started."""
    path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(ROOT) not in path:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, path)])
    CONTEXT.set_forkserver_preload(["tests.support.preloaded"])


def settle(log: Path, command: Sequence[str]) -> None:
    """Set up the new process: end with the fork server, write to `log`, and set `sys.argv` to `command`."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    with log.open("ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.argv = list(command)
    signal.signal(signal.SIGINT, signal.default_int_handler)

"""Starts child processes that end when their parent ends, for whatever reason (on Linux)."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

# Runs between fork and exec of the child and asks the Linux kernel to send SIGTERM when the parent dies; the setting
# survives exec. This is a program of its own because preexec_fn is unsafe in a process with threads.
_TIED = """
import ctypes, os, signal, sys
try:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
except AttributeError:
    pass
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


def start(command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start `command` in a session of its own, so that Ctrl-C does not reach it.

    Its environment is this process's with `environment` added; its output is appended to the file `log`.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        return subprocess.Popen(  # noqa: S603 - no part of the command comes from outside
            [sys.executable, "-S", "-E", "-c", _TIED, str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )


def stop(processes: Iterable[subprocess.Popen[bytes]], seconds: float = 10.0) -> None:
    """Send SIGTERM to processes of `start`, and after `seconds` SIGKILL to each one left and to all that it forked."""
    running = [p for p in processes if p.poll() is None]
    for process in running:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
    for process in running:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the process group, which includes its forks
            process.kill()
            process.wait()

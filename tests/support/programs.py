"""Runs the product's commands in separate processes, and finds their child processes."""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import coverage

from tests.support.forked import CONTEXT, settle, warm_up
from tests.support.waiting import TIMEOUT_SECONDS, wait_until


class Program:
    """Runs the command `python -m module arguments` in `folder`, with its output in a log file there.

    With `cold`, a new Python interpreter runs the command, as from a user's shell. Otherwise a fork of a process that
    has already imported the product runs the same module.
    """

    def __init__(self, module: str, *arguments: object, folder: Path, cold: bool = True, **environment: str) -> None:
        self.log = folder / f"{module}-{time.monotonic_ns()}.log"
        words, variables = [str(argument) for argument in arguments], {**os.environ, **environment}
        self._started = (
            _Cold(module, words, folder, self.log, variables)
            if cold
            else _Forked(module, words, folder, self.log, variables)
        )

    @property
    def pid(self) -> int:
        return self._started.pid

    def wait(self, seconds: float = TIMEOUT_SECONDS) -> int:
        """Return the exit code; fail with the output if the program still runs after `seconds`."""
        code = self._started.wait(seconds)
        assert code is not None, f"still running after {seconds} s:\n{self.text}"
        return code

    def send(self, signum: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self._started.wait(0) is None:
                os.kill(self.pid, signum)

    @property
    def text(self) -> str:
        """All output of the program so far, including standard error."""
        return self.log.read_text(errors="replace")


class _Cold:
    def __init__(self, module: str, words: list[str], folder: Path, log: Path, environment: dict[str, str]) -> None:
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *words],
                cwd=folder,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        self.pid = self._process.pid

    def wait(self, seconds: float) -> int | None:
        """Return the exit code, or None if the program still runs after `seconds`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(seconds)
        return None


class _Forked:
    def __init__(self, module: str, words: list[str], folder: Path, log: Path, environment: dict[str, str]) -> None:
        warm_up()
        log.touch()
        self._process = CONTEXT.Process(target=_run_module, args=(module, words, folder, log, environment))
        self._process.start()
        self.pid = self._process.pid or 0

    def wait(self, seconds: float) -> int | None:
        """Return the exit code, or None if the program still runs after `seconds`."""
        self._process.join(seconds)
        return self._process.exitcode


def _run_module(module: str, words: list[str], folder: Path, log: Path, environment: dict[str, str]) -> None:
    """Do what `python -m module` does, in the forked process."""
    settle(log, [module, *words])
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    try:
        runpy.run_module(module, run_name="__main__")
    finally:
        if measured := coverage.Coverage.current():  # multiprocessing ends a process without calling atexit functions
            measured.stop()
            measured.save()


def children(pid: int) -> list[int]:
    """Return the processes whose parent is `pid`."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return found


def descendants(pid: int) -> list[int]:
    """Return all descendants of `pid`."""
    below = children(pid)
    return below + [further for child in below for further in descendants(child)]


def worker_pids(folder: Path, count: int) -> list[int]:
    """Return the process ids of a local run's workers, by number, once all are ready; `folder` has the results."""
    logs = [folder / "logs" / f"worker-{i}.log" for i in range(count)]
    wait_until(lambda: all("ready" in log.read_text() for log in logs), "the workers are ready")
    return [int(log.read_text().rpartition("pid=")[2].split()[0]) for log in logs]


def read_results(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read the summary and the ledger's records of the run with its results in `folder`."""
    summary = json.loads((folder / "summary.json").read_text())
    ledger = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    return summary, ledger

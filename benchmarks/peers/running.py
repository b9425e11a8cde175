"""Starts and ends the processes of a system under comparison, and records merged updates and peak memory."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from live_federation import peak_bytes, shared_bytes

MIB = 1024 * 1024


@dataclass
class ProcessGroup:
    """The processes of one run; peaks are kept by role, such as `server` and `client`."""

    folder: Path
    environment: Mapping[str, str]
    _roles: dict[int, str] = field(default_factory=dict)  # of the processes started by this object
    _below: dict[tuple[int, int], str] = field(default_factory=dict)  # of their descendants, by (process, start time)
    _logs: dict[int, Path] = field(default_factory=dict)
    _peaks: dict[str, int] = field(default_factory=dict)
    _shared: dict[str, int] = field(default_factory=dict)
    _processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _ended: threading.Event = field(default_factory=threading.Event)

    def start(self, role: str, name: str, command: Sequence[object]) -> subprocess.Popen[bytes]:
        """Start a process; its descendants are measured and ended with it."""
        path = self.folder / f"{name}.log"
        with path.open("wb") as log:
            process = subprocess.Popen(
                [str(word) for word in command], stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=self.folder,
                env={**os.environ, **self.environment}, start_new_session=True,
            )  # fmt: skip
        self._roles[process.pid] = role
        self._processes.append(process)
        self._logs[process.pid] = path
        return process

    def watch(self) -> None:
        """Sample the peak memory of each role until the end; some processes live for one message only.

        Shared memory is sampled rarely, because the kernel walks all pages of the process to compute it.
        """
        due: dict[tuple[int, int], float] = {}
        while not self._ended.wait(0.1):
            present = dict(_present())
            for pid, (_, began) in present.items():
                if role := self._role(pid, present):
                    self._below[pid, began] = role  # never removed, since some outlive their parents
                    with contextlib.suppress(OSError, StopIteration):
                        self._peaks[role] = max(self._peaks.get(role, 0), peak_bytes(pid))
                        if time.monotonic() >= due.setdefault((pid, began), time.monotonic() + 2.0):
                            due[pid, began] = time.monotonic() + 10.0
                            self._shared[role] = max(self._shared.get(role, 0), shared_bytes(pid))

    def _role(self, pid: int, present: Mapping[int, tuple[int, int]]) -> str:
        while pid in present:
            parent, began = present[pid]
            if role := self._roles.get(pid) or self._below.get((pid, began)):
                return role
            pid = parent
        return ""

    def merged(self) -> list[tuple[float, float]]:
        """Return (time, accuracy or −1) of each update that the server has reported."""
        path = Path(self.environment["PEERS_PROGRESS"])
        lines = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
        words = [line.split() for line in lines]
        return [(float(w[0]), float(w[1]) if len(w) > 1 else -1.0) for w in words]

    def require_alive(self) -> None:
        for process in self._processes:
            if process.poll():
                said = self._logs[process.pid].read_text(errors="replace").strip()[-400:]
                raise RuntimeError(f"{self._logs[process.pid].stem} ended with {process.returncode}: {said}")

    def peak_mib(self, role: str) -> float:
        return self._peaks.get(role, 0) / MIB

    def own_mib(self, role: str) -> float:
        """Return an upper bound of the role's peak without the other processes' proportional part of shared memory."""
        return (self._peaks.get(role, 0) - self._shared.get(role, 0)) / MIB

    def end(self) -> None:
        """End all processes and their descendants, but no process that has since got one of their ids."""
        self._ended.set()
        for process in self._processes:
            process.kill()
        for pid, (_, began) in _present():
            if (pid, began) in list(self._below):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for process in self._processes:
            process.wait()


def _present() -> Iterator[tuple[int, tuple[int, int]]]:
    """Yield (process, (parent, start time)) for every process of the machine."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            yield int(stat.parent.name), (int(fields[1]), int(fields[19]))


C = TypeVar("C", bound=ProcessGroup)


@contextlib.contextmanager
def process_group(folder: Path, environment: Mapping[str, str], kind: type[C]) -> Iterator[C]:
    started = kind(folder, {**environment, "PEERS_PROGRESS": str(folder / "progress")})
    watcher = threading.Thread(target=started.watch, daemon=True)
    watcher.start()
    try:
        yield started
    finally:
        started.end()
        watcher.join()


def rate(running: ProcessGroup, warm: int, seconds: float, at_least: int, limit: float) -> float:
    """Return updates per second after the first `warm`, over `seconds` and `at_least` updates; raise TimeoutError."""
    deadline = time.monotonic() + limit
    while True:
        times = [when for when, _ in running.merged()]
        if len(times) >= warm + at_least and times[-1] - times[warm - 1] >= seconds:
            return (len(times) - warm) / (times[-1] - times[warm - 1])
        running.require_alive()
        if time.monotonic() > deadline:
            raise TimeoutError(f"{len(times)} updates in {limit:.0f} s")
        time.sleep(0.1)


def seconds_to(running: ProcessGroup, target: float, limit: float) -> float | None:
    """Return seconds from the first merged update to `target`; None if that takes longer than `limit`."""
    started = time.monotonic()
    while True:
        merged = running.merged()
        for when, accuracy in merged:
            if accuracy >= target:
                return when - merged[0][0]
        running.require_alive()
        if (merged and merged[-1][0] - merged[0][0] > limit) or time.monotonic() > started + 2 * limit:
            return None
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port

"""The worker processes of a local run: `fedqueue-worker --processes`, as a site with several clients runs it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedqueue.terminal import last_line
from fedqueue_coordinator.operator import child_processes
from fedqueue_coordinator.operator.access.enrolment import SITES
from fedqueue_coordinator.operator.launch_record import Launch

KEYS, OUTBOX, LOGS = "keys", "outbox", "logs"


class LocalWorkers:
    """One process that has imported torch, and the workers that it has forked."""

    def __init__(self, launch: Launch, url: str, folder: Path, clients: Sequence[str]) -> None:
        self._logs = folder / LOGS
        self._log = self._logs / "workers.log"
        self._read = self._log.stat().st_size if self._log.exists() else 0  # what a resumed run has said is no news
        self._said = False
        command = [sys.executable, "-m", "fedqueue_worker", str(launch.config)]
        command += ["--processes", str(launch.workers), "--logs", str(self._logs.resolve())]
        command += [word for override in launch.overrides for word in ("--set", override)]
        command += [word for client in clients for word in ("--client", client)]
        environment = {
            "FEDQUEUE_REDIS__URL": url,  # not an argument: other users can read those
            "FEDQUEUE_REDIS__PASSWORD_FILE": "",  # nosec B105 - no file: it is in the URL
            "FEDQUEUE_SECURITY__KEYS": str((folder / KEYS / SITES).resolve()),
            "FEDQUEUE_SECURITY__OUTBOX": str((folder / OUTBOX).resolve()),
        }
        self._process: subprocess.Popen[bytes] = child_processes.start(command, self._log, environment)

    def deaths(self) -> Iterator[str]:
        """A message for each worker that has ended since the last call."""
        ended = self._process.poll()
        with self._log.open("rb") as log:
            log.seek(self._read)
            whole, newline, _ = log.read().rpartition(b"\n")
        self._read += len(whole + newline)
        for line in whole.decode(errors="replace").splitlines():
            if line.startswith("worker "):
                yield line
        if ended and not self._said:
            self._said = True
            last = last_line(self._log)
            yield f"the workers' parent (pid {self._process.pid}) ended with {ended}: {last}"

    def any_alive(self) -> bool:
        """Whether there is a worker left: their parent ends with the last of them."""
        return self._process.poll() is None

    def stop(self) -> None:
        child_processes.stop([self._process])

"""Starts the workers of a local run with `fedqueue-worker --processes`, as a site with several clients does."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedqueue.logs import last_line
from fedqueue_coordinator.operator import child_processes
from fedqueue_coordinator.operator.access.enrolment import SITES
from fedqueue_coordinator.operator.run_folder import RunFolder

_ENDED = re.compile(r"worker (\d+) \(pid \d+\) ended ")


class LocalWorkers:
    """A parent process that imports torch once, and the worker processes that it forks."""

    def __init__(
        self,
        config: Path,
        overrides: Sequence[str],
        processes: int,
        clients: Sequence[str],
        url: str,
        folder: RunFolder,
        verbose: bool,
    ) -> None:
        """Start `processes` workers that serve `clients` on the Redis server at `url`.

        Their logs go to `folder.logs`, with debug lines if `verbose`.
        """
        self.lost_clients: set[str] = set()
        """Clients whose worker process has ended; no other process of this run serves them."""
        self._of_worker = [list(clients[number::processes]) for number in range(min(processes, len(clients)))]
        self._logs = folder.logs
        self._log = self._logs / "workers.log"
        # Each run appends to the log of the runs before it in the same folder.
        self._read_bytes = self._log.stat().st_size if self._log.exists() else 0
        self._parent_end_reported = False
        command = [sys.executable, "-m", "fedqueue_worker", str(config)]
        command += ["--processes", str(processes), "--logs", str(self._logs.resolve())]
        command += ["--metrics", "off"]  # at the address of the run
        command += ["--verbose"] if verbose else []
        command += [word for override in overrides for word in ("--set", override)]
        command += [word for client in clients for word in ("--client", client)]
        environment = {
            "FEDQUEUE_REDIS__URL": url,  # not an argument, because other users can read arguments
            "FEDQUEUE_REDIS__PASSWORD_FILE": "off",  # nosec B105 - no password file: the URL has the password
            "FEDQUEUE_SECURITY__KEYS": str((folder.keys / SITES).resolve()),
            "FEDQUEUE_SECURITY__EGRESS_LOG": str(folder.egress.resolve()),
            "FEDQUEUE_PRIVACY__FOLDER": str(folder.privacy.resolve()),
        }
        self._process: subprocess.Popen[bytes] = child_processes.start(command, self._log, environment)
        self._reader = self._log.open("rb")  # kept open: a deleted file is still read

    def new_messages(self) -> Iterator[str]:
        """Yield a message for each worker, and for their parent, that has ended since the last call."""
        ended = self._process.poll()
        self._reader.seek(self._read_bytes)
        whole, newline, _ = self._reader.read().rpartition(b"\n")
        self._read_bytes += len(whole + newline)
        for line in whole.decode(errors="replace").splitlines():
            if ended_worker := _ENDED.match(line):
                for clients in self._of_worker[int(ended_worker[1]) :][:1]:
                    self.lost_clients.update(clients)
                yield line
        if ended and not self._parent_end_reported:
            self._parent_end_reported = True
            last = last_line(self._log)
            yield f"the parent of the workers (pid {self._process.pid}) ended with exit status {ended}: {last}"

    def any_alive(self) -> bool:
        """Return whether a worker is left; the parent ends with its last worker."""
        return self._process.poll() is None

    def stop(self) -> None:
        """Stop the parent and its workers."""
        child_processes.stop([self._process])
        self._reader.close()

"""Starts the keepers of a local run with `fedqueue-keeper`, one process each, to show how a run with keepers works."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedqueue.logs import last_line
from fedqueue_coordinator.operator import child_processes
from fedqueue_coordinator.operator.access.enrolment import KEEPER_SITES
from fedqueue_coordinator.operator.run_folder import RunFolder

NO_PROTECTION = "keepers and coordinator on one machine: this protects nobody; it shows how it works"


class LocalKeepers:
    """The keepers' processes, each with the folder of its own that `enroll_missing` has made."""

    def __init__(
        self, config: Path, overrides: Sequence[str], keepers: Sequence[str], url: str, folder: RunFolder, verbose: bool
    ) -> None:
        """Start a process for each of `keepers` on the Redis server at `url`.

        Its log is `folder.logs`/keeper-NAME.log, with debug lines if `verbose`.
        """
        self._reported: set[str] = set()
        self._logs = {keeper: folder.logs / f"keeper-{keeper}.log" for keeper in keepers}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        for keeper, log in self._logs.items():
            command = [sys.executable, "-m", "fedqueue_keeper", keeper, str(config)]
            command += ["--metrics", "off"]  # at the address of the run
            command += ["--verbose"] if verbose else []
            command += [word for override in overrides for word in ("--set", override)]
            environment = {
                "FEDQUEUE_REDIS__URL": url,  # not an argument, because other users can read arguments
                "FEDQUEUE_REDIS__PASSWORD_FILE": "off",  # nosec B105 - no password file: the URL has the password
                "FEDQUEUE_SECURITY__KEYS": str((folder.keys / KEEPER_SITES / keeper).resolve()),
            }
            self._processes[keeper] = child_processes.start(command, log, environment)

    def new_messages(self) -> Iterator[str]:
        """Yield a message for each keeper that has ended since the last call."""
        for keeper, process in self._processes.items():
            if keeper not in self._reported and (ended := process.poll()) is not None:
                self._reported.add(keeper)
                last = last_line(self._logs[keeper])
                yield f"keeper {keeper} (pid {process.pid}) ended with exit status {ended}: {last}"

    def dead_end(self) -> str:
        """Return why the run can never go on, because a keeper has ended; an empty string if it can."""
        ended = [keeper for keeper, process in self._processes.items() if process.poll() is not None]
        if not ended:
            return ""
        names = " and ".join(ended)
        return f"keeper {names} has ended, without which no version can be made; see {self._logs[ended[0]]}"

    def stop(self) -> None:
        """Stop the keepers."""
        child_processes.stop(self._processes.values())

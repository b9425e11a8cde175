"""Runs coordinators, workers and keepers for a chaos run, and restarts each after its death, as a supervisor does.

Each process is forked from one that has already imported everything, so a restart costs no import of torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from tests.support.chaos import coordinator_with_faults, crash_points, keeper_with_skew, worker_with_skew
from tests.support.forked import CONTEXT

RESTART_SECONDS = 0.3  # a supervisor's delay before it restarts a program


@dataclass
class Member:
    """One program that is restarted in a new process whenever it ends."""

    name: str
    main: Any
    arguments: list[str]
    log: Path
    process: ForkServerProcess | None = None
    stopped: bool = False
    """Held by SIGSTOP, as a fault."""
    restarts: int = -1
    wall: Any = field(default_factory=lambda: CONTEXT.RawValue("d", 0.0))
    monotonic: Any = field(default_factory=lambda: CONTEXT.RawValue("d", 0.0))
    armed: Any = field(default_factory=lambda: CONTEXT.RawArray("i", [coordinator_with_faults.NO_POINT, 0, 0]))
    died: float = 0.0

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.is_alive()

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid or 0

    def start(self) -> None:
        self.restarts += 1
        self.stopped = False
        self.armed[0] = coordinator_with_faults.NO_POINT
        shared = [self.wall, self.monotonic]
        if self.main is coordinator_with_faults.main:
            shared.append(self.armed)
        self.process = CONTEXT.Process(target=self.main, args=(self.arguments, self.log, *shared), name=self.name)
        self.process.start()

    def send(self, signum: int) -> None:
        """Send a signal to the process if it is still alive."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):  # the process ended in between
                os.kill(self.pid, signum)

    def arm(self, point: str, passages: int, signum: int) -> None:
        """Make the process send itself the signal at the `passages`-th passage of the point, counted from now."""
        self.armed[1], self.armed[2] = passages, signum
        self.armed[0] = crash_points.POINTS.index(point)


class Fleet:
    """Holds all members. Call `supervise` often."""

    def __init__(
        self,
        folder: Path,
        config: Path,
        url: str,
        shares: Sequence[Sequence[str]],
        coordinators: int,
        keepers: Mapping[str, Path],
    ) -> None:
        """`keepers` is the name of each keeper with its folder of keys."""
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        self.supervising = True

        def member(name: str, main: Any, *arguments: str) -> Member:
            return Member(name, main, [*arguments, str(config), "--redis", url], folder / "logs" / f"{name}.log")

        self.coordinators = [
            member(f"coordinator-{i}", coordinator_with_faults.main, "--standby", "--output", str(folder / f"out-{i}"))
            for i in range(coordinators)
        ]
        self.workers = [
            member(f"worker-{i}", worker_with_skew.main, *(w for client in share for w in ("--client", client)))
            for i, share in enumerate(shares)
        ]
        self.keepers = [
            member(f"keeper-{name}", keeper_with_skew.main, "--keys", str(keys), name) for name, keys in keepers.items()
        ]
        for one in self.members:
            one.start()

    @property
    def members(self) -> list[Member]:
        return [*self.coordinators, *self.workers, *self.keepers]

    def supervise(self) -> None:
        """Restart each program that ended at least `RESTART_SECONDS` ago."""
        for one in self.members:
            if one.alive or not self.supervising:
                continue
            if not one.died:
                one.died = time.monotonic()
            elif time.monotonic() > one.died + RESTART_SECONDS:
                one.died = 0.0
                one.start()

    def stop_all(self) -> None:
        """Stop all processes until `continue_all`."""
        for one in self.members:
            one.send(signal.SIGSTOP)

    def continue_all(self) -> None:
        for one in self.members:
            one.send(signal.SIGCONT)

    def kill(self) -> None:
        self.supervising = False
        for one in self.members:
            one.send(signal.SIGKILL)
        for one in self.members:
            if one.process:
                one.process.join(10)

"""Runs a real federation for measurements: a server, a coordinator, workers with instant training, and keepers.

Each is a process.

CPU time and memory of a process are read from /proc, so these benchmarks run on Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import msgpack
import redis

from fedqueue.transport.connection import connect
from fedqueue.transport.store import Store
from fedqueue_coordinator.operator import child_processes
from fedqueue_coordinator.operator.access.enrolment import KEEPER, KEEPER_SITES, enroll_missing
from fedqueue_coordinator.operator.embedded_server import EmbeddedServer

TICK = os.sysconf("SC_CLK_TCK")
START_SECONDS = 120.0
QUICK_SECONDS = 0.2
"""Duration of each measurement of a smoke test."""
CONFIG = """
name = "bench"
[task]
entrypoint = "{task}:InstantTask"
options = {{nbytes = {nbytes}}}
[clients]
count = {clients}
min_available = {clients}
[evaluation]
every_versions = "off"
[checkpoint]
every_seconds = "off"
[stop]
versions = 1000000000
"""


Watched = Literal["", "metrics", "all"]
"""What watches a run: nothing; metrics that are served; or metrics that are scraped each second, logs as JSON, an event
file of TensorBoard, and a page with one reader."""
TRACKED = ("trackers.use=tensorboard", "observability.log_format=json")
READER = """
import sys, time, urllib.request
while True:
    try:
        with urllib.request.urlopen(sys.argv[1], timeout=60) as answer:
            while answer.read1():
                pass
    except OSError:
        pass
    time.sleep(1.0)
"""


@dataclass(frozen=True)
class Figures:
    """Measurements of one working federation over `seconds`."""

    seconds: float
    updates: int
    coordinator_cpu: float
    """Seconds of CPU, user and system."""
    worker_cpu: float
    """The same, of all workers."""
    keeper_cpu: float
    """The same, of all keepers."""
    server_cpu: float
    coordinator_peak: int
    """Peak of resident bytes since the start of the process."""
    worker_peak: int
    """Of the largest worker."""
    keeper_peak: int
    """Of the largest keeper; 0 without any."""
    server_peak: int
    coordinator_shared: int
    """Resident bytes minus proportional bytes: the part of shared pages that counts for other processes."""
    worker_shared: int
    moved: int
    """Bytes that the server received and sent."""

    @property
    def per_second(self) -> float:
        return self.updates / self.seconds


@dataclass(frozen=True)
class LiveFederation:
    server: EmbeddedServer
    coordinator: int
    workers: Sequence[int]
    store: Store
    start_standby: Callable[[], None]
    """Starts a second coordinator, and returns when it waits for the first one's lease to end."""
    keepers: Sequence[int] = ()

    def measure(self, seconds: float, at_least: int = 20) -> Figures:
        """Measure for at least `seconds`, and until `at_least` updates are merged."""
        pids = [self.coordinator, self.server.process.pid, *self.keepers, *self.workers]
        start, before, merged = time.monotonic(), [cpu_seconds(pid) for pid in pids], self.merged()
        moved = self._moved()
        while time.monotonic() < start + seconds or self.merged() < merged + at_least:
            time.sleep(0.05)
            assert all(Path(f"/proc/{pid}").exists() for pid in pids), "a process has ended"
        took, updates = time.monotonic() - start, self.merged() - merged
        moved = self._moved() - moved
        coordinator, server, *others = (cpu_seconds(p) - b for p, b in zip(pids, before, strict=True))
        keepers, workers = others[: len(self.keepers)], others[len(self.keepers) :]
        return Figures(
            took, updates, coordinator, sum(workers), sum(keepers), server,
            peak_bytes(self.coordinator), max(map(peak_bytes, self.workers)),
            max(map(peak_bytes, self.keepers), default=0), peak_bytes(self.server.process.pid),
            shared_bytes(self.coordinator), max(map(shared_bytes, self.workers)), moved,
        )  # fmt: skip

    def _moved(self) -> int:
        figures: Any = self.store.redis.info("stats")
        return int(figures["total_net_input_bytes"]) + int(figures["total_net_output_bytes"])

    def merged(self) -> int:
        """Return the number of updates in committed versions."""
        totals = self.store.redis.hget(self.store.keys.head, "totals")
        return int(msgpack.unpackb(totals)["updates"]) if totals else 0


@contextlib.contextmanager
def live_federation(
    nbytes: int,
    workers: int,
    settings: Sequence[str],
    clients: int = 0,
    profile: Path | None = None,
    forked: bool = False,
    at_work: int = 0,
    keepers: Sequence[str] = (),
    watched: Watched = "",
) -> Iterator[LiveFederation]:
    """Start `workers` processes for `clients` clients (default: one each); yield after `at_work` merged updates.

    By default, `at_work` is two for each worker. With `profile`, a profile of the coordinator is written to that file
    at the end. With `forked`, the workers are forked from one process and share that process's import of torch. Updates
    are masked where there are `keepers`, one process each. `watched` says what watches the run.
    """
    clients = clients or workers
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        server = EmbeddedServer(folder / "redis")
        stack.callback(server.stop)
        config = folder / "federation.toml"
        task = Path(__file__).parent / "instant_task.py"
        config.write_text(CONFIG.format(task=task, nbytes=nbytes, clients=clients))
        settings = [*settings, f"secure.keepers={json.dumps(list(keepers))}"]
        ports = [free_port(), free_port()] if watched else []  # where coordinator and workers serve metrics
        if watched == "all":
            settings += [*TRACKED, f"trackers.tensorboard.folder={folder / 'events'}"]
        sets = [word for setting in settings for word in ("--set", setting)]
        enroll_missing(folder / "keys", keepers, role=KEEPER)
        enroll_missing(folder / "keys", [f"client-{c}" for c in range(clients)], site=folder / "keys")
        environment = {
            "FEDQUEUE_REDIS__URL": server.url,
            "FEDQUEUE_SECURITY__KEYS": str(folder / "keys"),
            "FEDQUEUE_SECURITY__EGRESS_LOG": str(folder / "egress"),
        }

        def start(
            module: str, *arguments: str, program: Sequence[str] = (), keys: Path | None = None, log: str = ""
        ) -> int:
            command = [sys.executable, *(program or ("-m", module)), *arguments, *sets]
            own = {"FEDQUEUE_SECURITY__KEYS": str(keys)} if keys else {}
            process = child_processes.start(command, folder / (log or f"{module}.log"), {**environment, **own})
            stack.callback(child_processes.stop, [process])
            return process.pid

        profiled = [str(Path(__file__).parent / "profiled.py"), str(profile)] if profile else []
        arguments = ["coordinator", str(config), "--output", str(folder / "out")]
        coordinator = start("fedqueue_coordinator", *arguments, *_served(ports[:1]), program=profiled)
        served = [[f"client-{c}" for c in range(w, clients, workers)] for w in range(workers)]
        if forked:
            options = [word for ids in served for c in ids for word in ("--client", c)]
            pids = [start("fedqueue_worker", str(config), "--processes", str(workers), *options, *_served(ports[1:]))]
        else:
            pids = [start("fedqueue_worker", str(config), *(w for c in ids for w in ("--client", c))) for ids in served]
        started = [
            start("fedqueue_keeper", keeper, str(config), keys=folder / "keys" / KEEPER_SITES / keeper)
            for keeper in keepers
        ]

        if watched == "all":
            watchers = _watchers(server.url, ports, folder, environment)
            stack.callback(child_processes.stop, watchers)

        def start_standby() -> None:
            arguments = ["coordinator", str(config), "--output", str(folder / "standby"), "--standby"]
            start("fedqueue_coordinator", *arguments, log="standby.log")
            deadline = time.monotonic() + START_SECONDS
            while "waiting to lead" not in (log := (folder / "standby.log").read_text()):
                assert time.monotonic() < deadline, log[-2000:]
                time.sleep(0.1)

        running = LiveFederation(server, coordinator, pids, Store(connect(server.url), "bench"), start_standby, started)
        deadline = time.monotonic() + START_SECONDS
        while not _has_merged(running, at_work or 2 * workers):
            assert time.monotonic() < deadline, (folder / "fedqueue_coordinator.log").read_text()[-2000:]
            time.sleep(0.1)
        yield replace(running, workers=children(pids[0])) if forked else running


def _watchers(redis_url: str, ports: Sequence[int], folder: Path, environment: dict[str, str]) -> list[Any]:
    """Start a page with one reader, and a scraper of each port of metrics."""
    page = free_port()
    command = ["-m", "fedqueue_coordinator", "dashboard", "bench", "--redis", redis_url]
    commands = [[*command, "--address", f"127.0.0.1:{page}"]]
    urls = [f"http://127.0.0.1:{page}/api/runs/bench/events"]
    urls += [f"http://127.0.0.1:{port}/metrics" for port in ports]
    commands += [["-c", READER, url] for url in urls]
    return [
        child_processes.start([sys.executable, *words], folder / f"watcher-{number}.log", environment)
        for number, words in enumerate(commands)
    ]


def free_port() -> int:
    """A port of loopback that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _served(ports: Sequence[int]) -> list[str]:
    """Options that make a process serve metrics at a port."""
    return [word for port in ports for word in ("--metrics", str(port))]


def _has_merged(running: LiveFederation, updates: int) -> bool:
    with contextlib.suppress(redis.RedisError):
        return running.merged() >= updates
    return False


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def size_options(description: str | None, sizes: Sequence[int]) -> argparse.Namespace:
    """Parse the command line of a benchmark that measures several sizes; `--quick` means one small size, once."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small size, once, as a smoke test")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sizes", default=",".join(map(str, sizes)), help="model sizes in bytes, by commas")
    parser.add_argument("--seconds", type=float, default=8.0, help="duration of each measurement")
    parser.add_argument("--json", type=Path, help="write the rows there")
    options = parser.parse_args()
    options.sizes = [100_000] if options.quick else [int(size) for size in options.sizes.split(",")]
    if options.quick:
        options.repeats, options.seconds = 1, QUICK_SECONDS
    return options


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def peak_bytes(pid: int) -> int:
    return _bytes_of(pid, "status", "VmHWM")


def shared_bytes(pid: int) -> int:
    """Return resident bytes minus proportional bytes: the part of shared pages that counts for other processes."""
    return resident_bytes(pid) - proportional_bytes(pid)


def proportional_bytes(pid: int) -> int:
    """Return resident bytes (PSS): each page is divided by the number of processes that map it."""
    return _bytes_of(pid, "smaps_rollup", "Pss")


def resident_bytes(pid: int) -> int:
    return _bytes_of(pid, "status", "VmRSS")


def _bytes_of(pid: int, file: str, name: str) -> int:
    """Return the bytes of a line `NAME: N kB`."""
    lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Format the median, and the range if there are several values."""
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"

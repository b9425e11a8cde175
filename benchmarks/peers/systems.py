"""Runs each system: a server and clients in separate processes, over the loopback interface."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from peers.environments import APPFL, FLOWER, HERE
from peers.running import ProcessGroup, free_port, process_group

from fedqueue.errors import RunNotFound
from fedqueue.transport.connection import connect
from fedqueue.transport.store import Store
from fedqueue_coordinator.operator.access.enrolment import enroll_missing
from fedqueue_coordinator.operator.embedded_server import EmbeddedServer

PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "peer"
version = "1.0.0"
description = "A benchmark"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "fedqueue"
[tool.flwr.app.components]
serverapp = "flower_peer:server_app"
clientapp = "flower_peer:client_app"
[tool.flwr.app.config]
[tool.hatch.build.targets.wheel]
packages = ["."]
"""
FLOWER_CONFIG = """
[superlink]
default = "peers"
[superlink.peers]
address = "127.0.0.1:{port}"
insecure = true
"""
FEDQUEUE_CONFIG = """
name = "peers"
[task]
entrypoint = "{task}:PeerTask"
options = {{nbytes = {nbytes}, seed = {seed}, data = "{data}"}}
[clients]
count = {clients}
min_available = {clients}
[aggregation]
{aggregation}
[evaluation]
every_versions = 1
[checkpoint]
every_seconds = "off"
[stop]
versions = 1000000000
"""
AGGREGATION = {
    "fedasync": 'strategy = "fedasync"\nalpha = 0.6\nstaleness = {function = "polynomial", a = 0.5}',
    "fedbuff": 'strategy = "fedbuff"\nbuffer_size = 3\nstaleness = {function = "polynomial", a = 0.5}',
}


@dataclass(frozen=True)
class Work:
    """A run's work: a model of `nbytes` with instant training, or, if `nbytes` is 0, the digits in the file `data`."""

    nbytes: int
    clients: int
    mode: str
    seed: int = 0
    data: str = ""

    @property
    def environment(self) -> dict[str, str]:
        return {
            "PEERS_BYTES": str(self.nbytes), "PEERS_CLIENTS": str(self.clients), "PEERS_SEED": str(self.seed),
            "PEERS_DATA": self.data,
        }  # fmt: skip


System = Callable[[Work, Path], contextlib.AbstractContextManager[ProcessGroup]]


class Ledger(ProcessGroup):
    """A run of fedqueue, whose merged updates are read from its ledger."""

    url = ""

    def merged(self) -> list[tuple[float, float]]:
        with contextlib.suppress(RunNotFound):
            records = Store(connect(self.url), "peers").ledger()
            scores = {r["version"]: r["metrics"].get("accuracy", -1.0) for r in records if r["kind"] == "evaluation"}
            return [(r["seconds"], scores.get(r["version"], -1.0)) for r in records if r["kind"] == "version"]
        return []


@contextlib.contextmanager
def fedqueue(work: Work, folder: Path) -> Iterator[ProcessGroup]:
    """Run fedqueue as in production: server, coordinator, a worker process for each client, signatures on."""
    server = EmbeddedServer(folder / "redis")
    try:
        config = folder / "federation.toml"
        config.write_text(
            FEDQUEUE_CONFIG.format(
                task=HERE / "fedqueue_task.py", nbytes=work.nbytes, seed=work.seed, data=work.data,
                clients=work.clients, aggregation=AGGREGATION[work.mode],
            )
        )  # fmt: skip
        ids = [f"client-{i}" for i in range(work.clients)]
        enroll_missing(folder / "keys", ids, site=folder / "keys")
        environment = {
            **work.environment,
            "FEDQUEUE_REDIS__URL": server.url,
            "FEDQUEUE_SECURITY__KEYS": str(folder / "keys"),
            "FEDQUEUE_SECURITY__EGRESS_LOG": str(folder / "egress"),
        }
        with process_group(folder, environment, Ledger) as running:
            running.url = server.url
            lead = [sys.executable, "-m", "fedqueue_coordinator", "coordinator", config, "--output", folder / "out"]
            running.start("server", "coordinator", lead)
            for i, client in enumerate(ids):
                command = [sys.executable, "-m", "fedqueue_worker", config, "--client", client]
                running.start("client", f"worker-{i}", command)
            yield running
    finally:
        server.stop()


def _appfl(fast: bool) -> System:
    @contextlib.contextmanager
    def system(work: Work, folder: Path) -> Iterator[ProcessGroup]:
        environment = {
            **work.environment, "PEERS_PORT": str(free_port()), "PEERS_FAST": str(int(fast)), "PYTHONPATH": APPFL.path,
        }  # fmt: skip
        script = HERE / "appfl_peer.py"
        with process_group(folder, environment, ProcessGroup) as running:
            running.start("server", "server", [APPFL.python, script, "server", work.mode])
            while not _listens(int(environment["PEERS_PORT"])):
                running.require_alive()
                time.sleep(0.2)
            for i in range(work.clients):
                running.start("client", f"client-{i}", [APPFL.python, script, "client", i])
            yield running

    return system


@contextlib.contextmanager
def flower(work: Work, folder: Path) -> Iterator[ProcessGroup]:
    """Run SuperLink and one SuperNode for each client; Flower isolates each message in a new process."""
    port = free_port()
    app = folder / "app"
    app.mkdir()
    (app / "pyproject.toml").write_text(PYPROJECT)
    for name in ("flower_peer.py", "work.py"):
        shutil.copy(HERE / name, app)
    (folder / "home").mkdir()
    (folder / "home" / "config.toml").write_text(FLOWER_CONFIG.format(port=port))
    binaries = FLOWER.python.parent
    environment = {
        **work.environment, "FLWR_HOME": str(folder / "home"), "FLWR_TELEMETRY_ENABLED": "0",
        "PATH": f"{binaries}:/usr/bin:/bin",
    }  # fmt: skip
    with process_group(folder, environment, ProcessGroup) as running:
        link = [
            binaries / "flower-superlink",
            "--insecure",
            "--port",
            port,
            "--disable-runtime-dependency-installation",
        ]
        running.start("server", "superlink", link)
        while not _listens(port):
            running.require_alive()
            time.sleep(0.2)
        for i in range(work.clients):
            node = [binaries / "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}"]
            node += ["--port", free_port(), "--node-config", f"partition-id={i} num-partitions={work.clients}"]
            running.start("client", f"supernode-{i}", node)
        running.start("operator", "run", [binaries / "flwr", "run", app, "peers"])
        yield running


def _listens(port: int) -> bool:
    needle = f":{port:04X} "
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            words = line.split()
            if (words[1] + " ").endswith(needle) and words[3] == "0A":
                return True
    return False


SYSTEMS: dict[str, System] = {
    "fedqueue": fedqueue,
    "appfl": _appfl(fast=False),
    "appfl made fast": _appfl(fast=True),
    "flower": flower,
}

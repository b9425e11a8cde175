"""Trains a federation in which each part has its own Redis user and no process can unpickle anything."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedqueue.transport.store import Store
from fedqueue_coordinator.operator.access.enrolment import enroll_missing
from tests.support import no_unpickling, toy_task
from tests.support.acl_server import AclServer

pytestmark = [pytest.mark.slow, pytest.mark.server]

NO_UNPICKLING = Path(no_unpickling.__file__).parent
PYTHONPATH = os.pathsep.join([str(NO_UNPICKLING), *filter(None, [os.environ.get("PYTHONPATH")])])
CONFIG = f"""
name = "guarded"
[task]
entrypoint = "{toy_task.__file__}:ToyTask"
[clients]
names = ["north", "site.example.org"]
min_available = 2
[aggregation]
buffer_size = 2
[compression]
uplink = "int8"  # merged by a compiled loop, whose compiler unpickles nothing either
[stop]
versions = 8
"""


def launch(folder: Path, url: str, *words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "FEDQUEUE_REDIS__URL": url, "PYTHONPATH": PYTHONPATH}
    return subprocess.Popen(
        [sys.executable, "-m", *words], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def test_processes_of_the_run_cannot_unpickle(tmp_path: Path) -> None:
    data = pickle.dumps([1])
    for attempt in ("pickle.loads(data)", "pickle.Unpickler(io.BytesIO(data)).load()", "pickle.load(io.BytesIO(data))"):
        child = subprocess.run(
            [sys.executable, "-c", f"import io, pickle; data = {data!r}; {attempt}"],
            env={**os.environ, "PYTHONPATH": PYTHONPATH}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert "something was unpickled" in child.stderr, attempt


def test_federation_under_acls_trains_without_denials_or_pickle(tmp_path: Path) -> None:
    (tmp_path / "federation.toml").write_text(CONFIG)
    enroll_missing(tmp_path / "keys", ["north", "site.example.org"], site=tmp_path / "keys")
    server = AclServer(tmp_path, "guarded", ["north", "site.example.org"])
    try:
        workers = [
            launch(tmp_path, server.urls[f"worker-{c}"], "fedqueue_worker", "federation.toml", "--client", c)
            for c in ("north", "site.example.org")
        ]
        coordinator = launch(
            tmp_path, server.urls["coordinator"], "fedqueue_coordinator", "coordinator", "federation.toml",
            "--output", "out",
        )  # fmt: skip
        viewer = Store(server.user("viewer"), "guarded")
        seen = set()
        while coordinator.poll() is None:
            if viewer.redis.exists(viewer.keys.head):
                seen.update(viewer.alive_clients())
            time.sleep(0.05)
        said, _ = coordinator.communicate()
        assert coordinator.returncode == 0, said
        for worker in workers:
            said, _ = worker.communicate(timeout=30)
            assert worker.returncode == 0, said
            assert "unpickled" not in said
        assert seen == {"north", "site.example.org"}
        assert server.denied() == []
        summary = json.loads((tmp_path / "out" / "summary.json").read_text())
        assert (summary["versions"], summary["updates_merged"]) == (8, 16)
    finally:
        server.stop()

"""`fedqueue-worker --processes`: a parent that imports everything, and the workers forked from the parent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.waiting import alive, wait_until, wait_until_ended

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

FAMILY = """
import json, os, signal, sys, time, uuid
from pathlib import Path
import numpy as np, random
from fedqueue_worker import prefork
from fedqueue.logs import rotate
from fedqueue_worker.prefork import fork
from tests.support.waiting import wait_until
from fedqueue_worker.process import new_token
logs, until = Path(sys.argv[1]), sys.argv[2]
prefork.GRACE_SECONDS = 1
if until == "large":
    prefork.LOG_SECONDS = 0.01
    prefork.rotate = lambda log: rotate(log, limit=200_000)
number = prefork.number_of_this_child()
if number is None:
    number = fork(3, logs, fresh=until == "fresh")
if until == "large" and number == 1:
    for _ in range(50):
        print("x" * 100_000, flush=True)
        time.sleep(0.02)
    wait_until(lambda: (logs / "worker-1.log").stat().st_size < 200_000, "the log is begun again")
if until == "killed" and number == 1:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(json.dumps([number, os.getpid(), new_token(), random.random(), np.random.random()]), flush=True)
if until != "end":
    while True:
        time.sleep(0.1)
if number == 1:
    sys.exit(3)
"""


@pytest.fixture
def family(tmp_path: Path) -> Iterator[Any]:
    """Start a parent of three workers; return the parent, and the output of each child once all three have printed."""
    started = []

    def start(until: Any) -> tuple[Any, ...]:
        parent = subprocess.Popen(
            [sys.executable, "-c", FAMILY, str(tmp_path / "logs"), until], stderr=subprocess.PIPE, text=True
        )
        started.append(parent)
        logs = [tmp_path / "logs" / f"worker-{i}.log" for i in range(3)]
        wait_until(
            lambda: all(log.exists() and log.read_text().endswith("]\n") for log in logs), "each child has printed"
        )
        return parent, [json.loads(log.read_text().splitlines()[-1]) for log in logs]

    yield start
    for parent in started:
        parent.kill()
        parent.communicate()


def test_children_differ_in_log_token_and_random_numbers(family: Any) -> None:
    parent, children = family("end")
    _, err = parent.communicate(timeout=60)
    assert [child[0] for child in children] == [0, 1, 2]
    for values in zip(*children, strict=True):
        assert len(set(values)) == 3
    assert parent.returncode == 3, "the exit code is not the worst of 0, 3 and 0"
    said = err.splitlines()
    assert f"worker 1 (pid {children[1][1]}) ended with 3: {json.dumps(children[1])}" in said
    assert len(said) == 3


def test_child_may_execute_the_command_again(family: Any) -> None:
    parent, children = family("fresh")
    assert [child[0] for child in children] == [0, 1, 2]
    parent.send_signal(signal.SIGTERM)
    _, err = parent.communicate(timeout=60)
    assert (parent.returncode, err) == (1, "")  # ended by the signal's default action


def test_log_of_a_child_that_prints_much_is_bounded(family: Any, tmp_path: Path) -> None:
    parent, children = family("large")
    assert children[1][0] == 1
    logs = tmp_path / "logs"
    assert sum(log.stat().st_size for log in logs.iterdir()) < 2_000_000
    assert (logs / "worker-1.log.1").stat().st_size == 200_000
    assert not (logs / "worker-0.log.1").exists()
    parent.send_signal(signal.SIGTERM)
    assert parent.communicate(timeout=60)[1] == ""


def test_killed_child_is_reported_and_sigterm_ends_the_others(family: Any) -> None:
    parent, children = family("signal")
    pids = [child[1] for child in children]
    os.kill(pids[2], signal.SIGKILL)
    line = parent.stderr.readline()
    assert line.startswith(f"worker 2 (pid {pids[2]}) ended with -9: [2, ")
    assert alive(pids[0])
    assert alive(pids[1])
    parent.send_signal(signal.SIGTERM)
    _, err = parent.communicate(timeout=60)
    assert (parent.returncode, err) == (1, ""), "the parent reported children that it had told to end"
    assert not any(map(alive, pids))


def test_child_that_ignores_sigterm_is_killed(family: Any) -> None:
    parent, children = family("killed")
    parent.send_signal(signal.SIGTERM)
    _, err = parent.communicate(timeout=60)
    assert (parent.returncode, err) == (1, "")
    assert not any(alive(child[1]) for child in children)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_children_end_when_their_parent_is_killed(family: Any) -> None:
    parent, children = family("signal")
    parent.kill()
    wait_until_ended([child[1] for child in children])

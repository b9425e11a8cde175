"""Measures the cost of dying clients: updates per second and time to target while 0 to 50 % of the jobs die.

    python benchmarks/dropout.py [--quick] [--seeds 3] [--json FILE]

Real processes: a coordinator, and eight workers on the digits task whose batches take so long that a job lasts four
times the lease. A dying job kills its worker's process (SIGKILL) at a uniformly random batch; a supervisor starts the
next worker at once, which serves the client after its predecessor's lease expires. Workers are forked from a process
that has imported torch, so a restart costs milliseconds.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import logging
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fedqueue import Task, TrainResult
from fedqueue.config.loading import load_config
from fedqueue.config.schema import Config
from fedqueue.errors import ClientTaken
from fedqueue.logs import configure_logging
from fedqueue.task import load_task
from fedqueue.transport.connection import connect
from fedqueue.transport.worker_store import WorkerStore
from fedqueue_coordinator.core.run_summary import RunResult, summarize
from fedqueue_coordinator.operator.embedded_server import EmbeddedServer
from fedqueue_coordinator.service.coordinator import Coordinator
from fedqueue_coordinator.service.coordinator_store import CoordinatorStore, new_owner
from fedqueue_worker.process import Worker, new_token

EXAMPLE = Path(__file__).parents[1] / "examples" / "digits" / "federation.toml"
JOB_SECONDS = 4.0
SETTINGS = ["dispatch.lease_seconds=1", "clients.min_available=8", "checkpoint.every_seconds=off"]


def measure(dying: float, seed: int, limit: str) -> dict[str, Any]:
    """Measure one run; `limit` is a further stop condition besides the target, as a --set value."""
    config = load_config(EXAMPLE, [*SETTINGS, f"seed={seed}", limit])
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        server = EmbeddedServer(Path(folder) / "redis")
        stack.callback(server.stop)
        command = [sys.executable, __file__, "--worker-parent", server.url, "--dying", str(dying), "--seed", str(seed)]
        worker_parent = subprocess.Popen(command, start_new_session=True)
        stack.callback(_end, worker_parent)
        task = load_task(config.task.entrypoint, config.task.options, EXAMPLE.parent)
        store = CoordinatorStore(connect(server.url), config.name, new_owner())
        result = Coordinator(config, task, store, Path(folder)).run()
        assert result is not None
    return figures(dying, seed, config, result)


def figures(dying: float, seed: int, config: Config, result: RunResult) -> dict[str, Any]:
    """Return the figures of a run from the first arrival on, so that the start of the workers is left out."""
    summary = summarize(config.name, config.aggregation.strategy, seed, "", result.ledger, result.refused)
    arrivals = [line["at"] for r in result.ledger if r["kind"] == "version" for line in r["merged"]]
    started = min(arrivals) - JOB_SECONDS
    seconds = summary["seconds"] - started
    died = summary["abandoned_because"].get("lapsed", 0)
    return {
        "dying": dying,
        "seed": seed,
        "seconds_to_target": round(seconds, 2) if result.stopped_because.startswith("target") else None,
        "updates_per_second": round(len(arrivals) / seconds, 3),
        "merged": len(arrivals),
        "died": died,
        "died_share": round(died / (died + len(arrivals)), 3),
    }


# The parent of the workers: forks them, and replaces each that dies


def worker_parent(url: str, dying: float, seed: int) -> None:
    config = load_config(EXAMPLE, [*SETTINGS, f"seed={seed}"])
    task = load_task(config.task.entrypoint, config.task.options, EXAMPLE.parent)
    for client in config.clients.ids:  # import and read before the first fork, so that each worker need not
        task.train_data(config.clients.client(client))
    torch.optim.SGD(task.model().parameters(), lr=0.1)
    children: dict[int, str] = {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        for client in config.clients.ids:
            children[_fork(functools.partial(_work, config, task, url, client, dying))] = client
        while True:
            pid, status = os.wait()
            client = children.pop(pid)
            if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
                continue  # the run has ended
            children[_fork(functools.partial(_work, config, task, url, client, dying))] = client
    except ChildProcessError:
        return
    finally:
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _fork(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


def _work(config: Config, task: Task, url: str, client: str, dying: float) -> None:
    configure_logging(level=logging.ERROR)
    task = mortal(task, dying)
    while True:
        try:
            Worker(config, task, WorkerStore(connect(url), config.name, new_token())).run([[client]])
            return
        except ClientTaken:  # the lease of the dead worker has not expired
            time.sleep(0.02)


def mortal(task: Any, dying: float) -> Any:
    """Return `task` with slow batches, in a process that may die in the middle of a job."""
    chance = random.Random()
    fit = task.fit

    def mortal_fit(model: Any, data: Any, config: Any, progress: Callable[[], None]) -> TrainResult:
        batches = config.local_epochs * -(-len(data) // config.batch_size)
        dies_at = chance.randrange(batches) if chance.random() < dying else -1
        done = 0

        def slow_progress() -> None:
            nonlocal done
            if done == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(JOB_SECONDS / batches)
            done += 1
            progress()

        trained: TrainResult = fit(model, data, config, slow_progress)
        return trained

    task.fit = mortal_fit
    return task


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two settings, eight versions, as a smoke test")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write every run's figures there")
    parser.add_argument("--worker-parent", help=argparse.SUPPRESS)
    parser.add_argument("--dying", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker_parent:
        worker_parent(options.worker_parent, options.dying, options.seed)
        return
    configure_logging(level=logging.ERROR)
    shares = (0.0, 0.3) if options.quick else (0.0, 0.1, 0.3, 0.5)
    seeds = range(1 if options.quick else options.seeds)
    limit = "stop.versions=8" if options.quick else "stop.seconds=240"
    runs = []
    for seed in seeds:  # settings take turns, so that a change in the machine's speed affects all of them
        for dying in shares:
            runs.append(measure(dying, seed, limit))
            print(json.dumps(runs[-1]), flush=True)
    print(table(runs))
    if options.json:
        options.json.write_text(json.dumps(runs, indent=2) + "\n")


def table(runs: list[dict[str, Any]]) -> str:
    """Make a table of medians over the seeds, with the range, and the ratio to a run without deaths."""
    lines = [
        "| jobs dying, set | died | updates/s | seconds to target | ratio to no deaths |",
        "|---|---|---|---|---|",
    ]
    base = _times(runs, 0.0)
    for dying in sorted({run["dying"] for run in runs}):
        mine = [run for run in runs if run["dying"] == dying]
        rate = statistics.median(run["updates_per_second"] for run in mine)
        died = statistics.mean(run["died_share"] for run in mine)
        times = _times(runs, dying)
        reached = (
            f"{statistics.median(times):.1f} ({min(times):.1f} to {max(times):.1f})" if times else "not run so far"
        )
        ratio = f"{statistics.median(times) / statistics.median(base):.2f}" if times and base else ""
        lines.append(f"| {dying:.0%} | {died:.0%} | {rate:.2f} | {reached} | {ratio} |")
    return "\n".join(lines)


def _times(runs: list[dict[str, Any]], dying: float) -> list[float]:
    return [r["seconds_to_target"] for r in runs if r["dying"] == dying and r["seconds_to_target"] is not None]


if __name__ == "__main__":
    main()

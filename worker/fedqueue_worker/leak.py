"""`fedqueue-worker --leak`: what a client's own update tells, measured at its site, without Redis."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from fedqueue.config.schema import Config
from fedqueue.errors import ConfigurationError
from fedqueue.leak.measurement import above
from fedqueue.leak.rehearsal import JOBS, rehearse
from fedqueue.leak.report import print_table, write_leak
from fedqueue.local_update import load_data
from fedqueue.task import load_task, prepare_task
from fedqueue_worker.policy import Policy


def measure_own_leak(
    config: Config, folder: Path, candidates: Sequence[Sequence[str]], policy: Policy, output: Path
) -> bool:
    """Measure each client; print the table, and write leak.json and leak.png to `output` (of several: output/CLIENT).

    Returns whether the policy's `max_leak` holds. Raises ConfigurationError where a client is not named.
    """
    if any(len(options) != 1 for options in candidates):
        raise ConfigurationError("--leak", str(output), "needs a client", "name the site's own with --client ID")
    policy.check_task(config.task.entrypoint)
    torch.set_num_threads(config.training.threads)
    task = load_task(config.task.entrypoint, config.task.options, folder)
    prepare_task(task, config)
    progress, allowed = Console(stderr=True, highlight=False, markup=False), True
    for client in (config.clients.client(options[0]) for options in candidates):
        data, _ = load_data(task, client, config.seed)

        def say(job: int, name: str = client.id) -> None:
            progress.print(f"{name}: training rehearsal {job + 1} of {JOBS}; nothing is sent", soft_wrap=True)

        done = rehearse(config, task, client, data, on_job=say)
        about = {
            "subject": config.name, "kind": "site", "client": client.id, "batch_size": config.training.batch_size,
            "local_epochs": config.training.local_epochs, "local_steps": config.training.local_steps,
            "control_rows": done.control, "updates_attacked": JOBS, "reference_models": 0,
        }  # fmt: skip
        title = f"{client.id} in {config.name}: what an update tells"
        where = output / client.id if len(candidates) > 1 else output
        written = write_leak(where, title, about, done.measurements, done.galleries)
        print_table(Console(highlight=False, markup=False), title, about, done.measurements, written)
        for line in above(done.measurements, policy.max_leak):
            allowed = False
            progress.print(f"fedqueue: {client.id} would not join: max_leak: {line}", soft_wrap=True)
    return allowed

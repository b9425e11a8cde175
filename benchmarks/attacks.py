"""Measures accuracy on digits with hostile clients, with and without a defence; writes the table of docs/robustness.md.

    .venv/bin/python benchmarks/attacks.py --seeds 1

The coordinator's state machine and the training are those of a real run. The seed decides which open job is posted
next. Time is counted in updates, so no result depends on the machine's speed.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import TensorDataset

from fedqueue.config.loading import parse_config
from fedqueue.config.schema import Config
from fedqueue.protocol.messages import Update
from fedqueue.protocol.stream_entry import StreamEntry
from fedqueue.task import Progress, Task, load_task
from fedqueue.tensors.blobs import chunks_of
from fedqueue.tensors.frame import Frame
from fedqueue_coordinator.core.events import (
    Action,
    ClientJoined,
    Commit,
    Dispatch,
    Event,
    Load,
    Tick,
    UpdateArrived,
    UpdateLoaded,
)
from fedqueue_coordinator.core.federation import Federation, initial_model

DIGITS = Path(__file__).parents[1] / "examples" / "digits"
CLIENTS, BUFFER, HOSTILE = 10, 10, (1, 3)
SECONDS_PER_UPDATE = 0.1  # by the run's clock, in which backoffs and quarantines are counted


def sign_flip(update: Frame) -> None:
    update.parameters.neg_()


def scaled(update: Frame) -> None:
    update.parameters.mul_(-10.0)


def not_a_number(update: Frame) -> None:
    update.parameters[:] = float("nan")


def honest(update: Frame) -> None:
    pass


ATTACKS: dict[str, Callable[[Frame], None]] = {
    "sign-flip": sign_flip,
    "scaled by −10": scaled,
    "label-flip": honest,  # the attack is in the data: see `labels`
    "NaN": not_a_number,
}
ASYNC: dict[str, Any] = {"strategy": "fedasync", "mixing": "delta", "alpha": 0.3}
FILTER = {"norm_factor": 3.0, "min_cosine": 0.0, "warmup": 10, "strikes": 3, "quarantine_seconds": 5.0}
FLAT: dict[str, Any] = {"strategy": "fedbuff", "buffer_size": BUFFER}
DEFENCES: dict[str, dict[str, Any]] = {
    "FedBuff, mean": FLAT,
    "norm clipping": {**FLAT, "robust": {"rule": "norm_clipping"}},
    "median": {**FLAT, "robust": {"rule": "median"}},
    "trimmed mean": {**FLAT, "robust": {"rule": "trimmed_mean", "byzantine": 3}},
    "Krum": {**FLAT, "robust": {"rule": "krum", "byzantine": 3}},
    "Multi-Krum": {**FLAT, "robust": {"rule": "multi_krum", "byzantine": 3}},
    "geometric median": {**FLAT, "robust": {"rule": "geometric_median"}},
    "FedAsync": ASYNC,
    "FedAsync, filter": {**ASYNC, "filter": FILTER},
}


@dataclass
class Job:
    name: str
    client: str
    number: int
    base: int


class Sites:
    """Simulates the coordinator, honest clients and hostile clients in one process."""

    def __init__(self, config: Config, task: Task, attack: str, hostile: int) -> None:
        self.config, self.task, self.attack = config, task, attack
        self.hostile = set(config.clients.ids[:hostile])
        torch.manual_seed(config.seed)
        self._module = task.model()
        first = initial_model(config, self._module)
        self.federation = Federation(config, first, evaluates=False)
        self._versions = {0: first.copy()}
        self._data = {c: self._examples(c) for c in config.clients.ids}
        self._open: list[Job] = []
        self._rng = random.Random(config.seed)
        self._now = 0.0

    def run(self, updates: int) -> float:
        """Return the accuracy after `updates` received updates, including hostile and rejected ones."""
        for client, data in self._data.items():
            self._tell(ClientJoined(client, len(data)))
        for count in range(updates):
            self._now = count * SECONDS_PER_UPDATE
            self._tell(Tick())
            if self._open:
                self._post(self._open.pop(self._rng.randrange(len(self._open))), str(count))
        self.federation.model.write(self._module)
        test = self.task.test_data()
        with torch.no_grad():
            scores = self._module.eval()(test.tensors[0])
        return float((scores.argmax(1) == test.tensors[1]).float().mean())

    def _examples(self, client: str) -> TensorDataset:
        images, labels = self.task.train_data(self.config.clients.client(client)).tensors
        lies = self.attack == "label-flip" and client in self.hostile
        return TensorDataset(images, 9 - labels if lies else labels)

    def _post(self, job: Job, entry: str) -> None:
        base, data = self._versions[job.base], self._data[job.client]
        base.write(self._module)
        torch.manual_seed(self.config.seed * 1_000_003 + job.number)
        fit = self.task.fit(self._module, data, self.config.training, Progress())
        update = Frame(base.manifest)
        update.read_update(self._module, base)
        if job.client in self.hostile:
            ATTACKS[self.attack](update)
        nbytes = update.buffer.nbytes
        header = Update(examples=fit.num_examples, nbytes=nbytes, chunks=chunks_of(nbytes), seconds=0.0)
        posted = StreamEntry(entry, "update", header.pack(), job.client, job.name, 1, job.base)
        for load in self._tell(UpdateArrived(posted, posted.body)):
            self._tell(UpdateLoaded(load, update, base))

    def _tell(self, event: Event) -> list[Load]:
        return list(self._do(self.federation.handle(event, self._now)))

    def _do(self, actions: list[Action]) -> Iterator[Load]:
        for action in actions:
            match action:
                case Dispatch(name, number, client):
                    self._open.append(Job(name, client, number, self.federation.version))
                case Commit(version):
                    self._versions[version] = self.federation.model.copy()
                case Load():
                    yield action


def accuracy(defence: str, attack: str, hostile: int, scheme: str, seed: int, updates: int) -> float:
    task = load_task("task.py:DigitsTask", {"scheme": scheme, "alpha": 0.5, "seed": seed}, DIGITS)
    config = parse_config(
        {
            "task": {"entrypoint": "task.py:DigitsTask"},
            "seed": seed,
            "clients": {"count": CLIENTS, "min_available": CLIENTS},
            "training": {"learning_rate": 0.3, "local_epochs": 2},
            "aggregation": DEFENCES[defence],
            "stop": {"versions": 1_000_000},
        }
    )
    return Sites(config, task, attack, hostile).run(updates)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seeds", type=int, default=1)
    options.add_argument("--updates", type=int, default=200)
    options.add_argument("--schemes", nargs="+", default=["iid", "dirichlet"])
    chosen = options.parse_args()
    torch.set_num_threads(1)
    cases = [("label-flip", 0), *((attack, hostile) for attack in ATTACKS for hostile in HOSTILE)]
    heads = ["none", *(f"{attack} {hostile}/{CLIENTS}" for attack, hostile in cases[1:])]
    for scheme in chosen.schemes:
        print(f"\n{scheme}, accuracy in percent after {chosen.updates} updates, seeds {chosen.seeds}\n")
        print(f"| | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}")
        for defence in DEFENCES:
            row = []
            for attack, hostile in cases:
                got = [accuracy(defence, attack, hostile, scheme, seed, chosen.updates) for seed in range(chosen.seeds)]
                spread = f" ± {100 * statistics.stdev(got):.1f}" if len(got) > 1 else ""
                row.append(f"{100 * statistics.mean(got):.1f}{spread}")
            print(f"| {defence} | {' | '.join(row)} |")
            sys.stdout.flush()


if __name__ == "__main__":
    main()

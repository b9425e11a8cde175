"""Measures the arithmetic of secure aggregation, one thread: nanoseconds per parameter, beside the machine's triad.

    python benchmarks/secure_kernels.py [--quick] [--repeats 5] [--json FILE]

Triad is `torch.add(a, b, out=c)` over float32 arrays larger than the cache: 12 bytes move for each element. Triad and
each step take turns. A keeper's sum is stated for each update of its cohort.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from live_federation import spread
from merge import LENGTH, seconds

from fedqueue.config.schema import Config
from fedqueue.secure.masks import ROUNDING, MaskStream, add_masks, new_seed, weighted_mask_sum
from fedqueue.secure.ring import ring_of
from fedqueue.tensors.frame import Frame
from fedqueue.tensors.manifest import PARAMETER, Manifest, TensorSpec
from fedqueue_coordinator.algorithms.masked_sum import MaskedSum
from fedqueue_coordinator.algorithms.registry import make_aggregator

KEEPERS = ("north", "south")
COHORT = 10


class Steps:
    """The steps of one update and of one version, for a model of `length` parameters, with two keepers."""

    def __init__(self, length: int) -> None:
        config = Config(
            task={"entrypoint": "task.py:T"}, stop={"versions": 1}, clients={"count": COHORT},
            aggregation={"buffer_size": COHORT}, secure={"keepers": KEEPERS},
        )  # fmt: skip
        manifest = Manifest((TensorSpec("w", "float32", (length,), 0, length, PARAMETER),))
        self._ring = ring_of(config, manifest)
        self._aggregator = make_aggregator(config)
        self._model = Frame(manifest)
        self._delta = (torch.randn(length) * 1e-3).numpy()
        self._scratch = self._delta.copy()
        self._masked = np.frombuffer(os.urandom(4 * length), np.uint32)
        self._accumulator = self._aggregator.init(manifest)
        self._sum = MaskedSum(self._accumulator, self._ring, config)
        self._seeds = [new_seed() for _ in range(COHORT)]

    def all(self) -> dict[str, tuple[Callable[[], object], int]]:
        """Each step, with the number of updates that it serves."""
        return {
            "site: clip and round": (self._quantize, 1),
            "site: add two masks": (self._mask, 1),
            "coordinator: add an update": (self._add, 1),
            "keeper: sum of masks, for each update": (self._answer, COHORT),
            "coordinator: take off one keeper's masks": (self._subtract, 1),
            "coordinator: norm and step": (self._finish, 1),
        }

    def _quantize(self) -> None:
        self._scratch[:] = self._delta
        self._ring.quantize(self._scratch, MaskStream(self._seeds[0], ROUNDING).next_into)

    def _mask(self) -> None:
        add_masks(self._scratch.view(np.int32), self._seeds[: len(KEEPERS)])

    def _add(self) -> None:
        self._sum.weight = 0
        self._accumulator.updates = 1  # so that the update is not the first of its buffer, and is added
        self._sum.add([self._masked], 7, 1, 0)

    def _answer(self) -> None:
        for _ in weighted_mask_sum(self._seeds, [7] * COHORT, self._ring.parameters, self._seeds[0], self._ring.dither):
            pass

    def _subtract(self) -> None:
        self._sum.subtract([self._masked])

    def _finish(self) -> None:
        self._sum.norm()
        self._sum.finish(self._aggregator, self._model)


def measure(length: int, repeats: int) -> list[dict[str, Any]]:
    steps = Steps(length).all()
    a, b, c = (torch.rand(length) for _ in range(3))
    rows: dict[str, dict[str, Any]] = {name: {"step": name, "ns": [], "triads": []} for name in steps}
    for step, _ in steps.values():
        step()
    for _ in range(repeats):
        for name, (step, updates) in steps.items():
            triad = min(seconds(lambda: torch.add(a, b, out=c)) for _ in range(3))
            took = min(seconds(step) for _ in range(3)) / updates
            rows[name]["ns"].append(took / length * 1e9)
            rows[name]["triads"].append(took / triad)
    return list(rows.values())


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| step | ns per parameter | triads |", "|---|---|---|"]
    lines += [f"| {row['step']} | {spread(row['ns'])} | {spread(row['triads'])} |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, once, as a smoke test")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the rows there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    length, repeats = (100_000, 1) if options.quick else (LENGTH, options.repeats)
    rows = measure(length, repeats)
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""What [privacy.examples] costs in accuracy: the two examples at several ε, under the virtual clock.

    python benchmarks/row_privacy.py                                        both tables, three seeds each
    python benchmarks/row_privacy.py --quick                                one row, of one seed

Each client may train JOBS jobs, with the same settings at every ε: batches, steps, learning rate and C were chosen at
ε = 3 on another seed. "none" is as many updates without clipping and noise, with the example's own settings. A seed
decides the initial model, the partition or the split into training and test rows, and the noise.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import structlog
import torch

from fedqueue.config.loading import load_config
from fedqueue.task import load_task
from fedqueue_coordinator.simulation.virtual_clock import ClientDatasets, Simulation, TimingModel

ROOT = Path(__file__).resolve().parents[1]
JOBS = 20
DELTA = 1e-4
EPSILONS = ("1", "3", "8", "none")
SETTINGS: dict[str, tuple[int, float, tuple[str, ...], str, tuple[str, ...]]] = {
    "digits": (
        8, 1.5, ("accuracy", "loss"), "stop.target={}",
        ("training.batch_size=128", "training.local_steps=2", "training.learning_rate=1.0"),
    ),
    "hospitals": (
        4, 0.5, ("accuracy", "auc", "loss"), "task.options={central_test = true, usual_scaling = true}",
        ("training.batch_size=32", "training.local_steps=8", "training.learning_rate=0.5"),
    ),
}  # fmt: skip
"""Example → clients, C, metrics, a setting of every run, and settings of the training with noise."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table in Markdown for each example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--example", choices=SETTINGS, action="append")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epsilon", choices=EPSILONS, action="append")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    if options.quick:
        options.example, options.seeds, options.epsilon = ["hospitals"], 1, ["8"]
    torch.set_num_threads(1)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    for example in options.example or SETTINGS:
        metrics = SETTINGS[example][2]
        print(f"\n| {example}: ε of each client | noise multipliers | {' | '.join(metrics)} |")
        print("|---|---|" + "---|" * len(metrics))
        for epsilon in options.epsilon or EPSILONS:
            ends, noises = zip(*(run(example, epsilon, seed) for seed in range(options.seeds)), strict=True)
            cells = [mean_and_deviation([end[name] for end in ends]) for name in metrics]
            every = [noise for of_seed in noises for noise in of_seed]
            noise = f"{min(every):.1f} to {max(every):.1f}" if every else "0"
            print(f"| {epsilon} | {noise} | {' | '.join(cells)} |", flush=True)


def run(example: str, epsilon: str, seed: int) -> tuple[dict[str, float], list[float]]:
    """Simulate a run; return the metrics of its last version, and the noise multiplier of each client."""
    clients, clip_norm, _, always, with_noise = SETTINGS[example]
    updates = JOBS * clients
    overrides = [
        f"seed={seed}", always, f"task.options.seed={seed}", "training.device=cpu", "stop.seconds=off",
        f"evaluation.every_versions={updates // 4}", f"stop.versions={updates // 4}",
    ]  # fmt: skip
    if epsilon != "none":
        overrides += with_noise
        overrides += [
            f"privacy.examples.{key}={value}"
            for key, value in {"epsilon": epsilon, "jobs": JOBS, "delta": DELTA, "max_grad_norm": clip_norm}.items()
        ]
    config = load_config(ROOT / "examples" / example / "federation.toml", overrides, {})
    task = load_task(config.task.entrypoint, config.task.options, config.folder)
    simulation = Simulation(config, ClientDatasets(task), TimingModel())
    end = simulation.run().history[-1]
    return end, [entry.noise_multiplier for spent in simulation.spent.values() for entry in spent.entries]


def mean_and_deviation(values: Sequence[float]) -> str:
    """Return the mean and the standard deviation of the values, which are one for each seed."""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


if __name__ == "__main__":
    main()

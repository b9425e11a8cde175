"""What differential privacy costs in accuracy: of rows at the sites, and of whole clients, at several ε.

    python benchmarks/privacy_utility.py --json utility.json --picture utility.png
    python benchmarks/privacy_utility.py --quick                                    one cell of one seed

Simulations of digits and Fashion-MNIST with 8 and with 100 clients, and of the hospitals. Each client may train JOBS
jobs. "rows" is [privacy.examples]; "clients" is [privacy.clients] with one keeper, which adds the noise once. Each
of the two has training settings of its own, which are the same at every ε. "nothing" is as many jobs with the settings
of "clients", without clipping and noise. A seed decides the initial model, the partition, and the noise.

Cells that the file of --json has are not measured again, so that a run that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import torch
from fashion_task import is_installed

from fedqueue.config.loading import load_config
from fedqueue.task import load_task
from fedqueue_coordinator.simulation.virtual_clock import ClientDatasets, Simulation, TimingModel

ROOT = Path(__file__).resolve().parents[1]
JOBS = 20
DELTA = 1e-4
EPSILONS = ("1", "3", "8")
NOTHING = "nothing"
PROTECTIONS = ("rows", "clients")
DIGITS, HOSPITALS = (ROOT / "examples" / name / "federation.toml" for name in ("digits", "hospitals"))
FASHION = f"task.entrypoint={ROOT / 'benchmarks' / 'fashion_task.py'}:FashionTask"


@dataclass(frozen=True)
class Federation:
    """The settings of one federation."""

    config: Path
    clients: int
    buffer: int
    always: Sequence[str]
    protected: Mapping[str, tuple[float, Sequence[str]]]
    """Protection → the clip norm, and settings of the training."""


def steps(batch: int, count: int, rate: float) -> list[str]:
    return [f"training.batch_size={batch}", f"training.local_steps={count}", f"training.learning_rate={rate}"]


FEDERATIONS = {
    "digits, 8 clients": Federation(
        DIGITS, 8, 4, ["clients.count=8"], {"rows": (1.5, steps(128, 2, 1.0)), "clients": (0.5, steps(32, 8, 0.1))},
    ),
    "digits, 100 clients": Federation(
        DIGITS, 100, 50, ["clients.count=100", "task.options.alpha=100"],
        {"rows": (1.5, steps(14, 2, 0.5)), "clients": (0.5, steps(14, 4, 0.3))},
    ),
    "hospitals, 4 clients": Federation(
        HOSPITALS, 4, 4, ["task.options.central_test=true", "task.options.usual_scaling=true"],
        {"rows": (0.5, steps(32, 8, 0.5)), "clients": (0.5, steps(32, 8, 0.05))},
    ),
    "Fashion-MNIST, 8 clients": Federation(
        DIGITS, 8, 4, ["clients.count=8", "task.options={}", FASHION],
        {"rows": (1.0, steps(256, 4, 0.5)), "clients": (0.5, steps(64, 20, 0.1))},
    ),
    "Fashion-MNIST, 100 clients": Federation(
        DIGITS, 100, 50, ["clients.count=100", "task.options={}", FASHION],
        {"rows": (1.0, steps(128, 2, 0.5)), "clients": (0.5, steps(64, 10, 0.1))},
    ),
}  # fmt: skip


def run(name: str, protection: str, epsilon: str, seed: int) -> dict[str, Any]:
    """Simulate a run; return its last accuracy and its number of versions."""
    federation = FEDERATIONS[name]
    clip_norm, training = federation.protected["rows" if protection == "rows" else "clients"]
    versions = JOBS * federation.clients // federation.buffer
    settings = [
        *federation.always, *training, f"seed={seed}", f"task.options.seed={seed}", "training.device=cpu",
        f"aggregation.buffer_size={federation.buffer}", "stop.target={}",
        "stop.seconds=off", f"stop.versions={versions}", f"evaluation.every_versions={max(1, versions // 4)}",
        f"clients.min_available={federation.clients}",
    ]  # fmt: skip
    if protection == "rows":
        budget = {"epsilon": epsilon, "jobs": JOBS, "delta": DELTA, "max_grad_norm": clip_norm}
        settings += [f"privacy.examples.{key}={value}" for key, value in budget.items()]
    elif protection == "clients":
        budget = {"epsilon": epsilon, "max_participations": JOBS, "delta": DELTA, "clip_norm": clip_norm}
        settings += [f"privacy.clients.{key}={value}" for key, value in budget.items()]
        settings += ['secure.keepers=["university"]', "secure.min_cohort=3", "aggregation.weight_by_examples=false"]
    config = load_config(federation.config, settings, {})
    task = load_task(config.task.entrypoint, config.task.options, config.folder)
    started = time.perf_counter()
    result = Simulation(config, ClientDatasets(task), TimingModel()).run()
    took = time.perf_counter() - started
    return {"accuracy": result.history[-1]["accuracy"], "versions": result.history[-1]["version"], "seconds": took}


def table(cells: dict[str, dict[str, Any]]) -> str:
    """A row for each federation and protection; mean and standard deviation of the accuracy."""
    lines = [
        f"| federation | without | protected | {' | '.join(f'ε = {e}' for e in EPSILONS)} |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name in FEDERATIONS:
        without = _shown(_values(cells, name, NOTHING, ""))
        for protection in PROTECTIONS:
            found = [_values(cells, name, protection, epsilon) for epsilon in EPSILONS]
            if any(found):
                lines.append(f"| {name} | {without} | {protection} | {' | '.join(map(_shown, found))} |")
    return "\n".join(lines)


def _values(cells: dict[str, dict[str, Any]], name: str, protection: str, epsilon: str) -> list[float]:
    wanted = f"{name}; {protection}; {epsilon}; "
    return [cell["accuracy"] for key, cell in cells.items() if key.startswith(wanted)]


def _shown(values: Sequence[float]) -> str:
    """Mean and standard deviation of the values, which are one for each seed."""
    if not values:
        return ""
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def draw(cells: dict[str, dict[str, Any]], path: Path) -> None:
    """A curve of accuracy over ε for each federation and protection, and a line for the run without noise."""
    import matplotlib.pyplot as plt

    shown = [name for name in FEDERATIONS if any(key.startswith(f"{name}; ") for key in cells)]
    figure, axes = plt.subplots(1, len(shown), figsize=(3.2 * len(shown), 3.2), sharey=True, squeeze=False)
    for axis, name in zip(axes[0], shown, strict=True):
        for protection, color in zip(PROTECTIONS, ("#1f6feb", "#d9480f"), strict=True):
            points = [(float(e), _values(cells, name, protection, e)) for e in EPSILONS]
            points = [(e, values) for e, values in points if values]
            means = [statistics.mean(values) for _, values in points]
            axis.plot([e for e, _ in points], means, "o-", color=color, label=protection)
        if without := _values(cells, name, NOTHING, ""):
            axis.axhline(statistics.mean(without), color="#555555", linestyle=":", linewidth=1, label="without noise")
        axis.set(title=name, xlabel="ε of a client", xscale="log", ylim=(0, 1))
        axis.set_xticks([1, 3, 8], ["1", "3", "8"])
        axis.minorticks_off()
    axes[0][0].set_ylabel("accuracy")
    axes[0][-1].legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one cell, of one seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="federations whose name has this text")
    parser.add_argument("--json", type=Path, help="read what was measured, and add to it")
    parser.add_argument("--picture", type=Path, help="draw accuracy over ε there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    names = [name for name in FEDERATIONS if options.only in name]
    if not is_installed():
        print("skipped: Fashion-MNIST needs Debian's package dataset-fashion-mnist")
        names = [name for name in names if "Fashion" not in name]
    kinds = [(NOTHING, ""), *((protection, e) for protection in reversed(PROTECTIONS) for e in EPSILONS)]
    wanted = [(name, *kind, seed) for kind in kinds for name in names for seed in range(options.seeds)]
    if options.quick:
        wanted = [("hospitals, 4 clients", "clients", "8", 0)]
    cells = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    for name, protection, epsilon, seed in wanted:
        key = f"{name}; {protection}; {epsilon}; {seed}"
        if key in cells:
            continue
        cells[key] = run(name, protection, epsilon, seed)
        print(f"{key}: {cells[key]}", flush=True)
        if options.json:
            options.json.write_text(json.dumps(cells, indent=2) + "\n")
    print(table(cells))
    if options.picture:
        draw(cells, options.picture)


if __name__ == "__main__":
    main()

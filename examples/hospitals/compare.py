"""What the federation is worth: each hospital alone, the federation, and all rows pooled in one place.

    python examples/hospitals/compare.py --output comparison.json

For each model and seed, the federation is a real `fedqueue run` with its own server and workers; the other two train
with the same local loop and settings and pass as often over each row. All three are tested on the same held-out rows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from task import MODELS, HospitalRows, HospitalsTask
from torch.utils.data import ConcatDataset

from fedqueue.config.loading import load_config
from fedqueue.config.schema import Config
from fedqueue.training import train
from fedqueue_coordinator.operator.describe import describe_here

CONFIG = Path(__file__).with_name("federation.toml")
METRICS = ("accuracy", "auc")

RunResult = dict[str, dict[str, float]]
"""Metric → hospital, or "mean" of the four → value."""


@dataclass(frozen=True)
class Setting:
    """One model and seed: the configuration of its run, its task, and each hospital's rows."""

    overrides: tuple[str, ...]
    statistics: str
    """What `fedqueue describe` finds at these rows, as JSON."""
    config: Config
    task: HospitalsTask
    rows: Mapping[str, HospitalRows]

    @classmethod
    def of(cls, model: str, seed: int) -> Setting:
        overrides = (f"task.options.model={model}", f"task.options.seed={seed}", f"seed={seed}")
        config = load_config(CONFIG, overrides)
        task = HospitalsTask(**config.task.options)
        statistics = describe_here(config, task)
        task.prepare(statistics)
        clients = [config.clients.client(name) for name in config.clients.ids]
        rows = {client.id: task.train_data(client) for client in clients}
        return cls(overrides, statistics.model_dump_json(), config, task, rows)

    def test(self, model_of: Callable[[str], torch.nn.Module]) -> RunResult:
        """The metrics of each hospital's model on its own held-out rows."""
        tested = {name: self.task.evaluate(model_of(name), rows.test) for name, rows in self.rows.items()}
        result = {metric: {name: tested[name][metric] for name in tested} for metric in METRICS}
        return {metric: {**of, "mean": mean(of.values())} for metric, of in result.items()}

    def train_on(self, data: object, epochs: int) -> torch.nn.Module:
        """A model trained in this process as `[training]` says, but for `local_epochs` passes."""
        torch.manual_seed(self.config.seed)
        model: torch.nn.Module = self.task.model()
        config = self.config.training.model_copy(update={"local_epochs": epochs, "device": "cpu"})
        train(self.task, model, data, config, progress=lambda: None)
        return model


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)  # small models: a second thread slows them down
    results: dict[str, list[dict[str, RunResult]]] = {}
    for model in arguments.models:
        for seed in range(arguments.seeds):
            results.setdefault(model, []).append(compare(Setting.of(model, seed)))
            print(f"{model}: seed {seed} is done", file=sys.stderr)
    console = Console(width=140)
    for model, runs in results.items():
        for metric in METRICS:
            console.print(table(model, metric, runs))
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def compare(setting: Setting) -> dict[str, RunResult]:
    """The three figures of one seed, and what a hospital's model is worth in the three others."""
    federated, updates = federation(setting)
    epochs = round(updates * setting.config.training.local_epochs / len(setting.rows))  # passes over an average row
    alone = {name: setting.train_on(rows, epochs) for name, rows in setting.rows.items()}
    pooled = setting.train_on(ConcatDataset(list(setting.rows.values())), epochs)
    return {
        "alone": setting.test(alone.__getitem__),
        "alone, elsewhere": elsewhere(setting, alone),
        "federation": setting.test(lambda name: federated),
        "pooled": setting.test(lambda name: pooled),
    }


def elsewhere(setting: Setting, alone: Mapping[str, torch.nn.Module]) -> RunResult:
    """The mean over the models of the other hospitals, each tested on this one's held-out rows."""
    names = list(alone)
    after = {name: names[i + 1 :] + names[:i] for i, name in enumerate(names)}
    foreign = [setting.test({name: alone[after[name][k]] for name in names}.__getitem__) for k in range(len(names) - 1)]
    return {metric: {c: mean(of[metric][c] for of in foreign) for c in foreign[0][metric]} for metric in METRICS}


def federation(setting: Setting) -> tuple[torch.nn.Module, int]:
    """The model of a `fedqueue run` with this setting, and how many updates it merged."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "run"
        command = [sys.executable, "-m", "fedqueue_coordinator", "run", str(CONFIG), "--output", str(results)]
        statistics = Path(folder) / "statistics.json"
        statistics.write_text(setting.statistics, encoding="utf-8")
        overrides = (*setting.overrides, f"statistics.file={statistics}")
        sets = [word for override in overrides for word in ("--set", override)]
        subprocess.run([*command, "--quiet", *sets], check=True)  # noqa: S603 - our own command line, no outside words
        summary = json.loads((results / "summary.json").read_text(encoding="utf-8"))
        model = setting.task.model()
        model.load_state_dict(load_file(results / "model.safetensors"))
    return model, summary["updates_merged"]


def table(model: str, metric: str, runs: list[dict[str, RunResult]]) -> Table:
    """Mean ± standard deviation over the seeds; the last row is paired, seed by seed."""
    columns = list(runs[0]["alone"][metric])
    shown = Table(f"{model}, {metric}", *columns, box=box.MARKDOWN)
    for figure in runs[0]:
        shown.add_row(figure, *(spread([run[figure][metric][c] for run in runs]) for c in columns))
    gains = [[run["federation"][metric][c] - run["alone"][metric][c] for run in runs] for c in columns]
    shown.add_row("federation − alone", *(spread(gain, "+") for gain in gains))
    return shown


def spread(values: list[float], sign: str = "") -> str:
    deviation = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.3f}{deviation}"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare each hospital alone, the federation, and pooled rows.")
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds: 0, 1, … (default: 5)")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="default: all")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write every single figure as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()

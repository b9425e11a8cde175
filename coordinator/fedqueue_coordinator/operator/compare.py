"""What `fedqueue compare` does on the terminal: progress while it goes on, then the table and where it lies."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from fedqueue.config.loading import load_config
from fedqueue_coordinator.core.federation import Federation
from fedqueue_coordinator.operator.reports.comparison import (
    COMPARISON_FILENAMES,
    rows,
    target_in_words,
    terminal_table,
    write_comparison,
)
from fedqueue_coordinator.simulation.compare import (
    TUNING_SEEDS,
    Outcome,
    Setup,
    compare,
    dealt_timings,
    grid,
    make_variants,
)
from fedqueue_coordinator.simulation.virtual_clock import TimingModel

WIDTH = 110  # of the table where the output is no terminal


def compare_modes(
    path: Path,
    modes: str,
    variant_texts: Sequence[str],
    seeds: int,
    seed_keys: Sequence[str],
    tune: Sequence[str],
    updates: int,
    speeds: str,
    clock: tuple[float, float, float],
    overrides: Sequence[str],
    output: Path | None,
) -> None:
    """Run the whole comparison; `clock` is batch_seconds, job_seconds and jitter (`Speeds`)."""
    config = load_config(path, overrides)
    torch.set_num_threads(config.training.threads)
    setup = Setup(path, (*overrides, *dealt_timings(config, speeds)), TimingModel(*clock), updates, tuple(seed_keys))
    who, combinations, target = make_variants(modes, variant_texts), grid(tune), setup.target
    folder = output or Path("runs") / f"{config.name}-compare"
    runs = len(who) * (seeds + (len(combinations) * len(TUNING_SEEDS) if len(combinations) > 1 else 0))
    outcomes: list[Outcome] = []
    with RunProgress(Console(stderr=True), runs) as progress:
        for outcome in compare(setup, who, seeds, combinations, progress.update):
            progress.say(describe(outcome))
            outcomes += [outcome] if outcome.seed not in TUNING_SEEDS else []
    title = f"{config.name}: {', '.join(contender.name for contender in who)}"
    about = conditions(setup, seeds, tune, speeds)
    write_comparison(folder, title, about, outcomes, target)
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(terminal_table(rows(outcomes, target), title))
    for line in about:
        console.print(line, highlight=False, soft_wrap=True)
    console.print("   ".join(str(folder / name) for name in COMPARISON_FILENAMES), highlight=False, soft_wrap=True)


def conditions(setup: Setup, seeds: int, tune: Sequence[str], dealt: str) -> list[str]:
    """How the figures came to be, in sentences for whoever reads the table."""
    clock = setup.speeds
    slower = f", clients {dealt} times slower in turn" if dealt else ""
    lines = [
        f"Virtual clock: a batch takes {clock.batch_seconds:g} s, an order {clock.job_seconds:g} s, with "
        f"{clock.jitter:.0%} noise per job{slower}; training is real, its time is not.",
        f"Target: {target_in_words(setup.target)}. Mean ± standard deviation over {seeds} seeds; seconds and updates "
        "are those at which the target was first met, over the seeds that met it.",
    ]
    if tune:
        lines.append(f"Chosen for each mode on seeds {', '.join(map(str, TUNING_SEEDS))}: {'; '.join(tune)}.")
    if setup.overrides:
        lines.append(f"Settings: {' '.join(setup.overrides)}.")
    return lines


def describe(outcome: Outcome) -> str:
    """One run, in a line."""
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in outcome.final.metrics.items())
    reached = outcome.reached
    when = f"target after {reached.seconds:.1f} s, {reached.updates} updates" if reached else "target not reached"
    tuned = "".join(f" {key}={value}" for key, value in outcome.tuned.items())
    return (
        f"{outcome.contender}, seed {outcome.seed}{tuned}: {when}; "
        f"{metrics} after {outcome.seconds:.1f} virtual s, {outcome.updates} updates"
    )


class RunProgress:
    """A bar on a terminal, a line for each run everywhere."""

    def __init__(self, console: Console, runs: int) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
        )
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        self._console, self._runs = console, runs
        self._name, self._number, self._shown = "", 0, 0.0
        self._task: TaskID | None = None

    def __enter__(self) -> RunProgress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def update(self, name: str, federation: Federation) -> None:
        """Called after each event of the run called `name`."""
        if name != self._name:
            self._name = name
            self._number += 1
        if self._bar.disable or time.monotonic() < self._shown + 0.1:
            return
        self._shown = time.monotonic()
        if self._task is None:
            self._task = self._bar.add_task("", total=None, state="")
        metrics = federation.evaluated.metrics if federation.evaluated else {}
        state = ", ".join(f"{k} {v:.3f}" for k, v in metrics.items())
        self._bar.update(
            self._task,
            description=f"run {self._number} of {self._runs}: {name}",
            completed=federation.totals.updates,
            total=federation.config.stop.updates,
            state=state,
        )

    def say(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True)

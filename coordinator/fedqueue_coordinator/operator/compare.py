"""`fedqueue compare`: runs a comparison on the virtual clock, shows its progress, and prints and writes its results."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from fedqueue.config.loading import load_config
from fedqueue.errors import MissingExtra
from fedqueue_coordinator.core.federation import Federation
from fedqueue_coordinator.operator.compare_options import CompareOptions
from fedqueue_coordinator.operator.plain_console import PlainConsole
from fedqueue_coordinator.operator.reports.comparison import (
    COMPARISON_FILENAMES,
    problems,
    rows,
    target_in_words,
    terminal_table,
    write_comparison,
)
from fedqueue_coordinator.operator.run_folder import Launch, RunFolder
from fedqueue_coordinator.simulation.comparison import (
    TUNING_SEEDS,
    Outcome,
    Setup,
    compare,
    grid,
    make_variants,
    slowdown_overrides,
    table_axes,
    table_variants,
)
from fedqueue_coordinator.simulation.virtual_clock import TimingModel

WIDTH = 110
"""Columns of the table if the output is not a terminal."""


def compare_strategies(
    path: Path, options: CompareOptions, overrides: Sequence[str], output: Path | None, overwrite: bool
) -> bool:
    """Compare what the section [compare] of the configuration at `path` says, changed by `options`.

    Writes the table, the figures and the picture to the folder `output` once all runs have ended, and prints the table.
    Returns whether every run merged an update and did not fail.
    Raises ConfigurationError before the first run if any setting is invalid.
    """
    config = load_config(path, overrides)
    torch.set_num_threads(config.training.threads)
    settings = options.applied_to(config.compare)
    further = options.variants or table_variants(settings.variants)
    variants = make_variants(settings.strategies, further, config.secure.on)
    axes = options.axes or table_axes(settings.tune)
    timing = TimingModel(settings.batch_seconds, settings.job_seconds, settings.jitter)
    setup = Setup(
        path,
        (*overrides, *slowdown_overrides(config, settings.speeds)),
        timing,
        settings.updates or 0,
        settings.seed_keys,
    )
    combinations, target, seeds = grid(axes), setup.target, settings.seeds
    for variant in variants:
        for combination in combinations:
            setup.config(variant, 0, combination)
    folder = RunFolder(output or Path("runs") / f"{config.name}-compare")
    launch = Launch(path.resolve(), overrides, command="compare", run=config.name)
    runs = len(variants) * (seeds + (len(combinations) * len(TUNING_SEEDS) if len(combinations) > 1 else 0))
    outcomes: list[Outcome] = []
    title = f"{config.name}: {', '.join(variant.name for variant in variants)}"
    about = conditions(setup, seeds, axes, settings.speeds)
    with folder.opened(launch, overwrite):
        with RunProgress(PlainConsole(stderr=True), runs) as progress:
            for outcome in compare(setup, variants, seeds, combinations, progress.update):
                progress.say(describe(outcome))
                outcomes += [outcome] if outcome.seed not in TUNING_SEEDS else []
        write_comparison(folder.unfinished, title, about, outcomes, target)
        folder.publish(COMPARISON_FILENAMES, complete=True)
        folder.discard()
    console: Console = PlainConsole()
    if not console.is_terminal:
        console = PlainConsole(width=WIDTH)
    console.print(terminal_table(rows(outcomes, target), title))
    for line in problems(outcomes):
        console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)
    for line in about:
        console.print(line, highlight=False, soft_wrap=True)
    paths = dict(
        zip(("table", "figures", "picture"), (folder.path / name for name in COMPARISON_FILENAMES), strict=True)
    )
    written = "   ".join(f"{what}: {path}" for what, path in paths.items() if path.exists())
    console.print(written, markup=False, highlight=False, soft_wrap=True)
    if not paths["picture"].exists():
        missing = MissingExtra("comparison.png", "matplotlib", "plots")
        console.print(str(missing), markup=False, highlight=False, soft_wrap=True)
    return not any(outcome.failed for outcome in outcomes)


def conditions(setup: Setup, seeds: int, axes: Mapping[str, Sequence[str]], speeds: Sequence[float]) -> list[str]:
    """Describe how the figures were obtained, one sentence or two per line."""
    timing = setup.timing
    factors = ":".join(f"{factor:g}" for factor in speeds)
    slower = f" Clients are {factors} times slower, in turn." if speeds else ""
    lines = [
        f"Virtual clock: a batch takes {timing.batch_seconds:g} s, the start of a job {timing.job_seconds:g} s, with "
        f"{timing.jitter:.0%} noise per job.{slower} Training is real; only its duration is computed.",
        f"Target: {target_in_words(setup.target)}. Values are mean ± standard deviation over {seeds} seeds. "
        "The columns seconds and updates say when the target was first met, over the seeds that met it.",
    ]
    if axes:
        tuned = "; ".join(f"{key}={','.join(values)}" for key, values in axes.items())
        lines.append(f"Tuned for each variant on seeds {', '.join(map(str, TUNING_SEEDS))}: {tuned}.")
    if setup.overrides:
        lines.append(f"Settings: {' '.join(setup.overrides)}.")
    return lines


def describe(outcome: Outcome) -> str:
    """Describe one run in one line."""
    if outcome.failed:
        return f"{outcome.variant}, seed {outcome.seed}: failed: {outcome.failed}"
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in outcome.final.metrics.items())
    reached = outcome.reached
    when = "target not reached"
    if reached:
        when = f"target reached after {reached.seconds:.1f} virtual s and {reached.updates} updates"
    tuned = "".join(f" {key}={value}" for key, value in outcome.tuned.items())
    return (
        f"{outcome.variant}, seed {outcome.seed}{tuned}: {when}; "
        f"at the end, after {outcome.seconds:.1f} virtual s and {outcome.updates} updates: {metrics}"
    )


class RunProgress:
    """Shows a progress bar for the current run on a terminal, and prints a line for each finished run everywhere."""

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
        """Update the bar after an event of the run `name`, at most ten times a second."""
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
            completed=federation.run_counters.updates,
            total=federation.config.stop.updates,
            state=state,
        )

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)

"""`fedqueue compare`: the same clients, data and speeds under one mode after another, on the virtual clock.

Every contender gets the same seeds, and runs until the same number of updates is merged (or the same virtual time is
over), past the target. It is measured after about the same number of updates whatever makes a version in its mode:
who is looked at more often would otherwise find its target sooner.
"""

from __future__ import annotations

import itertools
import json
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from fedqueue.config.loading import Config, load_config
from fedqueue.errors import ConfigurationError, TaskError
from fedqueue.task import load_task
from fedqueue_coordinator.core.events import Evaluated
from fedqueue_coordinator.core.federation import Federation
from fedqueue_coordinator.core.run_summary import RunResult
from fedqueue_coordinator.core.stop_conditions import lower_is_better, target_reached
from fedqueue_coordinator.simulation.virtual_clock import ClientDatasets, Simulation, TimingModel

MODES = "fedavg,fedasync,fedbuff"
UPDATES_PER_CLIENT = 50  # merged per run, unless stop.updates or --updates says otherwise
TUNING_SEEDS = (1000, 1001)  # of the runs that choose a setting; none of them is in the comparison

Progress = Callable[[str, Federation], None]
"""Called while a run goes on, with what it is called."""


@dataclass(frozen=True)
class Variant:
    """What takes part: a mode, or a mode with settings of its own, as overrides of the configuration."""

    name: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Point:
    """A central evaluation: when, after how many merged updates, and what it measured."""

    seconds: float
    updates: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Outcome:
    """One run of one contender; `reached` is the first evaluation that met the target, `points` all of them."""

    contender: str
    seed: int
    tuned: Mapping[str, str]
    updates: int
    versions: int
    seconds: float
    staleness: float
    """Mean over the merged updates."""
    clients: Sequence[str]
    shares: Mapping[str, float]
    """Client → its share of the merged updates, where it has one."""
    lost: Mapping[str, int]
    """Reason → updates rejected and jobs abandoned, but for those that the end of the run cut off."""
    reached: Point | None
    points: Sequence[Point] = field(repr=False)

    @property
    def final(self) -> Point:
        return self.points[-1]


@dataclass(frozen=True)
class Setup:
    """What all contenders share."""

    path: Path
    overrides: tuple[str, ...]
    speeds: TimingModel
    updates: int
    """Merged per run; 0: as the configuration says, else UPDATES_PER_CLIENT for each client."""
    seed_keys: tuple[str, ...] = ()
    """Further keys that get the seed's number, such as task.options.seed."""
    sites: dict[str, ClientDatasets] = field(default_factory=dict, repr=False)
    """Data stays loaded from run to run; by what decides it."""

    def config(self, contender: Variant, seed: int, tuned: Mapping[str, str]) -> Config:
        """The configuration of one run, whose target does not end it; raises ConfigurationError."""
        seeds = [f"{key}={seed}" for key in ("seed", *self.seed_keys)]
        settings = [f"{key}={value}" for key, value in tuned.items()]
        config = load_config(self.path, [*self.overrides, *contender.overrides, *settings, *seeds])
        clients = len(config.clients.ids)
        updates = self.updates or config.stop.updates or UPDATES_PER_CLIENT * clients
        evaluation = {"every": max(1, clients // config.buffer_size), "seconds": 0.0}
        return config.model_copy(
            update={
                "stop": config.stop.model_copy(update={"updates": updates, "target": {}}),
                "evaluation": config.evaluation.model_copy(update=evaluation),
            }
        )

    @property
    def target(self) -> dict[str, float]:
        """The metrics to reach; raises ConfigurationError where the configuration has none."""
        target = load_config(self.path, list(self.overrides)).stop.target
        if not target:
            raise ConfigurationError("stop.target", {}, "is required to compare, such as {accuracy = 0.95}")
        return target

    def run(self, contender: Variant, seed: int, tuned: Mapping[str, str], on_progress: Progress) -> Outcome:
        """One run; raises TaskError where the task has nothing to measure with."""
        config = self.config(contender, seed, tuned)
        name = f"{contender.name}, seed {seed}"
        simulation = Simulation(
            config, self._sites(config), self.speeds, lambda federation, now: on_progress(name, federation)
        )
        return outcome_of(simulation.run(), contender.name, seed, tuned, self.target, config.clients.ids)

    def _sites(self, config: Config) -> ClientDatasets:
        key = json.dumps([config.task.model_dump(), config.clients.ids])
        if key not in self.sites:
            task = load_task(config.task.entrypoint, config.task.options, self.path.resolve().parent)
            self.sites[key] = ClientDatasets(task)
        if self.sites[key].test_data is None:
            raise TaskError("compare measures each version centrally, but the task's test_data() is None")
        return self.sites[key]


def outcome_of(
    result: RunResult,
    contender: str,
    seed: int,
    tuned: Mapping[str, str],
    target: Mapping[str, float],
    clients: Sequence[str],
) -> Outcome:
    """What a run's ledger says of it."""
    merged: list[Mapping[str, Any]] = []
    points: list[Point] = []
    merged_until = {0: 0}  # version → updates
    lost: Counter[str] = Counter()
    for record in result.ledger:
        match record["kind"]:
            case "version":
                merged += record["merged"]
                merged_until[record["version"]] = len(merged)
            case "evaluation":
                points.append(Point(record["seconds"], merged_until[record["version"]], record["metrics"]))
            case "rejected" | "abandoned" if record["reason"] != "run_ended":
                lost[record["reason"]] += 1
    by_client = Counter(line["client"] for line in merged)
    return Outcome(
        contender=contender,
        seed=seed,
        tuned=dict(tuned),
        updates=len(merged),
        versions=len(merged_until) - 1,
        seconds=max(record["seconds"] for record in result.ledger),
        staleness=mean(line["staleness"] for line in merged) if merged else 0.0,
        clients=list(clients),
        shares={client: count / len(merged) for client, count in sorted(by_client.items())},
        lost=dict(sorted(lost.items())),
        reached=next((point for point in points if target_reached(target, Evaluated(0, point.metrics))), None),
        points=points,
    )


def make_variants(modes: str, specifications: Sequence[str] = ()) -> list[Variant]:
    """`modes` is a list of modes, by comma; a variant is "NAME: KEY=VALUE KEY=VALUE …", with quotes as in a shell.

    Without either, MODES. Raises ConfigurationError for a variant that is not one, and for a name that occurs twice.
    """
    modes = modes or ("" if specifications else MODES)
    found = [Variant(mode, (f"aggregation.mode={mode}",)) for mode in filter(None, map(str.strip, modes.split(",")))]
    for variant in specifications:
        name, colon, settings = variant.partition(":")
        if not colon or not name.strip():
            raise ConfigurationError("--variant", variant, 'expected "NAME: section.key=value section.key=value"')
        found.append(Variant(name.strip(), tuple(shlex.split(settings))))
    repeated = [name for name, count in Counter(c.name for c in found).items() if count > 1]
    if repeated or not found:
        raise ConfigurationError("--modes", modes, f"{repeated[0]!r} is there twice" if repeated else "names no mode")
    return found


def grid(tune: Sequence[str]) -> list[dict[str, str]]:
    """Every combination of "KEY=VALUE,VALUE,…"; one empty combination where there is nothing to tune."""
    axes = []
    for text in tune:
        key, equals, values = text.partition("=")
        if not equals or not key or not all(values.split(",")):
            raise ConfigurationError("--tune", text, "expected section.key=value,value,…")
        axes.append([(key.strip(), value.strip()) for value in values.split(",")])
    return [dict(combination) for combination in itertools.product(*axes)]


def dealt_timings(config: Config, speeds: str) -> list[str]:
    """Overrides that deal the factors of "1:2:4" out to the clients in turn; each is how many times slower."""
    if not speeds:
        return []
    factors = itertools.cycle(speeds.split(":"))
    try:
        pairs = [f'"{client}" = {float(factor)}' for client, factor in zip(config.clients.ids, factors, strict=False)]
    except ValueError:
        accepted = "expected how many times slower the clients are, in turn: 1:2:4"
        raise ConfigurationError("--speeds", speeds, accepted) from None
    return [f"clients.slowdown={{{', '.join(pairs)}}}"]


def best(trials: Sequence[Sequence[Outcome]], target: Mapping[str, float]) -> Mapping[str, str]:
    """The settings of the trial that reached the target most often, then soonest on average, then ended best."""
    metric = next(iter(target))

    def cost(outcomes: Sequence[Outcome]) -> tuple[float, float, float]:
        times = [outcome.reached.seconds for outcome in outcomes if outcome.reached]
        final = mean(worst_if_missing(outcome.final.metrics.get(metric), metric) for outcome in outcomes)
        return -len(times), mean(times) if times else 0.0, final if lower_is_better(metric) else -final

    return min(trials, key=cost)[0].tuned


def worst_if_missing(value: float | None, metric: str) -> float:
    """A metric that was not finite is left out of an evaluation: a model that has diverged is the worst there is."""
    worst = float("inf") if lower_is_better(metric) else float("-inf")
    return worst if value is None else value


def compare(
    setup: Setup,
    who: Sequence[Variant],
    seeds: int,
    combinations: Sequence[Mapping[str, str]],
    on_progress: Progress,
) -> Iterator[Outcome]:
    """Each outcome as soon as it is there, contender by contender; those with TUNING_SEEDS only choose settings.

    Raises ConfigurationError before the first run where any of them would.
    """
    for contender in who:
        for tuned in combinations:
            setup.config(contender, 0, tuned)
    for contender in who:
        tuned = combinations[0]
        if len(combinations) > 1:
            trials: list[list[Outcome]] = []
            for combination in combinations:
                trials.append([])
                for seed in TUNING_SEEDS:
                    trials[-1].append(setup.run(contender, seed, combination, on_progress))
                    yield trials[-1][-1]
            tuned = best(trials, setup.target)
        for seed in range(seeds):
            yield setup.run(contender, seed, tuned, on_progress)

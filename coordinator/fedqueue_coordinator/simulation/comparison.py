"""Compares aggregation strategies: the same clients, data and speeds in one simulated run per variant and seed.

Each variant runs with the same seeds until it has merged the same number of updates, or until stop.seconds of virtual
time; reaching the target does not end a run. Each variant is also evaluated after about the same number of updates,
however many updates make one version in its strategy. A variant that is evaluated more often would otherwise seem to
reach the target sooner.

    setup = Setup(Path("federation.toml"), overrides=(), timing=TimingModel(), updates=240)
    for outcome in compare(setup, make_variants(["fedavg", "fedbuff"]), seeds=3, combinations=[{}]):
        print(outcome.variant, outcome.seed, outcome.reached)

`fedqueue compare` (operator/compare.py) shows the progress and writes the table.
"""

from __future__ import annotations

import itertools
import json
import math
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from fedqueue.config.loading import load_config
from fedqueue.config.schema import Config
from fedqueue.config.target import Goal, Wanted, goals
from fedqueue.errors import ConfigurationError, RunFailed, TaskError
from fedqueue.exception_text import exception_with_place, one_line
from fedqueue.task import load_task, prepare_task
from fedqueue_coordinator.core.events import Evaluated
from fedqueue_coordinator.core.failures import Failures
from fedqueue_coordinator.core.federation import Federation
from fedqueue_coordinator.core.run_summary import RunResult
from fedqueue_coordinator.core.stop_conditions import require_usable_target, target_reached
from fedqueue_coordinator.simulation.virtual_clock import ClientDatasets, Simulation, TimingModel

DEFAULT_STRATEGIES = ("fedavg", "fedasync", "fedbuff")
MASKED_STRATEGIES = ("fedavg", "fedbuff")
"""Those of them that go with keepers."""
UPDATES_PER_CLIENT = 50
"""Merged updates per run and client, if neither stop.updates nor compare.updates is set."""
TUNING_SEEDS = (1000, 1001)
"""Seeds of the runs that choose a setting; these runs are not part of the comparison."""

Progress = Callable[[str, Federation], None]
"""Called after each event with the name of the current run and its federation."""


@dataclass(frozen=True)
class Variant:
    """A named set of overrides (KEY=VALUE texts) that is compared with others, such as an aggregation strategy."""

    name: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Point:
    """A central evaluation: its virtual time in seconds, the updates merged before it, and its metrics."""

    seconds: float
    updates: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Outcome:
    """One run of one variant."""

    variant: str
    """The variant's name."""
    seed: int
    tuned: Mapping[str, str]
    """Key → value, as chosen by tuning."""
    updates: int
    """Merged updates."""
    versions: int
    seconds: float
    """Virtual time of the last ledger record."""
    staleness: float
    """Mean over the merged updates, in versions."""
    clients: Sequence[str]
    shares: Mapping[str, float]
    """Client → its share of the merged updates, 0 to 1; clients without a merged update are missing."""
    lost: Mapping[str, int]
    """Reason → number of rejected updates and abandoned jobs, except jobs that the end of the run cut off."""
    reached: Point | None
    """The first evaluation that met the target."""
    points: Sequence[Point] = field(repr=False)
    """All evaluations, in order."""
    failed: str = ""
    """Why the run failed or merged no update; empty if it did neither."""
    failures: Sequence[str] = ()
    """A line for each kind of failure of a client: the first client, what happened and why, and how often."""

    @property
    def final(self) -> Point:
        """The last evaluation that did not fail; without metrics if every one failed."""
        return self.points[-1] if self.points else Point(0.0, 0, {})


@dataclass(frozen=True)
class Setup:
    """What all variants share."""

    path: Path
    """The configuration file."""
    overrides: tuple[str, ...]
    """KEY=VALUE texts for every run."""
    timing: TimingModel
    updates: int
    """Merged updates per run; 0 means stop.updates, or else UPDATES_PER_CLIENT for each client."""
    seed_keys: tuple[str, ...] = ()
    """Further keys that are set to the seed of each run, such as task.options.seed."""
    datasets: dict[str, ClientDatasets] = field(default_factory=dict, repr=False)
    """Loaded data, kept from run to run, by the settings that determine it."""

    def config(self, variant: Variant, seed: int, tuned: Mapping[str, str]) -> Config:
        """Return the configuration of one run, which its target does not end; raises ConfigurationError."""
        seeds = [f"{key}={seed}" for key in ("seed", *self.seed_keys)]
        settings = [f"{key}={value}" for key, value in tuned.items()]
        config = load_config(self.path, [*self.overrides, *variant.overrides, *settings, *seeds])
        clients = config.clients.number
        updates = self.updates or config.stop.updates or UPDATES_PER_CLIENT * clients
        evaluation = {"every_versions": max(1, clients // config.buffer_size), "every_seconds": None}
        return config.model_copy(
            update={
                "stop": config.stop.model_copy(update={"updates": updates, "target": {}}),
                "evaluation": config.evaluation.model_copy(update=evaluation),
            }
        )

    @property
    def target(self) -> Wanted:
        """Return the metrics to reach; raises ConfigurationError if the configuration has none."""
        config = load_config(self.path, list(self.overrides))
        target = config.compare.target or config.stop.target
        if not target:
            hint = "set the metrics to reach, such as {accuracy = 0.95}, there or in compare.target"
            raise ConfigurationError("stop.target", None, "is required to compare", hint)
        return target

    def run(self, variant: Variant, seed: int, tuned: Mapping[str, str], on_progress: Progress) -> Outcome:
        """Simulate one run.

        Raises TaskError if the task has no test data, and ConfigurationError if the first evaluation does not measure
        the target or meets it before any training.
        """
        config, target = self.config(variant, seed, tuned), self.target
        key = "compare.target" if config.compare.target else "stop.target"
        name = f"{variant.name}, seed {seed}"
        judged = False

        def follow(federation: Federation, now: float) -> None:
            nonlocal judged
            if federation.evaluated and not judged:
                require_usable_target(goals(target), federation.evaluated, key)
                judged = True
            on_progress(name, federation)

        result = simulate(Simulation(config, self._datasets(config), self.timing, follow))
        return outcome_of(result, variant.name, seed, tuned, target, config.clients.ids)

    def _datasets(self, config: Config) -> ClientDatasets:
        key = json.dumps([config.task.model_dump(), config.clients.ids, config.statistics.file])
        if key not in self.datasets:
            task = load_task(config.task.entrypoint, config.task.options, self.path.resolve().parent)
            prepare_task(task, config)
            self.datasets[key] = ClientDatasets(task)
        if self.datasets[key].test_data is None:
            raise TaskError(
                "compare evaluates versions centrally, but the task's test_data() returned None; implement it"
            )
        return self.datasets[key]


def outcome_of(
    result: RunResult,
    variant: str,
    seed: int,
    tuned: Mapping[str, str],
    target: Wanted,
    clients: Sequence[str],
) -> Outcome:
    """Derive the outcome of a run from its ledger."""
    wanted = goals(target)
    merged: list[Mapping[str, Any]] = []
    points: list[Point] = []
    merged_until = {0: 0}  # version → updates
    lost: Counter[str] = Counter()
    for record in result.ledger:
        match record["kind"]:
            case "version":
                merged += record["merged"]
                merged_until[record["version"]] = len(merged)
            case "evaluation" if not record.get("error"):
                points.append(Point(record["seconds"], merged_until[record["version"]], record["metrics"]))
            case "rejected" | "abandoned" if record["reason"] != "run_ended":
                lost[record["reason"]] += 1
    by_client = Counter(line["client"] for line in merged)
    return Outcome(
        variant=variant,
        seed=seed,
        tuned=dict(tuned),
        updates=len(merged),
        versions=len(merged_until) - 1,
        seconds=max([0.0, *(record["seconds"] for record in result.ledger)]),
        staleness=mean(line["staleness"] for line in merged) if merged else 0.0,
        clients=list(clients),
        shares={client: count / len(merged) for client, count in sorted(by_client.items())},
        lost=dict(sorted(lost.items())),
        reached=next((point for point in points if target_reached(wanted, Evaluated(0, point.metrics))), None),
        points=points,
        failed=result.stopped_because if result.failed else "" if merged else "no update was merged",
        failures=[
            f"{kind.line}{f' ({kind.count} times)' if kind.count > 1 else ''}"
            for kind in Failures.from_ledger(result.ledger).kinds.values()
        ],
    )


def simulate(simulation: Simulation) -> RunResult:
    """Run the simulation; an exception of the task, or a run that cannot go on, gives a failed result."""
    try:
        return simulation.run()
    except (ConfigurationError, TaskError):
        raise  # an error of every run of the comparison
    except RunFailed as error:
        why = str(error)
    except Exception as error:
        why = exception_with_place(error)
    federation = simulation.federation
    return RunResult(
        federation.version, federation.model, one_line(why), True, simulation.ledger, {}, federation.job_number
    )


def make_variants(
    strategies: Sequence[str] | None, variants: Sequence[Variant] = (), masked: bool = False
) -> list[Variant]:
    """Return a variant for each of `strategies`, then `variants`.

    Without `strategies`, those are DEFAULT_STRATEGIES, or MASKED_STRATEGIES if updates are `masked`, or none if there
    are `variants`. Raises ConfigurationError for a name that occurs twice, and if there is no variant.
    """
    default = MASKED_STRATEGIES if masked else DEFAULT_STRATEGIES
    names = (() if variants else default) if strategies is None else strategies
    found = [*(Variant(name, (f"aggregation.strategy={name}",)) for name in names), *variants]
    hint = "write different strategies, such as fedavg and fedbuff"
    if not found:
        raise ConfigurationError("compare.strategies", list(names), "names no strategy", hint)
    name, count = Counter(variant.name for variant in found).most_common(1)[0]
    if count > 1:
        raise ConfigurationError("compare.strategies", name, "occurs twice among the strategies and variants", hint)
    return found


def table_variants(tables: Mapping[str, Mapping[str, Any]]) -> list[Variant]:
    """Return the variants of `compare.variants`: name → the keys that it changes, in their sections."""
    return [
        Variant(name, tuple(f"{key}={toml_text(value)}" for key, value in dotted(table).items()))
        for name, table in tables.items()
    ]


def table_axes(table: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return key → its values to try, as KEY=VALUE takes them, of `compare.tune`; raises ConfigurationError."""
    axes = {}
    for key, values in dotted(table).items():
        if not isinstance(values, list | tuple) or not values:
            raise ConfigurationError(
                f"compare.tune.{key}", values, "not a list of values", "write the values to try, such as [0.1, 0.3]"
            )
        axes[key] = [toml_text(value) for value in values]
    return axes


def dotted(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return section.key → value for each value in nested tables."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            found |= dotted(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def toml_text(value: object) -> str:
    """Return `value`, which was read from TOML, as an override KEY=VALUE takes it: TOML, but words without quotes."""
    if isinstance(value, str):
        try:
            tomllib.loads(f"value = {value}")
        except tomllib.TOMLDecodeError:
            return value
    return _toml(value)


def _toml(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return json.dumps(value, ensure_ascii=False)
        case Mapping():
            return f"{{{', '.join(f'{_toml(key)} = {_toml(inner)}' for key, inner in value.items())}}}"
        case list() | tuple():
            return f"[{', '.join(map(_toml, value))}]"
        case _:
            return str(value)


def grid(axes: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    """Return every combination of the values of each key; one empty combination if `axes` is empty."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def slowdown_overrides(config: Config, speeds: Sequence[float]) -> list[str]:
    """Return an override of clients.slowdown that assigns the factors `speeds` to the clients in turn."""
    if not speeds:
        return []
    pairs = [
        f'"{client}" = {factor}' for client, factor in zip(config.clients.ids, itertools.cycle(speeds), strict=False)
    ]
    return [f"clients.slowdown={{{', '.join(pairs)}}}"]


def best(trials: Sequence[Sequence[Outcome]], target: Wanted) -> Mapping[str, str]:
    """Return the settings of the best trial.

    Trials are ordered by the number of runs that reached the target, then by its mean time, then by the final metric.
    """
    goal = goals(target)[0]

    def cost(outcomes: Sequence[Outcome]) -> tuple[float, float, float]:
        times = [outcome.reached.seconds for outcome in outcomes if outcome.reached]
        final = mean(worst_if_missing(outcome.final.metrics.get(goal.metric), goal) for outcome in outcomes)
        return -len(times), mean(times) if times else 0.0, final if goal.direction == "below" else -final

    return min(trials, key=cost)[0].tuned


def worst_if_missing(value: float | None, goal: Goal) -> float:
    """Return `value`, or the worst value there is for None and for NaN."""
    worst = float("inf") if goal.direction == "below" else float("-inf")
    return worst if value is None or math.isnan(value) else value


def compare(
    setup: Setup,
    variants: Sequence[Variant],
    seeds: int,
    combinations: Sequence[Mapping[str, str]],
    on_progress: Progress = lambda name, federation: None,
) -> Iterator[Outcome]:
    """Yield the outcome of each run as it ends, variant by variant, for the seeds 0 to `seeds` − 1.

    With more than one of `combinations` (key → value, see `grid`), each variant first runs all of them with
    TUNING_SEEDS and keeps the best. Those outcomes are yielded too.

    Raises ConfigurationError before the first run if any configuration is invalid.
    """
    for variant in variants:
        for tuned in combinations:
            setup.config(variant, 0, tuned)
    for variant in variants:
        tuned = combinations[0]
        if len(combinations) > 1:
            trials: list[list[Outcome]] = []
            for combination in combinations:
                trials.append([])
                for seed in TUNING_SEEDS:
                    trials[-1].append(setup.run(variant, seed, combination, on_progress))
                    yield trials[-1][-1]
            tuned = best(trials, setup.target)
        for seed in range(seeds):
            yield setup.run(variant, seed, tuned, on_progress)

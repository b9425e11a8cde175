"""`fedqueue privacy`: what rows and clients would spend in a run, computed before it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer
from rich.table import Table

from fedqueue.config.loading import load_config
from fedqueue.config.privacy import ExamplePrivacyConfig
from fedqueue.config.schema import Config
from fedqueue.errors import ConfigurationError
from fedqueue.privacy.spending import Charge, Spending, charge_of_job, countable_rows, jobs_within
from fedqueue_coordinator.operator.client_privacy import ClientPrivacyCost, client_cost, client_lines
from fedqueue_coordinator.operator.json_text import json_text
from fedqueue_coordinator.operator.plain_console import PlainConsole

WIDTH = 120
"""Columns of the table if the output is not a terminal."""
AFTER_JOBS = (1, 10, 100)
DEFAULT_BUDGET = 8.0
"""The ε that jobs are counted for where neither the configuration nor --max-epsilon names one."""
MODERATE, WEAK = 1.0, 10.0
"""Up to which ε a guarantee is strong, and above which it says little (NIST SP 800-226, and common practice)."""
DROWNED = 1.0
"""From which ratio of noise to the largest possible signal a verdict warns."""
NOT_COVERED = (
    "not covered: how many rows a client has, when and how long it trains, and what train_data computes from all rows, "
    "such as means for scaling"
)


@dataclass(frozen=True)
class ClientCost:
    """What a run costs the rows of one client."""

    client: str
    rows: int
    sampling_rate: float
    noise_multiplier: float
    steps_per_job: int
    noise_to_signal: float
    """Standard deviation of the noise in one element of a step's sum, divided by the norm that the expected batch can
    reach: z / batch."""
    epsilon_after: dict[str, float]
    """Jobs → ε."""
    jobs_within_budget: int


def show_privacy(
    path: Path, overrides: Sequence[str], rows: Sequence[str], max_epsilon: float | None, as_json: bool
) -> None:
    """Print what rows and clients spend, and a verdict.

    Raises ConfigurationError where the run protects neither, and for a client or a number that cannot be.
    """
    config = load_config(path, overrides)
    privacy = config.example_privacy
    if privacy is None and not config.privacy.clients.on:
        raise ConfigurationError(
            "privacy.examples", None, "is off: updates have no noise, and no ε holds for them",
            "set max_grad_norm, delta, and noise_multiplier or epsilon (docs/how-to/row-privacy.md)",
        )  # fmt: skip
    of_clients = _of_clients(config) if config.privacy.clients.on else None
    if privacy is None:
        assert of_clients
        if as_json:
            typer.echo(json_text({"privacy_of_clients": asdict(of_clients[0]), "verdict": of_clients[1]}, indent=2))
        else:
            _say([f"{config.name}: differential privacy of clients", *of_clients[1]])
        return
    budget = max_epsilon or privacy.epsilon or DEFAULT_BUDGET
    costs = [cost_of(config, privacy, client, n, budget) for client, n in rows_of_clients(config, rows).items()]
    lines = verdict(config, privacy, costs, budget)
    if of_clients:
        lines += of_clients[1]
    if as_json:
        record: dict[str, Any] = {"budget": budget, "delta": privacy.delta, "clients": [asdict(cost) for cost in costs],
                  "verdict": lines}  # fmt: skip
        if of_clients:
            record["privacy_of_clients"] = asdict(of_clients[0])
        typer.echo(json_text(record, indent=2))
        return
    console = PlainConsole()
    if not console.is_terminal:
        console.width = WIDTH
    table = Table(title=f"{config.name}: differential privacy of rows, δ = {privacy.at_delta:g}", title_justify="left")
    for name in ("client", "rows", "q", "noise z", "steps a job", *(f"ε after {n}" for n in AFTER_JOBS),
                 f"jobs within ε = {budget:g}"):  # fmt: skip
        table.add_column(name, justify="left" if name == "client" else "right", no_wrap=name == "client")
    for cost in costs:
        table.add_row(
            cost.client, str(cost.rows), f"{cost.sampling_rate:.3f}", f"{cost.noise_multiplier:.3f}",
            str(cost.steps_per_job), *(f"{value:.2f}" for value in cost.epsilon_after.values()),
            str(cost.jobs_within_budget),
        )  # fmt: skip
    console.print(table)
    _say(lines)


def _say(lines: Sequence[str]) -> None:
    console = PlainConsole()
    for line in lines:
        console.print(line, soft_wrap=True)


def _of_clients(config: Config) -> tuple[ClientPrivacyCost, list[str]]:
    from fedqueue.task import load_task, make_model
    from fedqueue.tensors.manifest import Manifest

    task = load_task(config.task.entrypoint, config.task.options, config.folder)
    parameters = Manifest.from_module(make_model(task), config.aggregation).parameters
    cost = client_cost(config, parameters)
    return cost, client_lines(config, cost, parameters)


def rows_of_clients(config: Config, given: Sequence[str]) -> dict[str, int]:
    """Return client → rows: as `given`, each N or CLIENT=N, and for other clients as the task's data has them.

    Raises ConfigurationError for another text or an unknown client.
    """
    rows: dict[str, int] = {}
    for text in given:
        client, equals, number = text.rpartition("=")
        if not number.isdecimal() or int(number) < 1 or (equals and client not in config.clients.ids):
            raise ConfigurationError(
                "--rows", text, "no number of rows, or no client",
                f"write N, or CLIENT=N with one of {', '.join(config.clients.ids[:5])}",
            )  # fmt: skip
        rows.update(dict.fromkeys([client] if equals else config.clients.ids, int(number)))
    missing = [client for client in config.clients.ids if client not in rows]
    if missing:
        from fedqueue.local_update import load_data
        from fedqueue.task import load_task, prepare_task

        task = load_task(config.task.entrypoint, config.task.options, config.folder)
        prepare_task(task, config)
        for client in missing:
            rows[client] = countable_rows(load_data(task, config.clients.client(client), config.seed)[0])
    return {client: rows[client] for client in config.clients.ids}


def cost_of(config: Config, privacy: ExamplePrivacyConfig, client: str, rows: int, budget: float) -> ClientCost:
    """Compute what jobs cost a client with that many rows."""
    charge: Charge = charge_of_job(privacy, config.training, rows)
    after = {str(n): Spending().plus("", charge, n).epsilon(privacy.at_delta) for n in AFTER_JOBS}
    noise = charge.noise_multiplier / (charge.sampling_rate * rows)
    jobs = jobs_within(charge, budget, privacy.at_delta)
    return ClientCost(
        client, rows, charge.sampling_rate, charge.noise_multiplier, charge.steps, noise, after, jobs
    )  # fmt: skip


def verdict(config: Config, privacy: ExamplePrivacyConfig, costs: Sequence[ClientCost], budget: float) -> list[str]:
    """Say in sentences what the numbers mean, the most important first."""
    worst = min(costs, key=lambda cost: cost.jobs_within_budget)
    lines = [_expected_end(config, privacy, costs, worst, budget)]
    largest = max(costs, key=lambda cost: cost.rows)
    if privacy.at_delta * largest.rows > 0.1:
        lines.append(
            f"δ = {privacy.at_delta:g} is too large for {largest.client}, which has {largest.rows} rows: set "
            f"privacy.examples.delta to at most {0.1 / largest.rows:.1g}, a tenth of 1 / rows"
        )
    noisiest = max(costs, key=lambda cost: cost.noise_to_signal)
    if noisiest.noise_to_signal > DROWNED / 10:
        lines.append(
            f"expect a loss of accuracy: at {noisiest.client} the noise in each element is "
            f"{noisiest.noise_to_signal:.2f} of the largest gradient that a whole batch can have; a larger "
            "training.batch_size, fewer steps or fewer jobs allow less noise for the same ε"
        )
    return [*lines, NOT_COVERED]


def _expected_end(
    config: Config, privacy: ExamplePrivacyConfig, costs: Sequence[ClientCost], worst: ClientCost, budget: float
) -> str:
    """Say how many jobs [stop] asks of a client on average, and what they cost the client that pays most."""
    stop = config.stop
    updates = [n for n in (stop.updates, stop.versions and stop.versions * config.buffer_size) if n]
    if not updates:
        return (
            f"{worst.client} is the first to use up ε = {budget:g}; jobs that it pays for: {worst.jobs_within_budget}"
        )
    jobs = math.ceil(min(updates) / len(costs))
    charge = Charge(worst.sampling_rate, worst.noise_multiplier, worst.steps_per_job)
    epsilon = Spending().plus("", charge, jobs).epsilon(privacy.at_delta)
    strength = "strong" if epsilon <= MODERATE else "moderate" if epsilon <= WEAK else "weak: it excludes little"
    ends = ""
    if worst.jobs_within_budget < jobs:
        ends = f"; the budget of {budget:g} pays for {worst.jobs_within_budget} of them, then the client trains no more"
    return (
        f"[stop] asks for about {jobs} jobs of each client, if all are equally fast: ε = {epsilon:.2f} for "
        f"{worst.client}, a guarantee that is {strength}{ends}"
    )

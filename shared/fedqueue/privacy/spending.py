"""What training jobs cost in privacy, and the sum of what a client's rows have spent."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedqueue.config.privacy import ExamplePrivacyConfig
from fedqueue.config.training import TrainingConfig
from fedqueue.errors import ConfigurationError, TaskError
from fedqueue.privacy.accountant import epsilon_of, noise_multiplier_for, step_rdp


@dataclass(frozen=True)
class Charge:
    """What one job does to a client's rows."""

    sampling_rate: float
    """q: the probability with which each step includes a row."""
    noise_multiplier: float
    """z: the noise's standard deviation, in multiples of the largest norm of a row's gradient."""
    steps: int


@dataclass(frozen=True)
class Entry:
    """The jobs of one run that had the same rate and noise."""

    run: str
    sampling_rate: float
    noise_multiplier: float
    steps: int
    """Steps of all of these jobs."""
    jobs: int


@dataclass(frozen=True)
class Spending:
    """Everything that the rows of one client have been used for."""

    entries: tuple[Entry, ...] = ()

    def plus(self, run: str, charge: Charge, jobs: int = 1) -> Spending:
        """Return the spending after `jobs` further jobs of that run."""
        kind = (run, charge.sampling_rate, charge.noise_multiplier)
        added = Entry(*kind, charge.steps * jobs, jobs)
        kept = []
        for entry in self.entries:
            if (entry.run, entry.sampling_rate, entry.noise_multiplier) == kind:
                added = replace(added, steps=added.steps + entry.steps, jobs=added.jobs + entry.jobs)
            else:
                kept.append(entry)
        return Spending((*kept, added))

    def of_run(self, run: str) -> Spending:
        """Return the part of it that one run has spent."""
        return Spending(tuple(entry for entry in self.entries if entry.run == run))

    def epsilon(self, delta: float) -> float:
        """Return the ε at `delta` of all of it together; 0 before the first job."""
        if not self.entries:
            return 0.0
        rdp = [entry.steps * step_rdp(entry.sampling_rate, entry.noise_multiplier) for entry in self.entries]
        return epsilon_of(np.sum(rdp, axis=0), delta)

    @property
    def jobs(self) -> int:
        return sum(entry.jobs for entry in self.entries)


def steps_of_job(training: TrainingConfig, rows: int) -> int:
    """Return the steps of a job on `rows` rows: `local_steps`, or as many as `local_epochs` passes have batches."""
    return training.local_steps or training.local_epochs * max(1, -(-rows // training.batch_size))


def charge_of_job(privacy: ExamplePrivacyConfig, training: TrainingConfig, rows: int) -> Charge:
    """Return what one job costs on `rows` rows, which it samples at the rate batch_size / rows.

    With `epsilon`, the noise is the smallest one with which `jobs` jobs of this size keep to it. Raises
    ConfigurationError where no noise does.
    """
    rate, steps = min(1.0, training.batch_size / rows), steps_of_job(training, rows)
    if privacy.noise_multiplier is not None:
        return Charge(rate, privacy.noise_multiplier, steps)
    assert privacy.epsilon is not None
    assert privacy.jobs is not None
    try:
        noise = noise_multiplier_for(privacy.epsilon, privacy.at_delta, rate, steps * privacy.jobs)
    except ValueError as error:
        raise ConfigurationError("privacy.examples.epsilon", privacy.epsilon, str(error), "raise it") from None
    return Charge(rate, noise, steps)


def jobs_within(charge: Charge, epsilon: float, delta: float, spent: Spending | None = None) -> int:
    """Return how many further jobs of this cost keep to `epsilon` after `spent`, at most 10⁹."""

    def fits(jobs: int) -> bool:
        return (spent or Spending()).plus("", charge, jobs).epsilon(delta) <= epsilon

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
        if high > 10**9:
            return low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def over_epsilon_of_run(run: str, client: str, before: Spending, after: Spending, privacy: ExamplePrivacyConfig) -> str:
    """Return in words how a job that leads from `before` to `after` exceeds the run's own ε, or an empty string."""
    if privacy.epsilon is None:
        return ""
    before, after = before.of_run(run), after.of_run(run)
    who = f"run {run!r} allows"
    return over_budget("privacy.examples.epsilon", client, before, after, privacy.epsilon, privacy.at_delta, who)


def over_budget(key: str, client: str, before: Spending, after: Spending, limit: float, delta: float, who: str) -> str:
    """Return in words how the ε of `after` exceeds `limit`, or an empty string."""
    epsilon = after.epsilon(delta)
    if epsilon <= limit * (1 + 1e-9):
        return ""
    return (
        f"{key}: the job would bring {client} to ε = {epsilon:.3f} at δ = {delta:g}, and {who} at most {limit:g} "
        f"({before.epsilon(delta):.3f} spent in {before.jobs} jobs)"
    )


def countable_rows(data: Any) -> int:
    """Return how many rows `data` has, to sample from by number.

    Raises TaskError for a stream, and for a DataLoader, whose batches are its own.
    """
    import torch

    hint = "return a map-style Dataset from train_data: each row is drawn by its number"
    if isinstance(data, torch.utils.data.DataLoader):
        raise TaskError(f"[privacy.examples] draws its own batches, and the data is a DataLoader; {hint}")
    mapped = hasattr(data, "__getitem__") and isinstance(data, Sized)
    if isinstance(data, torch.utils.data.IterableDataset) or not mapped:
        raise TaskError(f"[privacy.examples] must know how many rows there are, and {type(data).__name__} is a "
                        f"stream; {hint}")  # fmt: skip
    return len(data)

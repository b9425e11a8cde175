"""Canaries: an audit that bounds from below what differential privacy a mechanism really gives.

A canary is a row made for the audit. Each of m canaries takes part with probability 1/2, and the auditor guesses from
the result which ones did. Under (ε, δ)-differential privacy, of r guesses that were fixed before the answers, at least
v are right with a probability of at most

    β + 2 m δ α,   β = P[B ≥ v],   α = max_i (P[B ≥ v − i] − β) / i,   B binomial(r, 1 / (1 + e^(−ε)))

(Steinke, Nasr, Jagielski, arXiv 2305.08846, theorem 5.2). The bound is the largest ε at which this is below 5 %.

A bound above the claimed ε shows that the claim is wrong. A bound below it shows nothing, unless the same audit of the
same code without noise exceeds the claim.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import TensorDataset

from fedqueue.config.client import Client
from fedqueue.config.privacy import ExamplePrivacyConfig
from fedqueue.config.training import TrainingConfig
from fedqueue.leak.measurement import ROW_NOISE, Measurement
from fedqueue.leak.statistics import Numbers
from fedqueue.local_model import LocalModel
from fedqueue.local_update import compute_update
from fedqueue.privacy.gaussian_dp import gaussian_epsilon
from fedqueue.privacy.spending import Spending, charge_of_job, steps_of_job
from fedqueue.private_training import simulated_key
from fedqueue.protocol.messages import Order
from fedqueue.task import Task, make_model
from fedqueue.tensors.frame import Frame
from fedqueue.tensors.manifest import Manifest
from fedqueue.training import set_seed

CONFIDENCE = 0.95
CANARIES = 2000
GUESSED = 10
"""One of GUESSED canaries is guessed to have taken part, one not to have; the auditor abstains from the others."""
LONGEST = 10.0
"""The norm of a canary's gradient, as a multiple of the one that it must be clipped to."""
LARGEST_SEPARATION = 1e4
"""Of canaries with a part from the others, in standard deviations: a larger one tells nothing more."""
MOST_STEPS = 500
JOBS = 10
"""Jobs of a client that are audited where the configuration does not say how many there are."""
ALMOST_NONE = 1e-3
"""The part of the noise that is left where the audit has to find that there is too little."""
TOO_LITTLE = "a thousandth of the noise"


@dataclass(frozen=True)
class CanaryAudit:
    """What one audit found."""

    claimed: float
    """ε that the account of the same steps claims."""
    bound: float
    """The lower bound on ε, with 95 % confidence."""
    chance: float
    """The bound from the same scores and canaries that have nothing to do with them."""
    estimate: float
    """ε of a Gaussian mechanism whose scores lie as far apart: no bound, and closer to the truth where there is one."""
    canaries: int
    guesses: int
    correct: int
    seconds: float


class CanaryTask(Task):
    """Rows whose gradient is the row itself. Each canary has a parameter of its own, so that canaries do not mix."""

    def model(self) -> torch.nn.Module:
        """A vector of zeros, one for each canary."""
        return torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(CANARIES))])

    def loss(self, model: torch.nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
        """−⟨row, parameters⟩, the mean over the batch: training moves the parameters along the rows."""
        return -(batch[0] @ next(iter(model.parameters()))).mean()

    def num_examples(self, data: TensorDataset) -> int:
        """The number of rows, canaries that do not take part included: it is public."""
        return len(data)


def audit_rows(
    privacy: ExamplePrivacyConfig, training: TrainingConfig, rows: int, steps: int, seed: int
) -> CanaryAudit:
    """Audit `steps` steps of DP-SGD as a job trains them: sampling, clipping, noise, with the run's own code.

    `rows` are those of the client; the audit has CANARIES rows, which are drawn at the same rate. Half of them, by
    chance, are zeros in place of canaries. The optimizer is plain SGD, which loses nothing of what noise has left.
    """
    started = time.perf_counter()
    taking_part = np.random.default_rng(seed).random(CANARIES) < 0.5
    rows_taking_part = torch.from_numpy(taking_part)[:, None] * torch.eye(CANARIES)
    data = TensorDataset(LONGEST * privacy.clip_norm * rows_taking_part)
    steps = min(steps, MOST_STEPS)
    charge = charge_of_job(privacy, training, rows)
    plain = TrainingConfig(
        optimizer="sgd", learning_rate=1.0, local_steps=steps, batch_size=max(1, round(charge.sampling_rate * CANARIES))
    )
    noise = charge.noise_multiplier
    fixed = ExamplePrivacyConfig(max_grad_norm=privacy.clip_norm, noise_multiplier=noise, delta=privacy.at_delta)
    order = Order(run="canaries", job="canaries-0", client="canaries", seed=seed, training=plain, privacy=fixed)
    task = CanaryTask()
    set_seed(seed)
    module = make_model(task)
    manifest = Manifest.from_module(module)
    base, local = Frame(manifest), Frame(manifest)
    base.read(module)
    local_model = LocalModel(task, module, manifest)
    progress = local_model.progress(Client("canaries"), 0, lambda: None)
    compute_update(task, local_model, data, order, base, local, progress, simulated_key(seed, order))
    scores = local.parameters.double().numpy()
    claimed = Spending().plus("canaries", charge_of_job(fixed, plain, CANARIES)).epsilon(privacy.at_delta)
    return audit_of(scores, taking_part, claimed, privacy.at_delta, seed, started)


def audit_of(
    scores: Numbers, taking_part: npt.NDArray[np.bool_], claimed: float, delta: float, seed: int, started: float
) -> CanaryAudit:
    """Return what the scores of canaries tell of who took part; `started` is when the audit began."""
    guesses, correct = guessed_right(scores, taking_part)
    by_chance = guessed_right(scores, np.random.default_rng([seed, 1]).permutation(taking_part))
    return CanaryAudit(
        claimed,
        epsilon_bound(correct, guesses, len(scores), delta),
        epsilon_bound(by_chance[1], guesses, len(scores), delta),
        gaussian_epsilon(separation(scores, taking_part), delta),
        len(scores),
        guesses,
        correct,
        time.perf_counter() - started,
    )


def guessed_right(scores: Numbers, taking_part: npt.NDArray[np.bool_]) -> tuple[int, int]:
    """Return the number of guesses, and of the right ones: the highest scores took part, the lowest did not."""
    order, each = np.argsort(scores, kind="stable"), len(scores) // GUESSED
    return 2 * each, int(taking_part[order[len(order) - each :]].sum() + (~taking_part[order[:each]]).sum())


def p_value(correct: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """Return the largest probability of at least `correct` right guesses under (ε, δ)-differential privacy."""
    chance = 1 / (1 + math.exp(-epsilon))
    k = np.arange(guesses + 1)
    log_choose = math.lgamma(guesses + 1) - np.array([math.lgamma(i + 1) + math.lgamma(guesses - i + 1) for i in k])
    mass = np.exp(log_choose + k * math.log(chance) - (guesses - k) * (epsilon + math.log1p(math.exp(-epsilon))))
    tail = np.cumsum(mass[::-1])[::-1]  # P[B ≥ k]
    beta = float(tail[correct])
    gained = tail[:correct][::-1] - beta  # P[B ≥ v − i] − P[B ≥ v] for i = 1 … v
    alpha = float((gained / np.arange(1, correct + 1)).max(initial=0.0))
    return min(1.0, beta + 2 * canaries * delta * alpha)


def epsilon_bound(correct: int, guesses: int, canaries: int, delta: float) -> float:
    """Return the largest ε that `correct` right guesses exclude with 95 % confidence; 0 if they exclude no ε."""
    low, high = 0.0, 64.0
    if p_value(correct, guesses, canaries, low, delta) >= 1 - CONFIDENCE:
        return 0.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        if p_value(correct, guesses, canaries, middle, delta) < 1 - CONFIDENCE:
            low = middle
        else:
            high = middle
    return low


def separation(scores: Numbers, taking_part: npt.NDArray[np.bool_]) -> float:
    """Return μ, how far the mean scores of canaries with and without a part lie apart, in standard deviations."""
    inside, outside = scores[taking_part], scores[~taking_part]
    apart, spread = float(inside.mean() - outside.mean()), float(outside.std())
    return max(0.0, min(apart / spread, LARGEST_SEPARATION)) if spread else LARGEST_SEPARATION * (apart > 0)


def canary_measurements(
    privacy: ExamplePrivacyConfig, training: TrainingConfig, rows: int, seed: int
) -> list[Measurement]:
    """Audit the jobs of a client with `rows` rows, and the same with almost no noise, which the audit must notice."""
    steps = steps_of_job(training, rows) * (privacy.jobs or JOBS)
    charge = charge_of_job(privacy, training, rows)
    measurements: list[Measurement] = []
    for noise, configured in ((charge.noise_multiplier, True), (charge.noise_multiplier * ALMOST_NONE, False)):
        fixed = ExamplePrivacyConfig(
            max_grad_norm=privacy.clip_norm, noise_multiplier=max(noise, 1e-3), delta=privacy.at_delta
        )
        audit = audit_rows(fixed, training, rows, steps, seed)
        protection = f"{ROW_NOISE}, claimed ε {audit.claimed:.2f}" if configured else TOO_LITTLE
        measurements += measurements_of(audit, "canaries", protection, configured)
    return measurements


def measurements_of(audit: CanaryAudit, attack: str, protection: str, configured: bool = True) -> list[Measurement]:
    """Return the bound and the estimate of an audit, as lines of the table of attacks."""
    return [
        Measurement(
            name, "coordinator", protection, value, control, rows=audit.canaries, updates=1,
            seconds=round(audit.seconds, 2), configured=configured,
        )
        for name, value, control in ((attack, audit.bound, audit.chance), (f"{attack}_estimate", audit.estimate, 0.0))
    ]  # fmt: skip

"""What `[privacy.clients]` costs in a run, computed before it: noise, participations, versions, and a verdict."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedqueue.config.schema import Config
from fedqueue.privacy.gaussian_dp import client_budget

DROWNED = 1.0
"""From which ratio of noise to the largest possible signal a verdict warns."""
NOT_COVERED_OF_CLIENTS = (
    "not covered for clients: who trained when, durations, failures, bytes, and the numbers of examples that clients "
    "register"
)


@dataclass(frozen=True)
class ClientPrivacyCost:
    """What a run costs each of its clients, and its model."""

    noise_multiplier: float
    """z: the standard deviation of one keeper's noise, as a multiple of what one client can change in a sum."""
    participations: int
    """Fresh updates that a client's budget pays for."""
    epsilon_of_one: float
    """ε of a client after one fresh update."""
    epsilon: float
    """ε of a client whose budget is used up."""
    versions: int
    """The number of versions after which the budgets are used up, if all clients are equally fast."""
    noise_to_signal: float
    """The norm of the noise in a version's mean, divided by the largest norm that the mean can have: z √(n d) / K."""


def client_cost(config: Config, parameters: int) -> ClientPrivacyCost:
    """Compute the cost in a run with n keepers and K updates in a version; `parameters` is d, the size of the model."""
    levels = config.secure.weight_levels
    budget, most = client_budget(config.privacy.clients, levels)
    noise = budget.noise_multiplier
    participations = most // levels**2
    return ClientPrivacyCost(
        noise, participations, budget.epsilon(levels**2), budget.epsilon(most),
        participations * config.clients.number // config.buffer_size,
        noise * math.sqrt(len(config.secure.keepers) * parameters) / config.buffer_size,
    )  # fmt: skip


def client_lines(config: Config, cost: ClientPrivacyCost, parameters: int) -> list[str]:
    """Say in sentences what the numbers mean."""
    delta = config.privacy.clients.at_delta
    lines = [
        f"clients, δ = {delta:g}: noise multiplier {cost.noise_multiplier:.3f} by each of {len(config.secure.keepers)} "
        f"keepers; a fresh update costs ε = {cost.epsilon_of_one:.2f}, and {cost.participations} of them, which the "
        f"budget pays for, ε = {cost.epsilon:.2f}; stale ones cost less",
        f"with {config.clients.number} clients and {config.buffer_size} updates in a version, the budgets are used up "
        f"after about {cost.versions} versions" + _of_stop(config, cost),
    ]
    if delta * config.clients.number > 0.5:
        lines.append(f"δ = {delta:g} is too large for {config.clients.number} clients: set it well below 1 / clients")
    ratio = cost.noise_to_signal
    if ratio > DROWNED:
        needed = math.ceil(cost.noise_multiplier * math.sqrt(len(config.secure.keepers) * parameters))
        lines.append(
            f"expect no learning: with {config.buffer_size} clients per version the noise in {parameters} parameters "
            f"is {ratio:.2g} times the largest signal; use [privacy.examples], a smaller model, or about {needed} "
            "updates in a version"
        )
    else:
        lines.append(f"the noise in a version's mean is at most {ratio:.2g} of its largest signal")
    return [*lines, NOT_COVERED_OF_CLIENTS]


def _of_stop(config: Config, cost: ClientPrivacyCost) -> str:
    wanted = config.stop.versions
    if wanted is None:
        return ""
    return f"; [stop] asks for {wanted}" + (", so the run ends before that" if cost.versions < wanted else "")

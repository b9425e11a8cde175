"""FADAS: AMSGrad over the buffer's mean, with a rate that depends on the longest delay (Wang et al., arXiv 2407.18365).

Δ is the buffer's mean. All operations are by coordinate, without bias correction:

    m ← β₁ m + (1 − β₁) Δ        v ← β₂ v + (1 − β₂) Δ²        v̂ ← max(v̂, v)
    x ← x + η_t m / (√v̂ + ε)     η_t = η where max τ_i ≤ τ_c, else min(η, 1 / max τ_i)

This module makes the pseudo-delta. The default server optimizer, SGD at rate 1, adds it unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from fedqueue.tensors.frame import Frame
from fedqueue_coordinator.algorithms.aggregator import Accumulator, Aggregator, Step

DelayRule = Callable[[float, int], float]
DELAY_RULES: dict[str, DelayRule] = {
    "bound": lambda rate, tau: min(rate, 1.0 / tau),
    "divide": lambda rate, tau: rate / tau,
}
"""η and a delay beyond τ_c → η_t. `bound`, the paper's, lowers the rate only if η > 1/τ; `divide` always lowers it."""


def fadas(
    mean: Aggregator,
    learning_rate: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-8,
    delay_threshold: int = 10,
    delay_rule: str = "bound",
) -> Aggregator:
    """Make the aggregator. `mean` makes Δ of the K updates; `delay_rule` applies beyond `delay_threshold`, τ_c ≥ 1.

    State: m, v and v̂, three float32 vectors as long as the parameters, in addition to the accumulator of `mean`.
    Raises ValueError for a value out of its range.
    """
    beta1, beta2 = betas
    if not (learning_rate > 0 and math.isfinite(learning_rate) and eps > 0 and math.isfinite(eps)):
        raise ValueError(f"learning_rate and eps must be positive, they are {learning_rate} and {eps}")
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"betas must be from 0 to below 1, they are {betas}")
    if delay_threshold < 1:
        raise ValueError(f"delay_threshold must be at least 1, it is {delay_threshold}")
    if delay_rule not in DELAY_RULES:
        raise ValueError(f"delay_rule is {delay_rule!r}; known: {', '.join(DELAY_RULES)}")

    def finish(acc: Accumulator, model: Frame) -> Step:
        longest = acc.staleness
        step = mean.finish(acc, model)
        for name in ("m", "v", "v_max"):
            if name not in acc.state:
                acc.state[name] = torch.zeros_like(step.delta)
        m, v, v_max = acc.state["m"], acc.state["v"], acc.state["v_max"]
        m.mul_(beta1).add_(step.delta, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(step.delta, step.delta, value=1 - beta2)
        torch.maximum(v_max, v, out=v_max)
        rate = learning_rate if longest <= delay_threshold else DELAY_RULES[delay_rule](learning_rate, longest)
        denominator = torch.sqrt(v_max, out=step.delta).add_(eps)
        torch.div(m, denominator, out=step.delta).mul_(rate)
        return step

    return Aggregator("fadas", mean.buffer_size, mean.add, finish, takes_pieces=mean.takes_pieces)

"""An aggregation algorithm: the mean of a buffer with momentum, which decays faster the staler the buffer is."""

from __future__ import annotations

from fedqueue import Accumulator, Aggregator, Config, Frame, Step, fedbuff


def heavy_ball(config: Config, momentum: float = 0.9) -> Aggregator:
    """Return v ← β / (1 + max τ) · v + Δ̄, x ← x + v. The option `momentum` is β, from 0 to below 1."""
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be from 0 to below 1, it is {momentum}")
    mean = fedbuff(config.buffer_size, gentle)  # its `add` stays as it is: the sum, and the weight of each update

    def finish(acc: Accumulator, model: Frame) -> Step:
        stale = acc.staleness
        step = mean.finish(acc, model)
        if "velocity" in acc.state:  # committed with each version, so that it survives a crash of the coordinator
            step.delta.add_(acc.state["velocity"], alpha=momentum / (1 + stale))
        acc.state["velocity"] = step.delta.clone()
        return step

    return Aggregator("heavy_ball", config.buffer_size, mean.add, finish)


def gentle(tau: int) -> float:
    """A staleness function τ → weight: 1 for a fresh update, always above 1/2."""
    return 0.5 + 0.5 / (1 + tau)

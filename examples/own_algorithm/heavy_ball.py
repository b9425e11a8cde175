"""An aggregation of your own: a buffer's mean with momentum that forgets faster the staler the buffer is."""

from fedqueue.config.loading import Config
from fedqueue_coordinator.algorithms.aggregator import Aggregator, fedbuff


def heavy_ball(config: Config, momentum: float = 0.9) -> Aggregator:
    """v ← β / (1 + max τ) · v + Δ̄; x ← x + v. Options: `momentum`, β from 0 to below 1."""
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be from 0 to below 1, it is {momentum}")
    mean = fedbuff(config.buffer_size, gentle)  # what it adds up, and how an update is weighed, stay FedBuff's

    def finish(acc, model):
        stale = acc.staleness
        step = mean.finish(acc, model)
        if "velocity" in acc.state:  # kept from version to version, and through a crash of the coordinator
            step.delta.add_(acc.state["velocity"], alpha=momentum / (1 + stale))
        acc.state["velocity"] = step.delta.clone()
        return step

    return Aggregator("heavy_ball", config.buffer_size, mean.add, finish)


def gentle(tau: int) -> float:
    """A staleness function of your own: 1 for a fresh update, never below 1/2."""
    return 0.5 + 0.5 / (1 + tau)

"""A filter for updates that come one by one: too long, or in another direction than those merged before.

Without a buffer there are no others to compare an update with but its predecessors. Two running estimates stand for
them: the median of the last norms, and an exponential mean of the last directions Δ / ‖Δ‖ (of unit length each, so that
no update pulls it further than another).

The estimates change with a version, from the updates in it, and are committed with it. Strikes are counted from the
ledger: a rejection by the filter adds one, a version with an update of the client takes all back. So a successor has
what its predecessor had.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from fedqueue.config.aggregation import FilterConfig
from fedqueue_coordinator.algorithms.deterministic_reductions import inner_product
from fedqueue_coordinator.core.admission import Inadmissible

NORM = "norm"  # longer than aggregation.filter.norm_factor times the median of the last merged ones
DIRECTION = "direction"  # its cosine with the running mean of the directions is below aggregation.filter.min_cosine
REASONS = frozenset({NORM, DIRECTION})


class OutlierFilter:
    """Memory: two float32 vectors as long as the parameters where `min_cosine` is set, and `window` numbers."""

    def __init__(self, config: FilterConfig, parameters: int) -> None:
        self._config = config
        self._judges_directions = config.min_cosine > -1
        size = parameters if self._judges_directions else 0
        self._direction = torch.zeros(size)
        self._coming = torch.zeros(size)  # the direction after the coming version
        self._norms: list[float] = []  # the last `window` of merged updates
        self._new_norms: list[float] = []
        self._merged = 0  # up to `warmup`
        self._strikes: dict[str, int] = {}

    # Judging

    def judge(self, delta: torch.Tensor, norm: float) -> None:
        """Raises Inadmissible for an outlier; `norm` is the L2 norm of `delta`, float32 [parameters]."""
        config = self._config
        if not config.on or self._merged < config.warmup:
            return
        usual = statistics.median(self._norms)
        if config.norm_factor and norm > config.norm_factor * usual:
            raise Inadmissible(NORM, f"norm {norm:.4g}, at most {config.norm_factor:g} · {usual:.4g} is merged")
        cosine = self._cosine(delta, norm)
        if cosine < config.min_cosine:
            raise Inadmissible(DIRECTION, f"cosine {cosine:.3f} with the mean direction, at least {config.min_cosine}")

    def _cosine(self, delta: torch.Tensor, norm: float) -> float:
        length = math.sqrt(inner_product(self._direction, self._direction))
        if not self._judges_directions or norm == 0 or length == 0:
            return 1.0
        return inner_product(delta, self._direction) / (norm * length)

    def admitted(self, delta: torch.Tensor, norm: float) -> None:
        """An update that the coming version will hold."""
        if not self._config.on:
            return
        self._new_norms.append(norm)
        if self._judges_directions and norm > 0:
            momentum = self._config.momentum
            self._coming.mul_(momentum).add_(delta, alpha=(1 - momentum) / norm)

    def committed(self, clients: Iterable[str]) -> None:
        """The version with what was admitted is made; `clients` contributed to it."""
        self._direction.copy_(self._coming)
        self._norms = [*self._norms, *self._new_norms][-self._config.window :]
        self._merged = min(self._merged + len(self._new_norms), self._config.warmup)
        self._new_norms = []
        for client in clients:
            self._strikes.pop(client, None)

    # Quarantine

    def strike(self, client: str) -> float:
        """The client's update was rejected by the filter: for how many seconds it is quarantined now; 0: not yet."""
        self._strikes[client] = self._strikes.get(client, 0) + 1
        return self._config.quarantine_seconds if self._strikes[client] >= self._config.strikes else 0.0

    def restore_quarantines(self, ledger: Iterable[Mapping[str, Any]], now: float) -> dict[str, float]:
        """Count the strikes in a predecessor's ledger; returns client → end of its quarantine, where that is to come.

        Times are seconds of the run's clock.
        """
        self._strikes = {}
        quarantined: dict[str, float] = {}
        for record in ledger:
            if record["kind"] == "version":
                for line in record["merged"]:
                    self._strikes.pop(line["client"], None)
            elif record["kind"] == "rejected" and record["reason"] in REASONS:
                seconds = self.strike(record["client"])
                quarantined.update({record["client"]: record["seconds"] + seconds} if seconds else {})
        return {client: end for client, end in quarantined.items() if end > now}

    # State

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """As of the last version: `direction` float32 [parameters], `norms` float64 [≤ window], `merged` int64."""
        if not self._config.on:
            return {}
        norms = torch.tensor(self._norms, dtype=torch.float64)
        return {"direction": self._direction, "norms": norms, "merged": torch.tensor(self._merged)}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """The inverse of `state`."""
        if not state:
            return
        self._direction, self._coming = state["direction"], state["direction"].clone()
        self._norms, self._merged = state["norms"].tolist(), int(state["merged"])

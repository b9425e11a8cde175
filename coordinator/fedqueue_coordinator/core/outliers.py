"""Rejects updates that are outliers: by a limit on the norm, or by comparison with the updates merged before.

A single huge delta is the cheapest way to spoil a model (Sun et al., arXiv 1911.07963, bound the norm for that reason).
Both classes reject instead of clipping: an update is merged as the client sent it, or the ledger records why not.

`NormLimit` is the limit of `[admission]`. `OutlierFilter` is `[aggregation.filter]`, for updates that are merged one by
one: without a buffer, an update can only be compared with its predecessors. Two running estimates represent them: the
median of the last norms, and an exponential mean of the last directions Δ / ‖Δ‖ (each of unit length, so that no update
has more influence than another).

The filter's estimates change with a version, from the updates in it, and are committed with it. Its strikes are counted
from the ledger: a rejection by the filter adds one, and a version with an update of the client resets them. So a
coordinator that resumes the run has the same estimates and strikes.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from fedqueue.config.aggregation import FilterConfig
from fedqueue.config.schema import AdmissionConfig
from fedqueue_coordinator.algorithms.deterministic_reductions import inner_product
from fedqueue_coordinator.core.admission import Inadmissible
from fedqueue_coordinator.core.reasons import OUTLIER, RejectionReason

MIN_NORMS_FOR_QUANTILE = 10  # merged updates below which a quantile of their norms is not used


class NormLimit:
    """Limits the L2 norm of an update: by a fixed number, or by a quantile of the norms that were merged.

    `accepted`: norms of the updates merged so far, oldest first, so that a resumed run has the same limit.
    """

    def __init__(self, config: AdmissionConfig, accepted: Iterable[float] = ()) -> None:
        self._config = config
        self._accepted = deque(accepted, maxlen=config.norm_window)

    @property
    def limit(self) -> float:
        """The largest norm that is accepted now; infinity without a limit."""
        config = self._config
        fixed = config.max_norm or math.inf
        if not config.norm_quantile or len(self._accepted) < MIN_NORMS_FOR_QUANTILE:
            return fixed
        quantile = float(np.quantile(list(self._accepted), config.norm_quantile, method="higher"))
        return min(fixed, config.norm_slack * quantile)

    def check(self, norm: float) -> None:
        """Raise Inadmissible if the norm is above the limit."""
        if norm > (limit := self.limit):
            raise Inadmissible(
                RejectionReason.TOO_LARGE, f"the delta's norm is {norm:.6g}, at most {limit:.6g} is merged"
            )

    def accept(self, norm: float) -> None:
        """Add the norm of an update that is merged to the window."""
        self._accepted.append(norm)


class OutlierFilter:
    """Compares an update with running estimates of the updates merged before.

    Memory: two float32 vectors as long as the parameters if `min_cosine` is set, and `window` numbers.
    """

    def __init__(self, config: FilterConfig, parameters: int) -> None:
        self._config = config
        self._judges_directions = config.min_cosine is not None
        size = parameters if self._judges_directions else 0
        self._direction = torch.zeros(size)
        self._coming = torch.zeros(size)  # the direction once the coming version is made
        self._norms: list[float] = []  # the last `window` of merged updates
        self._new_norms: list[float] = []
        self._merged = 0  # up to `warmup`
        self._strikes: dict[str, int] = {}

    # Judging

    def judge(self, delta: torch.Tensor, norm: float) -> None:
        """Raise Inadmissible for an outlier; `norm` is the L2 norm of `delta`, float32 [parameters]."""
        config = self._config
        if not config.on or self._merged < config.warmup:
            return
        usual = statistics.median(self._norms)
        if config.norm_factor and norm > config.norm_factor * usual:
            raise Inadmissible(
                RejectionReason.OUTLIER_NORM, f"norm {norm:.4g}, at most {config.norm_factor:g} · {usual:.4g} is merged"
            )
        cosine = self._cosine(delta, norm)
        if config.min_cosine is not None and cosine < config.min_cosine:
            raise Inadmissible(
                RejectionReason.OUTLIER_DIRECTION,
                f"cosine {cosine:.3f} with the mean direction, at least {config.min_cosine}",
            )

    def _cosine(self, delta: torch.Tensor, norm: float) -> float:
        length = math.sqrt(inner_product(self._direction, self._direction))
        if not self._judges_directions or norm == 0 or length == 0:
            return 1.0
        return inner_product(delta, self._direction) / (norm * length)

    def admitted(self, delta: torch.Tensor, norm: float) -> None:
        """Include an update of the coming version in the coming estimates."""
        if not self._config.on:
            return
        self._new_norms.append(norm)
        if self._judges_directions and norm > 0:
            momentum = self._config.momentum
            self._coming.mul_(momentum).add_(delta, alpha=(1 - momentum) / norm)

    def committed(self, clients: Iterable[str]) -> None:
        """Replace the estimates: the version with the admitted updates, which are of `clients`, is made."""
        self._direction.copy_(self._coming)
        self._norms = [*self._norms, *self._new_norms][-self._config.window :]
        self._merged = min(self._merged + len(self._new_norms), self._config.warmup)
        self._new_norms = []
        for client in clients:
            self._strikes.pop(client, None)

    # Quarantine

    def strike(self, client: str) -> float:
        """Count a rejection by the filter; return the seconds of the quarantine that it causes, or 0."""
        self._strikes[client] = self._strikes.get(client, 0) + 1
        return self._config.quarantine_seconds if self._strikes[client] >= self._config.strikes else 0.0

    def restore_quarantines(self, ledger: Iterable[Mapping[str, Any]], now: float) -> dict[str, float]:
        """Count the strikes in the ledger; return client → end of its quarantine, for those that end after `now`.

        Times are seconds of the run's clock.
        """
        self._strikes = {}
        quarantined: dict[str, float] = {}
        for record in ledger:
            if record["kind"] == "version":
                for line in record["merged"]:
                    self._strikes.pop(line["client"], None)
            elif record["kind"] == "rejected" and record["reason"] in OUTLIER:
                seconds = self.strike(record["client"])
                quarantined.update({record["client"]: record["seconds"] + seconds} if seconds else {})
        return {client: end for client, end in quarantined.items() if end > now}

    # State

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """After the last version: `direction` float32 [parameters], `norms` float64 [≤ window], `merged` int64."""
        if not self._config.on:
            return {}
        norms = torch.tensor(self._norms, dtype=torch.float64)
        return {"direction": self._direction, "norms": norms, "merged": torch.tensor(self._merged)}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Set what `state` returned."""
        if not state:
            return
        self._direction, self._coming = state["direction"], state["direction"].clone()
        self._norms, self._merged = state["norms"].tolist(), int(state["merged"])

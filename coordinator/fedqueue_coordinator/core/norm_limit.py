"""How large an update may be: a fixed limit on its L2 norm, or one that follows the updates that were accepted.

A single huge delta is the cheapest way to spoil a model (Sun et al., arXiv 1911.07963, bound the norm for that). The
limit here rejects instead of clipping: what was merged is what the client sent, and the ledger says what was not.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

import numpy as np

from fedqueue.config.loading import AdmissionConfig
from fedqueue_coordinator.core.admission import NORM, Inadmissible

FEWEST = 10  # accepted updates before a quantile of them says anything


class NormLimit:
    """`accepted`: norms of the updates merged so far, oldest first: a successor goes on with the same limit."""

    def __init__(self, config: AdmissionConfig, accepted: Iterable[float] = ()) -> None:
        self._config = config
        self._accepted = deque(accepted, maxlen=config.norm_window)

    @property
    def limit(self) -> float:
        """The largest norm that is accepted now; infinite where nothing limits it."""
        config = self._config
        fixed = config.max_norm or math.inf
        if not config.norm_quantile or len(self._accepted) < FEWEST:
            return fixed
        quantile = float(np.quantile(list(self._accepted), config.norm_quantile, method="higher"))
        return min(fixed, config.norm_slack * quantile)

    def check(self, norm: float) -> None:
        """Raises Inadmissible where the norm is above the limit."""
        if norm > (limit := self.limit):
            raise Inadmissible(NORM, f"the delta's norm is {norm:.6g}, at most {limit:.6g} is merged")

    def accept(self, norm: float) -> None:
        """Count the norm of an update that is merged."""
        self._accepted.append(norm)

"""What each client has spent of the budget of `[privacy.clients]`, by the cohorts that the keepers were asked about.

A cohort is charged, and its charge is in the ledger, before a keeper can see it: whatever becomes of it, its sum may be
known. The keepers have accounts of their own and refuse what exceeds them. This one spares them cohorts that they would
refuse, and clients jobs whose updates could not be merged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedqueue.config.schema import Config
from fedqueue.privacy.gaussian_dp import client_budget
from fedqueue_coordinator.core.admission import Inadmissible
from fedqueue_coordinator.core.reasons import RejectionReason
from fedqueue_coordinator.core.run_counters import RunCounters


class ClientAccount:
    """The accounts of all clients; without client privacy it admits everything."""

    def __init__(self, config: Config, run_counters: RunCounters) -> None:
        """`run_counters` has the accounts, which a successor restores from the ledger."""
        self._settings, self._levels = config.privacy.clients, config.secure.weight_levels
        self._counters = run_counters
        if self._settings.on:
            self._budget, self._most = client_budget(self._settings, self._levels)

    def admit(self, client: str, load: int) -> None:
        """Raise Inadmissible where the client's account has no room for `load` in the coming version."""
        if not self._settings.on or self._spent(client) + load**2 <= self._most:
            return
        raise Inadmissible(
            RejectionReason.BUDGET,
            f"privacy.clients: {client} has spent ε = {self._budget.epsilon(self._spent(client)):.3f} at δ = "
            f"{self._budget.delta:g}, of at most {self._budget.epsilon(self._most):.3f}, and the update does not fit",
        )

    def used_up(self) -> Sequence[str]:
        """The clients whose next fresh update would not fit, in the order of their names."""
        if not self._settings.on:
            return ()
        return sorted(c for c in self._counters.accounts if self._spent(c) + self._levels**2 > self._most)

    def charge(self, cohort: str, loads: Mapping[str, int]) -> bool:
        """Charge the loads of a cohort, which is named by its digest; False if that is done, or nothing is charged."""
        if not self._settings.on or cohort in self._counters.charged:
            return False
        self._counters.charge(cohort, loads)
        return True

    def statement(self, loads: Mapping[str, int]) -> dict[str, Any]:
        """What the records of a charged cohort and of its version say of privacy; empty without client privacy."""
        if not self._settings.on:
            return {}
        worst = max(self._counters.accounts.values())
        return {
            "mechanism": "gaussian",
            "noise_by": "keepers",
            "noise_multiplier": self._budget.noise_multiplier,
            "weight_levels": self._levels,
            "delta": self._budget.delta,
            "loads": dict(loads),
            "mu_max": self._budget.mu(worst),
            "epsilon_max": self._budget.epsilon(worst),
        }

    def _spent(self, client: str) -> int:
        return self._counters.accounts.get(client, 0)

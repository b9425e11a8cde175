"""A keeper's own policy: a TOML file, by default `keeper.toml` in its key folder.

min_cohort = 5     # no sum over fewer clients is released, whatever the run's configuration says
max_epsilon = 8    # no client spends more in a run at `delta`; runs without [privacy.clients] are refused
delta = 1e-5
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedqueue.config.policy_file import read_policy
from fedqueue.config.sections import refuse
from fedqueue.secure.keeper import OwnBudget

FILE = "keeper.toml"


class KeeperPolicy(BaseModel):
    """The limits of one keeper."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    min_cohort: Annotated[int, Field(ge=2)] | None = None
    """The least number of clients in a sum; None: the run's."""
    max_epsilon: Annotated[float, Field(gt=0, strict=False)] | None = None
    """The most that a client may spend in one run; None: what the run says, or no differential privacy at all."""
    delta: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The δ of `max_epsilon`."""

    @model_validator(mode="after")
    def _budget_is_complete(self) -> KeeperPolicy:
        if (self.max_epsilon is None) != (self.delta is None):
            raise refuse("max_epsilon and delta belong together", "set both, or leave out both")
        return self

    @property
    def own_budget(self) -> OwnBudget | None:
        """What a client may spend in one run."""
        return OwnBudget(self.max_epsilon, self.delta) if self.max_epsilon and self.delta else None


def load_keeper_policy(path: Path) -> KeeperPolicy:
    """Read a policy file; raises ConfigurationError with the key, its value and the accepted values."""
    return read_policy(KeeperPolicy, path)

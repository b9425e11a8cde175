"""A keeper's own policy: a TOML file, by default `keeper.toml` in its key folder.

min_cohort = 5     # no sum over fewer clients is released, whatever the run's configuration says
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from fedqueue.config.policy_file import read_policy

FILE = "keeper.toml"


class KeeperPolicy(BaseModel):
    """The limits of one keeper."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    min_cohort: Annotated[int, Field(ge=2)] | None = None
    """The least number of clients in a sum; None: the run's."""


def load_keeper_policy(path: Path) -> KeeperPolicy:
    """Read a policy file; raises ConfigurationError with the key, its value and the accepted values."""
    return read_policy(KeeperPolicy, path)

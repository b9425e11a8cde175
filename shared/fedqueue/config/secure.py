"""The section `[secure]`: secure aggregation by keepers, which hides each update among those of its cohort."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedqueue.config.names import KeeperName
from fedqueue.config.sections import OFF, Count, Positive, Section, refuse

MAX_KEEPERS = 3
MAX_MEMBERS = 512
"""The most updates in one cohort."""
RESERVED_NAME = "coordinator"
"""No keeper has this name: the files of keys are named after their owners."""


class SecureConfig(Section):
    """Secure aggregation: the coordinator sees weighted sums of updates, and no update.
    docs/how-to/secure-aggregation.md says how to set it up."""

    keepers: Annotated[tuple[KeeperName, ...], Field(max_length=MAX_KEEPERS)] = ()
    """Names of the keepers, at most three, each at an organisation of its own; without any, updates are plain."""
    min_cohort: Annotated[int, Field(ge=2)] = 3
    """The number of clients that a version's sum has at least, with none of them outweighing the others."""
    weight_levels: Annotated[int, Field(ge=1, le=8)] = 8
    """Staleness weights are rounded to whole multiples of 1 divided by this number; 1: every update weighs the same."""
    clip_norm: Positive = 10.0
    """The L2 norm that a client's delta is scaled down to where it is longer. A large value costs resolution only."""
    max_examples: Annotated[Count | None, OFF] = None
    """With weights by examples: a client with more examples weighs as much as one with this number; `off`: no such
    weights."""
    examples: Literal["told", "hidden"] = "told"
    """Whether sites tell how many examples they have, or hide it from the operator. Where examples weigh, a hidden
    number is a masked word of each update, so that only the weighted sum over a cohort is seen."""
    wait_seconds: Annotated[Positive | None, OFF] = None
    """Ends the run as failed where a keeper has been awaited for so long; `off`: waits for it for ever."""

    @model_validator(mode="after")
    def _consistent(self) -> SecureConfig:
        if len(set(self.keepers)) != len(self.keepers):
            raise refuse("keepers has a name twice", "names must differ from each other")
        if self.hides_examples and not self.on:
            raise refuse(
                "examples cannot be 'hidden' without keepers, because the coordinator then reads each update",
                "name keepers, or set examples to 'told'",
            )
        return self

    @property
    def on(self) -> bool:
        """Whether updates are masked."""
        return bool(self.keepers)

    @property
    def hides_examples(self) -> bool:
        """Whether no message tells how many examples a client has."""
        return self.examples == "hidden"

"""What the sections of the configuration are made of: a strict, frozen model, and the bounded numbers in it."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A table of the configuration: an unknown key is an error, and nothing changes after it was read."""

    # Built at its first use: most commands use few of the tables, or none.
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, defer_build=True)

"""What the sections of the configuration are made of: a strict, frozen model, bounded numbers, names."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from fedqueue.protocol.keys import CLIENT_ID, RUN_NAME

ENVIRONMENT_PREFIX = "FEDQUEUE_"
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


def _run_name(name: str) -> str:
    if not RUN_NAME.fullmatch(name):
        raise ValueError("1 to 64 letters, digits, '_' and '-', the first a letter or digit")
    return name


def _client_id(client: str) -> str:
    if not CLIENT_ID.fullmatch(client):
        raise ValueError("1 to 64 letters, digits, '_', '.' and '-', the first a letter or digit")
    return client


RunName = Annotated[str, AfterValidator(_run_name)]
ClientId = Annotated[str, AfterValidator(_client_id)]


class Section(BaseModel):
    """A table of the configuration: an unknown key is an error, and nothing changes after it was read."""

    # Built at its first use: most commands use few of the tables, or none.
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, defer_build=True)

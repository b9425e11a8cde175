"""A keeper's own policy: a TOML file, by default `keeper.toml` in its key folder.

min_cohort = 5     # no sum over fewer clients is released, whatever the run's configuration says
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedqueue.config.loading import toml_text
from fedqueue.errors import ConfigurationError

FILE = "keeper.toml"


class KeeperPolicy(BaseModel):
    """The limits of one keeper."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    min_cohort: Annotated[int, Field(ge=2)] | None = None
    """The least number of clients in a sum; None: the run's."""


def load_keeper_policy(path: Path) -> KeeperPolicy:
    """Read a policy file; raises ConfigurationError with the key, its value and the accepted values."""
    try:
        return KeeperPolicy.model_validate(tomllib.loads(toml_text(path.read_bytes())))
    except OSError as error:
        raise ConfigurationError("--policy", str(path), f"cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError("--policy", str(path), f"is not TOML: {error}") from None
    except ValidationError as error:
        first, hint = error.errors(include_url=False)[0], ""
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            problem, hint = "unknown key", f"known keys: {', '.join(KeeperPolicy.model_fields)}"
        else:
            problem = first["msg"].replace("Input should ", "must ")
        raise ConfigurationError(f"{path.name}: {key}", first["input"], problem, hint) from None

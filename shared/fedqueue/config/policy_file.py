"""Reads the policy of a site or of a keeper: a TOML file with limits of its own, beside the run's configuration."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from fedqueue.config.loading import toml_text
from fedqueue.errors import ConfigurationError

P = TypeVar("P", bound=BaseModel)


def read_policy(kind: type[P], path: Path) -> P:
    """The policy in the file; raises ConfigurationError with the key, its value and the accepted values."""
    try:
        return kind.model_validate(tomllib.loads(toml_text(path.read_bytes())))
    except OSError as error:
        raise ConfigurationError("--policy", str(path), f"cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError("--policy", str(path), f"is not TOML: {error}") from None
    except ValidationError as error:
        first, hint = error.errors(include_url=False)[0], ""
        key = ".".join(map(str, first["loc"]))
        value = first["input"]
        if first["type"] == "refused":
            key, value, problem, hint = "", None, first["ctx"]["message"], first["ctx"]["hint"]
        elif first["type"] == "extra_forbidden":
            problem, hint = "unknown key", f"known keys: {', '.join(kind.model_fields)}"
        else:
            problem = first["msg"].replace("Input should ", "must ")
        raise ConfigurationError(f"{path.name}: {key}" if key else path.name, value, problem, hint) from None

"""Loads what the configuration names as code of the user's own: an aggregation, a staleness function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedqueue.config.entrypoint import import_entrypoint
from fedqueue.errors import ConfigurationError, TaskError


def load_plugin(entrypoint: str, folder: Path, key: str) -> Callable[..., Any]:
    """The callable that `entrypoint` names, relative to `folder`; raises ConfigurationError that names `key`."""
    try:
        module, name = import_entrypoint(entrypoint, folder, key)
    except TaskError as error:
        raise ConfigurationError(key, entrypoint, f"cannot be loaded: {error}") from error
    found = getattr(module, name, None)
    if not callable(found):
        own = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
        raise ConfigurationError(key, entrypoint, f"{name} is nothing to call; there: {', '.join(own) or 'nothing'}")
    result: Callable[..., Any] = found
    return result

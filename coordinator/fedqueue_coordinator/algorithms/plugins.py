"""Loads the user's own code that the configuration names: an aggregation, or a staleness function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedqueue.config.entrypoint import import_entrypoint
from fedqueue.errors import ConfigurationError, TaskError


def load_plugin(entrypoint: str, folder: Path, key: str) -> Callable[..., Any]:
    """Import the callable that `entrypoint` (FILE.py:NAME) names, relative to `folder`.

    Raises ConfigurationError for configuration key `key` if it cannot be loaded or is not callable.
    """
    try:
        module, name = import_entrypoint(entrypoint, folder, key)
    except TaskError as error:
        raise ConfigurationError(key, entrypoint, f"cannot be loaded: {error}") from error
    found = getattr(module, name, None)
    if not callable(found):
        own = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
        raise ConfigurationError(
            key, entrypoint, f"{name} is not callable", f"callables in this module: {', '.join(own) or 'none'}"
        )
    result: Callable[..., Any] = found
    return result

"""The options of `fedqueue compare`, each of which overrides its key in the section [compare] of the configuration."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedqueue.config.compare import CompareConfig
from fedqueue.errors import ConfigurationError
from fedqueue_coordinator.simulation.comparison import Variant


@dataclass(frozen=True)
class CompareOptions:
    """What the command line says. A value that is empty or None leaves the key in [compare] as it is."""

    strategies: Sequence[str] | None = None
    """With strategies or variants, those of [compare] are not compared."""
    variants: Sequence[Variant] = ()
    axes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Key → values to try, in place of `compare.tune`."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Other keys of [compare] → their values; None leaves the key as it is."""

    def applied_to(self, settings: CompareConfig) -> CompareConfig:
        """Return `settings` with the keys that these options override."""
        changes = {key: value for key, value in self.settings.items() if value is not None}
        if self.strategies is not None or self.variants:
            changes |= {"strategies": self.strategies, "variants": {}}
        return settings.model_copy(update=changes)


def parse_strategies(text: str) -> list[str] | None:
    """Parse "STRATEGY,STRATEGY,…"; None for an empty text."""
    return list(filter(None, map(str.strip, text.split(",")))) if text else None


def parse_variant(text: str) -> Variant:
    """Parse "NAME: KEY=VALUE …" with a shell's quotes; raises ConfigurationError for a text of another form."""
    name, colon, settings = text.partition(":")
    if not colon or not name.strip():
        hint = 'write "NAME: section.key=value section.key=value"'
        raise ConfigurationError("--variant", text, "has no name and colon", hint)
    return Variant(name.strip(), tuple(shlex.split(settings)))


def parse_axes(texts: Sequence[str]) -> dict[str, list[str]]:
    """Parse each "KEY=VALUE,VALUE,…"; raises ConfigurationError for a text of another form."""
    axes = {}
    for text in texts:
        key, equals, values = text.partition("=")
        if not equals or not key or not all(values.split(",")):
            raise ConfigurationError("--tune", text, "not a key with values", "write section.key=value,value,…")
        axes[key.strip()] = [value.strip() for value in values.split(",")]
    return axes


def parse_speeds(text: str) -> tuple[float, ...] | None:
    """Parse "1:2:4"; None for an empty text. Raises ConfigurationError for a text of another form."""
    try:
        return tuple(map(float, text.split(":"))) if text else None
    except ValueError:
        hint = "write how many times slower the clients are, in turn, such as 1:2:4"
        raise ConfigurationError("--speeds", text, "not a list of numbers", hint) from None

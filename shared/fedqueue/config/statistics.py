"""Configuration of the statistics that sites describe their data with, before any training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from fedqueue.config.sections import OFF, Count, Section, Text, refuse
from fedqueue.errors import ConfigurationError


class StatisticsConfig(Section):
    """`fedqueue describe`, and what of it the task gets before training."""

    min_count: Count = 10
    """The smallest number of rows that a figure of a site is about, where its policy.toml names no other."""
    bins: Annotated[int, Field(ge=4, le=1024)] = 256
    """Bins of the histograms that quantiles are computed from: a quantile is exact to within a bin, where each bin has
    enough rows."""
    bounds: dict[Text, tuple[float, float]] = {}
    """Public bounds of a column, `{ age = [0, 128] }`, for its histogram; without them, powers of two around the
    bulk of the values."""
    file: Annotated[Text | None, OFF] = None
    """The `describe.json` that `fedqueue describe` wrote, relative to the configuration file: the coordinator and each
    site give it to `Task.prepare` before anything else. `off`: `Task.prepare` is not called."""
    folder: Text = Field(default="statistics", exclude=True)
    """`fedqueue-worker`: folder in which a site keeps what it answered, so that it answers the same again."""
    values: dict[str, Any] = {}
    """The content of `file`. It is read with the configuration, and travels in it."""

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> StatisticsConfig:
        for column, (low, high) in self.bounds.items():
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise refuse(f"bounds.{column} is [{low:g}, {high:g}]", "write two numbers, the smaller one first")
        return self

    def read_from(self, folder: Path) -> StatisticsConfig:
        """Return these settings with the content of `file`, a path relative to `folder`.

        Raises ConfigurationError where it cannot be read.
        """
        if self.file is None or self.values:
            return self
        path, hint = folder / self.file, "write it with `fedqueue describe CONFIG.toml --output FILE`, or write 'off'"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigurationError("statistics.file", str(path), f"cannot be read: {error.strerror}", hint) from None
        except ValueError:
            raise ConfigurationError("statistics.file", str(path), "is not JSON", hint) from None
        if not isinstance(values, dict) or "columns" not in values:
            raise ConfigurationError("statistics.file", str(path), "has no statistics", hint)
        return self.model_copy(update={"values": values})

"""What the sections of an optimizer share: further keyword arguments, and the schedule of its learning rate."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field, PlainSerializer

from fedqueue.config.sections import OFF, Section, Text, refuse


def _read(value: Any) -> Any:
    """A list becomes a tuple, and the word `none`, which TOML has no value for, becomes None."""
    if isinstance(value, list | tuple):
        return tuple(_read(item) for item in value)
    if value is not None and not isinstance(value, bool | int | float | str):
        raise refuse("not accepted", "write a number, a string, true, false, 'none', or a list of these")
    return None if value == "none" else value


def _written(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_written(item) for item in value]
    return "none" if value is None else value


KINDS = Field(description='number, string, `true`, `false`, `"none"`, or list of these')
Option = Annotated[Any, AfterValidator(_read), PlainSerializer(_written), KINDS]
Options = dict[str, Option]
"""Keyword arguments of a class of torch: numbers, strings, booleans, `none`, and lists of these."""


class ScheduleConfig(Section):
    """How a learning rate changes step by step."""

    name: Annotated[Text | None, OFF] = None
    """A schedule of `torch.optim.lr_scheduler` in lower case, such as cosineannealinglr, or `inverse_sqrt`; `off`: the
    learning rate stays the same."""
    schedule_options: Options = {}
    """Keyword arguments of the schedule, such as T_max or gamma."""

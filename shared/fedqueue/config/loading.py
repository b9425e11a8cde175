"""Reads a run's configuration from TOML, the environment and the command line.

Later sources win: file, then `FEDQUEUE_SECTION__KEY` environment variables, then `--set section.key=value`.
This module and the two command lines are the only modules that read files and environment variables.
"""

from __future__ import annotations

import codecs
import difflib
import functools
import logging
import os
import re
import tomllib
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from fedqueue.config.names import ENVIRONMENT_PREFIX
from fedqueue.config.redis import refuse_password
from fedqueue.config.schema import Config
from fedqueue.config.sections import word_of
from fedqueue.errors import ConfigurationError

log = logging.getLogger("fedqueue.config")

SERVICE_VARIABLE = re.compile(r"_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?)$")
"""What Kubernetes and container links add to the environment, for a service whose name begins with `fedqueue`."""

RENAMED = {
    "aggregation.mode": "strategy",
    "aggregation.options": "strategy_options",
    "training.epochs": "local_epochs",
    "training.steps": "local_steps",
    "training.options": "optimizer_options",
    "server_optimizer.options": "optimizer_options",
    "server_optimizer.schedule.options": "schedule_options",
    "clients.minimum": "min_available",
    "compression.up": "uplink",
    "compression.down": "downlink",
    "compression.up_lossless": "uplink_lossless",
    "compression.down_lossless": "downlink_lossless",
    "compression.k": "topk_ratio",
    "compression.block": "int8_block",
    "dispatch.deadline_seconds": "round_deadline_seconds",
    "dispatch.leader_seconds": "leader_lease_seconds",
    "dispatch.compass": "fedcompass",
    "evaluation.every": "every_versions",
    "evaluation.seconds": "every_seconds",
    "checkpoint.seconds": "every_seconds",
    "security.outbox": "egress_log",
}
"""Earlier key → its present name in the same section. An earlier key is an error that names the present one."""
RENAMED_VALUES = {("dispatch.schedule", "free"): "async", ("dispatch.schedule", "compass"): "fedcompass"}
_WORDS = {"off": "to turn it off", "auto": "for the automatic value", "all": "for all", "median": "for the median"}


def load_config(
    path: Path | str, overrides: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> Config:
    """The validated configuration of the file at `path`, changed by the environment and then by `overrides`.

    `overrides` are texts `section.key=value`; `environment` is by default that of the process. Raises
    ConfigurationError that names the key, its value and the problem.

    >>> from fedqueue import load_config
    >>> config = load_config("examples/digits/federation.toml", overrides=["stop.versions=3"])
    >>> config.name, config.stop.versions
    ('digits', 3)
    """
    path = Path(path)
    try:
        tree = tomllib.loads(toml_text(path.read_bytes()))
    except OSError as error:
        raise ConfigurationError("CONFIG", str(path), f"cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError("CONFIG", str(path), f"is not TOML: {error}") from error
    return override_config(tree, overrides, environment).located(path.resolve().parent)


def toml_text(data: bytes) -> str:
    """Decode a TOML file, without the byte order mark that some editors of Windows write.

    Raises TOMLDecodeError for UTF-16, and UnicodeDecodeError for other bytes that are no UTF-8.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise tomllib.TOMLDecodeError("it is UTF-16, which PowerShell's > writes; save it as UTF-8")
    return data.decode("utf-8-sig")


def override_config(
    tree: dict[str, Any], overrides: Sequence[str], environment: Mapping[str, str] | None = None
) -> Config:
    """The configuration of `tree`, which is changed in place by the environment and then by `overrides`."""
    variables: dict[str, str] = {}  # key → the variable that sets it
    for name, value in (os.environ if environment is None else environment).items():
        if path := _path_of(name):
            variables[".".join(path)] = name
            _assign(tree, path, value, name)
    for override in overrides:
        key, equals, value = override.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ConfigurationError("override", override, "no key or no value", "write section.key=value")
        if key == "redis.url":
            refuse_password(key, value)
        _assign(tree, key.split("."), value, key)
    try:
        return parse_config(tree)
    except ConfigurationError as error:
        variable = next((name for key, name in variables.items() if _concerns(error.key, key)), None)
        if variable is None:
            raise
        raise ConfigurationError(variable, error.value, f"{error.key}: {error.problem}", error.hint) from None


def _path_of(variable: str) -> list[str]:
    """The path of the key that an environment variable sets; empty for one that sets none.

    A variable without `__` sets a key only if there is one of its name. A container platform adds others, such as
    FEDQUEUE_SERVICE_HOST for a service of the name fedqueue.
    """
    if not variable.startswith(ENVIRONMENT_PREFIX):
        return []
    name = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
    if "__" in name or name in _values_without_section():
        return name.split("__")
    if not SERVICE_VARIABLE.search(variable):
        _say_if_meant(variable)
    return []


@functools.cache  # said once, however often the configuration is loaded
def _say_if_meant(variable: str) -> None:
    known = {_letters(known): known for known in _variables_of(Config, ENVIRONMENT_PREFIX)}
    near = difflib.get_close_matches(_letters(variable), known, n=1, cutoff=0.92)
    if near:
        log.warning("fedqueue: %s is no setting and is ignored; did you mean %s?", variable, known[near[0]])


def _letters(variable: str) -> str:
    return variable.replace("_", "").upper()


def _values_without_section() -> list[str]:
    return [name for name, field in Config.model_fields.items() if not _is_section(field.annotation)]


def _variables_of(section: type[BaseModel], prefix: str) -> Iterator[str]:
    """The environment variable of each key in `section`, and in the sections below it."""
    for name, field in section.model_fields.items():
        inner = field.annotation
        if _is_section(inner):
            yield from _variables_of(inner, f"{prefix}{name.upper()}__")
        else:
            yield f"{prefix}{name.upper()}"


def _is_section(annotation: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _concerns(key: str, assigned: str) -> bool:
    """Whether an error about `key` is about the key `assigned`: about it, a value in it, or its unknown section."""
    if key == assigned or key.startswith(f"{assigned}."):
        return True
    return assigned.startswith(f"{key}.") and _field(key.split(".")) is None


def parse_config(tree: Mapping[str, Any]) -> Config:
    """The validated configuration of a tree of tables. Raises ConfigurationError for the first problem found."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise _first_problem(error) from None


def _assign(tree: dict[str, Any], path: Sequence[str], text: str, source: str) -> None:
    shown = "…" if path[0] == "redis" else text
    if present := _present_name(path):
        variable = ENVIRONMENT_PREFIX + "__".join(present).upper()
        name = variable if source.startswith(ENVIRONMENT_PREFIX) else ".".join(present)
        raise ConfigurationError(source, shown, "the key was renamed", f"write {name}")
    node: Any = tree
    for part in path[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigurationError(source, shown, f"{part} is a single value, not a section")
    node[path[-1]] = _value(text, _takes_text(path))


def _present_name(path: Sequence[str]) -> list[str] | None:
    """The path with its earlier key replaced by the present one; None where `path` has no earlier key."""
    for length in range(2, len(path) + 1):
        if present := RENAMED.get(".".join(path[:length])):
            return [*path[: length - 1], present, *path[length:]]
    return None


def _value(text: str, takes_text: bool) -> Any:
    """`text` as a TOML value; unchanged if it is no TOML (`--set name=digits`) or the key takes text (`name=2024`)."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return text if takes_text and not isinstance(value, str) else value


def _takes_text(path: Sequence[str]) -> bool:
    field = _field(path)
    return field is not None and _plain_types(field.annotation) - {type(None)} == {str}


def _plain_types(annotation: Any) -> set[Any]:
    """The types in a union, without the metadata of `Annotated`."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _plain_types(typing.get_args(annotation)[0])
    arguments = typing.get_args(annotation)
    if arguments and type(None) in arguments:
        return set().union(*map(_plain_types, arguments))
    return {annotation}


def _first_problem(error: ValidationError) -> ConfigurationError:
    details = error.errors(include_url=False)
    first = next((d for d in details if _present_name([str(part) for part in d["loc"]])), details[0])
    path = [str(part) for part in first["loc"]]
    key, value, hint = ".".join(path), first["input"], ""
    problem = first["msg"].replace("Input should ", "must ").removeprefix("Value error, ")
    problem = problem[:1].lower() + problem[1:]
    match first["type"]:
        case "extra_forbidden" if present := _present_name(path):
            problem, hint = "the key was renamed", f"write {'.'.join(present)}"
        case "extra_forbidden":
            known = list(_section(path[:-1]).model_fields)
            near = difflib.get_close_matches(path[-1], known, n=1)
            problem, hint = "unknown key", f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        case "missing":
            problem, value = "missing", None
            hint = "add this key" if len(path) > 1 else f"add a section [{key}]"
        case "refused":
            problem, hint = first["ctx"]["message"], first["ctx"]["hint"]
        case _ if isinstance(value, str) and (key, value) in RENAMED_VALUES:
            problem, hint = "the value was renamed", f"write {RENAMED_VALUES[key, value]!r}"
        case _:
            hint = _word_hint(path)
    if isinstance(value, Mapping | BaseModel):  # a whole section: the problem names the key it is about
        value = None
    elif isinstance(value, str) and "://" in value:  # a URL may hold a password
        value = "…"
    return ConfigurationError(key or "configuration", value, problem, hint)


def _word_hint(path: Sequence[str]) -> str:
    """How to write None for a key that takes a word in its place; an empty string for other keys."""
    field = _field(path)
    word = word_of(field) if field else None
    if not field or not word:
        return ""
    return f"{_WORDS[word]} write {word!r}" + (" or leave the key out" if field.default is None else "")


def _field(path: Sequence[str]) -> FieldInfo | None:
    section: Any = Config
    field = None
    for part in path:
        field = getattr(section, "model_fields", {}).get(part)
        section = field.annotation if field else None
    return field


def _section(path: Sequence[str]) -> type[BaseModel]:
    field = _field(path)
    section = field.annotation if field else Config
    assert isinstance(section, type)
    return section

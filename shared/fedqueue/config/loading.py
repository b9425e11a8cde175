"""The configuration of a run: one validated tree, read from TOML, the environment and the command line.

Later sources win: file, then `FEDQUEUE_SECTION__KEY` environment variables, then `--set section.key=value`.
This module and the two command lines are the only places that read files and variables of the environment.
"""

from __future__ import annotations

import difflib
import math
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PrivateAttr, ValidationError, model_validator

from fedqueue.config.aggregation import MODES, AggregationConfig, ServerOptimizerConfig
from fedqueue.config.compression import CompressionConfig
from fedqueue.config.dispatch import DispatchConfig
from fedqueue.config.passwords import refuse_password
from fedqueue.config.redis import RedisConfig
from fedqueue.config.sections import ENVIRONMENT_PREFIX, ClientId, Count, NonNegative, Positive, RunName, Section
from fedqueue.config.training import TrainingConfig
from fedqueue.errors import ConfigurationError
from fedqueue.task import Client


class TaskConfig(Section):
    entrypoint: str
    """`path/to/task.py:Class`, relative to the configuration file, or `package.module:Class`."""
    options: dict[str, Any] = {}
    """Keyword arguments of the task's constructor."""


class ClientsConfig(Section):
    count: Count = 8
    """How many clients (data partitions) there are; ignored where `names` is given."""
    names: tuple[ClientId, ...] = ()
    """Their identities; by default client-0, client-1, …"""
    minimum: int = Field(default=0, ge=0)
    """Training starts once so many clients are alive; 0: one, or behind a barrier the whole cohort."""
    slowdown: dict[ClientId, Annotated[float, Field(ge=1, allow_inf_nan=False)]] = {}
    """Emulates slow sites: after each batch the client sleeps until it is this many times slower."""

    @model_validator(mode="after")
    def _consistent(self) -> ClientsConfig:
        if len(set(self.names)) != len(self.names):
            raise ValueError("names must differ from each other")
        if unknown := set(self.slowdown) - set(self.ids):
            raise ValueError(f"slowdown names {sorted(unknown)}, which are not clients: {', '.join(self.ids)}")
        if self.minimum > len(self.ids):
            raise ValueError(f"minimum is {self.minimum}, but there are only {len(self.ids)} clients")
        return self

    @property
    def ids(self) -> tuple[str, ...]:
        return self.names or tuple(f"client-{i}" for i in range(self.count))

    def client(self, client: str) -> Client:
        """The client of that identity; one outside the partitions brings its own data."""
        if client in self.ids:
            return Client(client, self.ids.index(client), len(self.ids))
        return Client(client)


class AdmissionConfig(Section):
    """What is not merged, beyond what is malformed; docs/security.md says what it helps against."""

    max_norm: NonNegative = 0.0
    """An update whose delta has a larger L2 norm is rejected as `too_large`; 0: no fixed limit."""
    norm_quantile: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Reject norms above `norm_slack` times this quantile of the accepted ones (0.5: their median); 0: do not."""
    norm_slack: Positive = 3.0
    """How many times the quantile a norm may be."""
    norm_window: Annotated[int, Field(ge=10)] = 200
    """How many accepted updates the quantile is of, the newest; it is used once there are 10."""
    max_rejections: Count = 5
    """A client whose updates were rejected so many times in a row, by its own fault, is set aside."""


class SecurityConfig(Section):
    signatures: Literal["required", "off"] = "required"
    """`required`: coordinator and workers sign what they say and believe nothing else; `fedqueue run` needs no keys."""
    keys: str = Field(default="keys", exclude=True)
    """The folder with this machine's keys, as `fedqueue enroll` makes it; relative to where the command is run."""
    policy: str = Field(default="", exclude=True)
    """`fedqueue-worker`: what this site agrees to (a TOML file, see docs/security.md); empty: any job of the run."""
    outbox: str = Field(default="outbox", exclude=True)
    """`fedqueue-worker`: the folder of the log of what left this site; empty: no log."""


class EvaluationConfig(Section):
    every: int = Field(default=1, ge=0)
    """Evaluate every so many versions; 0: not by versions."""
    seconds: NonNegative = 0.0
    """Evaluate at most this long after a new version; 0: not by time."""


class CheckpointConfig(Section):
    seconds: NonNegative = 30.0
    """The coordinator copies the run to its own disk so often, in case Redis loses everything; 0: never."""


class LedgerConfig(Section):
    keep_payloads: bool = False
    """Keep the first version and every merged payload, so that `fedqueue audit` can replay the whole run."""


class StopConfig(Section):
    """Whichever comes first; at least one is needed."""

    versions: int = Field(default=0, ge=0)
    updates: int = Field(default=0, ge=0)
    seconds: NonNegative = 0.0
    target: dict[str, float] = {}
    """Central metrics to reach, such as {accuracy = 0.95}; those named `loss` or `error` are to fall below."""

    @model_validator(mode="after")
    def _ends(self) -> StopConfig:
        if not (self.versions or self.updates or self.seconds or self.target):
            raise ValueError("at least one of versions, updates, seconds and target must be set")
        return self


class Config(Section):
    name: RunName = "run"
    seed: int = Field(default=0, ge=0, lt=2**31)
    task: TaskConfig
    redis: RedisConfig = RedisConfig()
    clients: ClientsConfig = ClientsConfig()
    training: TrainingConfig = TrainingConfig()
    aggregation: AggregationConfig = AggregationConfig()
    server_optimizer: ServerOptimizerConfig = ServerOptimizerConfig()
    compression: CompressionConfig = CompressionConfig()
    dispatch: DispatchConfig = DispatchConfig()
    admission: AdmissionConfig = AdmissionConfig()
    security: SecurityConfig = SecurityConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    ledger: LedgerConfig = LedgerConfig()
    stop: StopConfig
    _folder: Path = PrivateAttr(default=Path())

    @property
    def folder(self) -> Path:
        """Where it was read from: code that it names by a path is relative to this."""
        return self._folder

    def located(self, folder: Path) -> Config:
        """The same configuration, as read from `folder`."""
        located = self.model_copy()
        located._folder = folder
        return located

    @model_validator(mode="after")
    def _cohort_exists(self) -> Config:
        if self.aggregation.cohort_size > len(self.clients.ids):
            raise ValueError(
                f"aggregation.cohort_size is {self.aggregation.cohort_size}, "
                f"but there are only {len(self.clients.ids)} clients"
            )
        return self

    @model_validator(mode="after")
    def _dispatch_fits(self) -> Config:
        clients, versions = len(self.clients.ids), self.dispatch.share_window
        if clients * self.updates_within_share < versions * self.buffer_size:
            raise ValueError(
                f"dispatch.max_share is {self.dispatch.max_share}: {clients} clients with at most "
                f"{self.updates_within_share} updates each cannot make {versions} versions of {self.buffer_size} "
                f"updates; it must be at least 1/{clients}, or dispatch.share_window larger"
            )
        if self.dispatch.schedule == "compass" and (self.barrier or self.aggregation.mode == "fedasync"):
            raise ValueError(
                f"dispatch.schedule is 'compass', which makes versions of groups: aggregation.mode must be one with a "
                f"buffer and no barrier, such as fedbuff; it is {self.aggregation.mode!r}"
            )
        return self

    @property
    def updates_within_share(self) -> int:
        """How many updates of one client the last `dispatch.share_window` versions may hold: ⌊max_share · W · K⌋."""
        return math.floor(self.dispatch.max_share * self.dispatch.share_window * self.buffer_size + 1e-9)

    @property
    def barrier(self) -> bool:
        """Whether versions come in rounds: nobody trains on before the whole buffer is merged."""
        return self.aggregation.mode == "fedavg" or (self.aggregation.mode != "fedasync" and self.aggregation.barrier)

    @property
    def keeps_bases(self) -> bool:
        """Whether the merge reads the base versions of open jobs, so that they must stay stored."""
        settings = self.aggregation
        return (
            settings.running_statistics == "drift"
            or (settings.mode == "fedasync" and settings.mixing == "model")
            or (settings.mode not in MODES and settings.needs_base)
        )

    @property
    def buffer_size(self) -> int:
        """How many updates make a version."""
        match self.aggregation.mode:
            case "fedasync":
                return 1
            case "fedavg":
                return self.aggregation.cohort_size or len(self.clients.ids)
            case _:
                return self.aggregation.buffer_size

    @property
    def minimum_clients(self) -> int:
        """Training starts once so many clients are alive."""
        return self.clients.minimum or (min(self.buffer_size, len(self.clients.ids)) if self.barrier else 1)

    @property
    def concurrency(self) -> int:
        """How many jobs are open at once, at most."""
        if self.barrier:
            return math.ceil(self.dispatch.over_selection * self.buffer_size - 1e-9)
        return self.dispatch.concurrency or len(self.clients.ids)


def load_config(path: Path, overrides: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> Config:
    """The validated configuration; raises ConfigurationError that names the key, the value and what is accepted."""
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError("CONFIG", str(path), f"cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError("CONFIG", str(path), f"is not TOML: {error}") from error
    for name, value in (os.environ if environment is None else environment).items():
        if name.startswith(ENVIRONMENT_PREFIX):
            _assign(tree, name.removeprefix(ENVIRONMENT_PREFIX).lower().split("__"), value, name)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ConfigurationError("--set", override, "expected section.key=value")
        if key.strip() == "redis.url":
            refuse_password("--set redis.url", value)
        _assign(tree, key.strip().split("."), value, f"--set {key}")
    return parse_config(tree).located(path.resolve().parent)


def parse_config(tree: Mapping[str, Any]) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise _first_problem(error) from None


def _assign(tree: dict[str, Any], path: Sequence[str], text: str, source: str) -> None:
    node: Any = tree
    for part in path[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigurationError(
                source, "…" if path[0] == "redis" else text, f"{part} is a single value, not a section"
            )
    node[path[-1]] = _value(text, _takes_text(path))


def _value(text: str, takes_text: bool) -> Any:
    """`text` as a TOML value, or as it is where it is none (`--set name=digits`) or text is wanted (`name=2024`)."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return text if takes_text and not isinstance(value, str) else value


def _takes_text(path: Sequence[str]) -> bool:
    section: Any = Config
    for part in path:
        fields = getattr(section, "model_fields", {})
        section = fields[part].annotation if part in fields else None
    return section is str


def _first_problem(error: ValidationError) -> ConfigurationError:
    problem = error.errors(include_url=False)[0]
    path = [str(part) for part in problem["loc"]]
    key, value = ".".join(path), problem["input"]
    match problem["type"]:
        case "extra_forbidden":
            known = list(_section(path[:-1]).model_fields)
            near = difflib.get_close_matches(path[-1], known, n=1)
            accepted = f"unknown key; did you mean {near[0]!r}?" if near else f"unknown key; known: {', '.join(known)}"
        case "missing":
            return ConfigurationError(key, None, "is required")
        case "value_error":
            accepted = problem["msg"].removeprefix("Value error, ")
        case _:
            accepted = problem["msg"][0].lower() + problem["msg"][1:]
    # A whole section: its keys are what the message is about. And a URL may hold a password.
    if isinstance(value, Mapping | BaseModel) or (isinstance(value, str) and "://" in value):
        value = "…"
    return ConfigurationError(key or "configuration", value, accepted)


def _section(path: Sequence[str]) -> type[BaseModel]:
    section: type[BaseModel] = Config
    for part in path:
        annotation = section.model_fields[part].annotation
        assert isinstance(annotation, type)
        section = annotation
    return section

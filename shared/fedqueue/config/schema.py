"""The configuration of a run as one tree of sections, one for each table of the TOML file."""

from __future__ import annotations

import math
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, model_validator

from fedqueue.config.aggregation import STRATEGIES, AggregationConfig, ServerOptimizerConfig
from fedqueue.config.client import Client
from fedqueue.config.compare import CompareConfig
from fedqueue.config.compression import CompressionConfig
from fedqueue.config.dispatch import DispatchConfig
from fedqueue.config.names import ClientId, RunName
from fedqueue.config.observability import ObservabilityConfig
from fedqueue.config.privacy import ExamplePrivacyConfig, PrivacyConfig
from fedqueue.config.redis import RedisConfig
from fedqueue.config.sections import AUTO, OFF, Count, Positive, Section, Text, refuse
from fedqueue.config.secure import SecureConfig
from fedqueue.config.secure_limits import refusal_of_masking
from fedqueue.config.statistics import StatisticsConfig
from fedqueue.config.target import Goal, Target, goals
from fedqueue.config.trackers import TrackersConfig
from fedqueue.config.training import TrainingConfig


class TaskConfig(Section):
    """The learning problem."""

    entrypoint: str
    """The task's class: `path/to/task.py:Class`, relative to the configuration file, or `package.module:Class`."""
    options: dict[str, Any] = {}
    """Keyword arguments of the task's constructor."""


class ClientsConfig(Section):
    """The clients that take part."""

    count: Count = 8
    """Number of clients, each with one partition of the data; ignored where `names` is set."""
    names: tuple[ClientId, ...] = ()
    """Names of the clients; where they are left out client-0, client-1, …"""
    min_available: Annotated[Count | None, AUTO] = None
    """Training starts once this many clients are alive; `auto`: 1, or behind a barrier the whole cohort."""
    slowdown: dict[ClientId, Annotated[float, Field(ge=1, allow_inf_nan=False)]] = {}
    """Emulates slow sites: client → factor. After each batch the worker sleeps until it is that many times slower."""

    @model_validator(mode="after")
    def _consistent(self) -> ClientsConfig:
        if len(set(self.names)) != len(self.names):
            raise refuse("names has a name twice", "names must differ from each other")
        if unknown := set(self.slowdown) - set(self.ids):
            raise refuse(f"slowdown names {sorted(unknown)}, which are not clients", f"clients: {', '.join(self.ids)}")
        if self.min_available and self.min_available > len(self.ids):
            raise refuse(
                f"min_available is {self.min_available}, but there are only {len(self.ids)} clients",
                f"set min_available to at most {len(self.ids)}",
            )
        return self

    @property
    def ids(self) -> tuple[str, ...]:
        """The names of all clients, in the order of their partitions."""
        return self.names or _numbered(self.count)

    @property
    def number(self) -> int:
        """How many clients there are: the length of `ids`."""
        return len(self.names) or self.count

    def client(self, client: str) -> Client:
        """The client of that name; one that is not in `ids` has no partition and brings its own data."""
        return Client(client, self._partitions.get(client), self.number if client in self._partitions else None)

    @cached_property
    def _partitions(self) -> dict[str, int]:
        return {client: partition for partition, client in enumerate(self.ids)}


@cache
def _numbered(count: int) -> tuple[str, ...]:
    return tuple(f"client-{i}" for i in range(count))


class AdmissionConfig(Section):
    """Which well-formed updates are rejected; docs/security.md describes the attacks that this limits."""

    max_norm: Annotated[Positive | None, OFF] = None
    """Rejects an update whose delta has a larger L2 norm, with the reason `too_large`."""
    norm_quantile: Annotated[Annotated[float, Field(gt=0, le=1)] | None, OFF] = None
    """Rejects norms above `norm_slack` times this quantile of the accepted ones; 0.5 is their median."""
    norm_slack: Positive = 3.0
    """The largest accepted multiple of the quantile."""
    norm_window: Annotated[int, Field(ge=10)] = 200
    """Number of most recent accepted updates that the quantile is taken of; it applies once there are 10."""
    max_rejections: Count = 5
    """Excludes a client after this many rejected updates in a row that were its own fault."""


class SecurityConfig(Section):
    """Signatures, and what a site agrees to."""

    signatures: Literal["required", "off"] = "required"
    """`required`: coordinator and workers sign every message and ignore others. `fedqueue run` makes its own keys."""
    keys: Text = Field(default="keys", exclude=True)
    """Folder of this machine's keys, made by `fedqueue enroll`; relative to the working directory."""
    policy: Annotated[Text | None, OFF] = Field(default=None, exclude=True)
    """`fedqueue-worker`: TOML file with the limits that this site sets to jobs (docs/security.md); `off`: no limits."""
    egress_log: Annotated[Text | None, OFF] = Field(default="egress", exclude=True)
    """`fedqueue-worker`: folder of the log of everything that left this site; `off`: no log."""


class EvaluationConfig(Section):
    """When the coordinator evaluates a version on the task's test data."""

    every_versions: Annotated[Count | None, OFF] = 1
    """Evaluates every n-th version; `off`: not by versions."""
    every_seconds: Annotated[Positive | None, OFF] = None
    """Evaluates the newest version at this interval, where it is new; `off`: not by time."""


class OpenTelemetryConfig(Section):
    """Traces of this machine's processes, each site's own: `pip install 'fedqueue[opentelemetry]'`."""

    traces: bool = False
    """Sends spans by OTLP over HTTP to the collector that OTEL_EXPORTER_OTLP_ENDPOINT names."""


class CheckpointConfig(Section):
    """The coordinator's own copy of the run, for the case that Redis loses everything."""

    every_seconds: Annotated[Positive | None, OFF] = 30.0
    """Interval between copies of the run on the coordinator's disk; `off`: none are made."""


class LedgerConfig(Section):
    """The record of every version, rejection, abandoned job and evaluation."""

    keep_payloads: bool = False
    """Keeps version 0 and every merged payload in Redis, so that `fedqueue audit` can replay the whole run."""


class StopConfig(Section):
    """When the run ends: at whichever limit is reached first. At least one is required."""

    versions: Annotated[Count | None, OFF] = None
    """Versions made, version 0 not counted."""
    updates: Annotated[Count | None, OFF] = None
    """Updates merged."""
    seconds: Annotated[Positive | None, OFF] = None
    """Seconds since the clients began to train: since the first job."""
    target: Target = {}
    """Central metrics to reach, all of them in one evaluation: `{ accuracy = 0.95 }` for a well-known name, and
    `{ depth = { above = 3 } }` or `{ depth = { below = 3 } }` for any name."""

    @model_validator(mode="after")
    def _ends(self) -> StopConfig:
        if not (self.versions or self.updates or self.seconds or self.target):
            raise refuse("no limit is set", "set at least one of versions, updates, seconds and target")
        return self

    @property
    def goals(self) -> tuple[Goal, ...]:
        """The metrics of `target`, each with its direction."""
        return goals(self.target)


class Config(Section):
    """The configuration of a run. An unknown key is an error, and no value changes after it was read.

    >>> from fedqueue import Config
    >>> config = Config(task={"entrypoint": "task.py:Mine"}, clients={"count": 4}, stop={"versions": 20})
    >>> config.clients.ids
    ('client-0', 'client-1', 'client-2', 'client-3')
    """

    name: RunName = "run"
    """Name of the run, part of every Redis key of the run."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of the initial model, of the choice of clients and of the order of their examples."""
    task: TaskConfig
    redis: RedisConfig = RedisConfig()
    clients: ClientsConfig = ClientsConfig()
    training: TrainingConfig = TrainingConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    aggregation: AggregationConfig = AggregationConfig()
    server_optimizer: ServerOptimizerConfig = ServerOptimizerConfig()
    compression: CompressionConfig = CompressionConfig()
    dispatch: DispatchConfig = DispatchConfig()
    admission: AdmissionConfig = AdmissionConfig()
    security: SecurityConfig = SecurityConfig()
    secure: SecureConfig = SecureConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    statistics: StatisticsConfig = StatisticsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    ledger: LedgerConfig = LedgerConfig()
    stop: StopConfig
    trackers: TrackersConfig = Field(default=TrackersConfig(), exclude=True)
    opentelemetry: OpenTelemetryConfig = Field(default=OpenTelemetryConfig(), exclude=True)
    observability: ObservabilityConfig = Field(default=ObservabilityConfig(), exclude=True)
    compare: CompareConfig = Field(default=CompareConfig(), exclude=True)
    _folder: Path = PrivateAttr(default=Path())

    @property
    def folder(self) -> Path:
        """The folder of the configuration file; paths of the user's own code are relative to it."""
        return self._folder

    def located(self, folder: Path) -> Config:
        """A copy of this configuration with that `folder`."""
        located = self.model_copy()
        located._folder = folder
        return located

    def with_statistics(self) -> Config:
        """A copy that carries the content of statistics.file; raises ConfigurationError where it cannot be read."""
        return self.model_copy(update={"statistics": self.statistics.read_from(self.folder)})

    @model_validator(mode="after")
    def _cohort_exists(self) -> Config:
        cohort, clients = self.aggregation.cohort_size, self.clients.number
        if cohort and cohort > clients:
            raise refuse(
                f"aggregation.cohort_size is {cohort}, but there are only {clients} clients",
                f"set it to at most {clients}, or to 'all'",
            )
        return self

    @model_validator(mode="after")
    def _round_fits(self) -> Config:
        size, clients = self.buffer_size, self.clients.number
        if self.barrier and self.aggregation.strategy != "fedavg" and size > clients:
            raise refuse(
                f"aggregation.buffer_size is {size}, but there are only {clients} clients, and behind a barrier each "
                "adds one update to a version",
                f"set it to at most {clients}, or set barrier = false",
            )
        return self

    @model_validator(mode="after")
    def _target_is_measured(self) -> Config:
        off = self.evaluation.every_versions is None and self.evaluation.every_seconds is None
        if self.stop.target and off:
            raise refuse(
                f"stop.target names {', '.join(self.stop.target)}, but every_versions and every_seconds of "
                "[evaluation] are off, so that nothing is measured",
                "set one of them, or leave out the target",
            )
        return self

    @model_validator(mode="after")
    def _rows_are_private(self) -> Config:
        if self.privacy.examples.on:
            for name, plain, why in (
                ("accumulate_batches", 1, "batches are drawn by chance, and each is a step"),
                ("precision", "float32", "noise and clipping are computed in float64 from gradients in float32"),
                ("drop_last", False, "batches are drawn by chance, and none is the last of a pass"),
                ("max_grad_norm", None, "the gradient of each row is clipped already"),
            ):
                if (value := getattr(self.training, name)) != plain:
                    raise refuse(
                        f"training.{name} is {value!r}, which does not go together with [privacy.examples]: {why}",
                        f"leave training.{name} out",
                    )
        return self

    @model_validator(mode="after")
    def _dispatch_fits(self) -> Config:
        clients, versions, limit = self.clients.number, self.dispatch.share_window, self.updates_within_share
        if limit is not None and clients * limit < versions * self.buffer_size:
            raise refuse(
                f"dispatch.max_share is {self.dispatch.max_share}: {clients} clients with at most {limit} updates each "
                f"cannot make {versions} versions of {self.buffer_size} updates",
                f"set it to at least 1/{clients}, or raise dispatch.share_window",
            )
        if self.dispatch.schedule == "fedcompass" and (self.barrier or self.aggregation.strategy == "fedasync"):
            raise refuse(
                f"dispatch.schedule is 'fedcompass', which does not work with a barrier or 'fedasync'; "
                f"aggregation.strategy is {self.aggregation.strategy!r}",
                "set aggregation.strategy to one with a buffer, such as 'fedbuff', and barrier = false",
            )
        return self

    @model_validator(mode="after")
    def _masking_fits(self) -> Config:
        if refusal := refusal_of_masking(self):
            raise refusal
        return self

    @property
    def example_privacy(self) -> ExamplePrivacyConfig | None:
        """[privacy.examples], or None where rows are not protected."""
        return self.privacy.examples if self.privacy.examples.on else None

    @model_validator(mode="after")
    def _clients_are_private(self) -> Config:
        if self.privacy.clients.on and not self.secure.on:
            raise refuse(
                "[privacy.clients] is on without keepers, who add the noise",
                "name them in secure.keepers, or leave out [privacy.clients]",
            )
        return self

    @property
    def clip_norm(self) -> float:
        """The L2 norm that a masked update's delta is scaled down to."""
        return self.privacy.clients.clip_norm or self.secure.clip_norm

    @property
    def weighs_examples(self) -> bool:
        """Whether an update's weight has its number of examples as a factor."""
        return self.aggregation.strategy == "fedavg" or self.aggregation.weight_by_examples

    @property
    def sums_examples(self) -> bool:
        """Whether the number of examples of an update is a masked word behind its parameters."""
        return self.secure.hides_examples and self.weighs_examples

    @property
    def updates_within_share(self) -> int | None:
        """Updates of one client in the last `dispatch.share_window` versions, at most: ⌊max_share · W · K⌋; or None."""
        share = self.dispatch.max_share
        return None if share is None else math.floor(share * self.dispatch.share_window * self.buffer_size + 1e-9)

    @property
    def barrier(self) -> bool:
        """Whether training proceeds in rounds: no client gets its next job before the whole buffer is merged."""
        strategy = self.aggregation.strategy
        return strategy == "fedavg" or (strategy != "fedasync" and self.aggregation.barrier)

    @property
    def keeps_bases(self) -> bool:
        """Whether merging reads the base versions of open jobs, so that they must stay stored."""
        settings = self.aggregation
        return (
            settings.running_statistics == "drift"
            or (settings.strategy == "fedasync" and settings.mixing == "model")
            or (settings.strategy not in STRATEGIES and settings.needs_base)
        )

    @property
    def buffer_size(self) -> int:
        """Updates per version."""
        match self.aggregation.strategy:
            case "fedasync":
                return 1
            case "fedavg":
                return self.aggregation.cohort_size or self.clients.number
            case _:
                return self.aggregation.buffer_size

    @property
    def minimum_clients(self) -> int:
        """Clients that must be alive before training starts: `clients.min_available`, resolved."""
        return self.clients.min_available or (self.buffer_size if self.barrier else 1)

    @property
    def concurrency(self) -> int:
        """Open jobs at a time, at most: `dispatch.concurrency`, resolved."""
        if self.barrier:
            return math.ceil(self.dispatch.over_selection * self.buffer_size - 1e-9)
        return self.dispatch.concurrency or self.clients.number

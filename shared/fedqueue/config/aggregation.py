"""The sections that say how updates become versions: `[aggregation]` with its parts, and `[server_optimizer]`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from fedqueue.config.entrypoint import is_entrypoint
from fedqueue.config.sections import Count, NonNegative, Positive, Section

MODES = ("fedasync", "fedbuff", "fedavg", "fadas", "ca2fl")
RunningStatistics = Literal["mean", "drift", "frozen"]
STALENESS_FUNCTIONS = ("constant", "polynomial", "hinge", "exponential")


def _known_or_own(known: Sequence[str]) -> AfterValidator:
    def check(name: str) -> str:
        if name not in known and not is_entrypoint(name):
            names = ", ".join(f"'{k}'" for k in known[:-1]) + f" or '{known[-1]}'"
            raise ValueError(f"input should be {names}, or code of your own: module:name or path/to/file.py:name")
        return name

    return AfterValidator(check)


class StalenessConfig(Section):
    function: Annotated[str, _known_or_own(STALENESS_FUNCTIONS)] = "polynomial"
    """`constant`, `polynomial`, `hinge`, `exponential`, or a function τ → weight of your own: `module:function`."""
    a: Positive | None = None
    """Steepness; by default 0.5 (polynomial), 10 (hinge), 0.1 (exponential)."""
    b: NonNegative | None = None
    """Hinge: staleness up to b keeps weight 1; by default 4."""


class RobustConfig(Section):
    """How a buffer is merged where some of its updates may be hostile: in `fedbuff` and `fadas`."""

    rule: Literal[
        "mean", "median", "trimmed_mean", "krum", "multi_krum", "geometric_median", "norm_clipping"
    ] = "mean"  # fmt: skip
    """`mean` trusts everybody. The others hold all updates of the buffer: K models of memory."""
    byzantine: int = Field(default=1, ge=0)
    """Trimmed mean, Krum, Multi-Krum: so many updates of a buffer may be hostile (f)."""
    keep: int = Field(default=0, ge=0)
    """Multi-Krum: the mean of so many updates with the best scores; 0: of K − f."""
    clip_norm: NonNegative = 0.0
    """Norm clipping: no delta counts with more than this L2 norm; 0: with the median norm of the buffer."""
    iterations: Count = 100
    """Geometric median: at most so many steps of Weiszfeld's algorithm."""
    smoothing: Positive = 1e-6
    """Geometric median: distances count as at least this (ν)."""


class FilterConfig(Section):
    """Updates that differ too much from those merged before are rejected; meant for modes without a buffer."""

    norm_factor: NonNegative = 0.0
    """Reject a delta longer than so many times the median of the last `window` merged ones; 0: never."""
    min_cosine: Annotated[float, Field(ge=-1, le=1)] = -1.0
    """Reject a delta whose cosine with the running mean of the merged directions is less; −1: never."""
    window: Count = 20
    """How many norms the median is taken of."""
    warmup: Count = 8
    """So many updates are merged before any is judged."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """How slowly the running mean of the directions follows."""
    strikes: Count = 3
    """After so many rejections in a row a client is quarantined."""
    quarantine_seconds: Positive = 60.0
    """For so long it gets no further job; the one it already holds is judged like any other."""

    @property
    def on(self) -> bool:
        return self.norm_factor > 0 or self.min_cosine > -1


class AggregationConfig(Section):
    mode: Annotated[str, _known_or_own(MODES)] = "fedbuff"
    """`fedasync`, `fedbuff`, `fedavg`, `fadas`, `ca2fl`, or an algorithm of your own: `path/to/file.py:name`."""
    options: dict[str, Any] = {}
    """Further keyword arguments of the mode: docs/algorithms.md lists those of `fadas` and `ca2fl`."""
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.6
    """FedAsync: the mixing weight of a fresh update."""
    mixing: Literal["model", "delta"] = "model"
    """FedAsync: mix the client's model (the paper) or add its delta."""
    buffer_size: Count = 4
    """Updates per version (K); not in `fedasync` (1) and `fedavg` (`cohort_size`)."""
    cohort_size: int = Field(default=0, ge=0)
    """FedAvg: clients per round (C); 0: all of `clients`."""
    barrier: bool = False
    """Wait for the whole buffer before anybody trains on; FedAvg always does, FedAsync never."""
    normalize: Literal["count", "weights"] = "count"
    """FedBuff: divide by K, as the paper does, or by the sum of the weights."""
    weight_by_examples: bool = False
    """FedBuff, FADAS: weigh each update by its number of examples too; FedAvg always does."""
    running_statistics: RunningStatistics = "mean"
    """BatchNorm's and other floating buffers: the clients' values (`mean`), their changes (`drift`), or version 0's
    (`frozen`)."""
    needs_base: bool = False
    """An algorithm of your own: it reads the base versions of updates, so they stay stored."""
    max_staleness: int = Field(default=100, ge=0)
    """An update staler than this is rejected as `stale`."""
    threads: Count = 1
    """torch threads of the coordinator: merging is bound by memory, and threads that wait for each other cost more."""
    staleness: StalenessConfig = StalenessConfig()
    robust: RobustConfig = RobustConfig()
    filter: FilterConfig = FilterConfig()

    @property
    def own(self) -> bool:
        """Whether code of the user's own decides the bits of a version."""
        return self.mode not in MODES or self.staleness.function not in STALENESS_FUNCTIONS

    @model_validator(mode="after")
    def _robust_fits(self) -> AggregationConfig:
        robust = self.robust
        if robust.rule == "mean":
            return self
        if self.mode not in ("fedbuff", "fadas"):
            raise ValueError(
                f"robust.rule is {robust.rule!r}, which needs mode 'fedbuff' or 'fadas', not {self.mode!r}"
            )
        if self.weight_by_examples or self.normalize != "count":
            raise ValueError(
                f"robust.rule is {robust.rule!r}: a client could claim more weight than its due, so it needs "
                f"weight_by_examples = false and normalize = 'count'"
            )
        least = {"trimmed_mean": 2 * robust.byzantine + 1, "krum": 2 * robust.byzantine + 3}
        least["multi_krum"] = least["krum"]
        if self.buffer_size < least.get(robust.rule, 1):
            raise ValueError(
                f"robust.rule is {robust.rule!r} with byzantine = {robust.byzantine}: buffer_size must be at least "
                f"{least[robust.rule]}, it is {self.buffer_size}"
            )
        if robust.keep > self.buffer_size:
            raise ValueError(f"robust.keep is {robust.keep}, but a buffer has only {self.buffer_size} updates")
        return self


class ScheduleConfig(Section):
    """How the server's learning rate changes with the versions."""

    name: str = ""
    """A schedule of `torch.optim.lr_scheduler` by name (`cosineannealinglr`, …), or `inverse_sqrt`; empty: none."""
    options: dict[str, float | int | bool | str | tuple[float, ...]] = {}
    """Its keyword arguments, such as T_max or gamma; a version is a step."""


class ServerOptimizerConfig(Section):
    name: str = "sgd"
    """A `torch.optim` optimizer by name: sgd, adam, adamw, adagrad, …"""
    learning_rate: Positive = 1.0
    options: dict[str, float | int | bool | tuple[float, ...]] = {}
    """Further keyword arguments, such as momentum, betas or eps."""
    schedule: ScheduleConfig = ScheduleConfig()

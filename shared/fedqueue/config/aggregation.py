"""The sections that say how updates become versions: `[aggregation]` with its parts, and `[server_optimizer]`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from fedqueue.config.entrypoint import is_entrypoint
from fedqueue.config.schedule import Options, ScheduleConfig
from fedqueue.config.sections import AUTO, OFF, Count, NonNegative, Positive, Section, Word, refuse

STRATEGIES = ("fedasync", "fedbuff", "fedavg", "fadas", "ca2fl")
RunningStatistics = Literal["mean", "drift", "frozen"]
BufferRule = Literal["latest", "mean", "max", "frozen"]
STALENESS_FUNCTIONS = ("constant", "polynomial", "hinge", "exponential")


def _known_or_own(what: str, known: Sequence[str]) -> AfterValidator:
    def check(name: str) -> str:
        if name in known or is_entrypoint(name):
            return name
        if near := difflib.get_close_matches(name, known, n=1, cutoff=0.75):
            raise refuse(f"unknown {what}", f"did you mean {near[0]!r}?")
        names = ", ".join(f"'{k}'" for k in known[:-1]) + f" or '{known[-1]}'"
        raise refuse(f"unknown {what}", f"write {names}, or code of your own: module:name or path/to/file.py:name")

    return AfterValidator(check)


class StalenessConfig(Section):
    """The weight s(τ) of an update that was trained from a version τ versions old."""

    function: Annotated[str, _known_or_own("staleness function", STALENESS_FUNCTIONS)] = "polynomial"
    """`constant`, `polynomial`, `hinge`, `exponential`, or a function τ → weight of your own: `module:function`."""
    a: Positive | None = None
    """Steepness; where it is left out 0.5 (polynomial), 10 (hinge) or 0.1 (exponential)."""
    b: NonNegative | None = None
    """Hinge: a staleness of at most b has weight 1; where it is left out 4."""


class RobustConfig(Section):
    """How `fedbuff` and `fadas` merge a buffer in which some updates may be hostile."""

    rule: Literal[
        "mean", "median", "trimmed_mean", "krum", "multi_krum", "geometric_median", "norm_clipping"
    ] = "mean"  # fmt: skip
    """`mean` tolerates no hostile update. The others hold all updates of the buffer: K models of memory."""
    byzantine: int = Field(default=1, ge=0)
    """Trimmed mean, Krum, Multi-Krum: the number of hostile updates in a buffer that the rule tolerates (f)."""
    keep: Annotated[Count | None, AUTO] = None
    """Multi-Krum: the number of updates with the best scores that are averaged; `auto`: K − f."""
    clip_norm: Annotated[Positive | None, Word("median")] = None
    """Norm clipping: the L2 norm that a longer delta is scaled down to; `median`: the median norm of the buffer."""
    iterations: Count = 100
    """Geometric median: most steps of Weiszfeld's algorithm."""
    smoothing: Positive = 1e-6
    """Geometric median: the smallest distance that is divided by (ν)."""


class FilterConfig(Section):
    """Rejects updates that differ too much from those merged before; for strategies without a buffer."""

    norm_factor: Annotated[Positive | None, OFF] = None
    """Rejects a delta longer than this multiple of the median norm of the last `window` merged ones."""
    min_cosine: Annotated[Annotated[float, Field(gt=-1, le=1)] | None, OFF] = None
    """Rejects a delta whose cosine with the running mean of the merged directions is smaller."""
    window: Count = 20
    """Number of merged updates whose norms the median is taken of."""
    warmup: Count = 8
    """Number of updates that are merged before the filter rejects any."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Weight of the earlier directions in their running mean."""
    strikes: Count = 3
    """Quarantines a client after this many rejections in a row."""
    quarantine_seconds: Positive = 60.0
    """Duration of a quarantine. The client gets no further job; the filter judges the update of its open one."""

    @property
    def on(self) -> bool:
        """Whether the filter can reject any update."""
        return self.norm_factor is not None or self.min_cosine is not None


class AggregationConfig(Section):
    """How the coordinator merges updates into versions. docs/algorithms.md describes the strategies."""

    strategy: Annotated[str, _known_or_own("strategy", STRATEGIES)] = "fedbuff"
    """`fedasync`, `fedbuff`, `fedavg`, `fadas`, `ca2fl`, or an algorithm of your own: `path/to/file.py:name`."""
    strategy_options: dict[str, Any] = {}
    """Further keyword arguments of the strategy: docs/algorithms.md lists those of `fadas` and `ca2fl`."""
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.6
    """FedAsync: the mixing weight of an update of staleness 0."""
    mixing: Literal["model", "delta"] = "model"
    """FedAsync: mixes in the client's model, as in the paper, or adds its delta."""
    buffer_size: Count = 4
    """Updates per version (K); `fedasync` has 1 and `fedavg` has `cohort_size`."""
    cohort_size: Annotated[Count | None, Word("all")] = None
    """FedAvg: clients per round (C); `all`: every client of `[clients]`."""
    barrier: bool = False
    """Gives out no job before the whole buffer is merged; `fedavg` always waits, `fedasync` never."""
    normalize: Literal["count", "weights"] = "count"
    """FedBuff: divides by K, as in the paper, or by the sum of the weights."""
    weight_by_examples: bool = False
    """FedBuff, FADAS: multiplies each update's weight by its number of examples; FedAvg always does."""
    running_statistics: RunningStatistics = "mean"
    """BatchNorm's running means and variances: the mean of the clients' values (`mean`), the sum of their changes
    (`drift`), or the values of version 0 (`frozen`)."""
    buffers: dict[str, BufferRule] = {}
    """Rules of other buffers, pattern of names → rule: the newest value (`latest`), the `mean`, the `max`, or that of
    version 0 (`frozen`). Without a rule: docs/explanation/what-is-federated.md."""
    needs_base: bool = False
    """An algorithm of your own: declares that it reads the base versions of updates, so that they stay stored."""
    max_staleness: int = Field(default=100, ge=0)
    """Rejects an update whose base is more versions old, with the reason `stale`."""
    threads: Count = 1
    """torch threads of the coordinator. Merging is limited by memory bandwidth, so more rarely help."""
    staleness: StalenessConfig = StalenessConfig()
    robust: RobustConfig = RobustConfig()
    filter: FilterConfig = FilterConfig()

    @property
    def own(self) -> bool:
        """Whether the user's own code computes a version, so that an audit cannot replay it without that code."""
        return self.strategy not in STRATEGIES or self.staleness.function not in STALENESS_FUNCTIONS

    @model_validator(mode="after")
    def _robust_fits(self) -> AggregationConfig:
        robust = self.robust
        if robust.rule == "mean":
            return self
        if self.strategy not in ("fedbuff", "fadas"):
            raise refuse(
                f"robust.rule is {robust.rule!r}, which strategy {self.strategy!r} does not have",
                "set strategy to 'fedbuff' or 'fadas'",
            )
        if self.weight_by_examples or self.normalize != "count":
            raise refuse(
                f"robust.rule is {robust.rule!r}, but a client could claim a larger weight",
                "set weight_by_examples = false and normalize = 'count'",
            )
        least = {"trimmed_mean": 2 * robust.byzantine + 1, "krum": 2 * robust.byzantine + 3}
        least["multi_krum"] = least["krum"]
        if self.buffer_size < least.get(robust.rule, 1):
            raise refuse(
                f"robust.rule is {robust.rule!r} with byzantine = {robust.byzantine}, but buffer_size is "
                f"{self.buffer_size}",
                f"set buffer_size to at least {least[robust.rule]}",
            )
        if robust.keep and robust.keep > self.buffer_size:
            raise refuse(
                f"robust.keep is {robust.keep}, but a buffer has only {self.buffer_size} updates",
                f"set robust.keep to at most {self.buffer_size}",
            )
        return self


class ServerOptimizerConfig(Section):
    """How the coordinator applies a version's merged delta; the default adds it unchanged."""

    name: str = "sgd"
    """The optimizer on the server: the name of a `torch.optim` class in lower case, such as sgd, adam or adamw."""
    learning_rate: Positive = 1.0
    """Learning rate of the server's optimizer."""
    optimizer_options: Options = {}
    """Further keyword arguments of the server's optimizer, such as momentum, betas or eps."""
    schedule: ScheduleConfig = ScheduleConfig()
    """How the learning rate changes over versions: one step of the schedule is one version."""

"""Configuration of `fedqueue compare`: what is compared, and how fast the simulated clients are."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from fedqueue.config.sections import AUTO, Count, NonNegative, Positive, Section, Text
from fedqueue.config.target import Target


class CompareConfig(Section):
    """What `fedqueue compare` runs. An option of the command overrides its key. Other commands ignore this section."""

    strategies: Annotated[tuple[Text, ...] | None, AUTO] = None
    """Aggregation strategies; `auto`: fedavg, fedasync (not with keepers) and fedbuff, or none of them where `variants`
    are given."""
    variants: dict[Text, dict[str, Any]] = {}
    """Variants with settings of their own: name → the keys that it changes, in their sections."""
    seeds: Count = 3
    """Runs each variant with the seeds 0 to `seeds` − 1."""
    seed_keys: tuple[Text, ...] = ()
    """Further keys that get the seed, such as `task.options.seed`."""
    tune: dict[str, Any] = {}
    """Chooses the best values for each variant, on two separate seeds: keys in their sections, each with a list."""
    updates: Annotated[Count | None, AUTO] = None
    """Updates per run; `auto`: `stop.updates`, or else 50 per client."""
    target: Target = {}
    """Central metrics to reach, as in `stop.target`; where it is left out, `stop.target` itself."""
    speeds: tuple[Annotated[float, Field(ge=1, allow_inf_nan=False)], ...] = ()
    """Slowdown factors, given to the clients in turn; where they are left out, `clients.slowdown`."""
    batch_seconds: Positive = 0.01
    """Virtual seconds that one batch takes."""
    job_seconds: NonNegative = 0.01
    """Virtual seconds from the dispatch of a job until it begins."""
    jitter: NonNegative = 0.1
    """Relative noise of each job's duration; 0.1 is 10 %."""

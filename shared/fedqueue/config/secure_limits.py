"""What a run with keepers cannot have: settings that need single updates, or that make their sum no secret."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic_core import PydanticCustomError

from fedqueue.config.aggregation import STALENESS_FUNCTIONS, STRATEGIES
from fedqueue.config.sections import refuse
from fedqueue.config.secure import MAX_MEMBERS, RESERVED_NAME, SecureConfig

if TYPE_CHECKING:
    from fedqueue.config.schema import Config

COARSEST_UNIT = 1e-3
"""The largest multiple that each parameter of a delta may be rounded to."""
NOISE_ROOM = 12
"""The standard deviations of noise that a coordinate has room for: it leaves it with a probability below 10⁻³²."""


def quantization_levels(buffer_size: int, weight_levels: int, keepers: int, noise_multiplier: float = 0.0) -> int:
    """L: a delta of norm `clip_norm` has this norm in integers, so that no weighted sum of a buffer leaves 32 bits.

    L = ⌊(2³¹ − 1 − n·D) / (W·(K + 1 + 12·z·√n))⌋, for n keepers, W weight levels, a buffer of K, and D = lcm(1 … W),
    or 1 for W = 1: each keeper subtracts a dither below D, and with client privacy noise of σ = z·W·L.
    """
    dither = math.lcm(*range(1, weight_levels + 1))
    room = 2**31 - 1 - keepers * dither
    if not noise_multiplier:
        return room // (weight_levels * (buffer_size + 1))
    return math.floor(room / (weight_levels * (buffer_size + 1 + NOISE_ROOM * noise_multiplier * math.sqrt(keepers))))


def largest_cohort(config: Config) -> int:
    """The most updates that one version can need: K, or stale ones of weight 1 of which one client has W."""
    return max(config.buffer_size, config.secure.weight_levels * config.secure.min_cohort)


def refusal_of_masking(config: Config) -> PydanticCustomError | None:
    """The error that names each setting that keepers exclude, one setting a line; None if there is no such setting."""
    problems = list(_problems(config)) if config.secure.on else []
    if not problems:
        return None
    if len(problems) == 1:
        ((problem, hint),) = problems
        return refuse(f"with secure.keepers, {problem}", f"{hint}, or leave out secure.keepers")
    lines = "".join(f"\n  {problem}; {hint}" for problem, hint in problems)
    return refuse(f"{len(problems)} settings do not go with secure.keepers:{lines}")


def _problems(config: Config) -> Iterator[tuple[str, str]]:
    """Each problem with what to do about it."""
    yield from _of_aggregation(config)
    yield from _of_cohorts(config)
    yield from _of_examples(config)
    yield from _of_names(config)
    yield from _of_client_privacy(config)
    admission, compression = config.admission, config.compression
    for key in ("max_norm", "norm_quantile"):
        if (value := getattr(admission, key)) is not None:
            yield (
                f"admission.{key} cannot be {value:g}, because the norm of a masked update cannot be read",
                "set it to 'off': sites scale their own deltas to secure.clip_norm",
            )
    if compression.uplink != "float32":
        yield (
            f"compression.uplink cannot be {compression.uplink!r}, because masks need all bits of all parameters",
            "set it to 'float32'",
        )
    if compression.uplink_lossless != "none":
        yield (
            f"compression.uplink_lossless cannot be {compression.uplink_lossless!r}, because masked bytes are random",
            "set it to 'none'",
        )
    if config.security.signatures == "off":
        yield (
            "security.signatures cannot be 'off', because keepers count clients by their signatures",
            "set it to 'required'",
        )


def _of_aggregation(config: Config) -> Iterator[tuple[str, str]]:
    settings = config.aggregation
    strategy = settings.strategy
    reasons = {
        "fedasync": "each of its versions tells one client's update",
        "ca2fl": "it keeps the last update of each client",
    }
    if strategy in reasons or strategy not in STRATEGIES:
        yield (
            f"aggregation.strategy cannot be {strategy!r}, because "
            f"{reasons.get(strategy, 'an algorithm of your own gets single updates')}",
            "set it to 'fedbuff', 'fadas' or 'fedavg'",
        )
    if settings.staleness.function not in STALENESS_FUNCTIONS:
        yield (
            f"aggregation.staleness.function cannot be {settings.staleness.function!r}, because keepers compute each "
            "weight themselves and run no code of yours",
            f"set it to {', '.join(map(repr, STALENESS_FUNCTIONS[:-1]))} or {STALENESS_FUNCTIONS[-1]!r}",
        )
    if settings.robust.rule != "mean":
        yield (
            f"aggregation.robust.rule cannot be {settings.robust.rule!r}, because it compares single updates",
            "set it to 'mean'",
        )
    if settings.filter.on:
        yield (
            "aggregation.filter cannot be on, because it looks at single updates",
            "set its norm_factor and min_cosine to 'off'",
        )


def _of_cohorts(config: Config) -> Iterator[tuple[str, str]]:
    secure, dispatch = config.secure, config.dispatch
    least = min(config.buffer_size, config.clients.number)
    if config.aggregation.strategy == "fedasync":  # refused already: it has no buffer
        return
    if secure.min_cohort > least:
        smaller = "clients" if config.clients.number == least else "updates in a buffer"
        yield (
            f"secure.min_cohort cannot be {secure.min_cohort}, more than the number of {smaller}, {least}",
            f"set it to at most {least}" if least > 1 else f"have more {smaller}",
        )
    elif config.buffer_size > config.clients.number:
        yield (
            f"aggregation.buffer_size cannot be {config.buffer_size}, more than the number of clients, "
            f"{config.clients.number}, because a version has at most one fresh update of each",
            f"set it to at most {config.clients.number}, better well below",
        )
    elif largest_cohort(config) > MAX_MEMBERS:
        key = "aggregation.buffer_size" if config.buffer_size > MAX_MEMBERS else "secure.min_cohort"
        yield (
            f"a cohort cannot have {largest_cohort(config)} updates, but at most {MAX_MEMBERS}",
            f"lower {key}",
        )
    if dispatch.schedule == "fedcompass":
        yield (
            "dispatch.schedule cannot be 'fedcompass', because the first job of each client makes a version of its own",
            "set it to 'async'",
        )
    if config.barrier and dispatch.round_deadline_seconds is not None:
        yield (
            "dispatch.round_deadline_seconds cannot be set, because it closes a round with fewer updates than a cohort",
            "set it to 'off'",
        )
    key = "privacy.clients.clip_norm" if config.privacy.clients.on else "secure.clip_norm"
    levels = quantization_levels(config.buffer_size, secure.weight_levels, len(secure.keepers))
    if config.clip_norm > COARSEST_UNIT * levels:
        yield (
            f"{key} cannot be {config.clip_norm:g}, because each parameter would be rounded to multiples of "
            f"{config.clip_norm / max(levels, 1):.2g}",
            f"set it to at most {COARSEST_UNIT * levels:.0f}, near the norm of a client's delta",
        )


def _of_examples(config: Config) -> Iterator[tuple[str, str]]:
    settings = config.aggregation
    if config.weighs_examples and config.secure.max_examples is None:
        key = "aggregation.strategy 'fedavg'" if settings.strategy == "fedavg" else "aggregation.weight_by_examples"
        yield (
            f"{key} needs secure.max_examples, because each site scales its own delta by its share of that number",
            "set secure.max_examples to the number of examples of the largest client",
        )
    if not config.secure.hides_examples:
        return
    if config.dispatch.selection == "examples":
        yield (
            "dispatch.selection cannot be 'examples', because secure.examples is 'hidden'",
            "set it to 'uniform', 'round_robin' or 'stalest'",
        )
    by_staleness = settings.staleness.function != "constant" and config.secure.weight_levels > 1
    if settings.strategy == "fedbuff" and config.sums_examples and settings.normalize == "count" and by_staleness:
        yield (
            "aggregation.normalize cannot be 'count', because with secure.examples = 'hidden' the coordinator learns "
            "the sum of the examples only with the weights of staleness",
            "set it to 'weights', or aggregation.staleness.function to 'constant'",
        )


def _of_client_privacy(config: Config) -> Iterator[tuple[str, str]]:
    if not config.privacy.clients.on:
        return
    if config.secure.clip_norm != SecureConfig().clip_norm:
        yield (
            "secure.clip_norm cannot be set beside privacy.clients.clip_norm, which takes its place",
            "leave secure.clip_norm out",
        )
    if config.weighs_examples and config.aggregation.strategy == "fedavg":
        yield (
            "aggregation.strategy cannot be 'fedavg' with [privacy.clients], because it divides by a number of "
            "examples that no noise protects",
            "set it to 'fedbuff' or 'fadas'",
        )
    elif config.weighs_examples and config.aggregation.normalize != "count":
        yield (
            f"aggregation.normalize cannot be {config.aggregation.normalize!r} with [privacy.clients] and weights by "
            "examples, because the number of examples that it divides by has no noise",
            "set it to 'count'",
        )
    if config.sums_examples:
        yield (
            "secure.examples cannot be 'hidden' with [privacy.clients] and weights by examples, because their sum has "
            "no noise",
            "set it to 'told', or aggregation.weight_by_examples to false",
        )


def _of_names(config: Config) -> Iterator[tuple[str, str]]:
    for keeper in config.secure.keepers:
        if keeper == RESERVED_NAME or keeper in config.clients.ids:
            owner = "the coordinator's own files" if keeper == RESERVED_NAME else "a client of the run"
            yield f"a keeper cannot be named {keeper!r}, because that is the name of {owner}", "choose another name"

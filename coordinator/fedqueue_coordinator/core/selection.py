"""Which idle client trains next: pure functions in a registry, by `dispatch.selection`.

A choice depends on the seed, the job's number and what is committed or stored, never on a generator or on the order of
past events: a successor that knows the same chooses the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fedqueue.errors import ConfigurationError


@dataclass(frozen=True)
class ClientStats:
    """What is known of the clients; who is missing in a map has not done it yet."""

    examples: Mapping[str, int]
    last_merged: Callable[[str], int]
    """The newest version that has an update of the client, the coming one included; −1 for none."""
    last_job: Mapping[str, int]
    """The number of the client's last job."""


Selection = Callable[[Sequence[str], ClientStats, float], str]
"""(candidates, sorted and not empty; what is known of them; a number in [0, 1) that is the job's own) → the client."""


def uniform(candidates: Sequence[str], known: ClientStats, draw: float) -> str:
    """Each with the same probability."""
    return candidates[int(draw * len(candidates))]


def round_robin(candidates: Sequence[str], known: ClientStats, draw: float) -> str:
    """Whose last job is the longest ago; those that never had one come first, by name."""
    return min(candidates, key=lambda client: known.last_job.get(client, 0))


def stalest(candidates: Sequence[str], known: ClientStats, draw: float) -> str:
    """Whose last merged update is of the oldest version; by lot among equals."""
    oldest = min(map(known.last_merged, candidates))
    return uniform([client for client in candidates if known.last_merged(client) == oldest], known, draw)


def by_examples(candidates: Sequence[str], known: ClientStats, draw: float) -> str:
    """Each with a probability in proportion to its number of examples (Li et al., arXiv 1907.02189, scheme I)."""
    weights = [known.examples.get(client, 0) for client in candidates]
    place = draw * sum(weights)
    for client, weight in zip(candidates, weights, strict=True):
        place -= weight
        if place < 0:
            return client
    return candidates[-1]  # nobody has an example, or the last sum was rounded


SELECTIONS: dict[str, Selection] = {
    "uniform": uniform,
    "round_robin": round_robin,
    "stalest": stalest,
    "examples": by_examples,
}


def make_selection(name: str) -> Selection:
    """The selection of that name; raises ConfigurationError that lists those there are."""
    if name not in SELECTIONS:
        raise ConfigurationError("dispatch.selection", name, f"known: {', '.join(SELECTIONS)}")
    return SELECTIONS[name]


def draw(seed: int, number: int) -> float:
    """The number in [0, 1) of job `number`: a hash, so that no generator's state must be saved."""
    digest = hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53

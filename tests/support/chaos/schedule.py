"""Orders the faults by seed: each alone, then each pair, then random ones without end."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence


def schedule(names: Sequence[str], rng: random.Random) -> Iterator[tuple[str, ...]]:
    """Yield the names of faults to inject together; in pairs, all faults of the form `kind:point` count as one kind."""
    singles = [(name,) for name in names]
    rng.shuffle(singles)
    yield from singles
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(name.partition(":")[0], []).append(name)
    pairs = list(itertools.combinations_with_replacement(kinds, 2))
    rng.shuffle(pairs)
    for first, second in pairs:
        pair = [rng.choice(kinds[first]), rng.choice(kinds[second])]
        rng.shuffle(pair)
        yield tuple(pair)
    while True:
        yield tuple(rng.choice(kinds[rng.choice(list(kinds))]) for _ in range(rng.randint(1, 2)))

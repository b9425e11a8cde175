"""What a coalition can compute from released sums: exact linear algebra, which knows nothing of the rules."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction

Sums = Sequence[Mapping[int, int]]
"""The cohorts that one keeper has released: update → weight."""


def isolated(keepers: Sequence[Sums], client_of: Sequence[str], least: int) -> tuple[str, ...]:
    """Clients, fewer than `least`, of whose updates alone the coalition learns a combination; empty without any.

    A combination Σ c_i y_i of masked updates is unmasked if, for each keeper that is not in the coalition, c is a
    combination of the weights of the cohorts that this keeper has released. `keepers` are those.
    """
    for clients in itertools.combinations(sorted(set(client_of)), least - 1):
        inside = {i for i, client in enumerate(client_of) if client in clients}
        if _combination(keepers, range(len(client_of)), inside):
            return clients
    return ()


def _combination(keepers: Sequence[Sums], updates: Iterable[int], inside: set[int]) -> bool:
    """Whether some c ≠ 0 that is 0 outside `inside` is a combination of each keeper's cohorts."""
    widths = [len(sums) for sums in keepers]
    starts = [sum(widths[:k]) for k in range(len(keepers))]
    rows, first = [], []
    for i in updates:
        of_keeper = []
        for sums, start in zip(keepers, starts, strict=True):
            row = [Fraction(0)] * sum(widths)
            for j, cohort in enumerate(sums):
                row[start + j] = Fraction(cohort.get(i, 0))
            of_keeper.append(row)
        if i in inside:
            rows += [[a - b for a, b in zip(of_keeper[0], other, strict=True)] for other in of_keeper[1:]]
            first.append(of_keeper[0])
        else:
            rows += of_keeper
    return rank([*rows, *first]) > rank(rows)


def rank(rows: Sequence[Sequence[Fraction]]) -> int:
    """The rank of a matrix, by elimination."""
    left, found = [list(row) for row in rows], 0
    for column in range(len(left[0]) if left else 0):
        pivot = next((row for row in left if row[column]), None)
        if pivot is None:
            continue
        left.remove(pivot)
        found += 1
        for row in left:
            if row[column]:
                factor = row[column] / pivot[column]
                row[:] = [a - factor * b for a, b in zip(row, pivot, strict=True)]
    return found

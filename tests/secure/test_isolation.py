"""No combination of released sums tells about fewer clients than a crowd has, by exhaustive search."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import pytest

from fedqueue.secure.cohort import crowd_problem
from tests.support.isolation import isolated

Cohorts = tuple[dict[int, int], ...]


def families(updates: Sequence[int], weights: Sequence[int], clients: Sequence[str], least: int) -> Iterator[Cohorts]:
    """Every set of disjoint cohorts of these updates that the crowd rule accepts."""
    if not updates:
        yield ()
        return
    first, rest = updates[0], updates[1:]
    yield from families(rest, weights, clients, least)  # the first update is in no cohort
    for size in range(len(rest) + 1):
        for others in itertools.combinations(rest, size):
            members = (first, *others)
            if not crowd_problem([(clients[i], weights[i]) for i in members], least, 8):
                cohort = {i: weights[i] for i in members}
                left = [i for i in rest if i not in others]
                for further in families(left, weights, clients, least):
                    yield (cohort, *further)


CASES = [
    ("abcde", [8, 8, 8, 8, 8], [8, 8, 8, 8, 8], 2),
    ("abcde", [5, 8, 8, 8, 8], [8, 5, 8, 7, 8], 2),  # told different versions, keepers compute different weights
    ("abcab", [4, 4, 8, 4, 4], [4, 4, 8, 4, 4], 2),
    ("abcdef", [8, 8, 8, 8, 8, 8], [5, 8, 8, 8, 8, 8], 3),
    ("abcdea", [3, 5, 8, 8, 8, 4], [3, 5, 8, 8, 8, 4], 3),
]


@pytest.mark.slow
@pytest.mark.parametrize(("clients", "weights", "others", "least"), CASES)
def test_no_pair_of_releases_isolates_a_client(clients: str, weights: list[int], others: list[int], least: int) -> None:
    updates = range(len(clients))
    first = list(families(updates, weights, clients, least))
    second = list(families(updates, others, clients, least))
    assert len(first) > 10
    for one in first:
        assert isolated([one], clients, least) == ()  # the coalition has the other keeper
    for one, other in itertools.product(first, second):
        assert isolated([one, other], clients, least) == ()


@pytest.mark.parametrize(
    ("sums", "found"),
    [
        ([{0: 8, 1: 8, 2: 8}, {0: 8, 1: 8}], True),  # S and S without one
        ([{0: 8, 1: 8, 2: 8}, {0: 5, 1: 8, 2: 8}], True),  # the same members with other weights
        ([{0: 8, 1: 8}, {1: 8, 2: 8}, {0: 8, 2: 8}], True),  # three overlapping pairs
        ([{0: 8, 1: 8}, {1: 8, 2: 8}], False),
        ([{0: 8}], True),
        ([{0: 8, 1: 8}, {2: 8, 3: 8}], False),
        ([{0: 8, 1: 8, 2: 8}, {0: 4, 1: 4, 2: 4}], False),
        ([], False),
    ],
)
def test_search_finds_what_isolates(sums: list[dict[int, int]], found: bool) -> None:
    assert bool(isolated([sums], "abcd", 2)) == found
    assert bool(isolated([sums, sums], "abcd", 2)) == found


def test_search_needs_every_honest_keeper() -> None:
    """One keeper that releases whatever it is asked cannot isolate a client while another keeps to the rules."""
    careless = [{0: 8, 1: 8, 2: 8}, {0: 8, 1: 8}]
    assert isolated([careless, [{0: 8, 1: 8, 2: 8}]], "abc", 2) == ()
    assert isolated([careless], "abc", 2) == ("c",)

"""Names of offers and cohorts tell them apart, and the crowd rule hides each client among enough others."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedqueue.protocol.messages import Cohort, Offer
from fedqueue.protocol.signed_envelope import Scope
from fedqueue.secure.cohort import cohort_id, crowd_problem, offer_digest

OFFER = Offer(client="a", job="r-1", attempt=1, base=2, header=b"header")
COHORT = Cohort(version=3, members=(("0" * 64, 2), ("1" * 64, 8)))
SCOPE = Scope("r", "i" * 32, 1)
members = st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(1, 8)), max_size=12)


@pytest.mark.parametrize("changed", [{"client": "b"}, {"job": "r-2"}, {"attempt": 2}, {"base": 3}, {"header": b"x"}])
def test_each_field_changes_an_offers_name(changed: dict[str, str | int | bytes]) -> None:
    assert offer_digest(OFFER) == offer_digest(OFFER.model_copy())
    assert offer_digest(OFFER.model_copy(update=changed)) != offer_digest(OFFER)


def test_each_part_changes_a_cohorts_name() -> None:
    others = [
        cohort_id(Scope("s", "i" * 32, 1), COHORT),
        cohort_id(Scope("r", "j" * 32, 1), COHORT),
        cohort_id(Scope("r", "i" * 32, 2), COHORT),
        cohort_id(SCOPE, Cohort(version=4, members=COHORT.members)),
        cohort_id(SCOPE, Cohort(version=3, members=COHORT.members[::-1])),
        cohort_id(SCOPE, Cohort(version=3, members=COHORT.members[:1])),
        cohort_id(SCOPE, Cohort(version=3, members=(("0" * 64, 3), ("1" * 64, 8)))),
    ]
    assert len({cohort_id(SCOPE, COHORT), *others}) == 8


@given(members, st.integers(2, 6))
def test_accepted_crowd_has_the_effective_number(crowd: list[tuple[str, int]], least: int) -> None:
    if crowd_problem(crowd, least, 8):
        return
    loads: dict[str, int] = {}
    for client, weight in crowd:
        loads[client] = loads.get(client, 0) + weight
    total = sum(loads.values())
    assert len(loads) >= least
    assert max(loads.values()) <= 8
    assert Fraction(total**2, sum(load**2 for load in loads.values())) >= least
    without_any = [total - load for load in loads.values()]
    assert all(rest >= Fraction(total * (least - 1), least) for rest in without_any)


@pytest.mark.parametrize(
    ("crowd", "problem"),
    [
        ([("a", 8), ("b", 8), ("c", 8)], ""),
        ([("a", 8), ("b", 8), ("b", 8)], "updates of 2 clients, of 3 at least"),
        ([("a", 4), ("b", 5), ("c", 5), ("b", 4)], "client b weighs 9, at most 8 is allowed"),
        ([("a", 4), ("a", 4), ("b", 8), ("c", 8)], ""),
        ([("a", 8), ("b", 8), ("c", 7)], "client a weighs 8 of 23, more than one part in 3"),
        ([], "updates of 0 clients, of 3 at least"),
    ],
)
def test_crowd_is_refused_with_its_reason(crowd: list[tuple[str, int]], problem: str) -> None:
    assert crowd_problem(crowd, 3, 8) == problem

"""Cohorts whose sum is too long: which client is suspected, and what becomes of it."""

from __future__ import annotations

import random

import pytest

from fedqueue_coordinator.core.failed_cohorts import FailedCohorts
from tests.support.masked_federation import start_masked

LIE = 2**31 - 1
"""Added to each word of an update, it makes the sum as long as one can be."""


def test_client_of_three_failed_cohorts_is_suspected() -> None:
    cohorts = FailedCohorts(2.0)
    assert cohorts.failed(["x", "a", "b"]) == {}
    assert cohorts.failed(["x", "c", "d"]) == {}
    assert cohorts.failed(["x", "a", "d"]) == {"x": 2.0}


def test_rest_doubles_until_a_cohort_succeeds() -> None:
    cohorts = FailedCohorts(2.0)
    for others in ("ab", "cd", "ef"):
        rests = cohorts.failed(["x", *others])
    assert rests == {"x": 2.0}
    assert cohorts.failed(["x", "a", "d"]) == {"x": 4.0}
    cohorts.succeeded(["x", "b"])
    for others in ("ab", "cd"):
        assert cohorts.failed(["x", *others]) == {}
    assert cohorts.failed(["x", "e", "f"]) == {"x": 2.0}


def test_failed_cohorts_that_are_long_ago_do_not_count() -> None:
    cohorts = FailedCohorts(2.0)
    for members in ("xa", "xb", "cd", "ef", "gh"):
        assert cohorts.failed(members) == {}
    assert cohorts.failed("xc") == {}


def test_members_of_every_failed_cohort_alike_are_not_suspected() -> None:
    cohorts = FailedCohorts(2.0)
    assert [cohorts.failed("abc") for _ in range(5)] == [{}] * 5


@pytest.mark.parametrize("seed", range(20))
def test_spoiler_is_suspected_and_few_others_are(seed: int) -> None:
    """Of ten clients one spoils each cohort of four that it is in; the cohorts are drawn at random."""
    rng, cohorts = random.Random(seed), FailedCohorts(1.0)
    suspected: list[str] = []
    for _ in range(60):
        members = [*rng.sample("abcdefghi", 3), "x"] if rng.random() < 0.4 else rng.sample("abcdefghi", 4)
        if "x" in members:
            suspected += cohorts.failed(members)
        else:
            cohorts.succeeded(members)
    assert suspected.count("x") >= 10
    assert suspected.count("x") > 2 * (len(suspected) - suspected.count("x"))


def test_suspected_client_rests_and_the_others_go_on() -> None:
    names = [f"c{i}" for i in range(7)]
    run = start_masked(*names, buffer_size=3, min_cohort=3, dispatch={"backoff_seconds": 50.0})
    for others in (("c1", "c2"), ("c3", "c4"), ("c5", "c6")):
        run.post_masked("c0", 1.0, lie=LIE)
        for client in others:
            run.post_masked(client, 1.0)
    assert run.federation.version == 0
    [detail] = [line["detail"] for line in run.ledger if "rests for 50 s" in line.get("detail", "")]
    assert "c0 was in at least 3 of the last 4 such cohorts" in detail
    assert all(run.has_job(client) for client in names)
    for client in ("c0", "c1", "c2"):
        run.post_masked(client, 1.0)
    assert not run.has_job("c0")
    assert run.federation.version == 1
    run.tick(51.0)
    assert run.has_job("c0")

"""Short version of `make chaos`: the same harness with a fixed seed, for 20 seconds."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.support.chaos.arena import TARGET
from tests.support.chaos.faults import FAULTS, KEEPER_FAULTS, KINDS
from tests.support.chaos.schedule import schedule
from tests.support.chaos.survive import survive

SECONDS = 20


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.timeout(300)
def test_federation_survives_a_seeded_schedule_of_faults(tmp_path: Path) -> None:
    report = survive(tmp_path, SECONDS, seed=3, names=list(FAULTS))
    assert report.problems == [], "\n".join(report.lines())
    for when, checks in report.checks.items():
        assert not any(check.problems for check in checks), (when, checks)
    assert report.doubled == 0
    assert report.accuracy >= TARGET
    assert report.survived.total() >= 5


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.timeout(300)
def test_federation_with_keepers_survives_their_deaths(tmp_path: Path) -> None:
    names = [*KEEPER_FAULTS, "kill_coordinator", "kill_worker", "restart_redis"]
    report = survive(tmp_path, SECONDS, seed=4, names=names, keepers=["university", "audit-office"])
    assert report.problems == [], "\n".join(report.lines())
    for when, checks in report.checks.items():
        assert not any(check.problems for check in checks), (when, checks)
    assert report.doubled == 0
    assert report.accuracy > 0.7
    assert report.survived.total() >= 5


def test_schedule_has_each_fault_then_each_pair_by_seed() -> None:
    first = [next_ for _, next_ in zip(range(300), schedule(list(FAULTS), random.Random(1)), strict=False)]
    again = [next_ for _, next_ in zip(range(300), schedule(list(FAULTS), random.Random(1)), strict=False)]
    assert first == again
    assert {names[0] for names in first[: len(FAULTS)]} == set(FAULTS)
    kinds = [*KINDS, "kill_coordinator_at"]
    pairs = {frozenset(name.partition(":")[0] for name in names) for names in first if len(names) == 2}
    assert pairs >= {frozenset((a, b)) for a in kinds for b in kinds}

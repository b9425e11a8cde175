"""What the built-in trackers show of a long run: fewer and fewer versions, always the last, and each evaluation."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from fedqueue import RunProgress
from fedqueue_coordinator.tracking.curves import CurveTracker, is_shown
from fedqueue_coordinator.tracking.feed import run_start
from fedqueue_coordinator.tracking.narrator import Narrator
from tests.support.builders import make_config
from tests.tracking.test_feed import evaluation, summary, version


class Written(CurveTracker):
    def __init__(self) -> None:
        self.points: list[tuple[str, int, float]] = []

    def write(self, numbers: Mapping[str, float], now: RunProgress, step: int) -> None:
        self.points += [(name, step, value) for name, value in numbers.items()]

    def curve(self, name: str) -> list[tuple[int, float]]:
        return [(step, value) for written, step, value in self.points if written == name]


def shown(versions: int, *evaluated: int) -> Written:
    curves, narrator = Written(), Narrator()
    narrator.start(run_start(make_config(), 0, 0.0)).make(curves)
    for number in range(1, versions + 1):
        records = [version(number, 2), *([evaluation(number, number + 0.5)] if number in evaluated else [])]
        for record in records:
            call = narrator.tell(record)
            assert call
            call.make(curves)
    narrator.end(summary()).make(curves)
    return curves


@pytest.mark.parametrize(("versions", "points"), [(999, 999), (2000, 1500), (4000, 2000), (8000, 2500)])
def test_points_grow_with_the_logarithm_of_the_versions(versions: int, points: int) -> None:
    assert sum(map(is_shown, range(1, versions + 1))) == pytest.approx(points, abs=1)


def test_last_version_and_every_evaluation_are_shown() -> None:
    curves = shown(2503, 1001, 2502, 2503)
    assert curves.curve("run/updates")[-3:] == [(2496, 4992.0), (2500, 5000.0), (2503, 5006.0)]
    assert [step for step, _ in curves.curve("central/accuracy")] == [1001, 2502, 2503]
    assert [step for step, _ in curves.curve("central/accuracy_by_updates")] == [2002, 5004, 5006]


def test_rate_is_that_since_the_version_shown_before() -> None:
    """One version takes one second of the run's clock, whichever are shown."""
    rates = {value for _, value in shown(2503).curve("run/versions_per_second")}
    assert rates == {1.0}

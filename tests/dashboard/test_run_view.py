"""What the page shows of a ledger: counts, curves of bounded size, and which site is slow or stands out."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedqueue.privacy.gaussian_dp import gaussian_epsilon
from fedqueue_coordinator.operator.dashboard.run_view import MOST_EVENTS, MOST_STALENESS, RunView
from fedqueue_coordinator.operator.dashboard.thinned_curve import ThinnedCurve


def version(number: int, *lines: dict[str, Any], seconds: float | None = None, **more: Any) -> dict[str, Any]:
    at = float(number) if seconds is None else seconds
    return {
        "kind": "version",
        "version": number,
        "seconds": at,
        "merged": [{"at": at, **line} for line in lines],
        **more,
    }


def update(client: str, staleness: int = 0, norm: float | None = 1.0, training_seconds: float = 1.0) -> dict[str, Any]:
    line = {
        "client": client,
        "staleness": staleness,
        "examples": 10,
        "training_seconds": training_seconds,
        "share": 0.5,
    }
    return line if norm is None else {**line, "norm": norm}


def seen(*records: dict[str, Any]) -> dict[str, Any]:
    view = RunView()
    for record in records:
        view.add(record)
    return view.shown()


def site(shown: dict[str, Any], name: str) -> dict[str, Any]:
    return next(client for client in shown["clients"] if client["name"] == name)


points = st.lists(st.integers(0, 9), min_size=1, max_size=300)


@given(points, st.integers(4, 40))
def test_curve_keeps_its_ends_and_its_size(values: list[int], most: int) -> None:
    curve = ThinnedCurve(most)
    for x, y in enumerate(values):
        curve.add(x, y)
    shown = curve.points
    assert len(shown) <= most
    assert shown[0] == (0, values[0])
    assert shown[-1] == (len(values) - 1, values[-1])
    assert all(values[int(x)] == y for x, y in shown)
    gaps = {b[0] - a[0] for a, b in itertools.pairwise(shown[:-1])}
    assert len(gaps) <= 1


def test_a_million_versions_are_thinned_out() -> None:
    view = RunView()
    line = {"at": 0.0, **update("c0")}
    for number in range(1, 1_000_001):
        view.add({"kind": "version", "version": number, "seconds": float(number), "merged": [line]})
    shown = view.shown()
    assert shown["version"] == shown["updates"] == 1_000_000
    assert len(shown["versions"]) <= 601
    assert shown["versions"][-1] == (1_000_000.0, 1_000_000)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 30)), max_size=60))
def test_counts_are_those_of_the_records(updates: list[tuple[str, int]]) -> None:
    shown = seen(*(version(i + 1, update(name, stale)) for i, (name, stale) in enumerate(updates)))
    assert shown["updates"] == len(updates)
    assert {c["name"]: c["merged"] for c in shown["clients"]} == Counter(name for name, _ in updates)
    expected = Counter(min(stale, MOST_STALENESS) for _, stale in updates)
    assert {i: n for i, n in enumerate(shown["staleness"]) if n} == expected


def test_slow_site_and_outlier_are_told_apart() -> None:
    records = [
        version(i, update("a"), update("b"), update("slow", training_seconds=5.0), update("long", norm=9.0))
        for i in range(1, 5)
    ]
    shown = seen(*records)
    assert site(shown, "a")["notes"] == site(shown, "b")["notes"] == []
    assert site(shown, "slow")["notes"] == ["slow: a job takes 5.0 times as long as at the median site"]
    assert site(shown, "long")["notes"] == ["outlier: its updates are 9 times as long as those of the median site"]


def test_lengths_are_compared_at_the_same_time() -> None:
    shrinking = [
        version(i, *(update(name, norm=100.0 * 0.9**i) for name in ["a", "b", "c"] + ["rare"] * (i % 20 == 1)))
        for i in range(1, 100)
    ]
    assert site(seen(*shrinking), "rare")["relative_norm"] == 1
    assert all(client["notes"] == [] for client in seen(*shrinking)["clients"])


def test_rare_site_has_to_stand_out_more() -> None:
    def notes(norm: float) -> list[str]:
        rare = [update("rare", norm=norm)]
        merged = (version(i, update("a"), update("b"), update("c"), *rare * (i % 5 == 0)) for i in range(1, 41))
        return list(site(seen(*merged), "rare")["notes"])

    assert notes(7.0) == []
    assert notes(20.0) == ["outlier: its updates are 20 times as long as those of the median site"]


def test_length_of_a_long_outdated_update_is_not_compared() -> None:
    shown = seen(*(version(i, update("a"), update("b"), update("c"), update("d", 40, 9.0)) for i in range(1, 5)))
    assert site(shown, "d")["relative_norm"] is None
    assert site(shown, "d")["notes"] == []


def test_site_without_an_update_is_noted_once_others_have() -> None:
    def notes(versions: int) -> list[str]:
        view = RunView()
        for number in range(1, versions + 1):
            view.add(version(number, update("a"), update("b"), update("c")))
        return list(site(view.shown(["a", "b", "c", "late"]), "late")["notes"])

    assert notes(9) == []
    assert notes(10) == ["no update of it was merged yet, and the median site has 10"]


def test_few_updates_condemn_no_site() -> None:
    shown = seen(
        *(version(i, update("a"), update("b"), update("c")) for i in range(1, 5)), version(5, update("d", norm=99.0))
    )
    assert site(shown, "d")["notes"] == []


def test_masked_updates_have_no_norm_and_name_keepers() -> None:
    lines = [update(name, norm=None) for name in "abc"]
    masks = {"university": {"digest": "x"}, "office": {"digest": "y"}}
    shown = seen(version(1, *lines, cohort="c", masks=masks), version(2, *lines[:2], cohort="d", masks=masks))
    assert shown["keepers"] == {"university": 2, "office": 2}
    assert shown["smallest_cohort"] == 2
    assert site(shown, "a")["norm"] is None


def test_failures_have_their_text_newest_first() -> None:
    failed = {"kind": "abandoned", "client": "a", "reason": "failed", "error": "E: no", "version": 1, "seconds": 2.0}
    stale = {"kind": "rejected", "client": "b", "reason": "stale", "detail": "too old", "version": 1, "seconds": 3.0}
    shown = seen(version(1, update("a")), failed, stale)
    assert [(e["client"], e["what"], e["text"]) for e in shown["events"]] == [
        ("b", "rejected: stale", "too old"),
        ("a", "abandoned: failed", "E: no"),
    ]
    assert site(shown, "a")["problem"] == "abandoned: failed: E: no"
    assert site(seen(failed, version(2, update("a"))), "a")["problem"] == ""


def test_events_are_bounded_and_the_end_is_none() -> None:
    lost = {"kind": "rejected", "client": "a", "reason": "stale", "detail": "", "version": 1, "seconds": 1.0}
    ended = {**lost, "reason": "run_ended"}
    shown = seen(*[lost] * (MOST_EVENTS + 5), ended)
    assert len(shown["events"]) == MOST_EVENTS
    assert all(event["what"] == "rejected: stale" for event in shown["events"])
    assert site(shown, "a")["rejected"] == {"stale": MOST_EVENTS + 5}, "the end of the run is no fault of a site"


def test_epsilon_of_each_client_follows_from_its_loads() -> None:
    """The account is Σ ℓ²: of two full loads and one half, by the closed form."""
    spent = {"noise_multiplier": 2.0, "weight_levels": 8, "delta": 1e-5, "epsilon_max": 1.0, "mechanism": "gaussian"}
    shown = seen(
        {**spent, "kind": "spend", "version": 1, "cohort": "x", "loads": {"a": 8, "b": 4}},
        {
            **spent,
            "kind": "spend",
            "version": 1,
            "cohort": "y",
            "loads": {"a": 8},
        },  # of a cohort that became no version
        version(1, update("a")),
    )
    assert set(shown["privacy"]) == set(spent)
    assert site(shown, "a")["epsilon"] == pytest.approx(gaussian_epsilon(math.sqrt(2) / 2, 1e-5))
    assert site(shown, "b")["epsilon"] == pytest.approx(gaussian_epsilon(1 / 4, 1e-5))
    assert site(seen(version(1, update("a"))), "a")["epsilon"] is None


def test_unknown_records_change_nothing() -> None:
    assert seen({"kind": "of the future", "seconds": 1.0})["updates"] == 0


def test_configured_sites_are_shown_before_their_first_update() -> None:
    assert [c["name"] for c in RunView().shown(["b", "a"])["clients"]] == ["a", "b"]

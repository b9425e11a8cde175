"""The outlier filter: admitted updates, quarantined clients, and the state after a crash."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedqueue.config.aggregation import FilterConfig
from fedqueue_coordinator.core.admission import Inadmissible
from fedqueue_coordinator.core.events import Close, Dispatch
from fedqueue_coordinator.core.outliers import OutlierFilter
from fedqueue_coordinator.core.reasons import RejectionReason
from tests.support.builders import make_config, of_kind, same_bits
from tests.support.federation_run import Died, Run, start

FILTER = {"norm_factor": 3.0, "min_cosine": -0.2, "warmup": 3, "window": 4, "strikes": 2, "quarantine_seconds": 30}
AGGREGATION = {
    "strategy": "fedasync", "alpha": 1.0, "mixing": "delta", "staleness": {"function": "constant"}, "filter": FILTER,
}  # fmt: skip


def merged(outliers: OutlierFilter, *deltas: list[float]) -> None:
    """Merge each delta as a version of its own."""
    for delta in deltas:
        outliers.admitted(torch.tensor(delta), float(np.linalg.norm(delta)))
        outliers.committed(["c"])


def verdict(outliers: OutlierFilter, delta: list[float]) -> RejectionReason | str:
    try:
        outliers.judge(torch.tensor(delta), float(np.linalg.norm(delta)))
    except Inadmissible as inadmissible:
        return inadmissible.reason
    return ""


def warm(**settings: Any) -> OutlierFilter:
    outliers = OutlierFilter(FilterConfig(**{**FILTER, **settings}), 2)
    merged(outliers, [1.0, 0.0], [0.0, 2.0], [3.0, 0.0])
    return outliers


def test_norm_is_compared_with_the_recent_median() -> None:
    outliers = warm(min_cosine="off")  # the median of 1, 2 and 3 is 2
    assert verdict(outliers, [6.0, 0.0]) == ""
    assert verdict(outliers, [6.01, 0.0]) == RejectionReason.OUTLIER_NORM
    merged(outliers, [5.0, 0.0], [5.0, 0.0])  # the median of the last four, 2, 3, 5 and 5
    assert verdict(outliers, [12.0, 0.0]) == ""
    assert verdict(outliers, [12.1, 0.0]) == RejectionReason.OUTLIER_NORM


def test_direction_is_compared_with_the_running_mean() -> None:
    outliers = warm(norm_factor="off", momentum=0.5)
    mean = 0.5 * (0.5 * (0.5 * np.array([1.0, 0.0])) + 0.5 * np.array([0.0, 1.0])) + 0.5 * np.array([1.0, 0.0])
    for delta in ([1.0, 0.0], [0.0, -1.0], [-1.0, 0.0], [-0.4, 1.0], [1.0, -3.0], [-100.0, -100.0]):
        cosine = float(mean @ delta / np.linalg.norm(mean) / np.linalg.norm(delta))
        assert verdict(outliers, delta) == (RejectionReason.OUTLIER_DIRECTION if cosine < -0.2 else ""), delta


@given(st.floats(0.125, 8.0))
def test_mean_direction_ignores_the_length_of_updates(scale: float) -> None:
    first, second = warm(), warm()
    merged(first, [0.0, 1.0])
    merged(second, [0.0, scale])
    torch.testing.assert_close(first.state["direction"], second.state["direction"])


def test_filter_admits_everything_during_its_warm_up() -> None:
    outliers = OutlierFilter(FilterConfig(**FILTER), 2)
    merged(outliers, [1.0, 0.0], [1.0, 0.0])
    assert verdict(outliers, [-900.0, 0.0]) == ""
    merged(outliers, [1.0, 0.0])
    assert verdict(outliers, [-900.0, 0.0]) == RejectionReason.OUTLIER_NORM
    assert verdict(outliers, [-1.0, 0.0]) == RejectionReason.OUTLIER_DIRECTION


def test_disabled_filter_admits_everything_without_state() -> None:
    outliers = OutlierFilter(FilterConfig(warmup=1), 2)
    merged(outliers, [1.0, 0.0], [1.0, 0.0])
    assert verdict(outliers, [-1e9, 0.0]) == ""
    assert outliers.state == {}


def test_zero_update_has_no_direction() -> None:
    assert verdict(warm(), [0.0, 0.0]) == ""


def test_estimates_change_only_when_a_version_is_made() -> None:
    outliers = warm()
    before = {name: value.clone() for name, value in outliers.state.items()}
    outliers.admitted(torch.tensor([0.0, -9.0]), 9.0)
    assert all(value.equal(before[name]) for name, value in outliers.state.items())
    outliers.committed(["c"])
    assert not outliers.state["direction"].equal(before["direction"])


def test_restored_filter_has_the_same_estimates() -> None:
    outliers = warm()
    successor = OutlierFilter(FilterConfig(**FILTER), 2)
    successor.restore({name: value.clone() for name, value in outliers.state.items()})
    for each in (outliers, successor):
        merged(each, [0.3, -0.1], [2.0, 1.0])
    assert all(value.equal(successor.state[name]) for name, value in outliers.state.items())


# In a run


def warmed_up(**sections: Any) -> Run:
    run = start("client-0", "client-1", "client-2", "client-3", aggregation=AGGREGATION, **sections)
    for client in ("client-0", "client-1", "client-2"):
        run.post(client, [1.0, 0.5])
    return run


def test_outlier_is_rejected_without_excluding_its_client() -> None:
    run = warmed_up()
    (close,) = of_kind(run.post("client-3", [500.0, 0.0]), Close)
    assert (close.record["reason"], close.record["client"]) == (RejectionReason.OUTLIER_NORM, "client-3")
    assert "at most 3 · 1.118" in close.record["detail"]
    assert run.has_job("client-3")
    assert run.x == 3.0


def test_consecutive_strikes_quarantine_a_client_for_a_while() -> None:
    run = warmed_up()
    run.post("client-3", [500.0, 0.0])
    run.post("client-3", [-1.0, -1.0])
    assert run.rejections == [RejectionReason.OUTLIER_NORM, RejectionReason.OUTLIER_DIRECTION]
    assert run.ledger[-1]["detail"].endswith("; quarantined for 30 s")
    run.post("client-3", [1.0, 1.0])  # it got this job before the payload of its last update was read
    assert run.rejections == [RejectionReason.OUTLIER_NORM, RejectionReason.OUTLIER_DIRECTION]
    assert not run.has_job("client-3")
    assert run.federation.next_deadline() == 30
    assert not of_kind(run.tick(29.0), Dispatch)
    assert [d.client for d in of_kind(run.tick(1.0), Dispatch)] == ["client-3"]


def test_merged_update_resets_the_strikes() -> None:
    run = warmed_up()
    for delta in ([500.0, 0.0], [1.0, 0.5], [500.0, 0.0], [1.0, 0.5]):
        run.post("client-3", delta)
    assert run.rejections == [RejectionReason.OUTLIER_NORM, RejectionReason.OUTLIER_NORM]
    assert not [r for r in run.ledger if "quarantined" in r.get("detail", "")]
    assert run.has_job("client-3")


def test_quarantine_and_strikes_survive_a_coordinator_crash() -> None:
    run = warmed_up()
    run.tick(5.0)
    run.post("client-3", [500.0, 0.0])
    run.post("client-2", [500.0, 0.0])
    run.restart()
    run.post("client-3", [500.0, 0.0])  # the second strike in a row; the successor saw only this one
    run.post("client-3", [1.0, 1.0])
    assert not run.has_job("client-3")
    run.restart()
    assert not run.has_job("client-3")
    assert run.has_job("client-2")
    assert not of_kind(run.tick(29.0), Dispatch)
    assert [d.client for d in of_kind(run.tick(1.0), Dispatch)] == ["client-3"]


@pytest.mark.parametrize("dies_before", range(1, 16))
def test_filter_decisions_are_the_same_after_any_crash(dies_before: int) -> None:
    posts = [("client-3", [500.0, 0.0]), ("client-0", [1.0, 1.0]), ("client-1", [-2.0, -1.0]), ("client-2", [0.5, 1.0])]
    whole, broken = warmed_up(), warmed_up()
    broken.dies_before = dies_before
    for client, delta in posts:
        whole.post(client, delta)
        try:
            broken.post(client, delta)
        except Died:
            broken.restart()
    assert whole.rejections == broken.rejections == [RejectionReason.OUTLIER_NORM, RejectionReason.OUTLIER_DIRECTION]
    assert same_bits(whole.federation.model, broken.federation.model)
    assert whole.federation.optimizer_state == broken.federation.optimizer_state


def test_filter_is_off_by_default() -> None:
    run = start("client-0", aggregation={**AGGREGATION, "filter": {}})
    for delta in (1.0, -1e6, 1e6):
        run.post("client-0", delta)
    assert run.rejections == []
    assert not make_config().aggregation.filter.on

"""FedCompass: assigned steps and groups compared with results by hand, and a federation with this scheduler."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedqueue.config.dispatch import FedCompassConfig
from fedqueue.errors import ConfigurationError
from fedqueue_coordinator.core.events import Dispatch
from fedqueue_coordinator.core.fedcompass import FedCompass
from tests.support.builders import make_config, of_kind
from tests.support.federation_run import Run, start

CONFIG = FedCompassConfig(min_steps=20, max_steps=100, latest_factor=1.5)
GROUPED = {"strategy": "fedbuff", "staleness": {"function": "constant"}}


def compass_of(**seconds: Any) -> FedCompass:
    """Return a FedCompass that knows the seconds per step of each client."""
    return FedCompass(CONFIG, dict(seconds))


# The arithmetic


def test_first_job_has_minimum_steps_and_measures_the_speed() -> None:
    fedcompass = compass_of()
    assert fedcompass.assign("a", 10.0) == 20
    assert fedcompass.arrived("a", 14.0)  # in no group
    assert not fedcompass.groups
    fedcompass.assign("a", 14.0)
    assert fedcompass.groups[0].expected == 14.0 + 100 * 0.2


def test_first_client_gets_maximum_steps_and_its_own_group() -> None:
    fedcompass = compass_of(a=0.1)
    assert fedcompass.assign("a", 5.0) == 100
    (group,) = fedcompass.groups
    assert (group.expected, group.latest) == (15.0, 20.0)


def test_client_joins_a_group_with_feasible_steps() -> None:
    fedcompass = compass_of(a=0.1, b=0.3)
    fedcompass.assign("a", 0.0)  # arrives at 10
    assert fedcompass.assign("b", 1.0) == 30  # ⌊9 / 0.3⌋
    (group,) = fedcompass.groups
    assert group.training == {"a", "b"}


def test_client_joins_the_group_that_allows_the_most_steps() -> None:
    fedcompass = compass_of(a=0.1, b=0.2, c=0.21)
    fedcompass.assign("b", 0.0)  # arrives at 20
    fedcompass.assign("a", 0.0)  # 200 steps would end at 20, over the maximum: it opens its own group, at 10
    assert [group.expected for group in fedcompass.groups] == [20.0, 10.0]
    assert fedcompass.assign("c", 0.0) == 95  # ⌊20 / 0.21⌋, and not ⌊10 / 0.21⌋


def test_fast_client_without_a_group_opens_an_aligned_one() -> None:
    fedcompass = compass_of(slow=1.0, fast=0.2)
    fedcompass.assign("slow", 0.0)  # in its own group: 100 steps, expected at 100, at the latest at 150
    # at 240 the group's latest, 150, and 100 steps of its fastest, 100 s more, are 10 s away: 50 steps of 0.2 s
    fedcompass.groups[0].latest = 241.0
    fedcompass.groups[0].expected = 200.0
    fedcompass._step_seconds["slow"] = 0.09
    assert fedcompass.assign("fast", 240.0) == 50  # ⌊(241 + 0.09 · 100 − 240) / 0.2⌋
    assert fedcompass.groups[1].expected == pytest.approx(250.0)


def test_client_too_slow_for_any_group_gets_minimum_steps() -> None:
    fedcompass = compass_of(fast=0.01, slow=1.0)
    fedcompass.assign("fast", 0.0)
    assert fedcompass.assign("slow", 0.0) == 20
    assert [group.expected for group in fedcompass.groups] == [1.0, 20.0]


def test_speed_is_averaged_with_the_previous_estimate() -> None:
    seconds = {"a": 0.1}
    fedcompass = FedCompass(CONFIG, seconds)
    fedcompass.assign("a", 0.0)
    fedcompass.arrived("a", 20.0)  # 0.2 s a step
    assert seconds["a"] == pytest.approx(0.1 + 0.9 * 0.1)


def test_group_ends_when_all_members_have_arrived() -> None:
    fedcompass = compass_of(a=0.1, b=0.3)
    fedcompass.assign("a", 0.0)
    fedcompass.assign("b", 0.0)
    assert not fedcompass.arrived("a", 10.0)
    assert fedcompass.waits("a")
    assert fedcompass.close_groups(10.0) == []
    fedcompass.arrived("b", 10.5)
    assert fedcompass.close_groups(10.5) == ["a", "b"]
    assert not fedcompass.groups
    assert not fedcompass.waits("a")


def test_group_closes_at_its_latest_arrival() -> None:
    fedcompass = compass_of(a=0.1, b=0.3)
    fedcompass.assign("a", 0.0)
    fedcompass.assign("b", 0.0)
    fedcompass.arrived("a", 10.0)
    assert fedcompass.next_deadline() == 15.0
    assert fedcompass.close_groups(14.9) == []
    assert fedcompass.close_groups(15.0) == ["a"]
    assert not fedcompass.arrived("b", 16.0)
    assert not fedcompass.waits("b")
    assert fedcompass.next_deadline() is None


def test_group_that_loses_its_last_missing_member_ends() -> None:
    fedcompass = compass_of(a=0.1, b=0.3)
    fedcompass.assign("a", 0.0)
    fedcompass.assign("b", 0.0)
    fedcompass.arrived("a", 10.0)
    fedcompass.lost("b")
    assert fedcompass.close_groups(10.0) == ["a"]


@given(st.lists(st.floats(0.001, 10.0), min_size=1, max_size=8), st.lists(st.integers(0, 7), max_size=40))
def test_steps_are_bounded_and_arrivals_of_a_group_coincide(speeds: list[float], order: list[Any]) -> None:
    """The speeds, and the order in which clients join and leave, are arbitrary."""
    fedcompass = FedCompass(CONFIG, {f"c{i}": seconds for i, seconds in enumerate(speeds)})
    now = 0.0
    out: dict[Any, Any] = {}
    for i in order:
        client = f"c{i % len(speeds)}"
        if client in out:
            now = max(now, out.pop(client))
            fedcompass.arrived(client, now)
        elif not fedcompass.waits(client):
            seconds = fedcompass._step_seconds[client]
            steps = fedcompass.assign(client, now)
            assert 20 <= steps <= 100
            group = next(group for group in fedcompass.groups if client in group.training)
            arrives = now + steps * seconds
            assert arrives <= group.expected * (1 + 1e-9)
            assert arrives + seconds > group.expected * (1 - 1e-9)  # one more step would exceed the expected arrival
            assert group.expected <= group.latest
            out[client] = arrives
        fedcompass.close_groups(now)


# In a federation


def grouped(*clients: str, **fedcompass: Any) -> Run:
    dispatch = {"schedule": "fedcompass", "fedcompass": {"min_steps": 10, "max_steps": 40, **fedcompass}}
    return start(*clients, aggregation=GROUPED, clients={"count": len(clients)}, dispatch=dispatch)


def steps_of(actions: Any) -> dict[str, Any]:
    return {action.client: action.steps for action in of_kind(actions, Dispatch)}


def test_federation_learns_speeds_and_then_merges_in_groups() -> None:
    """Client a takes 1 s per step and b 2 s. The 40 steps of a and the 20 of b end together and make one version."""
    run = grouped("a", "b")
    assert steps_of(run.actions) == {"a": 10, "b": 10}
    run.now = 10.0
    actions = run.post("a", 1.0)
    assert run.federation.version == 1  # in no group
    assert steps_of(actions) == {"a": 40}  # expected at 50
    run.now = 20.0
    actions = run.post("b", 1.0)
    assert run.federation.version == 2
    assert steps_of(actions) == {"b": 15}  # ⌊30 / 2⌋ steps: b is expected at 50 too
    run.now = 50.0
    assert steps_of(run.post("b", 2.0)) == {}
    assert run.federation.version == 2
    assert not run.has_job("b")
    actions = run.post("a", 4.0)
    assert run.federation.version == 3
    assert [line["client"] for line in run.merged[-2:]] == ["b", "a"]
    assert run.x == 1.0 + 1.0 + 3.0
    assert steps_of(actions) == {"a": 40, "b": 20}


def test_federation_closes_a_group_at_its_latest_arrival() -> None:
    run = grouped("a", "b", latest_factor=1.5)
    run.now = 10.0
    run.post("a", 1.0)
    run.now = 20.0
    run.post("b", 1.0)
    run.now = 50.0
    run.post("a", 2.0)
    assert run.federation.next_deadline() == 10.0 + 1.5 * 40.0
    run.tick(19.0)
    assert run.federation.version == 2
    run.tick(1.0)
    assert run.federation.version == 3
    assert run.has_job("a")
    run.post("b", 2.0)  # late: the update stays in the buffer for the next group, and b gets a new job
    assert run.federation.version == 3
    assert run.has_job("b")


@pytest.mark.parametrize("how", ["lapse", "leave", "reject", "fail"])
def test_group_continues_without_a_lost_member(how: str) -> None:
    run = grouped("a", "b")
    run.now = 10.0
    run.post("a", 1.0)
    run.now = 20.0
    run.post("b", 1.0)
    run.now = 50.0
    run.post("a", 2.0)
    match how:
        case "lapse":
            run.lapse("b")
        case "leave":
            run.leave("b")
        case "reject":
            run.post("b", math.nan)
        case "fail":
            run.end("b", "failed")
    assert run.federation.version == 3
    assert run.has_job("a")


def test_each_version_records_the_speeds_that_are_new() -> None:
    run = grouped("a", "b")
    run.now = 10.0
    run.post("a", 1.0)
    run.now = 20.0
    run.post("b", 1.0)
    assert [record["step_seconds"] for record in run.ledger] == [{"a": 1.0}, {"b": 2.0}]


def test_successor_keeps_the_speeds_and_starts_new_groups() -> None:
    run = grouped("a", "b")
    run.now = 10.0
    run.post("a", 1.0)
    run.now = 20.0
    run.post("b", 1.0)
    run.restart()
    assert run.federation.run_counters.step_seconds == {"a": 1.0, "b": 2.0}
    run.now = 50.0
    actions = run.post("a", 1.0)
    assert run.federation.version == 3  # a recovered job has no group, so each makes a version
    assert steps_of(actions) == {"a": 40}
    actions = run.post("b", 1.0)
    assert steps_of(actions) == {"b": 20}


@pytest.mark.parametrize(
    "aggregation", [{"strategy": "fedavg"}, {"strategy": "fedasync"}, {"strategy": "fedbuff", "barrier": True}]
)
def test_fedcompass_requires_asynchronous_buffering(aggregation: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"dispatch.schedule is 'fedcompass'"):
        make_config(aggregation=aggregation, dispatch={"schedule": "fedcompass"})


def test_minimum_steps_must_not_exceed_maximum_steps() -> None:
    with pytest.raises(ConfigurationError, match="max_steps is 10, below min_steps, 20"):
        make_config(dispatch={"fedcompass": {"max_steps": 10}})

"""Selection of the next client, and the cap on a client's share of recent versions."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedqueue.errors import ConfigurationError
from fedqueue.protocol.msgpack import pack_record
from fedqueue_coordinator.core.idle_pool import IdlePool, Place
from fedqueue_coordinator.core.run_counters import RunCounters
from fedqueue_coordinator.core.selection import SELECTIONS, ClientStats, FairShare, draw, make_selection
from tests.support.builders import make_config
from tests.support.federation_run import Run, start

CLIENTS = ("a", "b", "c", "d")
ADDED = {"strategy": "fedasync", "alpha": 1.0, "mixing": "delta"}


def known(
    examples: dict[str, int] | None = None,
    last_merged: dict[str, int] | None = None,
    last_job: dict[str, int] | None = None,
) -> ClientStats:
    merged = last_merged or {}
    return ClientStats(examples or {}, lambda client: merged.get(client, -1), last_job or {})


def select(name: str, stats: ClientStats, drawn: float) -> str:
    """Return the client that the selection chooses among all."""
    selection, idle = SELECTIONS[name], IdlePool()
    for client in CLIENTS:
        idle.put(client, Place(0, selection.rank(client, stats), selection.weight(client, stats)))
    if selection.draws:
        return idle.drawn(drawn)
    first = idle.first()
    assert first is not None
    return first[0]


# Selections


@pytest.mark.parametrize("name", sorted(SELECTIONS))
def test_selection_is_deterministic_by_seed_and_number(name: str) -> None:
    some = known({"a": 1, "b": 2, "c": 3, "d": 4}, {"a": 2}, {"a": 7})
    choices = [[select(name, some, draw(seed, number)) for number in range(50)] for seed in (7, 7)]
    assert choices[0] == choices[1]
    assert set(choices[0]) <= set(CLIENTS)


def test_draws_are_uniform_and_differ_by_seed_and_number() -> None:
    draws = [draw(0, number) for number in range(4000)]
    assert 0 <= min(draws) < max(draws) < 1
    assert abs(sum(draws) / 4000 - 0.5) < 0.025  # five standard deviations
    assert draws[:50] != [draw(1, number) for number in range(50)]


def test_uniform_selection_is_uniform() -> None:
    counts = Counter(select("uniform", known(), draw(0, number)) for number in range(4000))
    assert all(abs(counts[client] - 1000) < 150 for client in CLIENTS)  # five standard deviations


def test_selection_by_examples_is_proportional() -> None:
    some = known({"a": 10, "b": 0, "c": 30, "d": 60})
    counts = Counter(select("examples", some, draw(0, number)) for number in range(4000))
    for client, share in {"a": 0.1, "b": 0.0, "c": 0.3, "d": 0.6}.items():
        assert abs(counts[client] / 4000 - share) < 0.04  # five standard deviations


def test_selection_by_examples_works_when_all_have_none() -> None:
    assert select("examples", known(), 0.5) in CLIENTS


def test_round_robin_selects_the_least_recently_used_client() -> None:
    assert select("round_robin", known(last_job={"a": 4, "b": 1, "c": 3, "d": 2}), 0.9) == "b"
    assert select("round_robin", known(last_job={"a": 4, "b": 1, "d": 2}), 0.9) == "c"


def test_stalest_selects_the_least_recently_merged_client() -> None:
    some = known(last_merged={"a": 3, "b": 1, "c": 1, "d": 2})
    assert {select("stalest", some, draw(0, number)) for number in range(50)} == {"b", "c"}


def test_unknown_selection_error_lists_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match=r"dispatch.selection.*uniform, round_robin, stalest, examples"):
        make_selection("fairest")


# In a run


def served(run: Run, count: int) -> list[str]:
    """Return the clients that got a job, in order, with a single slot."""
    order = []
    for _ in range(count):
        (client,) = [client for client in run.alive if run.has_job(client)]
        order.append(client)
        run.post(client, 1.0)
    return order


def test_round_robin_order_survives_a_crash() -> None:
    run = start(*CLIENTS, clients={"count": 4}, dispatch={"concurrency": 1, "selection": "round_robin"})
    first = served(run, 6)
    run.restart()
    assert first + served(run, 6) == [*"abcd"] * 3


def test_round_robin_counts_a_job_without_an_update() -> None:
    """The job of b was closed before the crash, so only the job's number is stored."""
    run = start(*CLIENTS, dispatch={"concurrency": 1, "selection": "round_robin"})
    served(run, 1)
    run.end("b", "returned")
    assert run.has_job("c")
    run.restart()
    assert served(run, 4) == [*"cdab"]


def test_stalest_skips_the_client_that_has_just_posted() -> None:
    run = start(
        *CLIENTS,
        aggregation={"strategy": "fedbuff", "buffer_size": 3},
        dispatch={"concurrency": 1, "selection": "stalest"},
    )
    order = served(run, 12)
    assert sorted(order[:4]) == [*"abcd"]
    assert all(first != second for first, second in itertools.pairwise(order))


def test_selection_by_examples_favours_larger_clients() -> None:
    run = start(dispatch={"concurrency": 1, "selection": "examples"}, clients={"count": 2, "min_available": 2})
    run.join("a", examples=10)
    run.join("b", examples=90)
    counts = Counter(served(run, 300))
    assert 0.82 < counts["b"] / 300 < 0.98  # five standard deviations


# The cap


def windows(lines: Any, size: Any) -> Any:
    return [Counter(lines[i : i + size]) for i in range(len(lines) - size + 1)]


def test_client_at_its_share_cap_waits() -> None:
    """Only a is fast. With a window of four versions and a cap of one half, a may have two of any four versions."""
    run = start("a", "b", aggregation=ADDED, clients={"count": 2}, dispatch={"max_share": 0.5, "share_window": 4})
    run.post("a", 1.0)
    run.post("a", 1.0)
    assert not run.has_job("a")
    run.post("b", 1.0)
    assert not run.has_job("a")  # a made two of the last three versions, so a third in four would exceed the cap
    run.post("b", 1.0)
    assert run.has_job("a")  # the next version moves the first version of a out of the window


def test_cap_is_waived_if_no_other_client_can_train() -> None:
    run = start("a", "b", aggregation=ADDED, clients={"count": 2}, dispatch={"max_share": 0.5, "share_window": 2})
    run.post("a", 1.0)
    assert not run.has_job("a")
    run.leave("b")
    assert run.has_job("a")
    run.post("a", 1.0)
    run.post("a", 1.0)
    assert run.federation.version == 3


def test_no_client_waits_without_a_cap() -> None:
    run = start("a", "b", aggregation=ADDED, clients={"count": 2})
    for _ in range(30):
        run.post("a", 1.0)
    assert run.has_job("a")


@given(
    st.lists(st.integers(0, 3), min_size=20, max_size=60),
    st.integers(1, 6),
    st.integers(1, 3),
    st.sampled_from([0.25, 0.3, 0.4, 0.75]),
    st.booleans(),
)
def test_client_never_exceeds_its_share_in_any_window(
    picks: list[int], window: int, buffer_size: int, share: float, crashes: bool
) -> None:
    """Any training client may post next, so the test includes the most unfair orders."""
    try:
        dispatch = {"max_share": share, "share_window": window}
        run = start(*CLIENTS, aggregation={"strategy": "fedbuff", "buffer_size": buffer_size}, dispatch=dispatch)
    except ConfigurationError:
        return  # the share is infeasible in so small a window, which a test below covers
    for i, pick in enumerate(picks):
        training = [client for client in CLIENTS if run.has_job(client)]
        run.post(training[pick % len(training)], 1.0)
        if crashes and i % 7 == 6:
            run.restart()
    versions = [[line["client"] for line in r["merged"]] for r in run.ledger if r["kind"] == "version"]
    limit = run.config.updates_within_share
    assert limit is not None
    for i in range(len(versions) - window + 1):
        counts = Counter(client for clients in versions[i : i + window] for client in clients)
        assert max(counts.values()) <= limit


def test_infeasible_share_is_an_error_with_the_feasible_one() -> None:
    with pytest.raises(ConfigurationError, match=r"max_share is 0.2: 4 clients .* at least 1/4"):
        make_config(dispatch={"max_share": 0.2})


def test_ledger_records_the_share_of_each_client() -> None:
    run = start("a", "b", aggregation=ADDED, clients={"count": 2}, dispatch={"share_window": 4})
    for client in "aabaab":
        run.post(client, 1.0)
    assert [line["share"] for line in run.merged] == [1.0, 1.0, 1 / 3, 3 / 4, 3 / 4, 2 / 4]


def test_totals_keep_at_most_the_versions_of_the_window() -> None:
    config, run_counters = make_config(dispatch={"share_window": 3}), RunCounters()
    share = FairShare(config, run_counters)
    for version in range(1, 10):
        share.committed(version, ["a", "b"], float(version))
    assert len(run_counters.recent) == 3
    assert (run_counters.updates, run_counters.seconds, run_counters.last_merged) == (18, 9.0, {"a": 9, "b": 9})


@given(
    versions=st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=4), max_size=12), window=st.integers(1, 5)
)
def test_totals_are_restored_from_commit_and_ledger(versions: list[Any], window: int) -> None:
    run_counters = RunCounters()
    ledger: list[dict[str, Any]] = []
    for version, clients in enumerate(versions, 1):
        run_counters.commit(version, clients, window, version / 3)
        lines = [{"client": client} for client in clients]
        ledger += [{"kind": "version", "version": version, "merged": lines}, {"kind": "abandoned", "client": "a"}]
    assert RunCounters.from_ledger(run_counters.committed(), ledger, window) == run_counters


def test_commit_size_is_independent_of_the_client_count() -> None:
    run_counters = RunCounters()
    for version in range(1, 1001):
        run_counters.commit(version, [f"client-{version}"], 100, 1.0)
    assert len(pack_record(run_counters.committed())) < 100

"""Who trains next, by each selection, and the cap on a client's share of the last versions."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from builders import make_config, start
from hypothesis import given
from hypothesis import strategies as st

from fedqueue.errors import ConfigurationError
from fedqueue.protocol.signed_envelope import packed
from fedqueue_coordinator.core.fair_share import FairShare
from fedqueue_coordinator.core.run_counters import RunCounters
from fedqueue_coordinator.core.selection import SELECTIONS, ClientStats, draw, make_selection

CLIENTS = ("a", "b", "c", "d")
ADDED = {"mode": "fedasync", "alpha": 1.0, "mixing": "delta"}


def known(examples=(), last_merged=(), last_job=()):
    merged = dict(last_merged)
    return ClientStats(dict(examples), lambda client: merged.get(client, -1), dict(last_job))


# Selections


@pytest.mark.parametrize("name", sorted(SELECTIONS))
def test_choice_is_one_of_the_candidates_and_the_same_for_the_same_seed_and_number(name):
    select = SELECTIONS[name]
    some = known({"a": 1, "b": 2, "c": 3, "d": 4}, {"a": 2}, {"a": 7})
    choices = [[select(CLIENTS, some, draw(seed, number)) for number in range(50)] for seed in (7, 7)]
    assert choices[0] == choices[1]
    assert set(choices[0]) <= set(CLIENTS)


def test_draws_are_uniform_and_differ_by_seed_and_number():
    draws = [draw(0, number) for number in range(4000)]
    assert 0 <= min(draws) < max(draws) < 1
    assert abs(sum(draws) / 4000 - 0.5) < 0.025  # five standard deviations
    assert draws[:50] != [draw(1, number) for number in range(50)]


def test_uniform_choice_is_uniform():
    counts = Counter(SELECTIONS["uniform"](CLIENTS, known(), draw(0, number)) for number in range(4000))
    assert all(abs(counts[client] - 1000) < 150 for client in CLIENTS)  # five standard deviations


def test_choice_by_examples_is_in_proportion():
    some = known({"a": 10, "b": 0, "c": 30, "d": 60})
    counts = Counter(SELECTIONS["examples"](CLIENTS, some, draw(0, number)) for number in range(4000))
    for client, share in {"a": 0.1, "b": 0.0, "c": 0.3, "d": 0.6}.items():
        assert abs(counts[client] / 4000 - share) < 0.04  # five standard deviations


def test_choice_by_examples_still_chooses_where_nobody_has_one():
    assert SELECTIONS["examples"](CLIENTS, known(), 0.5) in CLIENTS


def test_round_robin_takes_the_one_whose_last_job_is_the_longest_ago():
    assert SELECTIONS["round_robin"](CLIENTS, known(last_job={"a": 4, "b": 1, "c": 3, "d": 2}), 0.9) == "b"
    assert SELECTIONS["round_robin"](CLIENTS, known(last_job={"a": 4, "b": 1, "d": 2}), 0.9) == "c"


def test_stalest_takes_the_one_merged_the_longest_ago_and_draws_lots_among_equals():
    some = known(last_merged={"a": 3, "b": 1, "c": 1, "d": 2})
    assert {SELECTIONS["stalest"](CLIENTS, some, draw(0, number)) for number in range(50)} == {"b", "c"}


def test_unknown_selection_names_those_there_are():
    with pytest.raises(ConfigurationError, match=r"dispatch.selection.*uniform, round_robin, stalest, examples"):
        make_selection("fairest")


# In a run


def served(run, count):
    """The clients that got a job, one after another, with a single slot."""
    order = []
    for _ in range(count):
        (client,) = [client for client in run.alive if run.has_job(client)]
        order.append(client)
        run.post(client, 1.0)
    return order


def test_round_robin_serves_all_in_turn_also_after_a_crash():
    run = start(*CLIENTS, clients={"count": 4}, dispatch={"concurrency": 1, "selection": "round_robin"})
    first = served(run, 6)
    run.restart()
    assert first + served(run, 6) == [*"abcd"] * 3


def test_round_robin_remembers_a_turn_that_came_to_nothing():
    """The job of b was closed before the crash, so nothing but its turn is left of it."""
    run = start(*CLIENTS, dispatch={"concurrency": 1, "selection": "round_robin"})
    served(run, 1)
    run.end("b", "returned")
    assert run.has_job("c")
    run.restart()
    assert served(run, 4) == [*"cdab"]


def test_stalest_does_not_take_the_client_whose_update_has_just_arrived():
    run = start(
        *CLIENTS, aggregation={"mode": "fedbuff", "buffer_size": 3}, dispatch={"concurrency": 1, "selection": "stalest"}
    )
    order = served(run, 12)
    assert sorted(order[:4]) == [*"abcd"]
    assert all(first != second for first, second in itertools.pairwise(order))


def test_selection_by_examples_gives_more_jobs_to_those_with_more():
    run = start(dispatch={"concurrency": 1, "selection": "examples"}, clients={"count": 2, "minimum": 2})
    run.join("a", examples=10)
    run.join("b", examples=90)
    counts = Counter(served(run, 300))
    assert 0.82 < counts["b"] / 300 < 0.98  # five standard deviations


# The cap


def windows(lines, size):
    return [Counter(lines[i : i + size]) for i in range(len(lines) - size + 1)]


def test_fast_client_waits_where_it_has_had_its_share():
    """Only a is quick; with four versions in the window and a half for each, a may have two of any four."""
    run = start("a", "b", aggregation=ADDED, clients={"count": 2}, dispatch={"max_share": 0.5, "share_window": 4})
    run.post("a", 1.0)
    run.post("a", 1.0)
    assert not run.has_job("a")
    run.post("b", 1.0)
    assert not run.has_job("a")  # two of the last three are its own, and a third would be one too many
    run.post("b", 1.0)
    assert run.has_job("a")  # its first one leaves the window with the next version


def test_cap_gives_way_where_nobody_else_could_train():
    run = start("a", "b", aggregation=ADDED, clients={"count": 2}, dispatch={"max_share": 0.5, "share_window": 2})
    run.post("a", 1.0)
    assert not run.has_job("a")
    run.leave("b")
    assert run.has_job("a")
    run.post("a", 1.0)
    run.post("a", 1.0)
    assert run.federation.version == 3


def test_without_a_cap_nobody_waits():
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
def test_no_window_has_more_of_a_client_than_its_share(picks, window, buffer_size, share, crashes):
    """Whoever of the training ones is picked posts next, so the order is as unfair as it can be."""
    try:
        dispatch = {"max_share": share, "share_window": window}
        run = start(*CLIENTS, aggregation={"mode": "fedbuff", "buffer_size": buffer_size}, dispatch=dispatch)
    except ConfigurationError:
        return  # so small a window cannot hold so small a share: tested below
    for i, pick in enumerate(picks):
        training = [client for client in CLIENTS if run.has_job(client)]
        run.post(training[pick % len(training)], 1.0)
        if crashes and i % 7 == 6:
            run.restart()
    versions = [[line["client"] for line in r["merged"]] for r in run.ledger if r["kind"] == "version"]
    limit = run.config.updates_within_share
    for i in range(len(versions) - window + 1):
        counts = Counter(client for clients in versions[i : i + window] for client in clients)
        assert max(counts.values()) <= limit


def test_share_that_cannot_be_kept_is_an_error_that_says_what_can():
    with pytest.raises(ConfigurationError, match=r"max_share is 0.2: 4 clients .* at least 1/4"):
        make_config(dispatch={"max_share": 0.2})


def test_ledger_says_each_client_s_share_of_the_last_versions():
    run = start("a", "b", aggregation=ADDED, clients={"count": 2}, dispatch={"share_window": 4})
    for client in "aabaab":
        run.post(client, 1.0)
    assert [line["share"] for line in run.merged] == [1.0, 1.0, 1 / 3, 3 / 4, 3 / 4, 2 / 4]


def test_totals_keep_no_more_versions_than_the_window():
    config, totals = make_config(dispatch={"share_window": 3}), RunCounters()
    turns = FairShare(config, totals)
    for version in range(1, 10):
        turns.committed(version, ["a", "b"], float(version))
    assert len(totals.recent) == 3
    assert (totals.updates, totals.seconds, totals.last_merged) == (18, 9.0, {"a": 9, "b": 9})


@given(
    versions=st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=4), max_size=12), window=st.integers(1, 5)
)
def test_totals_are_counted_anew_from_what_is_committed_and_the_ledger(versions, window):
    totals, ledger = RunCounters(), []
    for version, clients in enumerate(versions, 1):
        totals.commit(version, clients, window, version / 3)
        lines = [{"client": client} for client in clients]
        ledger += [{"kind": "version", "version": version, "merged": lines}, {"kind": "abandoned", "client": "a"}]
    assert RunCounters.from_ledger(totals.committed(), ledger, window) == totals


def test_what_is_committed_does_not_grow_with_the_clients_that_contribute():
    totals = RunCounters()
    for version in range(1, 1001):
        totals.commit(version, [f"client-{version}"], 100, 1.0)
    assert len(packed(totals.committed())) < 100

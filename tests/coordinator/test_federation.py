"""The state machine: the path of an update, slots, synchronous rounds, equivalences, known faults, and recovery."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedqueue.protocol.keys import client_tag
from fedqueue.protocol.stream_entry import StreamEntry
from fedqueue_coordinator.core.events import (
    Acknowledge,
    ClientJoined,
    ClientLeft,
    Close,
    CloseCondition,
    Commit,
    Dispatch,
    InvalidEntry,
    JobEnded,
    LeaseExpired,
    Load,
    Stop,
)
from fedqueue_coordinator.core.federation import Federation
from fedqueue_coordinator.core.reasons import AbandonReason, LapseCause, RejectionReason
from tests.support import oracle
from tests.support.builders import EXAMPLES, MANIFEST, make_config, make_frame, make_header, of_kind, same_bits
from tests.support.federation_run import Died, Run, start

FUNCTIONS = sorted(oracle.STALENESS)
FEDASYNC = {"strategy": "fedasync", "alpha": 0.5, "staleness": {"function": "constant"}}
FEDBUFF = {"strategy": "fedbuff", "buffer_size": 2, "staleness": {"function": "constant"}}
FEDAVG = {"strategy": "fedavg", "cohort_size": 2}


# The path of an update


def test_update_frees_its_slot_and_becomes_a_version() -> None:
    run = start("c0", "c1", clients={"count": 1})  # one slot for two clients
    (first,) = run.jobs
    client = run.jobs[first]
    dispatch, load, commit = run.post(client, 1.0)
    assert isinstance(dispatch, Dispatch)
    assert isinstance(load, Load)
    assert isinstance(commit, Commit)
    assert load.arrived.job == commit.merged[0].job == first
    assert (commit.version, run.x) == (1, 1.0)


def test_version_record_lists_the_merged_updates() -> None:
    run = start("c0", "c1", aggregation={"strategy": "fedbuff", "buffer_size": 2, "weight_by_examples": True})
    jobs = run.job_of("c0"), run.job_of("c1")
    run.now = 1.5
    run.post("c0", [3.0, 4.0], examples=7, seconds=0.25, metrics={"loss": 0.5})
    run.now = 2.5
    (commit,) = of_kind(run.post("c1", 1.0), Commit)
    assert {k: v for k, v in commit.record.items() if k != "merged"} == {
        "kind": "version",
        "version": 1,
        "seconds": 2.5,
    }
    assert [line["job"] for line in commit.record["merged"]] == list(jobs)
    assert commit.record["merged"][0] == {
        "job": jobs[0], "client": "c0", "attempt": 1, "base": 0, "staleness": 0, "examples": 7, "weight": 7.0,
        "norm": 5.0, "at": 1.5, "training_seconds": 0.25, "metrics": {"loss": 0.5}, "share": 0.5,
    }  # fmt: skip


def test_totals_count_committed_updates() -> None:
    run = start("c0", "c1", aggregation=FEDBUFF)
    for client in ("c0", "c1", "c1", "c1", "c0"):
        run.now += 1.0
        run.post(client, 1.0)
    assert vars(run.federation.run_counters) == {
        "updates": 4, "seconds": 4.0, "merged_by": {"c0": 1, "c1": 3}, "last_merged": {"c0": 1, "c1": 2},
        "recent": [["c0", "c1"], ["c1", "c1"]], "step_seconds": {}, "started": 0.0, "accounts": {}, "charged": set(),
    }  # fmt: skip
    assert run.federation.buffered == 1
    assert set(run.federation.unfinished) == set(run.jobs)


def test_staleness_is_measured_at_the_merge() -> None:
    """Two versions are made after the dispatch and the download; the staleness at the merge determines the weight."""
    run = start("c0", "c1", aggregation={"strategy": "fedasync", "alpha": 1.0, "mixing": "delta"})
    run.post("c1", 0.0)
    run.post("c1", 0.0)
    run.post("c1", 0.0)
    run.post("c0", 6.0, base=0)
    assert run.merged[-1]["staleness"] == 3
    assert run.merged[-1]["weight"] == 0.5
    assert run.x == 3.0


def test_weights_of_loading_updates_are_set_at_their_merge() -> None:
    run = start("c0", "c1", aggregation={"strategy": "fedasync", "alpha": 0.5, "staleness": {"function": "constant"}})
    run.holds_loads = True
    run.post("c0", 8.0)
    run.post("c1", 2.0)
    run.load_next()
    assert run.x == 4.0
    run.load_next()  # its base was the newest version at its arrival, but is stale now
    assert run.merged[-1]["staleness"] == 1
    assert run.x == 3.0  # 1/2 · 4 + 1/2 · (0 + 2)


# Against the oracle, through the federation

ARRIVALS = [("c0", 0), ("c1", 0), ("c2", 0), ("c1", 1), ("c0", 2), ("c2", 0), ("c2", 3), ("c0", 3), ("c1", 2)]
"""Client and base version: one that exists by then, also where only every second update makes a version."""


def deltas() -> NDArray[Any]:
    return np.random.default_rng(5).normal(size=(len(ARRIVALS), 2)).astype(np.float32).astype(np.float64)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("mixing", ["model", "delta"])
def test_fedasync_through_the_federation_follows_the_formula(mixing: str, function: str) -> None:
    aggregation = {"strategy": "fedasync", "alpha": 0.6, "mixing": mixing, "staleness": {"function": function}}
    run = start("c0", "c1", "c2", aggregation=aggregation)
    xs = [np.zeros(2)]
    for version, ((client, base), delta) in enumerate(zip(ARRIVALS, deltas(), strict=True)):
        run.post(client, delta, base=base)
        s = oracle.STALENESS[function](version - base)
        xs.append(oracle.fedasync(xs[-1], xs[base], delta, 0.6, s, mixing))
        np.testing.assert_allclose(run.federation.model.parameters.numpy(), xs[-1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalize", ["count", "weights"])
@pytest.mark.parametrize("by_examples", [False, True])
@pytest.mark.parametrize(
    ("server", "rule"),
    [
        ({}, oracle.SGD),
        ({"name": "sgd", "learning_rate": 0.5, "optimizer_options": {"momentum": 0.9}}, lambda: oracle.SGD(0.5, 0.9)),
        ({"name": "adam", "learning_rate": 0.1}, lambda: oracle.Adam(0.1)),
        (
            {"name": "adamw", "learning_rate": 0.1, "optimizer_options": {"weight_decay": 0.3}},
            lambda: oracle.Adam(0.1, decay=0.3),
        ),
        ({"name": "adagrad", "learning_rate": 0.1}, lambda: oracle.Adagrad(0.1)),
    ],
    ids=["sgd", "momentum", "adam", "adamw", "adagrad"],
)
def test_fedbuff_and_the_server_optimizer_follow_the_formulas(
    server: dict[str, Any], rule: Callable[..., Any] | type[Any], by_examples: bool, normalize: str
) -> None:
    aggregation = {"strategy": "fedbuff", "buffer_size": 2, "normalize": normalize, "weight_by_examples": by_examples}
    run = start("c0", "c1", "c2", aggregation=aggregation, server_optimizer=server)
    x, optimizer, s = np.zeros(2), rule(), oracle.STALENESS["polynomial"]
    buffer = []
    for i, ((client, base), delta) in enumerate(zip(ARRIVALS, deltas(), strict=True)):
        run.post(client, delta, base=base, examples=1 + i)
        buffer.append(oracle.Arrived(delta, i // 2 - base, 1 + i))
        if len(buffer) == 2:
            x, buffer = optimizer.step(x, oracle.fedbuff(buffer, s, normalize, by_examples)), []
        np.testing.assert_allclose(run.federation.model.parameters.numpy(), x, rtol=2e-5, atol=1e-6)
    assert run.federation.version == 4


# Equivalences, bit for bit


def rounds(aggregation: dict[str, Any], server: dict[str, Any], count: int = 4) -> Run:
    """Run rounds with three of four clients, in the same arrival order for every strategy."""
    run = start("c0", "c1", "c2", "c3", aggregation=aggregation, server_optimizer=server)
    generator = np.random.default_rng(3)
    for _ in range(count):
        for client in sorted(run.jobs.values(), reverse=True):
            mean, variance, steps = generator.normal(), generator.uniform(0.1, 4), int(generator.integers(100))
            update = make_frame(generator.normal(size=2), mean, variance, steps)
            run.post(client, update, examples=int(generator.integers(1, EXAMPLES)))
    assert run.federation.version == count
    return run


SERVERS = [{}, {"name": "adam", "learning_rate": 0.1}, {"learning_rate": 0.5, "optimizer_options": {"momentum": 0.9}}]


@pytest.mark.parametrize("server", SERVERS, ids=["sgd", "adam", "momentum"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_synchronous_fedbuff_of_a_whole_cohort_equals_fedavg(function: str, server: dict[str, Any]) -> None:
    fedavg = rounds({"strategy": "fedavg", "cohort_size": 3, "staleness": {"function": function}}, server)
    fedbuff = rounds(
        {
            "strategy": "fedbuff", "buffer_size": 3, "barrier": True, "weight_by_examples": True,
            "staleness": {"function": function},
        },
        server,
    )  # fmt: skip
    assert fedavg.versions.keys() == fedbuff.versions.keys()
    assert all(same_bits(fedavg.versions[v], fedbuff.versions[v]) for v in fedavg.versions)
    assert fedavg.ledger == fedbuff.ledger
    assert fedavg.federation.optimizer_state == fedbuff.federation.optimizer_state


@pytest.mark.parametrize("server", SERVERS, ids=["sgd", "adam", "momentum"])
def test_fedbuff_of_size_one_equals_fedasync_by_delta(server: dict[str, Any]) -> None:
    constant = {"staleness": {"function": "constant"}}
    runs = []
    for mode in ({"strategy": "fedbuff", "buffer_size": 1}, {"strategy": "fedasync", "alpha": 1.0, "mixing": "delta"}):
        run = start("c0", "c1", "c2", aggregation={**mode, **constant}, server_optimizer=server)
        for version, ((client, base), delta) in enumerate(zip(ARRIVALS, deltas(), strict=True)):
            run.post(client, make_frame(delta, mean=delta[0], variance=delta[1] ** 2, steps=version), base=base)
        runs.append(run)
    assert all(same_bits(runs[0].versions[v], runs[1].versions[v]) for v in range(len(ARRIVALS) + 1))


def test_arrival_order_alone_determines_the_version() -> None:
    models = []
    for clients, pause in ((("c0", "c1", "c2"), 0.0), (("c2", "c0", "c1"), 7.0)):
        run = start(*clients, aggregation={"strategy": "fedbuff", "buffer_size": 2})
        for client, delta in zip(clients * 3, np.random.default_rng(1).normal(size=(9, 2)), strict=True):
            run.now += pause
            run.post(client, delta, base=0)
        models.append(run.federation.model)
    assert same_bits(*models)


# Known faults of other systems


def test_delta_is_relative_to_the_downloaded_version() -> None:
    run = start("c0", "c1", aggregation=FEDASYNC)
    run.post("c1", 8.0)
    assert run.x == 4.0
    (load,) = of_kind(run.post("c0", 2.0, base=0), Load)
    assert load.with_base
    assert run.x == 3.0  # 1/2 · 4 + 1/2 · (0 + 2); from the current model it would be 5


def test_federation_divides_the_summed_buffer() -> None:
    run = start("c0", "c1", aggregation=FEDBUFF)
    run.post("c0", 2.0)
    run.post("c1", 4.0)
    assert run.x == 3.0


def test_federation_averages_batchnorm_statistics() -> None:
    run = start("c0", "c1", aggregation=FEDBUFF)
    run.post("c0", make_frame(mean=2.0, variance=1.0))
    run.post("c1", make_frame(mean=6.0, variance=3.0))
    assert run.federation.model.buffers.tolist() == [4.0, 2.0]


def test_staleness_does_not_accumulate_into_alpha() -> None:
    run = start("c0", "c1", aggregation={"strategy": "fedasync", "alpha": 0.8, "mixing": "delta"})
    for _ in range(20):
        run.post("c0", 0.0, base=max(0, run.federation.version - 3))
    run.post("c1", 5.0)
    assert [line["weight"] for line in run.merged[3:]] == [0.4] * 17 + [0.8]
    assert run.x == 4.0


@pytest.mark.parametrize("function", FUNCTIONS)
def test_fresh_update_has_its_full_weight(function: str) -> None:
    staleness = {"function": function}
    run = start("c0", aggregation={"strategy": "fedbuff", "buffer_size": 1, "staleness": staleness})
    run.post("c0", 4.0)
    assert (run.merged[0]["weight"], run.x) == (1.0, 4.0)


@pytest.mark.parametrize("aggregation", [FEDASYNC, FEDBUFF, FEDAVG], ids=["fedasync", "fedbuff", "fedavg"])
def test_silent_client_does_not_leak_its_slot(aggregation: dict[str, Any]) -> None:
    run = start("c0", "c1", "c2", clients={"count": 3}, aggregation=aggregation, dispatch={"concurrency": 2})
    for _ in range(10):
        assert len(run.jobs) == 2
        silent = next(iter(run.jobs.values()))
        run.lapse(silent)
    assert len(run.jobs) == 2
    assert run.federation.abandoned == {"lapsed": 10}


def test_variance_stays_positive_at_any_staleness() -> None:
    run = start("c0", "c1", aggregation={"strategy": "fedbuff", "buffer_size": 2, "staleness": {"function": "hinge"}})
    for variance in (100.0, 1e-6, 50.0, 1e-8, 1e-8, 1e-8):
        for client, base in (("c0", 0), ("c1", run.federation.version)):
            run.post(client, make_frame(variance=variance), base=base)
        assert run.federation.model.buffers[1] > 0


def test_counters_never_decrease() -> None:
    run = start("c0", "c1", aggregation={"strategy": "fedasync"})
    for steps, expected in ((5, 5), (3, 5), (9, 9)):
        run.post("c0", make_frame(steps=steps))
        assert run.federation.model.counters.tolist() == [expected]


# Slots


def test_slot_of_an_expired_job_goes_to_another_client() -> None:
    for seed in range(8):
        run = start("c0", "c1", "c2", dispatch={"concurrency": 1}, seed=seed)
        silent = next(iter(run.jobs.values()))
        (dispatch,) = run.lapse(silent)
        assert isinstance(dispatch, Dispatch)
        assert dispatch.client != silent


def test_only_client_gets_a_new_job_after_its_lease_expired() -> None:
    run = start("c0")
    (dispatch,) = run.lapse("c0")
    assert isinstance(dispatch, Dispatch)
    assert dispatch.client == "c0"


@pytest.mark.parametrize("reason", ["returned", "failed"])
def test_ended_job_is_abandoned_and_frees_its_slot(reason: str) -> None:
    run = start("c0", "c1", dispatch={"concurrency": 1})
    client = next(iter(run.jobs.values()))
    job = run.job_of(client)
    close, dispatch = run.end(client, reason, "ValueError: no")
    assert isinstance(close, Close)
    assert isinstance(dispatch, Dispatch)
    assert (close.job, close.record["kind"]) == (job, "abandoned")
    assert (close.record["reason"], close.record["error"], close.record["client"]) == (reason, "ValueError: no", client)
    assert dispatch.client != client


def test_failed_client_backs_off_and_returning_one_does_not() -> None:
    run = start("c0", "c1")
    run.end("c0", "returned")
    assert run.has_job("c0")
    run.end("c1", "failed")
    assert not run.has_job("c1")
    assert run.federation.next_deadline() == 1.0
    run.tick(1.0)
    assert run.has_job("c1")


def test_run_fails_when_the_task_raises_at_every_client() -> None:
    run = start("c0", "c1", dispatch={"max_client_failures": 2})
    for client in ("c0", "c1"):
        run.end(client)
    run.tick(10)
    run.end("c0")
    (stop,) = of_kind(run.end("c1"), Stop)
    assert stop.failed
    assert run.federation.abandoned == {"failed": 4}


def test_leaving_client_has_its_queued_job_withdrawn() -> None:
    run = start("c0", "c1", "c2", dispatch={"concurrency": 1})
    client = next(iter(run.jobs.values()))
    job = run.job_of(client)
    close, dispatch = run.leave(client)
    assert isinstance(close, Close)
    assert isinstance(dispatch, Dispatch)
    assert run.endings == {job: "returned"}
    assert dispatch.client != client


def test_ending_of_a_withdrawn_job_is_only_acknowledged() -> None:
    run = start("c0")
    job = run.job_of("c0")
    run.leave("c0")
    assert run.tell(JobEnded("9-0", job, "c0", AbandonReason.FAILED, "late")) == [Acknowledge("9-0", None)]
    assert run.federation.abandoned == {"returned": 1}
    run.join("c0")
    assert run.has_job("c0")  # and has no backoff


def test_update_posted_before_a_leave_is_merged() -> None:
    run = start("c0", "c1")
    job = run.job_of("c0")
    run.post("c0", 2.0, unread=True)
    run.leave("c0")
    assert run.federation.open_jobs[job] == "c0"
    run.read()
    assert run.endings == {job: "merged"}
    assert run.federation.abandoned["returned"] == 0
    assert run.x == 2.0


def test_leave_that_ends_the_run_discards_a_posted_update() -> None:
    run = start("c0", "c1", stop={"seconds": 5.0})
    job = run.job_of("c0")
    run.post("c0", 2.0, unread=True)
    run.now = 5.0
    run.leave("c0")
    assert run.endings[job] == "run_ended"
    assert run.federation.abandoned == Counter(run_ended=2)
    run.read()
    assert (run.x, run.unacknowledged) == (0.0, {})


def test_client_that_left_gets_no_job_until_it_returns() -> None:
    run = start("c0", "c1")
    run.leave("c0")
    for _ in range(3):
        run.post("c1", 1.0)
    assert not run.has_job("c0")
    run.join("c0")
    assert run.has_job("c0")


def test_update_posted_before_its_client_left_is_merged() -> None:
    run = start("c0", "c1", aggregation=FEDBUFF)
    run.post("c0", 2.0)
    run.leave("c0")
    run.post("c1", 4.0)
    assert run.x == 3.0


@pytest.mark.parametrize("aggregation", [FEDASYNC, FEDAVG], ids=["fedasync", "fedavg"])
def test_silent_client_keeps_its_slot_until_the_lease_expires(aggregation: dict[str, Any]) -> None:
    run = start("c0", "c1", "c2", clients={"count": 2}, aggregation=aggregation)
    silent, _ = run.jobs.values()
    job = run.job_of(silent)
    assert run.vanish(silent) == []
    assert run.federation.open_jobs[job] == silent
    (dispatch,) = run.lapse(silent)
    assert isinstance(dispatch, Dispatch)
    assert dispatch.client != silent


def test_update_of_a_client_that_fell_silent_is_merged() -> None:
    run = start("c0", "c1")
    run.vanish("c0")
    run.post("c0", 2.0)
    assert (run.x, run.has_job("c0")) == (2.0, False)


def test_client_returning_within_its_lease_keeps_its_job() -> None:
    run = start("c0")
    run.vanish("c0")
    assert run.join("c0") == []
    assert list(run.jobs.values()) == ["c0"]


def test_training_resumes_when_a_client_returns() -> None:
    run = start("c0", "c1")
    run.leave("c0")
    run.leave("c1")
    assert not run.jobs
    run.tick(1000)
    assert run.federation.stopped is None
    run.join("c1")
    run.post("c1", 1.0)
    assert run.federation.version == 1


def test_jobs_of_a_new_epoch_have_distinct_names() -> None:
    federation = Federation(make_config(), make_frame(), version=3, job_number=7, epoch=2, evaluates=False)
    assert federation.handle(ClientJoined("c0", 10), 0.0) == [
        Dispatch(f"run-e2-00000008-{client_tag('run', 'c0')}", 8, "c0")
    ]


# Synchronous rounds


def test_fedavg_waits_for_the_whole_cohort_before_it_starts() -> None:
    run = start("c0", aggregation={"strategy": "fedavg", "cohort_size": 3})
    assert not run.jobs
    run.join("c1")
    assert not run.jobs
    run.join("c2", "c3")
    assert len(run.jobs) == 3


def test_fedavg_of_every_client_waits_for_every_client() -> None:
    run = start("c0", "c1", "c2", aggregation={"strategy": "fedavg"})
    assert not run.jobs
    run.join("c3")
    assert len(run.jobs) == 4


def test_no_job_for_the_next_version_precedes_the_commit() -> None:
    run = start("c0", "c1", "c2", "c3", aggregation={"strategy": "fedavg", "cohort_size": 3})
    first = sorted(run.jobs.values())
    for client in first[:2]:
        assert not of_kind(run.post(client, 1.0), Dispatch)
    actions = run.post(first[2], 1.0)
    assert [type(action) for action in actions] == [Load, Commit, Dispatch, Dispatch, Dispatch]
    assert all(line["staleness"] == 0 for line in run.merged)


def test_client_is_at_most_once_in_a_cohort() -> None:
    run = start("c0", "c1", aggregation=FEDAVG)
    run.post("c0", 1.0)
    run.tick(100)
    assert not run.has_job("c0")
    run.join("c0")
    assert not run.has_job("c0")


def test_lost_client_of_a_cohort_is_replaced() -> None:
    run = start("c0", "c1", "c2", aggregation=FEDAVG)
    first, second = run.jobs.values()
    (third,) = {"c0", "c1", "c2"} - {first, second}
    run.post(first, 2.0)
    run.lapse(second)
    assert run.has_job(third)
    assert not run.has_job(second)
    run.post(third, 4.0)
    assert (run.federation.version, run.x) == (1, 3.0)


@pytest.mark.parametrize("how", ["leave", "reject", "fail"])
def test_freed_slot_of_a_round_goes_to_another_client(how: str) -> None:
    run = start("c0", "c1", "c2", aggregation=FEDAVG)
    first, second = run.jobs.values()
    (third,) = {"c0", "c1", "c2"} - {first, second}
    match how:
        case "leave":
            run.leave(second)
        case "reject":
            run.post(second, float("nan"))
        case "fail":
            run.end(second)
    assert run.has_job(third)
    assert len(run.jobs) == 2


def test_short_cohort_closes_and_divides_by_its_size() -> None:
    run = start("c0", "c1", "c2", aggregation={"strategy": "fedavg", "cohort_size": 3})
    run.post("c0", 2.0)
    run.leave("c1")
    run.tick()
    assert run.federation.version == 0  # c2 is still training
    run.post("c2", 6.0)
    assert run.federation.version == 0
    run.tick()
    assert (run.federation.version, run.x) == (1, 4.0)
    assert sorted(run.jobs.values()) == ["c0", "c2"]


@pytest.mark.parametrize("normalize", ["count", "weights"])
def test_short_synchronous_buffer_divides_by_its_size(normalize: str) -> None:
    aggregation = {"strategy": "fedbuff", "buffer_size": 3, "barrier": True, "normalize": normalize}
    run = start("c0", "c1", "c2", aggregation=aggregation)
    run.post("c0", 2.0)
    run.post("c1", 6.0)
    run.leave("c2")
    run.tick()
    assert (run.federation.version, run.x) == (1, 4.0)


def test_short_cohort_waits_for_a_client_in_backoff() -> None:
    run = start("c0", "c1", aggregation=FEDAVG)
    run.post("c0", 2.0)
    run.end("c1", "failed")
    run.tick(0.5)
    assert run.federation.version == 0
    run.tick(0.5)
    run.post("c1", 4.0)
    assert (run.federation.version, run.x) == (1, 3.0)


def test_short_cohort_does_not_wait_for_an_excluded_client() -> None:
    run = start("c0", "c1", aggregation=FEDAVG, dispatch={"max_client_failures": 1})
    run.post("c0", 2.0)
    run.end("c1", "failed")
    run.tick()
    assert (run.federation.version, run.x) == (1, 2.0)


def test_short_cohort_waits_for_a_payload_in_flight() -> None:
    run = start("c0", "c1", "c2", aggregation={"strategy": "fedavg", "cohort_size": 3})
    run.post("c0", 2.0)
    run.holds_loads = True
    run.post("c1", 4.0)
    run.leave("c2")
    run.tick()
    assert run.federation.version == 0
    run.load_next()
    run.tick()
    assert (run.federation.version, run.x) == (1, 3.0)


def test_round_without_updates_makes_no_version() -> None:
    run = start("c0", "c1", aggregation=FEDAVG)
    run.leave("c0")
    run.leave("c1")
    run.tick(100)
    assert run.federation.version == 0


def test_client_that_joins_late_takes_part_in_the_next_round() -> None:
    run = start(
        "c0", "c1", clients={"count": 3, "min_available": 2}, aggregation={"strategy": "fedavg", "cohort_size": 3}
    )
    run.post("c0", 1.0)
    run.join("c2")
    assert run.has_job("c2")  # the cohort of three had two members
    run.post("c1", 1.0)
    run.post("c2", 1.0)
    assert sorted(run.jobs.values()) == ["c0", "c1", "c2"]


# A successor

SETTINGS: dict[str, dict[str, Any]] = {
    "fedasync": {"aggregation": FEDASYNC},
    "fedbuff": {"aggregation": {"strategy": "fedbuff", "buffer_size": 3}},
    "adam": {"aggregation": {"strategy": "fedbuff", "buffer_size": 3}, "server_optimizer": {"name": "adam"}},
    "fedavg": {"aggregation": {"strategy": "fedavg", "cohort_size": 3}},
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_successor_reaches_the_bits_of_the_uninterrupted_run(settings: str) -> None:
    models = []
    for dies in (False, True):
        run = start("c0", "c1", "c2", **SETTINGS[settings])
        for i, delta in enumerate(np.random.default_rng(2).normal(size=(14, 2))):
            before = run.federation
            if dies:
                run.restart()
                assert run.federation.version == before.version
                assert run.federation.buffered == before.buffered
                assert same_bits(run.federation.model, before.model)
                assert run.federation.optimizer_state == before.optimizer_state
                assert run.federation.run_counters == before.run_counters
            client = next(c for c in ("c0", "c1", "c2") if run.has_job(c))
            run.post(client, make_frame(delta, variance=i + 1.0, steps=i), base=max(0, run.federation.version - i % 2))
        models.append(run.federation.model)
    assert same_bits(*models)


def test_successor_gives_no_second_job_to_a_client_that_has_one() -> None:
    """The client's earlier update is in the buffer. One of its two jobs without a ledger record is still open."""
    run = start("c0", aggregation=FEDBUFF)
    run.post("c0", 1.0)
    assert len(run.jobs) == 2
    run.restart()
    assert len(run.jobs) == 2
    assert Counter(run.federation.open_jobs.values()) == {"c0": 1}


def test_successor_closes_no_round_before_clients_reconnect() -> None:
    """A client may still get the slot of a job whose lease expired just before the crash."""
    run = start("c0", "c1", "c2", aggregation=FEDAVG)
    first, second = run.jobs.values()
    (third,) = {"c0", "c1", "c2"} - {first, second}
    run.post(first, 2.0)
    run.dies_before = 0
    with pytest.raises(Died):
        run.lapse(second)
    run.restart()
    run.tick()
    assert run.federation.version == 0
    (again,) = {second, third} & {c for c in run.alive if run.has_job(c)}
    run.post(again, 4.0)
    assert run.x == 3.0


def test_successor_continues_the_job_and_update_counts() -> None:
    run = start("c0", "c1")
    run.post("c0", 1.0)
    run.post("c1", 1.0)
    run.restart()
    run.post("c0", 1.0)
    assert run.federation.run_counters.updates == 3
    assert of_kind(run.actions, Dispatch)[-1].number == 5
    assert run.federation.job_number == 5


def test_successor_does_not_wait_for_min_clients_again() -> None:
    run = start("c0", "c1", "c2", aggregation={"strategy": "fedavg", "cohort_size": 3})
    run.leave("c0")
    run.leave("c1")
    run.restart()
    run.post("c2", 1.0)
    run.tick()
    assert run.federation.version == 1
    assert run.has_job("c2")


def test_unwritten_commit_is_repeated_by_the_successor() -> None:
    run = start("c0", "c1", aggregation=FEDBUFF)
    run.post("c0", 2.0)
    run.dies_before = 2  # the crash follows a dispatch and a load, and precedes the commit
    with pytest.raises(Died):
        run.post("c1", 4.0)
    assert (run.federation.version, max(run.versions)) == (1, 0)
    run.restart()
    assert (run.federation.version, max(run.versions), run.x) == (1, 1, 3.0)
    assert len(run.merged) == 2


def test_update_of_another_shape_does_not_stop_the_run() -> None:
    run = start("c0", "c1")
    run.post("c0", 1.0, body=make_header(nbytes=MANIFEST.nbytes + 8))
    run.post("c1", 1.0)
    assert (run.rejections, run.federation.version) == (["wrong_size"], 1)


# Events reported by the service


def test_job_stays_open_when_another_worker_takes_the_client() -> None:
    run = start("c0", "c1")
    job = run.job_of("c0")
    assert run.tell(ClientLeft("c0", served=True)) == []
    assert run.federation.open_jobs[job] == "c0"
    assert "c0" not in run.federation.clients


def test_expired_lease_of_an_unknown_job_changes_nothing() -> None:
    run = start("c0")
    assert run.tell(LeaseExpired("run-00000099", LapseCause.PROCESS_DIED)) == []
    assert run.has_job("c0")


def test_close_after_an_expired_lease_is_conditional() -> None:
    run = start("c0", "c1")
    job = run.job_of("c0")
    (close,) = run.federation.handle(LeaseExpired(job, LapseCause.PROCESS_DIED), run.now)
    assert isinstance(close, Close)
    assert (close.job, close.only_if, close.record["reason"]) == (job, CloseCondition.LAPSED, "lapsed")
    assert run.federation.open_jobs[job] == "c0", "the store has not closed it yet"
    assert run.federation.abandoned["lapsed"] == 0


@pytest.mark.parametrize("stopped", [False, True])
def test_invalid_entry_is_acknowledged_with_its_reason(stopped: bool) -> None:
    run = start("c0")
    if stopped:
        run.stop()
    entry = StreamEntry("9-0@c0", "joined", b"\xc1", "c0")
    run.tell(InvalidEntry(entry, RejectionReason.FORGED, "no signature"))
    record = run.ledger[-1]
    assert run.actions.count(Acknowledge("9-0@c0", record)) == 1
    assert (record["reason"], record["client"]) == ("forged", "c0")


@pytest.mark.parametrize(("strategy", "at_once"), [("fedavg", True), ("fedasync", False)])
def test_only_a_synchronous_version_is_published_immediately(strategy: str, at_once: bool) -> None:
    run = start("c0", aggregation={"strategy": strategy, **({"cohort_size": 1} if at_once else {})})
    run.post("c0", 1.0)
    (commit,) = of_kind(run.actions, Commit)
    assert commit.publish_now == at_once


# Lapses


def test_client_whose_training_hangs_each_time_is_set_aside() -> None:
    run = start("c0", "c1", dispatch={"max_client_failures": 2, "backoff_seconds": 1.0})
    run.lapse("c0", LapseCause.NO_PROGRESS)
    assert not run.has_job("c0"), "it rests"
    run.tick(1.0)
    run.lapse("c0", LapseCause.NO_PROGRESS)
    run.tick(1000.0)
    assert not run.has_job("c0")
    assert run.has_job("c1")


@pytest.mark.parametrize("cause", [LapseCause.PROCESS_DIED, LapseCause.SLOW_TRANSFER, LapseCause.NOT_BEGUN])
def test_lapse_for_another_cause_is_no_failure_of_the_client(cause: LapseCause) -> None:
    run = start("c0", dispatch={"max_client_failures": 1})
    run.lapse("c0", cause)
    assert run.has_job("c0")


def test_lapse_is_recorded_with_its_cause() -> None:
    run = start("c0")
    job = run.job_of("c0")
    run.tell(LeaseExpired(job, LapseCause.SLOW_TRANSFER, "slow_transfer: no byte moved"))
    (record,) = (r for r in run.ledger if r["kind"] == "abandoned")
    assert (record["reason"], record["error"]) == ("lapsed", "slow_transfer: no byte moved")
    (failure,) = run.federation.failures.kinds.values()
    assert failure.line == "c0: job lapsed: slow_transfer: no byte moved"

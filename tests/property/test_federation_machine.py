"""Invariants of a federation under random joins, leaves, updates, faults and crashes.

`Run`, which carries out the actions, also checks that versions rise by one, that a job begins once and ends once, and
that an evaluation measures the version in its label.
"""

from __future__ import annotations

import math
from collections import Counter
from functools import partial
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fedqueue_coordinator.core.events import (
    Acknowledge,
    Commit,
    Dispatch,
    Evaluate,
    Evaluated,
    JobEnded,
    Tick,
)
from fedqueue_coordinator.core.federation import Federation
from fedqueue_coordinator.core.reasons import AbandonReason
from fedqueue_coordinator.core.run_summary import summarize
from fedqueue_coordinator.core.selection import SELECTIONS
from tests.support import oracle
from tests.support.builders import EXAMPLES, MANIFEST, make_config, make_frame, make_header, of_kind, same_bits
from tests.support.federation_run import Died, Run, make_arrived

CLIENTS = ("c0", "c1", "c2", "c3")
MAX_STALENESS = 4

clients = st.sampled_from(CLIENTS)
updates = st.builds(
    make_frame,
    st.tuples(st.floats(-10, 10, width=32), st.floats(-10, 10, width=32)),
    st.floats(-10, 10, width=32),
    st.floats(2.0**-10, 16, width=32),
    st.integers(0, 100),
)
faults = st.sampled_from(
    [
        {"body": b"\xc1"},
        {"nbytes": MANIFEST.nbytes + 8},
        {"examples": 0},
        {"examples": EXAMPLES + 1},
        {"base": 10**6},
        {"update": make_frame(math.nan)},
        {"update": make_frame(variance=math.inf)},
        {"update": None},
    ]
)
aggregations = st.one_of(
    st.fixed_dictionaries({"strategy": st.just("fedasync"), "mixing": st.sampled_from(["model", "delta"])}),
    st.fixed_dictionaries(
        {
            "strategy": st.just("fedbuff"),
            "buffer_size": st.integers(1, 4),
            "barrier": st.booleans(),
            "normalize": st.sampled_from(["count", "weights"]),
            "weight_by_examples": st.booleans(),
        }
    ),
    st.fixed_dictionaries({"strategy": st.just("fedavg"), "cohort_size": st.integers(1, 4)}),
    st.fixed_dictionaries({"strategy": st.just("fadas"), "buffer_size": st.integers(1, 3), "barrier": st.booleans()}),
    st.fixed_dictionaries({"strategy": st.just("ca2fl"), "buffer_size": st.integers(1, 3), "barrier": st.booleans()}),
    st.fixed_dictionaries(
        {
            "strategy": st.just("fedbuff"),
            "buffer_size": st.just(3),
            "robust": st.sampled_from([{"rule": "median"}, {"rule": "trimmed_mean"}]),
        }
    ),
)
choices = st.fixed_dictionaries(
    {
        "selection": st.sampled_from(sorted(SELECTIONS)),
        "max_share": st.sampled_from(["off", 0.5]),
        "over_selection": st.sampled_from([1.0, 1.5]),
        "round_deadline_seconds": st.sampled_from(["off", 2.0]),
    }
)
servers = st.sampled_from([{}, {"name": "adam", "learning_rate": 0.1}, {"optimizer_options": {"momentum": 0.5}}])


class FederationMachine(RuleBasedStateMachine):
    @initialize(
        aggregation=aggregations,
        function=st.sampled_from(sorted(oracle.STALENESS)),
        server=servers,
        concurrency=st.integers(1, 5) | st.just("auto"),
        seed=st.integers(0, 9),
        choice=choices,
        first=clients,
    )
    def begin(
        self, aggregation: Any, function: Any, server: Any, concurrency: Any, seed: Any, choice: Any, first: Any
    ) -> None:
        self.config = make_config(
            aggregation={
                **aggregation,
                "alpha": 0.5,
                "max_staleness": MAX_STALENESS,
                "staleness": {"function": function, "b": 1.0},
            },
            clients={"count": len(CLIENTS)},
            dispatch={"concurrency": concurrency, "max_client_failures": 3, "share_window": 3, **choice},
            evaluation={"every_versions": 2, "every_seconds": 5.0},
            # A difference of two rounded sums may be tiny here and 0 in the oracle; Adam makes a full step of it.
            server_optimizer={} if aggregation["strategy"] in ("ca2fl", "fadas") or "robust" in aggregation else server,
            seed=seed,
        )
        self.run = Run(self.config, make_frame(1.0), evaluates=True)
        self.bases: dict[str, int] = {}  # job → version that the job's worker has fetched
        self.troubled: set[str] = set()  # clients that may be in backoff
        self.evaluating = 0
        self.seen = 0  # number of actions
        self.run.join(first)

    # Rules

    @rule(client=clients)
    def join(self, client: Any) -> None:
        self.run.join(client)

    @precondition(lambda self: self.run.alive)
    @rule(data=st.data())
    def leave(self, data: Any) -> None:
        self.run.leave(data.draw(st.sampled_from(sorted(self.run.alive))))

    @property
    def training(self) -> Any:
        """Clients with a job without a posted update."""
        return sorted({of for job, of in self.run.jobs.items() if job not in self.run.posted})

    @precondition(lambda self: self.training)
    @rule(data=st.data())
    def fetch(self, data: Any) -> None:
        self.bases[self.run.job_of(data.draw(st.sampled_from(self.training)))] = self.run.federation.version

    @precondition(lambda self: self.training)
    @rule(data=st.data(), update=updates, examples=st.integers(1, EXAMPLES))
    def post(self, data: Any, update: Any, examples: Any) -> None:
        client = data.draw(st.sampled_from(self.training))
        base = self.bases.get(self.run.job_of(client))
        self.run.post(client, update, base=base, examples=examples)

    @precondition(lambda self: self.training)
    @rule(data=st.data(), fault=faults)
    def post_what_is_not_admitted(self, data: Any, fault: Any) -> None:
        client = data.draw(st.sampled_from(self.training))
        self.troubled.add(client)
        before, merged = self.run.federation.model.copy(), len(self.run.merged)
        self.run.post(client, **{"update": make_frame(1.0), **fault})
        assert len(self.run.merged) == merged
        assert same_bits(self.run.federation.model, before)

    @precondition(lambda self: self.run.alive)
    @rule(data=st.data())
    def vanish(self, data: Any) -> None:
        """Expire the client's lease; the client's job, if any, may still be posted, or its lease may expire later."""
        self.run.vanish(data.draw(st.sampled_from(sorted(self.run.alive))))

    @precondition(lambda self: self.training)
    @rule(
        data=st.data(),
        update=updates,
        how=st.sampled_from(["leave", "vanish", "stay"]),
        returns=st.booleans(),
        later=st.sampled_from([0.0, 10.0]),
    )
    def go_before_the_update_is_read(self, data: Any, update: Any, how: Any, returns: Any, later: Any) -> None:
        """Post an update and let the client leave, vanish or stay; when the update is read, the round may be over."""
        client = data.draw(st.sampled_from(self.training))
        self.run.post(client, update, base=self.bases.get(self.run.job_of(client)), unread=True)
        if how == "leave":
            self.run.leave(client)
        elif how == "vanish":
            self.run.vanish(client)
        if returns or how == "stay":
            self.run.join(client)
        if later:
            self.run.tick(later)
        self.run.read()

    @rule(number=st.integers(1, 40), client=clients)
    def forge(self, number: Any, client: Any) -> None:
        """Post an update of a job that is not open, or belongs to another client."""
        job = f"run-{number:08d}"
        if self.run.federation.open_jobs.get(job) != client:
            answer = self.run.tell(make_arrived("forged", job, client, 0, make_header()))
            assert any(isinstance(action, Acknowledge) for action in answer)

    @precondition(lambda self: self.training)
    @rule(data=st.data())
    def lapse(self, data: Any) -> None:
        self.run.lapse(data.draw(st.sampled_from(self.training)))

    @precondition(lambda self: self.training)
    @rule(data=st.data(), reason=st.sampled_from(["returned", "failed"]))
    def end(self, data: Any, reason: Any) -> None:
        client = data.draw(st.sampled_from(self.training))
        if reason == "failed":
            self.troubled.add(client)
        self.run.end(client, reason)

    @precondition(lambda self: self.run.endings)
    @rule(data=st.data())
    def end_again(self, data: Any) -> None:
        job = data.draw(st.sampled_from(sorted(self.run.endings)))
        client = next(d.client for d in of_kind(self.run.actions, Dispatch) if d.job == job)
        assert Acknowledge("late", None) in self.run.tell(JobEnded("late", job, client, AbandonReason.FAILED, "late"))

    @precondition(lambda self: self.evaluating)
    @rule(loss=st.floats(0, 10))
    def evaluated(self, loss: Any) -> None:
        version = of_kind(self.run.actions, Evaluate)[-1].version
        self.evaluating -= 1
        self.run.tell(Evaluated(version, {"loss": loss}))

    @rule(seconds=st.floats(0.1, 3.0))
    def tick(self, seconds: Any) -> None:
        self.run.tick(seconds)

    # Crashes

    @precondition(lambda self: not self.run.federation.stopped)
    @rule()
    def restart(self) -> None:
        old, last_jobs = self.run.federation, dict(self.run.last_jobs)
        self._restart()
        new = self.run.federation
        if not new.version:  # the start of the training is stored with the first version
            old.run_counters.started = new.run_counters.started
        assert (new.version, new.buffered, new.run_counters) == (old.version, old.buffered, old.run_counters)
        assert same_bits(new.model, old.model)
        assert new.optimizer_state == old.optimizer_state
        if self.run.last_jobs == last_jobs:  # else it already gave a job to a client that rested in its predecessor
            self._places_are_the_same(old, new)

    def _places_are_the_same(self, old: Federation, new: Federation) -> None:
        """Check that the resumed federation would choose the same clients as its predecessor, whichever are idle."""
        for client in CLIENTS:
            places = [federation._scheduler._place_of(client) for federation in (old, new)]
            assert places[0] == places[1]

    @precondition(lambda self: not self.run.federation.stopped and self.training)
    @rule(
        data=st.data(), update=updates, after=st.integers(0, 5), how=st.sampled_from(["post", "leave", "end", "lapse"])
    )
    def die_between_two_actions(self, data: Any, update: Any, after: Any, how: Any) -> None:
        client = data.draw(st.sampled_from(self.training))
        self.run.dies_before = after
        try:
            match how:
                case "post":
                    self.run.post(client, update)
                case "leave":
                    self.run.leave(client)
                case "end":
                    self.run.end(client, "returned")
                case "lapse":
                    self.run.lapse(client)
        except Died:
            pass
        if not self.run.federation.stopped:
            self._restart()
        self.run.dies_before = None

    def _restart(self) -> None:
        self.evaluating = 0
        self.seen = len(self.run.actions)
        self.run.restart()

    # Invariants

    @invariant()
    def one_evaluation_is_in_flight_at_most(self) -> None:
        self.evaluating += len(of_kind(self.run.actions[self.seen :], Evaluate))
        self.seen = len(self.run.actions)
        assert self.evaluating <= 1

    @invariant()
    def open_jobs_are_within_concurrency_and_one_for_each_client(self) -> None:
        open_jobs = self.run.federation.open_jobs
        assert len(open_jobs) <= self.config.concurrency + len(self.run.stayed)
        assert max(Counter(open_jobs.values()).values(), default=0) <= 1

    @invariant()
    def store_and_federation_agree(self) -> None:
        federation = self.run.federation
        if federation.stopped:
            assert not self.run.jobs
        else:
            assert federation.unfinished == self.run.jobs
            assert set(federation.clients) == set(self.run.alive)
            assert federation.buffered == len(self.run.unacknowledged) < self.config.buffer_size
        assert federation.run_counters.updates == len(self.run.merged)
        assert federation.version == max(self.run.versions)

    @invariant()
    def no_slot_leaks(self) -> None:
        """Check that every live client trains, unless a backoff, the share cap or the concurrency prevents it."""
        federation = self.run.federation
        waiting = set(self.run.alive) - set(federation.open_jobs.values()) - self.troubled
        started = len(self.run.alive) >= self.config.minimum_clients
        if self.config.barrier or federation.stopped or not started:
            return
        if self.config.dispatch.max_share is not None:
            assert not waiting or federation.open_jobs
            return
        assert not waiting or len(federation.open_jobs) == self.config.concurrency

    @invariant()
    def rounds_do_not_overlap(self) -> None:
        if not self.config.barrier:
            return
        federation = self.run.federation
        assert len(federation.open_jobs) + federation.buffered <= self.config.concurrency + len(self.run.stayed)
        for record in self.run.ledger:
            if record["kind"] == "version":
                assert len({line["client"] for line in record["merged"]}) == len(record["merged"])
                assert all(line["staleness"] == 0 for line in record["merged"])

    @invariant()
    def staleness_is_within_the_limit(self) -> None:
        assert all(0 <= line["staleness"] <= MAX_STALENESS for line in self.run.merged)

    @invariant()
    def model_is_finite_and_its_variance_positive(self) -> None:
        model = self.run.federation.model
        assert np.isfinite(model.floats.numpy()).all()
        assert model.buffers[1] > 0

    # The end

    def teardown(self) -> None:
        if not hasattr(self, "run"):
            return
        self._same_events_give_the_same_answers()
        if not self.run.federation.stopped:
            self.run.stop()
        self._every_job_has_ended_once()
        self._same_arrivals_give_the_same_bits()
        self._versions_agree_with_the_oracle()

    def _same_events_give_the_same_answers(self) -> None:
        twin = self.run.restored_twin()
        for event, now, answer in self.run.handled:
            assert twin.handle(event, now) == answer
        assert same_bits(twin.model, self.run.federation.model)

    def _every_job_has_ended_once(self) -> None:
        run = self.run
        dispatched = {action.job for action in of_kind(run.actions, Dispatch)}
        assert run.endings.keys() == dispatched  # `Run` checks that no job ended twice
        assert not run.jobs
        assert not run.unacknowledged
        merged = [line["job"] for line in run.merged]
        assert len(set(merged)) == len(merged)
        summary = summarize("run", "", 0, "", run.ledger, {})
        unknown = summary["updates_rejected"].pop("unknown_job", 0)
        assert unknown == run.rejections.count("unknown_job")
        assert summary["versions"] == run.federation.version
        assert summary["updates_merged"] + sum(summary["updates_rejected"].values()) + summary["jobs_abandoned"] == len(
            dispatched
        )

    def _same_arrivals_give_the_same_bits(self) -> None:
        """Check that a federation that receives only the merged updates, in order, makes the same versions."""
        twin = Run(self.config, make_frame(1.0))
        commits = {c.version: c for c in of_kind(self.run.actions, Commit)}
        twin.payloads = self.run.payloads
        for version in range(1, self.run.federation.version + 1):
            merged = commits[version].merged
            jobs = {arrived.job: arrived.client for arrived in merged}
            twin.jobs.update(jobs)
            twin.federation.restore_jobs(jobs, dict.fromkeys(CLIENTS, EXAMPLES))
            for arrived in merged:
                twin.unacknowledged[arrived.entry.id] = arrived
                twin.tell(arrived)
            if twin.federation.version < version:  # the cohort closed with fewer updates
                twin.tell(Tick())
            assert same_bits(twin.versions[version], self.run.versions[version])

    def _versions_agree_with_the_oracle(self) -> None:
        """Check each version against the oracle's step from the last one; momentum and Adam need the whole history."""
        aggregation, server = self.config.aggregation, self.config.server_optimizer
        rule_ = (
            oracle.Adam(0.1)
            if server.name == "adam"
            else oracle.SGD(1.0, server.optimizer_options.get("momentum", 0.0))
        )
        b = {"b": 1.0} if aggregation.staleness.function == "hinge" else {}
        s = partial(oracle.STALENESS[aggregation.staleness.function], **b)
        fadas = oracle.FADAS(0.01, (0.9, 0.99), 1e-8, 10)
        ca2fl = oracle.CA2FL({client: np.zeros(2) for client in CLIENTS})
        centres = {"median": partial(np.median, axis=0), "trimmed_mean": partial(oracle.trimmed_mean, f=1)}
        xs = {v: frame.parameters.numpy().astype(np.float64) for v, frame in self.run.versions.items()}
        for record in (r for r in self.run.ledger if r["kind"] == "version"):
            version, lines = record["version"], record["merged"]
            deltas = [self.run.payloads[line["job"]].parameters.numpy().astype(np.float64) for line in lines]
            x = xs[version - 1]
            match aggregation.strategy:
                case "fedasync":
                    (line,), (delta,) = lines, deltas
                    base = xs[line["base"]]
                    step = oracle.fedasync(x, base, delta, 0.5, s(version - 1 - line["base"]), aggregation.mixing) - x
                case "fadas":
                    step = fadas.step(x, deltas, [version - 1 - line["base"] for line in lines]) - x
                case "ca2fl":
                    clients_ = [line["client"] for line in lines]
                    step = ca2fl.step(x, list(zip(clients_, deltas, strict=True))) - x
                case "fedbuff" if aggregation.robust.rule != "mean":
                    rows = [s(version - 1 - line["base"]) * d for line, d in zip(lines, deltas, strict=True)]
                    step = centres[aggregation.robust.rule](np.array(rows))
                case "fedbuff":
                    arrived = [
                        oracle.Arrived(delta, version - 1 - line["base"], line["examples"])
                        for delta, line in zip(deltas, lines, strict=True)
                    ]
                    step = oracle.fedbuff(arrived, s, aggregation.normalize, aggregation.weight_by_examples)
                case "fedavg":
                    step = oracle.fedavg([x + d for d in deltas], [line["examples"] for line in lines]) - x
            np.testing.assert_allclose(xs[version], rule_.step(x, step), rtol=1e-4, atol=1e-3)


TestFederation = FederationMachine.TestCase
TestFederation.settings = settings(stateful_step_count=30)


def test_replayed_twin_of_the_machine_starts_equal() -> None:
    """A replay of arrivals detects a different order, because the bits of a mean depend on the order."""
    models = []
    for order in ((0, 1, 2), (2, 1, 0)):
        run = Run(make_config(aggregation={"strategy": "fedbuff", "buffer_size": 3}), make_frame())
        run.join("c0", "c1", "c2")
        for i in order:
            run.post(f"c{i}", (0.1, 1e8, -1e8)[i])
        models.append(run.federation.model)
    assert not same_bits(*models)

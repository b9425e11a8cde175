"""Invariants of a federation with keepers under random arrivals, answers, refusals, leases and crashes.

The keepers remember what they released, as real ones do, and answer in any order. `Run` also checks that versions rise
by one, and that a job begins once and ends once. At the end every client and keeper takes part again: then a version
must come.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fedqueue.secure.ring import level
from fedqueue_coordinator.core.reasons import RejectionReason
from tests.support.masked_federation import KEEPERS, MaskedRun, start_masked

CLIENTS = ("c0", "c1", "c2", "c3")
MAX_STALENESS = 4
clients = st.sampled_from(CLIENTS)
keepers = st.sampled_from(KEEPERS)


class MaskedMachine(RuleBasedStateMachine):
    @initialize(
        size=st.integers(2, 4),
        least=st.integers(2, 3),
        levels=st.sampled_from([1, 3, 8]),
        steep=st.sampled_from([0.5, 1.0, 3.0]),
        barrier=st.booleans(),
        concurrency=st.sampled_from(["auto", 1, 2]),
    )
    def begin(self, size: int, least: int, levels: int, steep: float, barrier: bool, concurrency: Any) -> None:
        self.least, self.levels = min(size, least), levels
        self.run: MaskedRun = start_masked(
            *CLIENTS, buffer_size=size, min_cohort=self.least, secure={"weight_levels": levels},
            aggregation={
                "staleness": {"function": "polynomial", "a": steep}, "max_staleness": MAX_STALENESS,
                "barrier": barrier,
            },
            dispatch={"concurrency": concurrency}, admission={"max_rejections": 1000},
        )  # fmt: skip
        self.run.silent = set(KEEPERS)
        self.spent: dict[str, dict[str, int]] = {keeper: {} for keeper in KEEPERS}  # offer → number of its cohort
        self.released: dict[str, list[Any]] = {keeper: [] for keeper in KEEPERS}
        self.deltas: dict[str, float] = {}

    # Clients

    @property
    def training(self) -> list[str]:
        return sorted({of for job, of in self.run.jobs.items() if job not in self.run.posted})

    @precondition(lambda self: self.training)
    @rule(data=st.data(), delta=st.floats(-2, 2, width=32), age=st.integers(0, 3), count=st.integers(1, 4))
    def post(self, data: Any, delta: float, age: int, count: int) -> None:
        for _ in range(count):
            if self.training:
                self._post(data.draw(st.sampled_from(self.training)), delta, age)

    def _post(self, client: str, delta: float, age: int = 0) -> None:
        version = self.run.federation.version
        base = version if self.run.config.barrier else max(0, version - age)
        self.deltas[self.run.job_of(client)] = delta
        self.run.post_masked(client, delta, base=base)

    @rule(kind=st.sampled_from(["join", "join", "leave", "lapse", "lost payload", "lost key"]), data=st.data())
    def trouble(self, kind: str, data: Any) -> None:
        match kind:
            case "join":
                self.run.join(data.draw(clients))
            case "leave" if self.run.alive:
                self.run.vanish(data.draw(st.sampled_from(sorted(self.run.alive))))
            case "lapse" if self.training:
                self.run.lapse(data.draw(st.sampled_from(self.training)))
            case "lost payload" if self.run.masked:
                del self.run.masked[data.draw(st.sampled_from(sorted(self.run.masked)))]
            case "lost key" if self.run.offers:
                offer = data.draw(st.sampled_from(self.run.offers))
                self.run.opens(data.draw(keepers), offer, "keeper_lost")

    @rule(data=st.data(), ages=st.lists(st.integers(0, 3), min_size=1, max_size=8), release=st.integers(0, 2))
    def train(self, data: Any, ages: list[int], release: int) -> None:
        """Clients post, and keepers open what they are offered; `release` of them release the cohort, too."""
        for age in ages:
            if self.training:
                self._post(data.draw(st.sampled_from(self.training)), data.draw(st.sampled_from([-1.0, 0.5, 2.0])), age)
        for _ in range(4):
            while self.run.pending:
                self._open(*self.run.pending.pop(0))
            for keeper in KEEPERS[:release]:
                if self.run.cohort:
                    self.answer_cohort(keeper)

    # Keepers

    @precondition(lambda self: self.run.pending)
    @rule(data=st.data(), broken=st.integers(0, 9), count=st.integers(1, 9))
    def answer_offers(self, data: Any, broken: int, count: int) -> None:
        for _ in range(count):
            if self.run.pending:
                keeper, offer = self.run.pending.pop(data.draw(st.integers(0, len(self.run.pending) - 1)))
                self._open(keeper, offer, broken == count)

    def _open(self, keeper: str, offer: str, broken: bool = False) -> None:
        spent = offer in self.spent[keeper]
        self.run.opens(keeper, offer, "spent" if spent else "unmaskable" if broken else "")

    @precondition(lambda self: self.run.cohort)
    @rule(keeper=keepers)
    def answer_cohort(self, keeper: str) -> None:
        cohort = self.run.cohort
        assert cohort
        members = tuple(offer for offer, _ in cohort.members)
        if cohort not in self.released[keeper]:
            if again := [offer for offer in members if offer in self.spent[keeper]]:
                self.run.refuses(keeper, "spent", again)
                return
            self.released[keeper].append(cohort)
            self.spent[keeper].update(dict.fromkeys(members, len(self.released[keeper])))
        self.run.releases(keeper)

    # The coordinator

    @rule(seconds=st.sampled_from([0.0, 0.5, 5.0]))
    def tick(self, seconds: float) -> None:
        self.run.tick(seconds)

    @rule()
    def crash(self) -> None:
        self.run.pending = []
        self.run.restart()

    # What always holds

    @invariant()
    def versions_are_sums_of_crowds(self) -> None:
        for record in self._versions:
            weights: Counter[str] = Counter()
            for line in record["merged"]:
                weights[line["client"]] += line["level"]
                assert 1 <= line["level"] <= level(record["version"] - 1 - line["base"], self.run.config)
            assert len(weights) >= self.least
            assert max(weights.values()) <= self.levels
            assert max(weights.values()) * self.least <= weights.total()

    @invariant()
    def no_update_is_in_two_versions(self) -> None:
        offers = Counter(line["offer"] for record in self._versions for line in record["merged"])
        assert not offers or max(offers.values()) == 1

    @invariant()
    def model_is_the_sum_of_its_versions(self) -> None:
        x = 0.0
        for record in self._versions:
            total = sum(line["level"] / self.levels * self.deltas[line["job"]] for line in record["merged"])
            x += total / len(record["merged"])
        np.testing.assert_allclose(self.run.x, x, atol=1e-3)

    @invariant()
    def a_norm_is_never_too_long(self) -> None:
        assert RejectionReason.COHORT_NORM not in self.run.rejections

    @property
    def _versions(self) -> list[dict[str, Any]]:
        return [record for record in self.run.ledger if record["kind"] == "version"]

    def teardown(self) -> None:
        """With every client and keeper there, a version comes."""
        if not hasattr(self, "run"):
            return
        self.crash()
        before = self.run.federation.version
        for client in CLIENTS:
            if client not in self.run.alive:
                self.run.join(client)
        for _ in range(40):
            self._settle()
            for client in self.training:
                self._post(client, 0.5)
                self._settle()
            self.run.tick(100.0)
            if self.run.federation.version > before:
                return
        raise AssertionError(self.run.federation.waiting_for(self.run.now))

    def _settle(self) -> None:
        """Let the keepers answer all that they are asked."""
        for _ in range(100):
            if self.run.pending:
                self._open(*self.run.pending.pop(0))
            elif self.run.federation.awaits_keepers:
                for keeper in KEEPERS:
                    self.answer_cohort(keeper)
            else:
                break


TestMaskedMachine = MaskedMachine.TestCase
TestMaskedMachine.settings = settings(stateful_step_count=30)

"""Clients, a coordinator that proposes anything, and keepers: what is released stays within the rules.

The oracle does not know how a keeper decides. It computes with Python's integers, and searches what was released for a
combination that isolates fewer clients than a crowd has.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule, run_state_machine_as_test

from fedqueue.errors import SignatureError
from fedqueue.protocol.messages import MaskRefused
from fedqueue.secure import keeper as keeper_module
from fedqueue.secure.keeper import Keeper, MemoryLog
from fedqueue.secure.masks import new_seed
from tests.support.isolation import isolated
from tests.support.masked_run import MaskedRun, Posted, words

CLIENTS = "abcde"
KEEPERS = ("k0", "k1")
LEAST = 2
MODELS = ("0" * 64, "1" * 64)


class Keepers(RuleBasedStateMachine):
    """The coordinator and Redis are the adversary: they choose every event below but the clients' updates."""

    posted: Bundle[int] = Bundle("posted")

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.run = MaskedRun(
            Path(self.folder.name), CLIENTS, KEEPERS, parameters=3, buffer_size=5, min_cohort=LEAST, weight_levels=4
        )
        self.updates: list[Posted] = []
        self.values: list[int] = []
        self.models: list[str] = []
        self.masks: dict[str, dict[str, bytes]] = {name: {} for name in KEEPERS}
        """Keeper → cohort → the released mask."""
        self.members: dict[str, dict[int, int]] = {}
        """Cohort → its updates with their weights."""
        self.versions: dict[str, list[int]] = {name: [] for name in KEEPERS}
        self.newest = dict.fromkeys(KEEPERS, 0)

    def teardown(self) -> None:
        self.folder.cleanup()

    @rule(
        target=posted,
        client=st.sampled_from(CLIENTS),
        base=st.integers(0, 4),
        value=st.integers(-1000, 1000),
        model=st.sampled_from([0, 0, 0, 1]),
    )
    def post(self, client: str, base: int, value: int, model: int) -> int:
        self.updates.append(self.run.post(client, base, value, model=MODELS[model]))
        self.values.append(value)
        self.models.append(MODELS[model])
        return len(self.updates) - 1

    @rule(target=posted, base=st.integers(0, 4))
    def post_from_all(self, base: int) -> Any:
        return multiple(*(self.post(client, base, 7, 0) for client in CLIENTS))

    @rule(name=st.sampled_from(KEEPERS), which=st.lists(posted, min_size=1, max_size=6))
    def offer(self, name: str, which: list[int]) -> None:
        for i in which:
            self.run.running[name].offer(self.updates[i].offer)

    @rule(
        names=st.sampled_from([("k0",), ("k1",), KEEPERS]),
        which=st.lists(posted, min_size=1, max_size=6),
        later=st.integers(-1, 2),
        lie=st.sampled_from([0] * 8 + [1, -1]),
        offered=st.sampled_from([True, True, True, False]),
    )
    def propose(self, names: tuple[str, ...], which: list[int], later: int, lie: int, offered: bool) -> None:
        """Propose any updates, in any order, with true or invented weights, to one keeper or to both."""
        version = max(0, max(self.updates[i].offer.base for i in which) + later)
        chosen = [self.updates[i] for i in which]
        weights = [max(1, _level(version - update.offer.base)) for update in chosen]
        weights[0] = max(1, weights[0] + lie)
        cohort = self.run.cohort(version, chosen, weights)
        signed, name_of_cohort = self.run.coordinator.sign_cohort(cohort), self.run.id(cohort)
        for name in names:
            keeper = self.run.running[name]
            if offered:
                self.offer(name, which)
            answer = keeper.release(signed)
            if isinstance(answer, MaskRefused):
                continue
            mask = words(answer).tobytes()
            known = self.masks[name].get(name_of_cohort)
            assert known in (None, mask), "the same cohort was answered with other bytes"
            if known is None:
                self.check_rules(name, which, weights, version)
                self.masks[name][name_of_cohort] = mask
                self.newest[name] = version
            self.members[name_of_cohort] = dict(zip(which, weights, strict=True))

    @rule(
        names=st.sampled_from([("k0",), ("k1",), KEEPERS]), which=st.lists(posted, min_size=2, max_size=5, unique=True)
    )
    def propose_a_crowd(self, names: tuple[str, ...], which: list[int]) -> None:
        """Propose one update of each client, as an honest coordinator does."""
        of_client = {self.updates[i].offer.client: i for i in which}
        self.propose(names, list(of_client.values()), 0, 0, True)

    @rule(data=st.data(), names=st.sampled_from([("k0",), ("k1",), KEEPERS]), later=st.integers(0, 1))
    def vary(self, data: st.DataObject, names: tuple[str, ...], later: int) -> None:
        """Propose a released cohort with one member less or more, in another order, or for another version."""
        if not self.members:
            return
        which = list(data.draw(st.sampled_from(list(self.members.values()))))
        match data.draw(st.sampled_from(["less", "more", "order", "same"])):
            case "less" if len(which) > 1:
                which.remove(data.draw(st.sampled_from(which)))
            case "more":
                which.append(data.draw(st.integers(0, len(self.updates) - 1)))
            case "order":
                which = which[1:] + which[:1]
        self.propose(names, which, later, 0, True)

    def check_rules(self, name: str, which: list[int], weights: list[int], version: int) -> None:
        """S5 and the other rules for a cohort that was released for the first time, written down a second time."""
        assert len(set(which)) == len(which)
        assert version >= self.newest[name], "the version went back"
        for i, weight in zip(which, weights, strict=True):
            staleness = version - self.updates[i].offer.base
            assert staleness >= 0
            assert weight <= _level(staleness), "the weight is larger than that of the staleness"
        of_client = dict.fromkeys(CLIENTS, 0)
        for i, weight in zip(which, weights, strict=True):
            of_client[self.updates[i].offer.client] += weight
        assert sum(load > 0 for load in of_client.values()) >= LEAST
        assert max(of_client.values()) <= 4
        assert LEAST * max(of_client.values()) <= sum(weights)
        assert sum(weights) <= 4 * 6

    @rule(name=st.sampled_from(KEEPERS))
    def restart(self, name: str) -> None:
        self.run.running[name] = self.run.start(name)

    @rule(name=st.sampled_from(KEEPERS))
    def forge(self, name: str) -> None:
        """Whoever has Redis, but not the coordinator's key, gets no answer."""
        if self.updates:
            cohort = self.run.cohort(9, self.updates)
            with pytest.raises(SignatureError):
                self.run.running[name].release(self.run.sites["a"].sign("cohort", "a", [], cohort.pack()))

    @invariant()
    def each_seed_is_released_once(self) -> None:
        for name in KEEPERS:
            spent = [i for cohort in self.masks[name] for i in self.members[cohort]]
            assert len(spent) == len(set(spent))

    @invariant()
    def one_base_has_one_model(self) -> None:
        for name in KEEPERS:
            seen: dict[int, set[str]] = {}
            for cohort in self.masks[name]:
                for i in self.members[cohort]:
                    seen.setdefault(self.updates[i].offer.base, set()).add(self.models[i])
            assert all(len(models) == 1 for models in seen.values())

    @invariant()
    def nothing_isolates_a_client(self) -> None:
        sums = [[self.members[cohort] for cohort in self.masks[name]] for name in KEEPERS]
        client_of = [update.offer.client for update in self.updates]
        if any(sums):
            assert isolated(sums[:1], client_of, LEAST) == ()
            assert isolated(sums[1:], client_of, LEAST) == ()
            assert isolated(sums, client_of, LEAST) == ()

    @invariant()
    def masks_of_both_leave_the_sum(self) -> None:
        for cohort in self.masks["k0"].keys() & self.masks["k1"].keys():
            exact, total = 0, 0
            for i, weight in self.members[cohort].items():
                exact += weight * self.values[i]
                total += weight * int(self.updates[i].payload[0])
            for name in KEEPERS:
                total -= int.from_bytes(self.masks[name][cohort][:4], "little")
            difference = (total - exact + 2**31) % 2**32 - 2**31
            assert abs(difference) <= 12, "more than two dithers of 12 values"


def _level(staleness: int) -> int:
    """W s(τ) = 4 / √(1 + τ), rounded."""
    return max(1, math.floor(4 / math.sqrt(1 + staleness) + 0.5)) if staleness >= 0 else 1


QUICK = settings(stateful_step_count=30, suppress_health_check=list(HealthCheck))
TestKeepers = Keepers.TestCase
TestKeepers.settings = QUICK


# The machine finds a keeper that breaks a rule


def _spends_twice(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(MemoryLog, "spent", lambda self, seeds: {})


def _ignores_crowds(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(keeper_module, "crowd_problem", lambda *anything: "")


def _mixes_models(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Keeper, "_of_another_model", lambda *anything: [])
    patch.setattr(MemoryLog, "model", lambda self, base: "")


def _draws_new_dithers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("fedqueue.secure.keeper.hmac.digest", lambda *anything: new_seed())


@pytest.mark.slow
@pytest.mark.parametrize("mutate", [_spends_twice, _ignores_crowds, _mixes_models, _draws_new_dithers])
def test_machine_finds_a_broken_keeper(
    mutate: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(
            Keepers,
            settings=settings(QUICK, max_examples=2000, database=None, phases=[Phase.generate], derandomize=True),
        )

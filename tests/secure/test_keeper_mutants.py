"""Each rule of a keeper stops an attack: with the rule the attack is refused, without it the attack succeeds.

The attacker has the coordinator's key, Redis, and every keeper but k0. A mask of k1 is no obstacle: it is recomputed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fedqueue.protocol.keeper_identity import KeeperIdentity
from fedqueue.protocol.key_files import SigningKey
from fedqueue.protocol.messages import MaskedUpdate, read
from fedqueue.protocol.signed_envelope import Scope, unverified_body
from fedqueue.secure import cohort, keeper
from fedqueue.secure.keeper import Keeper, MemoryLog, Release
from fedqueue.secure.masks import MaskStream
from fedqueue.secure.seed_envelope import seed_info
from tests.support.masked_run import MaskedRun, Posted, words

PARAMETERS = 64
SECRET = np.random.default_rng(0).integers(-(2**20), 2**20, PARAMETERS).astype(np.int32)
"""The update of the client a."""
Patch = Callable[[pytest.MonkeyPatch, MaskedRun], None]


class Attacker:
    """The coordinator, with all that Redis has and the keeper k1."""

    def __init__(self, run: MaskedRun) -> None:
        self.run = run
        self.honest = run.running["k0"]

    def offer(self, *posted: Posted) -> bool:
        return all(self.honest.offer(update.offer).refusal == "" for update in posted)

    def sum(self, version: int, posted: Sequence[Posted], weights: Sequence[int] = ()) -> npt.NDArray[Any] | None:
        """Σ w q, up to the honest keeper's dither; None where the honest keeper refuses."""
        weights = list(weights) or self.run.weights(version, posted)
        answer = self.honest.release(self.run.propose(version, posted, weights))
        if not isinstance(answer, Release):
            return None
        total = -words(answer)
        for update, weight in zip(posted, weights, strict=True):
            total += np.uint32(weight) * (update.payload - self.mask_of_k1(update))
        return total.view(np.int32)

    def mask_of_k1(self, update: Posted) -> npt.NDArray[np.uint32]:
        sealed = read(MaskedUpdate, unverified_body(update.offer.header)).seeds[1]
        held = self.run.running["k1"]._opened(update.offer)
        assert sealed.keeper == "k1"
        mask = np.empty(PARAMETERS, np.uint32)
        MaskStream(held.seed).next_into(mask)
        return mask


def is_secret(found: npt.NDArray[Any] | None, weight: int) -> bool:
    """Whether `found` is the weighted secret, up to four dithers."""
    return found is not None and bool(
        np.abs(found.astype(np.int64) - weight * SECRET.astype(np.int64)).max() <= 4 * 420
    )


def victim(run: MaskedRun, base: int = 0, **changed: Any) -> Posted:
    return run.post("a", base, SECRET, **changed)


def others(run: MaskedRun, clients: str = "bcde", base: int = 0) -> list[Posted]:
    """Updates of honest clients, which the attacker does not know."""
    random = np.random.default_rng(ord(clients[0]))
    return [run.post(c, base, random.integers(-(2**20), 2**20, PARAMETERS)) for c in clients]


# Attacks: each returns whether the victim's update was found


def one_more_and_one_less(attacker: Attacker) -> bool:
    run, posted = attacker.run, [victim(attacker.run), *others(attacker.run)]
    assert attacker.offer(*posted)
    larger, smaller = attacker.sum(0, posted), attacker.sum(0, posted[1:])
    return larger is not None and smaller is not None and is_secret(larger - smaller, run.weights(0, posted)[0])


def two_weightings(attacker: Attacker) -> bool:
    """A fresh and two stale updates, summed for two versions: their weights are 8, 5, 5 and 6, 4, 4 (W s(τ))."""
    run = attacker.run
    posted = [victim(run, base=1), *others(run, "bcde", base=0)]
    assert attacker.offer(*posted)
    sums = [attacker.sum(version, posted) for version in (1, 3)]
    weights = [run.weights(version, posted) for version in (1, 3)]
    if sums[0] is None or sums[1] is None:
        return False
    (a, b), (c, d) = weights[0][:2], weights[1][:2]
    assert a * d != b * c
    found = (d * sums[0].astype(np.int64) - b * sums[1].astype(np.int64)) / (a * d - b * c)
    return bool(np.abs(found - SECRET).max() <= 2 * 420 * (b + d) / abs(a * d - b * c))


def the_same_updates_under_other_names(attacker: Attacker) -> bool:
    """The envelopes of headers are encoded in another way, so that their offers have other digests."""
    run = attacker.run
    posted = [victim(run), *others(run)]
    again = [
        Posted(u.offer.model_copy(update={"header": b"\xde\x00\x04" + u.offer.header[1:]}), u.payload)
        for u in posted[1:]
    ]
    attacker.offer(*posted, *again)
    larger, smaller = attacker.sum(0, posted), attacker.sum(0, again)
    return larger is not None and smaller is not None and is_secret(larger - smaller, 8)


def a_crowd_of_one(attacker: Attacker) -> bool:
    update = victim(attacker.run)
    assert attacker.offer(update)
    return is_secret(attacker.sum(0, [update]), 8)


def a_crowd_that_weighs_nothing(attacker: Attacker) -> bool:
    """One fresh update and two so stale ones that they hardly count: a close estimate of the victim's."""
    run = attacker.run
    posted = [victim(run, base=40), *others(run, "bc", base=0)]
    assert attacker.offer(*posted)
    found = attacker.sum(40, posted)
    if found is None:
        return False
    correlation: float = np.corrcoef(found, SECRET)[0, 1]
    return correlation > 0.95


def claimed_weights(attacker: Attacker) -> bool:
    """A stale update is given the weight of a fresh one, more than the crowd would allow it beside updates as stale."""
    run = attacker.run
    posted = [victim(run), *others(run)]
    assert attacker.offer(*posted)
    assert run.weights(3, posted) == [4, 4, 4, 4, 4]
    return attacker.sum(3, posted, [8, 4, 4, 4, 4]) is not None


def invented_clients(attacker: Attacker) -> bool:
    """The coordinator makes up clients, whose updates it knows."""
    run = attacker.run
    update = victim(run)
    invented = []
    for name in ("x", "y", "z"):
        SigningKey.generate().save(run.folder / f"{name}.key")
        run.sites[name] = run._site(name)
        invented.append(run.post(name, vector=0))
    if not attacker.offer(update, *invented):
        return False
    return is_secret(attacker.sum(0, [update, *invented]), 8)


def a_model_that_teaches_nothing(attacker: Attacker) -> bool:
    """The others get another model for the same version, in which no gradient reaches the parameters."""
    run = attacker.run
    posted = [victim(run), *(run.post(client, vector=0, model="0" * 64) for client in "bcd")]
    return attacker.offer(*posted) and is_secret(attacker.sum(0, posted), 8)


def an_older_version(attacker: Attacker) -> bool:
    run = attacker.run
    first, second = others(run, "bcde"), [victim(run), *others(run, "bcd")]
    assert attacker.offer(*first, *second)
    assert attacker.sum(7, first) is not None
    return attacker.sum(0, second) is not None


def low_bits(attacker: Attacker) -> bool:
    """Modulo the common divisor of the others' weights, the sum is the victim's update times its weight."""
    run = attacker.run
    posted = [victim(run, base=0), *others(run, "bcde", base=2)]
    assert attacker.offer(*posted)
    weights = run.weights(2, posted)
    assert weights == [5, 8, 8, 8, 8]
    found = attacker.sum(2, posted)
    assert found is not None
    return bool((found % 8 == 5 * SECRET % 8).all())


def smaller_crowds_for_keepers(attacker: Attacker) -> bool:
    """Sites are told of crowds of three, and the keeper's configuration says two."""
    run = attacker.run
    told = run.config.model_copy(update={"secure": run.config.secure.model_copy(update={"min_cohort": 2})})
    attacker.honest = run.start("k0", config=told, log=MemoryLog())
    posted = [victim(run), run.post("b", vector=0)]  # a partner whom the attacker knows
    return attacker.offer(*posted) and is_secret(attacker.sum(0, posted), 8)


def a_seed_for_another_update(attacker: Attacker) -> bool:
    """A client that colludes sends the victim's encrypted seed as its own, with a payload of zeros."""
    run = attacker.run
    update = victim(run)
    stolen = read(MaskedUpdate, unverified_body(update.offer.header)).seeds
    copy = run.sign("b", 0, np.zeros(PARAMETERS, np.uint32), [], sealed=stolen)
    return attacker.offer(update, copy)


# The same keeper without one of its rules


def answers_twice(monkeypatch: pytest.MonkeyPatch, run: MaskedRun) -> None:
    monkeypatch.setattr(MemoryLog, "spent", lambda self, seeds: {})


def does_not_compare_seeds(monkeypatch: pytest.MonkeyPatch, run: MaskedRun) -> None:
    answers_twice(monkeypatch, run)

    def hold(self: Keeper, digest: str, held: Any) -> Any:
        self._held[digest] = held
        return held

    monkeypatch.setattr(Keeper, "_hold", hold)
    monkeypatch.setattr(KeeperIdentity, "open_update", lambda self, offer: unverified_body(offer.header))


def ignores_the_crowd(monkeypatch: pytest.MonkeyPatch, run: MaskedRun) -> None:
    monkeypatch.setattr(keeper, "crowd_problem", lambda *anything: "")


def counts_clients_only(monkeypatch: pytest.MonkeyPatch, run: MaskedRun) -> None:
    monkeypatch.setattr(
        keeper, "crowd_problem",
        lambda members, least, most: cohort.crowd_problem([(client, 1) for client, _ in members], least, most),
    )  # fmt: skip


def believes_the_weights(monkeypatch: pytest.MonkeyPatch, run: MaskedRun) -> None:
    monkeypatch.setattr(keeper, "level", lambda staleness, config: 255)


def believes_any_client(monkeypatch: pytest.MonkeyPatch, run: MaskedRun) -> None:
    monkeypatch.setattr(KeeperIdentity, "open_update", lambda self, offer: unverified_body(offer.header))


def ignores_models(monkeypatch: pytest.MonkeyPatch, run: MaskedRun) -> None:
    monkeypatch.setattr(Keeper, "_of_another_model", lambda *anything: [])


def lets_versions_fall(monkeypatch: pytest.MonkeyPatch, run: MaskedRun) -> None:
    monkeypatch.setattr(Keeper, "_least_version", property(lambda self: 0, lambda self, value: None), raising=False)


def adds_no_dither(monkeypatch: pytest.MonkeyPatch, run: MaskedRun) -> None:
    run.running["k0"]._ring.__dict__["dither"] = 1


def does_not_bind_the_terms(monkeypatch: pytest.MonkeyPatch, run: MaskedRun) -> None:
    def unbound(scope: Scope, terms: bytes, *others: Any) -> bytes:
        return seed_info(scope, b"", *others)

    monkeypatch.setattr(keeper, "seed_info", unbound)
    monkeypatch.setattr("tests.support.masked_run.seed_info", unbound)


def does_not_bind_the_update(monkeypatch: pytest.MonkeyPatch, run: MaskedRun) -> None:
    does_not_compare_seeds(monkeypatch, run)
    monkeypatch.setattr(keeper, "seed_info", lambda *fields: b"")
    monkeypatch.setattr("tests.support.masked_run.seed_info", lambda *fields: b"")


PAIRS: list[tuple[Callable[[Attacker], bool], Patch]] = [
    (one_more_and_one_less, answers_twice),
    (two_weightings, answers_twice),
    (the_same_updates_under_other_names, does_not_compare_seeds),
    (a_crowd_of_one, ignores_the_crowd),
    (a_crowd_that_weighs_nothing, counts_clients_only),
    (claimed_weights, believes_the_weights),
    (invented_clients, believes_any_client),
    (a_model_that_teaches_nothing, ignores_models),
    (an_older_version, lets_versions_fall),
    (low_bits, adds_no_dither),
    (smaller_crowds_for_keepers, does_not_bind_the_terms),
    (a_seed_for_another_update, does_not_bind_the_update),
]


@pytest.fixture
def run(tmp_path: Path) -> MaskedRun:
    return MaskedRun(tmp_path, parameters=PARAMETERS)


@pytest.mark.parametrize(("attack", "_without"), PAIRS)
def test_keeper_withstands_the_attack(run: MaskedRun, attack: Callable[[Attacker], bool], _without: Patch) -> None:
    assert not attack(Attacker(run))


@pytest.mark.parametrize(("attack", "without"), PAIRS)
def test_attack_succeeds_without_the_rule(
    run: MaskedRun, monkeypatch: pytest.MonkeyPatch, attack: Callable[[Attacker], bool], without: Patch
) -> None:
    without(monkeypatch, run)
    assert attack(Attacker(run))

"""The audit by canary clients: below the claim, and above it where clipping, noise or the limit of a client lacks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedqueue.config.schema import Config
from fedqueue.leak import client_canaries
from fedqueue.leak.canaries import CanaryAudit
from fedqueue.leak.client_canaries import audit_clients, client_canary_measurements
from fedqueue.secure.keeper import Keeper, Release
from fedqueue.secure.ring import Ring
from tests.support.masked_run import masked_config

CLIENTS = 400


def config(noise_multiplier: float = 2.0, participations: int = 3) -> Config:
    privacy = {
        "clip_norm": 0.5, "noise_multiplier": noise_multiplier, "max_participations": participations, "delta": 1e-6,
    }  # fmt: skip
    return masked_config(["north", "south"], "abcdefghijklmnopqrst", 20, privacy=privacy)


def audited(seed: int = 0, noise_multiplier: float = 2.0, participations: int = 1) -> CanaryAudit:
    return audit_clients(config(noise_multiplier), seed, CLIENTS, participations)


@pytest.mark.slow
def test_bound_is_below_the_claim_for_each_of_many_seeds() -> None:
    audits = [audited(seed) for seed in range(20)]
    assert all(audit.bound < audit.claimed for audit in audits)
    assert np.mean([audit.bound for audit in audits]) > 0.1 * audits[0].claimed
    assert 0.8 * audits[0].claimed < np.mean([audit.estimate for audit in audits]) < 1.1 * audits[0].claimed
    assert np.mean([audit.chance for audit in audits]) < 0.1


def test_more_updates_of_a_client_tell_more() -> None:
    one, three = audited(), audited(participations=3)
    assert three.claimed > 1.5 * one.claimed
    assert 0.6 * three.claimed < three.estimate < 1.3 * three.claimed


@pytest.mark.parametrize("part", [0.0, 0.5])
def test_lacking_noise_is_noticed(monkeypatch: pytest.MonkeyPatch, part: float) -> None:
    release = Keeper.release

    def with_less(self: Keeper, signed: bytes) -> Any:
        released = release(self, signed)
        assert isinstance(released, Release)
        return replace(released, _deviation=part * released._deviation)

    monkeypatch.setattr(Keeper, "release", with_less)
    audits = [audited(seed) for seed in range(3)]
    assert all(audit.estimate > 1.5 * audit.claimed for audit in audits)
    if not part:
        assert all(audit.bound > audit.claimed for audit in audits)


def test_missing_clipping_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    quantize = Ring.quantize

    def unclipped(self: Ring, values: Any, *others: Any) -> Any:
        """A site that may send four times the norm; the ring has room for it."""
        return 4 * quantize(self, values, *others)

    monkeypatch.setattr(Ring, "quantize", unclipped)
    audits = [audited(seed) for seed in range(3)]
    assert all(audit.estimate > 2 * audit.claimed for audit in audits)


def test_client_that_counts_twice_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if its update were in a cohort twice: the sum has it with twice the largest weight."""
    sums = client_canaries._Cohorts._sum

    def twice(self: Any, posted: Any, version: int) -> Any:
        self._weight *= 2
        try:
            return sums(self, posted, version)
        finally:
            self._weight //= 2

    monkeypatch.setattr(client_canaries._Cohorts, "_sum", twice)
    monkeypatch.setattr(Keeper, "_check", lambda self, cohort, members: None)
    audits = [audited(seed) for seed in range(3)]
    assert all(audit.estimate > 1.5 * audit.claimed for audit in audits)


def test_audit_in_the_table_finds_too_little_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_canaries, "CLIENTS", CLIENTS)
    bound, estimate, none, far = client_canary_measurements(config(participations=1), seed=0)
    assert (bound.attack, estimate.attack) == ("canary_clients", "canary_clients_estimate")
    assert (bound.configured, none.configured) == (True, False)
    assert bound.protection.startswith("noise for clients, claimed ε ")
    claimed = audited().claimed
    assert bound.value is not None
    assert estimate.value is not None
    assert none.value is not None
    assert far.value is not None
    assert bound.value < claimed < none.value < far.value

"""Canary clients: the audit of `canaries.py` for `[privacy.clients]`, of whole clients and with the run's own keeper.

Each of m canary clients takes part with probability 1/2, with a delta much longer than the clip norm along a direction
of its own; the others post zeros. Updates are clipped, rounded, masked and released as those of the run, in cohorts of
its size, by one keeper: that is what the coordinator knows together with all other keepers. The score of a canary is
the length of the released sums along its direction.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedqueue.config.schema import Config
from fedqueue.leak.canaries import (
    ALMOST_NONE,
    LONGEST,
    TOO_LITTLE,
    CanaryAudit,
    audit_of,
    measurements_of,
)
from fedqueue.leak.measurement import CLIENT_NOISE, Measurement
from fedqueue.leak.statistics import Numbers
from fedqueue.privacy.gaussian_dp import client_budget
from fedqueue.protocol.messages import Cohort, Offer, Order, Update
from fedqueue.protocol.signed_envelope import Scope
from fedqueue.secure.cohort import offer_digest
from fedqueue.secure.keeper import Keeper, MemoryLog, Release, Unverified
from fedqueue.secure.masked_update import Attempt, Masking
from fedqueue.secure.masks import new_seed
from fedqueue.secure.ring import Words
from fedqueue.secure.seed_envelope import KeeperPrivateKey
from fedqueue.tensors.frame import Frame
from fedqueue.tensors.manifest import PARAMETER, Manifest, TensorSpec

CLIENTS = 1000
ATTACK = "canary_clients"
MOST_PARTICIPATIONS = 4
"""Updates of each canary; ε is claimed for as many."""


def audit_clients(config: Config, seed: int, clients: int, participations: int) -> CanaryAudit:
    """Audit `participations` fresh updates of each of about `clients` canaries, in a run with these settings.

    The keepers' noise has a fresh secret each time; only who takes part follows from `seed`.
    """
    started = time.perf_counter()
    size = max(config.buffer_size, config.secure.min_cohort)
    clients = math.ceil(clients / size) * size
    taking_part = np.random.default_rng(seed).random(clients) < 0.5
    scores = _Cohorts(config, clients).scores(taking_part, size, participations)
    budget, _ = client_budget(config.privacy.clients, config.secure.weight_levels)
    claimed = budget.epsilon(participations * config.secure.weight_levels**2)
    return audit_of(scores, taking_part, claimed, config.privacy.clients.at_delta, seed, started)


class _Cohorts:
    """The canaries' updates on their way through masks, keeper and sum."""

    def __init__(self, config: Config, clients: int) -> None:
        one_keeper = config.secure.model_copy(update={"keepers": config.secure.keepers[:1], "examples": "public"})
        unweighted = config.aggregation.model_copy(update={"weight_by_examples": False})
        self._config = config.model_copy(update={"secure": one_keeper, "aggregation": unweighted})
        self._manifest = Manifest((TensorSpec("canaries", "float32", (clients,), 0, clients, PARAMETER),))
        self._masking, self._scope = Masking(self._config, self._manifest), Scope("canaries", "audit")
        self._keeper = Keeper(
            one_keeper.keepers[0], self._config, clients, self._scope, Unverified(), MemoryLog(),
            KeeperPrivateKey.generate(), new_seed(),
        )  # fmt: skip
        self._weight = config.secure.weight_levels

    def scores(self, taking_part: npt.NDArray[np.bool_], size: int, participations: int) -> Numbers:
        """The length of all released sums along the direction of each client, float64 [clients]."""
        scores = np.zeros(len(taking_part))
        cohorts = len(taking_part) // size
        for version in range(participations * cohorts):
            first = version % cohorts * size
            posted = [self._posted(client, bool(taking_part[client]), version) for client in range(first, first + size)]
            scores[first : first + size] += self._sum(posted, version)[first : first + size]
        return scores

    def _posted(self, client: int, takes_part: bool, version: int) -> tuple[Offer, Words]:
        """The offer and the masked words of a canary's update, which is trained from `version`."""
        delta = Frame(self._manifest)
        delta.parameters.zero_()
        if takes_part:
            delta.parameters[client] = LONGEST * self._config.clip_norm
        name, job = f"canary-{client}", f"canary-{client}-{version}"
        order = Order(run="canaries", job=job, client=name, seed=client, training=self._config.training)
        update = Update(examples=1, nbytes=self._manifest.nbytes, chunks=1, seconds=0.0)
        attempt = Attempt(self._scope, 1, version, "0" * 64)
        header, payload = self._masking.mask(update, delta, order, attempt, [self._keeper.key.public])
        offer = Offer(client=name, job=job, attempt=1, base=version, header=header.pack())
        return offer, np.frombuffer(payload, np.uint32)

    def _sum(self, posted: Sequence[tuple[Offer, Words]], version: int) -> npt.NDArray[np.int32]:
        """The weighted sum of the updates with the keeper's noise, int32 [clients]."""
        total, members = np.zeros(len(posted[0][1]), np.uint32), []
        for offer, words in posted:
            opened = self._keeper.offer(offer)
            assert not opened.refusal, opened.detail
            members.append((offer_digest(offer), self._weight))
            total += words * np.uint32(self._weight)
        released = self._keeper.release(Cohort(version=version, members=tuple(members)).pack())
        assert isinstance(released, Release), released
        total -= np.concatenate([piece.copy() for piece in released.pieces()])
        return total.view(np.int32)


def client_canary_measurements(config: Config, seed: int) -> list[Measurement]:
    """Audit the noise of a run, and a thousandth of it, which the audit must notice."""
    settings = config.privacy.clients
    budget, most = client_budget(settings, config.secure.weight_levels)
    participations = min(MOST_PARTICIPATIONS, most // config.secure.weight_levels**2)
    found = audit_clients(config, seed, CLIENTS, participations)
    least = settings.model_copy(
        update={
            "noise_multiplier": budget.noise_multiplier * ALMOST_NONE, "epsilon": None,
            "max_participations": participations,
        }
    )  # fmt: skip
    privacy = config.privacy.model_copy(update={"clients": least})
    without = audit_clients(config.model_copy(update={"privacy": privacy}), seed, CLIENTS, participations)
    claim = f"{CLIENT_NOISE}, claimed ε {found.claimed:.2f} for {participations} updates"
    return [*measurements_of(found, ATTACK, claim), *measurements_of(without, ATTACK, TOO_LITTLE, False)]

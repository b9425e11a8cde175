"""A run with keepers in memory: clients that mask, a coordinator that proposes what a test wants, pure keepers."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import redis

from fedqueue.config.schema import Config
from fedqueue.protocol.coordinator_identity import CoordinatorIdentity
from fedqueue.protocol.keeper_identity import KeeperIdentity, load_keeper_identity
from fedqueue.protocol.key_files import (
    CLIENTS,
    COORDINATOR_KEY,
    COORDINATOR_PUBLIC,
    KEEPERS,
    REVOKED,
    KeyFile,
    SigningKey,
    read_signing_key,
    read_trusted_keys,
    write_public_keys,
)
from fedqueue.protocol.keys import Keys
from fedqueue.protocol.messages import Cohort, MaskedUpdate, Offer, SealedSeed
from fedqueue.protocol.roster import Roster
from fedqueue.protocol.run_info import RunInfo
from fedqueue.protocol.signed_envelope import UPDATE, Scope, digest_of
from fedqueue.protocol.site_identity import SiteIdentity
from fedqueue.secure.cohort import cohort_id, offer_digest
from fedqueue.secure.keeper import Keeper, KeeperLog, MemoryLog, Release
from fedqueue.secure.masks import add_masks, new_seed
from fedqueue.secure.ring import level
from fedqueue.secure.seed_envelope import KeeperPrivateKey, agreed_terms, key_id, seal_seed, seed_info
from fedqueue.tensors.manifest import PARAMETER, Manifest, TensorSpec
from tests.support.builders import make_config

RUN = "masked"
MODEL = digest_of(b"the model of every version, unless a test says otherwise")
Ring32 = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Posted:
    """An update as the coordinator has it: the offer with the client's header, and the masked payload."""

    offer: Offer
    payload: Ring32

    @property
    def header(self) -> str:
        return offer_digest(self.offer)


def masked_config(
    keepers: Sequence[str], clients: Sequence[str], buffer_size: int, privacy: Any = None, **secure: Any
) -> Config:
    return make_config(
        clients={"names": list(clients)},
        aggregation={"strategy": "fedbuff", "buffer_size": buffer_size, "running_statistics": "frozen"},
        secure={"keepers": list(keepers), **secure},
        privacy={"clients": privacy or {}},
    )


class MaskedRun:
    """Keys of all parties below `folder`, and what each of them would say."""

    def __init__(
        self,
        folder: Path,
        clients: Sequence[str] = ("a", "b", "c", "d", "e"),
        keepers: Sequence[str] = ("k0", "k1"),
        parameters: int = 6,
        buffer_size: int = 4,
        privacy: Any = None,
        **secure: Any,
    ) -> None:
        self.folder, self.clients, self.keepers, self.parameters = folder, clients, keepers, parameters
        self.config = masked_config(keepers, clients, buffer_size, privacy, **secure)
        self.jobs = itertools.count(1)
        _make_keys(folder, clients, keepers)
        self.coordinator = CoordinatorIdentity(RUN, read_signing_key(folder / COORDINATOR_KEY), folder)
        self.config_text = self.config.model_dump_json().encode()
        self.manifest = Manifest((TensorSpec("w", "float32", (parameters,), 0, parameters, PARAMETER),)).pack()
        self.info = self.begin()
        self.sites = {client: self._site(client) for client in clients}
        self.keys = {name: KeeperPrivateKey.generate() for name in keepers}
        self.publics = {name: key.public for name, key in self.keys.items()}
        self.secrets = {name: new_seed() for name in keepers}
        self.logs: dict[str, KeeperLog] = {name: MemoryLog() for name in keepers}
        self.identities = {name: self.identity(name) for name in keepers}
        self.running = {name: self.start(name) for name in keepers}

    def begin(self, epoch: int = 0, first_version: int = 0) -> RunInfo:
        """A run that starts, or starts again in a later epoch."""
        return self._described(self.coordinator.begin(self.config_text, self.manifest, epoch, first_version), epoch)

    def next_term(self, version: int = 0) -> RunInfo:
        """The run under its next leader, who found this version."""
        info = replace(self.info, version=version)
        return self._described(self.coordinator.resume(info), info.epoch, version)

    def _described(self, descriptor: bytes, epoch: int, version: int = 0) -> RunInfo:
        self.info = RunInfo(
            RUN, "running", json.loads(self.config_text), self.manifest, version, {}, "", epoch, "leader", descriptor,
            digest_of(self.config_text),
        )  # fmt: skip
        return self.info

    def write(self, client: redis.Redis, state: str = "running") -> None:
        """Write to Redis what a keeper reads of the run."""
        fields: Any = {
            "config": self.config_text, "manifest": self.manifest, "state": state, "stopped_because": "test",
            "epoch": self.info.epoch, "descriptor": self.info.descriptor,
        }  # fmt: skip
        client.hset(Keys(RUN).config, mapping=fields)
        client.hset(Keys(RUN).head, "version", self.info.version)

    @property
    def scope(self) -> Scope:
        return next(iter(self.sites.values())).scope

    def _site(self, client: str) -> SiteIdentity:
        key = KeyFile(self.folder / f"{client}.key", read_signing_key)
        coordinator = KeyFile(self.folder / COORDINATOR_PUBLIC, read_trusted_keys)
        keepers = Roster(self.folder / KEEPERS, self.folder / REVOKED, "keeper")
        site = SiteIdentity(RUN, {client: key}, coordinator, "session", keepers)
        site.enter(self.info)
        return site

    def enter(self) -> None:
        """Let the clients follow the run into its present epoch."""
        for site in self.sites.values():
            site.enter(self.info)

    def identity(self, keeper: str, entered: bool = True) -> KeeperIdentity:
        """The keeper's identity with the shared roster, as it is after a start of the process."""
        identity = load_keeper_identity(self.folder, RUN, keeper)
        if entered:
            identity.enter(self.info)
        return identity

    def start(self, name: str, **changed: Any) -> Keeper:
        """The keeper as after a start of its process: with its key, secret and log, without any offer."""
        settings = {
            "name": name, "config": self.config, "parameters": self.parameters, "scope": self.scope,
            "verifier": self.identities[name], "log": self.logs[name], "key": self.keys[name],
            "secret": self.secrets[name],
        }  # fmt: skip
        return Keeper(**{**settings, **changed})

    # Clients

    def post(self, client: str, base: int = 0, vector: npt.ArrayLike = 1, **changed: Any) -> Posted:
        """An honest client's update: integers in units of the ring, one mask for each keeper, signed."""
        words = np.broadcast_to(np.asarray(vector, np.int32), self.parameters).copy()
        seeds = [new_seed() for _ in self.keepers]
        return self.sign(client, base, add_masks(words, seeds), seeds, **changed)

    def sign(
        self, client: str, base: int, payload: Ring32, seeds: Sequence[bytes], *, job: str = "", attempt: int = 1,
        model: str = MODEL, sealed: Sequence[SealedSeed] | None = None, **fields: Any,
    ) -> Posted:  # fmt: skip
        """A signed update with this payload and these seeds; `fields` change its header."""
        job = job or f"{RUN}-{next(self.jobs):08d}"
        digest = digest_of(payload.view(np.uint8))
        if sealed is None:
            sealed = [self.seal(seed, client, job, attempt, base, model, digest, i) for i, seed in enumerate(seeds)]
        update = {
            "examples": 10, "encoding": "ring32", "nbytes": payload.nbytes, "chunks": 1, "seconds": 0.5,
            "digest": digest, "model": model, "seeds": tuple(sealed),
        }  # fmt: skip
        body = MaskedUpdate(**{**update, **fields}).pack()
        header = self.sites[client].sign(UPDATE, client, [job, attempt, base], body)
        return Posted(Offer(client=client, job=job, attempt=attempt, base=base, header=header), payload)

    def seal(
        self, seed: bytes, client: str, job: str, attempt: int, base: int, model: str, payload: str, component: int
    ) -> SealedSeed:
        """The seed, encrypted to the keeper of its component."""
        keeper = self.keepers[component]
        info = seed_info(
            self.scope, agreed_terms(self.config), client, job, attempt, base, model, payload, component, keeper,
            self.parameters,
        )  # fmt: skip
        public = self.publics[keeper]
        return SealedSeed(
            component=component, keeper=keeper, key=key_id(public), sealed=seal_seed(seed, public, info)
        )  # fmt: skip

    # The coordinator

    def weights(self, version: int, posted: Sequence[Posted]) -> list[int]:
        return [level(version - p.offer.base, self.config) for p in posted]

    def cohort(self, version: int, posted: Sequence[Posted], weights: Sequence[int] | None = None) -> Cohort:
        """A cohort of these updates, with the weights of their staleness unless others are given."""
        weights = weights or self.weights(version, posted)
        return Cohort(version=version, members=tuple((p.header, w) for p, w in zip(posted, weights, strict=True)))

    def propose(self, version: int, posted: Sequence[Posted], weights: Sequence[int] | None = None) -> bytes:
        return self.coordinator.sign_cohort(self.cohort(version, posted, weights))

    def id(self, cohort: Cohort) -> str:
        return cohort_id(self.scope, cohort)

    def unmask(self, posted: Sequence[Posted], weights: Sequence[int], releases: Sequence[Release]) -> npt.NDArray[Any]:
        """What the coordinator computes: Σ w y − Σ masks mod 2³², int32 [d]."""
        total = np.zeros(self.parameters, np.uint32)
        for update, weight in zip(posted, weights, strict=True):
            total += update.payload * np.uint32(weight)
        for release in releases:
            total -= words(release)
        return total.view(np.int32)


def words(release: Release) -> Ring32:
    """All words of a release."""
    return np.concatenate([piece.copy() for piece in release.pieces()])


def _make_keys(folder: Path, clients: Sequence[str], keepers: Sequence[str]) -> None:
    for name, public in (
        ("coordinator", folder / COORDINATOR_PUBLIC),
        *((client, folder / CLIENTS / f"{client}.pub") for client in clients),
        *((keeper, folder / KEEPERS / f"{keeper}.pub") for keeper in keepers),
    ):
        key = SigningKey.generate()
        key.save(folder / f"{name}.key")
        write_public_keys(public, [key.public])

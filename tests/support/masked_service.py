"""Runs the real coordinator of a run with keepers over a real store, in one process with workers and pure keepers.

As `scripted_run.py`: at the step where a coordinator is to die, `Killed` is raised. Keepers and workers live on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import redis
import torch

from fedqueue.config.loading import parse_config
from fedqueue.config.schema import Config
from fedqueue.errors import RunNotFound
from fedqueue.protocol.coordinator_identity import CoordinatorIdentity
from fedqueue.protocol.keeper_identity import load_keeper_identity
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
from fedqueue.protocol.messages import KeeperKey, Masked, MaskRefused, Offer, Opened, Order, Registration, read
from fedqueue.protocol.roster import Roster
from fedqueue.protocol.signed_envelope import KEEPER, MASK_REFUSED, MASKED, OPENED, digest_of
from fedqueue.protocol.site_identity import SiteIdentity
from fedqueue.secure.keeper import Keeper, KeeperLog, MemoryLog, Release
from fedqueue.secure.masked_update import Attempt, Masking
from fedqueue.secure.masks import new_seed
from fedqueue.secure.seed_envelope import KeeperPrivateKey
from fedqueue.tensors.blobs import chunks_of
from fedqueue.tensors.codec import downlink_codec
from fedqueue.tensors.frame import Frame
from fedqueue.tensors.manifest import Manifest
from fedqueue.transport.store import Store
from fedqueue.transport.worker_store import Claim, WorkerStore
from fedqueue_coordinator.core.run_summary import RunResult
from fedqueue_coordinator.service.coordinator import Coordinator
from fedqueue_coordinator.service.inbox import by_stream
from tests.support.builders import EXAMPLES, make_update
from tests.support.mortal_coordinator import Killed, MortalStore, dead_after, ticking_clock
from tests.support.small_task import SmallTask

SITES = ("a", "b", "c", "d")
KEEPER_NAMES = ("north", "south")


def masked_service_config(**sections: Any) -> Config:
    """A run of four sites and two keepers, whose versions have three updates; without a dither, so that bits repeat."""
    tree = {
        "name": "masked",
        "seed": 5,
        "task": {"entrypoint": "task.py:SmallTask"},
        "clients": {"names": list(SITES), "min_available": len(SITES)},
        "aggregation": {"strategy": "fedbuff", "buffer_size": 3, "running_statistics": "frozen"},
        "dispatch": {"lease_seconds": 3600, "leader_lease_seconds": 3600, "backoff_seconds": 1e-6},
        "checkpoint": {"every_seconds": "off"},
        "ledger": {"keep_payloads": True},
        "stop": {"versions": 2},
        **sections,
        "secure": {"keepers": list(KEEPER_NAMES), "min_cohort": 2, "weight_levels": 1, **sections.get("secure", {})},
    }
    return parse_config(tree)


def make_keys(folder: Path) -> None:
    """The keys of coordinator, sites and keepers, all in one folder."""
    publics = {
        "coordinator": COORDINATOR_PUBLIC,
        **{site: f"{CLIENTS}/{site}.pub" for site in SITES},
        **{keeper: f"{KEEPERS}/{keeper}.pub" for keeper in KEEPER_NAMES},
    }
    for name, public in publics.items():
        key = SigningKey.generate()
        key.save(folder / f"{name}.key")
        write_public_keys(folder / public, [key.public])


class ServedKeeper:
    """A pure keeper over Redis, with what its process keeps on disk: key, secret and log."""

    def __init__(self, client: redis.Redis, config: Config, keys: Path, name: str, parameters: int) -> None:
        self.store, self.name, self.config, self.parameters = Store(client, config.name), name, config, parameters
        self.away = False
        self.identity = load_keeper_identity(keys, config.name, name)
        self.lose_file()
        self._descriptor = b""
        self.after = "0-0"

    def lose_file(self) -> None:
        """Lose key and log, and begin with new ones."""
        self.key, self.secret = KeeperPrivateKey.generate(), new_seed()
        self.log: KeeperLog = MemoryLog()
        self._keeper: Keeper | None = None
        self._descriptor = b""

    def restart(self) -> None:
        """As after a crash of its process, whose file is as it was."""
        self._keeper, self._descriptor, self.after = None, b"", "0-0"

    def act(self) -> bool:
        """Follow the run and answer what is asked; return whether anything was."""
        if self.away or not self._follow():
            return False
        assert self._keeper
        before = self.after
        stream = self.store.keys.asks(self.name)
        for entry, fields in by_stream(self.store.redis.xread({stream: self.after})).get(stream, ()):
            self.after = entry.decode()
            kind, body = self._answer(fields[b"kind"].decode(), fields[b"body"])
            signed = self.identity.sign(kind, body)
            self.store.redis.xadd(self.store.keys.says(self.name), {"kind": kind, "body": signed})
        return self.after != before

    def _follow(self) -> bool:
        try:
            info = self.store.info()
        except RunNotFound:
            return False
        if not info.descriptor or info.state != "running":
            return False
        if info.descriptor != self._descriptor:
            descriptor = self.identity.enter(info)
            if self._keeper is None:
                self._keeper = Keeper(
                    self.name, self.config, self.parameters, self.identity.scope, self.identity, self.log, self.key,
                    self.secret,
                )  # fmt: skip
                statement = KeeperKey(public=self.key.public, component=self._keeper.component).pack()
                self.store.redis.set(self.store.keys.keeper(self.name), self.identity.sign(KEEPER, statement))
            self._keeper.begin_term(descriptor.term, descriptor.first_version)
            self._descriptor, self.after = info.descriptor, "0-0"
        return True

    def _answer(self, kind: str, body: bytes) -> tuple[str, bytes]:
        assert self._keeper
        if kind == "offer":
            return OPENED, Opened(offers=(self._keeper.offer(read(Offer, body)),)).pack()
        released = self._keeper.release(body)
        if isinstance(released, MaskRefused):
            return MASK_REFUSED, released.pack()
        return MASKED, self.stored(released).pack()

    def stored(self, release: Release) -> Masked:
        data = np.concatenate([piece.copy() for piece in release.pieces()]).view(np.uint8)
        chunks = self.store.write_blob(self.store.keys.mask(release.cohort, self.name), data, 3600)
        return Masked(cohort=release.cohort, digest=digest_of(data), nbytes=data.nbytes, chunks=chunks)


class MaskedSites:
    """Mask and post the updates of all jobs in their order; an update depends only on its job's number."""

    def __init__(self, client: redis.Redis, config: Config, keys: Path) -> None:
        self.config = config
        manifest = Manifest.from_module(SmallTask(batch_norm=False).model(), config.aggregation)
        self.manifest, self.masking = manifest, Masking(config, manifest)
        self.keepers = [ServedKeeper(client, config, keys, name, manifest.parameters) for name in KEEPER_NAMES]
        self.posts = True
        sites = {site: KeyFile(keys / f"{site}.key", read_signing_key) for site in SITES}
        coordinator = KeyFile(keys / COORDINATOR_PUBLIC, read_trusted_keys)
        self.identity = SiteIdentity(
            config.name, sites, coordinator, "session", Roster(keys / KEEPERS, keys / REVOKED, "keeper")
        )
        self.store = WorkerStore(client, config.name, "workers", self.identity)
        self._joined = False
        self._claims: dict[str, Claim] = {}

    def act(self) -> None:
        """Let the keepers answer; then begin every job, and post the first one that is begun."""
        for keeper in self.keepers:
            keeper.act()
        if self._over or not (self._joined or self._join()):
            return
        for site in SITES:
            for job in cast(list[bytes], self.store.redis.lrange(f"rq:queue:{self.store.keys.queue(site)}", 0, -1)):
                if job.decode() not in self._claims:
                    self._claims[job.decode()] = self.store.claim(job.decode(), 3600)
        if self._claims and self.posts:
            self.post(self._claims.pop(min(self._claims)))

    def post(self, claim: Claim) -> None:
        number = int(claim.job.split("-")[-2])
        order = Order(
            run=self.config.name, job=claim.job, client=claim.client, seed=number, training=self.config.training
        )
        frame = Frame(self.manifest)
        rng = np.random.default_rng(number)
        frame.floats.copy_(torch.from_numpy(rng.normal(size=self.manifest.floats).astype(np.float32)))
        codec = downlink_codec(self.config.compression, self.manifest)
        model = digest_of(self.store.read_wire(claim.version, codec))
        attempt = Attempt(self.identity.scope, claim.attempt, claim.version, model)
        public = self.store.keeper_keys(KEEPER_NAMES)
        update = make_update(frame.buffer.nbytes, seconds=0.1)
        header, payload = self.masking.mask(update, frame, order, attempt, [key for key in public if key])
        assert self.store.post(claim, header, payload) == ""
        for site in SITES:
            self.store.redis.lrem(f"rq:queue:{self.store.keys.queue(site)}", 0, claim.job)
        self.store.redis.delete(f"rq:job:{claim.job}")

    def _join(self) -> bool:
        try:
            self.identity.enter(self.store.info())
        except RunNotFound:
            return False
        if not all(self.store.redis.exists(self.store.keys.keeper(keeper)) for keeper in KEEPER_NAMES):
            return False
        for site in SITES:
            self.store.join([site], 3600)
            self.store.register(Registration(client=site, examples=EXAMPLES))
        self._joined = True
        return True

    @property
    def _over(self) -> bool:
        return int(self.store.redis.hget(self.store.keys.head, "version") or 0) >= (self.config.stop.versions or 0)


def make_coordinator(
    client: redis.Redis, sites: MaskedSites, keys: Path, folder: Path, at: Callable[[str], None]
) -> Coordinator:
    """A coordinator which `at` may kill by raising Killed; nothing reaches Redis after that."""
    identity = CoordinatorIdentity(sites.config.name, read_signing_key(keys / COORDINATOR_KEY), keys)
    store = MortalStore(client, sites.config.name, f"owner-{id(object())}", identity)
    hook = dead_after(at)
    store.at, store.others = hook, sites
    return Coordinator(
        sites.config, SmallTask(batch_norm=False), store, folder, clock=ticking_clock(), sleep=lambda seconds: None,
        failpoint=hook,
    )  # fmt: skip


def lead_masked(
    client: redis.Redis, sites: MaskedSites, keys: Path, folder: Path, deaths: list[Callable[[str], None]]
) -> tuple[RunResult, int]:
    """Run one coordinator after another, the first ones until they are killed; return how many were killed."""
    died = 0
    for at in [*deaths, lambda point: None]:
        try:
            result = make_coordinator(client, sites, keys, folder, at).run()
        except Killed:
            died += 1
            client.hset(f"fedqueue:{{{sites.config.name}}}:leader", "expires", 0)  # the leader lease expires
        else:
            assert result
            return result, died
    raise AssertionError("the last coordinator has no death")


def payload_chunks(sites: MaskedSites) -> int:
    return chunks_of(4 * sites.manifest.parameters)

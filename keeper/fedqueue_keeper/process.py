"""One keeper process: waits for the run, publishes its key, and answers what the coordinator asks. Read `run` first.

Everything may be repeated. An ask stays in its stream until the update's job has ended, so that a keeper that starts
again, or whose connection was lost, reads from the first ask on and answers all of them again.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import redis
import structlog

from fedqueue.config.loading import parse_config
from fedqueue.config.schema import Config
from fedqueue.errors import ConfigurationError, RunNotFound, SignatureError, StoreError, WireError
from fedqueue.exit_codes import DONE, stop_signals
from fedqueue.protocol.keeper_identity import KeeperIdentity
from fedqueue.protocol.messages import KeeperKey, MaskRefused, Offer, Opened, OpenedOffer, read
from fedqueue.protocol.run_info import RunInfo
from fedqueue.protocol.signed_envelope import KEEPER, MASK_REFUSED, MASKED, OPENED, RunDescriptor
from fedqueue.secure.keeper import Keeper
from fedqueue.secure.ring import ring_of
from fedqueue.tensors.manifest import Manifest
from fedqueue.transport.retry import RedisRetry
from fedqueue_keeper.keeper_metrics import UNOBSERVED, KeeperObserver
from fedqueue_keeper.keeper_store import ASKS_AT_ONCE, FIRST, Ask, Glance, KeeperStore
from fedqueue_keeper.policy import KeeperPolicy
from fedqueue_keeper.release_log import ReleaseLog, delete_former_logs, log_path

log = structlog.get_logger("fedqueue.keeper")

GATHER_SECONDS = 0.01  # that offers wait for others, so that one signature answers all of them
LOOK_SECONDS = 1.0  # between two looks at the run; the longest that a read waits for an ask
NO_POLICY = KeeperPolicy()


@dataclass
class _Served:
    """The run instance that is served."""

    descriptor: RunDescriptor
    keeper: Keeper
    log: ReleaseLog
    published: bool = False
    """Whether this process has published its encryption key."""


class KeeperProcess:
    """One keeper of one run."""

    def __init__(
        self,
        store: KeeperStore,
        identity: KeeperIdentity,
        state: Path,
        policy: KeeperPolicy = NO_POLICY,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        observer: KeeperObserver = UNOBSERVED,
    ) -> None:
        """`state` is the folder of the keeper's files; `observer` is told of the answers."""
        self._observer = observer
        self._store, self._identity, self._state, self._policy = store, identity, state, policy
        self._clock, self._sleep = clock, sleep
        self._name = identity.name
        self._told_to_stop = False
        self._retry = RedisRetry(lambda: self._told_to_stop, sleep)
        self._served: _Served | None = None
        self._descriptor = b""  # as it was last read
        self._look_at = clock()
        self._after = FIRST
        self._said: set[str] = set()  # what was logged once

    def run(self) -> str:
        """Serve the run until it ends or a signal comes; returns why it ended.

        Raises ConfigurationError where the run does not have this keeper, has smaller crowds than it accepts, or has no
        signatures, and where its file cannot be used; SignatureError where the run is not that of the pinned
        coordinator; and StoreError where another process of this keeper has taken over.
        """
        for signum in stop_signals():
            signal.signal(signum, self._on_signal)
        try:
            while not self._told_to_stop:
                try:
                    ended_because = self.step()
                except redis.RedisError as error:
                    self._after = FIRST  # the server may have lost answers
                    self._retry.wait(error)
                else:
                    self._retry.succeeded()
                    if ended_because:
                        return ended_because
            return "stopped"
        finally:
            self.close()

    def close(self) -> None:
        """Close the keeper's file, so that another process can continue with it."""
        if self._served:
            self._served.log.close()
            self._served = None

    def step(self) -> str:
        """Follow the run, and answer the next asks; returns why the run has ended, or an empty string.

        Waits at most LOOK_SECONDS. It is safe to repeat after an error of Redis.
        """
        if self._clock() >= self._look_at:
            with contextlib.suppress(RunNotFound):  # it was deleted between two reads
                if ended_because := self._look():
                    return ended_because
            self._look_at = self._clock() + LOOK_SECONDS
        if self._served is None:
            self._sleep(LOOK_SECONDS / 5)
            return ""
        asks = self._asks()
        if asks:
            self._after = asks[-1].id
            if answers := list(self._answers(asks)):
                self._store.say(self._name, answers)
        return ""

    def _asks(self) -> list[Ask]:
        """The next asks. Offers wait a moment for others; a cohort, which the coordinator waits for, does not."""
        asks = self._store.asks(self._name, self._after, LOOK_SECONDS)
        if asks and len(asks) < ASKS_AT_ONCE and all(ask.kind == "offer" for ask in asks):
            self._sleep(GATHER_SECONDS)
            return self._store.asks(self._name, self._after, 0)
        return asks

    # The run

    def _look(self) -> str:
        """Follow the run where it has changed; returns why it has ended, or an empty string."""
        seen = self._store.glance()
        if seen is None:
            if self._first("missing"):
                log.info("waiting for a coordinator to start the run", run=self._store.run)
            return ""
        self._said.discard("missing")
        if seen.state != "running":
            self.close()
            delete_former_logs(self._state, self._name, self._store.run)
            return f"the run has ended: {seen.stopped_because}"
        if seen.descriptor:
            self._follow(seen)
        elif self._store.info().version >= 0:
            problem = f"run {self._store.run!r} is not signed"
            raise ConfigurationError("security.signatures", "off", problem, "keepers serve signed runs only")
        return ""

    def _moved_on(self) -> bool:
        """Whether the run was in a later term or epoch than this keeper, which follows it then."""
        seen = self._store.glance()
        if seen is None or seen.state != "running" or seen.descriptor == self._descriptor:
            return False
        try:
            self._follow(seen)
        except RunNotFound:  # it was deleted between two reads
            return False
        return True

    def _follow(self, seen: Glance) -> None:
        """Enter the term or epoch of the run, unless this keeper has, and publish the key of its instance."""
        if seen.descriptor != self._descriptor:
            self._enter(self._store.info())
        self._publish()

    def _enter(self, info: RunInfo) -> None:
        descriptor = self._identity.enter(info)
        if self._served and self._served.descriptor.instance == descriptor.instance:
            self._served.keeper.begin_term(descriptor.term, descriptor.first_version)
            self._served.descriptor = descriptor
        else:
            self.close()
            self._served = self._begin(info, descriptor)
        self._descriptor = info.descriptor
        self._after = FIRST  # a new leader asks again

    def _begin(self, info: RunInfo, descriptor: RunDescriptor) -> _Served:
        config = parse_config(info.config)
        self._require_served(config, info.run)
        parameters = ring_of(config, Manifest.unpack(info.manifest)).parameters
        delete_former_logs(self._state, self._name, info.run, descriptor.instance)
        release_log = ReleaseLog(log_path(self._state, self._name, info.run, descriptor.instance))
        keeper = Keeper(
            self._name, config, parameters, self._identity.scope, self._identity, release_log, release_log.key,
            release_log.secret, self._policy.min_cohort or 0, self._policy.own_budget,
        )  # fmt: skip
        keeper.begin_term(descriptor.term, descriptor.first_version)
        log.info("ready", run=info.run, keeper=self._name, key=keeper.key.id, file=str(release_log.path))
        return _Served(descriptor, keeper, release_log)

    def _require_served(self, config: Config, run: str) -> None:
        """Raise ConfigurationError for a run without this keeper, or with smaller crowds than it accepts."""
        keepers, least = config.secure.keepers, self._policy.min_cohort
        if self._name not in keepers:
            names = f"the keepers {', '.join(keepers)}" if keepers else "no keepers"
            raise ConfigurationError(
                "NAME", self._name, f"run {run!r} has {names}", "pass one of the names in secure.keepers"
            )
        if least and least > config.secure.min_cohort:
            raise ConfigurationError(
                "min_cohort", least, f"run {run!r} has secure.min_cohort = {config.secure.min_cohort}, and this "
                "keeper's policy asks for larger crowds", "let the operator raise it, or lower this one"
            )  # fmt: skip
        if self._policy.max_epsilon is not None and not config.privacy.clients.on:
            raise ConfigurationError(
                "max_epsilon", self._policy.max_epsilon, f"run {run!r} has no [privacy.clients], so that its sums have "
                "no noise", "let the operator turn it on, or leave max_epsilon out of this keeper's policy"
            )  # fmt: skip
        missing = [client for client in config.clients.ids if not self._identity.knows(client)]
        if missing:
            log.warning("clients are not on this keeper's roster: it refuses their updates", clients=missing)

    def _publish(self) -> None:
        """Publish the encryption key, again where Redis has lost it, and after a rotation of the signing key.

        Raises StoreError where another process of this keeper has published its own since.
        """
        served = self._served
        assert served is not None
        key = KeeperKey(public=served.keeper.key.public, component=served.keeper.component)
        statement, there = self._identity.sign(KEEPER, key.pack()), self._store.published_key(self._name)
        if there == statement:
            served.published = True
            return
        if self._identity.is_own(there):
            if served.published:
                raise StoreError(
                    f"another process of keeper {self._name} has published a key for run {self._store.run!r}: run only "
                    "one, with the folder of its file (--state)"
                )
            log.warning(
                "the file of this keeper's former process is lost: updates that were masked for its key end as "
                "keeper_lost", keeper=self._name,
            )  # fmt: skip
        self._store.publish_key(self._name, statement)
        served.published = True

    # Asks

    def _answers(self, asks: Sequence[Ask]) -> Iterator[tuple[str, bytes]]:
        """The answers in the order of the asks; offers that follow one another have one answer."""
        opened: list[OpenedOffer] = []
        for ask in asks:
            try:
                match ask.kind:
                    case "offer":
                        opened.append(self._open(read(Offer, ask.body)))
                    case "cohort":
                        released = self._release(ask.body)
                        yield from self._opened(opened)
                        opened = []
                        yield released
            except WireError as error:
                log.warning("ignored an ask", kind=ask.kind, because=str(error))
        yield from self._opened(opened)

    def _opened(self, offers: Sequence[OpenedOffer]) -> Iterator[tuple[str, bytes]]:
        if offers:
            yield OPENED, self._identity.sign(OPENED, Opened(offers=tuple(offers)).pack())

    def _open(self, offer: Offer) -> OpenedOffer:
        opened = self._keeper.offer(offer)
        if opened.refusal == "foreign" and self._moved_on():
            opened = self._keeper.offer(offer)
        self._observer.offered(opened.refusal)
        if opened.refusal and self._first(opened.header):
            say = log.debug if opened.refusal == "spent" else log.warning  # a restarted keeper is asked again
            say("refused an update", client=offer.client, job=offer.job, reason=opened.refusal, detail=opened.detail)
        return opened

    def _release(self, cohort: bytes) -> tuple[str, bytes]:
        try:
            answer = self._keeper.release(cohort)
        except SignatureError:
            if not self._moved_on():
                raise
            answer = self._keeper.release(cohort)
        if isinstance(answer, MaskRefused):
            self._observer.refused_cohort(answer.reason)
            if self._first(answer.cohort):
                log.warning("refused a cohort", reason=answer.reason, detail=answer.detail)
            return MASK_REFUSED, self._identity.sign(MASK_REFUSED, answer.pack())
        masked = self._store.store_mask(self._name, answer)
        self._observer.released()
        what = f"released cohort of {answer.clients} clients for version {answer.version + 1}"
        log.info(what, updates=answer.updates, cohort=answer.cohort[:12])
        return MASKED, self._identity.sign(MASKED, masked.pack())

    @property
    def _keeper(self) -> Keeper:
        assert self._served is not None
        return self._served.keeper

    def _first(self, what: str) -> bool:
        """Whether this is said for the first time."""
        if what in self._said:
            return False
        self._said.add(what)
        return True

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        """Note the signal too, as an exception may be lost in a finalizer."""
        if not self._told_to_stop:
            self._told_to_stop = True
            raise SystemExit(DONE)

"""What the coordinator asks of the keepers, and what they answer: over two streams for each keeper.

An ask stays in `asks:KEEPER` until the update's job has ended, or the cohort's version is committed: a keeper that
starts again answers all of them again. Answers lie in `says:KEEPER` until they are read. Nothing that lasts depends on
an answer: a new leader asks again for each update that it reads again, and for the cohort under way.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import structlog

from fedqueue.errors import SignatureError, StoreError, WireError
from fedqueue.protocol.messages import Cohort, Masked, MaskRefused, Opened, read
from fedqueue.protocol.messages import Offer as OfferMessage
from fedqueue.protocol.signed_envelope import KEEPER, MASK_REFUSED, MASKED, OPENED
from fedqueue.secure.cohort import cohort_id, offer_digest
from fedqueue.tensors.blobs import chunks_of
from fedqueue_coordinator.core.events import CohortRefused, Event, KeepersAbsent, MasksReleased, Offer, UpdateOpened
from fedqueue_coordinator.service.coordinator_store import Answer, CoordinatorStore
from fedqueue_coordinator.service.inbox import FIRST
from fedqueue_coordinator.service.masked_words import read_words

log = structlog.get_logger("fedqueue.coordinator")


class KeeperExchange:
    """Asks the keepers of one run, and turns their answers into events."""

    def __init__(self, store: CoordinatorStore, keepers: Sequence[str], nbytes: int) -> None:
        """Begin with no ask in Redis; `nbytes` is the size of an update and of a cohort's masks."""
        self._store, self._keepers, self._nbytes = store, keepers, nbytes
        self._after = dict.fromkeys(keepers, FIRST)
        self._offers: dict[str, OfferMessage] = {}  # digest → an offer whose job has not ended
        self._offered: dict[str, str] = {}  # job → the digest of its offer
        self._unsent: list[OfferMessage] = []
        self._asks: dict[str, list[tuple[str, str]]] = {}  # job → its asks: keeper and position
        self._cohort = ""  # id of the one under way
        self._proposed = b""
        self._cohort_asks: list[tuple[str, str]] = []
        self._absent: frozenset[str] | None = None  # keepers that have not joined the run
        self._told_again: set[str] = set()  # keepers that were offered the cohort's members a second time
        store.drop_all_asks(keepers)

    # Asking

    def offer(self, offer: Offer) -> None:
        """Show an update to every keeper, at the next `send`."""
        digest = offer_digest(offer.offer)
        self._offers[digest], self._offered[offer.offer.job] = offer.offer, digest
        self._unsent.append(offer.offer)

    def send(self) -> None:
        """Send the offers that have collected, in one round trip."""
        if self._unsent:
            offers, self._unsent = self._unsent, []
            self._ask(self._keepers, offers)

    def propose(self, cohort: Cohort, record: Mapping[str, Any] | None = None) -> None:
        """Ask every keeper for the masks of a cohort, with the ledger's record of what it spends; raises Fenced."""
        self.send()
        identity = self._store.identity
        assert identity
        self._cohort, self._told_again = cohort_id(identity.scope, cohort), set()
        self._proposed = identity.sign_cohort(cohort)
        before, asked = self._cohort_asks, self._store.propose(self._keepers, self._proposed, record)
        self._cohort_asks = [*asked.items()]
        self._drop(before)

    def committed(self, jobs: Iterable[str]) -> None:
        """Forget the cohort under way, whose version is committed with the updates of `jobs`."""
        self._cohort, asks, self._cohort_asks = "", self._cohort_asks, []
        self._drop([*asks, *self._forget(jobs)])

    def ended(self, jobs: Iterable[str]) -> None:
        """Forget the offers of jobs that have ended otherwise."""
        self._drop(self._forget(jobs))

    def _forget(self, jobs: Iterable[str]) -> list[tuple[str, str]]:
        """Forget the offers of jobs, and return their asks."""
        self.send()
        asks: list[tuple[str, str]] = []
        for job in jobs:
            if job in self._asks:
                asks += self._asks.pop(job)
                del self._offers[self._offered.pop(job)]
        return asks

    def _ask(self, keepers: Sequence[str], offers: Sequence[OfferMessage]) -> None:
        positions = self._store.ask(keepers, "offer", [offer.pack() for offer in offers])
        for offer, asked in zip(offers, positions, strict=True):
            self._asks.setdefault(offer.job, []).extend(asked.items())

    def _ask_again(self, keeper: str) -> None:
        (asked,) = self._store.ask([keeper], "cohort", [self._proposed])
        self._cohort_asks += asked.items()

    def _drop(self, asks: Sequence[tuple[str, str]]) -> None:
        if asks:
            self._store.drop_asks(asks)

    # Answers

    def absences(self) -> Iterator[Event]:
        """Yield an event if other keepers than before have not joined the run: their encryption key is missing.

        Once all have joined, a keeper that is away is one that does not answer.
        """
        if self._absent == frozenset():
            return
        absent = frozenset(keeper for keeper in self._keepers if not self._has_joined(keeper))
        if absent != self._absent:
            self._absent = absent
            yield KeepersAbsent(absent)

    def _has_joined(self, keeper: str) -> bool:
        """Whether the keeper has signed an encryption key for this run instance: that of a former one is of no use."""
        identity = self._store.identity
        assert identity
        try:
            identity.open_keeper(KEEPER, keeper, self._store.keeper_statement(keeper))
        except SignatureError:
            return False
        return True

    def answers(self) -> Iterator[Event]:
        """Yield the events of the keepers' next answers; one that is not valid is logged and ignored."""
        for answer in self._store.answers(self._after):
            self._after[answer.keeper] = answer.position
            try:
                events = self._events(answer)
            except (WireError, StoreError) as error:
                log.warning(
                    "ignoring an answer that is not valid; check the keys of the keeper",
                    keeper=answer.keeper, kind=answer.kind, error=str(error),
                )  # fmt: skip
            else:
                yield from events

    def _events(self, answer: Answer) -> Sequence[Event]:
        """Verify an answer; it has no events if it is about a cohort that is not under way."""
        identity, keeper = self._store.identity, answer.keeper
        assert identity
        if answer.kind not in (OPENED, MASKED, MASK_REFUSED):
            raise WireError(f"answer of kind {answer.kind!r}")
        body = identity.open_keeper(answer.kind, keeper, answer.body)
        if answer.kind == OPENED:
            return [
                UpdateOpened(keeper, offer.header, offer.refusal, offer.detail) for offer in read(Opened, body).offers
            ]
        event: Event | None = None
        if answer.kind == MASKED:
            masked = read(Masked, body)
            if masked.cohort == self._cohort:
                event = self._released(answer, masked)
        else:
            refused = read(MaskRefused, body)
            if refused.cohort == self._cohort:
                event = self._refused(keeper, refused)
        return [event] if event else []

    def _released(self, answer: Answer, masked: Masked) -> MasksReleased | None:
        """Return the release; None if Redis has not what the keeper stored, which is asked for again."""
        if (masked.nbytes, masked.chunks) != (self._nbytes, chunks_of(self._nbytes)):
            raise WireError(f"masks of {masked.nbytes} bytes in {masked.chunks} chunks, expected {self._nbytes}")
        prefix = self._store.keys.mask(self._cohort, answer.keeper)
        try:
            masks = read_words(partial(self._store.read_span, prefix), self._nbytes, masked.digest)
        except (SignatureError, StoreError) as error:
            log.warning(
                "the masks of a keeper are not as it stored them: asking again", keeper=answer.keeper, error=str(error)
            )
            self._ask_again(answer.keeper)
            return None
        sealed = {"digest": masked.digest, "answer": base64.b64encode(answer.body).decode()}
        return MasksReleased(answer.keeper, self._cohort, masks, sealed)

    def _refused(self, keeper: str, refused: MaskRefused) -> CohortRefused | None:
        """Return the refusal. A keeper that has forgotten members is offered them again, once, and asked again."""
        known = [self._offers[digest] for digest in refused.headers if digest in self._offers]
        if refused.reason == "unknown" and known and keeper not in self._told_again:
            self._told_again.add(keeper)
            self._ask([keeper], known)
            self._ask_again(keeper)
            return None
        log.warning("keeper refuses a cohort", keeper=keeper, reason=refused.reason, detail=refused.detail)
        return CohortRefused(keeper, refused.reason, refused.detail, frozenset(refused.headers))

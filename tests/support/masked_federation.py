"""Runs the coordinator's state machine with keepers that are a dictionary of seeds, and clients that mask by them.

Real keepers verify, encrypt and remember (tests/secure); these only answer, so that a test can say what and when.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedqueue.config.schema import Config
from fedqueue.protocol.messages import Cohort, MaskedUpdate, SealedSeed
from fedqueue.protocol.signed_envelope import Scope
from fedqueue.secure.cohort import cohort_id, offer_digest
from fedqueue.secure.masks import MaskStream, add_masks, weighted_mask_sum
from fedqueue.secure.ring import Ring, Words, ring_of
from fedqueue.tensors.frame import Frame
from fedqueue_coordinator.core.events import (
    Action,
    CohortRefused,
    Event,
    Load,
    MaskedUpdateLoaded,
    MasksReleased,
    Offer,
    Unmask,
    UpdateOpened,
    UpdateUnreadable,
    WholeWords,
)
from fedqueue_coordinator.core.federation import Federation
from fedqueue_coordinator.core.reasons import RejectionReason
from tests.support.builders import EXAMPLES, MANIFEST, make_config, make_frame
from tests.support.federation_run import Run

KEEPERS = ("north", "south")
SCOPE = Scope("run", "i" * 32)
D = MANIFEST.parameters


class MaskedRun(Run):
    """A `Run` with keepers. They answer at once, until `silent` names them; then `opens` and `releases` answer."""

    def __init__(self, config: Config, model: Frame) -> None:
        super().__init__(config, model)
        self.ring: Ring = ring_of(config, MANIFEST)
        self.silent: set[str] = set()
        """Keepers that do not answer by themselves."""
        self.pending: list[tuple[str, str]] = []
        """Keeper and offer, for each answer of a silent keeper."""
        self.offers: list[str] = []
        """Digests of all offers, in order."""
        self.proposed: list[Cohort] = []
        self.cohort: Cohort | None = None
        """What Redis has of the cohort under way."""
        self.masked: dict[str, Words] = {}  # job → its payload
        self.added_to_masks = 0
        """A lie that the keepers add to each word of their masks."""
        self._job_of_offer: dict[str, str] = {}
        self._seeds: dict[str, list[bytes]] = {}  # job → the seed of each keeper

    # Clients

    def post_masked(
        self,
        client: str,
        delta: npt.ArrayLike = 0.0,
        base: int | None = None,
        examples: int = EXAMPLES,
        lie: int = 0,
        **header: Any,
    ) -> list[Action]:
        """Post a masked update of the client's job; `delta` is clipped and rounded as a worker does.

        `lie` is added to each word.
        """
        job = self.job_of(client)
        base = self.federation.version if base is None else base
        values = np.broadcast_to(np.asarray(delta, np.float32), D).copy()
        rounding = MaskStream(hashlib.sha256(job.encode()).digest())
        self._seeds[job] = [hashlib.sha256(f"{job}/{keeper}".encode()).digest() for keeper in self.keepers]
        self.masked[job] = add_masks(self.ring.quantize(values, rounding.next_into), self._seeds[job])
        self.masked[job] += np.uint32(lie)
        fields = {
            "examples": examples, "encoding": "ring32", "nbytes": 4 * D, "chunks": 1, "seconds": 0.5,
            "model": hashlib.sha256(b"model").hexdigest(),
            "seeds": tuple(
                SealedSeed(component=i, keeper=keeper, key="k", sealed=job.encode())
                for i, keeper in enumerate(self.keepers)
            ),
        }  # fmt: skip
        return self.post(client, None, base, MaskedUpdate(**{**fields, **header}).pack())

    # Keepers

    @property
    def keepers(self) -> Sequence[str]:
        return self.config.secure.keepers

    def opens(self, keeper: str, offer: str, refusal: str = "") -> list[Action]:
        return self.tell(UpdateOpened(keeper, offer, refusal, refusal))

    def releases(self, keeper: str) -> list[Action]:
        assert self.cohort
        return self.tell(self._released(keeper, self.cohort))

    def refuses(self, keeper: str, reason: str, offers: Iterable[str] = ()) -> list[Action]:
        return self.tell(CohortRefused(keeper, reason, "because", frozenset(offers)))

    def offer_of(self, client: str) -> str:
        """The newest offer of the client."""
        return next(o for o in reversed(self.offers) if self._client_of_offer[o] == client)

    @property
    def _client_of_offer(self) -> dict[str, str]:
        known = {**self.jobs, **{line["job"]: line["client"] for line in self.merged}}
        known |= {r["job"]: r["client"] for r in self.ledger if r["kind"] == "rejected"}
        return {offer: known[job] for offer, job in self._job_of_offer.items()}

    def _released(self, keeper: str, cohort: Cohort) -> MasksReleased:
        index = self.keepers.index(keeper)
        seeds = [self._seeds[self._job_of_offer[offer]][index] for offer, _ in cohort.members]
        dither = hashlib.sha256(f"{keeper}/{cohort_id(SCOPE, cohort)}".encode()).digest()
        weights = [weight for _, weight in cohort.members]
        pieces = [p.copy() for p in weighted_mask_sum(seeds, weights, D, dither, self.ring.dither)]
        words = np.concatenate(pieces) + np.uint32(self.added_to_masks)
        return MasksReleased(keeper, cohort_id(SCOPE, cohort), WholeWords(words), {"digest": keeper})

    # Actions

    def _ask_keepers(self, action: Action) -> list[Event]:
        answering = [keeper for keeper in self.keepers if keeper not in self.silent]
        match action:
            case Offer(arrived, offer):
                digest = offer_digest(offer)
                self.offers.append(digest)
                self._job_of_offer[digest] = arrived.job
                self.pending += [(keeper, digest) for keeper in self.keepers if keeper in self.silent]
                return [UpdateOpened(keeper, digest) for keeper in answering]
            case Unmask(cohort, record):
                if record:
                    self.ledger.append(dict(record))
                self.cohort = cohort
                self.proposed.append(cohort)
                return [self._released(keeper, cohort) for keeper in answering]
        raise AssertionError(action)

    def _loaded(self, load: Load) -> Event:
        if load.arrived.job not in self.masked:
            return UpdateUnreadable(load, RejectionReason.UNREADABLE, "a chunk is gone")
        return MaskedUpdateLoaded(load, WholeWords(self.masked[load.arrived.job]))

    def restored_twin(self) -> Federation:
        committed, job_number, jobs, registered, last_jobs = self._began
        federation = Federation(
            self.config, committed.model.copy(), committed.version, job_number, committed.optimizer_state,
            committed.counters(self._ledger_before, self.config.dispatch.share_window),
            evaluates=False, proposed=self.cohort,
        )  # fmt: skip
        federation.restore_jobs(jobs, registered, last_jobs)
        return federation


def start_masked(*clients: str, buffer_size: int = 3, min_cohort: int = 2, **sections: Any) -> MaskedRun:
    """Start a run with two keepers at version 0, with these clients alive; a version adds the mean of K deltas."""
    secure = {"keepers": KEEPERS, "min_cohort": min_cohort, "weight_levels": 1, **sections.pop("secure", {})}
    aggregation = {"strategy": "fedbuff", "buffer_size": buffer_size, **sections.pop("aggregation", {})}
    all_clients = sections.pop("names", clients if len(clients) >= buffer_size else (*clients, "c7", "c8", "c9"))
    names = {"names": all_clients}
    config = make_config(secure=secure, aggregation=aggregation, clients=names, **sections)
    run = MaskedRun(config, make_frame())
    run.join(*clients)
    return run

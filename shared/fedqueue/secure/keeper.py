"""A keeper as a pure state machine: opens offered updates, and releases the sum of the masks of one cohort, once.

It has no clock, network or file. `fedqueue_keeper` drives it over Redis with a log on disk, the simulation in memory.

What keeps a client hidden, whatever the coordinator and Redis do:

- A seed is in at most one released cohort. The log says so durably before a mask leaves.
- A cohort has enough clients, none of which outweighs the others (`cohort.crowd_problem`).
- Each member's header is signed by a client of the keeper's own roster.
- No member weighs more than its staleness allows, by the base version in its signed header.
- All updates from one base version were trained from the same model.
- With client privacy, the sum of its masks has this keeper's own noise, and no client's account exceeds its budget.
- Versions do not go back within a term of the coordinator.

An answer is a function of the keeper's file and the cohort: the same cohort gets the same bytes again.
"""

from __future__ import annotations

import hmac
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, TypeAlias

import numpy as np

from fedqueue.config.schema import Config
from fedqueue.errors import SignatureError, WireError
from fedqueue.privacy.gaussian_dp import ClientBudget, client_budget
from fedqueue.privacy.gaussian_integers import integer_noise
from fedqueue.protocol.messages import MAX_OFFER_DETAIL, Cohort, MaskedUpdate, MaskRefused, Offer, OpenedOffer, read
from fedqueue.protocol.signed_envelope import DOMAIN, Scope, digest_of, unverified_body
from fedqueue.secure.cohort import cohort_id, crowd_problem, offer_digest
from fedqueue.secure.masks import weighted_mask_sum
from fedqueue.secure.ring import Words, level, ring_for
from fedqueue.secure.seed_envelope import KeeperPrivateKey, agreed_terms, seed_info

OfferProblem: TypeAlias = Literal["unmaskable", "keeper_lost", "foreign", "model", "spent"]
CohortProblem: TypeAlias = Literal["version", "unknown", "weight", "crowd", "model", "spent", "budget", "size"]
MAX_DETAIL = 500  # characters


class Verifier(Protocol):
    """Opens what others have signed; `KeeperIdentity` is one."""

    def open_update(self, offer: Offer) -> bytes:
        """The header in an offer; raises SignatureError unless a client of the roster signed it for just this job."""

    def open_cohort(self, data: bytes) -> bytes:
        """The packed `Cohort` in the envelope; raises SignatureError unless the coordinator signed it for this run."""


class Unverified:
    """A verifier for the simulation, where no message crosses a boundary: envelopes are opened, or absent."""

    def open_update(self, offer: Offer) -> bytes:
        """The header in an offer."""
        return unverified_body(offer.header)

    def open_cohort(self, data: bytes) -> bytes:
        """The packed `Cohort`."""
        return unverified_body(data)


@dataclass(frozen=True)
class Released:
    """What a log keeps of a released cohort."""

    cohort: str
    term: int
    version: int
    seeds: tuple[str, ...]
    """The digest of each member's seed."""
    models: tuple[tuple[int, str], ...]
    """Each base version of a member, with the digest of its model."""
    loads: tuple[tuple[str, int], ...] = ()
    """With client privacy: each client, with the sum of its members' weights."""


class KeeperLog(Protocol):
    """What a keeper remembers for a run instance. Whoever loses it must lose the keeper's private key, too."""

    def record(self, released: Released) -> None:
        """Remember a release. Once this returns, no crash can undo it."""

    def has(self, cohort: str) -> bool:
        """Whether the cohort of this id was released."""

    def spent(self, seeds: Sequence[str]) -> dict[str, int]:
        """Those of the digests of seeds that are in a released cohort, with its version."""

    def model(self, base: int) -> str:
        """The digest of the model of a base version that was in a released cohort; empty for any other."""

    def account(self, client: str) -> int:
        """Σ ℓ² over the loads of the client in released cohorts."""

    def newest_version(self, term: int) -> int:
        """The largest version of a cohort that was released in this term of the coordinator; -1 without any."""


class MemoryLog:
    """A log that lives as long as its process: for the simulation, whose key lives no longer."""

    def __init__(self) -> None:
        self._versions: dict[str, int] = {}
        self._spent: dict[str, int] = {}
        self._models: dict[int, str] = {}
        self._newest: dict[int, int] = {}
        self._accounts: Counter[str] = Counter()

    def record(self, released: Released) -> None:
        """Remember a release."""
        self._versions[released.cohort] = released.version
        self._spent.update(dict.fromkeys(released.seeds, released.version))
        self._models.update(released.models)
        self._accounts.update({client: load**2 for client, load in released.loads})
        self._newest[released.term] = max(released.version, self.newest_version(released.term))

    def has(self, cohort: str) -> bool:
        """Whether the cohort of this id was released."""
        return cohort in self._versions

    def spent(self, seeds: Sequence[str]) -> dict[str, int]:
        """Those of the digests of seeds that are in a released cohort, with its version."""
        return {seed: self._spent[seed] for seed in seeds if seed in self._spent}

    def model(self, base: int) -> str:
        """The digest of the model of a base version that was in a released cohort; empty for any other."""
        return self._models.get(base, "")

    def account(self, client: str) -> int:
        """Σ ℓ² over the loads of the client in released cohorts."""
        return self._accounts[client]

    def newest_version(self, term: int) -> int:
        """The largest version of a cohort that was released in this term of the coordinator; -1 without any."""
        return self._newest.get(term, -1)


@dataclass(frozen=True)
class OwnBudget:
    """What a client may spend in a run by a keeper's own policy."""

    epsilon: float
    delta: float


@dataclass(frozen=True)
class Release:
    """The answer to a cohort: its masks' weighted sum, minus the keeper's dither and noise, as words modulo 2³²."""

    cohort: str
    version: int
    updates: int
    clients: int
    nbytes: int
    _seeds: tuple[bytes, ...] = field(repr=False)
    _weights: tuple[int, ...]
    _dither_seed: bytes = field(repr=False)
    _dither: int
    _deviation: float

    def pieces(self) -> Iterator[Words]:
        """The sum, piece by piece; a piece is valid until the next one. Each call begins with the first."""
        words = self.nbytes // 4
        masks = weighted_mask_sum(self._seeds, self._weights, words, self._dither_seed, self._dither)
        return self._noisy(masks, words) if self._deviation else masks

    def _noisy(self, masks: Iterator[Words], words: int) -> Iterator[Words]:
        noises = integer_noise(self._dither_seed, "client noise", self._deviation, words)
        for piece, noise in zip(masks, noises, strict=True):
            np.subtract(piece, noise.astype(np.uint32), out=piece)
            yield piece

    def dithered_by(self, seed: bytes) -> Release:
        """The same release with dither and noise of `seed`: for the simulation, whose bits follow from its seed."""
        return replace(self, _dither_seed=seed)


@dataclass
class _Held:
    """An offered update whose seed is opened."""

    client: str
    base: int
    model: str
    seed: bytes = field(repr=False)
    seed_digest: str
    released: int | None
    """The version of the cohort that it was released in."""


class _RefusedOffer(Exception):
    def __init__(self, refusal: OfferProblem, detail: str) -> None:
        super().__init__(detail)
        self.refusal, self.detail = refusal, detail


class _RefusedCohort(Exception):
    def __init__(self, reason: CohortProblem, detail: str, headers: Iterable[str] = ()) -> None:
        super().__init__(detail)
        self.reason, self.detail, self.headers = reason, detail, tuple(headers)


class Keeper:
    """One keeper of one run instance."""

    def __init__(
        self,
        name: str,
        config: Config,
        parameters: int,
        scope: Scope,
        verifier: Verifier,
        log: KeeperLog,
        key: KeeperPrivateKey,
        secret: bytes,
        min_cohort: int = 0,
        own_budget: OwnBudget | None = None,
    ) -> None:
        """`config` is the run's, `parameters` the model's d, and `secret` 32 random bytes, which dithers and noise
        come from.

        `log`, `key` and `secret` live and die together. `min_cohort` is the keeper's own least number of clients; the
        larger of it and the run's holds. `own_budget` is what a client may spend by the keeper's own policy.
        """
        secure = config.secure
        self.name, self.component = name, secure.keepers.index(name)
        self.key = key
        self._config, self._scope, self._terms = config, scope, agreed_terms(config)
        self._verifier, self._log, self._secret = verifier, log, secret
        self._min_cohort = max(min_cohort, secure.min_cohort)
        self._ring = ring_for(config, parameters)
        self._budget, self._most = self._budgets(own_budget)
        self._held: dict[str, _Held] = {}  # by the offer's digest
        self._holder: dict[str, str] = {}  # digest of a seed → that of its offer
        self._term, self._least_version = 0, 0
        self.begin_term(0, 0)

    def begin_term(self, term: int, first_version: int) -> None:
        """Follow the coordinator into a term, which starts from `first_version`: Redis may have lost newer ones."""
        self._term, self._least_version = term, max(first_version, self._log.newest_version(term))

    def _budgets(self, own: OwnBudget | None) -> tuple[ClientBudget | None, int]:
        """What a client's loads cost, and its largest account: the smaller one of the run's and of the keeper's own."""
        settings = self._config.privacy.clients
        if not settings.on:
            return None, 0
        budget, most = client_budget(settings, self._config.secure.weight_levels)
        if own:
            most = min(most, replace(budget, delta=own.delta).within(own.epsilon))
        return budget, most

    # Offers

    def offer(self, offer: Offer) -> OpenedOffer:
        """Open an offered update, and hold its seed until its cohort is released; repeating it changes nothing.

        Holds it with the answer "spent", too, so that the cohort that has it can be released again.
        """
        digest = offer_digest(offer)
        try:
            held = self._held.get(digest) or self._hold(digest, self._opened(offer))
            if held.released is not None:
                raise _RefusedOffer("spent", f"its mask was released for version {held.released}")
            pinned = self._log.model(held.base)
            if pinned and pinned != held.model:
                raise _RefusedOffer("model", f"updates from version {held.base} were trained from another model")
        except _RefusedOffer as refused:
            return OpenedOffer(header=digest, refusal=refused.refusal, detail=refused.detail[:MAX_OFFER_DETAIL])
        return OpenedOffer(header=digest)

    def _opened(self, offer: Offer) -> _Held:
        try:
            body = self._verifier.open_update(offer)
        except SignatureError as error:
            raise _RefusedOffer("foreign", str(error)) from None
        try:
            update = read(MaskedUpdate, body)
            if [(seed.component, seed.keeper) for seed in update.seeds] != list(enumerate(self._config.secure.keepers)):
                raise WireError(f"it has no seed for each of the keepers {', '.join(self._config.secure.keepers)}")
            if (update.encoding, update.nbytes) != ("ring32", 4 * self._ring.words):
                raise WireError(f"{update.nbytes} bytes of {update.encoding}, not {4 * self._ring.words} of ring32")
            sealed = update.seeds[self.component]
            if sealed.key != self.key.id:
                raise _RefusedOffer("keeper_lost", f"encrypted to key {sealed.key}; this keeper has {self.key.id}")
            seed = self.key.open_seed(sealed.sealed, self._info(offer, update))
        except WireError as error:
            raise _RefusedOffer("unmaskable", str(error)) from None
        digest = digest_of(b"fedqueue/1 seed" + seed)
        released = self._log.spent([digest]).get(digest)
        return _Held(offer.client, offer.base, update.model, seed, digest, released)

    def _info(self, offer: Offer, update: MaskedUpdate) -> bytes:
        return seed_info(
            self._scope, self._terms, offer.client, offer.job, offer.attempt, offer.base, update.model, update.digest,
            self.component, self.name, self._ring.words,
        )  # fmt: skip

    def _hold(self, digest: str, held: _Held) -> _Held:
        if self._holder.setdefault(held.seed_digest, digest) != digest:
            raise _RefusedOffer("unmaskable", "its seed is that of another update")
        self._held[digest] = held
        return held

    # Cohorts

    def release(self, signed_cohort: bytes) -> Release | MaskRefused:
        """Release the masks of a cohort, after its log has it; a cohort that was released is released again.

        Raises SignatureError unless the coordinator signed the cohort for this run, and WireError for other bytes.
        """
        cohort = read(Cohort, self._verifier.open_cohort(signed_cohort))
        name = cohort_id(self._scope, cohort)
        try:
            members = self._members(cohort)
            if not self._log.has(name):
                self._check(cohort, members)
                self._record(name, cohort, members)
        except _RefusedCohort as refused:
            return MaskRefused(
                cohort=name, reason=refused.reason, detail=refused.detail[:MAX_DETAIL], headers=refused.headers
            )
        return Release(
            name, cohort.version, len(members), len({held.client for held in members}), 4 * self._ring.words,
            tuple(held.seed for held in members), tuple(weight for _, weight in cohort.members),
            hmac.digest(self._secret, f"{DOMAIN} dither {name}".encode(), "sha256"), self._ring.dither,
            self._ring.deviation,
        )  # fmt: skip

    def _members(self, cohort: Cohort) -> list[_Held]:
        unknown = [header for header, _ in cohort.members if header not in self._held]
        if unknown:
            raise _RefusedCohort("unknown", f"{len(unknown)} members were not offered to this keeper", unknown)
        return [self._held[header] for header, _ in cohort.members]

    def _check(self, cohort: Cohort, members: Sequence[_Held]) -> None:
        """Raise _RefusedCohort unless the masks of this cohort may be released, which no released cohort has."""
        headers, weights = zip(*cohort.members, strict=True)
        version, secure = cohort.version, self._config.secure
        if version < self._least_version:
            raise _RefusedCohort("version", f"version {version} is before {self._least_version}, which was released")
        if sum(weights) > self._ring.most_weight:
            detail = f"weights of {sum(weights)}, at most {self._ring.most_weight} is allowed"
            raise _RefusedCohort("size", f"{detail} in a sum of updates without an overflow")
        wrong = [
            header
            for header, held, weight in zip(headers, members, weights, strict=True)
            if held.base > version or weight > level(version - held.base, self._config)
        ]
        if wrong:
            raise _RefusedCohort("weight", f"{len(wrong)} weights are larger than their staleness allows", wrong)
        crowd = zip((held.client for held in members), weights, strict=True)
        if problem := crowd_problem(crowd, self._min_cohort, secure.weight_levels):
            raise _RefusedCohort("crowd", problem)
        if odd := self._of_another_model(headers, members):
            detail = f"{len(odd)} members were trained from another model than others from the same version"
            raise _RefusedCohort("model", detail, odd)
        spent = self._log.spent([held.seed_digest for held in members])
        repeated = Counter(headers)
        again = [h for h, held in zip(headers, members, strict=True) if held.seed_digest in spent or repeated[h] > 1]
        if again:
            raise _RefusedCohort("spent", f"{len(again)} members are in another cohort", dict.fromkeys(again))
        self._check_budget(headers, members, _loads(members, weights))

    def _check_budget(self, headers: Sequence[str], members: Sequence[_Held], loads: Mapping[str, int]) -> None:
        if self._budget is None:
            return
        over = {client for client, load in loads.items() if self._log.account(client) + load**2 > self._most}
        if over:
            client = min(over)
            spent = self._budget.epsilon(self._log.account(client))
            detail = (
                f"{len(over)} clients have used up their privacy budget: {client} has spent ε = {spent:.3f} at δ = "
                f"{self._budget.delta:g}, of at most {self._budget.epsilon(self._most):.3f}"
            )
            named = [header for header, held in zip(headers, members, strict=True) if held.client in over]
            raise _RefusedCohort("budget", detail, named)

    def _of_another_model(self, headers: Sequence[str], members: Sequence[_Held]) -> list[str]:
        """The members whose model is not that of their base: not the released one, or without it not the commonest."""
        count = Counter((held.base, held.model) for held in members)
        model_of = {
            base: self._log.model(base) or max((n, model) for (b, model), n in count.items() if b == base)[1]
            for base in {held.base for held in members}
        }
        return [h for h, held in zip(headers, members, strict=True) if held.model != model_of[held.base]]

    def _record(self, name: str, cohort: Cohort, members: Sequence[_Held]) -> None:
        seeds = tuple(held.seed_digest for held in members)
        models = tuple(sorted({(held.base, held.model) for held in members}))
        loads = _loads(members, [weight for _, weight in cohort.members]) if self._budget else {}
        self._log.record(Released(name, self._term, cohort.version, seeds, models, tuple(sorted(loads.items()))))
        self._least_version = cohort.version
        for held in members:
            held.released = cohort.version
        self._forget(cohort.version)

    def _forget(self, version: int) -> None:
        """Drop what no cohort from this version on can have: it is offered again where it is needed all the same."""
        stalest = version - self._config.aggregation.max_staleness
        for digest, held in list(self._held.items()):
            if held.base < stalest or (held.released is not None and held.released < version):
                del self._held[digest], self._holder[held.seed_digest]


def _loads(members: Sequence[_Held], weights: Sequence[int]) -> Counter[str]:
    """Client → the sum of the weights of its members."""
    loads: Counter[str] = Counter()
    for held, weight in zip(members, weights, strict=True):
        loads[held.client] += weight
    return loads

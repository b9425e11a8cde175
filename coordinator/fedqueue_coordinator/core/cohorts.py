"""The masked updates of a run with keepers, from their arrival to the version that has their weighted sum.

    arrived → every keeper has opened its seed → ready → member of the coming cohort → released by every keeper

An update is ready once every keeper has said that it can take the update's mask off. Ready updates become members in
the order of their arrival, as long as the weights of a client's members add up to at most W = `weight_levels`: a
further update of the client waits for the next version. A cohort is full if it has K members and is a crowd: at least
m = `min_cohort` clients, and m · (weight of any client) ≤ Σ w. While the keepers release a cohort, no member is added.

A member's weight is an integer: W · s(τ), rounded, at the version that the cohort is merged into. Members whose weights
make no crowd, and which no client can add to, are levelled down: to the m-th largest weight of a client.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fedqueue.config.schema import Config
from fedqueue.config.secure import MAX_MEMBERS
from fedqueue.protocol.messages import Cohort, MaskedUpdate
from fedqueue.secure.cohort import crowd_problem
from fedqueue.secure.ring import level
from fedqueue_coordinator.core.events import UpdateArrived, UpdateOpened


@dataclass
class Waiting:
    """An update that is no member yet."""

    digest: str
    """Of its offer."""
    arrived: UpdateArrived
    header: MaskedUpdate
    since: float
    """When it was offered to the keepers."""
    unopened: set[str]
    """The keepers that have not answered yet."""
    refusal: UpdateOpened | None = None
    """The refusal of a keeper, of an update that is a member all the same (see `Cohorts.is_settled`)."""


@dataclass(frozen=True)
class Member:
    """An update whose payload is in the sum."""

    update: Waiting
    weight: int


class Cohorts:
    """Which updates wait, which are members of the coming cohort, and what the keepers have not answered yet."""

    def __init__(self, config: Config, proposed: Cohort | None = None) -> None:
        """`proposed`: the cohort that a former coordinator has shown to the keepers; it is made again as it was."""
        self.members: list[Member] = []
        """In the order in which they were added."""
        self.loading: Waiting | None = None
        """The update whose payload is being read."""
        self._config = config
        self._keepers = config.secure.keepers
        self._levels = config.secure.weight_levels
        self._level_of: dict[int, int] = {}  # staleness → weight
        self._waiting: dict[str, Waiting] = {}  # digest → update, in the order of arrival
        # Digest → weight of the members of the coming cohort, where they are settled before their payloads are added.
        self._settled = dict(proposed.members) if proposed else {}
        self._unanswered: set[str] = set()  # keepers whose answer to the cohort under way is awaited
        self._proposed_at = 0.0
        self._absent: dict[str, float] = {}  # keeper without an encryption key → since when

    # Arrival

    def offer(self, digest: str, arrived: UpdateArrived, header: MaskedUpdate, now: float) -> None:
        """Add an update that is now offered to every keeper."""
        self._waiting[digest] = Waiting(digest, arrived, header, now, set(self._keepers))

    def is_settled(self, digest: str) -> bool:
        """Whether the update is to be a member of the coming cohort, as a former coordinator has proposed it."""
        return digest in self._settled

    def is_member(self, digest: str) -> bool:
        """Whether the update is in the sum."""
        return any(member.update.digest == digest for member in self.members)

    def opened(self, digest: str, keeper: str) -> Waiting | None:
        """Note that the keeper has answered the offer of an update that waits or is a member; return the update."""
        update = self._waiting.get(digest) or next((m.update for m in self.members if m.update.digest == digest), None)
        if update:
            update.unopened.discard(keeper)
        return update

    def drop(self, job: str) -> None:
        """Forget the waiting update of a job, which is rejected."""
        for update in [update for update in self._waiting.values() if update.arrived.job == job]:
            del self._waiting[update.digest]
            if self.loading is update:
                self.loading = None

    # Members

    def weight(self, update: Waiting, version: int) -> int:
        """The weight of an update at `version`."""
        return self._settled.get(update.digest) or self._level(update.arrived.base, version)

    def load(self, client: str, update: Waiting, version: int) -> int:
        """The sum of the weights of the client's members and of this update."""
        return self.loads()[client] + self.weight(update, version)

    def _level(self, base: int, version: int) -> int:
        staleness = max(0, version - base)
        if (known := self._level_of.get(staleness)) is None:
            known = self._level_of[staleness] = level(staleness, self._config)
        return known

    def next(self, version: int) -> Waiting | None:
        """The next update to load at `version`, or None; the caller loads it, and then calls `add` or `drop`."""
        if self.loading or self.under_way or len(self.members) >= MAX_MEMBERS:
            return None
        self.loading = next(self._eligible(version), None)
        return self.loading

    def add(self, weight: int) -> None:
        """Make the update that was loaded a member."""
        assert self.loading
        del self._waiting[self.loading.digest]
        self.members.append(Member(self.loading, weight))
        self.loading = None

    def _eligible(self, version: int) -> Iterator[Waiting]:
        """Updates that may become members at `version`, in the order of their arrival."""
        weights = self.loads()
        for update in self._waiting.values():
            client, weight = update.arrived.client, self._level(update.arrived.base, version)
            if self._settled:
                if 0 < self._settled.get(update.digest, 0) <= weight:
                    yield update
            elif not update.unopened and weights[client] + weight <= self._levels:
                yield update

    def loads(self) -> Counter[str]:
        """Client → the sum of the weights of its members."""
        weights: Counter[str] = Counter()
        for member in self.members:
            weights[member.update.arrived.client] += member.weight
        return weights

    # Slots

    def is_ahead(self, client: str, version: int, *arriving: int) -> bool:
        """Whether the client has posted more than one version takes of a client, so that it needs no further job now.

        `arriving`: the bases of updates of the client that arrive at this moment.
        """
        arrives = sum(self._level(base, version) for base in arriving)
        return self._posted_weights(version)[client] + arrives > self._levels

    def caught_up(self, clients: Iterable[str], version: int) -> list[str]:
        """Those of the clients that are not ahead, in the order of their names."""
        posted = self._posted_weights(version)
        return sorted(client for client in clients if posted[client] <= self._levels)

    def _posted_weights(self, version: int) -> Counter[str]:
        """Client → the weights of its members and of its updates that wait, as they are at `version`."""
        weights = self.loads()
        for update in self._waiting.values():
            weights[update.arrived.client] += self._level(update.arrived.base, version)
        return weights

    @property
    def backlog(self) -> int:
        """The number of updates that wait for a keeper."""
        if self.under_way:
            return len(self._waiting)
        return sum(bool(update.unopened) for update in self._waiting.values())

    def left_over(self, version: int) -> int:
        """The number of updates that wait for another version than the coming one, which has enough of their clients.

        0 while a cohort is under way: which version takes them is not known yet.
        """
        if self.under_way or self._settled:
            return 0
        waits = [update for update in self._waiting.values() if not update.unopened and update is not self.loading]
        return len(waits) - sum(1 for update in self._eligible(version) if update is not self.loading)

    @property
    def arrived(self) -> list[UpdateArrived]:
        """The updates that wait and are not being loaded, in the order of their arrival."""
        return [update.arrived for update in self._waiting.values() if update is not self.loading]

    # The cohort

    @property
    def is_full(self) -> bool:
        """Whether the members make a version."""
        if self._settled:
            return len(self.members) == len(self._settled)
        return len(self.members) >= self._config.buffer_size and self.is_crowd

    @property
    def is_crowd(self) -> bool:
        """Whether the keepers release the sum of the present members."""
        return bool(self.members) and not self.stalled

    def may_grow(self, version: int) -> bool:
        """Whether an update that has arrived may still become a member."""
        waits = self.loading or self.under_way or self.backlog
        return bool(waits) or next(self._eligible(version), None) is not None

    def propose(self, version: int, now: float) -> Cohort:
        """The cohort of the present members, which every keeper is asked to release."""
        self._unanswered, self._proposed_at, self._settled = set(self._keepers), now, {}
        return Cohort(version=version, members=tuple((m.update.digest, m.weight) for m in self.members))

    @property
    def is_incomplete(self) -> bool:
        """Whether a cohort is settled and nothing is left that could complete it."""
        return bool(self._settled) and not self.loading

    def unsettle(self) -> list[tuple[UpdateArrived, UpdateOpened]]:
        """Give up the settled cohort: its updates wait as others do. Returns the refusals that were put off for them.

        The caller empties the sum.
        """
        self._settled = {}
        self.give_back(self.take_members())
        return [(update.arrived, update.refusal) for update in self._waiting.values() if update.refusal]

    def level_down(self) -> bool:
        """Settle a cohort of the members with smaller weights, which is a crowd; False if too few clients have one.

        Each client weighs as much as the m-th largest does at most. A member for which nothing is left waits for
        another version. The caller takes the members, gives them back, and loads them again.
        """
        least, weights = self._config.secure.min_cohort, self.loads()
        if len(weights) < least:
            return False
        left = dict.fromkeys(weights, sorted(weights.values())[-least])
        for member in self.members:
            client = member.update.arrived.client
            if weight := min(member.weight, left[client]):
                self._settled[member.update.digest] = weight
                left[client] -= weight
        return True

    @property
    def under_way(self) -> bool:
        """Whether the keepers are asked to release the present members."""
        return bool(self._unanswered)

    def awaits(self, keeper: str) -> bool:
        """Whether the cohort under way lacks the keeper's answer."""
        return keeper in self._unanswered

    def answered(self, keeper: str) -> bool:
        """Note that the keeper has released or refused the cohort; return whether all have."""
        self._unanswered.discard(keeper)
        return not self._unanswered

    def take_members(self) -> list[Member]:
        """Empty the cohort, which is merged or rejected; return its members."""
        members, self.members = self.members, []
        self._unanswered = set()
        return members

    def give_back(self, members: Iterable[Member]) -> None:
        """Let these members of a refused cohort wait for the next one, before all others."""
        self._waiting = {member.update.digest: member.update for member in members} | self._waiting

    # What the keepers have not answered

    def absent(self, keepers: Iterable[str], now: float) -> None:
        """Note which keepers have not begun to take part in this run instance."""
        self._absent = {keeper: self._absent.get(keeper, now) for keeper in sorted(keepers)}

    def has_begun(self, keeper: str) -> bool:
        """Whether the keeper has begun to take part in this run instance."""
        return keeper not in self._absent

    @property
    def awaited(self) -> tuple[str, float] | None:
        """The keeper that has been awaited for longest, and since when; None if no keeper is awaited."""
        waits = [(self._proposed_at, keeper) for keeper in self._unanswered]
        waits += [(since, keeper) for keeper, since in self._absent.items()]
        waits += [(update.since, keeper) for update in self._waiting.values() for keeper in update.unopened]
        since, keeper = min(waits, default=(0.0, ""))
        return (keeper, since) if keeper else None

    @property
    def stalled(self) -> str:
        """Why the members make no version, if no other client adds to them; an empty string if they do, or for none."""
        weights = [(member.update.arrived.client, member.weight) for member in self.members]
        return crowd_problem(weights, self._config.secure.min_cohort, self._levels) if weights else ""

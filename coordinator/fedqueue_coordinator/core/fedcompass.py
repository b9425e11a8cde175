"""Semi-asynchronous scheduling after FedCompass: fast clients take more local steps, so that groups arrive together.

Li et al., arXiv 2309.14675, §3. The scheduler learns s_i, the seconds per local step of each client. A free client
joins the group whose expected arrival T it can meet with the most steps, q = ⌊(T − now) / s_i⌋, Q_min ≤ q ≤ Q_max.
If there is no such group, the client opens one. Its q is the largest, at most Q_max, with which it would arrive
together with the next arrival of a present group (that group's latest arrival, plus Q_max steps of its fastest
client). A group waits for its members until all have arrived, or until its latest arrival, which is now + λ · q · s_i
when it is opened. Then a version is made, and its members get new jobs, the fastest first. A client's first job has
Q_min steps and no group. It measures the client's speed, and its update makes a version alone.

Difference from the paper: the paper has a buffer for each group, and merges late updates with those of the next
group. Here all updates wait in one buffer. So a version also contains the updates of other groups that have arrived,
and no update waits longer than in the paper. The aggregation decides how a version's updates are merged; the
scheduler does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from fedqueue.config.dispatch import FedCompassConfig
from fedqueue_coordinator.core.selection import Selection


@dataclass
class Group:
    """Clients that are scheduled to arrive together. Times are seconds of the run's clock."""

    expected: float
    latest: float
    training: set[str] = field(default_factory=set)
    arrived: set[str] = field(default_factory=set)
    """Members whose update is here, which wait for the others."""

    @property
    def members(self) -> set[str]:
        """All clients of the group."""
        return self.training | self.arrived

    def is_over(self, now: float) -> bool:
        """Whether every member has arrived, or the latest arrival has passed."""
        return not self.training or now >= self.latest


@dataclass(frozen=True)
class RunningJob:
    """A job that is being trained: the time of its dispatch, and its number of steps."""

    since: float
    steps: int


class FedCompass:
    """Assigns steps and groups.

    `step_seconds` (client → s_i) is restored from the ledger: a version's record has the speeds that were measured
    since the version before. Groups are not restored: a resumed run begins new ones.
    """

    def __init__(self, config: FedCompassConfig, step_seconds: dict[str, float]) -> None:
        self._config, self._step_seconds = config, step_seconds
        self.groups: list[Group] = []
        self._group_of: dict[str, Group] = {}
        self._underway: dict[str, RunningJob] = {}
        self._measured: dict[str, float] = {}  # the part of `step_seconds` that no version records yet

    @property
    def selection(self) -> Selection:
        """The rule that the fastest client gets the next job; clients of unknown speed come before all others."""
        return Selection(rank=lambda client, stats: self._step_seconds.get(client, 0.0), draws=False)

    def assign(self, client: str, now: float) -> int:
        """Return the number of steps of the client's next job, which begins now; add the client to a group."""
        seconds = self._step_seconds.get(client)
        if seconds is None:
            self._underway[client] = RunningJob(now, self._config.min_steps)
            return self._config.min_steps
        group, steps = self._join(seconds, now) or self._open(seconds, now)
        group.training.add(client)
        self._group_of[client] = group
        self._underway[client] = RunningJob(now, steps)
        return steps

    def _join(self, seconds: float, now: float) -> tuple[Group, int] | None:
        reachable = [
            (steps, -i, group)
            for i, group in enumerate(self.groups)
            if self._config.min_steps
            <= (steps := math.floor((group.expected - now) / seconds))
            <= self._config.max_steps
        ]
        if not reachable:
            return None
        steps, _, group = max(reachable, key=lambda choice: choice[:2])
        return group, steps

    def _open(self, seconds: float, now: float) -> tuple[Group, int]:
        later = [
            math.floor((self._next_arrival(group) - now) / seconds)
            for group in self.groups
            if now < group.latest and group.members
        ]
        fitting = [steps for steps in later if steps <= self._config.max_steps]
        steps = max(self._config.min_steps, *fitting) if fitting else self._config.max_steps
        group = Group(now + steps * seconds, now + self._config.latest_factor * steps * seconds)
        self.groups.append(group)
        return group, steps

    def _next_arrival(self, group: Group) -> float:
        """Time at which the group would arrive again, if its fastest member then took Q_max steps."""
        fastest = min(self._step_seconds[client] for client in group.members)
        return group.latest + fastest * self._config.max_steps

    def arrived(self, client: str, now: float) -> bool:
        """Learn the client's speed from its update; return whether that update makes a version at once, alone."""
        job = self._underway.pop(client, None)
        if job:
            measured = max(now - job.since, 1e-9) / job.steps
            known = self._step_seconds.get(client, measured)
            self._step_seconds[client] = known + self._config.speed_momentum * (measured - known)
            self._measured[client] = self._step_seconds[client]
        group = self._group_of.get(client)
        if group is None:
            return True
        group.training.discard(client)
        if group in self.groups:
            group.arrived.add(client)
        else:  # too late: its group is closed, so the client waits for no other
            del self._group_of[client]
        return False

    def take_measured(self) -> dict[str, float]:
        """Return the speeds that were measured since the last call: client → s_i."""
        measured, self._measured = self._measured, {}
        return measured

    def lost(self, client: str) -> None:
        """Remove a client whose job ended without an update, or whose update was rejected."""
        self._underway.pop(client, None)
        group = self._group_of.pop(client, None)
        if group:
            group.training.discard(client)
            group.arrived.discard(client)

    def waits(self, client: str) -> bool:
        """Whether the client has arrived and waits for the others of its group."""
        group = self._group_of.get(client)
        return group is not None and client in group.arrived

    def close_groups(self, now: float) -> list[str]:
        """Close groups that are complete or past their deadline; return their clients that arrived."""
        free: list[str] = []
        for group in [group for group in self.groups if group.is_over(now)]:
            self.groups.remove(group)
            free += sorted(group.arrived)
            for client in group.arrived:
                del self._group_of[client]
        return free

    def next_deadline(self) -> float | None:
        """The earliest latest arrival of the groups in which a client waits, or None."""
        return min((group.latest for group in self.groups if group.arrived), default=None)

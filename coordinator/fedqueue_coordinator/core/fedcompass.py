"""Semi-asynchronous scheduling after FedCompass: fast clients take more local steps, so that groups arrive together.

Li et al., arXiv 2309.14675, §3. The scheduler learns how many seconds a step takes each client, s_i. A client that is
free joins the group with whose expected arrival T it can be on time with the most steps, q = ⌊(T − now) / s_i⌋,
Q_min ≤ q ≤ Q_max. Where there is none, it opens a group of its own: its q is the largest, at most Q_max, with which it
would arrive together with the next turn of some present group (that group's latest arrival, then Q_max steps of its
fastest client). A group waits for its members until all have come, or until its latest arrival, now + λ · q · s_i at
its opening; then a version is made and its members get new jobs, the fastest first. A client's first job has Q_min
steps and no group, which is how its speed becomes known: it makes a version alone.

Where we differ: the paper has a buffer for each group, and merges late updates with the next group's. Here all wait in
one buffer, so a version also has the updates of other groups that have come by then: none of them waits longer than in
the paper. What becomes of a version's updates is the aggregation mode's affair, not the scheduler's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from fedqueue.config.dispatch import FedCompassConfig


@dataclass
class Group:
    """Clients that are to arrive together; times are of the run's clock."""

    expected: float
    latest: float
    training: set[str] = field(default_factory=set)
    arrived: set[str] = field(default_factory=set)
    """Those that wait for the others."""

    @property
    def members(self) -> set[str]:
        return self.training | self.arrived

    def is_over(self, now: float) -> bool:
        return not self.training or now >= self.latest


@dataclass(frozen=True)
class RunningJob:
    """A job: when it was dispatched, and with how many steps."""

    since: float
    steps: int


class FedCompass:
    """`step_seconds` (client → s_i) is committed with every version; groups are not: a successor begins new ones."""

    def __init__(self, config: FedCompassConfig, step_seconds: dict[str, float]) -> None:
        self._config, self._step_seconds = config, step_seconds
        self.groups: list[Group] = []
        self._group_of: dict[str, Group] = {}
        self._underway: dict[str, RunningJob] = {}

    def fastest(self, clients: Sequence[str]) -> str:
        """Who is assigned first; clients of unknown speed come before all others."""
        return min(clients, key=lambda client: (self._step_seconds.get(client, 0.0), client))

    def assign(self, client: str, now: float) -> int:
        """How many steps the client's next job has, which begins now; the client is a member of a group from now on."""
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
        turns = [
            math.floor((self._next_turn(group) - now) / seconds)
            for group in self.groups
            if now < group.latest and group.members
        ]
        fitting = [steps for steps in turns if steps <= self._config.max_steps]
        steps = max(self._config.min_steps, *fitting) if fitting else self._config.max_steps
        group = Group(now + steps * seconds, now + self._config.latest_factor * steps * seconds)
        self.groups.append(group)
        return group, steps

    def _next_turn(self, group: Group) -> float:
        """When the group would arrive again, if its fastest member then took as many steps as it may."""
        fastest = min(self._step_seconds[client] for client in group.members)
        return group.latest + fastest * self._config.max_steps

    def arrived(self, client: str, now: float) -> bool:
        """The client's update is here: its speed is learned. True where it is to make a version at once, alone."""
        job = self._underway.pop(client, None)
        if job:
            measured = max(now - job.since, 1e-9) / job.steps
            known = self._step_seconds.get(client, measured)
            self._step_seconds[client] = known + self._config.speed_momentum * (measured - known)
        group = self._group_of.get(client)
        if group is None:
            return True
        group.training.discard(client)
        if group in self.groups:
            group.arrived.add(client)
        else:  # too late: it is not waited for, and waits for nobody
            del self._group_of[client]
        return False

    def lost(self, client: str) -> None:
        """The client's job ended without an update, or its update was rejected."""
        self._underway.pop(client, None)
        group = self._group_of.pop(client, None)
        if group:
            group.training.discard(client)
            group.arrived.discard(client)

    def waits(self, client: str) -> bool:
        """Whether the client has arrived, and waits for the others of its group."""
        group = self._group_of.get(client)
        return group is not None and client in group.arrived

    def close_groups(self, now: float) -> list[str]:
        """End the groups that nobody is waited for any more; returns the clients that are free to train again."""
        free: list[str] = []
        for group in [group for group in self.groups if group.is_over(now)]:
            self.groups.remove(group)
            free += sorted(group.arrived)
            for client in group.arrived:
                del self._group_of[client]
        return free

    def next_deadline(self) -> float | None:
        """When the next group ends at the latest that somebody has arrived for."""
        return min((group.latest for group in self.groups if group.arrived), default=None)

"""A keeper that dies at any step of its file or its answers releases the same bytes afterwards, or had released none.

Each statement of SQLite and each command of Redis is a step. The process is dropped there as by a kill: nothing after
the step happens, and an open transaction is never committed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from fedqueue.protocol.messages import Masked
from fedqueue_keeper import release_log
from fedqueue_keeper.process import KeeperProcess
from tests.keeper.test_keeper_process import Site
from tests.support.masked_run import MaskedRun, Posted

MOST_STEPS = 100


class Killed(BaseException):
    """The process has died."""


class Steps:
    """Counts steps; dies before or after the step that a test names."""

    def __init__(self) -> None:
        self.done, self.dies_at, self.after = 0, -1, False
        self.connections: list[Any] = []

    def arm(self, at: int, after: bool) -> None:
        self.done, self.dies_at, self.after = 0, at, after

    def step(self, operation: Any) -> Any:
        self.done += 1
        dies = self.done == self.dies_at
        if dies and not self.after:
            raise Killed
        result = operation()
        if dies:
            raise Killed
        return result

    def died(self) -> None:
        """Let the system take back what the dead process held: its lock, and an open transaction."""
        for connection in self.connections:
            connection.close()
        self.connections.clear()


class Database:
    """A connection of SQLite whose statements are steps. After a death it does no more, as in a killed process."""

    def __init__(self, connection: Any, steps: Steps) -> None:
        self._connection, self._steps, self._dead = connection, steps, False

    def execute(self, *arguments: Any) -> Any:
        return self._run(lambda: self._connection.execute(*arguments))

    def executemany(self, *arguments: Any) -> Any:
        return self._run(lambda: self._connection.executemany(*arguments))

    def _run(self, operation: Any) -> Any:
        if self._dead:
            raise Killed
        try:
            return self._steps.step(operation)
        except Killed:
            self._dead = True
            raise

    def close(self) -> None:
        """Do nothing: a killed process closes nothing in an orderly way; `Steps.died` gives up the lock."""


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    steps = Steps()
    whole = release_log.ReleaseLog._open

    def opened(self: release_log.ReleaseLog) -> Any:
        connection = whole(self)
        steps.connections.append(connection)
        return Database(connection, steps)

    monkeypatch.setattr(release_log.ReleaseLog, "_open", opened)
    monkeypatch.setattr("fedqueue_keeper.process.LOOK_SECONDS", 0.001)
    return steps


@pytest.fixture
def site(tmp_path: Path, fake_client: redis.Redis, steps: Steps, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    run = MaskedRun(tmp_path, weight_levels=2)
    run.write(fake_client)
    site = Site(run, fake_client)
    for name in ("set", "get", "xread", "hmget"):
        whole = getattr(fake_client, name)
        monkeypatch.setattr(
            fake_client, name, lambda *a, whole=whole, **k: steps.step(lambda: whole(*a, **k)), raising=True
        )
    said = site.store.say
    monkeypatch.setattr(site.store, "say", lambda *a: steps.step(lambda: said(*a)))
    yield site
    steps.died()


def killed(process: KeeperProcess, site: Site) -> bool:
    """Whether the process dies in its next two looks and reads."""
    try:
        for _ in range(2):
            site.step()
    except Killed:
        return True
    return False


def masks_of(site: Site) -> set[bytes]:
    """Every mask that lies in Redis."""
    client: Any = site.client
    return {client.execute_command("GET", key) for key in client.execute_command("KEYS", "*:mask:*")}


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_death_at_each_step_leads_to_the_same_bytes(site: Site, steps: Steps, after: bool) -> None:
    steps.arm(-1, after)
    site.step()
    site.use_published_key()
    for at in range(1, MOST_STEPS):
        updates = [site.run.post(client, vector=5) for client in "abc"]
        site.offer(*updates)
        site.ask("cohort", site.run.propose(at, updates))
        steps.arm(at, after)
        dead = killed(site.process, site)
        seen = masks_of(site)
        steps.arm(-1, after)
        if dead:
            steps.died()
            site.start()
            for _ in range(2):
                site.step()
        masked = [answer for answer in site.said() if isinstance(answer, Masked)]
        assert masked
        assert seen <= {site.mask(masked[-1]).tobytes()}
        assert masks_of(site) == {site.mask(masked[-1]).tobytes()}
        site.client.flushdb()  # the version was committed
        site.run.write(site.client)
        site.step()
        site.use_published_key()
        if not dead:
            assert at > 15, "the steps were not counted"
            return
    raise AssertionError("the keeper never came to its end")


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_death_while_the_key_is_made_leaves_a_usable_file(site: Site, steps: Steps, after: bool) -> None:
    for at in range(1, MOST_STEPS):
        site.client.flushdb()
        site.run.write(site.client)
        for path in site.files:
            path.unlink()
        site.start()
        steps.arm(at, after)
        dead = killed(site.process, site)
        client: Any = site.client
        published = client.execute_command("GET", site.keys.keeper("k0"))
        steps.died()
        steps.arm(-1, after)
        site.start()
        site.step()
        assert published in (None, site.published())
        steps.died()
        if not dead:
            assert at > 10, "the steps were not counted"
            return
    raise AssertionError("the keeper never came to its end")


def test_other_cohort_after_a_death_is_refused(site: Site, steps: Steps) -> None:
    """A death after the record, before any byte left: the seeds are spent, and another cohort gets nothing."""
    steps.arm(-1, after=True)
    site.step()
    site.use_published_key()
    updates: list[Posted] = [site.run.post(client) for client in "abcd"]
    site.offer(*updates)
    site.ask("cohort", site.run.propose(0, updates))
    set_ = [0]

    def dies(*arguments: Any, **options: Any) -> None:
        set_[0] += 1
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(site.client, "set", dies)
        assert killed(site.process, site)
    assert set_ == [1]
    steps.died()
    site.client.delete(site.keys.asks("k0"))
    site.start()
    site.offer(*updates)
    site.ask("cohort", site.run.propose(0, updates[:3]))
    site.ask("cohort", site.run.propose(0, updates))
    site.step()
    *_, refused, masked = site.said()
    assert (refused.reason, len(refused.headers)) == ("spent", 3)
    assert isinstance(masked, Masked)

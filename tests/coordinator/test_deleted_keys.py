"""Another program deletes single keys of a run that a coordinator leads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
import structlog

from fedqueue.errors import Fenced
from fedqueue_coordinator.service.checkpoint import CHECKPOINT_FILENAME, load_checkpoint
from fedqueue_coordinator.service.coordinator_store import CoordinatorStore
from tests.support.scene import RUN, Scene


@pytest.fixture(params=[True, False], ids=["signed", "unsigned"])
def make_scene(request: Any, fake_client: redis.Redis, tmp_path: Path) -> Callable[..., Scene]:
    return lambda **sections: Scene(fake_client, tmp_path, request.param, **sections)


def test_coordinator_leads_again_without_its_leader_key(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene(stop={"versions": 3})
    site = scene.site("c0")

    def delete() -> None:
        scene.redis.delete(scene.keys.leader)

    with structlog.testing.capture_logs() as logs:
        scene.play(site.join, site.post, delete, site.post, site.post)
    assert scene.store.info().stopped_because == "versions: 3 of 3"
    assert [r["version"] for r in scene.store.ledger() if r["kind"] == "version"] == [1, 2, 3]
    assert "leader key missing from Redis" in next(line["event"] for line in logs if line["log_level"] == "warning")


def test_leader_that_took_over_after_the_deletion_stays(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene()
    site = scene.site("c0")

    def replace() -> None:
        scene.redis.delete(scene.keys.leader)
        assert CoordinatorStore(scene.redis, RUN, "another").lead(3600)

    with pytest.raises(Fenced, match="another coordinator leads"):
        scene.play(site.join, replace, site.post, site.post)


@pytest.mark.server
@pytest.mark.timeout(30)
def test_commit_after_a_deleted_leader_key_is_quick(server_client: redis.Redis, tmp_path: Path) -> None:
    """The tokens before and after differ by the milliseconds between them; a script must not count through these."""
    scene = Scene(server_client, tmp_path, signed=False, stop={"versions": 2})
    site = scene.site("c0")

    def delete() -> None:
        scene.redis.delete(scene.keys.leader)
        scene.redis.hset(scene.keys.head, "token", 1)  # the run began in 1970

    scene.play(site.join, site.post, delete, site.post)
    assert scene.version == 2


# The ledger


def remove_records(scene: Scene, first: int, count: int) -> None:
    entries: Any = scene.redis.xrange(scene.keys.ledger)
    scene.redis.xdel(scene.keys.ledger, *[name for name, _ in entries[first : first + count]])


CUTS: dict[str, Callable[[Scene], object]] = {
    "key deleted": lambda scene: scene.redis.delete(scene.keys.ledger),
    "oldest record deleted": lambda scene: remove_records(scene, 0, 1),
    "trimmed": lambda scene: scene.redis.xtrim(scene.keys.ledger, maxlen=0),
}


@pytest.mark.parametrize("cut", CUTS)
def test_run_with_an_incomplete_ledger_fails(make_scene: Callable[..., Scene], cut: str) -> None:
    scene = make_scene(stop={"versions": 3})
    site = scene.site("c0")
    scene.play(site.join, site.post, lambda: CUTS[cut](scene), site.post, site.post)
    reason = scene.store.info().stopped_because
    missing = 1
    assert (
        reason
        == f"the records of {missing} of 3 versions are missing from the ledger: another program has deleted them"
    )


def checkpoint_written() -> None:
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()


def test_incomplete_ledger_ends_the_run_at_the_next_checkpoint(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene(checkpoint={"every_seconds": 0.001}, dispatch={"lease_seconds": 3600, "leader_lease_seconds": 3})
    site = scene.site("c0")
    later = [lambda: None, checkpoint_written] * 3
    scene.play(site.join, site.post, site.post, *later, lambda: CUTS["key deleted"](scene), *later)
    assert "are missing from the ledger" in scene.store.info().stopped_because
    checkpoint = load_checkpoint(scene.folder / CHECKPOINT_FILENAME)
    assert checkpoint is not None
    versions = [record["version"] for record in checkpoint.ledger if record["kind"] == "version"]
    assert versions == [1, 2], "the checkpoint of the whole ledger was replaced"

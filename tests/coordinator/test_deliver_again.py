"""A coordinator that dies after the run has ended in Redis, and before the results are on its disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from fedqueue.errors import RunExists
from fedqueue_coordinator.core.run_summary import RunResult
from fedqueue_coordinator.operator.run_folder import Launch, RunFolder
from fedqueue_coordinator.service.checkpoint import CHECKPOINT_FILENAME
from fedqueue_coordinator.service.coordinator import Coordinator
from fedqueue_coordinator.service.coordinator_store import CoordinatorStore, new_owner
from tests.support.scene import RUN, Scene


@pytest.fixture(params=[True, False], ids=["signed", "unsigned"])
def scene(request: pytest.FixtureRequest, fake_client: redis.Redis, tmp_path: Path) -> Scene:
    return Scene(fake_client, tmp_path, request.param, stop={"versions": 2})


def lead(scene: Scene, store_type: type[CoordinatorStore] = CoordinatorStore, **how: Any) -> RunResult:
    store = store_type(scene.redis, RUN, new_owner(), scene.identity() if scene.signed else None)
    result = Coordinator(scene.config, scene.task, store, scene.folder, sleep=lambda seconds: None, **how).run()
    assert result is not None
    return result


def end_run(scene: Scene) -> None:
    site = scene.site("c0")
    scene.play(site.join, site.post, site.post)
    assert scene.store.info().state == "ended"


def test_results_of_an_ended_run_are_returned_again(scene: Scene) -> None:
    end_run(scene)
    for _ in range(2):  # and again, if that coordinator dies as well
        result = lead(scene, deliver_ended=True)
        assert (result.version, result.stopped_because, result.failed) == (2, "versions: 2 of 2", False)
        assert result.model.buffer.tobytes() == scene.model()
        assert [record["version"] for record in result.ledger if record["kind"] == "version"] == [1, 2]
        assert result.registered == {"c0"}
    assert scene.store.info().state == "ended"


def test_ended_run_of_another_folder_is_refused(scene: Scene) -> None:
    end_run(scene)
    with pytest.raises(RunExists, match="has ended"):
        lead(scene)


@pytest.mark.parametrize(("end", "failed"), [(Coordinator.fail, True), (Coordinator.interrupt, False)])
def test_failed_or_interrupted_run_keeps_its_checkpoint(
    scene: Scene, end: Callable[[Coordinator, str], None], failed: bool
) -> None:
    site = scene.site("c0")
    scene.play(site.join, site.post, lambda: end(scene.coordinator, "by the test"))
    result = lead(scene, deliver_ended=True)
    assert (result.version, result.stopped_because, result.failed) == (1, "by the test", failed)
    assert (scene.folder / CHECKPOINT_FILENAME).exists()


class LosingReply(CoordinatorStore):
    """Ends the run, and loses the reply."""

    lost = False

    def end(self, *arguments: Any, **options: Any) -> None:
        super().end(*arguments, **options)
        if not self.lost:
            self.lost = True
            raise redis.ConnectionError("Connection reset by peer")


def test_end_whose_reply_was_lost_has_its_result(scene: Scene) -> None:
    site = scene.site("c0")
    scene.play(site.join, site.post)
    site.post()  # with this update the next coordinator ends the run
    assert lead(scene, LosingReply).version == 2


def test_folder_knows_that_it_has_an_unfinished_run(tmp_path: Path) -> None:
    launch = Launch(tmp_path / "fed.toml", [], command="coordinator", run="toy")
    for seen in (False, True):
        folder = RunFolder(tmp_path / "out")
        with folder.opened(launch, shared=True):
            assert folder.has_unfinished_run is seen
            folder.note(3, 0.0)
    with folder.opened(launch, overwrite=True, shared=True):
        assert not folder.has_unfinished_run

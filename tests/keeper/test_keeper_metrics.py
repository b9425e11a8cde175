"""What a keeper counts for Prometheus, from the asks that it answers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis

pytest.importorskip("prometheus_client")

from prometheus_client import CollectorRegistry

from fedqueue.protocol.key_files import CLIENTS
from fedqueue_keeper.keeper_metrics import KeeperMetrics
from fedqueue_keeper.keeper_store import KeeperStore
from fedqueue_keeper.process import LOOK_SECONDS, KeeperProcess
from tests.keeper.test_keeper_process import Site, posted, released
from tests.support.masked_run import MaskedRun


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def serving(
    run: MaskedRun, redis_client: redis.Redis, registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Site]:
    monkeypatch.setattr("fedqueue_keeper.process.LOOK_SECONDS", 0.001)  # no read waits
    site = Site(run, redis_client)
    site.process = KeeperProcess(
        KeeperStore(redis_client, site.store.run), run.identity("k0", entered=False), run.folder / "state",
        clock=lambda: site.now, sleep=site.sleep, observer=KeeperMetrics(registry, lambda: 7.0),
    )  # fmt: skip
    run.write(redis_client)
    site.now += LOOK_SECONDS
    site.step()
    site.use_published_key()
    yield site
    site.process.close()


@pytest.fixture
def run(tmp_path_factory: pytest.TempPathFactory) -> MaskedRun:
    return MaskedRun(tmp_path_factory.mktemp("run"))


def test_released_sum_is_counted_with_its_offers(serving: Site, registry: CollectorRegistry) -> None:
    released(serving)
    value = registry.get_sample_value
    assert value("fedqueue_keeper_offers_total") == 4
    assert value("fedqueue_keeper_cohorts_released_total") == 1
    assert value("fedqueue_keeper_last_release_timestamp_seconds") == 7.0
    assert not [s for f in registry.collect() for s in f.samples if s.name == "fedqueue_keeper_refusals_total"]


def test_refusals_are_counted_by_their_reason(serving: Site, registry: CollectorRegistry) -> None:
    updates = posted(serving.run)
    stranger = serving.run.post("e")
    (serving.run.folder / CLIENTS / "e.pub").unlink()
    serving.offer(*updates, stranger)
    serving.ask("cohort", serving.run.propose(0, updates[:2]))
    serving.step()
    value = registry.get_sample_value
    assert value("fedqueue_keeper_offers_total") == 5
    assert value("fedqueue_keeper_refusals_total", {"ask": "offer", "reason": "foreign"}) == 1
    assert value("fedqueue_keeper_refusals_total", {"ask": "cohort", "reason": "crowd"}) == 1
    assert value("fedqueue_keeper_cohorts_released_total") == 0

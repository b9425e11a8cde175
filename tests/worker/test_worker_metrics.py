"""What a worker counts for Prometheus, from the jobs that it trains."""

from __future__ import annotations

import pytest

pytest.importorskip("prometheus_client")

from prometheus_client import CollectorRegistry

from fedqueue import Client
from fedqueue_worker.job_runner import JobRunner
from fedqueue_worker.worker_metrics import WorkerMetrics
from tests.support.sample_run import SampleRun
from tests.support.training_site import TrainingSite

PHASE = "fedqueue_worker_phase"


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def site(fake_run: SampleRun, registry: CollectorRegistry) -> TrainingSite:
    site = TrainingSite(fake_run)
    site.runner = JobRunner(
        site.store,
        site.task,
        fake_run.module,
        site.heartbeat,
        60,
        True,
        {},
        observer=WorkerMetrics(registry, lambda: 7.0),
    )
    site.runner.load(Client("c0"), "the rows of c0")
    return site


def test_posted_update_counts_its_bytes_and_seconds(
    site: TrainingSite, fake_run: SampleRun, registry: CollectorRegistry
) -> None:
    site.train(1)
    site.train(2)
    value, client = registry.get_sample_value, {"client": "c0"}
    assert value("fedqueue_worker_jobs_total", {**client, "ending": "posted"}) == 2
    assert value("fedqueue_worker_training_seconds_count", client) == 2
    assert value("fedqueue_worker_sent_bytes_total", client) == 2 * fake_run.manifest.nbytes
    assert value("fedqueue_worker_received_bytes_total", client) == 2 * fake_run.manifest.nbytes
    assert value("fedqueue_worker_last_update_timestamp_seconds", client) == 7.0


def test_failed_job_counts_no_update(site: TrainingSite, registry: CollectorRegistry) -> None:
    def fail(progress: object) -> None:
        raise ValueError("no")

    site.task.during = fail
    site.train(1)
    assert registry.get_sample_value("fedqueue_worker_jobs_total", {"client": "c0", "ending": "failed"}) == 1
    assert registry.get_sample_value("fedqueue_worker_sent_bytes_total", {"client": "c0"}) is None


def test_phase_is_training_during_fit_and_idle_after(site: TrainingSite, registry: CollectorRegistry) -> None:
    def phases() -> list[str]:
        names = ("idle", "fetching", "training", "sending")
        return [name for name in names if registry.get_sample_value(PHASE, {"phase": name})]

    seen = [phases()]
    site.task.during = lambda progress: seen.append(phases())
    site.train(1)
    assert [*seen, phases()] == [["idle"], ["training"], ["idle"]]

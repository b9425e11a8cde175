"""What a coordinator counts for Prometheus, against the ledger of the same run and a federation's state."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import redis

pytest.importorskip("prometheus_client")

from prometheus_client import CollectorRegistry

from fedqueue.config.loading import parse_config
from fedqueue_coordinator.service.coordinator import Coordinator
from fedqueue_coordinator.service.run_metrics import MOST_CLIENTS, OTHER, RunMetrics
from tests.support.mortal_coordinator import MortalStore, ticking_clock
from tests.support.scripted_run import Workers, result_of, scripted_config
from tests.support.small_task import SmallTask


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def make_metrics(clock: Clock | None = None, **sections: Any) -> tuple[RunMetrics, CollectorRegistry]:
    tree = {"task": {"entrypoint": "task.py:Mine"}, "stop": {"versions": 1}, **sections}
    registry = CollectorRegistry()
    return RunMetrics(parse_config(tree), registry, clock or Clock()), registry


def federation(**fields: Any) -> Any:
    state = {"version": 0, "open_jobs": {}, "buffered": 0, "clients": {}, "awaited_keeper": None}
    return SimpleNamespace(**{**state, **fields})


def version(number: int, *clients: str) -> dict[str, Any]:
    merged = [{"client": client, "staleness": 1, "training_seconds": 0.5, "norm": 2.0} for client in clients]
    return {"kind": "version", "version": number, "merged": merged}


def series(registry: CollectorRegistry, name: str, label: str) -> dict[str, float]:
    """Label → value for each series of the metric."""
    return {
        sample.labels[label]: sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == name
    }


def test_counters_of_a_run_are_those_of_its_ledger(redis_client: redis.Redis, tmp_path: Path) -> None:
    config, registry = scripted_config(stop={"versions": 6}), CollectorRegistry()
    store = MortalStore(redis_client, config.name, "me")
    coordinator = Coordinator(
        config, SmallTask(), store, tmp_path, clock=ticking_clock(), observer=RunMetrics(config, registry)
    )
    store.others = Workers(redis_client, config)
    ledger = result_of(coordinator).ledger
    merged = [update for record in ledger if record["kind"] == "version" for update in record["merged"]]
    value = registry.get_sample_value
    assert value("fedqueue_version") == 6
    assert series(registry, "fedqueue_updates_merged_total", "client") == Counter(u["client"] for u in merged)
    for kind, name in (("rejected", "fedqueue_rejected_total"), ("abandoned", "fedqueue_jobs_abandoned_total")):
        expected = Counter(record["reason"] for record in ledger if record["kind"] == kind)
        assert expected
        assert series(registry, name, "reason") == expected
    assert value("fedqueue_staleness_sum") == sum(update["staleness"] for update in merged) > 0
    assert value("fedqueue_training_seconds_count") == value("fedqueue_update_norm_count") == len(merged)
    payloads = len(merged) + sum(record["kind"] == "rejected" for record in ledger)
    nbytes = coordinator.federation.model.manifest.nbytes
    assert len(merged) * nbytes <= (value("fedqueue_update_bytes_total") or 0) <= payloads * nbytes
    assert value("fedqueue_jobs_dispatched_total") == coordinator.federation.job_number


def test_seconds_since_version_grow_until_the_next_version() -> None:
    metrics, registry = make_metrics(clock := Clock())
    metrics.begins(federation(version=3), 0.0)
    clock.now += 9
    assert registry.get_sample_value("fedqueue_seconds_since_version") == 9
    metrics.recorded(version(4, "client-0"))
    clock.now += 2
    assert registry.get_sample_value("fedqueue_seconds_since_version") == 2
    assert registry.get_sample_value("fedqueue_version") == 4


def test_run_that_is_resumed_counts_no_update_twice() -> None:
    metrics, registry = make_metrics(clients={"count": 1})
    metrics.begins(federation(), 0.0)
    metrics.recorded(version(1, "client-0"))
    metrics.lost_connection()
    metrics.begins(federation(version=1), 5.0)
    assert series(registry, "fedqueue_updates_merged_total", "client") == {"client-0": 1}
    assert registry.get_sample_value("fedqueue_redis_outages_total") == 1


@pytest.mark.parametrize("count", [MOST_CLIENTS, MOST_CLIENTS + 1])
def test_labels_of_clients_are_bounded(count: int) -> None:
    metrics, registry = make_metrics(clients={"count": count})
    clients = {f"client-{number}": 1 for number in range(count)}
    metrics.recorded(version(1, *clients, "a client that no configuration lists"))
    metrics.progressed(federation(clients=clients), 0.0)
    labels = series(registry, "fedqueue_updates_merged_total", "client").keys()
    assert labels == ({*clients, OTHER} if count <= MOST_CLIENTS else {OTHER})
    assert len(series(registry, "fedqueue_client_alive", "client")) == (count if count <= MOST_CLIENTS else 0)
    assert registry.get_sample_value("fedqueue_clients_alive") == count


def test_client_without_a_worker_is_shown_as_gone() -> None:
    metrics, registry = make_metrics(clock := Clock(), clients={"count": 2})
    metrics.progressed(federation(clients={"client-0": 1, "client-1": 1}), 0.0)
    clock.now += 1
    metrics.progressed(federation(clients={"client-0": 1}), 1.0)
    assert series(registry, "fedqueue_client_alive", "client") == {"client-0": 1, "client-1": 0}


def test_awaited_keeper_has_its_seconds_and_others_none() -> None:
    tree = {"clients": {"count": 4}, "secure": {"keepers": ["one", "two"], "clip_norm": 1.0}}
    metrics, registry = make_metrics(clock := Clock(), **tree)
    metrics.progressed(federation(awaited_keeper=("two", 3.0)), 10.0)
    assert series(registry, "fedqueue_keeper_awaited_seconds", "keeper") == {"one": 0, "two": 7}
    clock.now += 1
    metrics.progressed(federation(), 11.0)
    assert series(registry, "fedqueue_keeper_awaited_seconds", "keeper") == {"one": 0, "two": 0}


def test_federation_is_looked_at_five_times_a_second_at_most() -> None:
    metrics, registry = make_metrics(clock := Clock())
    for jobs in range(3):
        metrics.progressed(federation(open_jobs=dict.fromkeys("abc"[:jobs])), 0.0)
        clock.now += 0.15
    assert registry.get_sample_value("fedqueue_jobs_open") == 2
    clock.now -= 0.15
    metrics.progressed(federation(), 0.0)
    assert registry.get_sample_value("fedqueue_jobs_open") == 2


def test_evaluation_and_memory_are_shown() -> None:
    metrics, registry = make_metrics()
    metrics.recorded({"kind": "evaluation", "version": 1, "metrics": {"accuracy": 0.5}, "seconds": 1.0})
    metrics.recorded({"kind": "evaluation", "version": 2, "metrics": {}, "seconds": 2.0, "error": "ValueError"})
    metrics.measured_memory(90, 100)
    assert series(registry, "fedqueue_evaluation", "metric") == {"accuracy": 0.5}
    assert registry.get_sample_value("fedqueue_evaluations_failed_total") == 1
    assert registry.get_sample_value("fedqueue_redis_memory_used_bytes") == 90
    assert registry.get_sample_value("fedqueue_redis_memory_limit_bytes") == 100

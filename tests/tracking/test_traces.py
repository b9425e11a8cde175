"""The trace of an update: from its dispatch over its worker to the version that it became part of."""

from __future__ import annotations

import functools
import random
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from fedqueue import Client, MissingExtra
from fedqueue import tracing as tracing_module
from fedqueue.errors import WireError
from fedqueue.protocol.messages import Update, read
from fedqueue.protocol.signed_envelope import unverified_body
from fedqueue.protocol.stream_entry import StreamEntry
from fedqueue.tensors.manifest import Manifest
from fedqueue.tracing import NO_TRACING, OpenTelemetryTracing, Tracing, make_provider, start_tracing
from fedqueue_coordinator.core.events import Commit, UpdateArrived
from fedqueue_coordinator.service.update_traces import UpdateTraces
from fedqueue_worker.heartbeat import Heartbeat
from fedqueue_worker.job_runner import JobRunner
from tests.support import scene as scenes
from tests.support.builders import make_update
from tests.support.sample_run import SampleRun
from tests.support.scene import Scene, Site
from tests.support.training_site import Doubling

OF_A_WORKER = ["claim", "fetch", "train", "encode", "post"]
SOME = "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"


class Spans:
    """The spans of one process, and its tracing."""

    def __init__(self) -> None:
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

        self._exporter = InMemorySpanExporter()
        provider = make_provider()
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracing: Tracing = OpenTelemetryTracing(provider)

    def all(self) -> list[Any]:
        return list(self._exporter.get_finished_spans())

    def named(self, name: str) -> list[Any]:
        return [span for span in self.all() if span.name == name]


@pytest.fixture
def spans() -> Callable[[], Spans]:
    pytest.importorskip("opentelemetry.sdk")
    return Spans


def play(
    client: redis.Redis, folder: Path, monkeypatch: pytest.MonkeyPatch, coordinator: Tracing, worker: Tracing,
    jobs: int = 2, **sections: Any,
) -> Scene:  # fmt: skip
    """Let each of two clients train `jobs` jobs of a run whose versions have two updates."""
    described: dict[str, Any] = {"aggregation": {"strategy": "fedbuff", "buffer_size": 2}, **sections}
    scene = Scene(client, folder, **described)
    monkeypatch.setattr(scenes, "Coordinator", functools.partial(scenes.Coordinator, tracing=coordinator))  # type: ignore[attr-defined]
    sites = [scene.site(name) for name in ("c0", "c1")]
    runners = {site.client: runner(scene, site, worker) for site in sites}

    def train(site: Site) -> None:
        runners[site.client].load(Client(site.client), "ten rows or more")
        runners[site.client].train(site.order())

    steps = [functools.partial(train, site) for _ in range(jobs) for site in sites]
    scene.play(*[site.join for site in sites], *steps)
    return scene


def runner(scene: Scene, site: Site, tracing: Tracing) -> JobRunner:
    heartbeat = Heartbeat(site.store, [site.client], 3600, 3600, lambda reason: None)
    module = scene.task.model()
    assert Manifest.from_module(module) == scene.manifest
    return JobRunner(site.store, Doubling(), module, heartbeat, 3600, False, {}, tracing=tracing)


def context_of(span: Any) -> tuple[int, int]:
    return span.context.trace_id, span.context.span_id


def parent_of(span: Any) -> tuple[int, int]:
    return span.parent.trace_id, span.parent.span_id


def test_one_trace_follows_an_update_to_its_version(
    fake_client: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spans: Callable[[], Spans]
) -> None:
    coordinator, worker = spans(), spans()
    scene = play(fake_client, tmp_path, monkeypatch, coordinator.tracing, worker.tracing)
    assert scene.version == 2
    dispatched = {span.attributes["fedqueue.job"]: span for span in coordinator.named("dispatch")}
    jobs, merged = worker.named("job"), coordinator.named("merge")
    assert len(jobs) == len(merged) == 4
    parts = defaultdict(list)
    for span in worker.all():
        if span.name != "job":
            parts[parent_of(span)].append(span.name)
    for job in jobs:
        dispatch = dispatched[job.attributes["fedqueue.job"]]
        assert dispatch.parent is None
        assert parent_of(job) == context_of(dispatch)
        assert parts[context_of(job)] == OF_A_WORKER
        [merge] = [span for span in merged if parent_of(span) == context_of(job)]
        assert merge.attributes["fedqueue.job"] == job.attributes["fedqueue.job"]
        assert merge.context.trace_id == dispatch.context.trace_id
    versions = coordinator.named("version")
    assert [span.attributes["fedqueue.version"] for span in versions] == [1, 2]
    for span in versions:
        links = {(link.context.trace_id, link.context.span_id) for link in span.links}
        number = span.attributes["fedqueue.version"]
        assert links == {context_of(m) for m in merged if m.attributes["fedqueue.version"] == number}
        assert len(links) == 2
        assert span.start_time <= min(m.start_time for m in merged if m.attributes["fedqueue.version"] == number)


def test_worker_without_tracing_passes_the_orders_span_on(
    fake_client: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spans: Callable[[], Spans]
) -> None:
    coordinator = spans()
    play(fake_client, tmp_path, monkeypatch, coordinator.tracing, NO_TRACING, jobs=1)
    dispatched = {context_of(span) for span in coordinator.named("dispatch")}
    assert len(coordinator.named("merge")) == 2
    assert {parent_of(span) for span in coordinator.named("merge")} <= dispatched


def test_successor_of_a_coordinator_goes_on_with_the_trace(spans: Callable[[], Spans]) -> None:
    """It has dispatched nothing; the header says which trace the update belongs to."""
    successor = spans()
    body = make_update(traceparent=SOME).pack()
    arrived = UpdateArrived(StreamEntry("1-0", "update", body, "c0", "job-1", 1, 0), body)
    record = {"merged": [{"staleness": 2, "weight": 0.5}]}
    UpdateTraces(successor.tracing).committed(Commit(7, (arrived,), record))
    [merge] = successor.named("merge")
    assert parent_of(merge) == (int("ab" * 16, 16), int("cd" * 8, 16))
    assert (merge.attributes["fedqueue.staleness"], merge.attributes["fedqueue.weight"]) == (2, 0.5)


def test_rejected_update_ends_its_trace_with_the_reason(
    fake_client: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spans: Callable[[], Spans]
) -> None:
    coordinator = spans()
    play(fake_client, tmp_path, monkeypatch, coordinator.tracing, NO_TRACING, jobs=1, admission={"max_norm": 1e-9})
    rejected = coordinator.named("reject")
    assert [span.attributes["fedqueue.reason"] for span in rejected] == ["too_large"] * 2
    assert all(not span.status.is_ok for span in rejected)
    assert {parent_of(span) for span in rejected} <= {context_of(span) for span in coordinator.named("dispatch")}


def test_failed_training_is_in_the_sites_trace_only(
    fake_client: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spans: Callable[[], Spans]
) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("row 17 is odd")

    coordinator, worker = spans(), spans()
    monkeypatch.setattr(Doubling, "fit", fail)
    play(fake_client, tmp_path, monkeypatch, coordinator.tracing, worker.tracing, jobs=1)
    trained = worker.named("train")
    assert [span.events[0].attributes["exception.message"] for span in trained] == ["row 17 is odd"] * 2
    abandoned = coordinator.named("abandon")
    assert [span.attributes["fedqueue.reason"] for span in abandoned] == ["failed"] * 2
    assert "row 17" not in repr([(span.attributes, span.events, span.status) for span in coordinator.all()])


def test_without_tracing_no_message_has_a_span(
    fake_client: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    posted: list[StreamEntry] = []
    received = scenes.ScriptedStore.receive

    def receive(store: Any, *arguments: Any) -> list[StreamEntry]:
        entries = received(store, *arguments)
        posted.extend(entry for entry in entries if entry.kind == "update")
        return entries

    monkeypatch.setattr(scenes.ScriptedStore, "receive", receive)
    play(fake_client, tmp_path, monkeypatch, NO_TRACING, NO_TRACING, jobs=1)
    headers = [read(Update, unverified_body(entry.body)) for entry in posted]
    assert [header.traceparent for header in headers] == ["", ""]


def test_ids_do_not_follow_from_the_runs_seed(spans: Callable[[], Spans]) -> None:
    ids, process = set(), spans()
    for _ in range(2):
        random.seed(0)
        with process.tracing.span("dispatch") as traceparent:
            ids.add(traceparent)
        assert random.getrandbits(32) == random.Random(0).getrandbits(32), "the span has drawn from the run's generator"
    assert len(ids) == 2


@pytest.mark.parametrize("text", ["00", SOME + "x", SOME.upper(), "01" + SOME[2:], SOME + "\n"])
def test_text_that_is_no_span_is_refused(fake_run: SampleRun, text: str) -> None:
    for message in (fake_run.order(), make_update()):
        kind = type(message)
        assert read(kind, message.model_copy(update={"traceparent": SOME}).pack()).traceparent == SOME
        with pytest.raises(WireError, match="traceparent"):
            read(kind, message.model_copy(update={"traceparent": text}).pack())


def test_collector_that_is_away_holds_the_end_up_briefly(spans: Callable[[], Spans]) -> None:
    held = threading.Event()

    class Provider:
        def get_tracer(self, name: str) -> None:
            return None

        def shutdown(self) -> None:
            held.wait()

    provider: Any = Provider()
    OpenTelemetryTracing(provider, stop_seconds=0.01).stop()
    held.set()


def test_missing_package_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing_module, "find_spec", lambda name: None)
    assert start_tracing(False, "service") is NO_TRACING
    with pytest.raises(MissingExtra, match=r"opentelemetry.traces needs .*: pip install 'fedqueue\[opentelemetry\]'"):
        start_tracing(True, "service")


@pytest.mark.slow
def test_processes_without_tracing_do_not_import_opentelemetry() -> None:
    modules = "fedqueue_worker.process, fedqueue_coordinator.operator.lead_run"
    ours = ("opentelemetry.sdk.trace", "opentelemetry.exporter")  # redis-py imports others where they are installed
    code = f"import sys, {modules}\nprint([name for name in sys.modules if name.startswith({ours})])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    assert answer.stdout.strip() == "[]"

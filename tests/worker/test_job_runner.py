"""One training job, from the order to the coordinator's stream entry, with real stores."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
import structlog
import torch

from fedqueue import Client, Task, TrainResult
from fedqueue.config.compression import CompressionConfig
from fedqueue.config.training import TrainingConfig
from fedqueue.errors import WireError
from fedqueue.exception_text import exception_with_place
from fedqueue.protocol.messages import Ending, Update, read
from fedqueue.task import Progress
from fedqueue.tensors.codec import uplink_codec
from fedqueue.tensors.frame import Frame
from fedqueue_worker import job_runner as job_runner_module
from fedqueue_worker.egress_log import EgressLog
from fedqueue_worker.job_runner import HandBack, JobRunner, slowed
from tests.support.redis_commands import stored
from tests.support.sample_run import SampleRun
from tests.support.training_site import Doubling, TrainingSite


@pytest.fixture(autouse=True)
def logs() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs() as captured:
        yield captured


@pytest.fixture
def site(fake_run: SampleRun) -> TrainingSite:
    return TrainingSite(fake_run)


# The path of an update


def test_job_becomes_an_update_whose_delta_is_local_minus_base(fake_run: SampleRun, site: TrainingSite) -> None:
    fake_run.publish(1)  # every float is 1
    [entry] = site.train()
    assert (entry.kind, entry.client, entry.base, entry.attempt) == ("update", "c0", 1, 1)
    frame = fake_run.posted_frame(entry)
    assert set(frame.parameters.tolist()) == {0.25}
    assert set(frame.buffers.tolist()) == {5.0}, "buffers travel as values"
    assert frame.counters.tolist() == [9]
    assert site.runner.jobs == 1


def test_header_has_examples_size_metrics_and_seconds(fake_run: SampleRun, site: TrainingSite) -> None:
    [entry] = site.train()
    update = read(Update, entry.body)
    assert (update.examples, update.nbytes, update.chunks) == (10, fake_run.manifest.nbytes, 1)
    assert update.metrics == {"loss": 0.5}
    assert 0 <= update.seconds < 60


def test_task_gets_newest_version_client_data_and_settings(fake_run: SampleRun, site: TrainingSite) -> None:
    fake_run.publish(1)
    site.train(number=7)
    [(state, data, config, seed)] = site.task.seen
    floats = [tensor for tensor in state.values() if tensor.dtype.is_floating_point]
    assert all(set(tensor.flatten().tolist()) == {1.0} for tensor in floats)
    assert data == "the rows of c0"
    assert config == fake_run.order(7).training
    assert seed == 7


def test_each_job_starts_from_its_base_version(fake_run: SampleRun, site: TrainingSite) -> None:
    first, second = site.train(1)[0], site.train(2)[0]
    for entry in (first, second):
        assert set(fake_run.posted_frame(entry).parameters.tolist()) == {0.25}
    assert site.task.seen[0][0].keys() == site.task.seen[1][0].keys()
    for name, tensor in site.task.seen[0][0].items():
        assert torch.equal(tensor, site.task.seen[1][0][name])


def test_delta_equals_that_of_training_outside_a_worker(fake_run: SampleRun) -> None:
    """The delta plus the base equals, bit for bit, the model that the task's own loop trains from the base."""

    class Default(Task):
        pass

    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    data = torch.utils.data.TensorDataset(torch.randn(20, 3), torch.randint(0, 2, (20,)))
    site = TrainingSite(fake_run)
    site.runner = JobRunner(site.store, Default(), fake_run.module, site.heartbeat, 60, True, {})
    site.runner.load(Client("c0"), data)
    [entry] = site.train()
    received = fake_run.posted_frame(entry)

    base, local = Frame(fake_run.manifest), Frame(fake_run.manifest)
    base.write(module)
    torch.manual_seed(1)
    Default().fit(module, data, fake_run.order(1).training, Progress())
    local.read(module)
    assert torch.equal(received.parameters, local.parameters - base.parameters)
    assert torch.equal(received.buffers, local.buffers)
    assert torch.equal(received.counters, local.counters)
    assert received.parameters.abs().max() > 0


# Compression


class Ramp(Doubling):
    """Adds 0, 1, 2, … to the parameters, so the last elements are the largest of every delta."""

    def fit(self, model: Any, data: str, config: TrainingConfig, progress: Progress) -> TrainResult:
        with torch.no_grad():
            vector = torch.nn.utils.parameters_to_vector(model.parameters())
            torch.nn.utils.vector_to_parameters(vector + torch.arange(len(vector)), model.parameters())
        self.during(progress)
        return TrainResult(10)


def compressed_site(run: SampleRun, **compression: Any) -> tuple[Any, ...]:
    config = CompressionConfig(**compression)
    site = TrainingSite(run, compression=config)
    site.runner._task = site.task = Ramp()
    codec = uplink_codec(config, run.manifest)

    def decoded(entry: Any) -> Any:
        wire = np.empty(read(Update, entry.body).nbytes, np.uint8)
        run.coordinator.read_blob(run.keys.payload(entry.job, entry.attempt), wire)
        return codec.decode(wire).whole().parameters.tolist()

    return site, decoded


TOP = {"uplink": "topk", "topk_ratio": 0.15}  # 2 of 12 parameters


def test_residual_is_added_to_the_clients_next_update(fake_run: SampleRun) -> None:
    site, decoded = compressed_site(fake_run, **TOP)
    first, second = decoded(site.train(1)[0]), decoded(site.train(2)[0])
    assert first == [0] * 10 + [10, 11]
    assert second == [0] * 8 + [2 * 8, 2 * 9, 0, 0], "the residual of elements 8 and 9 was not added"


def test_restarted_worker_logs_zero_error_feedback(fake_run: SampleRun, logs: list[Any]) -> None:
    site, decoded = compressed_site(fake_run, **TOP)
    site.train(1)
    site.runner.load(Client("c0"), "the rows of c0")  # as for a client that is new to this worker
    again, decoded = compressed_site(fake_run, **TOP)
    assert decoded(again.train(2)[0]) == [0] * 10 + [10, 11]
    assert [line["client"] for line in logs if line["event"] == "error feedback begins at zero"] == ["c0"] * 3


def test_refused_update_leaves_the_residual_unchanged(fake_run: SampleRun) -> None:
    site, decoded = compressed_site(fake_run, **TOP)
    site.train(1)
    site.task.during = lambda progress: fake_run.coordinator.close("sample-00000002", {"kind": "abandoned"}, 1)
    assert site.train(2) == []
    site.task.during = lambda progress: None
    assert decoded(site.train(3)[0]) == [0] * 8 + [2 * 8, 2 * 9, 0, 0]


def test_replayed_update_counts_as_accepted(fake_run: SampleRun, monkeypatch: pytest.MonkeyPatch) -> None:
    site, decoded = compressed_site(fake_run, **TOP)
    post = site.store.post

    def post_twice(*args: Any) -> Any:
        assert post(*args) == ""
        return post(*args)  # as the retry of a command whose reply was lost: "replayed"

    monkeypatch.setattr(site.store, "post", post_twice)
    first = decoded(site.train(1)[0])
    assert first == [0] * 10 + [10, 11]
    monkeypatch.setattr(site.store, "post", post)
    assert decoded(site.train(2)[0]) == [0] * 8 + [2 * 8, 2 * 9, 0, 0]


def test_header_and_egress_log_have_the_encoded_size(fake_run: SampleRun, tmp_path: Path) -> None:
    site, _ = compressed_site(fake_run, uplink="int8", uplink_lossless="zstd")
    site.runner._egress_log = EgressLog(tmp_path / "outbox.jsonl")
    [entry] = site.train()
    update = read(Update, entry.body)
    payload = stored(fake_run.client, fake_run.keys.payload(entry.job, 1) + ":0")
    assert (update.encoding, update.nbytes, update.chunks) == ("int8+zstd", len(payload), 1)
    [line] = map(json.loads, (tmp_path / "outbox.jsonl").read_text().splitlines())
    assert (line["bytes"], line["sha256"]) == (len(payload), hashlib.sha256(payload).hexdigest())


@pytest.mark.parametrize("keep", [True, False])
def test_base_stays_pinned_only_where_the_merge_needs_it(fake_run: SampleRun, keep: bool) -> None:
    site = TrainingSite(fake_run, keep_base=keep)
    pinned = []
    site.task.during = lambda progress: pinned.append(
        fake_run.client.hmget(fake_run.keys.attempt("sample-00000001"), "pinned", "base")
    )
    site.train()
    assert pinned == [[b"1" if keep else None, b"0"]]


def test_only_a_delta_and_counted_metrics_leave(fake_run: SampleRun, site: TrainingSite) -> None:
    """I8: the test lists everything that a job adds to Redis."""
    before = set(fake_run.contents())
    [entry] = site.train()
    fedqueues = {name for name in fake_run.contents() if not name.startswith("rq:")}
    added = {name.rpartition("}:")[2] for name in fedqueues - before}
    assert added == {
        "job:sample-00000001",
        "attempt:sample-00000001",
        "payload:sample-00000001:1:0",
        "jobs",
        "last_jobs",
    }
    assert set(read(Update, entry.body).model_dump()) == {
        "examples", "encoding", "nbytes", "chunks", "metrics", "seconds", "digest", "traceparent",
    }  # fmt: skip
    everything = repr(fake_run.contents()).encode()
    assert b"the rows of c0" not in everything


# Other endings


def test_exception_in_the_task_ends_the_job_as_failed(fake_run: SampleRun, site: TrainingSite) -> None:
    def during(progress: Any) -> None:
        row = {"age": 54, "name": "private"}
        raise LookupError(f"{len(row)} columns are missing")

    site.task.during = during
    [entry] = site.train()
    assert entry.kind == "ended"
    ending = read(Ending, entry.body)
    assert ending.reason == "failed"
    assert ending.error.startswith("LookupError: 2 columns are missing; in during (test_job_runner.py:")
    assert " < fit (training_site.py:" in ending.error
    assert "private" not in ending.error
    assert not [name for name in fake_run.names() if name.startswith("payload:")]


def test_worker_continues_after_a_failed_job(fake_run: SampleRun, site: TrainingSite) -> None:
    site.task.during = lambda progress: 1 / 0
    site.train(1)
    site.task.during = lambda progress: None
    [entry] = site.train(2)
    assert entry.kind == "update"
    assert set(fake_run.posted_frame(entry).parameters.tolist()) == {0.25}


def test_hand_back_ends_the_job_as_returned(fake_run: SampleRun, site: TrainingSite) -> None:
    def during(progress: Any) -> None:
        assert site.runner.interruptible
        raise HandBack

    site.task.during = during
    [entry] = site.train()
    assert (entry.kind, read(Ending, entry.body)) == ("ended", Ending(reason="returned"))
    assert not site.runner.interruptible


def test_stop_during_a_claim_hands_the_job_back_untrained(
    fake_run: SampleRun, site: TrainingSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = site.store.claim

    def told_meanwhile(*arguments: Any) -> Any:
        site.runner.told_to_stop = True  # by a signal whose handler must not raise here
        return claim(*arguments)

    monkeypatch.setattr(site.store, "claim", told_meanwhile)
    [entry] = site.train()
    assert (entry.kind, read(Ending, entry.body)) == ("ended", Ending(reason="returned"))
    assert site.task.seen == []


def test_stop_during_an_outage_abandons_the_claim(
    fake_run: SampleRun, site: TrainingSite, monkeypatch: pytest.MonkeyPatch, logs: list[Any]
) -> None:
    def absent(*arguments: Any) -> None:
        site.runner.told_to_stop = True
        raise redis.ConnectionError("gone")

    monkeypatch.setattr(site.store, "claim", absent)
    assert site.train() == []
    assert site.task.seen == []
    assert [entry["event"] for entry in logs] == ["job not begun"]


def test_training_of_a_closed_job_is_dropped(fake_run: SampleRun, site: TrainingSite, logs: list[Any]) -> None:
    def during(progress: Any) -> None:
        fake_run.coordinator.close("sample-00000001", {"kind": "abandoned"}, 1)
        site.heartbeat.beat()
        progress()
        raise AssertionError("training went on")

    site.task.during = during
    assert site.train() == []
    assert [entry["event"] for entry in logs] == ["job dropped: it was closed during training"]
    assert not [name for name in fake_run.names() if name.startswith("payload:")]


def test_late_update_is_refused_and_leaves_no_payload(fake_run: SampleRun, site: TrainingSite, logs: list[Any]) -> None:
    def during(progress: Any) -> None:
        fake_run.coordinator.close("sample-00000001", {"kind": "abandoned"}, 1)

    site.task.during = during
    assert site.train() == []
    assert [(entry["event"], entry["reason"]) for entry in logs] == [
        ("update refused: its job has ended or belongs to another attempt", "closed")
    ]
    assert not [name for name in fake_run.names() if name.startswith("payload:")]


def test_job_closed_before_its_claim_is_not_trained(fake_run: SampleRun, site: TrainingSite, logs: list[Any]) -> None:
    fake_run.dispatch()
    fake_run.coordinator.close("sample-00000001", {"kind": "abandoned"}, 1)
    site.runner.train(fake_run.order().model_dump())
    assert site.task.seen == []
    assert [entry["event"] for entry in logs] == ["job not begun"]


def test_job_of_a_deleted_version_is_dropped(fake_run: SampleRun, site: TrainingSite) -> None:
    blob = stored(fake_run.client, fake_run.keys.model(0) + ":0")
    fake_run.client.delete(fake_run.keys.model(0) + ":0")
    assert [e.kind for e in site.train(1)] in ([], ["ended"])
    assert site.task.seen == []
    fake_run.client.set(fake_run.keys.model(0) + ":0", blob)
    assert [e.kind for e in site.train(2)] == ["update"]


def current_job(site: TrainingSite) -> str:
    """Return the job whose lease the heartbeat renews now."""
    claim = site.heartbeat._current
    return claim.job if claim else ""


def test_heartbeat_renews_the_job_only_during_training(fake_run: SampleRun, site: TrainingSite) -> None:
    during = []
    site.task.during = lambda progress: during.append(current_job(site))
    site.train()
    assert during == ["sample-00000001"]
    assert site.heartbeat._current is None


def test_redis_error_of_the_progress_callback_ends_no_job(fake_run: SampleRun, site: TrainingSite) -> None:
    called = []

    def show() -> None:
        called.append(current_job(site))
        raise redis.ConnectionError

    [entry] = site.train(on_progress=show)
    assert entry.kind == "update"
    assert called == ["sample-00000001"] * 3, "progress is called after the download, a batch and encoding"


def test_commands_for_post_run_behind_the_post(fake_run: SampleRun, site: TrainingSite) -> None:
    [entry] = site.train(commands_for_post=lambda: [("SET", "beside", "the post")])
    assert entry.kind == "update"
    assert site.commands_sent
    assert fake_run.client.get("beside") == b"the post"


def test_train_reports_that_no_commands_were_sent(fake_run: SampleRun, site: TrainingSite) -> None:
    site.train()
    assert site.commands_sent is False


def test_commands_for_post_run_behind_a_refused_post(fake_run: SampleRun, site: TrainingSite) -> None:
    site.task.during = lambda progress: fake_run.coordinator.close("sample-00000001", {"kind": "abandoned"}, 1)
    assert site.train(commands_for_post=lambda: [("SET", "beside", "the post")]) == []
    assert site.commands_sent
    assert fake_run.client.exists("beside")


def test_commands_for_post_do_not_run_where_training_fails(fake_run: SampleRun, site: TrainingSite) -> None:
    site.task.during = lambda progress: 1 / 0
    site.train(commands_for_post=lambda: [("SET", "beside", "the post")])
    assert site.commands_sent is False
    assert not fake_run.client.exists("beside")


def test_stop_between_jobs_raises_nothing(site: TrainingSite) -> None:
    site.runner.stop()
    assert site.runner.told_to_stop


def test_stop_during_training_hands_the_job_back(fake_run: SampleRun, site: TrainingSite) -> None:
    site.task.during = lambda progress: site.runner.stop()
    [entry] = site.train()
    assert read(Ending, entry.body) == Ending(reason="returned")
    assert site.runner.told_to_stop


# Orders for others


@pytest.mark.parametrize("change", [{"client": "c1"}, {"run": "another"}])
def test_order_for_another_client_or_run_is_refused(
    fake_run: SampleRun, site: TrainingSite, change: dict[str, Any]
) -> None:
    fake_run.dispatch()
    with pytest.raises(WireError, match="not served here"):
        site.runner.train({**fake_run.order().model_dump(), **change})
    assert fake_run.coordinator.jobs()[0].attempt == 0, "the refused job was claimed"


@pytest.mark.parametrize(
    "change", [{"code": "import os"}, {"job": "../x"}, {"training": {"local_epochs": 10**9, "x": 1}}]
)
def test_malformed_order_is_refused(fake_run: SampleRun, site: TrainingSite, change: dict[str, Any]) -> None:
    with pytest.raises(WireError, match="Order: "):
        site.runner.train({**fake_run.order().model_dump(), **change})
    assert site.task.seen == []


# Data that may leave the site


@pytest.mark.parametrize("value", ["text", [1, 2], None, {"a": 1}])
def test_metric_that_is_not_a_number_fails_the_job(
    fake_run: SampleRun, site: TrainingSite, value: dict[str, Any] | list[int] | str | None
) -> None:
    metrics: Any = {"rows": value}
    site.task.metrics = metrics
    [entry] = site.train()
    ending = read(Ending, entry.body)
    assert ending.reason == "failed"
    assert ending.error.startswith(
        f"TaskError: fit returned 'rows' as {type(value).__name__.replace('NoneType', 'None')}"
    )


def test_metric_that_is_not_finite_is_part_of_the_update(fake_run: SampleRun, site: TrainingSite) -> None:
    site.task.metrics = {"loss": float("nan"), "count": True}
    [entry] = site.train()
    metrics = read(Update, entry.body).metrics
    assert math.isnan(metrics["loss"])
    assert metrics["count"] == 1.0


def test_description_of_an_error_is_bounded() -> None:
    def deep(n: Any) -> None:
        if n:
            deep(n - 1)
        raise ValueError("x" * 10_000)

    with pytest.raises(ValueError) as caught:
        deep(50)
    described = exception_with_place(caught.value)
    assert len(described) < 1000
    assert described.count("deep (test_job_runner.py:") == 3


# Slow sites


class Time:
    """A clock that only sleeping and training advance."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def test_slow_site_sleeps_in_proportion_to_each_batch() -> None:
    time, calls = Time(), []
    progress = job_runner_module._slow(lambda: calls.append(time.now), 20.0, time.clock, time.sleep)
    for seconds in (1.0, 3.0):
        time.now += seconds
        progress()
    assert time.slept == [19.0, 57.0]
    assert calls == [20.0, 80.0]


def test_site_at_full_speed_never_sleeps() -> None:
    def progress() -> Any:
        return None

    assert slowed(progress, 1.0) is progress


def test_slowdown_is_set_per_client(fake_run: SampleRun, monkeypatch: pytest.MonkeyPatch) -> None:
    factors = []

    def noted(progress: Progress, factor: float) -> Progress:
        factors.append(factor)
        return progress

    monkeypatch.setattr(job_runner_module, "slowed", noted)
    TrainingSite(fake_run, slowdown={"c0": 20.0}).train(1)
    TrainingSite(fake_run, slowdown={"c9": 20.0}).train(2)
    assert factors == [20.0, 1.0]


def test_slowdown_uses_the_clock_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    time = Time()
    monkeypatch.setattr("time.perf_counter", time.clock)
    monkeypatch.setattr("time.sleep", time.sleep)
    progress = slowed(lambda: None, 3.0)
    time.now += 2.0
    progress()
    assert time.slept == [4.0]


# Logs


def test_lines_of_a_job_have_its_client_and_name(fake_run: SampleRun, site: TrainingSite) -> None:
    seen: list[dict[str, Any]] = []
    site.task.during = lambda progress: seen.append(dict(structlog.contextvars.get_contextvars()))
    site.train(1)
    [fields] = seen
    assert fields["client"] == "c0"
    assert fields["job"] == fake_run.order(1).job
    assert not structlog.contextvars.get_contextvars()

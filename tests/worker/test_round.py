"""One training job, from its order to what the coordinator receives: against real stores, with nothing else real."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import redis
import structlog
import torch

from fedqueue import Task, TrainResult
from fedqueue.config.compression import CompressionConfig
from fedqueue.errors import WireError
from fedqueue.local_update import reportable_metrics
from fedqueue.protocol.messages import MAX_METRICS, Ending, Update, read
from fedqueue.tensors.codec import upward
from fedqueue.tensors.frame import Frame
from fedqueue_worker import job_runner as round_module
from fedqueue_worker.egress_log import EgressLog
from fedqueue_worker.heartbeat import Heartbeat
from fedqueue_worker.job_runner import UNCOMPRESSED, HandBack, JobRunner, describe, slowed


@pytest.fixture(autouse=True)
def logs():
    with structlog.testing.capture_logs() as captured:
        yield captured


class Doubling(Task):
    """Adds 0.25 to every parameter, sets the buffers to 5 and the counters to 9: a training that can be checked."""

    def __init__(self):
        self.seen = []
        self.during = lambda progress: None
        self.metrics = {"loss": 0.5}

    def fit(self, model, data, config, progress):
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.seen.append((state, data, config, torch.initial_seed()))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.25)
            for buffer in model.buffers():
                buffer.fill_(5.0 if buffer.dtype.is_floating_point else 9)
        self.during(progress)
        progress()
        return TrainResult(np.int64(10), self.metrics)


class Site:
    """A worker's round on a sample run."""

    def __init__(self, run, keep_base=True, slowdown=None, compression=UNCOMPRESSED):
        self.run, self.task = run, Doubling()
        self.store = run.join("c0")
        self.ended = []
        self.heartbeat = Heartbeat(self.store, ["c0"], 60, 60, self.ended.append)
        self.round = JobRunner(
            self.store, self.task, run.module, self.heartbeat, 60, keep_base, slowdown or {}, compression=compression
        )
        self.round.load("c0", "the rows of c0")
        run.coordinator.receive(0.001)

    def train(self, number=1):
        self.run.dispatch(number)
        self.round.train(self.run.order(number).model_dump())
        return self.run.coordinator.receive(0.001)


@pytest.fixture
def site(fake_run):
    return Site(fake_run)


def frame_of(run, entry):
    frame = Frame(run.manifest)
    run.coordinator.read_blob(run.keys.payload(entry.job, entry.attempt), frame.buffer)
    return frame


# The path of an update


def test_job_becomes_an_update_whose_delta_is_local_minus_base(fake_run, site):
    fake_run.publish(1)  # every float is 1
    [entry] = site.train()
    assert (entry.kind, entry.client, entry.base, entry.attempt) == ("update", "c0", 1, 1)
    frame = frame_of(fake_run, entry)
    assert frame.parameters.unique().tolist() == [0.25]
    assert frame.buffers.unique().tolist() == [5.0], "buffers travel as values"
    assert frame.counters.tolist() == [9]
    assert site.round.jobs == 1


def test_header_says_what_was_trained_on_and_how_it_went(fake_run, site):
    [entry] = site.train()
    update = read(Update, entry.body)
    assert (update.examples, update.nbytes, update.chunks) == (10, fake_run.manifest.nbytes, 1)
    assert update.metrics == {"loss": 0.5}
    assert 0 <= update.seconds < 60


def test_task_trains_the_newest_version_on_its_clients_data_with_the_orders_settings(fake_run, site):
    fake_run.publish(1)
    site.train(number=7)
    [(state, data, config, seed)] = site.task.seen
    floats = [tensor for tensor in state.values() if tensor.dtype.is_floating_point]
    assert all(tensor.unique().tolist() == [1.0] for tensor in floats)
    assert data == "the rows of c0"
    assert config == fake_run.order(7).training
    assert seed == 7


def test_jobs_in_a_row_each_start_from_the_base_and_not_from_the_last_training(fake_run, site):
    first, second = site.train(1)[0], site.train(2)[0]
    for entry in (first, second):
        assert frame_of(fake_run, entry).parameters.unique().tolist() == [0.25]
    assert site.task.seen[0][0].keys() == site.task.seen[1][0].keys()
    for name, tensor in site.task.seen[0][0].items():
        assert torch.equal(tensor, site.task.seen[1][0][name])


def test_default_training_ends_in_the_delta_that_the_same_training_elsewhere_gives(fake_run):
    """The delta plus the base is, bit for bit, the model that the task's own loop makes of that base."""

    class Default(Task):
        pass

    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    data = torch.utils.data.TensorDataset(torch.randn(20, 3), torch.randint(0, 2, (20,)))
    site = Site(fake_run)
    site.round = JobRunner(site.store, Default(), fake_run.module, site.heartbeat, 60, True, {})
    site.round.load("c0", data)
    [entry] = site.train()
    received = frame_of(fake_run, entry)

    base, local = Frame(fake_run.manifest), Frame(fake_run.manifest)
    base.write(module)
    torch.manual_seed(1)
    Default().fit(module, data, fake_run.order(1).training, lambda: None)
    local.read(module)
    assert torch.equal(received.parameters, local.parameters - base.parameters)
    assert torch.equal(received.buffers, local.buffers)
    assert torch.equal(received.counters, local.counters)
    assert received.parameters.abs().max() > 0


# Compression


class Ramp(Doubling):
    """Adds 0, 1, 2, … to the parameters, so that the last are the largest of every delta."""

    def fit(self, model, data, config, progress):
        with torch.no_grad():
            vector = torch.nn.utils.parameters_to_vector(model.parameters())
            torch.nn.utils.vector_to_parameters(vector + torch.arange(len(vector)), model.parameters())
        self.during(progress)
        return TrainResult(10)


def compressed_site(run, **compression):
    config = CompressionConfig(**compression)
    site = Site(run, compression=config)
    site.round._task = site.task = Ramp()
    codec = upward(config, run.manifest)

    def decoded(entry):
        wire = np.empty(read(Update, entry.body).nbytes, np.uint8)
        run.coordinator.read_blob(run.keys.payload(entry.job, entry.attempt), wire)
        return codec.decode(wire).whole().parameters.tolist()

    return site, decoded


TOP = {"up": "topk", "k": 0.15}  # 2 of 12 parameters


def test_what_was_not_sent_comes_with_the_clients_next_update(fake_run):
    site, decoded = compressed_site(fake_run, **TOP)
    first, second = decoded(site.train(1)[0]), decoded(site.train(2)[0])
    assert first == [0] * 10 + [10, 11]
    assert second == [0] * 8 + [2 * 8, 2 * 9, 0, 0], "8 and 9 were held back once"


def test_worker_that_starts_again_has_nothing_held_back_and_says_so(fake_run, logs):
    site, decoded = compressed_site(fake_run, **TOP)
    site.train(1)
    site.round.load("c0", "the rows of c0")  # as a client that comes to this worker
    again, decoded = compressed_site(fake_run, **TOP)
    assert decoded(again.train(2)[0]) == [0] * 10 + [10, 11]
    assert [line["client"] for line in logs if line["event"] == "error feedback begins at zero"] == ["c0"] * 3


def test_update_of_a_job_that_was_closed_meanwhile_changes_nothing_of_what_is_held_back(fake_run):
    site, decoded = compressed_site(fake_run, **TOP)
    site.train(1)
    site.task.during = lambda progress: fake_run.coordinator.close("sample-00000002", {"kind": "abandoned"}, 1)
    assert site.train(2) == []
    site.task.during = lambda progress: None
    assert decoded(site.train(3)[0]) == [0] * 8 + [2 * 8, 2 * 9, 0, 0]


def test_update_whose_answer_was_lost_was_taken(fake_run, monkeypatch):
    site, decoded = compressed_site(fake_run, **TOP)
    post = site.store.post

    def post_twice(*args):
        assert post(*args) == ""
        return post(*args)  # as the retry of a command whose answer did not come: "replayed"

    monkeypatch.setattr(site.store, "post", post_twice)
    first = decoded(site.train(1)[0])
    assert first == [0] * 10 + [10, 11]
    monkeypatch.setattr(site.store, "post", post)
    assert decoded(site.train(2)[0]) == [0] * 8 + [2 * 8, 2 * 9, 0, 0]


def test_header_and_outbox_say_what_really_travels(fake_run, tmp_path):
    site, _ = compressed_site(fake_run, up="int8", up_lossless="zstd")
    site.round._egress_log = EgressLog(tmp_path / "outbox.jsonl")
    [entry] = site.train()
    update = read(Update, entry.body)
    stored = fake_run.client.get(fake_run.keys.payload(entry.job, 1) + ":0")
    assert (update.encoding, update.nbytes, update.chunks) == ("int8+zstd", len(stored), 1)
    [line] = map(json.loads, (tmp_path / "outbox.jsonl").read_text().splitlines())
    assert (line["bytes"], line["sha256"]) == (len(stored), hashlib.sha256(stored).hexdigest())


@pytest.mark.parametrize("keep", [True, False])
def test_base_stays_held_until_the_merge_only_where_the_merge_needs_it(fake_run, keep):
    site = Site(fake_run, keep_base=keep)
    held = []
    site.task.during = lambda progress: held.append(
        fake_run.client.hmget(fake_run.keys.attempt("sample-00000001"), "held", "base")
    )
    site.train()
    assert held == [[b"1" if keep else None, b"0"]]


def test_only_a_delta_and_counted_metrics_leave(fake_run, site):
    """I8: of what a job adds to Redis, everything is accounted for."""
    before = set(fake_run.contents())
    [entry] = site.train()
    fedqueues = {name for name in fake_run.contents() if not name.startswith("rq:")}
    added = {name.rpartition("}:")[2] for name in fedqueues - before}
    assert added == {"job:sample-00000001", "attempt:sample-00000001", "payload:sample-00000001:1:0", "jobs", "turns"}
    assert set(read(Update, entry.body).model_dump()) == {
        "examples", "encoding", "nbytes", "chunks", "metrics", "seconds", "digest",
    }  # fmt: skip
    everything = repr(fake_run.contents()).encode()
    assert b"the rows of c0" not in everything


# Other ends


def test_exception_of_the_task_ends_the_job_as_failed_with_its_type_message_and_last_frames(fake_run, site):
    def during(progress):
        row = {"age": 54, "name": "private"}
        raise LookupError(f"{len(row)} columns are missing")

    site.task.during = during
    [entry] = site.train()
    assert entry.kind == "ended"
    ending = read(Ending, entry.body)
    assert ending.reason == "failed"
    assert ending.error.startswith("LookupError: 2 columns are missing; in during (test_round.py:")
    assert " < fit (test_round.py:" in ending.error
    assert "private" not in ending.error
    assert not [name for name in fake_run.names() if name.startswith("payload:")]


def test_worker_goes_on_after_a_failed_job(fake_run, site):
    site.task.during = lambda progress: 1 / 0
    site.train(1)
    site.task.during = lambda progress: None
    [entry] = site.train(2)
    assert entry.kind == "update"
    assert frame_of(fake_run, entry).parameters.unique().tolist() == [0.25]


def test_worker_told_to_stop_hands_its_job_back(fake_run, site):
    def during(progress):
        assert site.round.interruptible
        raise HandBack

    site.task.during = during
    [entry] = site.train()
    assert (entry.kind, read(Ending, entry.body)) == ("ended", Ending(reason="returned"))
    assert not site.round.interruptible


def test_worker_told_to_stop_while_it_claims_a_job_hands_it_back_untrained(fake_run, site, monkeypatch):
    claim = site.store.claim

    def told_meanwhile(*arguments):
        site.round.told_to_stop = True  # by a signal whose handler must not raise here
        return claim(*arguments)

    monkeypatch.setattr(site.store, "claim", told_meanwhile)
    [entry] = site.train()
    assert (entry.kind, read(Ending, entry.body)) == ("ended", Ending(reason="returned"))
    assert site.task.seen == []


def test_worker_told_to_stop_while_no_server_answers_its_claim_does_not_wait_for_it(fake_run, site, monkeypatch, logs):
    def absent(*arguments):
        site.round.told_to_stop = True
        raise redis.ConnectionError("gone")

    monkeypatch.setattr(site.store, "claim", absent)
    assert site.train() == []
    assert site.task.seen == []
    assert [entry["event"] for entry in logs] == ["job not begun"]


def test_work_on_a_job_that_was_closed_meanwhile_is_dropped(fake_run, site, logs):
    def during(progress):
        fake_run.coordinator.close("sample-00000001", {"kind": "abandoned"}, 1)
        site.heartbeat.beat()
        progress()
        raise AssertionError("training went on")

    site.task.during = during
    assert site.train() == []
    assert [entry["event"] for entry in logs] == ["work dropped"]
    assert not [name for name in fake_run.names() if name.startswith("payload:")]


def test_update_that_comes_too_late_is_refused_and_leaves_nothing(fake_run, site, logs):
    def during(progress):
        fake_run.coordinator.close("sample-00000001", {"kind": "abandoned"}, 1)

    site.task.during = during
    assert site.train() == []
    assert [(entry["event"], entry["reason"]) for entry in logs] == [("update refused", "closed")]
    assert not [name for name in fake_run.names() if name.startswith("payload:")]


def test_job_that_is_closed_before_it_begins_is_not_trained(fake_run, site, logs):
    fake_run.dispatch()
    fake_run.coordinator.close("sample-00000001", {"kind": "abandoned"}, 1)
    site.round.train(fake_run.order().model_dump())
    assert site.task.seen == []
    assert [entry["event"] for entry in logs] == ["job not begun"]


def test_job_of_a_version_that_is_gone_is_dropped_and_the_worker_goes_on(fake_run, site):
    blob = fake_run.client.get(fake_run.keys.model(0) + ":0")
    fake_run.client.delete(fake_run.keys.model(0) + ":0")
    assert [e.kind for e in site.train(1)] in ([], ["ended"])
    assert site.task.seen == []
    fake_run.client.set(fake_run.keys.model(0) + ":0", blob)
    assert [e.kind for e in site.train(2)] == ["update"]


def test_heartbeat_knows_the_job_only_while_it_is_trained(fake_run, site):
    during = []
    site.task.during = lambda progress: during.append(site.heartbeat._current)
    site.train()
    assert during[0].job == "sample-00000001"
    assert site.heartbeat._current is None


def test_whoever_shows_a_job_hears_of_its_progress_and_an_outage_of_that_does_not_end_it(fake_run, site):
    heard = []

    def show():
        heard.append(site.heartbeat._current)
        raise redis.ConnectionError

    site.round.on_progress = show
    [entry] = site.train()
    assert entry.kind == "update"
    assert [claim.job for claim in heard] == ["sample-00000001"] * 3, "the base is there, a batch is done, so is all"


# Orders that are not this worker's


@pytest.mark.parametrize("change", [{"client": "c1"}, {"run": "another"}])
def test_order_for_a_client_or_a_run_that_is_not_served_is_refused(fake_run, site, change):
    fake_run.dispatch()
    with pytest.raises(WireError, match="not served here"):
        site.round.train({**fake_run.order().model_dump(), **change})
    assert fake_run.coordinator.jobs()[0].attempt == 0, "the job is not even claimed"


@pytest.mark.parametrize("change", [{"code": "import os"}, {"job": "../x"}, {"training": {"epochs": 10**9, "x": 1}}])
def test_order_that_is_not_of_the_protocol_is_refused(fake_run, site, change):
    with pytest.raises(WireError, match="Order: "):
        site.round.train({**fake_run.order().model_dump(), **change})
    assert site.task.seen == []


# What may leave


def test_only_finite_numbers_under_short_names_are_presented():
    fit = TrainResult(
        1, {"loss": 0.5, "nan": float("nan"), "inf": float("-inf"), "n" * 99: np.float32(2), "count": True}
    )
    assert reportable_metrics(fit) == {"loss": 0.5, "n" * 64: 2.0, "count": 1.0}


def test_at_most_so_many_metrics_are_presented():
    many = {f"m{i}": float(i) if i else float("nan") for i in range(MAX_METRICS + 10)}
    shown = reportable_metrics(TrainResult(1, many))
    assert list(shown) == [f"m{i}" for i in range(1, MAX_METRICS + 1)]


@pytest.mark.parametrize("value", ["text", [1, 2], None, {"a": 1}])
def test_metric_that_is_no_number_fails_the_job(fake_run, site, value):
    site.task.metrics = {"rows": value}
    [entry] = site.train()
    assert read(Ending, entry.body).reason == "failed"


def test_description_of_an_error_is_bounded():
    def deep(n):
        if n:
            deep(n - 1)
        raise ValueError("x" * 10_000)

    with pytest.raises(ValueError) as caught:
        deep(50)
    described = describe(caught.value)
    assert len(described) < 1000
    assert described.count("deep (test_round.py:") == 3


# Slow sites


class Time:
    """A clock that only sleeping and working move."""

    def __init__(self):
        self.now, self.slept = 0.0, []

    def clock(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


def test_slow_site_sleeps_after_each_batch_until_it_took_so_many_times_as_long():
    time, calls = Time(), []
    progress = round_module._slow(lambda: calls.append(time.now), 20.0, time.clock, time.sleep)
    for seconds in (1.0, 3.0):
        time.now += seconds
        progress()
    assert time.slept == [19.0, 57.0]
    assert calls == [20.0, 80.0]


def test_site_at_full_speed_never_sleeps():
    def progress():
        return None

    assert slowed(progress, 1.0) is progress


def test_slowdown_is_the_clients_own(fake_run, monkeypatch):
    factors = []
    monkeypatch.setattr(round_module, "slowed", lambda progress, factor: factors.append(factor) or progress)
    Site(fake_run, slowdown={"c0": 20.0}).train(1)
    Site(fake_run, slowdown={"c9": 20.0}).train(2)
    assert factors == [20.0, 1.0]


def test_slowed_training_uses_the_clock_of_the_machine(monkeypatch):
    time = Time()
    monkeypatch.setattr(round_module.time, "perf_counter", time.clock)
    monkeypatch.setattr(round_module.time, "sleep", time.sleep)
    progress = slowed(lambda: None, 3.0)
    time.now += 2.0
    progress()
    assert time.slept == [4.0]

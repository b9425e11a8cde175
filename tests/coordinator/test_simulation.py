"""The virtual clock: arrivals by hand, equal runs for equal seeds, and the same bits as the coordinator over Redis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
import torch
from torch.utils.data import TensorDataset

from fedqueue import Client, Task
from fedqueue.config.loading import parse_config
from fedqueue.config.schema import Config
from fedqueue.errors import ConfigurationError, RunFailed, TaskError
from fedqueue.local_model import LocalModel
from fedqueue.local_update import compute_update, load_data
from fedqueue.protocol.messages import Order, Registration, read
from fedqueue.tensors.codec import downlink_codec, uplink_codec
from fedqueue.tensors.error_feedback import ErrorFeedback
from fedqueue.tensors.frame import Frame
from fedqueue.tensors.manifest import Manifest
from fedqueue.transport.worker_store import WorkerStore
from fedqueue_coordinator.core.run_summary import RunResult
from fedqueue_coordinator.operator.audit.replay import replay_folder
from fedqueue_coordinator.service.coordinator import Coordinator
from fedqueue_coordinator.service.coordinator_store import CoordinatorStore
from fedqueue_coordinator.service.replay_archive import REPLAY_FOLDER
from fedqueue_coordinator.simulation.virtual_clock import ClientDatasets, Simulation, TimingModel
from tests.support.builders import same_bits
from tests.support.scripted_run import result_of

SECOND = TimingModel(batch_seconds=1.0)


class PointsTask(Task):
    """A task of 24 points per client, in 3 batches. Training the client `raises` fails; `tested` adds test data."""

    def __init__(self, raises: str = "", tested: bool = False) -> None:
        self.raises, self.tested = raises, tested

    def model(self) -> torch.nn.Module:
        return torch.nn.Sequential(
            torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU(), torch.nn.Linear(4, 2)
        )

    def train_data(self, client: Client) -> TensorDataset:
        data = points(24, seed=1 + (client.partition or 0))
        data.client = client.id  # type: ignore[attr-defined]  # for `fit`
        return data

    def test_data(self) -> TensorDataset | None:
        return points(40, seed=0) if self.tested else None

    def fit(self, model: Any, data: Any, config: Any, progress: Any) -> Any:
        if data.client == self.raises:
            progress()
            raise RuntimeError("the scanner is on fire")
        return super().fit(model, data, config, progress)


def points(examples: int, seed: int) -> TensorDataset:
    x = torch.randn(examples, 3, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x[:, 0] > 0).long())


def simulated_config(names: Any = ("a", "b"), **sections: Any) -> Any:
    tree = {
        "name": "simulated",
        "task": {"entrypoint": "task.py:PointsTask"},
        "clients": {"names": list(names), "min_available": len(names), **sections.pop("clients", {})},
        "training": {"batch_size": 8, **sections.pop("training", {})},
        "aggregation": {"strategy": "fedasync"},
        "stop": {"versions": 4},
        "checkpoint": {"every_seconds": "off"},
    }
    return parse_config({**tree, **sections})


def simulate(config: Any, speeds: Any = SECOND, task: Any = None) -> tuple[Any, ...]:
    simulation = Simulation(config, ClientDatasets(task or PointsTask()), speeds)
    return simulation, simulation.run()


def merged(result: Any) -> Any:
    return [line for r in result.ledger if r["kind"] == "version" for line in r["merged"]]


def rows(result: Any, *names: Any) -> Any:
    return [tuple(line[name] for name in names) for line in merged(result)]


def test_arrivals_and_staleness_match_results_by_hand() -> None:
    """Client a takes 3 s and b 7.5 s: versions are made at 3, 6, 7.5 and 9 s, and b's first update has staleness 2."""
    _, result = simulate(simulated_config(clients={"slowdown": {"b": 2.5}}))
    assert rows(result, "client", "at", "base", "staleness", "training_seconds") == [
        ("a", 3.0, 0, 0, 3.0), ("a", 6.0, 1, 0, 3.0), ("b", 7.5, 0, 2, 7.5), ("a", 9.0, 2, 1, 3.0),
    ]  # fmt: skip
    assert result.stopped_because == "versions: 4 of 4"


def test_base_is_the_newest_version_at_the_start_of_training() -> None:
    """An order takes 2 s to arrive: a's second order, sent at 5 s, trains from the version that b made at 6 s."""
    config = simulated_config(clients={"slowdown": {"b": 4 / 3}})
    _, result = simulate(config, TimingModel(batch_seconds=1.0, job_seconds=2.0))
    assert rows(result, "client", "at", "base")[:3] == [("a", 5.0, 0), ("b", 6.0, 0), ("a", 10.0, 2)]


def test_barrier_waits_for_the_slowest() -> None:
    config = simulated_config(aggregation={"strategy": "fedavg"}, clients={"slowdown": {"b": 20}}, stop={"versions": 2})
    _, result = simulate(config)
    assert rows(result, "client", "at", "base") == [("a", 3.0, 0), ("b", 60.0, 0), ("a", 63.0, 1), ("b", 120.0, 1)]


def test_stop_after_seconds_counts_virtual_seconds() -> None:
    simulation, result = simulate(simulated_config(stop={"seconds": 100.0}, clients={"slowdown": {"a": 20, "b": 30}}))
    assert simulation.now == 100.0
    assert rows(result, "at") == [(60.0,), (90.0,)]
    assert [r["reason"] for r in result.ledger if r["kind"] == "abandoned"] == ["run_ended"] * 2


def test_seed_determines_the_simulated_run() -> None:
    def run(seed: Any) -> Any:
        config = simulated_config(
            seed=seed, aggregation={"strategy": "fedbuff", "buffer_size": 2}, stop={"versions": 5}
        )
        return simulate(config, TimingModel(batch_seconds=1.0, jitter=0.3), PointsTask(tested=True))[1]

    first, second, other = run(3), run(3), run(4)
    assert first.ledger == second.ledger
    assert same_bits(first.model, second.model)
    assert rows(first, "at") != rows(other, "at")
    assert not same_bits(first.model, other.model)


def test_datasets_can_be_reused_by_a_second_run() -> None:
    sites = ClientDatasets(PointsTask())
    runs = [Simulation(simulated_config(), sites, SECOND).run() for _ in range(2)]
    assert same_bits(runs[0].model, runs[1].model)


def test_noise_has_median_one_and_the_configured_spread() -> None:
    speeds = TimingModel(batch_seconds=1.0, jitter=0.2)
    logs = np.log([speeds.training_seconds(1, 1.0, seed) for seed in range(4000)])
    assert abs(logs.mean()) < 0.02
    assert abs(logs.std() - 0.2) < 0.01


def test_evaluations_match_their_versions_including_the_last() -> None:
    task = PointsTask(tested=True)
    _, result = simulate(simulated_config(evaluation={"every_versions": 3}), task=task)
    evaluations = {r["version"]: r["metrics"] for r in result.ledger if r["kind"] == "evaluation"}
    assert list(evaluations) == [0, 3, 4]
    model = task.model()
    result.model.write(model)
    assert evaluations[4] == pytest.approx(task.evaluate(model, task.test_data()))


def test_run_stops_at_its_target_and_keeps_the_version() -> None:
    config = simulated_config(stop={"target": {"loss": 0.6}, "versions": 50})
    _, result = simulate(config, task=PointsTask(tested=True))
    assert result.stopped_because.startswith("target: loss")
    losses = {point["version"]: point["loss"] for point in result.history}
    assert result.version == next(version for version, loss in losses.items() if loss <= 0.6)
    assert result.version > 0


@pytest.mark.parametrize("target", [{"accuracy": 0.01}, {"acc": 0.9}])
def test_simulation_refuses_a_target_that_tells_nothing(target: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"^stop\.target: "):
        simulate(simulated_config(stop={"target": target}), task=PointsTask(tested=True))
    with pytest.raises(ConfigurationError, match=r"^stop\.target: nothing measures"):
        simulate(simulated_config(stop={"target": target}), task=PointsTask())


def test_raising_task_fails_its_client_but_not_the_run() -> None:
    _, result = simulate(simulated_config(), task=PointsTask(raises="b"))
    assert {line["client"] for line in merged(result)} == {"a"}
    failures = [r for r in result.ledger if r["kind"] == "abandoned" and r["reason"] == "failed"]
    assert failures[0]["client"] == "b"
    assert failures[0]["seconds"] == 1.0  # after one batch
    assert "the scanner is on fire" in failures[0]["error"]


def test_run_fails_when_every_client_fails() -> None:
    config = simulated_config(("a",), dispatch={"max_client_failures": 2})
    _, result = simulate(config, task=PointsTask(raises="a"))
    assert result.failed


def test_run_that_cannot_continue_is_an_error() -> None:
    """The run waits for more clients than exist, which no valid file can configure."""
    config = simulated_config()
    config = config.model_copy(update={"clients": config.clients.model_copy(update={"min_available": 3})})
    with pytest.raises(RunFailed, match="no client trains"):
        simulate(config)


# Against the real coordinator


class Workers(CoordinatorStore):
    """The coordinator's store, in which workers follow the simulation's trace before each wait for entries.

    The workers use the real worker store, claims, fetches and posts, but no processes.
    """

    def begin(self, config: Any, task: Any, trace: Any) -> None:
        self.config, self.task, self.trace = config, task, list(trace)
        self.worker = WorkerStore(self.redis, self.run, "worker")
        self.training: dict[Any, Any] = {}
        self.left: dict[Any, Any] = {}
        self.feedback: ErrorFeedback | None = None
        self.joined = False
        self.now = 0.0

    def receive(self, block_seconds: Any, count: int = 32) -> Any:
        if not self.joined:
            self._join()
            return super().receive(0.001, count)
        while self.trace:
            self.now, what, job = self.trace.pop(0)
            if what == "begins":
                self._train(job)
                continue
            if what == "arrives":
                assert self.worker.post(*self.training.pop(job)) == ""
                assert self.feedback is not None
                self.feedback.accepted(*self.left.pop(job))
            break
        return super().receive(0.001, count)

    def _join(self) -> None:
        self.joined = True
        for client in self.config.clients.ids:
            assert self.worker.join([client], 3600) == client
            examples = len(self.task.train_data(self.config.clients.client(client)))
            assert self.worker.register(Registration(client=client, examples=examples))

    def _train(self, job: Any) -> None:
        model = self.task.model()
        manifest = Manifest.from_module(model, self.config.aggregation)
        order = read(Order, next(j.order for j in self.jobs() if j.job == job))
        claim = self.worker.claim(job, 3600)
        base, local = Frame(manifest), Frame(manifest)
        base.frozen = self.worker.read_frozen(manifest.frozen_nbytes)
        down, up = (of(self.config.compression, manifest) for of in (downlink_codec, uplink_codec))
        self.worker.fetch_model(claim.version, down, base)
        client = self.config.clients.client(order.client)
        data, _ = load_data(self.task, client, self.config.seed)
        local_model = LocalModel(self.task, model, manifest)
        progress = local_model.progress(client, claim.version, lambda: None)
        update = compute_update(self.task, local_model, data, order, base, local, progress)
        self.feedback = self.feedback or ErrorFeedback(up)
        self.training[job] = claim, *self.feedback.encode(order.client, local, update, order.seed)
        self.left[job] = order.client, local


def led(config: Config, task: Task, store: Workers, folder: Path) -> RunResult:
    """Lead the run to its end, by the clock of its workers."""
    return result_of(Coordinator(config, task, store, folder, clock=lambda: store.now, sleep=lambda seconds: None))


@pytest.mark.parametrize("strategy", ["fedavg", "fedbuff"])
def test_client_without_examples_takes_no_part(strategy: str) -> None:
    class Empty(PointsTask):
        def train_data(self, client: Any) -> Any:
            return points(0, seed=1) if client.id == "b" else super().train_data(client)

    merging = {"strategy": strategy, "buffer_size": 2}
    config = simulated_config(("a", "b", "c"), aggregation=merging, clients={"min_available": "auto"})
    result = Simulation(config, ClientDatasets(Empty()), SECOND).run()
    assert {line["client"] for record in result.ledger for line in record.get("merged", [])} == {"a", "c"}
    [left_out] = [record for record in result.ledger if record["kind"] == "unavailable"]
    assert (left_out["client"], left_out["error"]) == ("b", "no examples")


def test_steps_are_the_time_of_a_fit_that_reports_no_batch() -> None:
    class Silent(PointsTask):
        def fit(self, model: Any, data: Any, config: Any, progress: Any) -> Any:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for _ in range(5):
                optimizer.zero_grad()
                self.loss(model, data.tensors).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            return len(data)

    result = Simulation(simulated_config(("a",)), ClientDatasets(Silent()), SECOND).run()
    assert result.ledger[0]["merged"][0]["at"] == 5.0


DEADLINE = {"over_selection": 1.4, "round_deadline_seconds": 4.5}
ZSTD = {"uplink_lossless": "zstd", "downlink_lossless": "zstd"}
COMPASS = {"schedule": "fedcompass", "fedcompass": {"min_steps": 3, "max_steps": 12, "latest_factor": 1.1}}


@pytest.mark.parametrize(
    ("aggregation", "dispatch", "compression"),
    [
        ({"strategy": "fedasync"}, {}, {}),
        ({"strategy": "fedbuff", "buffer_size": 3}, {"selection": "stalest", "concurrency": 2}, {}),
        ({"strategy": "fedavg", "cohort_size": 2}, {"selection": "round_robin"}, {}),
        ({"strategy": "fedavg", "cohort_size": 2}, DEADLINE, {}),
        ({"strategy": "fedbuff"}, {"max_share": 0.4, "share_window": 3}, {}),
        ({"strategy": "fedbuff"}, COMPASS, {}),
        ({"strategy": "fedasync"}, {}, {"uplink": "int8", "downlink": "bfloat16", "int8_block": 16}),
        (
            {"strategy": "fedbuff", "buffer_size": 3},
            {},
            {"uplink": "topk", "downlink": "int8", "topk_ratio": 0.2, **ZSTD},
        ),
        (
            {"strategy": "fedavg", "cohort_size": 2},
            DEADLINE,
            {"uplink": "randomk", "downlink": "float16", "topk_ratio": 0.2},
        ),
        ({"strategy": "ca2fl", "buffer_size": 2}, {}, {"uplink": "bfloat16", "downlink": "float32", **ZSTD}),
    ],
    ids=[
        "fedasync",
        "fedbuff",
        "fedavg",
        "deadline",
        "share",
        "compass",
        "int8-bfloat16",
        "topk-int8-zstd",
        "randomk-float16",
        "bfloat16-float32-zstd",
    ],
)
@pytest.mark.server
def test_simulation_and_coordinator_produce_the_same_bits(
    server_client: redis.Redis,
    tmp_path: Path,
    aggregation: dict[str, Any],
    dispatch: dict[str, Any],
    compression: dict[str, Any],
) -> None:
    config = simulated_config(
        ("a", "b", "c"), aggregation=aggregation, clients={"slowdown": {"b": 2.5, "c": 1.3}}, stop={"versions": 8},
        server_optimizer={"name": "adam", "learning_rate": 0.05},
        dispatch={"leader_lease_seconds": 3600, "lease_seconds": 3600, **dispatch}, compression=compression,
        ledger={"keep_payloads": True},
    )  # fmt: skip
    task = PointsTask()
    simulation, simulated = simulate(config, TimingModel(batch_seconds=1.0, jitter=0.2), task)
    store = Workers(server_client, config.name, "owner")
    store.begin(config, task, simulation.trace)
    real = led(config, task, store, tmp_path)
    assert not store.trace
    pattern = ("job", "client", "base", "staleness", "examples", "weight", "norm", "at", "share")
    assert rows(real, *pattern) == rows(simulated, *pattern)
    endings = [[r for r in result.ledger if r["kind"] not in ("version", "evaluation")] for result in (real, simulated)]
    assert endings[0] == endings[1]
    assert same_bits(real.model, simulated.model)
    again = replay_folder(tmp_path / REPLAY_FOLDER, real.ledger)
    assert (again.updates, again.problems) == (len(merged(real)), [])
    if aggregation["strategy"] == "fedavg":
        assert {line["staleness"] for line in merged(real)} == {0}
        assert any(r["reason"] == "late" for r in endings[0]) == (dispatch == DEADLINE)


class AllAtOnce(Workers):
    """Workers that post every open job before the coordinator reads, which is more updates than a round merges."""

    def receive(self, block_seconds: Any, count: int = 32) -> Any:
        if not self.joined:
            self._join()
        for job in [job.job for job in self.jobs() if job.state == "open"]:
            self._train(job)
            assert self.worker.post(*self.training.pop(job)) == ""
        return CoordinatorStore.receive(self, 0.001, count)


def test_update_posted_as_its_round_closes_ends_once_as_late(redis_client: redis.Redis, tmp_path: Path) -> None:
    config = simulated_config(
        ("a", "b", "c"), aggregation={"strategy": "fedavg", "cohort_size": 2}, stop={"versions": 3},
        dispatch={"leader_lease_seconds": 3600, "lease_seconds": 3600, "over_selection": 1.4},
    )  # fmt: skip
    store = AllAtOnce(redis_client, config.name, "owner")
    store.begin(config, PointsTask(), [])
    result = result_of(Coordinator(config, PointsTask(), store, tmp_path, sleep=lambda seconds: None))
    others = [(r["job"], r["reason"]) for r in result.ledger if r["kind"] in ("rejected", "abandoned")]
    ended = [*(line["job"] for line in merged(result)), *(job for job, _ in others)]
    numbers = sorted(int(job.split("-")[-2]) for job in ended)
    assert numbers == list(range(1, result.jobs_dispatched + 1))
    assert [reason for _, reason in others].count("late") >= 2
    assert {line["staleness"] for line in merged(result)} == {0}
    assert not redis_client.exists(store.keys.jobs)


class ModelTask(PointsTask):
    """A task whose model is what it was made with."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model = model

    def model(self) -> Any:
        return self._model


def test_compiled_model_is_simulated() -> None:
    config = simulated_config(("a", "b"), stop={"versions": 2})
    compiled = torch.compile(torch.nn.Linear(3, 2), backend="eager")
    assert Simulation(config, ClientDatasets(ModelTask(compiled)), SECOND).run().version == 2


@pytest.mark.parametrize("model", [None, 3, torch.nn.Linear])
def test_model_that_is_no_module_is_refused_by_its_type(model: Any) -> None:
    config = simulated_config(("a", "b"), stop={"versions": 2})
    with pytest.raises(
        TaskError, match=rf"ModelTask.model\(\) returned {type(model).__name__}; expected a torch.nn.Module"
    ):
        Simulation(config, ClientDatasets(ModelTask(model)), SECOND)

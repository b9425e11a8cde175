"""Simulated runs with keepers: versions near those without, equal bits for equal seeds, and those over Redis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
import torch

from fedqueue.config.schema import Config
from fedqueue.errors import ManifestMismatch
from fedqueue.local_model import LocalModel
from fedqueue.local_update import compute_update, load_data
from fedqueue.protocol.coordinator_identity import CoordinatorIdentity
from fedqueue.protocol.key_files import (
    COORDINATOR_KEY,
    COORDINATOR_PUBLIC,
    KEEPERS,
    REVOKED,
    KeyFile,
    read_signing_key,
    read_trusted_keys,
)
from fedqueue.protocol.messages import Order, Registration, read
from fedqueue.protocol.roster import Roster
from fedqueue.protocol.signed_envelope import digest_of
from fedqueue.protocol.site_identity import SiteIdentity
from fedqueue.secure.masked_update import Attempt, Masking
from fedqueue.tensors.codec import downlink_codec
from fedqueue.tensors.frame import Frame
from fedqueue.tensors.manifest import Manifest
from fedqueue.transport.worker_store import WorkerStore
from fedqueue_coordinator.core.run_summary import RunResult
from fedqueue_coordinator.service.coordinator import Coordinator
from fedqueue_coordinator.service.coordinator_store import CoordinatorStore
from fedqueue_coordinator.simulation.virtual_clock import ClientDatasets, Simulation, TimingModel
from tests.coordinator.test_simulation import PointsTask, merged, rows, simulated_config
from tests.support.builders import same_bits
from tests.support.masked_service import KEEPER_NAMES, SITES, ServedKeeper, make_keys
from tests.support.scripted_run import result_of

TIMING = TimingModel(batch_seconds=1.0, jitter=0.2)


class PlainTask(PointsTask):
    """Points and a model without buffers."""

    def model(self) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))


def masked_config(keepers: Any = KEEPER_NAMES, **sections: Any) -> Config:
    secure = {"keepers": keepers, "min_cohort": 2, **sections.pop("secure", {})}
    aggregation = {"strategy": "fedbuff", "buffer_size": 3, **sections.pop("aggregation", {})}
    tree: dict[str, Any] = {"stop": {"versions": 8}, "clients": {"slowdown": {"b": 2.5, "c": 1.3}}, **sections}
    config: Config = simulated_config(SITES, aggregation=aggregation, secure=secure, **tree)
    return config


def simulated(config: Config) -> tuple[Simulation, RunResult]:
    simulation = Simulation(config, ClientDatasets(PlainTask()), TIMING)
    return simulation, simulation.run()


def test_masked_simulation_comes_near_the_plain_one() -> None:
    constant = {"staleness": {"function": "constant"}}
    barrier = {"barrier": True, "buffer_size": 4, **constant}
    _, plain = simulated(masked_config(keepers=(), aggregation=barrier))
    _, masked = simulated(masked_config(aggregation=barrier))
    assert [line["client"] for line in merged(masked)] == [line["client"] for line in merged(plain)]
    difference = np.abs(masked.model.parameters.numpy() - plain.model.parameters.numpy()).max()
    assert 0 < difference < 1e-4


def test_equal_masked_simulations_have_equal_bits() -> None:
    (_, first), (_, second) = (simulated(masked_config()) for _ in range(2))
    assert same_bits(first.model, second.model)
    assert [r.get("cohort") for r in first.ledger] != [r.get("cohort") for r in second.ledger]


@pytest.mark.parametrize("keepers", [("north",), ("north", "south"), ("north", "south", "east")])
def test_any_number_of_keepers_may_be_simulated(keepers: tuple[str, ...]) -> None:
    _, result = simulated(masked_config(keepers, stop={"versions": 2}))
    assert [list(record["masks"]) for record in result.ledger if record["kind"] == "version"] == [list(keepers)] * 2


@pytest.mark.parametrize("strategy", ["fedavg", "fadas"])
def test_other_strategies_take_masked_updates(strategy: str) -> None:
    settings = {"strategy": strategy, "cohort_size": 3, "buffer_size": 3}
    _, result = simulated(masked_config(aggregation=settings, secure={"max_examples": 24}, stop={"versions": 3}))
    assert result.version == 3
    assert {line["level"] for line in merged(result)} == {8}


def test_hidden_examples_weigh_as_told_ones_do() -> None:
    """The differences are those of rounding, and of the dithers."""
    results = {}
    for examples in ("told", "hidden"):
        secure = {"max_examples": 24, "examples": examples}
        settings = {"strategy": "fedavg", "cohort_size": 3}
        _, results[examples] = simulated(masked_config(aggregation=settings, secure=secure, stop={"versions": 3}))
    told, hidden = results["told"], results["hidden"]
    assert [line["client"] for line in merged(told)] == [line["client"] for line in merged(hidden)]
    assert {line["examples"] for line in merged(hidden)} == {0} < {line["examples"] for line in merged(told)} | {0}
    difference = np.abs(told.model.parameters.numpy() - hidden.model.parameters.numpy()).max()
    assert 0 < difference < 1e-4


def test_task_whose_update_is_not_finite_fails_its_client() -> None:
    class Broken(PlainTask):
        def fit(self, model: Any, data: Any, config: Any, progress: Any) -> Any:
            if data.client == "a":
                torch.nn.init.constant_(model[0].weight, float("nan"))
                return len(data)
            return super().fit(model, data, config, progress)

    config = masked_config(stop={"versions": 3})
    result = Simulation(config, ClientDatasets(Broken()), TIMING).run()
    assert "a" not in {line["client"] for line in merged(result)}
    assert any("NaN" in r.get("error", "") for r in result.ledger if r["kind"] == "abandoned")


def test_model_with_buffers_cannot_be_masked() -> None:
    with pytest.raises(ManifestMismatch, match="masks hide no buffer"):
        Simulation(masked_config(), ClientDatasets(PointsTask()), TIMING)


# Against the real coordinator


class MaskedWorkers(CoordinatorStore):
    """The coordinator's store, in which sites follow the simulation's trace, and keepers answer before time passes."""

    def begin(self, config: Config, task: PointsTask, trace: Any, keys: Path) -> None:
        self.config, self.task, self.trace, self.now = config, task, list(trace), 0.0
        manifest = Manifest.from_module(task.model(), config.aggregation)
        self.manifest, self.masking = manifest, Masking(config, manifest)
        self.keepers = [ServedKeeper(self.redis, config, keys, name, manifest.parameters) for name in KEEPER_NAMES]
        coordinator = KeyFile(keys / COORDINATOR_PUBLIC, read_trusted_keys)
        sites = {site: KeyFile(keys / f"{site}.key", read_signing_key) for site in SITES}
        roster = Roster(keys / KEEPERS, keys / REVOKED, "keeper")
        self.site = SiteIdentity(config.name, sites, coordinator, "session", roster)
        self.worker = WorkerStore(self.redis, self.run, "worker", self.site)
        self.training: dict[str, Any] = {}
        self.joined = False

    def receive(self, block_seconds: float, count: int = 32) -> Any:
        answered = [keeper.act() for keeper in self.keepers]
        if not self.joined:
            self._join()
        elif not any(answered):
            while self.trace:
                self.now, what, job = self.trace.pop(0)
                if what == "begins":
                    self._train(job)
                    continue
                if what == "arrives":
                    assert self.worker.post(*self.training.pop(job)) == ""
                break
        return super().receive(0.001, count)

    def _join(self) -> None:
        self.joined = True
        self.site.enter(self.info())
        for client in self.config.clients.ids:
            assert self.worker.join([client], 3600) == client
            held = len(self.task.train_data(self.config.clients.client(client)))
            examples = 0 if self.config.secure.hides_examples else held
            assert self.worker.register(Registration(client=client, examples=examples))

    def _train(self, job: str) -> None:
        model = self.task.model()
        packed = next(j.order for j in self.jobs() if j.job == job)
        order = read(Order, self.site.order(packed))
        claim = self.worker.claim(job, 3600)
        base, local = Frame(self.manifest), Frame(self.manifest)
        codec = downlink_codec(self.config.compression, self.manifest)
        self.worker.fetch_model(claim.version, codec, base)
        digest = digest_of(self.worker.read_wire(claim.version, codec))
        client = self.config.clients.client(order.client)
        data, _ = load_data(self.task, client, self.config.seed)
        local_model = LocalModel(self.task, model, self.manifest)
        progress = local_model.progress(client, claim.version, lambda: None)
        update = compute_update(self.task, local_model, data, order, base, local, progress)
        attempt = Attempt(self.site.scope, claim.attempt, claim.version, digest)
        keys = self.worker.keeper_keys(KEEPER_NAMES)
        self.training[job] = claim, *self.masking.mask(update, local, order, attempt, [k for k in keys if k])


@pytest.mark.parametrize(
    ("aggregation", "examples"),
    [
        ({"strategy": "fedbuff", "staleness": {"function": "constant"}}, "told"),
        ({"strategy": "fedbuff", "buffer_size": 2}, "told"),
        ({"strategy": "fedavg", "cohort_size": 3}, "told"),
        ({"strategy": "fedavg", "cohort_size": 3}, "hidden"),
    ],
    ids=["constant", "polynomial", "fedavg", "hidden"],
)
def test_masked_simulation_and_coordinator_have_the_same_bits(
    fake_client: redis.Redis, tmp_path: Path, aggregation: dict[str, Any], examples: str
) -> None:
    """With one weight level there is no dither, which is drawn from the secrets of real keepers."""
    config = masked_config(
        aggregation=aggregation, server_optimizer={"name": "adam", "learning_rate": 0.05},
        dispatch={"leader_lease_seconds": 3600, "lease_seconds": 3600},
        secure={"weight_levels": 1, "max_examples": 24, "examples": examples},
    )  # fmt: skip
    simulation, expected = simulated(config)
    make_keys(tmp_path / "keys")
    keys = tmp_path / "keys"
    identity = CoordinatorIdentity(config.name, read_signing_key(keys / COORDINATOR_KEY), keys)
    store = MaskedWorkers(fake_client, config.name, "owner", identity)
    store.begin(config, PlainTask(), simulation.trace, keys)
    coordinator = Coordinator(config, PlainTask(), store, tmp_path, clock=lambda: store.now, sleep=lambda seconds: None)
    real = result_of(coordinator)
    assert not store.trace
    pattern = ("job", "client", "base", "staleness", "examples", "weight", "level", "at", "share")
    assert rows(real, *pattern) == rows(expected, *pattern)
    assert same_bits(real.model, expected.model)

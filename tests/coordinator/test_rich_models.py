"""Whole runs of models with frozen, tied, narrow, wide and stateful tensors: simulated, over Redis, and replayed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
import safetensors.torch
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fedqueue import Task
from fedqueue.config.loading import parse_config
from fedqueue.config.schema import Config
from fedqueue.errors import ManifestMismatch
from fedqueue.tensors.frame import Frame
from fedqueue_coordinator.core.run_summary import RunResult
from fedqueue_coordinator.operator.audit.replay import replay_folder
from fedqueue_coordinator.operator.export import export_model
from fedqueue_coordinator.operator.results import save_model
from fedqueue_coordinator.service.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from fedqueue_coordinator.service.replay_archive import REPLAY_FOLDER
from fedqueue_coordinator.simulation.virtual_clock import ClientDatasets, Simulation, TimingModel
from tests.coordinator.test_simulation import Workers, led, merged
from tests.support.builders import same_bits

CLIENTS = ("a", "b", "c")


class Rich(nn.Module):
    """A frozen bfloat16 backbone, tied weights, spectral norm, layers of three dtypes, and buffers of every rule."""

    queue: torch.Tensor
    queue_ptr: torch.Tensor
    ema: torch.Tensor
    own: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(3, 6).bfloat16().requires_grad_(False)
        self.norm = nn.BatchNorm1d(6)
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))
        self.encode = nn.Linear(6, 6, bias=False)
        self.decode = nn.Linear(6, 6)
        self.decode.weight = self.encode.weight
        self.narrow = nn.Linear(6, 6).bfloat16()
        self.wide = nn.Linear(6, 2).double()
        self.register_buffer("mask", torch.tensor([-torch.inf, 1 / 3]))
        self.register_buffer("stamp", torch.tensor([2.0**53 - 1], dtype=torch.float64))
        self.register_buffer("queue", torch.zeros(5, 6))
        self.register_buffer("queue_ptr", torch.tensor(0))
        self.register_buffer("ema", torch.zeros(6, dtype=torch.float64))
        self.register_buffer("own", torch.zeros(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.backbone(x.bfloat16()).float())
        x = self.decode(torch.relu(self.encode(self.spectral(x))))
        if self.training:
            with torch.no_grad():
                self.queue[self.queue_ptr] = x[0]
                self.queue_ptr.copy_((self.queue_ptr + 1) % len(self.queue))
                self.ema.mul_(0.9).add_(x.mean(0).double(), alpha=0.1)
                self.own.add_(1.0)
        scores: torch.Tensor = self.wide(torch.relu(self.narrow(x.bfloat16())).double())
        return scores


class RichTask(Task):
    def model(self) -> nn.Module:
        return Rich()

    def train_data(self, client: Any) -> TensorDataset:
        x = torch.randn(24, 3, generator=torch.Generator().manual_seed(1 + (client.partition or 0)))
        return TensorDataset(x, (x[:, 0] > 0).long())


def rich_config(**sections: Any) -> Config:
    tree: dict[str, Any] = {
        "name": "rich",
        "task": {"entrypoint": "task.py:RichTask"},
        "clients": {"names": list(CLIENTS), "min_available": 3, "slowdown": {"b": 2.5, "c": 1.3}},
        "training": {"batch_size": 8, "learning_rate": 0.1},
        "stop": {"versions": 60},
        "checkpoint": {"every_seconds": "off"},
        "server_optimizer": {"name": "adamw", "learning_rate": 0.01},
        "dispatch": {"leader_lease_seconds": 3600, "lease_seconds": 3600},
        "aggregation": {},
    }
    tree = {**tree, **sections}
    tree["aggregation"]["buffers"] = {"ema": "mean", "own": "frozen"}
    return parse_config(tree)


def simulated(config: Config) -> tuple[Simulation, RunResult]:
    simulation = Simulation(config, ClientDatasets(RichTask()), TimingModel(batch_seconds=1.0, jitter=0.2))
    return simulation, simulation.run()


def initial(config: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(config.seed)
    return Rich().state_dict()


@pytest.fixture(scope="module")
def after_sixty_versions() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    config = rich_config(aggregation={"strategy": "fedbuff", "buffer_size": 2})
    _, result = simulated(config)
    assert result.version == 60
    return initial(config), result.state_dict()


def test_frozen_tensors_keep_their_bits_under_weight_decay(after_sixty_versions: tuple[Any, ...]) -> None:
    first, last = after_sixty_versions
    for name in ("backbone.weight", "backbone.bias", "own"):
        assert torch.equal(first[name], last[name])
    assert not torch.equal(first["encode.weight"], last["encode.weight"])


def test_constants_keep_their_bits_over_many_versions(after_sixty_versions: tuple[Any, ...]) -> None:
    first, last = after_sixty_versions
    for name in ("mask", "stamp"):
        assert torch.equal(first[name], last[name])
        assert last[name].dtype == first[name].dtype


def test_vectors_of_spectral_norm_stay_unit_vectors(after_sixty_versions: tuple[Any, ...]) -> None:
    _, last = after_sixty_versions
    for name in ("_u", "_v"):
        assert float(last[f"spectral.parametrizations.weight.0.{name}"].norm()) == pytest.approx(1.0, abs=1e-5)


def test_ring_pointer_stays_in_its_ring(after_sixty_versions: tuple[Any, ...]) -> None:
    """Three batches a job move a pointer of five slots, so it does not only rise."""
    _, last = after_sixty_versions
    assert 0 <= int(last["queue_ptr"]) < 5
    assert int(last["norm.num_batches_tracked"]) > 5


def test_tied_names_have_equal_values(after_sixty_versions: tuple[Any, ...]) -> None:
    _, last = after_sixty_versions
    assert torch.equal(last["encode.weight"], last["decode.weight"])


def test_saved_file_loads_into_the_task_model(tmp_path: Path) -> None:
    config = rich_config(stop={"versions": 2})
    _, result = simulated(config)
    save_model(tmp_path / "m.safetensors", result.model)
    state = safetensors.torch.load_file(tmp_path / "m.safetensors")
    model = Rich()
    model.load_state_dict(state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, result.state_dict()[name])
        assert tensor.dtype == result.state_dict()[name].dtype


RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fedasync": ({"strategy": "fedasync"}, {}),
    "drift": ({"strategy": "fedbuff", "buffer_size": 3, "running_statistics": "drift"}, {}),
    "median": ({"strategy": "fedbuff", "buffer_size": 3, "robust": {"rule": "median"}}, {}),
    "int8": ({"strategy": "fedasync"}, {"uplink": "int8", "downlink": "bfloat16", "int8_block": 16}),
    "topk-zstd": (
        {"strategy": "fedbuff"},
        {"uplink": "topk", "downlink": "int8", "topk_ratio": 0.2, "uplink_lossless": "zstd"},
    ),
    "randomk": ({"strategy": "fedavg"}, {"uplink": "randomk", "downlink": "float16", "topk_ratio": 0.2}),
}
"""Aggregation and compression of each run."""


@pytest.fixture(scope="module", params=RUNS.values(), ids=list(RUNS))
def simulated_run(request: pytest.FixtureRequest) -> tuple[Config, Simulation, RunResult]:
    """One simulation for both servers."""
    aggregation, compression = request.param
    config = rich_config(
        aggregation=aggregation, compression=compression, stop={"versions": 8}, ledger={"keep_payloads": True}
    )
    return config, *simulated(config)


def test_rich_model_has_the_same_bits_over_redis(
    redis_client: redis.Redis, tmp_path: Path, simulated_run: tuple[Config, Simulation, RunResult]
) -> None:
    config, simulation, expected = simulated_run
    store = Workers(redis_client, config.name, "owner")
    store.begin(config, RichTask(), simulation.trace)
    real = led(config, RichTask(), store, tmp_path)
    assert not store.trace
    assert [line["norm"] for line in merged(real)] == [line["norm"] for line in merged(expected)]
    assert not [r for r in real.ledger if r["kind"] == "rejected" and r["reason"] != "run_ended"]
    assert same_bits(real.model, expected.model)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, real.state_dict()[name])
    assert torch.equal(real.state_dict()["encode.weight"], real.state_dict()["decode.weight"])
    again = replay_folder(tmp_path / REPLAY_FOLDER, real.ledger)
    assert (again.updates, again.problems) == (len(merged(real)), [])


def test_update_has_no_bytes_of_frozen_or_tied_tensors() -> None:
    config = rich_config(stop={"versions": 1})
    simulation, _ = simulated(config)
    manifest = simulation.federation.model.manifest
    trainable = {id(p): p.numel() for p in Rich().parameters() if p.requires_grad}
    assert manifest.parameters == sum(trainable.values())
    assert manifest.frozen_nbytes >= 2 * (18 + 6) + 4 * 6
    assert manifest.nbytes < 4 * manifest.parameters + 700


def test_checkpoint_carries_the_frozen_tensors(tmp_path: Path) -> None:
    simulation, _ = simulated(rich_config(stop={"versions": 1}))
    model = simulation.federation.model
    save_checkpoint(tmp_path / "c", Checkpoint.from_federation(simulation.federation, []))
    loaded = load_checkpoint(tmp_path / "c")
    assert loaded is not None
    again = Frame(model.manifest, loaded.model, loaded.frozen)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    with pytest.raises(ManifestMismatch, match=r"frame: 8 bytes are frozen, expected"):
        Frame(model.manifest, loaded.model, np.zeros(8, np.uint8))


# Aggregation in at least float32


class Drip(Task):
    """Each job moves every weight by 2⁻⁹, less than the distance of two bfloat16 numbers near 1, by 1 + 2⁻⁷ and so."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def model(self) -> nn.Module:
        model = nn.Linear(4, 1, bias=False)
        nn.init.ones_(model.weight)
        return model.to(self.dtype)

    def train_data(self, client: Any) -> TensorDataset:
        return TensorDataset(torch.zeros(8, 1))

    def fit(self, model: Any, data: Any, config: Any, progress: Any) -> Any:
        from fedqueue import TrainResult

        with torch.no_grad():
            model.weight[0, 0] += 2**-7  # one unit in the last place of bfloat16
        progress()
        return TrainResult(8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_small_steps_add_up_and_untouched_weights_stay(dtype: torch.dtype) -> None:
    """At a server rate of 0.1 each version adds 0.1 · 2⁻⁷ to one weight: below the grid of bfloat16 and float16."""
    config = rich_config(
        aggregation={"strategy": "fedbuff", "buffer_size": 2}, stop={"versions": 20},
        server_optimizer={"name": "sgd", "learning_rate": 0.1},
    )  # fmt: skip
    tree = config.model_dump()
    tree["aggregation"]["buffers"] = {}
    tree["aggregation"]["staleness"] = {"function": "constant"}
    config = parse_config(tree)
    result = Simulation(config, ClientDatasets(Drip(dtype)), TimingModel(batch_seconds=1.0)).run()
    assert result.model.parameters.tolist() == pytest.approx([1 + 20 * 0.1 * 2**-7, 1.0, 1.0, 1.0], abs=1e-6)
    assert result.model.parameters[1:].tolist() == [1.0, 1.0, 1.0]
    assert result.state_dict()["weight"].dtype == dtype


def test_export_writes_frozen_and_tied_tensors(
    redis_client: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = rich_config(stop={"versions": 3})
    simulation, _ = simulated(config)
    store = Workers(redis_client, config.name, "owner")
    store.begin(config, RichTask(), simulation.trace)
    real = led(config, RichTask(), store, tmp_path)
    monkeypatch.setattr("fedqueue_coordinator.operator.export.reachable_servers", lambda url: [redis_client])
    export_model("", config.name, None, tmp_path / "out.safetensors")
    state = safetensors.torch.load_file(tmp_path / "out.safetensors")
    assert state.keys() == Rich().state_dict().keys()
    for name, tensor in real.state_dict().items():
        assert torch.equal(state[name], tensor)

"""What a job leaves in the model beside the frame: gone for the next client, or the client's own."""

from __future__ import annotations

import random
from collections import deque
from threading import Lock
from typing import Any

import numpy as np
import pytest
import torch

from fedqueue import Client, Manifest, Task
from fedqueue.local_model import LocalModel


class Plain:
    """An object that Python can copy."""

    def __init__(self) -> None:
        self.seen = 0
        self.rows: list[int] = []


class Handle:
    """An object that cannot be copied, such as a connection."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.calls = 0


class Stateful(torch.nn.Module):
    """A module with state of every kind beside its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)
        self.norm = torch.nn.BatchNorm1d(2)
        self.register_buffer("memory", torch.zeros(3), persistent=False)
        self.register_buffer("expanded", torch.zeros(1).expand(4), persistent=False)
        self.hidden: torch.Tensor | None = None
        self.count, self.items, self.table, self.names = 0, [1], {"a": 1}, {"x"}
        self.recent, self.array, self.plain = deque([1], maxlen=3), np.zeros(2), Plain()
        self.nested = (([0],), {"deep": [torch.zeros(2)]})
        self.handle = Handle()
        self.rng, self.torch_rng = random.Random(1), torch.Generator().manual_seed(1)
        self.numpy_rng = np.random.default_rng(1)
        kept: list[int] = []
        self.linear.register_forward_hook(lambda module, inputs, output: kept.append(len(kept)))
        self.kept = lambda: list(kept)
        self.linear.weight.note = "made"  # type: ignore[attr-defined]


def change(model: Any) -> None:
    """Leave something in every place."""
    model.memory += 5
    model.memory = model.memory + 5
    model.expanded.data = torch.ones(4)
    model.hidden = torch.ones(3)
    model.count, model.later = 3, "added"
    model.items.append(2)
    model.table["b"] = 2
    model.names.add("y")
    model.recent.append(2)
    model.array[:] = 7
    model.plain.seen, model.plain.rows = 4, [1, 2]
    model.nested[0][0].append(9)
    model.nested[1]["deep"][0].add_(1)
    for rng in (model.rng, model.numpy_rng):
        rng.random()
    torch.rand(1, generator=model.torch_rng)
    model.linear(torch.ones(1, 3))
    model.linear.weight.requires_grad_(False)
    model.linear.weight.note = "changed"
    model.linear.bias.register_hook(lambda gradient: gradient * 0)
    model.linear.bias.grad = torch.ones(2)
    model.linear.register_forward_hook(lambda *args: None)
    model.extra = torch.nn.Linear(1, 1)
    model.norm = torch.nn.Identity()
    model.eval()
    model.double()


def seen(model: Any) -> dict[str, Any]:
    """Describe all of it with values that can be compared."""
    return {
        "memory": model.memory.tolist(), "expanded": model.expanded.tolist(),
        "hidden": model.hidden if model.hidden is None else model.hidden.tolist(),
        "attributes": (model.count, hasattr(model, "later"), list(model.items), dict(model.table), set(model.names)),
        "more": (list(model.recent), model.array.tolist(), model.plain.seen, list(model.plain.rows)),
        "nested": (model.nested[0][0][:], model.nested[1]["deep"][0].tolist()),
        "generators": (model.rng.getstate(), model.numpy_rng.bit_generator.state, model.torch_rng.get_state().tolist()),
        "hook's list": model.kept(),
        "tensors": [(p.requires_grad, p.dtype, p.grad, len(p._backward_hooks or ())) for p in model.parameters()],
        "note": model.linear.weight.note, "modules": [type(m).__name__ for m in model.modules()],
        "hooks": len(model.linear._forward_hooks), "modes": [m.training for m in model.modules()],
    }  # fmt: skip


def local_model(module: torch.nn.Module, stateful: bool = False) -> LocalModel:
    task = Task()
    task.stateful_clients = stateful
    return LocalModel(task, module, Manifest.from_module(module))


def test_each_job_finds_the_model_as_it_was_made() -> None:
    module = Stateful()
    local, before = local_model(module), seen(module)
    for client in ("a", "b", "a"):
        local.begin(client)
        assert seen(module) == before
        change(module)
        assert all(seen(module)[part] != before[part] for part in before)
        local.end(client)


def test_stateful_client_finds_what_its_own_job_left() -> None:
    module = Stateful()
    local, before = local_model(module, stateful=True), seen(module)
    local.begin("a")
    change(module)
    left = seen(module)
    local.end("a")
    local.begin("b")
    assert seen(module) == before
    local.end("b")
    local.begin("a")
    left["tensors"] = [(needs, dtype, None, hooks) for needs, dtype, _, hooks in left["tensors"]]
    assert seen(module) == left


def test_object_that_cannot_be_copied_is_left_alone() -> None:
    module = Stateful()
    local, handle = local_model(module), module.handle
    local.begin("a")
    handle.calls = 3
    local.begin("b")
    assert (module.handle, handle.calls) == (handle, 3)


def test_tensors_that_a_frame_sets_are_not_copied() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(100, 100), torch.nn.BatchNorm1d(100))
    addresses = [tensor.data_ptr() for tensor in module.state_dict().values()]
    local = local_model(module)
    assert all(state.values is None for state in local._made._tensors)
    local.begin("a")
    assert [tensor.data_ptr() for tensor in module.state_dict().values()] == addresses


def test_replaced_submodules_keep_their_order() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))
    local, parts = local_model(module), list(module)
    local.begin("a")
    del module[1]
    module[0] = torch.nn.Identity()
    local.begin("b")
    assert list(module) == parts


def test_memory_belongs_to_one_client() -> None:
    local = local_model(torch.nn.Linear(1, 1))
    local.progress(Client("a"), 1, lambda: None).memory["rows"] = 3
    assert local.progress(Client("b"), 1, lambda: None).memory == {}
    again = local.progress(Client("a"), 7, lambda: None)
    assert (again.memory, again.version, again.client.id) == ({"rows": 3}, 7, "a")


def test_module_with_computed_weights_can_be_put_back() -> None:
    module = torch.nn.utils.spectral_norm(torch.nn.Linear(2, 2))
    local = local_model(module)
    local.begin("a")
    module(torch.ones(1, 2)).sum().backward()
    local.begin("b")
    assert all(parameter.grad is None for parameter in module.parameters())
    module(torch.ones(1, 2)).sum().backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_scripted_module_can_be_put_back() -> None:
    module = torch.jit.script(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)))
    local = local_model(module)
    local.begin("a")
    module(torch.ones(2, 2)).sum().backward()
    module.eval()
    next(module.parameters()).requires_grad_(False)
    local.begin("b")
    assert all(parameter.requires_grad and parameter.grad is None for parameter in module.parameters())
    assert all(part.training for part in module.modules())

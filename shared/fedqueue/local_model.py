"""The one module of a process in which all of its clients train, and what makes it each client's own.

A frame sets the parameters and the persistent buffers at the start of a job. Everything else that the module holds
(non-persistent buffers, plain attributes, hidden states, hooks, `requires_grad`, modes, added or replaced submodules)
is put back here: to what `Task.model()` made, or to what the client's own last job left.

The module is restored in place and not copied. So a job costs a look at each container instead of a copy of the model,
closures and hooks that refer to the module still refer to the one that trains, and a compiled module stays compiled.
"""

from __future__ import annotations

import functools
import random
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedqueue.config.client import Client
from fedqueue.task import Progress, Task
from fedqueue.tensors.manifest import Manifest
from fedqueue.tensors.module_tensors import tensors_by_name

Restore = Callable[[], None]
"""Puts one object back to what it was."""
ATOMS = (str, bytes, int, float, complex, type(None), type, types.ModuleType, types.BuiltinFunctionType, Task)
"""What is never followed: it cannot change, or it is no client's."""
DICTS = (dict, OrderedDict, defaultdict, Counter)
"""Types of dictionaries whose content is put back; a subclass of another type may refuse to be changed."""
TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


class LocalModel:
    """A task's module, which each client finds as the task made it, or as that client's last job left it."""

    def __init__(self, task: Task, module: torch.nn.Module, manifest: Manifest) -> None:
        """`module` is what `task.model()` returned, and `manifest` is the module's."""
        self.module = module
        self._stateful = task.stateful_clients
        self._framed = {id(tensor) for tensor in _framed(module, manifest)}
        self._made = ModuleState(module, self._framed)
        self._left: dict[str, ModuleState] = {}
        self._memories: dict[str, dict[str, Any]] = {}

    def begin(self, client: str) -> None:
        """Put the module back for a job of this client; the caller then writes the base version into it."""
        self._left.get(client, self._made).restore()

    def end(self, client: str) -> None:
        """Keep what the client's job left in the module, where the task asks for it."""
        if self._stateful:
            self._left[client] = ModuleState(self.module, self._framed)

    def progress(self, client: Client, version: int, report: Callable[[], None]) -> Progress:
        """Return what `fit` gets for a job of this client, with the client's own memory."""
        return Progress(report, client, version, self._memories.setdefault(client.id, {}))


class ModuleState:
    """Everything that a module holds beside the values of its framed tensors, to be put back in place.

    Followed are containers, arrays, tensors, random generators, modules, closures, and objects of plain classes that
    can be copied. What cannot be copied (a lock, a file, a connection) is left alone, and so are classes, functions'
    globals, and the task itself.
    """

    def __init__(self, module: torch.nn.Module, framed: set[int]) -> None:
        """`framed`: the ids of the tensors whose values a frame sets."""
        self._framed = framed
        self._empty_dicts: list[dict[Any, Any]] = []
        self._dicts: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self._tensors: list[_TensorState] = []
        self._others: list[Restore] = []
        given = (*module.modules(), *module.parameters(), *module.buffers())
        self._uncopied = {id(held): held for held in given}
        self._copies: dict[int, Any] = dict(self._uncopied)
        seen: dict[int, object] = {}  # keeps each object alive, so that its id stays its own
        pending: list[object] = [module, *module.buffers(), *module.parameters()]
        while pending:
            found = pending.pop()
            if id(found) not in seen and not isinstance(found, ATOMS):
                seen[id(found)] = found
                kind: Any = type(found)
                if follow := _follower(kind):
                    pending.extend(follow(self, found))
        del self._copies, self._uncopied

    def restore(self) -> None:
        """Put every object back."""
        for held in self._empty_dicts:
            if held:
                held.clear()
        for held, content in self._dicts:
            if len(held) != len(content) or any(held.get(k, content) is not v for k, v in content.items()):
                _put_back(held, content)
        for tensor in self._tensors:
            tensor.restore()
        for put_back in self._others:
            put_back()

    # One method for each kind of object: it notes what the object is, and returns what it refers to.

    def dictionary(self, found: dict[Any, Any]) -> list[object]:
        if not found:
            self._empty_dicts.append(found)
            return []
        self._dicts.append((found, dict(found)))
        return list(found.values())

    def sequence(self, found: Any) -> list[object]:
        content = list(found)

        def put_back() -> None:
            if len(found) != len(content) or any(a is not b for a, b in zip(found, content, strict=True)):
                found.clear()
                found.extend(content)

        self._others.append(put_back)
        return content

    def set_(self, found: set[Any]) -> list[object]:
        content = set(found)

        def put_back() -> None:
            if found != content:
                found.clear()
                found.update(content)

        self._others.append(put_back)
        return list(content)

    def immutable(self, found: Any) -> list[object]:
        return list(found.values() if isinstance(found, dict) else found)

    def module(self, found: torch.nn.Module) -> list[object]:
        if isinstance(found, torch.jit.ScriptModule):  # its mode and its submodules are no attributes of Python
            self._others.append(functools.partial(setattr, found, "training", found.training))
            return [vars(found), *found.children()]
        return [vars(found)]

    def tensor(self, found: torch.Tensor) -> list[object]:
        if found.grad_fn is None and not torch.nn.parameter.is_lazy(found):
            self._tensors.append(_TensorState.of(found, framed=id(found) in self._framed))
        return [vars(found)]

    def array(self, found: np.ndarray[Any, Any]) -> list[object]:
        if found.flags.writeable:
            self._others.append(functools.partial(np.copyto, found, found.copy()))
        return list(found.flat) if found.dtype == object else []

    def generator(self, found: Any) -> list[object]:
        if isinstance(found, np.random.Generator):
            self._others.append(functools.partial(setattr, found.bit_generator, "state", found.bit_generator.state))
        elif isinstance(found, random.Random):
            self._others.append(functools.partial(found.setstate, found.getstate()))
        else:
            self._others.append(functools.partial(found.set_state, found.get_state()))
        return []

    def function(self, found: types.FunctionType) -> list[object]:
        return list(found.__closure__ or ())

    def method(self, found: types.MethodType) -> list[object]:
        return [found.__self__]

    def cell(self, found: types.CellType) -> list[object]:
        try:
            content = found.cell_contents
        except ValueError:  # not assigned yet
            return []
        self._others.append(functools.partial(setattr, found, "cell_contents", content))
        return [content]

    def plain(self, found: object) -> list[object]:
        try:
            deepcopy(found, self._copies)
        except Exception:
            self._copies = dict(self._uncopied)  # without the unfinished copies
            return []
        return [vars(found)]


@functools.lru_cache(maxsize=1024)
def _follower(kind: type[Any]) -> Callable[[ModuleState, Any], list[object]] | None:
    """The method for objects of that type; None for a type whose objects are left alone."""
    if kind in DICTS:
        return ModuleState.dictionary
    if kind in (list, deque, bytearray):
        return ModuleState.sequence
    if issubclass(kind, dict | list | tuple | frozenset):
        return ModuleState.immutable
    methods: list[tuple[Any, Callable[[ModuleState, Any], list[object]]]] = [
        (torch.nn.Module, ModuleState.module),
        (torch.Tensor, ModuleState.tensor),
        (set, ModuleState.set_),
        (np.ndarray, ModuleState.array),
        ((random.Random, np.random.Generator, np.random.RandomState, torch.Generator), ModuleState.generator),
        (types.FunctionType, ModuleState.function),
        (types.MethodType, ModuleState.method),
        (types.CellType, ModuleState.cell),
    ]
    for classes, method in methods:
        if issubclass(kind, classes):
            return method
    by_default = [getattr(kind, name) is getattr(object, name) for name in ("__reduce__", "__reduce_ex__")]
    return ModuleState.plain if all(by_default) and kind.__dictoffset__ else None


@dataclass(frozen=True)
class _TensorState:
    """A tensor's memory, flags and hooks, and its values unless a frame sets them."""

    tensor: torch.Tensor
    memory: torch.Tensor
    address: int
    needs_grad: bool
    values: torch.Tensor | None
    hooks: tuple[dict[Any, Any], ...]

    @classmethod
    def of(cls, tensor: torch.Tensor, framed: bool) -> _TensorState:
        memory = tensor.detach()
        kept = framed or tensor.is_inference() or tensor.is_meta
        values = None if kept else _once(memory).clone()
        hooks = tuple(dict(getattr(tensor, name) or {}) for name in TENSOR_HOOKS)
        return cls(tensor, memory, _address(tensor), tensor.requires_grad, values, hooks)

    def restore(self) -> None:
        tensor = self.tensor
        if tensor.grad is not None:
            tensor.grad = None
        if _address(tensor) != self.address or tensor.shape != self.memory.shape:
            tensor.data = self.memory
        if tensor.requires_grad != self.needs_grad:
            tensor.requires_grad_(self.needs_grad)
        if self.values is not None:
            _once(self.memory).copy_(self.values)
        for name, content in zip(TENSOR_HOOKS, self.hooks, strict=True):
            held = getattr(tensor, name)
            if held is not None and held != content:
                _put_back(held, content)


def _put_back(held: dict[Any, Any], content: dict[Any, Any]) -> None:
    """Give `held` that content and that order, without touching what is in place."""
    for key in [key for key in held if key not in content]:
        del held[key]
    if len(held) < len(content):
        held.clear()
    for key, value in content.items():
        if held.get(key, content) is not value:
            held[key] = value


def _address(tensor: torch.Tensor) -> int:
    """The address of the tensor's memory; 0 for a tensor without memory of its own, such as a sparse one."""
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return 0


def _once(tensor: torch.Tensor) -> torch.Tensor:
    """A view of `tensor` in which an expanded dimension has one element, so that it can be written to."""
    if tensor.layout is torch.strided:
        for dimension, stride in enumerate(tensor.stride()):
            if stride == 0:
                tensor = tensor.narrow(dimension, 0, min(1, tensor.shape[dimension]))
    return tensor


def _framed(module: torch.nn.Module, manifest: Manifest) -> Iterator[torch.Tensor]:
    """The module's own tensors that a frame sets."""
    tensors = tensors_by_name(module)
    return (tensors[name] for entry in manifest.entries for name in entry.names)

"""The tensors of a module that are federated: its parameters and its saved buffers, each under all of its names.

They are read and written where the module uses them, and not through `state_dict()`, which a class may override to
return copies or other names. What cannot be federated is refused here, by the name of the tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fedqueue.errors import ManifestMismatch

EXTRA_STATE = "_extra_state"
_COMPILED = "_orig_mod"  # the attribute in which `torch.compile` keeps the module that it wraps


@dataclass(frozen=True)
class ModuleTensor:
    """One tensor of a module.

    `names` are those of its module attributes, the first one first; a tied tensor has several. `keys` are its names in
    the module's `state_dict()`.
    """

    names: tuple[str, ...]
    keys: tuple[str, ...]
    tensor: torch.Tensor
    is_parameter: bool
    is_trainable: bool

    @property
    def name(self) -> str:
        """The name in messages and in the manifest."""
        return self.names[0]


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The module inside `torch.compile`, `DataParallel` and `DistributedDataParallel`, whose names have no prefix."""
    parallel = torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel
    while True:
        inner = model.module if isinstance(model, parallel) else dict(model.named_children()).get(_COMPILED)
        if inner is None:
            return model
        model = inner


def tensors_by_name(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and every buffer that is saved, in the order of the module tree, under each of its names.

    Extra state that is one tensor counts as a buffer: a copy of it or the tensor itself, as `get_extra_state` returns.
    """
    tensors: dict[str, torch.Tensor] = {}
    for prefix, module in unwrapped(model).named_modules(remove_duplicate=False):
        path = f"{prefix}." if prefix else ""
        tensors.update((path + name, p) for name, p in module._parameters.items() if p is not None)
        if module._buffers:
            unsaved = getattr(module, "_non_persistent_buffers_set", ())
            buffers = module._buffers.items()
            tensors.update((path + name, b) for name, b in buffers if b is not None and name not in unsaved)
        if _overrides(module, "get_extra_state") and isinstance(state := module.get_extra_state(), torch.Tensor):
            tensors[path + EXTRA_STATE] = state.detach()
    return tensors


def modules_with_extra_state(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The modules of an unwrapped model that override `get_extra_state`, by the name of their state."""
    return {
        f"{prefix}.{EXTRA_STATE}" if prefix else EXTRA_STATE: module
        for prefix, module in model.named_modules(remove_duplicate=False)
        if _overrides(module, "get_extra_state")
    }


def _overrides(module: torch.nn.Module, method: str) -> bool:
    return getattr(type(module), method, None) is not getattr(torch.nn.Module, method)


def module_tensors(model: torch.nn.Module) -> list[ModuleTensor]:
    """The tensors of a module, tied ones once; raises ManifestMismatch for one that cannot be federated."""
    model = unwrapped(model)
    tensors = tensors_by_name(model)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    groups: dict[object, list[str]] = {}
    for name, tensor in tensors.items():
        _refuse_unusable(name, tensor)
        identity = id(tensor) if is_extra_state(name) else _identity(tensor)
        groups.setdefault(identity, []).append(name)
    for name, module in modules_with_extra_state(model).items():
        if name in tensors and not _overrides(module, "set_extra_state"):
            raise ManifestMismatch(f"model: {name} cannot be loaded: define set_extra_state of {type(module).__name__}")
    keys = _keys_by_name(model, tensors, groups)
    return [
        ModuleTensor(
            tuple(names),
            tuple(key for name in names for key in keys.get(name, ())),
            tensors[names[0]],
            any(name in parameters for name in names),
            any(name in parameters and tensors[name].requires_grad for name in names),
        )
        for names in groups.values()
    ]


def is_extra_state(name: str) -> bool:
    """Whether this is the name of a module's extra state."""
    return name.rpartition(".")[2] == EXTRA_STATE


def _identity(tensor: torch.Tensor) -> object:
    """Equal for two tensors exactly if they are the same elements of the same memory."""
    if not tensor.numel():
        return id(tensor)
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device


def _refuse_unusable(name: str, tensor: torch.Tensor) -> None:
    if torch.nn.parameter.is_lazy(tensor):
        raise ManifestMismatch(
            f"model: {name} has no shape yet (a lazy module): run one batch through the model in model(), "
            "before it is returned"
        )
    if tensor.is_meta:
        raise ManifestMismatch(f"model: {name} is on the meta device, so it has no values: build it on the CPU")
    if is_traceable_wrapper_subclass(tensor):  # DTensor of fully_shard, quantized weights of torchao, and the like
        raise ManifestMismatch(
            f"model: {name} is a {type(tensor).__name__}, which has no plain values: return the plain module from "
            "model(), and shard, quantize or wrap it in fit()"
        )
    if tensor.layout != torch.strided:
        raise ManifestMismatch(f"model: {name} is {tensor.layout}: make it dense with to_dense()")
    if 0 in tensor.stride() and any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True)):
        own = name.rpartition(".")[2]
        raise ManifestMismatch(
            f"model: {name} is an expanded view, whose elements share memory: register {own}.clone() in its place"
        )


def _keys_by_name(
    model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], groups: Mapping[object, list[str]]
) -> dict[str, list[str]]:
    """Name → its names in `state_dict()`; raises ManifestMismatch for an entry that is no parameter and no buffer."""
    keys: dict[str, list[str]] = {}
    renamed: list[tuple[str, torch.Tensor]] = []
    for key, value in model.state_dict().items():
        if is_extra_state(key) and not isinstance(value, torch.Tensor):
            raise ManifestMismatch(
                f"model: {key} is a {type(value).__name__}; extra state is federated if get_extra_state returns one "
                "tensor: keep the rest in buffers"
            )
        if key in tensors:
            keys.setdefault(key, []).append(key)
        elif isinstance(value, torch.Tensor):
            renamed.append((key, value))
        else:
            raise ManifestMismatch(
                f"model: state_dict() has {key}, a {type(value).__name__}, which is no parameter and no buffer"
            )
    left = [names[0] for names in groups.values() if not any(name in keys for name in names)]
    for key, value in renamed:
        match = _match(key, value, left, tensors)
        if match is None:
            raise ManifestMismatch(f"model: state_dict() has {key}, which is no parameter and no buffer of the module")
        left.remove(match)
        keys[match] = [key]
    for name in left:  # `state_dict()` leaves it out: it keeps its own name
        keys[name] = [name]
    return keys


def _match(key: str, value: torch.Tensor, left: list[str], tensors: Mapping[str, torch.Tensor]) -> str | None:
    """The tensor that `state_dict()` calls `key`: with a prefix more or less, in the same memory, or equal to it."""
    alike = [name for name in left if tensors[name].shape == value.shape]
    for fits in (
        [name for name in alike if name.endswith(f".{key}") or key.endswith(f".{name}")],
        [name for name in alike if value.numel() and tensors[name].data_ptr() == value.data_ptr()],
        [name for name in alike if torch.equal(tensors[name].detach().to(value), value)],
    ):
        if len(fits) == 1:
            return fits[0]
    return None


def check_unchanged(model: torch.nn.Module, expected: Mapping[str, bool]) -> dict[str, torch.Tensor]:
    """The tensors of a trained module; `expected`: the names that it had before → whether that tensor is frozen.

    Raises ManifestMismatch if training has added or removed a tensor, or has made a frozen one trainable.
    """
    tensors = tensors_by_name(model)
    if tensors.keys() != expected.keys():
        new = [name for name in tensors if name not in expected]
        gone = [name for name in expected if name not in tensors]
        what = f"training has added {_listed(new)}" if new else f"training has removed {_listed(gone)}"
        raise ManifestMismatch(
            f"model: {what}, so the update would lack a part of the model: create every parameter and buffer in "
            "model(), for example with one batch, or register a buffer with persistent=False"
        )
    for name, frozen in expected.items():
        if frozen and tensors[name].requires_grad:
            raise ManifestMismatch(
                f"model: {name} is frozen in model() and trainable after training, so no update contains it: "
                "choose requires_grad in model()"
            )
    return tensors


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

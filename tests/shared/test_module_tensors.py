"""Which tensors of a module take part, under which names, and which modules are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from fedqueue.config.aggregation import AggregationConfig
from fedqueue.errors import ConfigurationError, ManifestMismatch
from fedqueue.tensors.frame import Frame
from fedqueue.tensors.manifest import Manifest
from fedqueue.tensors.module_tensors import unwrapped
from tests.support.builders import frame_of_module


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def with_buffers(**buffers: torch.Tensor) -> nn.Module:
    model = nn.Linear(2, 1)
    for name, buffer in buffers.items():
        model.register_buffer(name, buffer)
    return model


def trained(model: nn.Module, base: Frame) -> Frame:
    """The update of `model` against `base`, as a worker makes it."""
    update = Frame(base.manifest)
    update.read_update(model, base)
    return update


# Rules


def rules(model: nn.Module, **aggregation: Any) -> dict[str, str]:
    manifest = Manifest.from_module(model, AggregationConfig(**aggregation))
    return {e.name: e.role if e.role == "frozen" else e.rule for e in manifest.entries if e.role != "parameter"}


def test_batch_norm_has_statistics_and_a_counter() -> None:
    assert rules(net()) == {"1.running_mean": "", "1.running_var": "", "1.num_batches_tracked": ""}


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_vectors_of_spectral_norm_take_the_latest_value(norm: Callable[..., Any]) -> None:
    found = rules(norm(nn.Linear(4, 4)))
    assert len(found) == 2
    assert set(found.values()) == {"latest"}


def test_integer_buffers_are_counters_by_name_or_latest() -> None:
    model = with_buffers(queue_ptr=torch.tensor(0), update_count=torch.tensor(0), left=torch.tensor(9))
    assert rules(model) == {"queue_ptr": "latest", "update_count": "", "left": "latest"}


def test_first_matching_pattern_chooses_the_rule() -> None:
    model = with_buffers(ema_a=torch.zeros(1), ema_b=torch.zeros(1), ptr=torch.tensor(0), mask=torch.ones(1))
    chosen = {"ema_a": "max", "ema_*": "mean", "ptr": "max", "mask": "frozen"}
    assert rules(model, buffers=chosen) == {"ema_a": "max", "ema_b": "mean", "ptr": "", "mask": "frozen"}


def test_frozen_statistics_are_in_no_frame() -> None:
    found = rules(net(), running_statistics="frozen")
    assert found == {"1.running_mean": "frozen", "1.running_var": "frozen", "1.num_batches_tracked": ""}


@pytest.mark.parametrize(
    ("pattern", "rule", "message"),
    [
        ("*qeue*", "latest", r"aggregation\.buffers = '\*qeue\*': matches no buffer of the model; its buffers: queue"),
        ("weight", "frozen", r"matches parameters only; a parameter is frozen by requires_grad_"),
        ("ptr", "mean", r"ptr is torch\.int64, which has no mean"),
    ],
)
def test_pattern_that_cannot_apply_is_refused(pattern: str, rule: str, message: str) -> None:
    model = with_buffers(queue=torch.zeros(2), ptr=torch.tensor(0))
    with pytest.raises(ConfigurationError, match=message):
        Manifest.from_module(model, AggregationConfig(buffers={pattern: rule}))


def test_difference_in_requires_grad_names_the_tensor() -> None:
    theirs = nn.Linear(3, 2).requires_grad_(False)
    theirs.weight.requires_grad_(True)
    with pytest.raises(ManifestMismatch, match=r"bias is frozen float32 \[2\] here and parameter float32 \[2\] in the"):
        Manifest.from_module(nn.Linear(3, 2)).require(Manifest.from_module(theirs))


# Names


class Copies(nn.Module):
    """Returns copies, on whatever device, as helpers for checkpoints do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {name: tensor.detach().clone() for name, tensor in super().state_dict(*args, **kwargs).items()}


class Stripped(Copies):
    """Leaves out the prefix of its only module."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        return {name.removeprefix("inner."): tensor for name, tensor in state.items()}


@pytest.mark.parametrize("kind", [Copies, Stripped])
def test_module_whose_state_dict_is_overridden_is_loaded(kind: type[Any]) -> None:
    model = kind()
    frame = frame_of_module(model)
    frame.parameters.copy_(torch.arange(6.0))
    frame.write(model)
    assert model.inner.weight.tolist() == [[0.0, 1.0], [2.0, 3.0]]
    assert frame.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m, backend="eager"), nn.DataParallel])
def test_wrappers_leave_no_prefix(wrap: Callable[..., Any] | type[Any]) -> None:
    model = net()
    frame = frame_of_module(wrap(model))
    assert frame.state_dict().keys() == model.state_dict().keys()
    assert unwrapped(wrap(model)) is model
    frame.floats.fill_(2.0)
    frame.write(wrap(model))
    assert model.get_parameter("0.bias").tolist() == [2.0, 2.0]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_scripted_module_is_loaded() -> None:
    model = torch.jit.script(net())
    frame = frame_of_module(model)
    assert frame.state_dict().keys() == net().state_dict().keys()
    frame.floats.fill_(2.0)
    frame.write(model)
    assert model.state_dict()["1.running_var"].tolist() == [2.0, 2.0]


class Twice(nn.Module):
    """Registers one module under two names, and ties a third weight to it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.second = self.first
        self.third = nn.Linear(2, 2, bias=False)
        self.third.weight = self.first.weight


def test_module_registered_twice_is_one() -> None:
    manifest = Manifest.from_module(Twice())
    assert [(e.name, e.aliases) for e in manifest.entries] == [
        ("first.weight", ("second.weight", "third.weight")),
        ("first.bias", ("second.bias",)),
    ]
    model = Twice()
    frame = frame_of_module(model)
    model.load_state_dict(frame.state_dict())
    frame.parameters.fill_(3.0)
    frame.write(model)
    assert set(model.third.weight.flatten().tolist()) == {3.0}


def test_separated_names_of_a_tied_tensor_are_all_written() -> None:
    """A buffer under two names becomes two tensors when the module moves to another device."""
    model: Any = nn.Linear(1, 1)
    model.register_buffer("a", torch.zeros(2))
    model.register_buffer("b", model.a)
    frame = frame_of_module(model)
    model.b = torch.ones(2)
    frame.buffers.fill_(7.0)
    frame.write(model)
    assert model.a.tolist() == model.b.tolist() == [7.0, 7.0]


def test_extra_state_of_one_tensor_is_a_buffer() -> None:
    counting = Counting(2, 2)
    model = nn.Sequential(counting)
    base = frame_of_module(model)
    assert rules(model) == {"0._extra_state": "latest"}
    counting.calls = 2.0**53 - 1
    update = trained(model, base)
    assert update.changed.tolist() == [1]
    assert update.doubles.tolist() == [2.0**53 - 1]
    base.doubles[0] = 5.0
    base.write(model)
    assert counting.calls == 5.0
    model.load_state_dict(base.state_dict())


# What is refused


class Extra(nn.Linear):
    def get_extra_state(self) -> dict[str, Any]:
        return {"calls": 1}


class OneWay(nn.Linear):
    def get_extra_state(self) -> torch.Tensor:
        return torch.zeros(1)


class Counting(OneWay):
    """Keeps a number outside of its buffers, which load_state_dict restores."""

    calls = 0.0

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor([self.calls], dtype=torch.float64)

    def set_extra_state(self, state: Any) -> None:
        self.calls = float(state)


class Surplus(nn.Linear):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {**super().state_dict(*args, **kwargs), "calibration": torch.ones(5)}


two_tensor: Any = TwoTensor  # torch's own example of a tensor that wraps others, as DTensor does

REFUSED = {
    "lazy": (lambda: nn.LazyLinear(2), "weight has no shape yet .* run one batch"),
    "lazy buffer": (lambda: nn.Sequential(nn.Linear(1, 1), nn.LazyBatchNorm1d()), "1.weight has no shape yet"),
    "meta": (lambda: net().to("meta"), "0.weight is on the meta device"),
    "expanded": (lambda: with_buffers(wide=torch.zeros(1).expand(8)), r"wide is an expanded view.*wide\.clone\(\)"),
    "complex": (lambda: with_buffers(z=torch.zeros(2, dtype=torch.complex64)), r"z is torch\.complex64; known"),
    "float8": (lambda: with_buffers(q=torch.zeros(2).to(torch.float8_e4m3fn)), r"q is torch\.float8_e4m3fn; known"),
    "quantized": (
        lambda: with_buffers(q=torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)), r"q is torch\.qint8",
    ),
    "sharded": (lambda: with_buffers(t=two_tensor(torch.ones(2), torch.ones(2))), "t is a TwoTensor.*in fit"),
    "sparse": (lambda: with_buffers(s=torch.eye(2).to_sparse()), r"s is torch\.sparse_coo"),
    "extra state": (lambda: nn.Sequential(Extra(1, 1)), "0._extra_state is a dict; extra state is federated if"),
    "extra state without a setter": (lambda: OneWay(1, 1), "_extra_state cannot be loaded: define set_extra_state"),
    "surplus entry": (lambda: Surplus(1, 1), "state_dict.. has calibration, which is no parameter"),
    "all frozen": (lambda: net().requires_grad_(False), "frozen parameters only, so there is nothing to train"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # torch's own, about lazy and quantized tensors
@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_module_that_cannot_be_federated_is_refused_in_one_line(make: Callable[..., Any], message: str) -> None:
    model = make()
    with pytest.raises(ManifestMismatch, match=message) as refusal:
        Manifest.from_module(model)
    assert "\n" not in str(refusal.value)


def test_tensor_that_does_not_hold_what_was_written_is_named() -> None:
    class Coarse(torch.Tensor):
        """Rounds what is copied into it, as quantized tensors do."""

        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            parent: Any = super()
            result = parent.__torch_function__(function, types, args, kwargs or {})
            if function is torch.Tensor.to:
                return torch.zeros_like(result.as_subclass(torch.Tensor))
            return result

    model = with_buffers(scale=torch.ones(2))
    frame = frame_of_module(model)
    model.scale = torch.ones(2).as_subclass(Coarse)
    with pytest.raises(ManifestMismatch, match=r"scale does not hold what was written into it \(Coarse"):
        frame.write(model)


# After training


def test_parameters_made_in_training_are_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    base = frame_of_module(model)
    model.append(nn.Linear(2, 2))
    with pytest.raises(ManifestMismatch, match=r"training has added 1\.weight, 1\.bias.*create every parameter"):
        trained(model, base)


def test_unsaved_buffers_may_be_made_in_training() -> None:
    model = nn.Linear(2, 2)
    base = frame_of_module(model)
    model.register_buffer("cache", torch.ones(3), persistent=False)
    assert trained(model, base).parameters.abs().max() == 0


def test_unfreezing_in_training_is_refused() -> None:
    model = net()
    weight = model.get_parameter("0.weight")
    weight.requires_grad_(False)
    base = frame_of_module(model)
    weight.requires_grad_(True)
    with pytest.raises(ManifestMismatch, match=r"0\.weight is frozen in model\(\) and trainable after"):
        trained(model, base)


# What is unchanged


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_unchanged_tensors_keep_the_bits_of_the_version(dtype: torch.dtype) -> None:
    """The version is finer than the grid of a narrow module, and infinite in places."""
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).to(dtype)
    base = frame_of_module(model)
    base.floats.add_(1.2345678e-4)
    base.parameters[0], base.parameters[1] = torch.inf, -torch.inf
    base.write(model)
    update = trained(model, base)
    assert update.parameters.tolist() == [0.0] * base.manifest.parameters
    assert (
        update.buffer[4 * base.manifest.parameters :].tobytes() == base.buffer[4 * base.manifest.parameters :].tobytes()
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_delta_is_against_what_the_module_held(dtype: torch.dtype) -> None:
    """The oracle subtracts the module's own tensors before and after training, in float64."""
    model = nn.Linear(50, 20).to(dtype)
    base = frame_of_module(model)
    base.parameters.mul_(1.0000321)
    base.write(model)
    before = torch.cat([p.detach().double().flatten() for p in model.parameters()])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 1e-2)
    after = torch.cat([p.detach().double().flatten() for p in model.parameters()])
    torch.testing.assert_close(trained(model, base).parameters.double(), after - before, rtol=2**-23, atol=0)


def test_parameter_that_leaves_infinity_has_no_finite_delta() -> None:
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight[0, 0] = torch.inf
    base = frame_of_module(model)
    with torch.no_grad():
        model.weight[0, 0] = 1.0
    assert not trained(model, base).parameters.isfinite().all()


def test_flags_mark_the_tensors_that_training_changed() -> None:
    model: Any = with_buffers(
        mask=torch.tensor([-torch.inf, 0.0]), queue=torch.zeros(2), none=torch.zeros(0),
        wide=torch.zeros(3, dtype=torch.float64), ptr=torch.tensor(0), left=torch.tensor(5),
    )  # fmt: skip
    base = frame_of_module(model)
    model.queue[1] = 4.0
    model.wide[2] = 1e-300
    model.left -= 1
    names = [e.name for e in base.manifest.entries if e.rule == "latest"]
    flags = dict(zip(names, trained(model, base).changed.tolist(), strict=True))
    assert flags == {"mask": 0, "queue": 1, "none": 0, "wide": 1, "ptr": 0, "left": 1}

"""A model as one flat frame: the layout, and the models and bytes that are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from torch import nn

from fedqueue.errors import ManifestMismatch, WireError
from fedqueue.tensors.frame import Frame
from fedqueue.tensors.manifest import BUFFER, COUNTER, DTYPES, FLOATING, FROZEN, PARAMETER, Manifest, TensorSpec
from tests.support.builders import frame_of_module


class Mixed(nn.Module):
    """A model with every kind of tensor: parameters of four dtypes, a float buffer between two counters, a scalar."""

    mean: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Parameter(torch.tensor([1.5, -2.0], dtype=torch.float16))
        self.register_buffer("seen", torch.tensor(7, dtype=torch.int32))
        self.brain = nn.Parameter(torch.tensor([[0.5, 3.0]], dtype=torch.bfloat16))
        self.register_buffer("mean", torch.tensor([0.25, 0.75], dtype=torch.float64))
        self.wide = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.frozen = nn.Parameter(torch.tensor([4.0]), requires_grad=False)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(2, 2, bias=False)
        self.out = nn.Linear(2, 2, bias=False)
        self.out.weight = self.embed.weight


def norm_model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


# The layout


def test_roles_are_ordered_parameters_buffers_counters() -> None:
    entries = Manifest.from_module(norm_model()).entries
    assert [(e.name, e.role) for e in entries] == [
        ("0.weight", PARAMETER),
        ("0.bias", PARAMETER),
        ("1.weight", PARAMETER),
        ("1.bias", PARAMETER),
        ("1.running_mean", BUFFER),
        ("1.running_var", BUFFER),
        ("1.num_batches_tracked", COUNTER),
    ]


def test_offsets_are_contiguous_within_each_section() -> None:
    manifest = Manifest.from_module(norm_model())
    assert [(e.offset, e.length) for e in manifest.entries] == [
        (0, 6), (6, 2), (8, 2), (10, 2), (12, 2), (14, 2), (0, 1),
    ]  # fmt: skip
    assert (manifest.parameters, manifest.floats, manifest.counters) == (12, 16, 1)
    assert manifest.nbytes == 4 * 16 + 8 * 1


def test_counters_begin_at_a_multiple_of_eight_bytes() -> None:
    model = nn.Module()
    model.register_parameter("a", nn.Parameter(torch.tensor([1.0, 2.0, 3.0])))
    model.register_buffer("num_batches", torch.tensor(5))
    frame = frame_of_module(model)
    assert frame.manifest.nbytes == 16 + 8
    assert frame.buffer[:12].view(np.float32).tolist() == [1.0, 2.0, 3.0]
    assert frame.buffer[12:16].tolist() == [0] * 4
    assert frame.buffer[16:].view(np.int64).tolist() == [5]


def test_buffers_between_parameters_do_not_disturb_the_sections() -> None:
    frame = frame_of_module(Mixed())
    assert frame.parameters.tolist() == pytest.approx([1.5, -2.0, 0.5, 3.0, 0.1])
    assert frame.buffers.tolist() == []
    assert frame.doubles.tolist() == [0.25, 0.75]
    assert frame.counters.tolist() == [7, 1, 0]


def test_frozen_parameters_and_unsaved_buffers_are_in_no_frame() -> None:
    manifest = Manifest.from_module(Mixed())
    roles = {e.name: e.role for e in manifest.entries}
    assert roles["frozen"] == FROZEN
    assert "scratch" not in roles
    frozen = frame_of_module(Mixed()).frozen
    assert frozen is not None
    assert frozen.view(np.float32).tolist() == [4.0, 0.0]


def test_views_share_the_buffers_memory() -> None:
    frame = frame_of_module(norm_model())
    frame.parameters.fill_(2.0)
    frame.counters.fill_(9)
    assert frame.buffer[:48].view(np.float32).tolist() == [2.0] * 12
    assert frame.buffer[-8:].view(np.int64).tolist() == [9]


def test_copy_is_independent() -> None:
    frame = frame_of_module(norm_model())
    copy = frame.copy()
    copy.floats.fill_(5.0)
    assert not torch.equal(frame.floats, copy.floats)


def test_frame_of_another_size_is_refused() -> None:
    manifest = Manifest.from_module(norm_model())
    with pytest.raises(ManifestMismatch, match="71 bytes, expected 72"):
        Frame(manifest, np.zeros(71, np.uint8))


# Round trips


@pytest.mark.parametrize("make", [norm_model, Mixed, Tied], ids=["batch norm", "mixed", "tied"])
def test_model_round_trips_bit_for_bit(make: Callable[..., Any] | type[Any]) -> None:
    model, other = make(), make()
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.zero_()
    frame_of_module(model).write(other)
    for name, tensor in model.state_dict().items():
        back = other.state_dict()[name]
        assert back.dtype == tensor.dtype
        stored = tensor.float().to(tensor.dtype) if name == "wide" else tensor
        assert torch.equal(back, stored), name


def test_float64_parameters_are_stored_as_float32() -> None:
    frame = frame_of_module(Mixed())
    assert frame.state_dict()["wide"].item() == float(np.float32(0.1))


def test_float64_buffers_stay_float64() -> None:
    model = Mixed()
    model.mean[0] = 2.0**24 + 1
    assert frame_of_module(model).state_dict()["mean"].tolist() == [2.0**24 + 1, 0.75]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_finite_16_bit_float_round_trips(dtype: torch.dtype) -> None:
    everything = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    model = nn.Module()
    model.register_parameter("w", nn.Parameter(everything[everything.isfinite()]))
    assert torch.equal(frame_of_module(model).state_dict()["w"], model.get_parameter("w").detach())


def test_large_counter_round_trips() -> None:
    model = norm_model()
    model.get_buffer("1.num_batches_tracked").fill_(2**53 + 1)
    assert frame_of_module(model).state_dict()["1.num_batches_tracked"].item() == 2**53 + 1


def test_state_dict_is_plain_and_independent_of_the_frame() -> None:
    model = Mixed()
    frame = frame_of_module(model)
    state = frame.state_dict()
    assert {n: (t.dtype, t.shape) for n, t in state.items()} == {
        n: (t.dtype, t.shape) for n, t in model.state_dict().items()
    }
    frame.floats.zero_()
    assert state["narrow"].tolist() == [1.5, -2.0]
    model.load_state_dict(state)


def test_tied_weights_are_one_tensor_with_two_names() -> None:
    manifest = Manifest.from_module(Tied())
    assert [(e.name, e.aliases) for e in manifest.entries] == [("embed.weight", ("out.weight",))]
    assert manifest.parameters == 4
    state = frame_of_module(Tied()).state_dict()
    assert state["embed.weight"] is state["out.weight"]


def test_frame_is_written_into_a_model_without_a_gradient() -> None:
    model = norm_model()
    frame = frame_of_module(model)
    frame.parameters.fill_(0.5)
    frame.write(model)
    assert all(p.requires_grad and p.grad is None and p.grad_fn is None for p in model.parameters())
    assert set(model.get_parameter("0.weight").flatten().tolist()) == {0.5}


def test_update_has_parameter_deltas_and_values_of_other_state() -> None:
    model = norm_model()
    base, local = Frame(Manifest.from_module(model)), Frame(Manifest.from_module(model))
    base.floats.fill_(1.0)
    base.counters.fill_(10)
    local.parameters.copy_(torch.arange(12.0))
    local.buffers.fill_(3.0)
    local.counters.fill_(13)
    local.write(model)
    update = Frame(base.manifest)
    update.read_update(model, base)
    assert update.parameters.tolist() == [i - 1.0 for i in range(12)]
    assert update.buffers.tolist() == [3.0] * 4
    assert update.counters.tolist() == [13]
    assert base.parameters.tolist() == [1.0] * 12


# Unsupported models


def test_model_without_parameters_is_refused() -> None:
    with pytest.raises(ManifestMismatch, match="no parameters"):
        Manifest.from_module(nn.Flatten())


@pytest.mark.parametrize("tensor", [torch.zeros(2, dtype=torch.complex64), torch.zeros(2, dtype=torch.uint16)])
def test_unknown_dtype_error_lists_the_known_dtypes(tensor: torch.Tensor) -> None:
    model = norm_model()
    model.register_buffer("odd", tensor)
    with pytest.raises(ManifestMismatch, match=rf"model: odd is {tensor.dtype}; known: float64, float32"):
        Manifest.from_module(model)


def test_integer_parameter_is_frozen() -> None:
    model = nn.Linear(1, 1)
    model.register_parameter("w", nn.Parameter(torch.tensor([1, 2]), requires_grad=False))
    assert frame_of_module(model).state_dict()["w"].tolist() == [1, 2]


# The manifest on the wire


@pytest.mark.parametrize("make", [norm_model, Mixed, Tied], ids=["batch norm", "mixed", "tied"])
def test_manifest_round_trips(make: Callable[..., Any] | type[Any]) -> None:
    manifest = Manifest.from_module(make())
    again = Manifest.unpack(manifest.pack())
    assert again == manifest
    assert again.digest == manifest.digest


def test_different_manifests_have_different_digests() -> None:
    assert Manifest.from_module(norm_model()).digest != Manifest.from_module(nn.Linear(3, 2)).digest
    assert Manifest.from_module(norm_model()).digest == Manifest.from_module(norm_model()).digest


GOOD = [
    ["w", "float32", [2, 3], 0, 6, PARAMETER],
    ["m", "float32", [2], 6, 2, BUFFER],
    ["n", "int64", [], 0, 1, COUNTER],
]
BAD = {
    "nothing": [],
    "no rows": 5,
    "no list": {"a": 1},
    "short row": [["w", "float32", [1], 0, 1]],
    "long row": [["w", "float32", [1], 0, 1, PARAMETER, 0]],
    "roles out of order": [GOOD[1], GOOD[0]],
    "unknown role": [["w", "float32", [1], 0, 1, "weight"]],
    "role that is no text": [["w", "float32", [1], 0, 1, [PARAMETER]]],
    "repeated name": [["w", "float32", [1], 0, 1, PARAMETER], ["w", "float32", [1], 1, 1, PARAMETER]],
    "name that is no text": [[7, "float32", [1], 0, 1, PARAMETER]],
    "name of bytes": [[b"w", "float32", [1], 0, 1, PARAMETER]],
    "unknown dtype": [["w", "complex64", [1], 0, 1, PARAMETER]],
    "dtype that is no text": [["w", ["float32"], [1], 0, 1, PARAMETER]],
    "parameter of integers": [["w", "int64", [1], 0, 1, PARAMETER]],
    "counter of floats": [*GOOD[:2], ["n", "float32", [], 0, 1, COUNTER]],
    "length that is not the shape's": [["w", "float32", [2, 3], 0, 5, PARAMETER]],
    "negative dimensions": [["w", "float32", [-2, -3], 0, 6, PARAMETER]],
    "dimension that is a float": [["w", "float32", [2.0], 0, 2, PARAMETER]],
    "dimension that is a boolean": [["w", "float32", [True], 0, 1, PARAMETER]],
    "shape that is no list": [["w", "float32", 6, 0, 6, PARAMETER]],
    "overlap": [GOOD[0], ["m", "float32", [2], 5, 2, BUFFER]],
    "gap": [GOOD[0], ["m", "float32", [2], 7, 2, BUFFER]],
    "late start": [["w", "float32", [1], 1, 1, PARAMETER]],
    "counters after floats": [*GOOD[:2], ["n", "int64", [], 8, 1, COUNTER]],
    "enormous": [["w", "float32", [2**48], 0, 2**48, PARAMETER]],
    "long name": [["w" * 513, "float32", [1], 0, 1, PARAMETER]],
}


PLAIN = ["", [], []]
"""No rule, no aliases, and the same names in state_dict()."""
BAD_FIELDS = {
    "unknown rule": [[*GOOD[0], PLAIN[0], [], []], [*GOOD[1], "median", [], []]],
    "rule of another role": [[*GOOD[0], "latest", [], []]],
    "mean of integers": [*([*row, *PLAIN] for row in GOOD[:2]), [*GOOD[2], "mean", [], []]],
    "rules out of order": [
        [*GOOD[0], *PLAIN], [*GOOD[1], "latest", [], []], ["v", "float32", [1], 8, 1, BUFFER, *PLAIN],
    ],
    "alias of another tensor": [[*GOOD[0], "", ["m"], []], [*GOOD[1], *PLAIN]],
    "key of another tensor": [[*GOOD[0], "", [], ["m"]], [*GOOD[1], *PLAIN]],
    "alias that is no text": [[*GOOD[0], "", [3], []]],
    "frozen before a parameter": [["f", "int8", [1], 0, 1, FROZEN, *PLAIN], [*GOOD[0], *PLAIN]],
    "frozen and not aligned": [
        [*GOOD[0], *PLAIN], ["f", "int8", [1], 0, 1, FROZEN, *PLAIN], ["g", "int8", [1], 1, 1, FROZEN, *PLAIN],
    ],
}  # fmt: skip


def with_plain_fields(rows: Any) -> Any:
    return [[*row, *PLAIN] for row in rows] if isinstance(rows, list) else rows


def test_consistent_manifest_is_accepted() -> None:
    assert Manifest.unpack(msgpack.packb(with_plain_fields(GOOD))).nbytes == 4 * 8 + 8


@pytest.mark.parametrize("rows", BAD_FIELDS.values(), ids=BAD_FIELDS.keys())
def test_inconsistent_rule_or_name_is_refused(rows: list[list[Any]]) -> None:
    with pytest.raises(WireError, match=r"^manifest: "):
        Manifest.unpack(msgpack.packb(rows))


@pytest.mark.parametrize("rows", BAD.values(), ids=BAD.keys())
def test_inconsistent_manifest_is_refused(rows: dict[str, Any] | int | list[Any]) -> None:
    with pytest.raises(WireError, match=r"^manifest: "):
        Manifest.unpack(msgpack.packb(with_plain_fields(rows)))


@pytest.mark.parametrize("data", [b"", b"\xc1", msgpack.packb(GOOD)[:-1], msgpack.packb(GOOD) + b"\x00"])
def test_invalid_manifest_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(WireError, match=r"^manifest: not one of this protocol"):
        Manifest.unpack(data)


@pytest.mark.parametrize("name", DTYPES)
def test_known_dtype_is_that_of_torch(name: str) -> None:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    assert dtype.itemsize == DTYPES[name]
    assert dtype.is_floating_point == (name in FLOATING)


# Both sides must build the same model


def test_equal_models_are_accepted() -> None:
    Manifest.from_module(norm_model()).require(Manifest.from_module(norm_model()))


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (nn.Linear(3, 4), r"weight is parameter float32 \[4, 3\] here and parameter float32 \[2, 3\] in the run"),
        (nn.Linear(3, 2, bias=False), r"model: bias is missing here and parameter float32 \[2\] in the run"),
        (nn.Linear(3, 2).half(), r"is parameter float16 .* here and parameter float32"),
    ],
)  # fmt: skip
def test_first_difference_between_models_is_named(theirs: Any, message: str) -> None:
    with pytest.raises(ManifestMismatch, match=message):
        Manifest.from_module(nn.Linear(3, 2)).require(Manifest.from_module(theirs))


def test_models_with_reordered_tensors_are_refused() -> None:
    a = TensorSpec("a", "float32", (1,), 0, 1, PARAMETER)
    b = TensorSpec("b", "float32", (1,), 0, 1, PARAMETER)
    with pytest.raises(ManifestMismatch, match="order"):
        Manifest((a, b)).require(Manifest((b, a)))


def test_buffer_whose_shape_training_changed_is_named() -> None:
    model = torch.nn.Linear(2, 1)
    model.register_buffer("low", torch.tensor([]))
    frame = frame_of_module(model)
    model.get_buffer("low").resize_(3)
    with pytest.raises(ManifestMismatch, match=r"low from shape \[0\] to \[3\]: give it its final shape in model\(\)"):
        frame.read(model)


def test_model_that_training_left_without_values_is_named() -> None:
    model = torch.nn.Linear(2, 1)
    frame = frame_of_module(model)
    model.to("meta")
    with pytest.raises(ManifestMismatch, match="training has left weight on the meta device"):
        frame.read(model)

"""Properties of frames of arbitrary models, and of parsing arbitrary bytes."""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from fedqueue.errors import WireError
from fedqueue.tensors.frame import Frame
from fedqueue.tensors.manifest import DTYPES, ROLES, Manifest
from tests.support.builders import frame_of_module

KNOWN = [getattr(torch, name) for name in DTYPES]
FLOATS = [d for d in KNOWN if d.is_floating_point]
COUNTS = [d for d in KNOWN if not d.is_floating_point]
shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)


@st.composite
def models(draw: st.DrawFn) -> nn.Module:
    """Draw parameters, float buffers and counters of any known dtype and shape, in any order."""
    model = nn.Module()
    kinds = draw(st.lists(st.sampled_from(ROLES), max_size=6))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    for i, kind in enumerate(["parameter", *kinds]):
        if kind == "frozen":
            tensor = torch.randint(0, 2, draw(shapes), generator=rng).to(draw(st.sampled_from(KNOWN)))
            model.register_parameter(f"t{i}", nn.Parameter(tensor, requires_grad=False))
            continue
        shape = draw(shapes)
        if kind == "counter":
            dtype = draw(st.sampled_from(COUNTS))
            model.register_buffer(f"t{i}", torch.randint(0, 2, shape, generator=rng).to(dtype))
            continue
        tensor = torch.randn(shape, generator=rng).to(draw(st.sampled_from(FLOATS)))
        if kind == "parameter":
            model.register_parameter(f"t{i}", nn.Parameter(tensor))
        else:
            model.register_buffer(f"t{i}", tensor)
    return model


@given(models())
def test_any_model_round_trips_as_float32(model: Any) -> None:
    frame = Frame(Manifest.from_module(model))
    frame.read(model)
    for name, tensor in frame.state_dict().items():
        original = model.state_dict()[name]
        rounded = name in dict(model.named_parameters()) and original.requires_grad
        expected = original.float().to(original.dtype) if rounded else original
        assert tensor.shape == original.shape
        assert torch.equal(tensor, expected)
    frame.write(model)
    again = Frame(frame.manifest)
    again.read(model)
    np.testing.assert_array_equal(again.buffer, frame.buffer)


@given(models())
def test_any_manifest_round_trips_and_describes_its_buffer(model: Any) -> None:
    manifest = Manifest.from_module(model)
    assert Manifest.unpack(manifest.pack()) == manifest
    manifest.require(Manifest.from_module(model))
    assert sum(e.length for e in manifest.entries) == sum(t.numel() for t in model.state_dict().values())
    assert manifest.nbytes % 8 == manifest.frozen_nbytes % 8 == 0
    elements = 4 * manifest.floats + 8 * manifest.doubles + 8 * manifest.counters + manifest.flags
    assert 0 <= manifest.nbytes - elements < 16


@given(models(), st.integers(0, 99))
def test_update_added_to_its_base_is_the_local_model(model: Any, seed: int) -> None:
    """The values are integers up to 2**7, which every float dtype holds, subtracts and adds exactly."""
    base, local = Frame(Manifest.from_module(model)), Frame(Manifest.from_module(model))
    rng = torch.Generator().manual_seed(seed)
    for frame in (base, local):
        frame.floats.copy_(torch.randint(-(2**7), 2**7, frame.floats.shape, generator=rng).float())
    frozen = frame_of_module(model).frozen
    base.frozen = local.frozen = frozen
    local.write(model)
    update = Frame(base.manifest)
    update.read_update(model, base)
    assert torch.equal(base.parameters + update.parameters, local.parameters)
    assert torch.equal(update.buffers, local.buffers)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_manifest_or_a_wire_error(data: bytes) -> None:
    try:
        manifest = Manifest.unpack(data)
    except WireError:
        return
    assert manifest.entries


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=4) | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=8,
)  # fmt: skip
names = st.sampled_from(["a", "b", "c"]) | plain
dtypes = st.sampled_from(list(DTYPES)) | plain
dimensions = st.lists(st.integers(0, 3), max_size=2) | plain
numbers = st.integers(0, 9) | plain
roles = st.sampled_from(ROLES) | plain
rules = st.sampled_from(["", "mean", "max", "latest"]) | plain
lists = st.lists(names, max_size=2) | plain
fields = st.tuples(names, dtypes, dimensions, numbers, numbers, roles, rules, lists, lists)
rows = st.lists(fields | plain, max_size=3)


@given(rows)
def test_any_rows_are_a_consistent_manifest_or_a_wire_error(value: Any) -> None:
    try:
        manifest = Manifest.unpack(msgpack.packb(value))
    except WireError:
        return
    Frame(manifest)
    for entry in manifest.entries:
        assert entry.length == np.prod(entry.shape, dtype=int)
        assert entry.role == "frozen" or getattr(torch, entry.dtype).is_floating_point == (entry.role != "counter")

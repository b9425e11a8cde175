"""Compares each encoding with a float64 oracle: error bound, size, rejected input, and delta plus residual."""

from __future__ import annotations

import contextlib
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_st
from numpy.typing import NDArray

from fedqueue.config.compression import DENSE, SPARSE, CompressionConfig
from fedqueue.errors import WireError
from fedqueue.protocol.messages import Update
from fedqueue.tensors import encodings
from fedqueue.tensors.codec import Codec, Encoded, MaskedCodec, downlink_codec, uplink_codec
from fedqueue.tensors.encodings import ENCODINGS
from fedqueue.tensors.error_feedback import ErrorFeedback
from fedqueue.tensors.frame import Frame
from fedqueue.tensors.manifest import BUFFER, COUNTER, PARAMETER, Manifest, TensorSpec

NAMES = (*DENSE, *SPARSE)
each_codec = pytest.mark.parametrize("lossless", ["none", "zstd"])
each_name = pytest.mark.parametrize("name", NAMES)
HEADER = Update(examples=1, nbytes=0, chunks=0, seconds=0.0)


def manifest_of(n: int, buffers: int = 3, counters: int = 2) -> Manifest:
    """Build a manifest of n parameters, with buffers and counters, which no encoding changes."""
    entries = [TensorSpec("w", "float32", (n,), 0, n, PARAMETER)]
    entries += [TensorSpec("b", "float32", (buffers,), n, buffers, BUFFER)] if buffers else []
    entries += [TensorSpec("c", "int64", (counters,), 0, counters, COUNTER)] if counters else []
    return Manifest(tuple(entries))


def frame_with(values: Any, buffers: int = 3, counters: int = 2) -> Frame:
    values = np.asarray(values, np.float32)
    frame = Frame(manifest_of(len(values), buffers, counters))
    frame.parameters.copy_(torch.from_numpy(values.copy()))
    frame.buffers.copy_(torch.arange(buffers) / 3)
    frame.counters.copy_(torch.arange(counters) + 2**40)
    return frame


def codec_of(frame: Frame, name: str, lossless: str = "none", **fields: Any) -> Codec:
    return uplink_codec(CompressionConfig(uplink=name, uplink_lossless=lossless, **fields), frame.manifest)


def sent(values: Any, name: str, seed: int = 1, lossless: str = "none", **fields: Any) -> NDArray[Any]:
    """Return the values after encoding and decoding, as float64."""
    frame = frame_with(values)
    codec = codec_of(frame, name, lossless, **fields)
    return codec.decode(codec.encode(frame, seed)).whole().parameters.numpy().astype(np.float64)


def worst(name: str, values: NDArray[Any], block: int = 16, k: float = 0.3) -> NDArray[Any]:
    """Return the documented error bound of each element, as float64."""
    x = np.abs(np.asarray(values, np.float64))
    match name:
        case "float32":
            return np.zeros_like(x)
        case "float16":
            return np.maximum(x * 2.0**-11, 2.0**-25)
        case "bfloat16":
            return np.maximum(x * 2.0**-8, 2.0**-134)
        case "int8":
            padded = np.concatenate([x, np.zeros(-len(x) % block)]).reshape(-1, block)
            scale = np.maximum(padded.max(axis=1) / 127, encodings.TINY)
            return np.repeat(scale, block)[: len(x)] * (1 + 2.0**-16)
    return x


moderate = numpy_st.arrays(
    np.float32, st.integers(1, 90), elements=st.floats(-(2.0**15), 2.0**15, width=32, allow_subnormal=True)
)


@each_codec
@each_name
@given(values=moderate, seed=st.integers(0, 2**53))
def test_decoded_elements_are_within_the_stated_bound(
    name: str, lossless: str, values: NDArray[Any], seed: int
) -> None:
    decoded = sent(values, name, seed, lossless, int8_block=16, topk_ratio=0.3)
    assert (np.abs(decoded - values.astype(np.float64)) <= worst(name, values)).all()


@each_codec
@each_name
@given(values=moderate)
def test_buffers_and_counters_travel_exactly(name: str, lossless: str, values: NDArray[Any]) -> None:
    frame = frame_with(values)
    codec = codec_of(frame, name, lossless, int8_block=16, topk_ratio=0.3)
    wire = codec.encode(frame, 7)
    assert codec.accepts(wire.nbytes)
    decoded = codec.decode(wire).whole()
    assert torch.equal(decoded.buffers, frame.buffers)
    assert torch.equal(decoded.counters, frame.counters)
    n, k = len(values), math.ceil(0.3 * len(values))
    size = {"float16": 2 * n, "bfloat16": 2 * n, "int8": n + 4 * -(-n // 16), "topk": 8 * k, "randomk": 8 + 4 * k}
    if name in size:
        assert codec.nbytes == -(-size[name] // 8) * 8 + 16 + 16
    if lossless == "none":
        assert wire.nbytes == codec.nbytes == codec.largest


@each_name
def test_encoding_is_within_bounds_across_piece_borders(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of elements exceeds a piece, and is no multiple of the piece size or of the block size."""
    values = np.random.default_rng(0).normal(size=1003).astype(np.float32)
    whole = sent(values, name, int8_block=32, topk_ratio=0.1)
    monkeypatch.setattr(encodings, "PIECE", 64)
    pieces = sent(values, name, int8_block=32, topk_ratio=0.1)
    assert (np.abs(pieces - values) <= worst(name, values, block=32)).all()
    if name != "int8":  # int8 draws its random numbers separately for each piece
        np.testing.assert_array_equal(whole, pieces)


def test_bytes_are_determined_by_the_seed() -> None:
    frame = frame_with(np.random.default_rng(1).normal(size=500))
    for name in ("int8", "randomk"):
        codec = codec_of(frame, name)
        assert np.array_equal(codec.encode(frame, 5), codec.encode(frame, 5))
        assert not np.array_equal(codec.encode(frame, 5), codec.encode(frame, 6))


def test_float32_is_sent_unchanged_and_without_a_copy() -> None:
    frame = frame_with([1.0, 2.0])
    codec = codec_of(frame, "float32")
    assert codec.encode(frame, 0) is frame.buffer
    assert codec.decode(frame.buffer).whole().buffer is frame.buffer
    assert (codec.name, codec.nbytes) == ("float32", frame.manifest.nbytes)


# int8


def test_stochastic_rounding_is_unbiased() -> None:
    """The mean of 4,000 roundings of each of 64 values is within 5 standard errors, each at most s / 2 / √4000."""
    values = np.random.default_rng(2).normal(size=64)
    scale = np.abs(values.astype(np.float32)).max() / 127
    runs = np.stack([sent(values, "int8", seed, int8_block=64) for seed in range(4000)])
    bias = runs.mean(axis=0) - values.astype(np.float32)
    assert np.abs(bias).max() < 5 * scale / 2 / math.sqrt(4000)
    assert runs.std(axis=0).max() > scale / 4, "rounding is deterministic"


def test_int8_is_exact_for_values_on_its_grid() -> None:
    """A block of 16 with maximum 127 has scale 1, so integers are exact. The second block has a scale of its own."""
    first, second = [127.0, -127.0, 3.0, 0.0] * 4, [0.0, 254.0, -2.0, 4.0]
    assert sent([*first, *second], "int8", int8_block=16).tolist() == [*first, *second]


def test_zero_and_subnormal_blocks_stay_within_the_bound() -> None:
    tiny = np.float32(1e-45)
    decoded = sent([0.0] * 16 + [tiny, -tiny] * 8, "int8", int8_block=16)
    assert not decoded[:16].any()
    frame = frame_with([0.0] * 16)
    assert codec_of(frame, "int8", int8_block=16).encode(frame, 0)[:4].view(np.float32)[0] > 0, (
        "a block of zeros caused a division by 0"
    )
    assert np.abs(decoded[16:]).max() <= 2 * encodings.TINY


def test_negative_scale_is_malformed() -> None:
    frame = frame_with([1.0] * 20)
    codec = codec_of(frame, "int8", int8_block=16)
    wire = codec.encode(frame, 0)
    wire[:4].view(np.float32)[0] = -1.0
    with pytest.raises(WireError, match="negative"):
        codec.decode(wire).whole()


# top-k


def test_topk_sends_the_largest_and_breaks_ties_by_position() -> None:
    assert sent([1.0, -5.0, 0.5, 5.0, -1.0, 1.0], "topk", topk_ratio=0.5).tolist() == [1.0, -5.0, 0, 5.0, 0, 0]


@given(values=moderate, k=st.floats(0.01, 1.0))
def test_topk_omits_no_element_larger_than_a_sent_one(values: NDArray[Any], k: float) -> None:
    decoded = sent(values, "topk", topk_ratio=k)
    kept = np.sort(np.abs(values.astype(np.float64)))[::-1][: math.ceil(k * len(values))]
    assert np.sort(np.abs(decoded))[::-1][: len(kept)].tolist() == kept.tolist()
    assert (decoded == 0).sum() >= len(values) - len(kept)


@pytest.mark.parametrize(
    ("place", "step", "says"),
    [(1, 0, "comes twice"), (0, 21, "position"), (2, 2**32 - 1, "position"), (3, 2, "position 20 of 20")],
)
def test_repeated_or_out_of_range_positions_are_malformed(place: int, step: int, says: str) -> None:
    frame = frame_with(np.arange(20) + 1.0)
    codec = codec_of(frame, "topk", topk_ratio=0.2)
    wire = codec.encode(frame, 0)
    wire[:16].view(np.uint32)[place] = step
    with pytest.raises(WireError, match=says):
        codec.decode(wire).whole()


# random-k


def test_randomk_sends_one_element_of_each_stratum() -> None:
    values = np.arange(10) + 1.0
    seen = np.zeros(10)
    for seed in range(400):
        decoded = sent(values, "randomk", seed, topk_ratio=0.3)  # strata 0-2, 3-5 and 6-9
        assert [np.count_nonzero(decoded[a:b]) for a, b in ((0, 3), (3, 6), (6, 10))] == [1, 1, 1]
        assert set(decoded) - {0} <= set(values)
        seen += decoded != 0
    expected = 400 / np.array([3, 3, 3, 3, 3, 3, 4, 4, 4, 4])
    assert np.abs(seen - expected).max() < 5 * math.sqrt(400 / 4)


def test_randomk_chooses_the_same_on_every_machine() -> None:
    """Pins the indices of one seed: deriving them in another way would break runs with workers of mixed versions."""
    assert np.flatnonzero(sent(np.ones(1000), "randomk", seed=12345, topk_ratio=0.005)).tolist() == [
        184,
        372,
        525,
        673,
        928,
    ]


# Non-finite deltas


@each_codec
@each_name
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_delta_stays_non_finite_after_decoding(name: str, lossless: str, bad: float) -> None:
    """The coordinator must refuse a non-finite delta, even if the encoding does not select the non-finite element."""
    values = np.full(200, 0.5, np.float32)
    values[17] = bad
    assert not np.isfinite(sent(values, name, 3, lossless, topk_ratio=0.02)).all()


def test_half_precision_overflows_to_infinity() -> None:
    assert np.isinf(sent([70_000.0, 1.0], "float16")).tolist() == [True, False]


# Adding in one pass


@each_name
@given(values=moderate, weight=st.floats(-4, 4, width=32), first=st.booleans(), seed=st.integers(0, 2**53))
def test_fused_add_equals_decode_scale_and_add_in_float32(
    name: str, values: NDArray[Any], weight: float, first: bool, seed: int
) -> None:
    """The oracle is numpy's float32 arithmetic, which rounds each operation; torch's own additions may fuse two."""
    frame = frame_with(values)
    encoded = codec_of(frame, name, int8_block=16, topk_ratio=0.3)
    update = encoded.decode(encoded.encode(frame, seed))
    before = np.random.default_rng(seed).normal(size=len(values)).astype(np.float32)
    into = torch.from_numpy(before.copy())
    update.add_to(into, weight, first)
    weighed = np.float32(weight) * update.whole().parameters.numpy()
    expected = weighed if first else before + weighed
    if name in ("float32", "randomk"):
        np.testing.assert_allclose(into.numpy(), expected, rtol=2.0**-22, atol=2.0**-22 * np.abs(weighed).max())
    else:
        np.testing.assert_array_equal(into.numpy(), expected)


@pytest.mark.parametrize(("name", "dtype"), [("float16", torch.float16), ("bfloat16", torch.bfloat16)])
def test_every_sixteen_bit_float_is_widened_exactly(name: str, dtype: torch.dtype) -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    into = torch.zeros(2**16)
    ENCODINGS[name](CompressionConfig()).add(bits.view(np.uint8), into, 1.0, True)
    expected = torch.from_numpy(bits).view(dtype).float()
    torch.testing.assert_close(into, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.signbit(into), torch.signbit(expected))


@pytest.mark.parametrize(("place", "step"), [(1, 0), (0, 21), (2, 2**32 - 1), (3, 2)])
def test_repeated_or_out_of_range_position_is_not_added(place: int, step: int) -> None:
    frame = frame_with(np.arange(20) + 1.0)
    codec = codec_of(frame, "topk", topk_ratio=0.2)
    wire = codec.encode(frame, 0)
    wire[:16].view(np.uint32)[place] = step
    room = torch.zeros(60)
    with pytest.raises(WireError, match="twice, or is not one of 20"):
        codec.decode(wire).add_to(room[20:40], 1.0, False)
    assert not room[:20].any()
    assert not room[40:].any()
    assert np.count_nonzero(room) == place


@pytest.mark.parametrize("name", ["int8", "topk"])
@given(data=st.binary(min_size=48, max_size=48) | st.lists(st.integers(0, 9), min_size=48, max_size=48).map(bytes))
def test_add_and_decode_reject_the_same_inputs(name: str, data: bytes) -> None:
    frame = frame_with(np.zeros(20), 0, 0)
    codec = codec_of(frame, name, topk_ratio=0.3, int8_block=16)
    wire = np.frombuffer(data, np.uint8)[: codec.nbytes].copy()
    room, refusals = torch.zeros(60), []
    update = codec.decode(wire)
    for use in (update.whole, lambda: update.add_to(room[20:40], 1.0, True)):
        try:
            use()
        except WireError:
            refusals.append(use)
    assert len(refusals) in (0, 2)
    assert not room[:20].any()
    assert not room[40:].any()
    if not refusals:
        np.testing.assert_array_equal(room[20:40].numpy(), update.whole().parameters.numpy())


@pytest.mark.slow
def test_only_merging_encoded_updates_imports_the_compiler() -> None:
    modules = "sys, fedqueue.tensors.codec, fedqueue_worker.process, fedqueue_coordinator.service.coordinator"
    program = [sys.executable, "-c", f"import {modules}; print('numba' in sys.modules)"]
    says = subprocess.run(program, capture_output=True, text=True, check=True, timeout=60)
    assert says.stdout.strip() == "False"


# Sizes


@each_codec
@each_name
def test_wrong_number_of_bytes_is_refused(name: str, lossless: str) -> None:
    frame = frame_with(np.random.default_rng(3).normal(size=100))
    codec = codec_of(frame, name, lossless)
    wire = codec.encode(frame, 0)
    for wrong in (
        wire[:-8],
        np.concatenate([wire, np.zeros(8, np.uint8)]),
        wire[:0],
        np.zeros(codec.largest + 1, "u1"),
    ):
        with pytest.raises(WireError):
            codec.decode(wrong)


def test_oversized_zstd_is_refused_before_decompression() -> None:
    bomb = codec_of(frame_with(np.zeros(10**7)), "float32", "zstd").encode(frame_with(np.zeros(10**7)), 0)
    assert bomb.nbytes < 10_000
    codec = Codec(manifest_of(3000), None, True)
    assert codec.accepts(bomb.nbytes)
    with pytest.raises(WireError, match="expected"):
        codec.decode(bomb)


@given(cut=st.integers(0, 400), new=st.binary(max_size=9))
def test_damaged_zstd_is_an_error_or_a_frame_of_the_right_size(cut: int, new: bytes) -> None:
    frame = frame_with(np.random.default_rng(4).normal(size=100))
    codec = codec_of(frame, "float16", "zstd")
    wire = codec.encode(frame, 0)
    cut = min(cut, wire.nbytes)
    damaged = np.frombuffer(wire[:cut].tobytes() + new + wire[cut + len(new) :].tobytes(), np.uint8)
    assume(damaged.nbytes)
    with contextlib.suppress(WireError):
        assert codec.decode(damaged).whole().buffer.nbytes == frame.manifest.nbytes


def test_zstd_saves_bytes_of_weights_that_look_random() -> None:
    """Similar exponents, stored apart from the other bits, compress to less than half."""
    frame = frame_with(np.random.default_rng(5).normal(size=100_000))
    plain, small = (codec_of(frame, "bfloat16", z).encode(frame, 0).nbytes for z in ("none", "zstd"))
    assert small < 0.75 * plain


# Error feedback


@pytest.mark.parametrize("name", SPARSE)
@given(deltas=st.lists(numpy_st.arrays(np.float32, 20, elements=st.floats(-1, 1, width=32)), min_size=1, max_size=12))
def test_sent_delta_plus_residual_is_the_trained_delta(name: str, deltas: list[NDArray[Any]]) -> None:
    manifest = manifest_of(20)
    feedback = ErrorFeedback(uplink_codec(CompressionConfig(uplink=name, topk_ratio=0.1), manifest))
    total, arrived = np.zeros(20), np.zeros(20)
    for seed, delta in enumerate(deltas):
        frame = frame_with(delta)
        _, wire = feedback.encode("c", frame, HEADER, seed)
        feedback.accepted("c", frame)
        arrived += feedback.codec.decode(wire).whole().parameters.numpy()
        total += delta
    np.testing.assert_allclose(arrived + feedback.residuals["c"].numpy(), total, atol=20 * 2.0**-22)


def test_refused_update_keeps_the_clients_residual() -> None:
    feedback = ErrorFeedback(uplink_codec(CompressionConfig(uplink="topk", topk_ratio=0.5), manifest_of(2)))
    first = frame_with([3.0, 1.0])
    feedback.encode("a", first, HEADER, 0)
    feedback.accepted("a", first)
    assert feedback.residuals["a"].tolist() == [0.0, 1.0]
    refused = frame_with([9.0, 1.0])
    feedback.encode("a", refused, HEADER, 1)
    assert feedback.residuals["a"].tolist() == [0.0, 1.0]
    other = frame_with([9.0, 1.0])
    _, wire = feedback.encode("b", other, HEADER, 1)
    assert feedback.codec.decode(wire).whole().parameters.tolist() == [9.0, 0.0]
    again = frame_with([1.0, 0.5])
    _, wire = feedback.encode("a", again, HEADER, 2)
    assert feedback.codec.decode(wire).whole().parameters.tolist() == [0.0, 1.5], "the residual was not added"


def test_non_finite_delta_does_not_enter_the_residual() -> None:
    feedback = ErrorFeedback(uplink_codec(CompressionConfig(uplink="topk", topk_ratio=0.5), manifest_of(2)))
    bad = frame_with([math.nan, 1.0])
    _, wire = feedback.encode("a", bad, HEADER, 0)
    feedback.accepted("a", bad)
    assert not feedback.residuals
    assert not np.isfinite(feedback.codec.decode(wire).whole().parameters.numpy()).all()


def test_dense_encodings_have_no_residual() -> None:
    compression = CompressionConfig(downlink="int8", downlink_lossless="zstd")
    feedback = ErrorFeedback(downlink_codec(compression, manifest_of(50)))
    frame = frame_with(np.ones(50))
    update, wire = feedback.encode("a", frame, HEADER, 0)
    feedback.accepted("a", frame)
    assert not feedback.residuals
    assert (update.encoding, update.nbytes, update.chunks) == ("int8+zstd", wire.nbytes, 1)


# Memory


@pytest.mark.parametrize("name", NAMES)
def test_encoding_by_pieces_allocates_no_second_model(name: str) -> None:
    import tracemalloc

    n = 4_000_000
    frame = frame_with(np.ones(n), 0, 0)
    codec = codec_of(frame, name)
    encoded = codec.decode(codec.encode(frame, 0))
    assert name == "float32" or isinstance(encoded, Encoded)
    tracemalloc.start()
    largest = sum(values.numel() for _, values in encoded.pieces())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * n / 2
    assert largest in (n, math.ceil(0.01 * n))
    assert all(values.numel() <= encodings.PIECE for _, values in encoded.pieces()) or name == "float32"
    assert set(ENCODINGS) == set(NAMES) - {"float32"}


# Masked updates


def test_a_masked_update_has_a_word_for_each_parameter() -> None:
    codec = MaskedCodec(manifest_of(3000))
    assert (codec.name, codec.nbytes, codec.largest) == ("ring32", 12_000, 12_000)
    assert codec.accepts(12_000)
    assert not codec.accepts(12_004)
    assert not codec.identity


def test_a_masked_update_decodes_to_no_frame() -> None:
    codec = MaskedCodec(manifest_of(3000))
    for use in (codec.decode, codec.received):
        with pytest.raises(WireError, match="masked, and only the sum of a whole cohort"):
            use(np.zeros(12_000, np.uint8))
    with pytest.raises(WireError, match="masked"):
        codec.encode(Frame(manifest_of(3000)), 1)

"""Streamed updates are read again for each pass and give the bits of updates in memory, whatever happens between."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import redis
import torch
from hypothesis import given
from hypothesis import strategies as st

import fedqueue.tensors.frame
from fedqueue.config.compression import CompressionConfig
from fedqueue.errors import BlobMissing, SignatureError
from fedqueue.staleness import constant
from fedqueue.tensors.codec import uplink_codec
from fedqueue.tensors.frame import Frame
from fedqueue.tensors.kernels import kernel
from fedqueue.tensors.manifest import BUFFER, COUNTER, PARAMETER, Manifest, TensorSpec
from fedqueue_coordinator.algorithms.aggregator import Contribution
from fedqueue_coordinator.algorithms.fedbuff import fedbuff
from fedqueue_coordinator.algorithms.robust import Rule, norm_clipping, robust_fedbuff
from fedqueue_coordinator.operator.audit.audit import audit, ok
from fedqueue_coordinator.operator.audit.audit_input import read_audit_input
from fedqueue_coordinator.operator.results import write_results
from fedqueue_coordinator.service import payload_reader, read_ahead
from fedqueue_coordinator.service.payload_reader import PayloadChanged, StreamedPayload
from fedqueue_coordinator.service.read_ahead import ReadAhead
from tests.support.scripted_run import run_to_the_end, scripted_config

CLIPPED = robust_fedbuff(2, constant(), Rule("norm_clipping", weigh=norm_clipping(1.0)))
FEDBUFF = {"aggregation": {"strategy": "fedbuff", "buffer_size": 3}, "stop": {"versions": 3}}


def manifest_of(parameters: int, buffers: int, counters: int) -> Manifest:
    rows = [("w", "float32", 0, parameters, PARAMETER), ("b", "float32", parameters, buffers, BUFFER)]
    entries = [*rows, ("c", "int64", 0, counters, COUNTER)]
    return Manifest(tuple(TensorSpec(name, dtype, (n,), offset, n, role) for name, dtype, offset, n, role in entries))


def random_frame(manifest: Manifest, seed: int) -> Frame:
    frame = Frame(manifest)
    frame.floats.copy_(torch.from_numpy(np.random.default_rng(seed).normal(size=manifest.floats).astype(np.float32)))
    frame.counters.fill_(seed)
    return frame


def reader(buffer: Any) -> Any:
    def read(start: Any, into: Any, whole: Any) -> None:
        assert whole == len(buffer)
        into[:] = buffer[start : start + into.nbytes]

    return read


@given(parameters=st.integers(1, 70), buffers=st.integers(0, 9), counters=st.integers(0, 3), piece=st.integers(1, 80))
def test_streamed_update_merges_to_the_same_bits(parameters: Any, buffers: Any, counters: Any, piece: Any) -> None:
    manifest = manifest_of(parameters, buffers, counters)
    frame, first = random_frame(manifest, 1), random_frame(manifest, 2)
    with pytest.MonkeyPatch.context() as patch:
        for module in (fedqueue.tensors.frame, payload_reader):
            patch.setattr(module, "PIECE", piece)
        sent = StreamedPayload(manifest, reader(frame.buffer), hashlib.sha256(frame.buffer.data).hexdigest())
        assert bytes(sent.whole().buffer) == bytes(frame.buffer)
        aggregator, model = fedbuff(2, lambda tau: 0.7), random_frame(manifest, 3)
        sums = []
        for second in (frame, sent):
            accumulator = aggregator.init(manifest)
            for delta in (first, second):
                aggregator.add(accumulator, Contribution(delta, 1, 0), model)
            sums.append(bytes(accumulator.memory))
    assert sums[0] == sums[1]


def test_changed_payload_is_detected_in_each_streaming_pass() -> None:
    manifest = manifest_of(40, 3, 1)
    buffer = random_frame(manifest, 1).buffer
    for place in (0, 4 * 40 + 1, len(buffer) - 1):  # a parameter, a buffer, a counter
        forged = buffer.copy()
        forged[place] ^= 1
        with pytest.raises(SignatureError):
            list(StreamedPayload(manifest, reader(forged), hashlib.sha256(buffer.data).hexdigest()).pieces())
    changing = buffer.copy()
    update = StreamedPayload(manifest, reader(changing))
    list(update.pieces())
    list(update.pieces())
    changing[5] ^= 1
    with pytest.raises(PayloadChanged):
        list(update.pieces())


def test_vanished_payload_is_detected_in_each_streaming_pass() -> None:
    manifest, there = manifest_of(40, 0, 0), [True]
    buffer = random_frame(manifest, 1).buffer

    def read(start: Any, into: Any, whole: Any) -> None:
        if not there[0]:
            raise BlobMissing("payload:0")
        reader(buffer)(start, into, whole)

    sound, fresh = StreamedPayload(manifest, read), StreamedPayload(manifest, read)
    list(sound.pieces())
    there[0] = False
    with pytest.raises(BlobMissing):
        list(fresh.pieces())
    with pytest.raises(PayloadChanged, match="payload:0"):
        list(sound.pieces())


@pytest.fixture
def streaming(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stream every plain payload that finds the accumulator occupied; the list has one element for each pass."""
    monkeypatch.setattr(payload_reader, "CHUNK", 0)
    passes: list[StreamedPayload] = []
    pieces = StreamedPayload.pieces

    def counted(self: Any) -> Any:
        passes.append(self)
        return pieces(self)

    monkeypatch.setattr(StreamedPayload, "pieces", counted)
    return passes


def test_streaming_run_has_the_bits_of_a_plain_run(
    redis_client: redis.Redis, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    config = scripted_config(**FEDBUFF)
    held, _ = run_to_the_end(redis_client, config, tmp_path / "held", [])
    redis_client.flushall()
    passes = request.getfixturevalue("streaming")
    sent, _ = run_to_the_end(redis_client, config, tmp_path / "streamed", [])
    assert bytes(sent.model.buffer) == bytes(held.model.buffer)
    assert len(passes) >= 2 * 2 * 3  # two passes over two of three updates, for each version


def test_prefetching_run_has_the_bits_of_a_plain_run(
    redis_client: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = scripted_config(**FEDBUFF)
    plain, _ = run_to_the_end(redis_client, config, tmp_path / "plain", [], together=3)
    redis_client.flushall()
    monkeypatch.setattr(read_ahead, "LEAST", 1)
    fetched: list[str] = []
    fetch = ReadAhead._fetch

    def noted(self: ReadAhead, prefix: str, *others: Any) -> Any:
        fetched.append(prefix)
        return fetch(self, prefix, *others)

    monkeypatch.setattr(ReadAhead, "_fetch", noted)
    ahead, _ = run_to_the_end(redis_client, config, tmp_path / "ahead", [], together=3)
    assert bytes(ahead.model.buffer) == bytes(plain.model.buffer)
    assert len(fetched) >= 3


def test_update_changed_before_its_merge_is_rejected_alone(
    redis_client: redis.Redis, tmp_path: Path, streaming: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = scripted_config(**FEDBUFF)
    changed: list[str] = []
    pieces = StreamedPayload.pieces

    def tampered(self: Any) -> Any:
        if streaming.count(self) == 1 and len(streaming) > 4 and not changed:  # after the pass that checks it
            key = f"{self._read.args[0]}:0"
            redis_client.setrange(key, 8, b"\xff")
            changed.append(key)
        return pieces(self)

    monkeypatch.setattr(StreamedPayload, "pieces", tampered)
    result, _ = run_to_the_end(redis_client, config, tmp_path, [])
    assert changed
    torn = [record for record in result.ledger if record.get("reason") == "tampered"]
    assert len(torn) == 1
    assert torn[0]["job"] in changed[0]
    assert result.version == 3
    merged = [line["job"] for record in result.ledger if record["kind"] == "version" for line in record["merged"]]
    assert len(merged) == len(set(merged)) == 9
    assert torn[0]["job"] not in merged
    write_results(tmp_path, config, result)
    assert ok(audit(read_audit_input(str(tmp_path), "")))


@pytest.mark.parametrize(("aggregator", "compiled"), [(fedbuff(2, constant()), 1), (CLIPPED, 0)])
def test_coordinator_compiles_its_loop_before_the_first_update(aggregator: Any, compiled: int) -> None:
    """An aggregator that keeps updates as frames adds no encoded update, so no kernel is compiled for it."""
    manifest = manifest_of(40, 3, 1)
    kernel.cache_clear()
    uplink = uplink_codec(CompressionConfig(uplink="int8"), manifest)
    store: Any = None  # is not read before the first update
    federation: Any = SimpleNamespace(takes_pieces=aggregator.takes_pieces, uplink=uplink)
    payload_reader.PayloadReader(store, federation)
    assert kernel.cache_info().currsize == compiled

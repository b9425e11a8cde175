"""Updates that are read anew for each pass: the same bits as held ones, whatever happens between two passes."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scripted_run import make_config, run_to_the_end

import fedqueue.tensors.frame
from fedqueue.config.compression import CompressionConfig
from fedqueue.errors import BlobMissing, SignatureError
from fedqueue.tensors.codec import upward
from fedqueue.tensors.frame import BUFFER, COUNTER, PARAMETER, Frame, Manifest, TensorSpec
from fedqueue.tensors.kernels import kernel
from fedqueue.transport import read_ahead
from fedqueue.transport.read_ahead import ReadAhead
from fedqueue_coordinator.algorithms.aggregator import Contribution, fedbuff
from fedqueue_coordinator.algorithms.robust import Rule, norm_clipping, robust_fedbuff
from fedqueue_coordinator.algorithms.staleness import constant
from fedqueue_coordinator.operator.audit.audit import audit, ok, read_audit_input
from fedqueue_coordinator.operator.results import write_results
from fedqueue_coordinator.service import payload_reader, streaming_payload
from fedqueue_coordinator.service.streaming_payload import PayloadChanged, StreamedPayload

CLIPPED = robust_fedbuff(2, constant(), Rule("norm_clipping", weigh=norm_clipping(1.0)))
FEDBUFF = {"aggregation": {"mode": "fedbuff", "buffer_size": 3}, "stop": {"versions": 3}}


def manifest_of(parameters: int, buffers: int, counters: int) -> Manifest:
    rows = [("w", "float32", 0, parameters, PARAMETER), ("b", "float32", parameters, buffers, BUFFER)]
    entries = [*rows, ("c", "int64", 0, counters, COUNTER)]
    return Manifest(tuple(TensorSpec(name, dtype, (n,), offset, n, role) for name, dtype, offset, n, role in entries))


def frame_of(manifest: Manifest, seed: int) -> Frame:
    frame = Frame(manifest)
    frame.floats.copy_(torch.from_numpy(np.random.default_rng(seed).normal(size=manifest.floats).astype(np.float32)))
    frame.counters.fill_(seed)
    return frame


def reader(buffer):
    def read(start, into, whole):
        assert whole == len(buffer)
        into[:] = buffer[start : start + into.nbytes]

    return read


@given(parameters=st.integers(1, 70), buffers=st.integers(0, 9), counters=st.integers(0, 3), piece=st.integers(1, 80))
def test_streamed_update_is_the_frame_and_merges_to_the_same_bits(parameters, buffers, counters, piece):
    manifest = manifest_of(parameters, buffers, counters)
    frame, first = frame_of(manifest, 1), frame_of(manifest, 2)
    with pytest.MonkeyPatch.context() as patch:
        for module in (fedqueue.tensors.frame, streaming_payload):
            patch.setattr(module, "PIECE", piece)
        sent = StreamedPayload(manifest, reader(frame.buffer), hashlib.sha256(frame.buffer).hexdigest())
        assert bytes(sent.whole().buffer) == bytes(frame.buffer)
        aggregator, model = fedbuff(2, lambda tau: 0.7), frame_of(manifest, 3)
        sums = []
        for second in (frame, sent):
            accumulator = aggregator.init(manifest)
            for delta in (first, second):
                aggregator.add(accumulator, Contribution(delta, 1, 0), model)
            sums.append(bytes(accumulator.memory))
    assert sums[0] == sums[1]


def test_first_pass_refuses_what_was_not_signed_and_later_ones_what_has_changed():
    manifest = manifest_of(40, 3, 1)
    buffer = frame_of(manifest, 1).buffer
    for place in (0, 4 * 40 + 1, len(buffer) - 1):  # a parameter, a buffer, a counter
        forged = buffer.copy()
        forged[place] ^= 1
        with pytest.raises(SignatureError):
            list(StreamedPayload(manifest, reader(forged), hashlib.sha256(buffer).hexdigest()).pieces())
    changing = buffer.copy()
    update = StreamedPayload(manifest, reader(changing))
    list(update.pieces())
    list(update.pieces())
    changing[5] ^= 1
    with pytest.raises(PayloadChanged):
        list(update.pieces())


def test_payload_that_goes_away_is_missing_in_the_first_pass_and_torn_in_a_later_one():
    manifest, there = manifest_of(40, 0, 0), [True]
    buffer = frame_of(manifest, 1).buffer

    def read(start, into, whole):
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
def streaming(monkeypatch):
    """Every plain payload that finds the accumulator taken is streamed; the list says how many passes there were."""
    monkeypatch.setattr(payload_reader, "CHUNK", 0)
    passes: list[StreamedPayload] = []
    pieces = StreamedPayload.pieces

    def counted(self):
        passes.append(self)
        return pieces(self)

    monkeypatch.setattr(StreamedPayload, "pieces", counted)
    return passes


def test_run_that_streams_ends_with_the_bits_of_one_that_does_not(redis_client, tmp_path, request):
    config = make_config(**FEDBUFF)
    held, _ = run_to_the_end(redis_client, config, tmp_path / "held", [])
    redis_client.flushall()
    passes = request.getfixturevalue("streaming")
    sent, _ = run_to_the_end(redis_client, config, tmp_path / "streamed", [])
    assert bytes(sent.model.buffer) == bytes(held.model.buffer)
    assert len(passes) >= 2 * 2 * 3  # two passes over two of three updates, for each version


def test_run_that_reads_ahead_ends_with_the_bits_of_one_that_does_not(redis_client, tmp_path, monkeypatch):
    config = make_config(**FEDBUFF)
    plain, _ = run_to_the_end(redis_client, config, tmp_path / "plain", [], together=3)
    redis_client.flushall()
    monkeypatch.setattr(read_ahead, "LEAST", 1)
    fetched: list[str] = []
    fetch = ReadAhead._fetch
    monkeypatch.setattr(ReadAhead, "_fetch", lambda self, *a: fetched.append(a[0]) or fetch(self, *a))
    ahead, _ = run_to_the_end(redis_client, config, tmp_path / "ahead", [], together=3)
    assert bytes(ahead.model.buffer) == bytes(plain.model.buffer)
    assert len(fetched) >= 3


def test_update_that_is_changed_between_check_and_merge_is_rejected_and_the_others_count(
    redis_client, tmp_path, streaming, monkeypatch
):
    config = make_config(**FEDBUFF)
    changed: list[str] = []
    pieces = StreamedPayload.pieces

    def tampered(self):
        if streaming.count(self) == 1 and len(streaming) > 4 and not changed:  # its check is done
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
def test_coordinator_compiles_its_loop_before_the_first_update_comes(aggregator, compiled):
    """Where updates are kept as frames, none is added while it is encoded, and nothing is compiled."""
    manifest = manifest_of(40, 3, 1)
    kernel.cache_clear()
    payload_reader.PayloadReader(aggregator, aggregator.init(manifest), upward(CompressionConfig(up="int8"), manifest))
    assert kernel.cache_info().currsize == compiled

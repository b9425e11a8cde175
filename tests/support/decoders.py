"""Lists every function that decodes bytes from outside the process, with the only errors that it may raise.

`check` tests one input against three bounds: no other error is raised, CPU time stays below `SECONDS`, and memory stays
below `PER_BYTE` times the input plus `CONSTANT`.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import redis
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedqueue.config.compression import CompressionConfig
from fedqueue.config.loading import parse_config
from fedqueue.config.training import TrainingConfig
from fedqueue.errors import ConfigurationError, FedqueueError, StoreError, WireError
from fedqueue.protocol.key_files import SigningKey, read_public_keys
from fedqueue.protocol.messages import (
    AnswerPiece,
    Cohort,
    Ending,
    Evaluation,
    HistogramRange,
    KeeperKey,
    Masked,
    MaskedUpdate,
    MaskRefused,
    Offer,
    Opened,
    Order,
    Question,
    Registration,
    SealedSeed,
    Update,
    read,
)
from fedqueue.protocol.msgpack import unpack_record
from fedqueue.protocol.signed_envelope import (
    ORDER,
    RunDescriptor,
    Scope,
    SignedEnvelope,
    VersionRecord,
    digest_of,
    open_envelope,
    sign_envelope,
)
from fedqueue.protocol.stream_entry import StreamEntry
from fedqueue.secure.seed_envelope import KeeperPrivateKey, seal_seed
from fedqueue.tensors.codec import uplink_codec
from fedqueue.tensors.frame import Frame
from fedqueue.tensors.manifest import Manifest
from fedqueue.transport.rq_jobs import Serializer, TrainingJob
from fedqueue.transport.store import plain_json
from fedqueue_coordinator.service.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

PER_BYTE = 200
CONSTANT = 2**20  # bytes: 64 KiB inflated, a traceback, an error's text
SECONDS = 5.0  # of CPU time, which other load does not change; may include a garbage collection


@dataclass(frozen=True)
class Decoder:
    decode: Callable[[bytes], Any]
    may_raise: tuple[type[Exception], ...]
    seeds: tuple[bytes, ...]


class ToShow(Exception):
    """An input breaks a bound, which the message names."""


def check(name: str, data: bytes) -> None:
    """Raise ToShow if the decoder breaks a bound on `data`."""
    decoder = DECODERS[name]
    seconds, grown = _measure(name, decoder, data)
    if grown > PER_BYTE * len(data) + CONSTANT:  # again: a first use, or a table that grew, allocates once
        seconds, grown = _measure(name, decoder, data)
    if seconds > SECONDS:
        raise ToShow(f"{name}: took {seconds:.1f} s for {len(data)} bytes")
    if grown > PER_BYTE * len(data) + CONSTANT:
        raise ToShow(f"{name}: took {grown} bytes of memory for {len(data)}")


def _measure(name: str, decoder: Decoder, data: bytes) -> tuple[float, int]:
    """Measure one decoding: seconds of CPU, and peak memory in bytes."""
    tracemalloc.start()
    began = time.process_time()
    try:
        decoder.decode(data)
    except decoder.may_raise:
        pass
    except Exception as error:
        raise ToShow(f"{name}: {type(error).__name__}: {error}") from error
    finally:
        seconds, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return seconds, peak


def _message(kind: Any, **fields: Any) -> Decoder:
    return Decoder(lambda data: read(kind, data), (WireError,), (kind(**fields).pack(),))


def _entry(data: bytes) -> StreamEntry:
    parts = data.split(b"\0")
    return StreamEntry.from_fields("c0", (b"1-1", dict(zip(parts[::2], parts[1::2], strict=False))))


def _job(data: bytes) -> Any:
    job = TrainingJob("planted", connection=_NOWHERE, serializer=Serializer)
    fields = [b"data", b"exc_info", b"timeout", b"status", b"created_at", b"meta", b"origin", b"result"]
    job.restore(dict(zip(fields, data.split(b"\0\xff\0"), strict=False)))
    return job.func_name, job.args, job.kwargs, job.timeout


def _configuration(data: bytes) -> Any:
    return parse_config(plain_json(data))


def _sealed(data: bytes) -> Any:
    return open_envelope(data, [_KEY.public], ORDER, _SCOPE, ["c0", 1], "the coordinator")


def _public_keys(data: bytes) -> Any:
    _KEYS.write_bytes(data)
    return read_public_keys(_KEYS)


def _checkpoint(data: bytes) -> Any:
    _FILE.write_bytes(data)
    return load_checkpoint(_FILE)


def _checkpoint_seed() -> bytes:
    record = {"kind": "version", "version": 1, "merged": []}
    bytes_ = np.arange(8, dtype=np.uint8)
    save_checkpoint(
        _FILE, Checkpoint("r", "d", 0, 1, 2, {"updates": 1}, {"r-1": "c0"}, bytes_, bytes_, b"state", [record])
    )
    return _FILE.read_bytes()


def _codec(**compression: Any) -> Decoder:
    """Make a decoder to frames of 40 parameters, a buffer and a counter."""
    codec = uplink_codec(CompressionConfig(topk_ratio=0.2, int8_block=16, **compression), _MANIFEST)
    frame = Frame(_MANIFEST)
    frame.floats.copy_(torch.linspace(-1, 1, 41))

    def decode(data: bytes) -> Frame:
        return codec.decode(np.frombuffer(bytearray(data), np.uint8)).whole()

    return Decoder(decode, (WireError,), (codec.encode(frame, 1).tobytes(),))


_NOWHERE = redis.Redis(port=1)
_FOLDER = tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
_FILE, _KEYS = Path(_FOLDER.name) / "checkpoint.safetensors", Path(_FOLDER.name) / "c0.pub"
_KEY = SigningKey(Ed25519PrivateKey.from_private_bytes(bytes(32)))  # fixed: a stored input keeps its meaning
_SCOPE, _DIGEST = Scope("r", "i" * 32, 1), digest_of(b"")
_KEEPER = KeeperPrivateKey.from_bytes(bytes(range(96)))
_ROW = ["w", "float32", [2, 3], 0, 6, "parameter", "", [], []]
_COUNTER = ["n", "int64", [], 0, 1, "counter", "", [], []]
_MANIFEST = Manifest.unpack(
    msgpack.packb(
        [
            ["w", "float32", [40], 0, 40, "parameter", "", [], []],
            ["b", "float32", [], 40, 1, "buffer", "", [], []],
            _COUNTER,
        ]
    )
)
_CONFIG = {"name": "r", "task": {"entrypoint": "t.py:T"}, "stop": {"versions": 9}, "clients": {"names": ["a", "b.c"]}}

DECODERS: dict[str, Decoder] = {
    "update": _message(Update, examples=3, nbytes=72, chunks=1, metrics={"loss": 0.5}, seconds=0.1),
    "order": _message(Order, run="r", job="r-00000001", client="c0", seed=1, training=TrainingConfig()),
    "registration": _message(Registration, client="c0", examples=10),
    "question": _message(
        Question,
        run="r",
        instance="i" * 32,
        part=2,
        min_count=10,
        ranges={"age": HistogramRange(low=0.0, high=128.0, bins=64)},
    ),
    "answer_piece": _message(AnswerPiece, client="c0", part=1, piece=0, pieces=2, body=b"{}"),
    "ending": _message(Ending, reason="failed", error="E: x"),
    "evaluation": _message(Evaluation, version=1, metrics={"loss": 1.0}),
    "masked_update": _message(
        MaskedUpdate,
        examples=3,
        encoding="ring32",
        nbytes=160,
        chunks=1,
        seconds=0.1,
        digest=_DIGEST,
        model=_DIGEST,
        seeds=(SealedSeed(component=0, keeper="k0", key=_KEEPER.id, sealed=bytes(1168)),),
    ),
    "keeper_key": _message(KeeperKey, public=_KEEPER.public, component=0),
    "offer": _message(Offer, client="c0", job="r-00000001", attempt=1, base=2, header=b"header"),
    "opened": _message(Opened, offers=[{"header": _DIGEST, "refusal": "spent", "detail": "x"}]),
    "cohort": _message(Cohort, version=3, members=((_DIGEST, 8), (_DIGEST[::-1], 5))),
    "masked": _message(Masked, cohort=_DIGEST, digest=_DIGEST, nbytes=160, chunks=1),
    "mask_refused": _message(MaskRefused, cohort=_DIGEST, reason="spent", detail="x", headers=(_DIGEST,)),
    "sealed_seed": Decoder(
        lambda data: _KEEPER.open_seed(data, b"info"), (WireError,), (seal_seed(bytes(32), _KEEPER.public, b"info"),)
    ),
    "keeper_public": Decoder(lambda data: seal_seed(bytes(32), data, b"info"), (WireError,), (_KEEPER.public,)),
    "seal": _message(SignedEnvelope, body=b"said", key="0" * 16, session="s", signature=bytes(64)),
    "sealed": Decoder(_sealed, (WireError,), (sign_envelope(_KEY, ORDER, _SCOPE, ["c0", 1], b"said", "s"),)),
    "descriptor": _message(
        RunDescriptor, instance="i" * 32, epoch=0, term=1, first_version=0, config=_DIGEST, manifest=_DIGEST
    ),
    "version": _message(VersionRecord, model=_DIGEST, state=_DIGEST, job_number=3, history=_DIGEST, totals=_DIGEST),
    "public_keys": Decoder(_public_keys, (ConfigurationError,), (2 * _KEY.public.line().encode(),)),
    "record": Decoder(unpack_record, (WireError,), (msgpack.packb({"kind": "version", "version": 1, "merged": []}),)),
    "manifest": Decoder(Manifest.unpack, (WireError,), (msgpack.packb([_ROW, _COUNTER]),)),
    "entry": Decoder(_entry, (), (b"kind\0update\0job\0r-1\0attempt\0001\0base\0000\0body\0x",)),
    # RQ decodes the rest of a job's record itself; a worker drops the job on any error there.
    "job": Decoder(_job, (Exception,), (msgpack.packb(["f", None, [], {"order": {}}]) + b"\0\xff\0x\0\xff\00060",)),
    "configuration": Decoder(_configuration, (StoreError, ConfigurationError), (json.dumps(_CONFIG).encode(),)),
    **{name: _codec(uplink=name) for name in ("int8", "bfloat16", "topk", "randomk")},
    **{f"{name}+zstd": _codec(uplink=name, uplink_lossless="zstd") for name in ("float32", "float16", "int8", "topk")},
    "checkpoint": Decoder(_checkpoint, (FedqueueError,), (_checkpoint_seed(),)),
}

"""Measures each encoding: bytes on the wire, speed, and accuracy on digits after the same number of updates.

    python benchmarks/compression.py [--quick] [--seeds 5] [--updates 400] [--json FILE]

Bytes and accuracy: examples/digits in a simulation. Training, merging, encoding and rounding are those of a real run,
and a seed always gives the same bits. Each job fetches one model and posts one update.

Speed: one thread, vectors of normal random numbers. Each measurement alternates with one of float32, and the ratio is
the median over the turns, so a change of the machine's speed affects both. Encoding and merging (decoding and adding to
the accumulator) are measured in CPU time of the thread, in nanoseconds for each parameter. "From Redis" is wall-clock
time of all the coordinator's work: reading the payload from a server on this machine, its norm, and merging.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedqueue.config.compression import CompressionConfig
from fedqueue.config.loading import load_config
from fedqueue.config.schema import Config
from fedqueue.task import load_task
from fedqueue.tensors.blobs import BlobBuffer
from fedqueue.tensors.codec import Codec, uplink_codec
from fedqueue.tensors.frame import Frame
from fedqueue.tensors.manifest import PARAMETER, Manifest, TensorSpec
from fedqueue.transport.connection import connect
from fedqueue_coordinator.algorithms.aggregator import Accumulator, Contribution, accumulate
from fedqueue_coordinator.core.admission import admit_delta
from fedqueue_coordinator.operator.embedded_server import EmbeddedServer
from fedqueue_coordinator.service.coordinator_store import CoordinatorStore
from fedqueue_coordinator.simulation.virtual_clock import ClientDatasets, Job, Simulation, TimingModel

DIGITS = Path(__file__).parents[1] / "examples" / "digits"
SPEEDS = TimingModel(batch_seconds=0.01, jitter=0.3)
ROWS: tuple[dict[str, Any], ...] = (
    {},
    {"uplink_lossless": "zstd", "downlink_lossless": "zstd"},
    {"uplink": "float16", "downlink": "float16"},
    {"uplink": "bfloat16", "downlink": "bfloat16"},
    {"uplink": "int8", "downlink": "bfloat16"},
    {"uplink": "int8", "downlink": "bfloat16", "uplink_lossless": "zstd", "downlink_lossless": "zstd"},
    {"uplink": "int8", "downlink": "int8"},
    {"uplink": "int8", "downlink": "int8", "uplink_lossless": "zstd", "downlink_lossless": "zstd"},
    {"uplink": "topk", "downlink": "bfloat16", "topk_ratio": 0.1},
    {"uplink": "topk", "downlink": "bfloat16", "topk_ratio": 0.01},
    {"uplink": "topk", "downlink": "int8", "topk_ratio": 0.1, "uplink_lossless": "zstd", "downlink_lossless": "zstd"},
    {"uplink": "randomk", "downlink": "bfloat16", "topk_ratio": 0.1},
)
TIMED: tuple[dict[str, Any], ...] = (
    {"uplink": "float32"},
    {"uplink": "float16"},
    {"uplink": "bfloat16"},
    {"uplink": "int8"},
    {"uplink": "topk", "topk_ratio": 0.1},
    {"uplink": "topk", "topk_ratio": 0.01},
    {"uplink": "randomk", "topk_ratio": 0.1},
    {"uplink": "randomk", "topk_ratio": 0.01},
    {"uplink": "float32", "uplink_lossless": "zstd"},
    {"uplink": "bfloat16", "uplink_lossless": "zstd"},
    {"uplink": "int8", "uplink_lossless": "zstd"},
    {"uplink": "topk", "topk_ratio": 0.1, "uplink_lossless": "zstd"},
    {"uplink": "topk", "topk_ratio": 0.01, "uplink_lossless": "zstd"},
)


class Counted(Simulation):
    """A simulation that counts the bytes that a real run would have sent."""

    up_bytes = down_bytes = jobs = 0

    def _train(self, job: Job) -> None:
        federation = self.federation
        self.down_bytes += federation.downlink.encode(federation.model, federation.version).nbytes
        super()._train(job)
        assert job.wire is not None
        self.up_bytes += job.wire.nbytes
        self.jobs += 1


def digits(compression: dict[str, Any], seeds: int, updates: int) -> dict[str, Any]:
    """Return the accuracy for each seed, and the bytes of a job's fetch and post as shares of those of float32."""
    base = load_config(DIGITS / "federation.toml", ["evaluation.every_versions=off", "stop.target={}"], environment={})
    task = load_task(base.task.entrypoint, base.task.options, DIGITS)
    sites = ClientDatasets(task)
    accuracies, up, down = [], 0.0, 0.0
    for seed in range(seeds):
        tree = {**base.model_dump(), "seed": seed, "compression": compression, "stop": {"updates": updates}}
        run = Counted(Config.model_validate(tree).located(DIGITS), sites, SPEEDS)
        result = run.run()
        accuracies.append([r for r in result.ledger if r["kind"] == "evaluation"][-1]["metrics"]["accuracy"])
        whole = run.jobs * run.federation.model.manifest.nbytes
        up, down = up + run.up_bytes / whole / seeds, down + run.down_bytes / whole / seeds
    return {"compression": compression, "accuracy": accuracies, "uplink": up, "downlink": down, "both": (up + down) / 2}


def speed(compression: dict[str, Any], parameters: int, turns: int, store: CoordinatorStore) -> dict[str, Any]:
    """Return median nanoseconds per parameter, and median ratios to float32 within the same turn."""
    manifest = Manifest((TensorSpec("w", "float32", (parameters,), 0, parameters, PARAMETER),))
    frame = Frame(manifest)
    frame.parameters.normal_(generator=torch.Generator().manual_seed(0)).mul_(0.01)
    codec = uplink_codec(CompressionConfig(**compression), manifest)
    wire = codec.encode(frame, 1)
    sum_ = Frame(manifest)
    into = Accumulator(sum_.floats, sum_.counters, sum_.buffer, updates=1)
    store.write_blob(store.keys.payload("float32", 1), frame.buffer)
    store.write_blob(store.keys.payload("encoded", 1), wire)

    def merge(codec: Codec, wire: BlobBuffer) -> None:
        accumulate(into, Contribution(codec.decode(wire), 1, 0), 0.5)

    def receive(codec: Codec, nbytes: int, job: str) -> None:
        received = np.empty(nbytes, np.uint8)
        store.read_payload(job, 1, "", received)
        delta = codec.decode(received)
        admit_delta(delta, sum_)
        accumulate(into, Contribution(delta, 1, 0), 0.5)

    plain = Codec(manifest)
    encoding, merging, ratios, receiving = [], [], [], []
    for _ in range(turns):
        merging.append(_seconds(lambda: merge(codec, wire)))
        ratios.append(merging[-1] / _seconds(lambda: merge(plain, frame.buffer)))
        encoding.append(_seconds(lambda: codec.encode(frame, 1)))
        whole = _seconds(lambda: receive(plain, manifest.nbytes, "float32"), time.perf_counter)
        receiving.append(_seconds(lambda: receive(codec, wire.nbytes, "encoded"), time.perf_counter) / whole)
    per_parameter = 1e9 / parameters
    return {
        "compression": compression,
        "parameters": parameters,
        "share": wire.nbytes / manifest.nbytes,
        "encode_ns": statistics.median(encoding) * per_parameter,
        "merge_ns": statistics.median(merging) * per_parameter,
        "ratio": statistics.median(ratios),
        "from_redis": statistics.median(receiving),
    }


def _seconds(work: Callable[[], object], clock: Callable[[], float] = time.thread_time) -> float:
    start = clock()
    work()
    return clock() - start


def name_of(compression: dict[str, Any], direction: str) -> str:
    name = str(compression.get(direction, "float32"))
    if direction == "uplink" and "topk_ratio" in compression:
        name += f" {compression['topk_ratio'] * 100:g} %"
    return name + (" + zstd" if compression.get(f"{direction}_lossless") == "zstd" else "")


def digits_table(rows: list[dict[str, Any]], timed: list[dict[str, Any]]) -> str:
    lines = [
        "| uplink | downlink | bytes up | down | both | encode, ns | merge, ns | accuracy | points lost |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    speeds = {name_of(row["compression"], "uplink"): f"{row['encode_ns']:.2f} | {row['merge_ns']:.2f}" for row in timed}
    best = statistics.mean(rows[0]["accuracy"])
    for row in rows:
        mean, up = statistics.mean(row["accuracy"]), name_of(row["compression"], "uplink")
        spread = f"{mean * 100:.2f} % ({min(row['accuracy']) * 100:.1f} to {max(row['accuracy']) * 100:.1f})"
        lines.append(
            f"| {up} | {name_of(row['compression'], 'downlink')} | {row['uplink'] * 100:.1f} % "
            f"| {row['downlink'] * 100:.1f} % | {row['both'] * 100:.1f} % | {speeds.get(up, '– | –')} "
            f"| {spread} | {(best - mean) * 100:+.2f} |"
        )
    return "\n".join(lines)


def speed_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| encoding | bytes | encode, ns | merge, ns | merge / float32 | from Redis / float32 |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name_of(row['compression'], 'up')} | {row['share'] * 100:.1f} % | {row['encode_ns']:.2f} "
        f"| {row['merge_ns']:.2f} | {row['ratio']:.2f} | {row['from_redis']:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, few updates, short vectors, as a smoke test")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=400)
    parser.add_argument("--parameters", type=int, default=25_000_000, help="length of the vectors that are timed")
    parser.add_argument("--turns", type=int, default=15, help="measurements of each speed")
    parser.add_argument("--only", choices=["digits", "speed"], help="measure only this part")
    parser.add_argument("--json", type=Path, help="write the rows there")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.updates, options.parameters, options.turns = 1, 16, 100_000, 1
    torch.set_num_threads(1)
    rows, timed = [], []
    if options.only != "digits":
        with tempfile.TemporaryDirectory() as folder:
            server = EmbeddedServer(Path(folder) / "redis")
            try:
                store = CoordinatorStore(connect(server.url), "speed", "benchmark")
                timed = [speed(row, options.parameters, options.turns, store) for row in TIMED]
            finally:
                server.stop()
        print(speed_table(timed))
    if options.only != "speed":
        for row in ROWS[:1] + ROWS[5:6] if options.quick else ROWS:
            rows.append(digits(row, options.seeds, options.updates))
            print(digits_table(rows, timed).splitlines()[-1], flush=True)
        print(digits_table(rows, timed))
    if options.json:
        options.json.write_text(json.dumps({"digits": rows, "speed": timed}, indent=2) + "\n")


if __name__ == "__main__":
    main()

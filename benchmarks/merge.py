"""Measures one update's merge by encoding: parameters per second relative to the machine's triad and to float32.

    python benchmarks/merge.py [--quick] [--repeats 5] [--json FILE]

Triad is `torch.add(a, b, out=c)` over float32 arrays larger than the cache: 12 bytes move for each element. A merge
adds a decoded, weighted update to the accumulator; for float32 this moves the same number of bytes. Everything runs in
one thread, the coordinator's default; triad, float32 and the encoding take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from live_federation import spread

from fedqueue.config.compression import CompressionConfig
from fedqueue.staleness import constant
from fedqueue.tensors.blobs import BlobBuffer
from fedqueue.tensors.codec import Codec, uplink_codec
from fedqueue.tensors.frame import Frame
from fedqueue.tensors.manifest import PARAMETER, Manifest, TensorSpec
from fedqueue_coordinator.algorithms.aggregator import Contribution
from fedqueue_coordinator.algorithms.fedbuff import fedbuff

ENCODINGS = ("float32", "float16", "bfloat16", "int8", "topk", "randomk")
LENGTH = 25_000_000  # 100 MB as float32


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(name: str, length: int, repeats: int) -> dict[str, Any]:
    manifest = Manifest((TensorSpec("w", "float32", (length,), 0, length, PARAMETER),))
    frame = Frame(manifest)
    torch.manual_seed(0)
    frame.parameters.normal_()
    codec = uplink_codec(CompressionConfig(uplink=name, topk_ratio=0.01), manifest)
    wire, plain = codec.encode(frame, 1), Codec(manifest)
    aggregator = fedbuff(2, constant())
    accumulator = aggregator.init(manifest)
    a, b, c = (torch.rand(length) for _ in range(3))

    def merge(codec: Codec, wire: BlobBuffer) -> None:
        accumulator.updates = 1  # so that the update is not the first of its buffer, and is added
        aggregator.add(accumulator, Contribution(codec.decode(wire), 1, 0), frame)

    merge(codec, wire)
    torch.add(a, b, out=c)
    over_triad, over_float32, rates = [], [], []
    for _ in range(repeats):
        triad = statistics.median(seconds(lambda: torch.add(a, b, out=c)) for _ in range(5))
        merged = statistics.median(seconds(lambda: merge(codec, wire)) for _ in range(5))
        float32 = statistics.median(seconds(lambda: merge(plain, frame.buffer)) for _ in range(5))
        over_triad.append(triad / merged)
        over_float32.append(float32 / merged)
        rates.append(length / merged / 1e6)
    return {
        "encoding": name,
        "megabytes": wire.nbytes / 1e6,
        "per_second": rates,
        "over_triad": over_triad,
        "over_float32": over_float32,
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| update | MB | million parameters/s | / triad | / float32 |", "|---|---|---|---|---|"]
    for row in rows:
        name = f"{row['encoding']}{', 1 %' if row['encoding'] in ('topk', 'randomk') else ''}"
        figures = spread(row["per_second"], 0), spread(row["over_triad"]), spread(row["over_float32"])
        lines.append(f"| {name} | {row['megabytes']:.3g} | {' | '.join(figures)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, once, as a smoke test")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the rows there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    length, repeats = (100_000, 1) if options.quick else (LENGTH, options.repeats)
    rows = [measure(name, length, repeats) for name in ENCODINGS]
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()

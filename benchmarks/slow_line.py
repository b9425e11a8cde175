"""Measures a site on a slow line: seconds to deliver an update, by bandwidth and encoding.

    python benchmarks/slow_line.py [--quick] [--megabytes 100] [--mbits 2,10,50] [--breaks 5,15,20] [--json FILE]
    python benchmarks/slow_line.py --mbits 2 --fast 3 --rates 60

Real processes: a server, a coordinator, a worker behind a proxy with that bandwidth, and fast workers beside it.
An update is delivered when its version is committed; the seconds begin with the claim of the job, so they contain the
download, the training (none), and the upload. With --breaks, the line breaks three times on the way, for the given
seconds. With --rates, the rate of fast sites is compared with that of the same sites without the slow one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import redis
from slow_link import Break, SlowLink

from fedqueue.errors import RunNotFound
from fedqueue.transport.connection import connect
from fedqueue.transport.store import Store
from fedqueue_coordinator.operator import child_processes
from fedqueue_coordinator.operator.access.enrolment import enroll_missing
from fedqueue_coordinator.operator.embedded_server import EmbeddedServer

SLOW = "slow"
LATENCY = 0.03  # seconds one way
ENCODINGS = {
    "none": [],
    "int8": ["compression.uplink=int8", "compression.downlink=bfloat16"],
    "topk": ["compression.uplink=topk", "compression.topk_ratio=0.01", "compression.downlink=bfloat16"],
}
CONFIG = """
name = "slow-line"
[task]
entrypoint = "{task}:InstantTask"
options = {{nbytes = {nbytes}, seconds = {training}}}
[clients]
names = {ids}
min_available = {count}
[aggregation]
strategy = "fedasync"
mixing = "delta"
[evaluation]
every_versions = "off"
[checkpoint]
every_seconds = "off"
[stop]
versions = 1000000000
"""


@contextlib.contextmanager
def federation(
    nbytes: int,
    line: tuple[float, Sequence[Break]] | None,
    settings: Sequence[str],
    fast: int,
    training: dict[str, float],
) -> Iterator[tuple[Store, SlowLink | None, Path]]:
    """Start a federation of `fast` sites, and of one behind a `line` of bytes/s and breaks; yields store, line, logs.

    `training` is client → seconds of its training.
    """
    ids = [f"fast-{i}" for i in range(fast)] + ([SLOW] if line else [])
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        server = EmbeddedServer(folder / "redis")
        stack.callback(server.stop)
        store = Store(connect(server.url), "slow-line")
        store.redis.config_set("appendonly", "no")  # the disk is not what is measured
        link = None
        if line:
            link = SlowLink(server.url.removeprefix("unix://"), line[0], LATENCY, line[1])
            stack.callback(link.stop)
        config = folder / "federation.toml"
        task = Path(__file__).parent / "instant_task.py"
        config.write_text(CONFIG.format(task=task, nbytes=nbytes, training=0.0, ids=json.dumps(ids), count=len(ids)))
        enroll_missing(folder / "keys", ids, site=folder / "keys")

        def start(module: str, url: str, *arguments: str, options: Sequence[str] = ()) -> None:
            sets = [word for setting in [*settings, *options] for word in ("--set", setting)]
            environment = {
                "FEDQUEUE_REDIS__URL": url,
                "FEDQUEUE_SECURITY__KEYS": str(folder / "keys"),
                "FEDQUEUE_SECURITY__EGRESS_LOG": str(folder / "egress"),
            }
            log = folder / f"{module}-{arguments[-1].rpartition('/')[2]}.log"
            process = child_processes.start([sys.executable, "-m", module, *arguments, *sets], log, environment)
            stack.callback(child_processes.stop, [process])

        start("fedqueue_coordinator", server.url, "coordinator", str(config), "--output", str(folder / "out"))
        for client in ids:
            url = link.url if link and client == SLOW else server.url
            seconds = f"task.options={{nbytes={nbytes}, seconds={training.get(client, 0.0)}}}"
            start("fedqueue_worker", url, str(config), "--client", client, options=[seconds])
        yield store, link, folder


def merged(store: Store, client: str = "") -> list[dict[str, Any]]:
    """Return the merged updates so far, of one client or of all."""
    with contextlib.suppress(redis.RedisError, RunNotFound):
        lines = [line for record in store.ledger() if record["kind"] == "version" for line in record["merged"]]
        return [line for line in lines if not client or line["client"] == client]
    return []


def attempt(store: Store, client: str) -> dict[bytes, bytes]:
    """Return the record of the client's open job, empty before the claim."""
    with contextlib.suppress(redis.RedisError):
        job = store.redis.hget(store.keys.site(client), "job")
        record: dict[bytes, bytes] = store.redis.hgetall(store.keys.attempt(job.decode())) if job else {}  # type: ignore[union-attr,assignment]
        return record if record.get(b"base", b"-1") != b"-1" else {}
    return {}


def deliver(
    nbytes: int, mbits: float, settings: Sequence[str], fast: int, breaks: Sequence[Break], training: float
) -> dict[str, Any]:
    """Measure the slow site's first update."""
    speeds = {f"fast-{i}": training for i in range(fast)}
    with federation(nbytes, (mbits * 125_000, breaks), settings, fast, speeds) as (store, link, folder):
        assert link
        limit = time.monotonic() + 120 + 40 * nbytes / (mbits * 125_000) + sum(b.seconds for b in breaks)
        began: float | None = None
        fetched: float | None = None
        while not (delivered := merged(store, SLOW)):
            record = attempt(store, SLOW)
            if began is None and record:
                began, before = time.monotonic(), dict(link.moved)
            if fetched is None and record.get(b"pinned") is None and began is not None and record:
                fetched = time.monotonic()
            if time.monotonic() > limit:
                logs = "\n".join(log.read_text()[-3000:] for log in folder.glob("*.log"))
                raise AssertionError(f"nothing delivered in time:\n{logs}")
            time.sleep(0.05)
        ended = time.monotonic()
        assert began is not None
        lapsed = [r for r in store.ledger() if r["kind"] == "abandoned" and r["client"] == SLOW]
        others = [
            line
            for line in merged(store)
            if line["client"] != SLOW and line["at"] > delivered[0]["at"] - (ended - began)
        ]
        return {
            "megabytes": nbytes / 1e6,
            "mbits": mbits,
            "seconds": round(ended - began, 1),
            "download_seconds": round(fetched - began, 1) if fetched else None,
            "down_bytes": link.moved["down"] - before["down"],
            "up_bytes": link.moved["up"] - before["up"],
            "breaks": len(breaks) and link.broken,
            "attempt": delivered[0]["attempt"],
            "staleness": delivered[0]["staleness"],
            "lapsed": [r["error"] for r in lapsed],
            "fast_rate": round(len(others) / (ended - began), 3) if fast else None,
        }


def fast_rate(nbytes: int, fast: int, seconds: float, training: float, mbits: float | None) -> float:
    """Return the fast sites' updates per second, beside a slow site if `mbits` is given."""
    line = None if mbits is None else (mbits * 125_000, ())
    with federation(nbytes, line, [], fast, {f"fast-{i}": training for i in range(fast)}) as (store, _, _):
        while len(merged(store)) < 2 * fast:
            time.sleep(0.1)
        before, start = len(merged(store)), time.monotonic()
        time.sleep(seconds)
        updates = [line for line in merged(store)[before:] if line["client"] != SLOW]
        return len(updates) / (time.monotonic() - start)


def three_breaks(nbytes: int, seconds: Sequence[float]) -> list[Break]:
    """The line breaks in the middle of the download, and twice in the upload."""
    first, second, third = seconds
    return [
        Break("down", round(0.5 * nbytes), first),
        Break("up", round(0.3 * nbytes), second),
        Break("up", round(0.7 * nbytes), third),
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Bandwidth against seconds to deliver, for each encoding."""
    encodings = list(dict.fromkeys(row["encoding"] for row in rows))
    lines = [
        "| line, Mbit/s | " + " | ".join(f"{encoding}, s" for encoding in encodings) + " |",
        "|---" * (len(encodings) + 1) + "|",
    ]
    for mbits in dict.fromkeys(row["mbits"] for row in rows):
        found = {row["encoding"]: row["seconds"] for row in rows if row["mbits"] == mbits}
        lines.append(f"| {mbits:g} | " + " | ".join(str(found.get(e, "")) for e in encodings) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="6 MB at 3.2 Mbit/s with short breaks, lease and stall")
    parser.add_argument("--megabytes", type=float, default=10.0, help="size of the model, float32")
    parser.add_argument("--mbits", default="2,10,50", help="bandwidths of the line, by commas")
    parser.add_argument("--encodings", default=",".join(ENCODINGS), help="by commas")
    parser.add_argument("--breaks", help="seconds of three breaks, by commas: in the download, and twice in the upload")
    parser.add_argument("--fast", type=int, default=0, help="fast sites beside the slow one")
    parser.add_argument("--training", type=float, default=5.0, help="seconds of a fast site's training")
    parser.add_argument("--rates", type=float, help="only compare the fast sites' rate, for that many seconds each")
    parser.add_argument("--set", action="append", default=[], help="a setting of the federation")
    parser.add_argument("--json", type=Path, help="write the rows there")
    options = parser.parse_args()
    if options.quick:
        options.megabytes, options.mbits, options.encodings, options.breaks = 6.0, "3.2", "none", "1,3,3"
        options.set += ["dispatch.lease_seconds=2", "dispatch.stall_seconds=14"]
    nbytes, speeds = round(options.megabytes * 1e6), [float(word) for word in options.mbits.split(",")]
    pauses = [float(word) for word in options.breaks.split(",")] if options.breaks else []
    result: dict[str, Any] = {"rows": []}
    for mbits in speeds if not options.rates else []:
        for encoding in options.encodings.split(","):
            breaks = three_breaks(nbytes, pauses) if pauses else []
            settings = [*ENCODINGS[encoding], *options.set]
            row = deliver(nbytes, mbits, settings, options.fast, breaks, options.training)
            result["rows"].append({"encoding": encoding, **row})
            print(json.dumps(result["rows"][-1]), flush=True)
    if options.rates:
        for name, line in (("without", None), ("with", speeds[0])):
            result[name] = fast_rate(nbytes, options.fast, options.rates, options.training, line)
            print(f"fast sites {name} the slow one: {result[name]:.3f} updates/s", flush=True)
    else:
        print(table(result["rows"]))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

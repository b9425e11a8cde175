"""Measures how the cost of an update grows with workers, registered clients and versions, and memory over a long run.

    python benchmarks/scale.py [--quick] [--parts NAME,NAME,...] [--json FILE] [--picture FILE]

Models of 1 KB, instant training, FedAsync, unsigned (ten thousand clients have no keys here). CPU time of the
coordinator for each update is more exact than updates per second, since the workers run on the same cores.

- workers: 2 to 64 processes, forked from one, each with one client.
- clients: 100 to 10,000 clients that have registered and left, beside four that train.
- idle: 100 to 100,000 clients that are alive and wait for a job, beside four that train. The coordinator looks at their
  leases as it does at those of clients with workers, but nothing renews these: they last an hour. Also the updates
  while all of them join at once, and the seconds in which a standby takes over.
- simulated: as many clients in a simulation with 16 jobs at a time and a model of 100 KB. Any client may get a job.
- status: `fedqueue status` of a run with 1,000 and 200,000 ledger records.
- versions: a run of 10,000 versions and more; each point is the mean of a thousand.
- soak: memory of coordinator and server over ten minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from instant_task import InstantTask
from live_federation import QUICK_SECONDS, LiveFederation, cpu_seconds, live_federation, resident_bytes

from fedqueue.config.schema import Config
from fedqueue.protocol.messages import Registration
from fedqueue.protocol.msgpack import pack_record
from fedqueue.transport.lua_scripts import script_digest
from fedqueue.transport.store import Store
from fedqueue.transport.worker_store import WorkerStore
from fedqueue_coordinator.core.federation import Federation
from fedqueue_coordinator.operator.runs import show_status
from fedqueue_coordinator.simulation.virtual_clock import ClientDatasets, Simulation, TimingModel

BYTES = 1_000
SETTINGS = ["aggregation.strategy=fedasync", "aggregation.mixing=delta", "security.signatures=off"]
WORKERS = (2, 4, 8, 16, 32, 64)
CLIENTS = (100, 1_000, 10_000)
IDLE = (100, 1_000, 10_000, 100_000)
LEAD_SECONDS = 2.0  # of the leader's lease
AT_ONCE = 1_000  # clients of the crowd in one round trip
ENTRIES = "local n = 0; for _, key in ipairs(KEYS) do n = n + redis.call('XLEN', key) end; return n"
RECORDS = (1_000, 200_000)
SIMULATED_UPDATES, SIMULATED_BYTES = 5_000, 100_000
VERSIONS = 12_000
SOAK_SECONDS, EVERY_SECONDS = 600.0, 10.0
Row = dict[str, Any]
Start = Callable[[int], AbstractContextManager[LiveFederation]]
"""Starts a federation with this number of workers."""


def start_federation(workers: int, settings: Sequence[str] = ()) -> AbstractContextManager[LiveFederation]:
    return live_federation(BYTES, workers, [*SETTINGS, *settings], forked=True)


def of(running: LiveFederation, seconds: float) -> Row:
    figures = running.measure(seconds)
    per_update = 1e3 / figures.updates
    return {
        "per_second": figures.per_second,
        "coordinator_ms": figures.coordinator_cpu * per_update,
        "server_ms": figures.server_cpu * per_update,
    }


def workers(start: Start, numbers: list[int], seconds: float) -> list[Row]:
    found = []
    for number in numbers:
        with start(number) as running:
            found.append({"workers": number, **of(running, seconds)})
            print(found[-1], flush=True)
    return found


def clients(start: Start, numbers: list[int], seconds: float) -> list[Row]:
    found = []
    for number in numbers:
        with start(4) as running:
            for i in range(number):
                site = WorkerStore(running.store.redis, running.store.run, f"gone-{i}")
                site.join([f"gone-{i}"], 0.001)
                site.register(Registration(client=f"gone-{i}", examples=1))
                site.leave([f"gone-{i}"])
            time.sleep(3.0 if number >= 100 else 1.0)  # until the coordinator has read all of their entries
            found.append({"clients": number, **of(running, seconds)})
            print(found[-1], flush=True)
    return found


def simulated(numbers: list[int], updates: int) -> list[Row]:
    found = []
    for number in numbers:
        config = Config(
            task={"entrypoint": "instant_task.py:InstantTask"},
            clients={"count": number},
            aggregation={"strategy": "fedasync", "mixing": "delta"},
            dispatch={"concurrency": 16},
            evaluation={"every_versions": "off"},
            stop={"updates": updates},
        )
        marks: list[tuple[int, float]] = []

        def mark(federation: Federation, now: float, marks: list[tuple[int, float]] = marks) -> None:
            merged = federation.run_counters.updates
            if not marks or merged >= marks[-1][0] + updates // 20:
                marks.append((merged, time.process_time()))

        began = time.process_time()
        Simulation(config, ClientDatasets(InstantTask(SIMULATED_BYTES)), TimingModel(), mark).run()
        pieces = [(later[1] - at[1]) / (later[0] - at[0]) for at, later in itertools.pairwise(marks)]
        start = marks[0][1] - began
        found.append({"clients": number, "start_seconds": start, "update_ms": 1e3 * statistics.median(pieces)})
        print(found[-1], flush=True)
    return found


def idle(numbers: list[int], seconds: float) -> list[Row]:
    found = []
    for number in numbers:
        settings = ["dispatch.selection=examples", f"dispatch.leader_lease_seconds={LEAD_SECONDS}"]
        with start_federation(4, settings) as running:
            crowd = Crowd(running.store, number)
            burst = of_burst(running, crowd, seconds / 2)
            found.append({"clients": number, **burst, **of(running, seconds), "takeover_seconds": of_takeover(running)})
            print(found[-1], flush=True)
    return found


def of_takeover(running: LiveFederation) -> float:
    """Kill the coordinator; return the seconds until a standby merges, of which it waits for the lease."""
    running.start_standby()
    os.kill(running.coordinator, signal.SIGKILL)
    began = time.monotonic()
    time.sleep(LEAD_SECONDS / 4)  # until a commit that was on its way is in Redis
    merged = running.merged()
    while running.merged() == merged:
        time.sleep(0.01)
    return time.monotonic() - began


def of_burst(running: LiveFederation, crowd: Crowd, seconds: float) -> Row:
    """Let the whole crowd join again and again for `seconds`, or once if that takes longer."""
    began, merged, bursts = time.monotonic(), running.merged(), 0
    while time.monotonic() < began + seconds:
        crowd.join()
        crowd.wait_until_taken()
        bursts += 1
    took = time.monotonic() - began
    return {
        "joins_per_second": bursts * len(crowd.clients) / took,
        "per_second_while_joining": (running.merged() - merged) / took,
    }


class Crowd:
    """Clients without examples, which get no job by `dispatch.selection = "examples"`, with leases of an hour."""

    def __init__(self, store: Store, number: int) -> None:
        self.clients = [f"idle-{i}" for i in range(number)]
        self._store = store
        store.load_scripts()

    def join(self) -> None:
        """Register every client, in few round trips, because a client that waits for each would be slower."""
        keys = self._store.keys
        join, register = script_digest("join"), script_digest("register")
        for some in self._slices():
            pipe = self._store.redis.pipeline(transaction=False)
            for client in some:
                body = Registration(client=client, examples=0).pack()
                pipe.evalsha(join, 1, keys.clients, "crowd", 3_600_000, keys.site_prefix, client)
                streams = keys.site(client), keys.updates(client)
                pipe.evalsha(register, 2, *streams, "crowd", body, keys.wakeup)
            pipe.execute()

    def wait_until_taken(self) -> None:
        """Wait until the coordinator has acknowledged every entry of every client.

        It takes them in their order, so the last ones are awaited first: to ask for all streams again and again would
        keep the server from its work.
        """
        for some in reversed(list(self._slices())):
            while self._store.redis.eval(ENTRIES, len(some), *map(self._store.keys.updates, some)):
                time.sleep(0.01)

    def _slices(self) -> Iterator[list[str]]:
        for first in range(0, len(self.clients), AT_ONCE):
            yield self.clients[first : first + AT_ONCE]


def status(start: Start, numbers: list[int]) -> list[Row]:
    found = []
    for number in numbers:
        with start(2) as running:
            pipe = running.store.redis.pipeline(transaction=False)
            record = pack_record({"kind": "abandoned", "client": "client-0", "reason": "failed", "error": "x" * 100})
            for _ in range(number):
                pipe.xadd(running.store.keys.ledger, {"record": record})
            pipe.execute()
            times = []
            for _ in range(5):
                began = time.perf_counter()
                with contextlib.redirect_stdout(io.StringIO()):
                    show_status(running.server.url, "bench", as_json=True)
                times.append(time.perf_counter() - began)
            found.append({"records": number, "milliseconds": 1e3 * min(times)})
            print(found[-1], flush=True)
    return found


def versions(start: Start, number: int, step: int) -> list[Row]:
    found: list[Row] = []
    with start(4) as running:
        while not found or found[-1]["version"] < number:
            figures = running.measure(0.0, step)
            cpu = 1e3 * figures.coordinator_cpu / figures.updates
            found.append(
                {
                    "version": running.store.info().version,
                    "per_second": figures.per_second,
                    "coordinator_ms": cpu,
                    "coordinator_bytes": resident_bytes(running.coordinator),
                    "server_bytes": resident_bytes(running.server.process.pid),
                }
            )
            print(found[-1], flush=True)
    return found


def soak(start: Start, seconds: float, every: float) -> list[Row]:
    found: list[Row] = []
    with start(4) as running:
        began = time.monotonic()
        while time.monotonic() < began + seconds:
            time.sleep(every)
            found.append(
                {
                    "seconds": time.monotonic() - began,
                    "version": running.store.info().version,
                    "coordinator_bytes": resident_bytes(running.coordinator),
                    "worker_bytes": max(map(resident_bytes, running.workers)),
                    "server_bytes": resident_bytes(running.server.process.pid),
                    "cpu": cpu_seconds(running.coordinator),
                }
            )
        print(found[-1], flush=True)
    return found


def table(record: dict[str, list[Row]]) -> str:
    lines: list[str] = []
    for part, key in (("workers", "workers"), ("clients", "clients"), ("idle", "clients"), ("versions", "version")):
        if rows := record.get(part):
            lines += [f"| {part} | updates/s | coordinator, ms of CPU an update |", "|---|---|---|"]
            lines += [f"| {row[key]} | {row['per_second']:.0f} | {row['coordinator_ms']:.2f} |" for row in rows]
            lines.append("")
    if rows := record.get("idle"):
        lines += ["| clients | joins/s | updates/s while they join | takeover, s |", "|---|---|---|---|"]
        lines += [
            f"| {row['clients']} | {row['joins_per_second']:.0f} | {row['per_second_while_joining']:.0f} | "
            f"{row['takeover_seconds']:.1f} |"
            for row in rows
        ]
        lines.append("")
    if rows := record.get("simulated"):
        lines += ["| clients | start, s of CPU | simulated update, ms of CPU |", "|---|---|---|"]
        lines += [f"| {row['clients']} | {row['start_seconds']:.2f} | {row['update_ms']:.2f} |" for row in rows]
        lines.append("")
    if rows := record.get("status"):
        lines += ["| ledger records | status, ms |", "|---|---|"]
        lines += [f"| {row['records']} | {row['milliseconds']:.1f} |" for row in rows]
        lines.append("")
    if rows := record.get("soak"):
        half = rows[len(rows) // 2 :]
        for who in ("coordinator", "worker", "server"):
            sizes = [row[f"{who}_bytes"] / 1e6 for row in half]
            lines.append(
                f"- {who}: {sizes[0]:.1f} MB at half time, {sizes[-1]:.1f} at the end, "
                f"{100 * (max(sizes) / min(sizes) - 1):.1f} % between least and most"
            )
    return "\n".join(lines)


def draw(record: dict[str, list[Row]], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for axis, (part, key, label) in zip(
        axes.flat,
        (
            ("workers", "workers", "workers"),
            ("clients", "clients", "registered clients"),
            ("versions", "version", "version"),
        ),
        strict=False,
    ):
        rows = record.get(part, [])
        axis.plot([r[key] for r in rows], [r["coordinator_ms"] for r in rows], "o-")
        most = max((r["coordinator_ms"] for r in rows), default=1.0)
        axis.set(xlabel=label, ylabel="coordinator, ms of CPU an update", ylim=(0, 1.2 * most))
        if part != "versions":
            axis.set_xscale("log")
            axis.set_xticks([r[key] for r in rows], [f"{r[key]:,}" for r in rows])
            axis.minorticks_off()
    last, rows = axes.flat[3], record.get("soak", [])
    for who in ("coordinator", "server"):
        last.plot([r["seconds"] for r in rows], [r[f"{who}_bytes"] / 1e6 for r in rows], label=who)
    last.set(xlabel="seconds", ylabel="resident, MB", ylim=(0, None))
    if rows:
        last.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two workers, ten clients, as a smoke test")
    parser.add_argument("--parts", default="workers,clients,idle,simulated,status,versions,soak")
    parser.add_argument("--seconds", type=float, default=8.0, help="duration of each measurement")
    parser.add_argument("--json", type=Path, help="write the rows there; those of parts that are not measured stay")
    parser.add_argument("--picture", type=Path, help="draw the rows there")
    options = parser.parse_args()
    quick = options.quick
    seconds = QUICK_SECONDS if quick else options.seconds
    record = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    with contextlib.ExitStack() as stack:
        if quick:  # one small federation for most parts is up sooner than five
            running = stack.enter_context(start_federation(2))

            def start(workers: int) -> AbstractContextManager[LiveFederation]:
                return contextlib.nullcontext(running)

        else:
            start = start_federation
        measures = {
            "workers": lambda: workers(start, [2] if quick else list(WORKERS), seconds),
            "clients": lambda: clients(start, [10] if quick else list(CLIENTS), seconds),
            "idle": lambda: idle([10] if quick else list(IDLE), seconds),
            "simulated": lambda: simulated([10] if quick else list(IDLE), 40 if quick else SIMULATED_UPDATES),
            "status": lambda: status(start, [10] if quick else list(RECORDS)),
            "versions": lambda: versions(start, 40 if quick else VERSIONS, 20 if quick else 1000),
            "soak": lambda: soak(start, 1.0, 0.25) if quick else soak(start, SOAK_SECONDS, EVERY_SECONDS),
        }
        for part in options.parts.split(","):
            record[part] = measures[part]()
    print(table(record))
    if options.json:
        options.json.write_text(json.dumps(record, indent=2) + "\n")
    if options.picture:
        draw(record, options.picture)


if __name__ == "__main__":
    main()

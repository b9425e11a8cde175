"""Measures how long a user waits for the first merged update of `fedqueue run`, and for commands that only print.

    python benchmarks/startup.py [--quick] [--repeats 5] [--json FILE]

Each command is a new process, as a user starts it. CPU time is summed over all its processes, and is more exact than
wall-clock time on a busy machine. The first update counts as merged when the run's counters in Redis include it.
Memory is the proportional share (PSS) of all processes of the run at that moment: pages that forked workers share count
once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgpack
import redis
from live_federation import cpu_seconds, proportional_bytes, spread

from fedqueue.protocol.keys import Keys
from fedqueue.transport.connection import connect

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "examples" / "digits" / "federation.toml"
COMMANDS = (["--help"], ["list"], ["status", "--run", "digits"])
LIMIT_SECONDS = 120.0
MIB = 1024 * 1024


def first_update(workers: int, config: Path) -> dict[str, float]:
    """Return the seconds from the start of `fedqueue run` to the first merged update, and the MiB (PSS) then."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "out"
        command = [sys.executable, "-m", "fedqueue_coordinator", "run", str(config), "--workers", str(workers)]
        start = time.monotonic()
        process = subprocess.Popen(
            [*command, "--output", str(folder), "--quiet"], cwd=name, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            while not merged(folder):
                assert process.poll() is None, "the run has ended without an update"
                assert time.monotonic() < start + LIMIT_SECONDS, "no update in time"
                time.sleep(0.01)
            seconds = time.monotonic() - start
            pids = below(process.pid)
            cpu = sum(cpu_seconds(pid) for pid in [process.pid, *pids])
            sizes = {pid: proportional_bytes(pid) / MIB for pid in [process.pid, *pids]}
            forked = [pid for pid in pids if len(below(pid)) == 0 and b"fedqueue_worker" in cmdline(pid)]
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()
    return {
        "seconds": seconds,
        "cpu": cpu,
        "workers": len(forked),
        "worker_mib": sum(sizes[pid] for pid in forked) / max(1, len(forked)),
        "all_mib": sum(sizes.values()),
    }


def merged(folder: Path) -> int:
    """Return the number of merged updates so far of the run with its results in `folder`."""
    with contextlib.suppress(OSError, redis.RedisError):
        url = (folder / "redis.url").read_text()
        if url:
            client = connect(url, retries=0)
            totals: Any = client.hget(Keys("digits").head, "totals")
            client.close()
            return int(msgpack.unpackb(totals)["updates"]) if totals else 0
    return 0


def below(pid: int) -> list[int]:
    """Return the descendants of the process."""
    direct = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return direct + [further for child in direct for further in below(child)]


def cmdline(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def answer(arguments: list[str]) -> dict[str, float]:
    """Run the command; return wall-clock seconds and CPU seconds."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    command = [sys.executable, "-m", "fedqueue_coordinator", *arguments]
    done = subprocess.run(command, capture_output=True, cwd=tempfile.gettempdir(), check=False)
    seconds, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode in (0, 1), done.stderr.decode()
    return {"seconds": seconds, "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def table(record: dict[str, Any]) -> str:
    lines = ["| command | seconds | CPU seconds |", "|---|---|---|"]
    for row in record["run"]:
        what = f"`fedqueue run` to the first merged update, {row['workers']} workers"
        lines += [f"| {what} | {spread(row['seconds'])} | {spread(row['cpu'])} |"]
    for row in record["commands"]:
        lines += [f"| `fedqueue {row['command']}` | {spread(row['seconds'])} | {spread(row['cpu'])} |"]
    lines += ["", "| workers | MiB (PSS) of a worker | MiB (PSS) of all processes |", "|---|---|---|"]
    for row in record["run"]:
        lines += [f"| {row['workers']} | {spread(row['worker_mib'], 0)} | {spread(row['all_mib'], 0)} |"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="once, two workers, as a smoke test")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", default="4,8", help="numbers of workers, by commas")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    repeats, counts = (1, [2]) if options.quick else (options.repeats, [int(n) for n in options.workers.split(",")])
    record: dict[str, Any] = {"run": [], "commands": [], "load": os.getloadavg()[0]}
    for count in counts:
        figures = [first_update(count, CONFIG) for _ in range(repeats)]
        record["run"].append({"workers": count, **columns(figures, ("seconds", "cpu", "worker_mib", "all_mib"))})
    for arguments in COMMANDS:
        figures = [answer(arguments) for _ in range(repeats)]
        record["commands"].append({"command": arguments[0], **columns(figures, ("seconds", "cpu"))})
    print(table(record))
    if options.json:
        options.json.write_text(json.dumps(record, indent=2) + "\n")


def columns(figures: list[dict[str, float]], names: tuple[str, ...]) -> dict[str, list[float]]:
    return {name: [figure[name] for figure in figures] for name in names}


if __name__ == "__main__":
    main()

"""Where the page's runs come from: Redis, with the rights of the user `viewer`, and folders of results."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import redis

from fedqueue.errors import RunNotFound, StoreError
from fedqueue.transport.ledger_tail import LedgerReplaced, LedgerTail
from fedqueue.transport.store import Store, list_runs, number
from fedqueue_coordinator.core.run_summary import main_metric
from fedqueue_coordinator.operator.dashboard import verdict
from fedqueue_coordinator.operator.dashboard.run_view import RunView
from fedqueue_coordinator.operator.runs import finished_runs, read_ledger, read_summary

PHASES = ("fetching", "training", "sending")
EARLIEST = 0.5
"""Seconds between two looks at a run, however many pages show it."""
MOVING_SECONDS = 10.0
"""For so long after a version, what a run was said to wait for is not shown."""
SERVER_SECONDS = 5.0
"""Seconds between two searches for servers."""
LISTED = ("run", "where", "state", "level", "says", "version", "updates", "seconds", "strategy")
"""What the list of runs has of each run."""
AT_ONCE = 5000
"""Records of a ledger that one read takes."""


class LiveRun:
    """A run in Redis. `shown` may be called by several threads."""

    def __init__(self, client: redis.Redis, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = name
        self._store = Store(client, name)
        self._clock, self._lock = clock, threading.Lock()
        self._tail, self._view = LedgerTail(self._store), RunView()
        self._next, self._last = 0.0, {"error": "not read yet"}
        self._grown_at, self._moved_at = clock(), -math.inf

    def shown(self) -> dict[str, Any]:
        """Everything the page shows of the run; raises RunNotFound once Redis has it no more."""
        with self._lock:
            if self._clock() >= self._next:
                self._last = self._look()
                self._next = self._clock() + EARLIEST
            return self._last

    def _look(self) -> dict[str, Any]:
        before = self._view.version
        try:
            self._follow()
        except LedgerReplaced:
            self._tail, self._view = LedgerTail(self._store), RunView()
            self._follow()
        if self._view.version != before:
            self._grown_at = self._clock()
            if before:
                self._moved_at = self._clock()
        # What a run waits for is written with its lease: a version that came since says that the wait is over.
        moving = self._clock() - self._moved_at < MOVING_SECONDS
        info = self._store.info()
        config, running = info.config, info.state == "running"
        ledger = self._view.shown(_configured(config))
        sites = self._sites([site["name"] for site in ledger["clients"]]) if running else {}
        return shown_run(
            self.name, ledger, config, state=info.state, stopped_because=info.stopped_because, failed=info.failed,
            leader=info.leader, waiting=self._store.waiting() if running and not moving else "", sites=sites,
            quiet_seconds=self._clock() - self._grown_at, where="Redis", totals=info.totals,
        )  # fmt: skip

    def _follow(self) -> None:
        while records := self._tail.read(AT_ONCE):
            for record in records:
                self._view.add(record)
            if len(records) < AT_ONCE:
                return

    def _sites(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """What Redis says about each site, which its worker wrote: alive, and what its present job does."""
        keys, server = self._store.keys, self._store.redis
        seconds, micros = server.time()
        pipe = server.pipeline(transaction=False)
        for name in names:
            pipe.hmget(keys.site(name), "alive", "job")
        rows = pipe.execute()
        jobs = [job[:200].decode(errors="replace") if job else "" for _, job in rows]
        for job in filter(None, jobs):
            pipe.hmget(keys.attempt(job), "phase", "stalled", "posted")
        attempts = iter(pipe.execute())
        found = {}
        for name, (alive, _), job in zip(names, rows, jobs, strict=True):
            phase, stalled, posted = next(attempts) if job else (None, None, None)
            word = (phase or b"").decode(errors="replace")
            at_work = bool(job) and posted is None and word in PHASES
            found[name] = {
                "alive": number(alive) > seconds * 1000 + micros // 1000,
                "phase": word if at_work else "",
                "stalled": at_work and stalled == b"1",
            }
        return found


class FinishedRun:
    """A run's folder of results."""

    def __init__(self, folder: Path) -> None:
        self.name, self._folder = folder.name, folder
        self._stamp: tuple[float, float] | None = None
        self._last: dict[str, Any] = {}
        self._lock = threading.Lock()

    def shown(self) -> dict[str, Any]:
        """Everything the page shows of the run; raises StoreError for a damaged file."""
        with self._lock:
            stamp = tuple((self._folder / name).stat().st_mtime for name in ("summary.json", "ledger.jsonl"))
            if stamp != self._stamp:
                self._last = self._read()
                self._stamp = cast(tuple[float, float], stamp)
            return self._last

    def _read(self) -> dict[str, Any]:
        summary, view = read_summary(self._folder, "run"), RunView()
        for record in read_ledger(self._folder):
            view.add(record)
        silent = summary.get("clients_without_update", {})
        config = {
            "aggregation": {"strategy": summary.get("strategy")}, "stop": {"target": summary.get("target") or {}},
            "clients": {"ids": list(silent)},
        }  # fmt: skip
        shown = shown_run(
            summary["run"], view.shown(silent), config, state="ended",
            stopped_because=summary.get("stopped_because", ""), failed=not summary.get("complete", True), leader="",
            waiting="", sites={}, quiet_seconds=None, where=str(self._folder), totals={},
        )  # fmt: skip
        for site in shown["clients"]:
            if (why := silent.get(site["name"])) and not site["merged"]:
                site["level"], site["says"] = verdict.WRONG, why
        return {**shown, "privacy_sentence": summary.get("privacy", "")}


RunSource = LiveRun | FinishedRun


def shown_run(
    name: str, ledger: dict[str, Any], config: Mapping[str, Any], *, state: str, stopped_because: str, failed: bool,
    leader: str, waiting: str, sites: Mapping[str, Mapping[str, Any]], quiet_seconds: float | None, where: str,
    totals: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Put together what the page draws: the ledger's part, the state, and a verdict on the run and on each site."""
    running = state == "running"
    target = (config.get("stop") or {}).get("target") or {}
    metrics = list(ledger["metrics"])
    for site in ledger["clients"]:
        live = sites.get(site["name"]) if running else None
        level, says = verdict.of_site(site, live, running)
        site.update(level=level, says=says, alive=bool(live and live["alive"]), phase=(live or {}).get("phase", ""))
    versions = ledger["versions"]
    usual = (versions[-1][0] - versions[0][0]) / max(1, versions[-1][1] - versions[0][1]) if len(versions) > 1 else 0.0
    run = {
        **ledger,
        "run": name,
        "where": where,
        "state": state,
        "stopped_because": stopped_because,
        "failed": failed,
        "leader": leader,
        "waiting": waiting,
        "quiet_seconds": quiet_seconds if ledger["version"] else None,
        "usual_seconds": usual,
        "strategy": (config.get("aggregation") or {}).get("strategy"),
        "target": target,
        "main_metric": main_metric(metrics, target) if metrics else "",
        "alive": sum(site["alive"] for site in ledger["clients"]),
        "min_cohort": (config.get("secure") or {}).get("min_cohort"),
        "named_keepers": list((config.get("secure") or {}).get("keepers") or ()),
        "privacy_sentence": "",
        "seconds": max(ledger["seconds"], float(totals.get("seconds", 0.0))),
    }
    run["level"], run["says"] = verdict.of_run(run)
    del run["quiet_seconds"]  # it changes all the time, and each change is sent to every page
    return run


def _configured(config: Mapping[str, Any]) -> Iterator[str]:
    clients = config.get("clients") or {}
    if names := clients.get("names"):
        yield from map(str, names)
    elif isinstance(count := clients.get("count"), int):
        yield from (f"client-{i}" for i in range(count))


class RunSources:
    """All runs that the page can show: those named, or else all that are found."""

    def __init__(
        self, servers: Callable[[], Sequence[redis.Redis]], folders: Sequence[Path] = (), names: Sequence[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """`folders` of results and `names` of runs in Redis; without either, all of `servers()` and under runs/.

        `servers` is asked again from time to time: a local run brings a server of its own.
        """
        self._find_servers, self._folders, self._names = servers, list(folders), set(names)
        self._all = not folders and not names
        self._clock, self._servers, self._asked = clock, list[redis.Redis](), -math.inf
        self._known: dict[str, RunSource] = {}
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """The runs, those in Redis first."""
        with self._lock:
            if self._clock() >= self._asked + SERVER_SECONDS:
                self._servers, self._asked = list(self._find_servers()), self._clock()
            found: dict[str, RunSource] = {}
            for server in self._servers:
                try:
                    live = [name for name in list_runs(server) if self._all or name in self._names]
                except redis.RedisError:
                    continue
                for name in live:
                    known = self._known.get(name)
                    found[name] = known if isinstance(known, LiveRun) else LiveRun(server, name, self._clock)
            ended = {**{f.name: f for f in self._folders}, **(finished_runs() if self._all else {})}
            for name, folder in ended.items():
                if name not in found:
                    known = self._known.get(name)
                    found[name] = known if isinstance(known, FinishedRun) else FinishedRun(folder)
            self._known = found
            return list(found)

    def shown(self, name: str) -> dict[str, Any]:
        """One run; raises RunNotFound, and StoreError for damaged results."""
        source = self._known.get(name)
        if source is None:
            self.names()
            source = self._known.get(name)
        if source is None:
            raise RunNotFound(name)
        try:
            return source.shown()
        except RunNotFound:  # it expired, or was deleted: its folder may be there
            with self._lock:
                self._known.pop(name, None)
            raise
        except redis.ConnectionError:  # a local run takes its server with it when it ends: its results may be there
            with self._lock:
                self._asked = -math.inf
            self.names()
            other = self._known.get(name)
            if isinstance(other, FinishedRun):
                return other.shown()
            raise
        except OSError as error:
            raise StoreError(f"{name}: {error.strerror}") from None

    def listed(self) -> list[dict[str, Any]]:
        """A line for each run."""
        lines: list[dict[str, Any]] = []
        for name in self.names():
            try:
                run = self.shown(name)
            except (StoreError, RunNotFound, redis.RedisError) as error:
                lines.append({"run": name, "level": verdict.WRONG, "says": str(error), "state": "damaged"})
                continue
            main = run["main_metric"]
            line: dict[str, Any] = {key: run[key] for key in LISTED}
            line["metric"] = {main: run["newest_metrics"].get(main)} if main else {}
            lines.append({**line, "clients": len(run["clients"])})
        return lines

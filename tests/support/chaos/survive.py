"""Injects faults into a federation for a given time, audits it, and reports the faults that it survived."""

from __future__ import annotations

import itertools
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgpack
import redis

from fedqueue.errors import FedqueueError
from fedqueue_coordinator.operator.audit.audit import Check, audit, ok
from fedqueue_coordinator.operator.audit.audit_input import read_audit_input
from tests.support.chaos.arena import TARGET, Chaos, Lost
from tests.support.chaos.faults import FAULTS, KEEPER_FAULTS, NotNow
from tests.support.chaos.schedule import schedule
from tests.support.forked import warm_up

AUDIT_EVERY = 60.0  # seconds between audits of the running federation


@dataclass
class Report:
    seconds: float = 0.0
    survived: Counter[str] = field(default_factory=Counter)
    checks: dict[str, list[Check]] = field(default_factory=dict)
    merged: int = 0
    versions: int = 0
    doubled: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    refused: dict[str, int] = field(default_factory=dict)
    longest_gap: float = 0.0
    median_gap: float = 0.0
    accuracy: float = 0.0
    restarts: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return not self.problems and all(map(ok, self.checks.values())) and self.accuracy >= TARGET

    def lines(self) -> Iterator[str]:
        """The lines that `make chaos` prints."""
        yield f"{self.survived.total()} faults survived in {self.seconds:.0f} s:"
        yield from (f"  {count:4}  {name}" for name, count in sorted(self.survived.items()))
        yield f"updates merged    {self.merged}, in {self.versions} versions"
        yield f"updates lost      {self.lost.total()}  {dict(self.lost)}"
        yield f"updates rejected  {self.rejected.total()}  {dict(self.rejected)}"
        yield f"updates doubled   {self.doubled}"
        yield f"posts refused     {self.refused}"
        yield f"longest gap       {self.longest_gap:.2f} s between merges, a version every {self.median_gap:.2f} s"
        yield f"accuracy          {self.accuracy:.4f}, target {TARGET}"
        yield f"restarts          {self.restarts}"
        last = list(self.checks)[-1:]
        for when, checks in self.checks.items():
            for check in checks:
                if check.problems or when in last:
                    yield f"audit {when}: {check.name} {'FAILS' if check.problems else 'holds'}: {check.invariant}"
                yield from (f"      {problem}" for problem in check.problems[:5])
        yield f"audits            {len(self.checks)}, clean: {sum(map(ok, self.checks.values()))}"
        yield from (f"PROBLEM: {problem}" for problem in self.problems)
        yield "survived" if self.good else "NOT SURVIVED"


def survive(folder: Path, seconds: float, seed: int, names: list[str], keepers: Sequence[str] = ()) -> Report:
    """Inject faults into a new federation in `folder` for `seconds`, then end it; each commit after a fault counts."""
    warm_up()
    report = Report()
    began = time.monotonic()
    chaos = Chaos(folder, seed, keepers)
    try:
        chaos.wait(lambda: chaos.version() >= 2, "the first versions", 90)
        began = time.monotonic()
        next_audit = began + AUDIT_EVERY
        for together in schedule(names, chaos.rng):
            if time.monotonic() - began > seconds:
                break
            _harm(chaos, together, report)
            if time.monotonic() > next_audit:
                chaos.calm()
                _audit_running(chaos, report, f"at {time.monotonic() - began:.0f} s")
                next_audit = time.monotonic() + AUDIT_EVERY
        chaos.calm()
        report.seconds = time.monotonic() - began
        _audit_running(chaos, report, "running")
        _count(chaos, report)
        results = chaos.end()
        report.checks["in Redis"] = audit(chaos.audit_input())
        report.checks["results"] = audit(read_audit_input(str(results), ""))
        _count(chaos, report)
    except Lost as error:
        report.problems.append(str(error))
        report.seconds = time.monotonic() - began
        _audit_lost_run(chaos, report)
    finally:
        chaos.close()
    return report


def _harm(chaos: Chaos, together: tuple[str, ...], report: Report) -> None:
    done = []
    for name in together:
        for _ in range(100):
            try:
                {**FAULTS, **KEEPER_FAULTS}[name](chaos)
            except (NotNow, redis.RedisError):  # no leader or no server yet after the previous fault
                chaos.tick()
                continue
            except Lost:  # the armed point was not passed
                break
            done.append(name)
            break
    reached = chaos.version()
    if reached < 0:
        chaos.wait(lambda: chaos.version() >= 0, f"the server is back after {together}")
        reached = chaos.version()
    chaos.wait(lambda: chaos.version() > reached, f"a merge after {together}")
    report.survived.update(done)


def _audit_running(chaos: Chaos, report: Report, when: str) -> None:
    """Audit the running federation twice: live, as an operator would, and with all of its processes stopped."""
    report.checks[f"{when}, live"] = audit(chaos.audit_input())
    chaos.fleet.stop_all()
    try:
        report.checks[when] = audit(chaos.audit_input())
    finally:
        chaos.fleet.continue_all()


def _audit_lost_run(chaos: Chaos, report: Report) -> None:
    """Report the ledger and an audit of a run that did not recover."""
    chaos.fleet.kill()
    try:
        _count(chaos, report)
        report.checks["after the loss"] = audit(chaos.audit_input())
    except (FedqueueError, redis.RedisError) as error:
        report.problems.append(f"no audit after the loss: {error}")


def _count(chaos: Chaos, report: Report) -> None:
    entries = chaos.store.redis.xrange(chaos.store.keys.ledger)
    ledger = [(int(i.split(b"-")[0]), msgpack.unpackb(fields[b"record"])) for i, fields in entries]  # type: ignore
    commits = [at for at, record in ledger if record["kind"] == "version"]  # by the server's clock
    merged = Counter(line["job"] for _, r in ledger if r["kind"] == "version" for line in r["merged"])
    report.versions, report.merged = len(commits), merged.total()
    report.doubled = sum(count - 1 for count in merged.values())
    report.lost = Counter(r["reason"] for _, r in ledger if r["kind"] == "abandoned")
    report.rejected = Counter(r["reason"] for _, r in ledger if r["kind"] == "rejected")
    gaps = [(b - a) / 1000 for a, b in itertools.pairwise(commits)] or [0.0]
    report.longest_gap, report.median_gap = max(gaps), statistics.median(gaps)
    report.refused = chaos.store.refused()
    evaluations = [r["metrics"] for _, r in ledger if r["kind"] == "evaluation"]
    report.accuracy = evaluations[-1].get("accuracy", 0.0) if evaluations else 0.0
    report.restarts = {one.name: one.restarts for one in chaos.fleet.members}
    report.problems += [f"a duplicate post for job {job} was accepted" for job in chaos.accepted]

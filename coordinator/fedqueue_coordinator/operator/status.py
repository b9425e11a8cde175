"""`fedqueue status` and `fedqueue runs`: where a run stands, read without disturbing it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table

from fedqueue.errors import RunNotFound, StoreError
from fedqueue.transport.store import Store, list_runs
from fedqueue_coordinator.core.run_counters import RunCounters
from fedqueue_coordinator.operator.run_locations import finished_runs, read_summary, servers

if TYPE_CHECKING:
    from fedqueue_coordinator.operator.audit.audit import Check  # which imports torch

SHOWN_PROBLEMS = 20


def show_status(url: str, run: str, as_json: bool) -> None:
    """Print the state of the run, or of the only one there is; raises RunNotFound."""
    status = _live_status(url, run) or _finished_status(run)
    if status is None:
        if run:
            raise RunNotFound(run)
        raise StoreError("there is no run, or more than one: name it with --run (`fedqueue runs` lists them)")
    if as_json:
        typer.echo(json.dumps(status, indent=2))
        return
    table = Table(title=status["run"], title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for key, value in status.items():
        if key != "run":
            table.add_row(key.replace("_", " "), _words(value))
    Console().print(table)


def show_runs(url: str, as_json: bool) -> None:
    """Print every run on the servers that answer, and every folder of results under runs/."""
    rows = []
    for place in servers(url):
        for run in list_runs(place.client):
            try:
                info = Store(place.client, run).info()
            except RunNotFound:
                continue  # its keys have expired
            rows.append({"run": run, "state": info.state, "version": info.version, "where": "Redis"})
    for run, folder in finished_runs().items():
        summary = read_summary(folder)
        rows.append({"run": run, "state": "ended", "version": summary["versions"], "where": str(folder)})
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    elif not rows:
        typer.echo("no runs: neither on a Redis server that answers, nor under runs/")
    else:
        table = Table("run", "state", "version", "where")
        for row in rows:
            table.add_row(*map(str, row.values()))
        Console().print(table)


def _live_status(url: str, run: str) -> dict[str, Any] | None:
    for place in servers(url):
        names = list_runs(place.client)
        wanted = run or (names[0] if len(names) == 1 else "")
        if wanted not in names:
            continue
        store = Store(place.client, wanted)
        try:
            info = store.info()
        except RunNotFound:
            continue
        ledger = store.ledger()
        evaluations = [r for r in ledger if r["kind"] == "evaluation"]
        failures = [r for r in ledger if r["kind"] == "abandoned" and r["error"]]
        return {
            "run": wanted,
            "state": info.state,
            "stopped_because": info.stopped_because,
            "leader": info.leader,
            "version": info.version,
            "updates_merged": info.totals.get("updates", 0),
            "seconds": round(info.totals.get("seconds", 0.0), 1),
            "clients_alive": store.alive_clients(),
            "open_jobs": store.open_jobs(),
            "updates_rejected": _count(ledger, "rejected"),
            "jobs_abandoned": _count(ledger, "abandoned"),
            "posts_refused": {k: v for k, v in store.refused().items() if v},
            "clients": RunCounters.from_ledger({}, ledger, window=1).merged_by,
            "metrics": evaluations[-1]["metrics"] if evaluations else {},
            "last_failure": f"{failures[-1]['client']}: {failures[-1]['error']}" if failures else "",
        }
    return None


def _finished_status(run: str) -> dict[str, Any] | None:
    finished = finished_runs()
    wanted = run or (next(iter(finished)) if len(finished) == 1 else "")
    if wanted not in finished:
        return None
    summary = read_summary(finished[wanted])
    shown = {key: value for key, value in summary.items() if key not in ("history", "run")}
    return {"run": wanted, "state": "ended", "folder": str(finished[wanted]), **shown}


def _count(ledger: list[dict[str, Any]], kind: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    for record in ledger:
        if record["kind"] == kind:
            counts[record["reason"]] = counts.get(record["reason"], 0) + 1
    return counts


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}: {_words(v)}" for k, v in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:.4f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value) or "none"


def show_audit(run: str, checks: Sequence[Check]) -> None:
    """Print what was checked, and every violation."""
    table = Table("", "invariant", "result", title=f"audit of {run}", title_justify="left")
    for check in checks:
        verdict = f"[red]{len(check.problems)} violations[/]" if check.problems else "[green]holds[/]"
        table.add_row(check.name, check.says, f"{verdict}{f' ({check.skipped})' if check.skipped else ''}")
    console = Console()
    console.print(table)
    for check in checks:
        for problem in check.problems[:SHOWN_PROBLEMS]:
            console.print(f"{check.name}: {problem}", highlight=False, soft_wrap=True)
        if len(check.problems) > SHOWN_PROBLEMS:
            console.print(f"{check.name}: … and {len(check.problems) - SHOWN_PROBLEMS} more", highlight=False)

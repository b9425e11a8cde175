"""`fedqueue status` and `fedqueue list`: finds runs on Redis servers and in result folders, and shows their state.

Reading order: where runs are found (`reachable_servers`, `finished_runs`), the two commands (`show_status`,
`show_runs`), then what `fedqueue status` reads. Nothing here writes to Redis.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import redis
import typer
from rich.table import Table

from fedqueue.config.names import ENVIRONMENT_PREFIX
from fedqueue.config.privacy import PrivacyConfig
from fedqueue.config.redis import RedisConfig
from fedqueue.config.tls import Tls
from fedqueue.errors import RunNotFound, ServerUnavailable, StoreError
from fedqueue.exception_text import printable
from fedqueue.transport.connection import TLS_SCHEMES, connect, refusal
from fedqueue.transport.store import Store, list_runs
from fedqueue_coordinator.core.run_summary import summarize_failures
from fedqueue_coordinator.operator.json_text import json_text
from fedqueue_coordinator.operator.plain_console import PlainConsole

NEWEST_RECORDS = 200
"""Records at the end of the ledger in which `fedqueue status` looks for kinds of failures."""
SHOWN_FAILURES = 5
"""Kinds of failures that `fedqueue status` shows, the newest ones."""
RUNS_FOLDER = Path("runs")
DEFAULT_URL = "redis://localhost:6379"


def reachable_servers(url: str) -> list[redis.Redis]:
    """Return a connection to each server that answers.

    With `url`, or else a URL in the environment (FEDQUEUE_REDIS__URL), only that server is tried, and
    ServerUnavailable is raised if it does not answer. Without either, the servers of local runs under runs/ and
    DEFAULT_URL are tried.
    """
    names = [f"{ENVIRONMENT_PREFIX}REDIS__{key}" for key in ("URL", "PASSWORD_FILE")]
    address, password_file = (os.environ.get(name) or None for name in names)
    given = RedisConfig(url=address, password_file=password_file).address(url)
    local = [f.read_text().strip() for f in sorted(RUNS_FOLDER.glob("*/redis.url"))]
    files = (f"{ENVIRONMENT_PREFIX}REDIS__{key}" for key in ("CA_FILE", "CERT_FILE", "KEY_FILE"))
    tls = Tls(*(os.environ.get(name) or None for name in files))
    clients, problems = [], []
    for candidate in dict.fromkeys([given] if given else [*local, DEFAULT_URL]):
        client = connect(candidate, retries=0, tls=tls if candidate.partition(":")[0] in TLS_SCHEMES else None)
        try:
            client.ping()
        except redis.RedisError as error:
            problems.append(refusal(error))
        else:
            clients.append(client)
    if given and not clients:
        raise ServerUnavailable(f"no Redis answers: {problems[0]}")
    return clients


def finished_runs() -> dict[str, Path]:
    """Return run name → folder for each folder of results under runs/."""
    return {f.parent.name: f.parent for f in sorted(RUNS_FOLDER.glob("*/summary.json"))}


def read_summary(folder: Path, *needed: str) -> dict[str, Any]:
    """Read the summary.json that `write_results` left in `folder`.

    Raises StoreError if the file is damaged, or lacks one of the values `needed`.
    """
    path = folder / "summary.json"
    summary = _parse(_read(path), str(path))
    if lacking := [name for name in needed if name not in summary]:
        raise _damaged(str(path), f"has no {lacking[0]!r}")
    return summary


def read_ledger(folder: Path) -> list[dict[str, Any]]:
    """Read the ledger.jsonl that `write_results` left in `folder`; raises StoreError, which names a damaged line."""
    path = folder / "ledger.jsonl"
    records = []
    for number, line in enumerate(_read(path).splitlines(), 1):
        records.append(record := _parse(line, f"{path}, line {number}"))
        if "kind" not in record:
            raise _damaged(f"{path}, line {number}", "has no 'kind'")
    return records


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise _damaged(str(path), f"is no text in UTF-8 at byte {error.start}") from None


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except ValueError as error:
        raise _damaged(where, f"is no JSON ({error})") from None
    if not isinstance(record, dict):
        raise _damaged(where, "is no JSON object")
    return record


def _damaged(where: str, problem: str) -> StoreError:
    return StoreError(f"{where} {problem}: the file is damaged; restore it from a backup, or repeat the run")


def show_status(url: str, run: str, as_json: bool) -> None:
    """Print the state of `run`, or of the only run found if `run` is empty.

    Raises RunNotFound for an unknown name, and StoreError if `run` is empty and the choice is ambiguous.
    """
    status = _live_status(url, run) or _finished_status(run)
    if status is None:
        if run:
            raise RunNotFound(run)
        raise StoreError("found no run, or more than one; name one with --run NAME (`fedqueue list` shows them)")
    if as_json:
        typer.echo(json_text(status, indent=2))
        return
    table = Table(title=status["run"], title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for key, value in status.items():
        if key != "run":
            table.add_row(key.replace("_", " "), printable(_text(value)))
    PlainConsole().print(table)


def show_runs(url: str, as_json: bool) -> None:
    """Print each run on the reachable servers, and each folder of results under runs/."""
    rows = []
    for client in reachable_servers(url):
        for run in list_runs(client):
            try:
                info = Store(client, run).info()
            except RunNotFound:
                continue  # the run is still listed, but its keys have expired
            rows.append({"run": run, "state": info.state, "version": info.version, "where": "Redis"})
    problems = []
    for run, folder in finished_runs().items():
        try:
            state, version = "ended", read_summary(folder, "versions")["versions"]
        except StoreError as error:
            problems.append(str(error))
            state, version = "damaged", None
        rows.append({"run": run, "state": state, "version": version, "where": str(folder)})
    if as_json:
        typer.echo(json_text(rows, indent=2))
    elif not rows:
        typer.echo("no runs found on a Redis server or under runs/; `fedqueue run CONFIG.toml` starts one")
    else:
        table = Table("run", "state", "version", "where")
        for row in rows:
            table.add_row(*("" if value is None else printable(str(value)) for value in row.values()))
        PlainConsole().print(table)
    for problem in problems:
        typer.echo(f"fedqueue: {printable(problem)}", err=True)


def _live_status(url: str, run: str) -> dict[str, Any] | None:
    for client in reachable_servers(url):
        names = list_runs(client)
        wanted = run or (names[0] if len(names) == 1 else "")
        if wanted not in names:
            continue
        store = Store(client, wanted)
        try:
            info = store.info()
        except RunNotFound:
            continue
        counts = store.counts()
        alive, refused = store.sites()
        failure = counts.failure
        return {
            "run": wanted,
            "state": info.state,
            "stopped_because": info.stopped_because,
            "leader": info.leader,
            "waiting": store.waiting() if info.state == "running" else "",
            "version": info.version,
            "updates_merged": info.totals.get("updates", 0),
            "seconds": round(info.totals.get("seconds", 0.0), 1),
            "clients_alive": alive,
            "open_jobs": store.open_jobs(),
            "updates_rejected": counts.rejected,
            "jobs_abandoned": counts.abandoned,
            "posts_refused": refused,
            "clients": counts.merged_by,
            "privacy": _privacy(info.config),
            "metrics": counts.evaluation["metrics"] if counts.evaluation else {},
            "last_failure": f"{failure.get('client', 'evaluate')}: {failure['error']}" if failure else "",
            "failures": _failure_lines(summarize_failures(store.newest_records(NEWEST_RECORDS))),
        }
    return None


def _privacy(config: Mapping[str, Any]) -> str:
    """Say what holds for the run's updates; its configuration may be of another version of fedqueue."""
    return PrivacyConfig.model_validate(config.get("privacy", {})).sentence


def _finished_status(run: str) -> dict[str, Any] | None:
    finished = finished_runs()
    wanted = run or (next(iter(finished)) if len(finished) == 1 else "")
    if wanted not in finished:
        return None
    summary = read_summary(finished[wanted], "metrics")
    shown = {key: value for key, value in summary.items() if key not in ("history", "run", "failures")}
    shown["metrics"] = {name: math.nan if value is None else value for name, value in summary["metrics"].items()}
    failures = _failure_lines(summary.get("failures", []))
    return {"run": wanted, "state": "ended", "folder": str(finished[wanted]), **shown, "failures": failures}


def _failure_lines(failures: list[dict[str, Any]]) -> list[str]:
    """A line for each of the newest kinds of failures in a summary."""
    lines = []
    for failure in failures[-SHOWN_FAILURES:]:
        words = [failure[name] for name in ("first", "what", "text") if failure[name]]
        often = f" ({failure['count']} times, {failure['clients']} clients)" if failure["count"] > 1 else ""
        lines.append(": ".join(words) + often)
    return lines


def _text(value: Any) -> str:
    if isinstance(value, dict):
        parts = (f"{k}: ({_text(v)})" if isinstance(v, dict) else f"{k}: {_text(v)}" for k, v in value.items())
        return ", ".join(parts) or "none"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:.4f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value) or "none"

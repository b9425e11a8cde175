"""The table of `fedqueue audit`."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedqueue_coordinator.operator.audit.audit import Check, audit, ok
from fedqueue_coordinator.operator.audit.audit_input import read_audit_input

SHOWN_VIOLATIONS = 20
"""Violations printed per check; the rest are counted."""


def run_audit(run: str, url: str, keys: Path) -> bool:
    """Audit a run (see `read_audit_input`) and print the result; returns whether no check found a violation."""
    progress = Console(stderr=True)
    with progress.status(f"auditing {run}") if progress.is_terminal else contextlib.nullcontext():
        checks = audit(read_audit_input(run, url, keys))
    show_audit(run, checks)
    return ok(checks)


def show_audit(run: str, checks: Sequence[Check]) -> None:
    """Print the result of each check, then its first violations, then the verdict in one line."""
    table = Table("", "invariant", "result", title=f"audit of {run}", title_justify="left")
    for check in checks:
        table.add_row(check.name, check.invariant, _verdict(check))
    console = Console()
    console.print(table)
    for check in checks:
        for problem in check.problems[:SHOWN_VIOLATIONS]:
            console.print(f"{check.name}: {problem}", markup=False, highlight=False, soft_wrap=True)
        if len(check.problems) > SHOWN_VIOLATIONS:
            console.print(f"{check.name}: … and {len(check.problems) - SHOWN_VIOLATIONS} more", highlight=False)
    violations = sum(len(check.problems) for check in checks)
    checked = sum(check.checked for check in checks)
    partly = sum(bool(check.checked and check.skipped) for check in checks)
    parts = [f"{checked} of {len(checks)} checks done"]
    parts += [f"{partly} of these in part"] if partly else []
    parts += [f"{len(checks) - checked} not done"] if checked < len(checks) else []
    console.print(f"{', '.join(parts)}: {violations or 'no'} violations", highlight=False)


def _verdict(check: Check) -> str:
    verdict = "[green]holds[/]" if check.checked else ""
    if check.problems:
        verdict = f"[red]{len(check.problems)} violations[/]"
    missing = f"[yellow]not checked:[/] {escape(check.skipped)}" if check.skipped else ""
    return "; ".join(filter(None, (verdict, missing)))

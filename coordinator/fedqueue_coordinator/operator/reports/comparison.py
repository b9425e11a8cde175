"""The results of `fedqueue compare`: a table for the terminal and in markdown, all figures in JSON, and one picture."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.table import Table

from fedqueue.config.target import Wanted, goals
from fedqueue.errors import MissingExtra
from fedqueue_coordinator.core.waiting import names
from fedqueue_coordinator.operator.json_text import json_text
from fedqueue_coordinator.simulation.comparison import Outcome

COMPARISON_FILENAMES = ("comparison.md", "comparison.json", "comparison.png")

Groups = dict[str, list[Outcome]]
"""Variant → its outcomes, in the order of the comparison."""


def grouped(outcomes: Sequence[Outcome]) -> Groups:
    """Group the outcomes by variant."""
    groups: Groups = {}
    for outcome in outcomes:
        groups.setdefault(outcome.variant, []).append(outcome)
    return groups


def rows(outcomes: Sequence[Outcome], target: Wanted) -> list[list[str]]:
    """Return the table with its header as the first row; values are mean ± standard deviation over the seeds.

    `seconds` and `updates` say when the target was reached, over the seeds that reached it.
    """
    metric = next(iter(target))
    tuned = sorted({key for outcome in outcomes for key in outcome.tuned})
    head = ["variant", *(key.rpartition(".")[2] for key in tuned), "reached", "seconds", "updates", f"final {metric}"]
    head += ["staleness", "least share", "lost"]
    table = [head]
    for name, group in grouped(outcomes).items():
        reached = [outcome.reached for outcome in group if outcome.reached]
        lost = sum(sum(outcome.lost.values()) for outcome in group)
        table.append(
            [
                name,
                *(group[0].tuned.get(key, "") for key in tuned),
                f"{len(reached)} of {len(group)}",
                spread([point.seconds for point in reached], 1),
                spread([point.updates for point in reached], 0),
                spread([outcome.final.metrics.get(metric, math.nan) for outcome in group], 3),
                spread([outcome.staleness for outcome in group], 1),
                f"{mean(least_share(outcome) for outcome in group):.1%}",
                f"{lost / len(group):.0f}",
            ]
        )
    return table


def problems(outcomes: Sequence[Outcome]) -> list[str]:
    """Say which runs failed, what happened to the clients of each variant, and who contributed nothing; or nothing."""
    lines = [f"{o.variant}, seed {o.seed} failed: {o.failed}" for o in outcomes if o.failed]
    for name, group in grouped(outcomes).items():
        lines += dict.fromkeys(f"{name}: {line}" for outcome in group for line in outcome.failures)
        idle = sorted({client for o in group if not o.failed for client in o.clients if not o.shares.get(client)})
        lines += [f"{name}: no update from {names(idle)} in at least one run"] if idle else []
    return lines


def least_share(outcome: Outcome) -> float:
    """Return the smallest share of the merged updates that a client has; 0 if a client has no merged update."""
    return min((outcome.shares.get(client, 0.0) for client in outcome.clients), default=0.0)


def target_in_words(target: Wanted) -> str:
    """Write {"accuracy": 0.9} as "accuracy ≥ 0.9"."""
    return ", ".join(map(str, goals(target)))


def spread(values: Sequence[float], digits: int) -> str:
    """Write mean ± standard deviation (of the sample, n − 1); a dash if there is no value."""
    if not values:
        return "–"
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


def terminal_table(table: Sequence[Sequence[str]], title: str) -> Table:
    """Return `rows` as a rich table."""
    shown = Table(title=title, title_justify="left")
    for i, name in enumerate(table[0]):
        shown.add_column(name, justify="left" if i == 0 else "right")
    for row in table[1:]:
        shown.add_row(*row)
    return shown


def markdown(table: Sequence[Sequence[str]]) -> str:
    """Return `rows` as a markdown table with aligned columns."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in table
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def write_comparison(
    folder: Path, title: str, about: Sequence[str], outcomes: Sequence[Outcome], target: Wanted
) -> None:
    """Write COMPARISON_FILENAMES into `folder`; `about` are the lines that describe how the figures were obtained.

    Without matplotlib there is no comparison.png, and one of an earlier comparison is deleted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = markdown(rows(outcomes, target))
    found = [f"- {line}" for line in problems(outcomes)]
    text = "\n".join([f"# {title}", "", table, *([*found, ""] if found else []), *about])
    (folder / "comparison.md").write_text(text + "\n", encoding="utf-8")
    plain: dict[str, Any] = {"title": title, "about": list(about), "target": dict(target)}
    plain["outcomes"] = [asdict(outcome) for outcome in outcomes]
    (folder / "comparison.json").write_text(json_text(plain, indent=1) + "\n", encoding="utf-8")
    (folder / "comparison.png").unlink(missing_ok=True)
    with contextlib.suppress(MissingExtra):
        from fedqueue_coordinator.operator.reports.comparison_plot import draw

        draw(folder / "comparison.png", title, outcomes, target)

"""Writes docs/reference/metrics.md from the catalogue of metrics; a test fails if the page is out of date.

.venv/bin/python docs/make_metrics.py
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fedqueue.observability.catalogue import COORDINATOR, KEEPER, WORKER, Metric

PAGE = Path(__file__).parent / "reference" / "metrics.md"

HEAD = """# Metrics

What the processes of a run expose for Prometheus, with `--metrics ADDRESS` or `observability.metrics_address`.
[Watch a run with Prometheus and Grafana](../how-to/watch-with-prometheus.md) says how to use them.

A counter begins at 0 when its process starts.
A histogram has the series `_bucket`, `_sum` and `_count`.
"""
GROUPS = {
    "Coordinator": (
        COORDINATOR,
        "In a run of more than 100 clients, the label `client` is `(other)` for all of them, and so it is for a client "
        "that the configuration does not list.",
    ),
    "Worker": (
        WORKER,
        "All processes of one `fedqueue-worker` share one address, which shows their sums. A worker labels its own "
        "clients.",
    ),
    "Keeper": (KEEPER, "A keeper exposes no client's name."),
}


def page() -> str:
    """The whole page: a table for each kind of process."""
    return HEAD + "".join(f"\n## {name}\n\n{note}\n\n{_table(metrics)}" for name, (metrics, note) in GROUPS.items())


def _table(metrics: Iterable[Metric]) -> str:
    lines = ["| metric | kind | labels | |", "|---|---|---|---|"]
    for metric in metrics:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        lines.append(f"| `{metric.name}` | {metric.kind} | {labels} | {metric.help} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

"""Draws report.png, one page about a run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedqueue.config.privacy import NO_PRIVACY
from fedqueue.errors import MissingExtra
from fedqueue_coordinator.core.run_summary import describe_masking, main_metric

try:
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ModuleNotFoundError:
    raise MissingExtra("report.png", "matplotlib", "plots") from None

BLUE, ORANGE, RED, GREY = "#2563a8", "#d97706", "#c0262d", "#6b7280"
MANY_CLIENTS = 24
"""With more clients than this, bars and rows are not labelled individually."""


def draw_report(path: Path, summary: Mapping[str, Any], ledger: Sequence[Mapping[str, Any]]) -> None:
    """Draw metrics over time, a histogram of staleness, updates per client and arrivals over time to `path`.

    `summary` is that of `summarize`, `ledger` the records that it was computed from.
    """
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11, 7.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(2, 2)
        rejected = sum(summary["updates_rejected"].values()) - summary["updates_rejected"].get("run_ended", 0)
        abandoned = summary["jobs_abandoned"] - summary["abandoned_because"].get("run_ended", 0)
        noise = summary.get("privacy", NO_PRIVACY)
        private = "\n".join(line for line in (describe_masking(summary), noise) if line not in ("", NO_PRIVACY))
        figure.suptitle(
            f"{summary['run']} · {summary['strategy']} · {summary['versions']} versions of {summary['updates_merged']} "
            f"updates in {summary['seconds']:.1f} s · {rejected} rejected, {abandoned} abandoned\n"
            f"stopped by {summary['stopped_because']}" + (f"\n{private}" if private else ""),
            fontsize=10,
        )
        _metrics(axes[0, 0], summary["history"])
        _staleness(axes[0, 1], summary["staleness"])
        _clients(axes[1, 0], summary["clients"])
        _arrivals(axes[1, 1], ledger)
        figure.savefig(path, dpi=110)


def _metrics(axes: Axes, history: Sequence[Mapping[str, Any]]) -> None:
    axes.set_title("central evaluation")
    axes.set_xlabel("seconds")
    if not history:
        _empty(axes, "no central evaluation:\nthe task has no test_data()")
        return
    names = [name for name in dict.fromkeys(itertools.chain(*history)) if name not in ("version", "seconds")]
    shown = main_metric(names) if names else None
    marker = "." if len(history) < 80 else None
    for name, side, colour in (
        (shown, axes, BLUE),
        ("loss" if shown != "loss" else None, axes.twinx(), ORANGE),
    ):
        points = [(h["seconds"], h.get(name, math.nan)) for h in history] if name else []
        if not any(math.isfinite(value) for _, value in points):
            side.set_axis_off() if side is not axes else _empty(axes, f"{name or 'no metric'}: no finite value")
            continue
        side.plot(*zip(*points, strict=True), color=colour, marker=marker, linewidth=1.2)
        side.set_ylabel(str(name), color=colour)
    axes.set_xlim(left=0)
    if shown == "accuracy" and axes.dataLim.y1 <= 1.0:  # not in percent
        axes.set_ylim(top=1.0)
    axes.grid(alpha=0.25)


def _staleness(axes: Axes, staleness: Mapping[str, Any]) -> None:
    axes.set_title(f"staleness of merged updates (mean {staleness['mean']:.2f}, max {staleness['max']})")
    axes.set_xlabel("versions behind at the merge")
    axes.set_ylabel("updates")
    histogram = {int(tau): n for tau, n in staleness["histogram"].items()}
    if not histogram:
        _empty(axes, "no update was merged")
        return
    axes.bar(list(histogram), list(histogram.values()), color=BLUE, width=0.85)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _clients(axes: Axes, clients: Mapping[str, int]) -> None:
    axes.set_title("merged updates by client")
    if not clients:
        _empty(axes, "no update was merged")
        return
    names, counts = list(clients), list(clients.values())
    if len(names) > MANY_CLIENTS:
        axes.bar(range(len(names)), sorted(counts, reverse=True), color=BLUE, width=1.0)
        axes.set_xlabel("clients, most active first")
        axes.set_ylabel("updates")
        return
    bars = axes.barh(names, counts, color=BLUE)
    axes.bar_label(bars, [f"{n} · {n / sum(counts):.0%}" for n in counts], padding=2, color=GREY)
    axes.margins(x=0.18)  # space for the labels
    axes.invert_yaxis()
    axes.set_xlabel("updates")


def _arrivals(axes: Axes, ledger: Sequence[Mapping[str, Any]]) -> None:
    axes.set_title("arrivals over time")
    axes.set_xlabel("seconds")
    merged = [(line["at"], line["client"]) for r in ledger if r["kind"] == "version" for line in r["merged"]]
    lost: dict[str, list[tuple[float, str]]] = {"rejected": [], "abandoned": [], "cut off at the end": []}
    for record in ledger:
        if record["kind"] in ("rejected", "abandoned"):
            kind = "cut off at the end" if record["reason"] == "run_ended" else record["kind"]
            lost[kind].append((record["seconds"], record["client"]))
    clients = sorted({client for _, client in itertools.chain(merged, *lost.values())})
    if not clients:
        _empty(axes, "nothing arrived")
        return
    rows = {client: row for row, client in enumerate(clients)}
    kinds = (
        ("merged", merged, BLUE, "|"),
        ("rejected", lost["rejected"], RED, "x"),
        ("abandoned", lost["abandoned"], ORANGE, "v"),
        ("cut off at the end", lost["cut off at the end"], GREY, "."),
    )
    for label, points, colour, marker in kinds:
        if points:
            times, who = zip(*points, strict=True)
            axes.scatter(times, [rows[c] for c in who], s=30, color=colour, marker=marker, label=label, linewidths=1)
    if len(clients) <= MANY_CLIENTS:
        axes.set_yticks(range(len(clients)), clients)
    else:
        axes.set_ylabel("client")
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4, frameon=False)


def _empty(axes: Axes, why: str) -> None:
    axes.text(0.5, 0.5, why, ha="center", va="center", color=GREY, transform=axes.transAxes)
    axes.set_xticks([])
    axes.set_yticks([])

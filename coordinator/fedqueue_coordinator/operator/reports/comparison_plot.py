"""Draws comparison.png; importing this module raises MissingExtra without matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

import numpy as np

from fedqueue.config.target import Goal, Wanted, goals
from fedqueue.errors import MissingExtra
from fedqueue_coordinator.operator.reports.comparison import Groups, grouped, target_in_words
from fedqueue_coordinator.simulation.comparison import Outcome, Point

try:
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
except ModuleNotFoundError:
    raise MissingExtra("comparison.png", "matplotlib", "plots") from None

COLOURS = ("#2563a8", "#d97706", "#16803c", "#c0262d", "#7c3aed", "#0891b2", "#a16207", "#db2777", "#4b5563")
GREY = "#6b7280"
LOGARITHMIC_FROM = 12.0
"""Time is drawn on a log scale if the slowest run takes this many times longer than the fastest."""


def draw(path: Path, title: str, outcomes: Sequence[Outcome], target: Wanted) -> None:
    """Draw the target's first metric against time and against updates, and the time to the target, for every seed."""
    goal = goals(target)[0]
    groups = grouped(outcomes)
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(groups)}
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(12, 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        by_time, by_updates, to_target = figure.subplots(1, 3, width_ratios=(1.25, 1.0, 0.85))
        figure.suptitle(f"{title} · virtual clock", fontsize=10)
        _curves(by_time, groups, colours, goal, "seconds")
        _curves(by_updates, groups, colours, goal, "updates")
        by_time.set_xlabel("virtual seconds")
        by_time.set_ylabel(goal.metric)
        by_updates.set_xlabel("merged updates")
        by_updates.tick_params(labelleft=False)
        by_updates.sharey(by_time)
        handles, labels = by_updates.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 8), frameon=False)
        _times(to_target, groups, colours, target_in_words(target))
        figure.savefig(path, dpi=110)


def _curves(axes: Axes, groups: Groups, colours: Mapping[str, str], goal: Goal, against: str) -> None:
    metric, target = goal.metric, goal.value
    ends = [getattr(outcome.final, against) for group in groups.values() for outcome in group]
    starts = [getattr(point, against) for group in groups.values() for o in group for point in o.points[1:2]]
    logarithmic = against == "seconds" and min(ends) > 0 and max(ends) / min(ends) > LOGARITHMIC_FROM
    for name, group in groups.items():
        lines = [[(getattr(p, against), p.metrics[metric]) for p in o.points if _drawable(p, metric)] for o in group]
        lines = [line for line in lines if line]
        for line in lines:
            axes.plot(*zip(*line, strict=True), color=colours[name], alpha=0.25, linewidth=0.8)
        if lines:
            grid = np.linspace(0.0, min(line[-1][0] for line in lines), 200)
            if logarithmic:
                grid = np.geomspace(max(min(starts), 1e-3), max(grid[-1], 2e-3), 200)
            curves = [np.interp(grid, [x for x, _ in line], [y for _, y in line]) for line in lines]
            axes.plot(grid, np.mean(curves, axis=0), color=colours[name], linewidth=1.8, label=name)
    axes.axhline(target, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)))
    if logarithmic:
        _logarithmic(axes)
        axes.set_xlim(left=max(min(starts), max(ends) / 300))
    else:
        axes.set_xlim(left=0.0)
    finals = [o.final.metrics[metric] for g in groups.values() for o in g if _drawable(o.final, metric)]
    if finals and goal.direction == "above":  # show the upper end: the first steps would compress the rest
        best = max(*finals, target)
        axes.set_ylim(bottom=best - 6 * max(best - target, 0.03), top=best + 0.4 * max(best - target, 0.03))
    axes.grid(alpha=0.25)


def _drawable(point: Point, metric: str) -> bool:
    return math.isfinite(point.metrics.get(metric, math.nan))


def _logarithmic(axes: Axes) -> None:
    """Set a log scale with plain numbers as ticks."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _times(axes: Axes, groups: Groups, colours: Mapping[str, str], what: str) -> None:
    axes.set_title(f"time to {what}", fontsize=9)
    axes.set_xlabel("virtual seconds")
    every = []
    for row, (name, group) in enumerate(groups.items()):
        times = [outcome.reached.seconds for outcome in group if outcome.reached]
        every += times
        axes.scatter(times, [row] * len(times), s=26, color=colours[name], alpha=0.55, linewidths=0)
        if times:
            axes.plot([mean(times)] * 2, [row - 0.28, row + 0.28], color=colours[name], linewidth=2.4)
        missing = len(group) - len(times)
        if missing:
            words = "not\nreached" if missing == len(group) else f"{missing} of {len(group)}\nnot\nreached"
            axes.annotate(
                words, (1.02, row), xycoords=("axes fraction", "data"), annotation_clip=False,
                ha="left", va="center", color=GREY, fontsize=8,
            )  # fmt: skip
    axes.margins(x=0.08)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.set_ylim(len(groups) - 0.5, -0.5)
    if every and min(every) > 0 and max(every) / min(every) > LOGARITHMIC_FROM:
        _logarithmic(axes)
    else:
        axes.set_xlim(left=0.0)
    axes.grid(alpha=0.25, axis="x")

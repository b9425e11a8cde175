"""Draws describe.png; importing this module raises MissingExtra without matplotlib."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

from fedqueue.errors import MissingExtra
from fedqueue.statistics.pooled import CategoryStatistics, NumberStatistics, Statistics

try:
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
except ModuleNotFoundError:
    raise MissingExtra("describe.png", "matplotlib", "plots") from None

BLUE, GREY, ORANGE = "#2563a8", "#9ca3af", "#d97706"
COLUMNS = 4
MOST_PANELS = 40
MOST_CATEGORIES = 10


def draw(path: Path, statistics: Statistics) -> None:
    """Draw each column: of numbers the histogram of all rows and each site's mean, of categories their counts."""
    panels = list(statistics.columns.items())[:MOST_PANELS]
    height = max(1, -(-len(panels) // COLUMNS))
    with mpl.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(12, 0.6 + 2.1 * height), layout="constrained")
        FigureCanvasAgg(figure)
        left_out = len(statistics.columns) - len(panels)
        more = f" · {left_out} more columns are in the JSON" if left_out else ""
        legend = "orange: the mean of each site · grey: open ends, unnamed categories"
        figure.suptitle(f"{statistics.run} · {statistics.rows} rows · {legend}{more}", fontsize=10)
        axes = figure.subplots(height, COLUMNS, squeeze=False).flat
        for panel, (name, of) in zip(axes, panels, strict=False):
            missing = f"≤ {of.missing}" if statistics.hides_missing(name) else f"{of.missing}"
            panel.set_title(f"{name}  (missing: {missing})", fontsize=8, loc="left")
            if isinstance(of, NumberStatistics):
                _histogram(panel, of)
            else:
                _bars(panel, of)
        for panel in list(figure.axes)[len(panels) :]:
            panel.set_axis_off()
        figure.savefig(path, dpi=110)


def _histogram(axes: Axes, of: NumberStatistics) -> None:
    """Bars of rows per unit; an open bin is drawn pale, as wide as its neighbour or the range."""
    inner = [edge for edge in of.edges if edge is not None]
    axes.set_yticks([])
    if not inner:
        axes.text(0.5, 0.5, "no histogram", ha="center", va="center", color=GREY, transform=axes.transAxes)
        return
    widths = [b - a for a, b in pairwise(inner)]
    typical = sorted(widths)[len(widths) // 2] if widths else max(abs(inner[0]), 1.0)
    for (left, right), count in zip(pairwise(of.edges), of.counts, strict=True):
        start = left if left is not None else inner[0] - typical
        end = right if right is not None else inner[-1] + typical
        colour = BLUE if left is not None and right is not None else GREY
        if end > start:
            axes.bar(start, count / (end - start), width=end - start, align="edge", color=colour, linewidth=0)
    top = axes.get_ylim()[1]
    for own in of.sites.values():
        if own.mean is not None and math.isfinite(own.mean):
            axes.plot([own.mean, own.mean], [0, top], color=ORANGE, linewidth=0.9, alpha=0.8)


def _bars(axes: Axes, of: CategoryStatistics) -> None:
    ranked = sorted(of.counts.items(), key=lambda item: -item[1])
    shown, rest = ranked[:MOST_CATEGORIES], of.other + sum(count for _, count in ranked[MOST_CATEGORIES:])
    bars = [*shown, ("others", rest)] if rest else shown
    names = [name if len(name) <= 18 else f"{name[:17]}…" for name, _ in bars]
    places = range(len(bars))
    axes.barh(places, [count for _, count in bars], color=[BLUE] * len(shown) + [GREY] * (len(bars) - len(shown)))
    axes.set_yticks(list(places), names)
    axes.invert_yaxis()

"""Draws leak.png, true rows above recovered ones; importing this module raises MissingExtra without matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from fedqueue.errors import MissingExtra
from fedqueue.leak.attacks import Gallery, Pair
from fedqueue.leak.rows import RECOVERED

try:
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
except ModuleNotFoundError:
    raise MissingExtra("leak.png", "matplotlib", "plots") from None

RED, GREY = "#c0262d", "#6b7280"
SHOWN = 8
BARS = 64
"""A row that is no picture is drawn as bars, of its first features."""


def draw_leak(path: Path, title: str, galleries: Sequence[Gallery]) -> None:
    """Draw the rows that come out best of each gallery, true and recovered, and say its share in words."""
    panels = [gallery for gallery in galleries if gallery.pairs and gallery.rows.value is not None]
    with mpl.rc_context({"font.size": 10}):
        figure = Figure(figsize=(13, 1.5 + 3.9 * len(panels)), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(f"{title}. Red frame: recovered, with a likeness above {RECOVERED:g}.", fontsize=13)
        for part, gallery in zip(figure.subfigures(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
            part.suptitle(in_words(gallery), fontsize=12)
            shown = gallery.pairs[:SHOWN]
            axes = part.subplots(2, SHOWN, squeeze=False)
            for column in range(SHOWN):
                upper, lower = axes[0][column], axes[1][column]
                if column >= len(shown):
                    upper.set_axis_off()
                    lower.set_axis_off()
                    continue
                _one_pair(upper, lower, shown[column])
            axes[0][0].set_ylabel("true row", fontsize=11)
            axes[1][0].set_ylabel("recovered", fontsize=11)
        figure.savefig(path, dpi=100)


def in_words(gallery: Gallery) -> str:
    """Say the share of recovered rows, that of rows never trained on, and what is drawn."""
    trained, never = (_of_100(value or 0.0) for value in (gallery.rows.value, gallery.rows.control))
    return (
        f"From {gallery.source}: {trained} rows trained on can be read (of rows never trained on: {never}).\n"
        "The rows that come out best:"
    )


def _of_100(share: float) -> str:
    percent = 100 * share
    return f"{'less than 1' if 0 < percent < 0.5 else f'{percent:.0f}'} of 100"


def _one_pair(upper: Axes, lower: Axes, pair: Pair) -> None:
    recovered = pair.correlation > RECOVERED
    for axes, row in ((upper, pair.true), (lower, pair.recovered)):
        _draw_row(axes, row, like=pair.true)
    colour = RED if recovered else GREY
    lower.set_xlabel(f"likeness {pair.correlation:.2f}", color=colour)
    for spine in lower.spines.values():
        spine.set(color=colour, linewidth=2.5 if recovered else 0.8)


def _draw_row(axes: Axes, row: torch.Tensor, like: torch.Tensor) -> None:
    """Draw a row as a square picture where its length is that of one, or else as bars, scaled like the true row."""
    side = math.isqrt(len(row))
    axes.set_xticks([])
    axes.set_yticks([])
    if side > 3 and side * side == len(row):
        axes.imshow(row.reshape(side, side).numpy(), cmap="gray_r")
        return
    spread = float(row.std()) or 1.0
    fitted = (row - row.mean()) / spread * float(like.std()) + like.mean()
    axes.bar(range(min(BARS, len(row))), fitted[:BARS].numpy(), color=GREY, width=0.9)

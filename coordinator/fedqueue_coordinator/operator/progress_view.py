"""The progress display of `fedqueue run` and `fedqueue coordinator`, and what they say of failures.

Names, paths and texts that the console shows come from configurations, clients and exceptions. They are shown as they
are: no markup, no emoji codes, no control characters.
"""

from __future__ import annotations

import math
from collections import Counter
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fedqueue.config.schema import Config
from fedqueue.exception_text import printable
from fedqueue_coordinator.core.federation import Federation
from fedqueue_coordinator.core.run_summary import main_metric
from fedqueue_coordinator.operator.plain_console import PlainConsole

REFRESH_SECONDS = 0.25
"""Time between two updates of the table on a terminal."""
LINE_SECONDS = 2.0
"""Time between two lines if the output is not a terminal."""
IDLE_SECONDS = 60.0
"""Time between two such lines while nothing changes but the time."""
BARS = "▁▂▃▄▅▆▇█"
WARNING, ERROR = "yellow", "red"


class LiveView:
    """Shows a table that is updated in place on a terminal, and plain lines elsewhere; `quiet`: failures only."""

    def __init__(self, config: Config, quiet: bool, console: Console | None = None) -> None:
        self._config, self._quiet = config, quiet
        self.console = console or PlainConsole(stderr=True)
        self._live: Live | None = None
        self._next = 0.0
        self._said: tuple[str, float] = ("", 0.0)  # the last line without its time, and when it was printed
        self._told: set[tuple[str, str]] = set()
        self._history: list[tuple[int, float]] = []

    def __enter__(self) -> Self:
        if self.console.is_terminal and not self._quiet:
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def say(self, text: str, style: str = "", even_if_quiet: bool = False) -> None:
        """Print a line, with `text` as it is."""
        if even_if_quiet or not self._quiet:
            self.console.print(Text(printable(text), style=style), soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print a line about something that went wrong, in quiet mode too."""
        self.say(text, WARNING, even_if_quiet=True)

    def update(self, federation: Federation, now: float) -> None:
        """Show the state of the federation at `now` (seconds since the start), unless the last update is too recent.

        A failure of a new kind is always shown, and at once.
        """
        for key, kind in federation.failures.kinds.items():
            if key not in self._told:
                self._told.add(key)
                self.say(kind.line, WARNING, even_if_quiet=not kind.mild)
        evaluated = federation.evaluated
        if evaluated and evaluated.metrics and (not self._history or self._history[-1][0] != evaluated.version):
            value = evaluated.metrics.get(main_metric(evaluated.metrics, self._config.stop.target))
            self._history.append((evaluated.version, math.nan if value is None else value))
        if self._quiet or now < self._next:
            return
        if self._live:
            self._next = now + REFRESH_SECONDS
            self._live.update(self._table(federation, now), refresh=True)
            return
        self._next = now + LINE_SECONDS
        state, said = self._state(federation, now), self._said
        if state != said[0] or now >= said[1] + IDLE_SECONDS:
            self._said = (state, now)
            self.say(f"{now:6.1f} s  {state}")

    def _state(self, federation: Federation, now: float) -> str:
        parts = [
            f"version {federation.version}",
            f"{federation.run_counters.updates} updates",
            federation.waiting_for(now) or f"{len(federation.clients)} clients",
            f"{len(federation.open_jobs)} jobs",
            *(f"{name} {counted(counts)}" for name, counts in _losses(federation) if counts),
        ]
        if federation.evaluated:
            parts += [f"{name} {value:.4f}" for name, value in federation.evaluated.metrics.items()]
        return "  ".join(parts)

    def _table(self, federation: Federation, now: float) -> Table:
        config = self._config
        title = Text(printable(f"{config.name}: {config.aggregation.strategy}"), style="table.title")
        table = Table(title=title, title_justify="left", show_header=False)
        table.add_column(style="bold")
        table.add_column()

        def row(name: str, value: str) -> None:
            table.add_row(Text(printable(name)), Text(printable(value)))

        row("time", f"{now:.1f} s")
        row("version", f"{federation.version} ({federation.buffered} of {config.buffer_size} updates buffered)")
        rate = federation.run_counters.updates / now if now else 0.0
        row("updates", f"{federation.run_counters.updates} merged, {rate:.1f}/s")
        row("clients", f"{len(federation.clients)} of {config.clients.number} alive")
        row("jobs", f"{len(federation.open_jobs)} open")
        waiting = federation.waiting_for(now)
        if waiting:
            row("waiting", waiting)
        for name, counts in _losses(federation):
            if counts:
                row(name, counted(counts))
        if federation.evaluated:
            wanted = {goal.metric: goal.condition for goal in config.stop.goals}
            for name, value in federation.evaluated.metrics.items():
                row(name, f"{value:.4f}" + (f" (target {wanted[name]})" if name in wanted else ""))
            row("", sparkline([value for _, value in self._history]))
        return table


def counted(counts: Counter[str]) -> str:
    """Counts by reason, in words: `2 stale, 1 forged`."""
    return ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)


def _losses(federation: Federation) -> list[tuple[str, Counter[str]]]:
    return [("rejected", +federation.rejected), ("abandoned", +federation.abandoned)]


def sparkline(values: list[float], width: int = 60) -> str:
    """Draw the last `width` values as bars between their minimum and maximum, and a gap for one that is not finite."""
    recent = values[-width:]
    finite = [value for value in recent if math.isfinite(value)]
    if not finite:
        return ""
    low, span = min(finite), (max(finite) - min(finite)) or 1.0
    return "".join(BARS[round((v - low) / span * (len(BARS) - 1))] if math.isfinite(v) else " " for v in recent)

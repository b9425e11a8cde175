"""The progress display of `fedqueue run` and `fedqueue coordinator`."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from fedqueue.config.schema import Config
from fedqueue_coordinator.core.federation import Federation

REFRESH_SECONDS = 0.25
"""Time between two updates of the table on a terminal."""
LINE_SECONDS = 2.0
"""Time between two lines if the output is not a terminal."""
BARS = "▁▂▃▄▅▆▇█"


class LiveView:
    """Shows a table that is updated in place on a terminal, and plain lines elsewhere; shows nothing if `quiet`."""

    def __init__(self, config: Config, quiet: bool, console: Console | None = None) -> None:
        self._config, self._quiet = config, quiet
        self.console = console or Console(stderr=True, quiet=quiet)
        self._live: Live | None = None
        self._next = 0.0
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

    def update(self, federation: Federation, now: float) -> None:
        """Show the state of the federation at `now` (seconds since the start), unless the last update is too recent."""
        evaluated = federation.evaluated
        if evaluated and evaluated.metrics and (not self._history or self._history[-1][0] != evaluated.version):
            shown = "accuracy" if "accuracy" in evaluated.metrics else next(iter(evaluated.metrics))
            self._history.append((evaluated.version, evaluated.metrics[shown]))
        if self._quiet or now < self._next:
            return
        if self._live:
            self._next = now + REFRESH_SECONDS
            self._live.update(self._table(federation, now), refresh=True)
        else:
            self._next = now + LINE_SECONDS
            self.console.print(self._line(federation, now), highlight=False, soft_wrap=True)

    def _line(self, federation: Federation, now: float) -> str:
        parts = [
            f"{now:6.1f} s",
            f"version {federation.version}",
            f"{federation.run_counters.updates} updates",
            f"{len(federation.clients)} clients",
            f"{len(federation.open_jobs)} jobs",
        ]
        if not federation.clients:
            parts.append("waiting for clients")
        if federation.evaluated:
            parts += [f"{name} {value:.4f}" for name, value in federation.evaluated.metrics.items()]
        return "  ".join(parts)

    def _table(self, federation: Federation, now: float) -> Table:
        config = self._config
        table = Table(title=f"{config.name}: {config.aggregation.strategy}", title_justify="left", show_header=False)
        table.add_column(style="bold")
        table.add_column()
        clients = f"{len(federation.clients)} of {len(config.clients.ids)} alive"
        if len(federation.clients) < config.minimum_clients and not federation.version:
            clients += f", waiting for {config.minimum_clients}"
        table.add_row("time", f"{now:.1f} s")
        table.add_row(
            "version",
            f"{federation.version} ({federation.buffered} of {config.buffer_size} updates buffered)",
        )
        rate = federation.run_counters.updates / now if now else 0.0
        table.add_row("updates", f"{federation.run_counters.updates} merged, {rate:.1f}/s")
        table.add_row("clients", clients)
        table.add_row("jobs", f"{len(federation.open_jobs)} open")
        for name, counts in (("rejected", federation.rejected), ("abandoned", federation.abandoned)):
            if counts:
                table.add_row(name, ", ".join(f"{n} {reason}" for reason, n in counts.items()))
        if federation.evaluated:
            for name, value in federation.evaluated.metrics.items():
                goal = config.stop.target.get(name)
                table.add_row(name, f"{value:.4f}" + (f" (target {goal:g})" if goal is not None else ""))
            table.add_row("", sparkline([value for _, value in self._history]))
        return table


def sparkline(values: list[float], width: int = 60) -> str:
    """Draw the last `width` values as bars between their minimum and maximum."""
    recent = values[-width:]
    if not recent:
        return ""
    low, span = min(recent), (max(recent) - min(recent)) or 1.0
    return "".join(BARS[round((v - low) / span * (len(BARS) - 1))] for v in recent)

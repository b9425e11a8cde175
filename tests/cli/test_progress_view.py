"""The progress of a run: a table on a terminal, lines elsewhere, no output when quiet."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from rich.console import Console

from fedqueue.config.loading import parse_config
from fedqueue.tensors.frame import Frame
from fedqueue.tensors.manifest import Manifest
from fedqueue_coordinator.core.events import ClientJoined, Evaluated
from fedqueue_coordinator.core.federation import Federation
from fedqueue_coordinator.operator.plain_console import PlainConsole
from fedqueue_coordinator.operator.progress_view import (
    BARS,
    IDLE_SECONDS,
    LINE_SECONDS,
    REFRESH_SECONDS,
    LiveView,
    sparkline,
)

CONFIG = parse_config(
    {
        "name": "digits",
        "task": {"entrypoint": "t:T"},
        "clients": {"count": 4, "min_available": 2},
        "stop": {"target": {"accuracy": 0.95}},
    }
)


@pytest.fixture
def federation() -> Federation:
    return Federation(CONFIG, Frame(Manifest.from_module(torch.nn.Linear(2, 1))))


def view(terminal: bool, quiet: bool = False) -> tuple[LiveView, io.StringIO]:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=100, color_system=None)
    return LiveView(CONFIG, quiet, console), stream


def test_line_has_time_version_updates_clients_jobs_and_metrics(federation: Federation) -> None:
    shown, stream = view(terminal=False)
    federation.handle(ClientJoined("client-0", 10), 0.0)
    federation.handle(ClientJoined("client-1", 10), 0.0)
    federation.evaluated = Evaluated(3, {"loss": 0.5, "accuracy": 0.9})
    with shown:
        shown.update(federation, 12.34)
    assert stream.getvalue() == (
        "  12.3 s  version 0  0 updates  2 clients  2 jobs  loss 0.5000  accuracy 0.9000\n"
    )  # fmt: skip


def test_line_says_that_the_run_waits_for_clients(federation: Federation) -> None:
    shown, stream = view(terminal=False)
    shown.update(federation, 0.0)
    assert "version 0  0 updates  0 of 4 clients alive, waiting for 2  0 jobs" in stream.getvalue()


def test_long_line_is_not_broken(federation: Federation) -> None:
    shown, stream = view(terminal=False)
    federation.evaluated = Evaluated(1, {f"a rather long metric name {i}": 1.0 for i in range(10)})
    shown.update(federation, 0.0)
    assert stream.getvalue().count("\n") == 1


def test_lines_are_printed_at_intervals(federation: Federation) -> None:
    shown, stream = view(terminal=False)
    for now in (0.0, 0.5, LINE_SECONDS - 0.01, LINE_SECONDS, LINE_SECONDS + 0.1):
        federation.run_counters.updates += 1
        shown.update(federation, now)
    assert stream.getvalue().count("version 0") == 2


def test_line_is_repeated_rarely_while_nothing_changes(federation: Federation) -> None:
    shown, stream = view(terminal=False)
    for now in range(0, int(IDLE_SECONDS) * 2, 2):
        shown.update(federation, float(now))
    assert stream.getvalue().count("version 0") == 2


def test_line_names_the_clients_that_are_missing(federation: Federation) -> None:
    shown, stream = view(terminal=False)
    federation.handle(ClientJoined("client-2", 10), 0.0)
    shown.update(federation, 0.0)
    assert "1 of 4 clients alive, waiting for 2 (missing: client-0, client-1, client-3)" in stream.getvalue()


def test_first_failure_of_a_kind_is_shown_once(federation: Federation) -> None:
    shown, stream = view(terminal=False)
    for client in range(4):
        federation.failures.abandoned(f"client-{client}", "failed", f"ValueError: client-{client}: row {client}")
        shown.update(federation, 0.0)
    federation.failures.abandoned("client-0", "failed", "KeyError: 'x'")
    shown.update(federation, 0.1)
    lines = [line for line in stream.getvalue().splitlines() if "training failed" in line]
    assert lines == [
        "client-0: training failed: ValueError: client-0: row 0",
        "client-0: training failed: KeyError: 'x'",
    ]


def test_quiet_shows_failures_and_no_mild_ones(federation: Federation) -> None:
    shown, stream = view(terminal=False, quiet=True)
    federation.failures.abandoned("client-0", "failed", "ValueError: no")
    federation.failures.rejected("client-1", "stale", "staleness 12")
    shown.update(federation, 0.0)
    assert stream.getvalue() == "client-0: training failed: ValueError: no\n"


def test_foreign_text_is_shown_as_it_is(federation: Federation) -> None:
    shown, stream = view(terminal=False)
    federation.failures.abandoned("client-0", "failed", "E: [red]a[/INST] :smile: \x1b[31m\udce9")
    shown.update(federation, 0.0)
    assert "E: [red]a[/INST] :smile: \\x1b[31m\\udce9\n" in stream.getvalue()


def test_line_counts_what_was_lost(federation: Federation) -> None:
    shown, stream = view(terminal=False)
    federation.rejected["non_finite"] = 3
    federation.abandoned.update({"failed": 2, "lapsed": 0})
    shown.update(federation, 0.0)
    assert "rejected 3 non_finite  abandoned 2 failed\n" in stream.getvalue()


def test_closed_pipe_silences_the_view_only(federation: Federation) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    console = PlainConsole()
    console.file = Closed()
    LiveView(CONFIG, False, console).update(federation, 0.0)
    assert console.quiet


def test_quiet_shows_nothing(federation: Federation) -> None:
    for terminal in (True, False):
        shown, stream = view(terminal, quiet=True)
        with shown:
            shown.update(federation, 0.0)
        assert stream.getvalue() == ""


def render(shown: LiveView, federation: Federation, now: float) -> str:
    stream = io.StringIO()
    Console(file=stream, width=100, color_system=None).print(shown._table(federation, now))
    return stream.getvalue()


def test_table_shows_rate_clients_metrics_target_and_losses(federation: Federation) -> None:
    shown, _ = view(terminal=True)
    federation.handle(ClientJoined("client-0", 10), 0.0)
    federation.run_counters.updates = 30
    federation.rejected["stale"] = 2
    federation.abandoned["lapsed"] = 1
    federation.evaluated = Evaluated(1, {"accuracy": 0.5, "loss": 2.0})
    shown.update(federation, 0.0)
    table = render(shown, federation, 10.0)
    for words in (
        "digits: fedbuff", "10.0 s", "0 (0 of 4 updates buffered)", "30 merged, 3.0/s", "1 of 4 alive", "waiting for 2",
        "2 stale", "1 lapsed", "0.5000 (target ≥ 0.95)", "2.0000",
    ):  # fmt: skip
        assert words in table


def test_table_at_time_zero_shows_no_rate(federation: Federation) -> None:
    assert "0 merged, 0.0/s" in render(view(terminal=True)[0], federation, 0.0)


def test_table_is_redrawn_on_a_terminal(federation: Federation) -> None:
    shown, stream = view(terminal=True)
    with shown:
        shown.update(federation, 0.0)
        once = stream.getvalue()
        shown.update(federation, REFRESH_SECONDS / 2)
        assert stream.getvalue() == once
        shown.update(federation, REFRESH_SECONDS)
        assert len(stream.getvalue()) > len(once)
    assert "digits: fedbuff" in once


def test_history_has_each_evaluation_once(federation: Federation) -> None:
    shown, _ = view(terminal=False)
    for version, accuracy in ((1, 0.1), (1, 0.1), (2, 0.2), (3, 0.3)):
        federation.evaluated = Evaluated(version, {"loss": 1.0, "accuracy": accuracy})
        shown.update(federation, 0.1)
    assert shown._history == [(1, 0.1), (2, 0.2), (3, 0.3)]


def test_metric_that_is_not_finite_is_shown_and_leaves_a_gap(federation: Federation) -> None:
    shown, stream = view(terminal=False)
    for version, loss in enumerate((1.0, float("nan"), 2.0), 1):
        federation.evaluated = Evaluated(version, {"loss": loss})
        shown.update(federation, 2.0 * version)
    assert "loss nan" in stream.getvalue()
    assert sparkline([value for _, value in shown._history]) == "▁ █"
    assert sparkline([float("nan")]) == ""


def test_evaluation_without_metrics_is_not_drawn(federation: Federation) -> None:
    shown, _ = view(terminal=False)
    federation.evaluated = Evaluated(1, {}, "the disk is full")
    shown.update(federation, 0.0)
    assert shown._history == []


@pytest.mark.parametrize(
    ("values", "bars"),
    [
        ([], ""),
        ([0.5], BARS[0]),
        ([2.0, 2.0], BARS[0] * 2),
        ([0.0, 1.0], BARS[0] + BARS[-1]),
        ([0.0, 3.0, 7.0], BARS[0] + BARS[3] + BARS[7]),
        ([1.0, -1.0], BARS[-1] + BARS[0]),
    ],
)
def test_sparkline_spans_the_lowest_to_the_highest_bar(values: list[Any], bars: Any) -> None:
    assert sparkline(values) == bars


def test_sparkline_shows_the_last_values() -> None:
    assert sparkline([9.0, 0.0, 1.0], width=2) == BARS[0] + BARS[-1]
    assert len(sparkline([float(i) for i in range(200)])) == 60

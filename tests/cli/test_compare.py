"""`fedqueue compare`: what it runs, how it counts, and the table and the picture that it leaves."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from fedqueue.config.loading import load_config
from fedqueue.errors import ConfigurationError, TaskError
from fedqueue_coordinator.cli.main import app
from fedqueue_coordinator.core.run_summary import RunResult
from fedqueue_coordinator.operator.compare import RunProgress, describe
from fedqueue_coordinator.operator.reports.comparison import draw, markdown, rows, spread
from fedqueue_coordinator.simulation.compare import (
    TUNING_SEEDS,
    Outcome,
    Point,
    Setup,
    Variant,
    best,
    compare,
    dealt_timings,
    grid,
    make_variants,
    outcome_of,
)
from fedqueue_coordinator.simulation.virtual_clock import TimingModel

TASK = Path(__file__).parents[1] / "runs" / "toy_task.py"
TARGET = {"accuracy": 0.9}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    config = tmp_path / "federation.toml"
    config.write_text(
        f'name = "toy"\n[task]\nentrypoint = "{TASK}:ToyTask"\n[clients]\ncount = 4\n'
        "[training]\nlearning_rate = 0.3\nbatch_size = 16\n[aggregation]\nbuffer_size = 2\n"
        "[stop]\nseconds = 9000\ntarget = { accuracy = 0.8 }\n"
    )
    return config


def setup_of(path, *overrides, updates=16):
    return Setup(path, overrides, TimingModel(batch_seconds=1.0), updates)


def nothing(name, federation):
    pass


# The command


def test_compare_runs_each_mode_with_each_seed_and_leaves_table_figures_and_picture(path, tmp_path):
    arguments = ["compare", str(path), "--modes", "fedavg,fedbuff", "--seeds", "2", "--updates", "12"]
    result = CliRunner().invoke(app, [*arguments, "--speeds", "1:3", "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    plain = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [(o["contender"], o["seed"], o["updates"]) for o in plain["outcomes"]] == [
        ("fedavg", 0, 12), ("fedavg", 1, 12), ("fedbuff", 0, 12), ("fedbuff", 1, 12),
    ]  # fmt: skip
    page = (tmp_path / "out" / "comparison.md").read_text()
    assert "| fedavg " in page
    assert "Virtual clock" in page
    assert "Virtual clock" in result.output
    assert all(f"{mode}, seed {seed}: target" in result.output for mode in ("fedavg", "fedbuff") for seed in (0, 1))
    assert "clients 1:3 times slower in turn" in page
    with Image.open(tmp_path / "out" / "comparison.png") as picture:
        assert picture.size[0] > 1000
    synchronous, asynchronous = (plain["outcomes"][i] for i in (0, 2))
    assert synchronous["seconds"] > asynchronous["seconds"]  # it waits for the slow ones
    assert synchronous["staleness"] == 0 < asynchronous["staleness"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--modes", "fedmagic"], "aggregation.mode"),
        (["--modes", "fedavg,fedavg"], "twice"),
        (["--tune", "training.learning_rate"], "--tune"),
        (["--speeds", "fast"], "--speeds"),
        (["--speeds", "0.5"], "clients.slowdown"),
        (["--variant", "compass"], "--variant"),
        (["--set", "stop.target={}"], "stop.target"),
    ],
)
def test_what_is_wrong_is_told_before_the_first_run(path, tmp_path, arguments, words):
    result = CliRunner().invoke(app, ["compare", str(path), *arguments, "--output", str(tmp_path / "out")])
    assert isinstance(result.exception, ConfigurationError)
    assert words in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_terminal_shows_which_run_is_on_and_how_it_goes(path):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    setup = setup_of(path)
    with RunProgress(console, 5) as progress:
        outcome = setup.run(make_variants("fedbuff")[0], 0, {}, progress.update)
        progress.say(describe(outcome))
    assert "run 1 of 5: fedbuff, seed 0" in screen.getvalue()
    assert "accuracy" in screen.getvalue()
    assert "16 updates" in screen.getvalue()


# What a contender is


def test_variant_is_a_contender_with_settings_of_its_own():
    assert make_variants("fedavg", ['big buffer: aggregation.mode=fedbuff "task.options={a = 1}"']) == [
        Variant("fedavg", ("aggregation.mode=fedavg",)),
        Variant("big buffer", ("aggregation.mode=fedbuff", "task.options={a = 1}")),
    ]


def test_without_modes_there_are_three_or_just_the_variants():
    assert [c.name for c in make_variants("")] == ["fedavg", "fedasync", "fedbuff"]
    assert [c.name for c in make_variants("", ["x: seed=1"])] == ["x"]
    with pytest.raises(ConfigurationError, match="names no mode"):
        make_variants(" , ")


def test_speeds_are_dealt_out_in_turn(path):
    config = load_config(path, dealt_timings(load_config(path), "1:2:4"))
    assert config.clients.slowdown == {"client-0": 1.0, "client-1": 2.0, "client-2": 4.0, "client-3": 1.0}


def test_target_does_not_end_a_run_and_every_mode_is_measured_after_as_many_updates(path):
    setup = setup_of(path)
    every = {}
    for contender in make_variants("fedavg,fedasync,fedbuff"):
        config = setup.config(contender, 0, {})
        assert not config.stop.target
        assert config.stop.updates == 16
        every[contender.name] = config.evaluation.every * config.buffer_size
    assert every == {"fedavg": 4, "fedasync": 4, "fedbuff": 4}


def test_updates_per_run_are_fifty_a_client_unless_the_configuration_or_the_command_says_otherwise(path):
    (contender,) = make_variants("fedbuff")
    assert setup_of(path, updates=0).config(contender, 0, {}).stop.updates == 200
    assert setup_of(path, "stop.updates=7", updates=0).config(contender, 0, {}).stop.updates == 7
    assert setup_of(path, "stop.updates=7", updates=5).config(contender, 0, {}).stop.updates == 5


def test_seed_goes_to_further_keys_too(path):
    setup = Setup(path, (), TimingModel(), 8, ("task.options.batch_seconds",))
    config = setup.config(make_variants("fedbuff")[0], 3, {"training.learning_rate": "0.25"})
    assert (config.seed, config.task.options["batch_seconds"], config.training.learning_rate) == (3, 3, 0.25)


def test_task_without_test_data_cannot_be_compared(path):
    setup = setup_of(path, f"task.entrypoint={Path(__file__).parent / 'untested_task.py'}:UntestedTask")
    with pytest.raises(TaskError, match="test_data"):
        setup.run(make_variants("fedbuff")[0], 0, {}, nothing)


# Tuning


def test_grid_is_every_combination():
    assert grid([]) == [{}]
    assert grid(["a.b=1,2", "c=x,y"]) == [
        {"a.b": "1", "c": "x"}, {"a.b": "1", "c": "y"}, {"a.b": "2", "c": "x"}, {"a.b": "2", "c": "y"},
    ]  # fmt: skip


def chosen(path, tune):
    """The setting with which the comparison itself is run, after the trials."""
    outcomes = list(compare(setup_of(path), make_variants("fedbuff"), 2, grid([tune]), nothing))
    assert [o.seed for o in outcomes if o.seed in TUNING_SEEDS] == [*TUNING_SEEDS] * (1 + tune.count(","))
    first, second = outcomes[-2:]
    assert (first.seed, second.seed) == (0, 1)
    assert first.tuned == second.tuned
    return first.tuned


def test_setting_that_learns_is_chosen_over_those_that_cannot(path):
    assert chosen(path, "training.learning_rate=1e-7,0.3,1e-6") == {"training.learning_rate": "0.3"}


def test_setting_that_diverges_is_not_chosen(path):
    assert chosen(path, "training.learning_rate=1e30,0.3") == {"training.learning_rate": "0.3"}


def test_sooner_is_better_than_ending_better_and_more_often_is_better_than_sooner():
    def trial(name, *outcomes):
        return [replace(made("m", seed, *o), tuned={"name": name}) for seed, o in enumerate(outcomes)]

    late, soon = trial("late", (3.0, 0.99), (3.0, 0.99)), trial("soon", (2.0, 0.91), (2.0, 0.91))
    once, never = trial("once", (0.1, 0.99), (None, 0.99)), trial("never", (None, 0.3), (None, 0.3))
    assert best([never, once, late, soon], TARGET) == {"name": "soon"}
    assert best([never, once, late], TARGET) == {"name": "late"}
    assert best([never, once], TARGET) == {"name": "once"}
    assert best([never, trial("better", (None, 0.4), (None, 0.4))], TARGET) == {"name": "better"}


# Counting


def test_outcome_says_when_the_target_was_first_met_and_what_was_lost():
    def version(number, seconds, *clients):
        merged = [{"client": client, "staleness": number} for client in clients]
        return {"kind": "version", "version": number, "seconds": seconds, "merged": merged}

    def evaluation(number, seconds, accuracy):
        return {"kind": "evaluation", "version": number, "seconds": seconds, "metrics": {"accuracy": accuracy}}

    ledger = [
        evaluation(0, 0.0, 0.1),
        version(1, 2.0, "a", "b"),
        evaluation(1, 2.0, 0.92),
        {"kind": "rejected", "reason": "stale", "seconds": 3.0},
        version(2, 4.0, "a", "a"),
        evaluation(2, 4.0, 0.85),
        {"kind": "abandoned", "reason": "run_ended", "seconds": 4.0},
    ]
    outcome = outcome_of(RunResult(2, None, "", False, ledger, {}, 6), "m", 7, {}, TARGET, ["a", "b", "c"])
    assert outcome.reached == Point(2.0, 2, {"accuracy": 0.92})
    assert outcome.final == Point(4.0, 4, {"accuracy": 0.85})
    assert (outcome.updates, outcome.versions, outcome.seconds, outcome.staleness) == (4, 2, 4.0, 1.5)
    assert outcome.shares == {"a": 0.75, "b": 0.25}
    assert outcome.lost == {"stale": 1}


def made(name, seed, reached, final, shares=None, metric="accuracy"):
    points = [Point(0.0, 0, {metric: 0.1}), Point(5.0, 50, {metric: final})]
    at = Point(reached, round(10 * reached), {metric: final}) if reached else None
    shares = shares or {"a": 0.75, "b": 0.25}
    return Outcome(name, seed, {}, 50, 10, 5.0, 1.0, ["a", "b"], shares, {"stale": 2}, at, points)


def test_table_has_mean_and_deviation_over_the_seeds_that_reached_the_target():
    outcomes = [made("x", 0, 2.0, 0.9), made("x", 1, 4.0, 0.94), made("x", 2, None, 0.5), made("y", 0, None, 0.3)]
    head, x, y = rows(outcomes, TARGET)
    table = dict(zip(head, x, strict=True))
    assert table == {
        "mode": "x", "reached": "2 of 3", "seconds": "3.0 ± 1.4", "updates": "30 ± 14",
        "final accuracy": "0.780 ± 0.243", "staleness": "1.0 ± 0.0", "least share": "25.0%", "lost": "2",
    }  # fmt: skip
    assert y[1:4] == ["0 of 1", "–", "–"]


def test_client_that_was_never_merged_has_the_least_share():
    assert rows([made("x", 0, 1.0, 0.9, {"a": 1.0})], TARGET)[1][-2] == "0.0%"


def test_spread_of_one_value_has_no_deviation():
    assert [spread([], 1), spread([1.25], 1), spread([1.0, 3.0], 0)] == ["–", "1.2", "2 ± 1"]


def test_markdown_is_a_table_whose_columns_stand_under_each_other():
    assert markdown([["mode", "n"], ["fedavg", "12"]]).splitlines() == [
        "| mode   | n  |",
        "|--------|----|",
        "| fedavg | 12 |",
    ]


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
@pytest.mark.parametrize("slowest", [4.0, 400.0])
def test_picture_shows_every_seed_whatever_was_reached(tmp_path, metric, slowest):
    def ink(outcomes):
        draw(tmp_path / "c.png", "title", outcomes, {metric: 0.9})
        with Image.open(tmp_path / "c.png") as picture:
            return sum(picture.convert("L").histogram()[:200])

    some = [made("x", 0, 2.0, 0.9, metric=metric), made("x", 1, slowest, 0.94, metric=metric)]
    more = [*some, made("y", 0, None, 0.8, metric=metric), made("z", 0, 3.0, 0.97, metric=metric)]
    assert ink(more) > 1.05 * ink(some) > 0

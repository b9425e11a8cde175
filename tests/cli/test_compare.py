"""`fedqueue compare`: the runs, the figures, and the written table and picture."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from fedqueue.config.loading import load_config
from fedqueue.errors import ConfigurationError, TaskError
from fedqueue_coordinator.cli.main import app
from fedqueue_coordinator.core.federation import Federation
from fedqueue_coordinator.core.run_summary import RunResult
from fedqueue_coordinator.operator.compare import RunProgress, describe
from fedqueue_coordinator.operator.compare_options import parse_axes, parse_strategies, parse_variant
from fedqueue_coordinator.operator.reports.comparison import markdown, problems, rows, spread
from fedqueue_coordinator.operator.reports.comparison_plot import draw
from fedqueue_coordinator.simulation.comparison import (
    TUNING_SEEDS,
    Outcome,
    Point,
    Setup,
    Variant,
    best,
    compare,
    grid,
    make_variants,
    outcome_of,
    slowdown_overrides,
)
from fedqueue_coordinator.simulation.virtual_clock import TimingModel
from tests.support import toy_task, untested_task
from tests.support.builders import make_frame

TASK = toy_task.__file__
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


def setup_of(path: Path, *overrides: str, updates: int = 16) -> Setup:
    return Setup(path, overrides, TimingModel(batch_seconds=1.0), updates)


def nothing(name: str, federation: Federation) -> None:
    pass


# The command


def test_compare_runs_each_mode_with_each_seed(path: Path, tmp_path: Path) -> None:
    arguments = ["compare", str(path), "--strategies", "fedavg,fedbuff", "--seeds", "2", "--updates", "12"]
    result = CliRunner().invoke(app, [*arguments, "--speeds", "1:3", "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    plain = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [(o["variant"], o["seed"], o["updates"]) for o in plain["outcomes"]] == [
        ("fedavg", 0, 12), ("fedavg", 1, 12), ("fedbuff", 0, 12), ("fedbuff", 1, 12),
    ]  # fmt: skip
    page = (tmp_path / "out" / "comparison.md").read_text()
    assert "| fedavg " in page
    assert "Virtual clock" in page
    assert "Virtual clock" in result.output
    assert all(
        f"{strategy}, seed {seed}: target" in result.output for strategy in ("fedavg", "fedbuff") for seed in (0, 1)
    )
    assert "Clients are 1:3 times slower, in turn" in page
    with Image.open(tmp_path / "out" / "comparison.png") as picture:
        assert picture.size[0] > 1000
    synchronous, asynchronous = (plain["outcomes"][i] for i in (0, 2))
    assert synchronous["seconds"] > asynchronous["seconds"]  # FedAvg waits for the slow clients
    assert synchronous["staleness"] == 0 < asynchronous["staleness"]


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (
            "def fit(self, model, data, config, progress): raise OSError('no [disk]')",
            "training failed: OSError: no [disk]",
        ),
        ("def train_data(self, client): raise OSError('no [disk]')", "failed: OSError: no [disk]; in train_data"),
        ("def evaluate(self, model, data): raise OSError('no [disk]')", "evaluation failed: OSError: no [disk]"),
    ],
)
def test_failures_are_named_below_the_table(path: Path, tmp_path: Path, method: str, reason: str) -> None:
    (tmp_path / "broken.py").write_text(
        f"from tests.support.toy_task import ToyTask\nclass Broken(ToyTask):\n    {method}\n"
    )
    arguments = ["compare", str(path), "--strategies", "fedbuff,fedasync", "--seeds", "1", "--updates", "8"]
    arguments += ["--set", "task.entrypoint=broken.py:Broken", "--set", "dispatch.max_client_failures=2"]
    result = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "out")])
    assert result.exit_code == 1, result.output
    below = result.output.partition("└")[2]
    assert reason in below
    for variant in ("fedbuff", "fedasync"):
        assert f"{variant}, seed 0 failed: " in below
    assert reason in (tmp_path / "out" / "comparison.md").read_text()


def test_client_without_an_update_is_named_below_the_table() -> None:
    lines = problems([made("x", 0, 2.0, 0.9, {"a": 1.0}), replace(made("y", 0, 2.0, 0.9), failures=["a: why"])])
    assert lines == ["x: no update from b in at least one run", "y: a: why"]


def test_comparison_does_not_touch_a_folder_of_others(path: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    result = CliRunner().invoke(app, ["compare", str(path), "--seeds", "1", "--output", str(tmp_path)])
    assert isinstance(result.exception, ConfigurationError)
    assert "no run of fedqueue made" in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--strategies", "fedmagic"], "aggregation.strategy"),
        (["--strategies", "fedavg,fedavg"], "twice"),
        (["--tune", "training.learning_rate"], "--tune"),
        (["--speeds", "fast"], "--speeds"),
        (["--speeds", "0.5"], "clients.slowdown"),
        (["--variant", "compass"], "--variant"),
        (["--set", "stop.target={}"], "stop.target"),
    ],
)
def test_invalid_settings_are_errors_before_the_first_run(
    path: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    result = CliRunner().invoke(app, ["compare", str(path), *arguments, "--output", str(tmp_path / "out")])
    assert isinstance(result.exception, ConfigurationError)
    assert words in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_terminal_shows_the_current_run_and_its_metrics(path: Path) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    setup = setup_of(path)
    with RunProgress(console, 5) as progress:
        outcome = setup.run(make_variants(["fedbuff"])[0], 0, {}, progress.update)
        progress.say(describe(outcome))
    assert "run 1 of 5: fedbuff, seed 0" in screen.getvalue()
    assert "accuracy" in screen.getvalue()
    assert "16 updates" in screen.getvalue()


# Variants


def test_variant_has_overrides_of_its_own() -> None:
    variant = parse_variant('big buffer: aggregation.strategy=fedbuff "task.options={a = 1}"')
    assert make_variants(["fedavg"], [variant]) == [
        Variant("fedavg", ("aggregation.strategy=fedavg",)),
        Variant("big buffer", ("aggregation.strategy=fedbuff", "task.options={a = 1}")),
    ]


def test_default_is_three_modes_or_only_the_given_variants() -> None:
    assert [c.name for c in make_variants(parse_strategies(""))] == ["fedavg", "fedasync", "fedbuff"]
    assert [c.name for c in make_variants(parse_strategies(""), masked=True)] == ["fedavg", "fedbuff"]
    assert [c.name for c in make_variants(parse_strategies(""), [parse_variant("x: seed=1")])] == ["x"]
    with pytest.raises(ConfigurationError, match="names no strategy"):
        make_variants(parse_strategies(" , "))


def test_speeds_are_assigned_to_the_clients_cyclically(path: Path) -> None:
    config = load_config(path, slowdown_overrides(load_config(path), (1, 2, 4)))
    assert config.clients.slowdown == {"client-0": 1.0, "client-1": 2.0, "client-2": 4.0, "client-3": 1.0}


def test_compare_measures_all_modes_after_equal_updates(path: Path) -> None:
    setup = setup_of(path)
    every = {}
    for variant in make_variants(["fedavg", "fedasync", "fedbuff"]):
        config = setup.config(variant, 0, {})
        assert not config.stop.target
        assert config.stop.updates == 16
        assert config.evaluation.every_versions is not None
        every[variant.name] = config.evaluation.every_versions * config.buffer_size
    assert every == {"fedavg": 4, "fedasync": 4, "fedbuff": 4}


def test_updates_per_run_default_to_fifty_per_client(path: Path) -> None:
    (variant,) = make_variants(["fedbuff"])
    assert setup_of(path, updates=0).config(variant, 0, {}).stop.updates == 200
    assert setup_of(path, "stop.updates=7", updates=0).config(variant, 0, {}).stop.updates == 7
    assert setup_of(path, "stop.updates=7", updates=5).config(variant, 0, {}).stop.updates == 5


def test_seed_is_set_for_additional_keys(path: Path) -> None:
    setup = Setup(path, (), TimingModel(), 8, ("task.options.batch_seconds",))
    config = setup.config(make_variants(["fedbuff"])[0], 3, {"training.learning_rate": "0.25"})
    assert (config.seed, config.task.options["batch_seconds"], config.training.learning_rate) == (3, 3, 0.25)


def test_task_without_test_data_cannot_be_compared(path: Path) -> None:
    setup = setup_of(path, f"task.entrypoint={untested_task.__file__}:UntestedTask")
    with pytest.raises(TaskError, match="test_data"):
        setup.run(make_variants(["fedbuff"])[0], 0, {}, nothing)


@pytest.mark.parametrize(
    ("target", "key", "words"),
    [
        ("stop.target={acc = 0.9}", "stop.target", "evaluate returned loss, accuracy"),
        ("stop.target={accuracy = 0.01}", "stop.target", "before any training already has accuracy"),
        ("compare.target={acc = 0.9}", "compare.target", "evaluate returned loss, accuracy"),
    ],
)
def test_target_that_tells_nothing_cannot_be_compared(path: Path, target: str, key: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words) as caught:
        setup_of(path, target).run(make_variants(["fedbuff"])[0], 0, {}, nothing)
    assert caught.value.key == key


# Tuning


def test_grid_is_every_combination() -> None:
    assert grid({}) == [{}]
    assert grid(parse_axes(["a.b=1,2", "c=x,y"])) == [
        {"a.b": "1", "c": "x"}, {"a.b": "1", "c": "y"}, {"a.b": "2", "c": "x"}, {"a.b": "2", "c": "y"},
    ]  # fmt: skip


def chosen(path: Path, tune: str) -> Mapping[str, str]:
    """Return the setting that the trials chose for the comparison."""
    outcomes = list(compare(setup_of(path), make_variants(["fedbuff"]), 2, grid(parse_axes([tune])), nothing))
    assert [o.seed for o in outcomes if o.seed in TUNING_SEEDS] == [*TUNING_SEEDS] * (1 + tune.count(","))
    first, second = outcomes[-2:]
    assert (first.seed, second.seed) == (0, 1)
    assert first.tuned == second.tuned
    return first.tuned


def test_tuning_chooses_the_setting_that_learns(path: Path) -> None:
    assert chosen(path, "training.learning_rate=1e-7,0.3,1e-6") == {"training.learning_rate": "0.3"}


def test_tuning_does_not_choose_a_diverging_setting(path: Path) -> None:
    assert chosen(path, "training.learning_rate=1e30,0.3") == {"training.learning_rate": "0.3"}


def test_best_trial_reaches_the_target_most_often_then_soonest() -> None:
    def trial(name: Any, *outcomes: Any) -> Any:
        return [replace(made("m", seed, *o), tuned={"name": name}) for seed, o in enumerate(outcomes)]

    late, soon = trial("late", (3.0, 0.99), (3.0, 0.99)), trial("soon", (2.0, 0.91), (2.0, 0.91))
    once, never = trial("once", (0.1, 0.99), (None, 0.99)), trial("never", (None, 0.3), (None, 0.3))
    assert best([never, once, late, soon], TARGET) == {"name": "soon"}
    assert best([never, once, late], TARGET) == {"name": "late"}
    assert best([never, once], TARGET) == {"name": "once"}
    assert best([never, trial("better", (None, 0.4), (None, 0.4))], TARGET) == {"name": "better"}


# Figures


def test_outcome_has_the_first_evaluation_at_the_target() -> None:
    def version(number: Any, seconds: Any, *clients: Any) -> dict[str, Any]:
        merged = [{"client": client, "staleness": number} for client in clients]
        return {"kind": "version", "version": number, "seconds": seconds, "merged": merged}

    def evaluation(number: Any, seconds: Any, accuracy: Any) -> dict[str, Any]:
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
    outcome = outcome_of(RunResult(2, make_frame(), "", False, ledger, {}, 6), "m", 7, {}, TARGET, ["a", "b", "c"])
    assert outcome.reached == Point(2.0, 2, {"accuracy": 0.92})
    assert outcome.final == Point(4.0, 4, {"accuracy": 0.85})
    assert (outcome.updates, outcome.versions, outcome.seconds, outcome.staleness) == (4, 2, 4.0, 1.5)
    assert outcome.shares == {"a": 0.75, "b": 0.25}
    assert outcome.lost == {"stale": 1}


def made(
    name: str,
    seed: int,
    reached: float | None,
    final: float,
    shares: dict[str, Any] | None = None,
    metric: str = "accuracy",
) -> Outcome:
    points = [Point(0.0, 0, {metric: 0.1}), Point(5.0, 50, {metric: final})]
    at = Point(reached, round(10 * reached), {metric: final}) if reached else None
    shares = shares or {"a": 0.75, "b": 0.25}
    return Outcome(name, seed, {}, 50, 10, 5.0, 1.0, ["a", "b"], shares, {"stale": 2}, at, points)


def test_table_has_mean_and_deviation_over_successful_seeds() -> None:
    outcomes = [made("x", 0, 2.0, 0.9), made("x", 1, 4.0, 0.94), made("x", 2, None, 0.5), made("y", 0, None, 0.3)]
    head, x, y = rows(outcomes, TARGET)
    table = dict(zip(head, x, strict=True))
    assert table == {
        "variant": "x", "reached": "2 of 3", "seconds": "3.0 ± 1.4", "updates": "30 ± 14",
        "final accuracy": "0.780 ± 0.243", "staleness": "1.0 ± 0.0", "least share": "25.0%", "lost": "2",
    }  # fmt: skip
    assert y[1:4] == ["0 of 1", "–", "–"]


def test_smallest_share_is_zero_if_a_client_was_never_merged() -> None:
    assert rows([made("x", 0, 1.0, 0.9, {"a": 1.0})], TARGET)[1][-2] == "0.0%"


def test_spread_of_one_value_has_no_deviation() -> None:
    assert [spread([], 1), spread([1.25], 1), spread([1.0, 3.0], 0)] == ["–", "1.2", "2 ± 1"]


def test_markdown_table_has_aligned_columns() -> None:
    assert markdown([["variant", "n"], ["fedavg", "12"]]).splitlines() == [
        "| variant | n  |",
        "|---------|----|",
        "| fedavg  | 12 |",
    ]


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
@pytest.mark.parametrize("slowest", [4.0, 400.0])
def test_picture_shows_every_seed_even_below_the_target(tmp_path: Path, metric: str, slowest: float) -> None:
    def ink(outcomes: Any) -> Any:
        draw(tmp_path / "c.png", "title", outcomes, {metric: 0.9})
        with Image.open(tmp_path / "c.png") as picture:
            return sum(picture.convert("L").histogram()[:200])

    some = [made("x", 0, 2.0, 0.9, metric=metric), made("x", 1, slowest, 0.94, metric=metric)]
    more = [*some, made("y", 0, None, 0.8, metric=metric), made("z", 0, 3.0, 0.97, metric=metric)]
    assert ink(more) > 1.05 * ink(some) > 0

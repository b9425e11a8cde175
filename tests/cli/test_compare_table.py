"""The section [compare] of the configuration, and the options that override it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedqueue.config.loading import load_config, override_config
from fedqueue.errors import ConfigurationError
from fedqueue_coordinator.simulation.comparison import dotted, grid, table_axes, table_variants, toml_text
from tests.support import toy_task
from tests.support.command_line import CommandLine

CONFIG = f"""
name = "toy"
task.entrypoint = "{toy_task.__file__}:ToyTask"
clients.count = 4
stop = {{ seconds = 9000 }}
[training]
learning_rate = 0.3
batch_size = 16
[aggregation]
strategy = "fedbuff"
buffer_size = 2
[compare]
seeds = 1
updates = 8
speeds = [1, 3]
target = {{ accuracy = 0.8 }}
[compare.variants.small]
aggregation.buffer_size = 1
[compare.variants."large, 0.1"]
aggregation.buffer_size = 4
training.learning_rate = 0.1
"""


@pytest.fixture
def path(folder: Path) -> Path:
    (folder / "federation.toml").write_text(CONFIG)
    return folder / "federation.toml"


def compared(call: CommandLine, *options: object) -> tuple[dict[str, Any], str]:
    """Return the figures and the page of a comparison."""
    code, _, err = call("compare", "federation.toml", "--output", "out", *options)
    assert code == 0, err
    return json.loads(Path("out/comparison.json").read_text()), Path("out/comparison.md").read_text()


def test_compare_runs_what_the_section_says(call: CommandLine, path: Path) -> None:
    figures, page = compared(call)
    assert [(o["variant"], o["seed"], o["updates"], o["versions"]) for o in figures["outcomes"]] == [
        ("small", 0, 8, 8), ("large, 0.1", 0, 8, 2),
    ]  # fmt: skip
    assert "Clients are 1:3 times slower, in turn" in page
    assert "accuracy" in page


def test_options_override_the_section(call: CommandLine, path: Path) -> None:
    figures, page = compared(call, "--strategies", "fedasync", "--seeds", 2, "--updates", 5, "--speeds", "2")
    assert [(o["variant"], o["seed"], o["updates"]) for o in figures["outcomes"]] == [
        ("fedasync", 0, 5), ("fedasync", 1, 5),
    ]  # fmt: skip
    assert "Clients are 2 times slower, in turn" in page


def test_section_and_set_tune_the_variants(call: CommandLine, path: Path) -> None:
    figures, page = compared(
        call, "--variant", "x: aggregation.buffer_size=2", "-s", "compare.tune.training.learning_rate=[1e-7, 0.3]"
    )
    assert [o["tuned"] for o in figures["outcomes"]] == [{"training.learning_rate": "0.3"}]
    assert "training.learning_rate=1e-07,0.3" in page
    assert "tuned" not in json.dumps(compared(call, "--variant", "x: seed=0")[0]["outcomes"][0]["tuned"])


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("compare.tune.training.learning_rate=0.3", "compare.tune.training.learning_rate"),
        ("compare.strategies=[]", "names no strategy"),
        ("compare.strategies=['small']", "occurs twice"),
        ("compare.variants.small.aggregation.buffer=2", "aggregation.buffer"),
        ("compare.speeds=[0.5]", "compare.speeds"),
        ("compare.seed=2", "did you mean 'seeds'"),
    ],
)
def test_invalid_section_is_an_error_before_the_first_run(
    call: CommandLine, path: Path, setting: str, words: str
) -> None:
    override = [] if "strategies=[]" not in setting else ["-s", "compare.variants={}"]
    code, _, err = call("compare", "federation.toml", "-s", setting, *override)
    assert code == 2
    assert words in err
    assert not Path("runs").exists()


def test_comparison_is_no_part_of_a_run(path: Path) -> None:
    """So a run is resumed after the section was changed, and no site learns of it."""
    config = load_config(path)
    assert config.compare.seeds == 1
    assert "compare" not in config.model_dump(mode="json")


@pytest.mark.parametrize("value", [True, 3, 0.1, 1e30, "sgd", "a b", "2024", "true", 'q"', "é", [1, "x"], {"a": "1"}])
def test_value_of_the_section_is_the_same_as_an_override(value: Any) -> None:
    tree = {"task": {"entrypoint": "t:T"}, "stop": {"versions": 1}}
    assert override_config(tree, [f"task.options.x={toml_text(value)}"], {}).task.options == {"x": value}


def test_nested_tables_become_dotted_keys() -> None:
    tables = {"a": {"aggregation": {"strategy": "fedbuff", "staleness": {"a": 1.0}}, "x.y": True}}
    assert [(v.name, v.overrides) for v in table_variants(tables)] == [
        ("a", ("aggregation.strategy=fedbuff", "aggregation.staleness.a=1.0", "x.y=true")),
    ]  # fmt: skip
    assert dotted({"task": {"options": {}}}) == {"task.options": {}}
    assert grid(table_axes({"a": {"b": [1, "x"]}})) == [{"a.b": "1"}, {"a.b": "x"}]
    with pytest.raises(ConfigurationError, match="list"):
        table_axes({"a": {"b": []}})

"""`fedqueue describe`: what a user reads before training, and what the task gets of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fedqueue.config.loading import load_config
from fedqueue.errors import ConfigurationError, TaskError
from fedqueue.task import load_task, prepare_task
from tests.support.command_line import CommandLine

TASK = """
import numpy as np
from fedqueue import Task

def ages(client):
    return np.random.default_rng(len(client.id)).normal(50, 10, 40 * len(client.id)).round()

class Rows(Task):
    def table(self, client):
        if client.id == "closed":
            raise PermissionError("no disk")
        return {"age": ages(client), "old": ages(client) > 50}

    def prepare(self, statistics):
        self.mean = statistics.numbers("age").mean

class Bare(Task):
    pass
"""
CONFIG = """
name = "rows"
[task]
entrypoint = "rows_task.py:Rows"
[clients]
names = ["a", "bb", "ccc"]
[stop]
versions = 2
"""


@pytest.fixture
def config(folder: Path) -> Path:
    (folder / "rows_task.py").write_text(TASK)
    path = folder / "federation.toml"
    path.write_text(CONFIG)
    return path


def pooled() -> np.ndarray:
    return np.concatenate([np.random.default_rng(n).normal(50, 10, 40 * n).round() for n in (1, 2, 3)])


def test_json_has_the_statistics_of_the_pooled_rows(call: CommandLine, config: Path, folder: Path) -> None:
    code, out, _ = call("describe", config, "--json")
    found = json.loads(out)
    assert code == 0
    assert found == json.loads((folder / "describe.json").read_text())
    age, rows = found["columns"]["age"], pooled()
    assert (age["count"], age["missing"], age["mean"]) == (240, 0, rows.mean())
    assert age["variance"] == pytest.approx(rows.var(ddof=1), rel=1e-14)
    assert age["quantiles"]["0.5"]["low"] <= np.median(rows) <= age["quantiles"]["0.5"]["high"]
    assert found["columns"]["old"]["counts"]["True"] == int((rows > 50).sum())
    assert (folder / "describe.png").stat().st_size > 10_000


def test_table_names_what_is_left_out(call: CommandLine, config: Path) -> None:
    code, out, _ = call("describe", config, "--set", "statistics.min_count=50")
    assert code == 0
    assert "a is left out: its table has fewer than 50 rows" in out
    assert "rows: 200 rows at 2 sites" in out


def test_a_client_that_cannot_answer_is_named(call: CommandLine, config: Path) -> None:
    code, out, _ = call("describe", config, "--set", "clients.names=['a', 'bb', 'closed']")
    assert code == 1
    assert "closed answered nothing: PermissionError: no disk" in out


def test_a_task_without_table_is_told_what_to_add(call: CommandLine, config: Path) -> None:
    code, _, err = call("describe", config, "--set", "task.entrypoint=rows_task.py:Bare")
    assert code == 2
    assert "Bare must define table(self, client) -> Mapping[str, ndarray]" in err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["-o", "/proc/x.json"], "--output = '/proc/x.json': cannot be written"),
        (["-o", "x.png"], "--output = 'x.png': is no JSON file"),
        (
            ["-s", "statistics.bounds={agee=[0, 9]}"],
            "statistics.bounds: names 'agee', which no site describes; did you",
        ),
        (["-s", "statistics.bounds={age=[9, 0]}"], "statistics: bounds.age is [9, 0]"),
    ],
)
def test_words_that_cannot_be_followed_are_named(call: CommandLine, config: Path, words: list[str], line: str) -> None:
    code, _, err = call("describe", config, *words)
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"fedqueue: {line}")


def test_clients_with_too_few_rows_are_a_failure(call: CommandLine, config: Path) -> None:
    assert call("describe", config, "-s", "statistics.min_count=500")[0] == 1


@pytest.mark.parametrize(
    ("sets", "key"),
    [
        (["secure.keepers=['court', 'office']", "aggregation.buffer_size=3"], "secure.keepers"),
        (["privacy.examples={max_grad_norm=1.0, noise_multiplier=1.0, delta=1e-5}"], "privacy.examples"),
    ],
)
def test_runs_with_further_promises_are_refused(call: CommandLine, config: Path, sets: list[str], key: str) -> None:
    code, _, err = call("describe", config, *(word for text in sets for word in ("--set", text)))
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"fedqueue: {key}")


def test_statistics_travel_in_the_configuration(call: CommandLine, config: Path, folder: Path) -> None:
    config.write_text(CONFIG + '[statistics]\nfile = "data/statistics.json"\n')
    assert call("describe", config)[0] == 0
    assert (folder / "data" / "statistics.json").exists()
    settings = load_config(config, environment={})
    task = load_task(settings.task.entrypoint, {}, folder)
    carried = prepare_task(task, settings)
    assert task.mean == pooled().mean()  # type: ignore[attr-defined]
    elsewhere = load_task(settings.task.entrypoint, {}, folder)
    prepare_task(elsewhere, type(settings).model_validate_json(carried.model_dump_json()))
    assert elsewhere.mean == task.mean  # type: ignore[attr-defined]


def test_a_task_without_prepare_is_told_what_to_add(call: CommandLine, config: Path, folder: Path) -> None:
    assert call("describe", config)[0] == 0
    settings = load_config(config, ["statistics.file=describe.json"], {})
    bare = load_task("rows_task.py:Bare", {}, folder)
    with pytest.raises(TaskError, match=r"Bare must define prepare\(self, statistics\)"):
        prepare_task(bare, settings)


@pytest.mark.parametrize(
    ("content", "problem"), [(None, "cannot be read"), ("{", "is not JSON"), ("[]", "has no stat")]
)
def test_a_file_without_statistics_is_named(config: Path, folder: Path, content: str | None, problem: str) -> None:
    if content is not None:
        (folder / "s.json").write_text(content)
    with pytest.raises(ConfigurationError, match=problem):
        load_config(config, ["statistics.file=s.json"], {}).with_statistics()


def test_statistics_of_another_form_are_named(config: Path, folder: Path) -> None:
    (folder / "s.json").write_text('{"columns": {}}')
    settings = load_config(config, ["statistics.file=s.json"], {})
    with pytest.raises(ConfigurationError, match="has no valid statistics: run: Field required"):
        prepare_task(load_task("rows_task.py:Rows", {}, folder), settings)

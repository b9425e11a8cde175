"""The public face: `fedqueue.__all__`, its documentation, and runs from a script, a module and a notebook cell."""

from __future__ import annotations

import ast
import asyncio
import doctest
import importlib
import json
import random
import re
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedqueue
from fedqueue.config.entrypoint import import_entrypoint
from fedqueue.config.loading import parse_config
from fedqueue_coordinator.operator.run_folder import LAUNCH_CONFIG_FILENAME, SCRIPT_COPY
from fedqueue_coordinator.operator.task_source import find_entrypoint
from fedqueue_coordinator.operator.toml_text import toml_document, toml_value

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "examples" / "digits"
NAMES = [name for name in fedqueue.__all__ if name != "__version__"]
MARKS = {
    "run": [pytest.mark.slow, pytest.mark.server],
    "ServerUnavailable": [pytest.mark.slow],  # five seconds of retries
}

LINE = """
import torch
import fedqueue

SLOPE = 2.0

class Line(fedqueue.Task):
    def __init__(self, slope=SLOPE):
        self.slope = slope

    def model(self):
        return torch.nn.Linear(1, 1)

    def train_data(self, client):
        x = torch.linspace(client.partition, client.partition + 1, 64).unsqueeze(1)
        return torch.utils.data.TensorDataset(x, self.slope * x + 1)

    def test_data(self):
        return torch.zeros(8, 1)

    def loss(self, model, batch):
        return torch.nn.functional.mse_loss(model(batch[0]), batch[1])

    def evaluate(self, model, data):
        return {"offset": float(model(data).detach().mean())}
"""


@pytest.fixture
def cell() -> dict[str, Any]:
    """Return a notebook's names after the cell LINE; the cell's class is in no file and in no module."""
    namespace = {"__name__": "__main__"}
    exec(compile(LINE, "<ipython-input-1>", "exec"), namespace)
    return namespace


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Return the class Line of a separate, imported module."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "line_module.py").write_text(LINE)
    monkeypatch.syspath_prepend(str(folder))
    yield importlib.import_module("line_module").Line
    del sys.modules["line_module"]


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Change to a folder of the test, where runs write their files."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# The table of contents


def documented() -> list[str]:
    """Return the names in the table of the package's docstring."""
    rows = [line for line in fedqueue.__doc__.splitlines() if line.startswith("| ")][1:]
    return [name for row in rows for name in re.findall(r"`(\w+)`", row)]


def stubbed() -> list[str]:
    body = ast.parse((Path(fedqueue.__file__).parent / "__init__.pyi").read_text()).body
    return [alias.asname or alias.name for node in body if isinstance(node, ast.ImportFrom) for alias in node.names]


def test_public_names_match_the_table_and_the_stub() -> None:
    assert len(NAMES) == len(set(NAMES)) > 20
    assert sorted(documented()) == NAMES
    assert sorted(stubbed()) == NAMES
    assert set(fedqueue.__all__) <= set(dir(fedqueue))


def test_stub_imports_each_name_from_the_module_that_has_it() -> None:
    stub = (ROOT / "shared/fedqueue/__init__.pyi").read_text()
    for name in NAMES:
        [where] = re.findall(rf"^from (\S+) import {name} as {name}$", stub, re.M)
        assert getattr(__import__(where, fromlist=[name]), name) is getattr(fedqueue, name)


@pytest.mark.parametrize("name", [pytest.param(n, marks=MARKS.get(n, [])) for n in NAMES])
def test_example_in_the_docstring_of_each_name_runs(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = getattr(fedqueue, name).__doc__
    example = doctest.DocTestParser().get_doctest(text, {}, name, None, None)
    assert example.examples, f"{name} has no example"
    said: list[str] = []
    doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS).run(example, out=said.append)
    assert not said, "".join(said)


def test_unknown_name_is_an_error_that_lists_the_names() -> None:
    with pytest.raises(AttributeError, match=r"has no attribute 'Fit'; it has: .*TrainResult"):
        fedqueue.Fit  # type: ignore[attr-defined]  # noqa: B018


WITHOUT_COORDINATOR = """
import sys
sys.modules["fedqueue_coordinator"] = None  # as if it was not installed
import fedqueue
fedqueue.Task, fedqueue.TrainingConfig, fedqueue.partition
try:
    from fedqueue import simulate
except fedqueue.FedqueueError as error:
    print(error)
"""


@pytest.mark.slow
def test_name_of_a_part_that_is_not_installed_is_one_line() -> None:
    done = python("-c", WITHOUT_COORDINATOR)
    assert (done.returncode, done.stdout) == (
        0,
        "fedqueue.simulate needs fedqueue_coordinator: pip install 'fedqueue[coordinator]'\n",
    ), done.stderr


def python(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, timeout=60)


# simulate


def test_simulation_in_a_notebook_cell_returns_a_result(cell: dict[str, Any]) -> None:
    async def in_a_running_loop() -> None:
        exec("result = fedqueue.simulate(Line, clients=3, versions=6, strategy='fedbuff', seed=3)", cell)

    asyncio.run(in_a_running_loop())
    result = cell["result"]
    assert (result.version, result.failed, result.folder, result.ledger_path) == (6, False, None, None)
    assert result.stopped_because.startswith("versions")
    assert [point["version"] for point in result.history] == [0, 1, 2, 3, 4, 5, 6]
    assert {"seconds", "offset"} < set(result.history[0])
    cell["Line"]().model().load_state_dict(result.state_dict())


def numpy_state() -> list[int]:
    words: list[int] = np.random.get_state(legacy=False)["state"]["key"].tolist()
    return words


def test_simulation_repeats_its_bits_and_restores_torch(line: Any) -> None:
    torch.manual_seed(5)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    others = random.getstate(), numpy_state()
    first, second = (fedqueue.simulate(line, clients=3, versions=4) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert (random.getstate(), numpy_state()) == others
    assert first.ledger == second.ledger
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])


def test_simulation_with_a_folder_writes_what_a_run_writes(line: Any, own_folder: Any) -> None:
    result = fedqueue.simulate(line, clients=2, versions=3, folder=own_folder / "results")
    assert result.ledger_path == own_folder / "results" / "ledger.jsonl"
    assert result.ledger_path is not None
    records = [json.loads(text) for text in result.ledger_path.read_text().splitlines()]
    assert sum(record["kind"] == "version" for record in records) == 3
    assert json.loads((own_folder / "results" / "summary.json").read_text())["history"] == result.history


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(lambda: DIGITS / "federation.toml", id="path"),
        pytest.param(lambda: str(DIGITS / "federation.toml"), id="text"),
        pytest.param(lambda: fedqueue.load_config(DIGITS / "federation.toml"), id="Config"),
        pytest.param(lambda: tomllib.loads((DIGITS / "federation.toml").read_text()), id="dict"),
    ],
)
def test_every_form_of_a_configuration_is_the_same_run(
    source: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(DIGITS)
    settings: dict[str, Any] = {
        "versions": 2,
        "training": {"local_epochs": 1},
        "options": {"model": "mlp", "scheme": "iid"},
    }
    result = fedqueue.simulate(source(), **settings)
    expected = fedqueue.simulate(DIGITS / "federation.toml", **settings)
    assert result.version == 2
    assert result.ledger == expected.ledger


def test_task_class_with_options_equals_an_instance(line: Any) -> None:
    by_class = fedqueue.simulate(line, clients=2, versions=2, options={"slope": -3.0})
    by_instance = fedqueue.simulate(line(slope=-3.0), clients=2, versions=2)
    plain = fedqueue.simulate(line, clients=2, versions=2)
    assert torch.equal(by_class.state_dict()["weight"], by_instance.state_dict()["weight"])
    assert not torch.equal(by_class.state_dict()["weight"], plain.state_dict()["weight"])


# Settings


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({}, "set at least one of versions, updates, seconds and target"),
        ({"versions": 2, "trainng": {"local_epochs": 1}}, "unknown key; did you mean 'training'?"),
        ({"versions": 2, "training": {"local_epoch": 1}}, "unknown key; did you mean 'local_epochs'?"),
        ({"versions": -1}, "stop.versions = -1"),
        ({"versions": 2, "strategy": "fedbuf"}, "aggregation.strategy = 'fedbuf'"),
        ({"versions": 2, "clients": object()}, "type object has no form in TOML"),
    ],
)
def test_setting_that_is_not_accepted_is_named(line: Any, settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(fedqueue.ConfigurationError) as caught:
        fedqueue.simulate(line, **settings)
    assert problem in str(caught.value)


@pytest.mark.parametrize("source", [7, int, None])
def test_source_of_another_kind_is_an_error(source: Any) -> None:
    with pytest.raises(fedqueue.ConfigurationError, match="a dict, a Config, or a Task"):
        fedqueue.simulate(source, versions=1)


def test_settings_override_tables_key_by_key(line: Any) -> None:
    config = {"task": {"entrypoint": "x:Y"}, "clients": {"names": ["a", "b"]}, "training": {"batch_size": 8}}
    config["stop"] = {"versions": 1}
    named = fedqueue.simulate(line, clients=["a", "b"], versions=1)
    assert {record["client"] for record in named.ledger if "client" in record} <= {"a", "b"}
    base = parse_config(config)
    counted = fedqueue.simulate(
        {**config, "task": {"entrypoint": "line_module:Line"}},
        clients=3,
        training=fedqueue.TrainingConfig(local_epochs=2),
    )
    versions = [record for record in counted.ledger if record["kind"] == "version"]
    merged = {entry["client"] for record in versions for entry in record["merged"]}
    assert base.clients.ids == ("a", "b")
    assert merged <= {"client-0", "client-1", "client-2"}


def test_none_is_written_as_the_word_that_the_key_takes(line: Any) -> None:
    config = fedqueue.Config(task={"entrypoint": "line_module:Line"}, stop={"versions": None, "updates": 4})
    by_config = fedqueue.simulate(config, clients=2)
    by_setting = fedqueue.simulate(line, clients=2, updates=4, versions=None, training={"local_steps": None})
    assert [record["kind"] for record in by_config.ledger] == [record["kind"] for record in by_setting.ledger]
    with pytest.raises(fedqueue.ConfigurationError, match="type NoneType has no form in TOML"):
        fedqueue.simulate(line, versions=1, seed=None)


TREE = {
    "name": 'quotes " and \\ and \x7f and \n',
    "nothing": None,
    "section": {"whole": 3, "real": 0.1, "no": False, "list": [1, "two"], "odd key.": {"deep": [{"a": 1e-7}]}},
}


def test_values_become_toml_that_reads_back_as_the_same() -> None:
    document = {key: value for key, value in TREE.items() if value is not None}
    assert tomllib.loads(toml_document(document)) == document
    assert toml_value(float("inf"), "x") == "inf"
    assert toml_value(torch.tensor([1.0]).numpy()[0], "x") == "1.0"
    assert tomllib.loads(f"x = {toml_value({'a': None, 'b': Path('p')}, 'x')}") == {"x": {"b": "p"}}
    with pytest.raises(fedqueue.ConfigurationError, match=r"a\.b = b'x': type bytes has no form in TOML"):
        toml_value({"b": b"x"}, "a")


# Where worker processes find a task


def test_run_refuses_a_class_of_a_notebook_cell_with_advice(cell: dict[str, Any], own_folder: Any) -> None:
    with pytest.raises(fedqueue.TaskError, match=r"%%writefile task.py.*fedqueue.simulate"):
        fedqueue.run(cell["Line"], versions=1)
    with pytest.raises(fedqueue.TaskError, match="a notebook or an interactive session"):
        fedqueue.run(cell["Line"](), versions=1)


def test_class_inside_a_function_is_refused() -> None:
    class Inner(fedqueue.Task):
        pass

    with pytest.raises(fedqueue.TaskError, match="at the top level of a file"):
        find_entrypoint(Inner, Path())


def test_class_of_a_module_is_found_in_its_file(line: Any, own_folder: Any) -> None:
    entrypoint = find_entrypoint(line, own_folder)
    assert entrypoint == "modules/line_module.py:Line"
    assert import_entrypoint(entrypoint, own_folder, "task")[0].SLOPE == 2.0


def test_class_of_a_package_is_found_by_the_name_of_its_module(
    monkeypatch: pytest.MonkeyPatch, own_folder: Any
) -> None:
    (own_folder / "line_package").mkdir()
    (own_folder / "line_package" / "__init__.py").write_text("")
    (own_folder / "line_package" / "tasks.py").write_text(LINE)
    monkeypatch.syspath_prepend(str(own_folder))
    cls = importlib.import_module("line_package.tasks").Line
    assert find_entrypoint(cls, own_folder / "elsewhere") == "line_package.tasks:Line"


def test_run_refuses_an_instance_with_arguments(own_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (own_folder / "needy_module.py").write_text(LINE.replace("slope=SLOPE", "slope"))
    monkeypatch.syspath_prepend(str(own_folder))
    cls = importlib.import_module("needy_module").Line
    with pytest.raises(fedqueue.TaskError, match=r"pass the class Line .* as options=\{…\}, not an instance"):
        fedqueue.run(cls(2.0), versions=1)
    with pytest.raises(fedqueue.TaskError, match="missing 1 required positional argument: 'slope'"):
        fedqueue.run(cls, versions=1)


@pytest.mark.parametrize("function", ["run", "simulate"])
def test_run_that_starts_while_a_task_is_imported_is_refused(own_folder: Any, function: str) -> None:
    source = f"{LINE}\nfedqueue.{function}(Line, versions=1)\n"
    (own_folder / "unguarded.py").write_text(source)
    with pytest.raises(fedqueue.TaskError, match=r"starts a run while it is imported.*__main__"):
        fedqueue.simulate({"task": {"entrypoint": "unguarded.py:Line"}, "stop": {"versions": 1}})


BELOW = """
import fedqueue

first = {0}
{1}
fedqueue.run(Line, versions=1)
"""


@pytest.mark.slow
def test_class_below_the_first_run_of_its_script_is_an_error(own_folder: Any) -> None:
    (own_folder / "below.py").write_text(BELOW.format("fedqueue.simulate(dict, versions=1) if False else 1", LINE))
    done = python("below.py")
    assert done.returncode == 1
    assert "class Line must be defined at the top level, above the first call of fedqueue.run" in done.stderr


SCRIPT = '''"""A script with its own task."""
from __future__ import annotations
{line}
print("imported by", __name__)
before = fedqueue.simulate(Line, clients=2, versions=1)
result = fedqueue.run(
    Line, clients=2, versions=3, workers=2, strategy="fedavg", folder="results", dispatch={{"lease_seconds": 5}}
)
print(result.version, result.failed, result.folder, sorted(result.state_dict()), len(result.history))
'''


@pytest.mark.slow
@pytest.mark.server
def test_unguarded_script_with_its_own_task_runs_with_workers(own_folder: Any) -> None:
    (own_folder / "script.py").write_text(SCRIPT.format(line=LINE))
    done = python("script.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["imported by __main__", "3 False results ['bias', 'weight'] 4"]
    results = own_folder / "results"
    assert (results / "model.safetensors").exists()
    assert not (results / "redis").exists()
    copy = (results / SCRIPT_COPY).read_text()
    assert "class Line" in copy
    assert "fedqueue.simulate" not in copy
    assert tomllib.loads((results / LAUNCH_CONFIG_FILENAME).read_text())["task"]["entrypoint"] == f"{SCRIPT_COPY}:Line"


@pytest.mark.slow
@pytest.mark.server
def test_run_of_a_dict_in_a_notebook_cell_with_a_running_loop(own_folder: Any, line: Any) -> None:
    (own_folder / "line_task.py").write_text(LINE)
    config = {"name": "cell", "task": {"entrypoint": "line_task.py:Line"}, "stop": {"versions": 2}}
    namespace: dict[str, Any] = {"__name__": "__main__", "config": config}

    async def in_a_running_loop() -> None:
        exec("import fedqueue\nresult = fedqueue.run(config, clients=2, workers=1)", namespace)

    asyncio.run(in_a_running_loop())
    result = namespace["result"]
    assert (result.version, result.failed, result.folder) == (2, False, Path("runs/cell"))
    assert result.ledger_path.exists()
    launched = tomllib.loads((result.folder / LAUNCH_CONFIG_FILENAME).read_text())
    assert launched["task"]["entrypoint"] == "../../line_task.py:Line"


@pytest.mark.slow
def test_url_of_the_server_is_not_written_to_the_folder(own_folder: Any, line: Any) -> None:
    config = {"task": {"entrypoint": "line_module:Line"}, "stop": {"versions": 1}}
    config["redis"] = {"url": "redis://user:secret@127.0.0.1:1/0", "retention_hours": 1}
    with pytest.raises(fedqueue.ServerUnavailable):
        fedqueue.run(config)
    written = (own_folder / "runs" / "run" / LAUNCH_CONFIG_FILENAME).read_text()
    assert "secret" not in written
    assert tomllib.loads(written)["redis"] == {"retention_hours": 1}


def test_docstring_says_what_is_public() -> None:
    assert "Everything reachable through `fedqueue.__all__` is public" in textwrap.dedent(fedqueue.__doc__)

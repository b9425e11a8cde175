"""`[trackers]` of a configuration: which trackers are made of it, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fedqueue
from fedqueue.config.loading import load_config
from fedqueue.config.schema import Config
from fedqueue.errors import ConfigurationError, MissingExtra
from fedqueue_coordinator.operator.python_api import _move_paths
from fedqueue_coordinator.tracking import registry
from fedqueue_coordinator.tracking.registry import make_trackers
from tests.support.builders import make_config

OWN = """
import fedqueue

class Own(fedqueue.RunHooks):
    def __init__(self, every=1):
        self.every = 10 // every

class Other:
    pass
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "hooks.py").write_text(OWN)
    return tmp_path


def own(folder: Path, name: str, **trackers: Any) -> Config:
    return make_config(trackers={"use": name, **trackers}).located(folder)


def test_own_class_is_made_with_its_options(folder: Path) -> None:
    [(name, hooks)] = make_trackers(own(folder, "hooks.py:Own", options={"hooks.py:Own": {"every": 5}}))
    assert name == "hooks.py:Own"
    assert isinstance(hooks, fedqueue.RunHooks)
    assert vars(hooks)["every"] == 2


def test_hooks_of_a_script_come_after_configured_ones(folder: Path) -> None:
    class Mine(fedqueue.RunHooks):
        pass

    given = Mine()
    assert [name for name, _ in make_trackers(own(folder, "hooks.py:Own"), [given])] == ["hooks.py:Own", "Mine"]


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("hooks.py:Onw", {}, "Onw is not callable; callables in this module: Own, Other"),
        ("hooks.py:Other", {}, "makes a Other, which is no fedqueue.RunHooks; derive the class from fedqueue.RunHooks"),
        ("absent.py:Own", {}, "cannot be loaded: trackers.use: there is no file"),
        ("hooks.py:Own", {"every": 0}, r"cannot be made: ZeroDivisionError: .*; in __init__ \(hooks.py:6\)"),
        ("hooks.py:Own", {"speed": 1}, "unexpected keyword argument 'speed'"),
    ],
)
def test_unsuitable_class_error_names_key_and_cause(
    folder: Path, name: str, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigurationError, match=says) as refused:
        make_trackers(own(folder, name, options={name: options}))
    assert (refused.value.key, refused.value.value) == ("trackers.use", name)


@pytest.mark.parametrize(
    ("trackers", "says"),
    [
        ({"use": ["tensorbord"]}, "the trackers are tensorboard, mlflow, wandb; did you mean 'tensorboard'"),
        ({"use": ["visdom"]}, "name a class of your own: 'path/to/file.py:Class'"),
        ({"use": ["wandb", "wandb"]}, "use names a tracker twice"),
        ({"options": {"hooks.py:Own": {}}}, r"options has hooks\.py:Own, which is not in use"),
        ({"use": ["mlflow"], "options": {"mlflow": {}}}, r"write its options under \[trackers\.mlflow\]"),
        ({"mlflow": {"uri": "https://me:secret@host/"}}, "uri has a password; set MLFLOW_TRACKING_USERNAME"),
        ({"tensorboard": {"foldr": "x"}}, r"trackers\.tensorboard\.foldr = 'x': unknown key; did you mean 'folder'"),
    ],
)
def test_configuration_error_says_what_to_write(trackers: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says) as refused:
        make_config(trackers=trackers)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "package"), [("tensorboard", "tensorboard"), ("mlflow", "mlflow-skinny"), ("wandb", "wandb")]
)
def test_missing_package_error_names_the_extra(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=rf"needs {package}: pip install 'fedqueue\[{name}\]'$"):
        make_trackers(make_config(trackers={"use": name}))


def test_paths_of_own_trackers_are_those_from_the_runs_folder(tmp_path: Path) -> None:
    """`fedqueue.run` writes a configuration that was given as a dict to the run's folder."""
    tree = {"trackers": {"use": "hooks.py:Own", "options": {"hooks.py:Own": {"every": 2}}}}
    _move_paths(tree, tmp_path, tmp_path / "runs" / "mine")
    assert tree["trackers"] == {
        "use": ["../../hooks.py:Own"], "options": {"../../hooks.py:Own": {"every": 2}},
    }  # fmt: skip
    several = {"trackers": {"use": ["mlflow", "package.hooks:Own"]}}
    _move_paths(several, tmp_path, tmp_path / "runs")
    assert several["trackers"]["use"] == ["mlflow", "package.hooks:Own"]


def test_trackers_are_no_part_of_what_the_coordinator_publishes() -> None:
    plain, tracked = make_config(), make_config(trackers={"use": "wandb", "wandb": {"project": "secret-project"}})
    assert plain.model_dump_json() == tracked.model_dump_json()


def test_command_line_takes_one_tracker_without_a_list(tmp_path: Path) -> None:
    (tmp_path / "federation.toml").write_text('task = { entrypoint = "task.py:T" }\nstop = { versions = 1 }\n')
    config = load_config(tmp_path / "federation.toml", ["trackers.use=mlflow", "trackers.mlflow.uri=http://host:5000"])
    assert config.trackers.use == ("mlflow",)
    assert config.trackers.mlflow.uri == "http://host:5000"

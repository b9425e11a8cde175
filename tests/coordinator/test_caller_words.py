"""Errors of `fedqueue.run` and `fedqueue.simulate` name what a Python caller can write, not options of the commands."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fedqueue
from fedqueue.errors import ConfigurationError, FedqueueError
from fedqueue_coordinator.operator.run_folder import Launch, RunFolder
from tests.support.small_task import SmallTask

OPTION = re.compile(r"--[a-z]")


def foreign(folder: Path) -> None:
    folder.mkdir()
    (folder / "thesis.tex").touch()


def unfinished(folder: Path) -> None:
    (folder / "unfinished").mkdir(parents=True)
    Launch(Path(), [], command="simulate", run="SmallTask").write(folder / "unfinished" / "launch.json")
    RunFolder(folder).note_end(7, "was interrupted")


def other_results(folder: Path) -> None:
    folder.mkdir()
    Launch(Path("/elsewhere/federation.toml"), [], run="SmallTask").write(folder / "launch.json")


def unwritable(folder: Path) -> None:
    folder.touch()


@pytest.mark.parametrize("call", [fedqueue.run, fedqueue.simulate])
@pytest.mark.parametrize("occupy", [foreign, unfinished, other_results, unwritable])
def test_folder_that_cannot_be_used_is_named_as_an_argument(
    tmp_path: Path, call: Callable[..., Any], occupy: Callable[[Path], None]
) -> None:
    folder = tmp_path / "out"
    occupy(folder)
    with pytest.raises(ConfigurationError) as caught:
        call(SmallTask, folder=folder, versions=1)
    assert caught.value.key == "folder"
    words = re.sub("`.*?`", "", str(caught.value))  # a command in backticks may have options
    assert not OPTION.search(words), words
    if occupy in (unfinished, other_results):
        assert "overwrite=True" in words


def test_folder_in_use_is_named_as_an_argument(tmp_path: Path) -> None:
    first = RunFolder(tmp_path / "out")
    with (
        first.opened(Launch(Path(), [], run="SmallTask")),
        pytest.raises(FedqueueError, match="with folder=…") as caught,
    ):
        fedqueue.simulate(SmallTask, folder=first.path, versions=1)
    assert not OPTION.search(str(caught.value))


@pytest.mark.parametrize(
    "settings",
    [
        {"training": {"epochs": 2}},  # an earlier name
        {"clients": {"names": {"a": 1}}},
        {"stop.versions.more": 1},
        {"redis": {"url": "redis://:secret@localhost"}},
        {"nothing": 1},
    ],
    ids=str,
)
def test_setting_that_is_refused_is_named_by_its_key(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        fedqueue.simulate(SmallTask, versions=1, **settings)
    assert not OPTION.search(str(caught.value))
    assert "secret" not in str(caught.value)

"""`fedqueue init`: the written files load and train, and existing files are not overwritten."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedqueue.config.client import Client
from fedqueue.config.loading import load_config
from fedqueue.protocol.coordinator_identity import load_coordinator_identity
from fedqueue.protocol.site_identity import load_site_identity
from fedqueue.task import Progress, load_task
from fedqueue.tensors.manifest import Manifest
from fedqueue_coordinator.operator.scaffold import SCAFFOLD_FILENAMES
from tests.support.command_line import CommandLine


@pytest.fixture
def init(call: CommandLine, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], tuple[object, str, str]]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    return lambda folder: call("init", folder)


def test_three_files_are_written_and_the_next_command_is_shown(
    init: Callable[[str], tuple[object, str, str]], tmp_path: Path
) -> None:
    code, out, err = init("mine")
    assert (code, err) == (0, "")
    assert out == "Try it:  fedqueue run mine/federation.toml\n"
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == sorted(SCAFFOLD_FILENAMES)


def test_written_task_loads_and_learns(init: Callable[[str], tuple[object, str, str]], tmp_path: Path) -> None:
    init("deep/er/mine")
    path = tmp_path / "deep/er/mine/federation.toml"
    config = load_config(path, environment={})
    task = load_task(config.task.entrypoint, config.task.options, path.parent)
    torch.manual_seed(0)
    model = task.model()
    Manifest.from_module(model)
    shares = [task.train_data(config.clients.client(c)) for c in config.clients.ids]
    assert not torch.equal(shares[0].tensors[0], shares[1].tensors[0]), "two clients have the same data"
    before = task.evaluate(model, task.test_data())
    for share in shares:
        assert task.fit(model, share, config.training, Progress()).num_examples == len(share)
    after = task.evaluate(model, task.test_data())
    assert after["loss"] < before["loss"]
    assert after["accuracy"] > 0.85
    assert set(config.stop.target) <= set(after)


def test_client_with_its_own_data_is_supported(init: Callable[[str], tuple[object, str, str]], tmp_path: Path) -> None:
    init("mine")
    task = load_task("task.py:MyTask", {}, tmp_path / "mine")
    assert len(task.train_data(Client("guest")))


@pytest.mark.parametrize("name", SCAFFOLD_FILENAMES)
def test_folder_with_one_of_the_files_is_left_unchanged(init: Callable[..., Any], tmp_path: Path, name: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("precious")
    code, out, err = init("mine")
    assert (code, out) == (2, "")
    assert err == f"fedqueue: DIR = 'mine': already holds {name}; choose a new folder\n"
    assert [(p.name, p.read_text()) for p in (tmp_path / "mine").iterdir()] == [(name, "precious")]


def test_folder_with_other_files_is_accepted(init: Callable[[str], tuple[object, str, str]], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert init(".")[0] == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_every_option_in_the_configuration_is_explained(
    init: Callable[[str], tuple[object, str, str]], tmp_path: Path
) -> None:
    init("mine")
    text = (tmp_path / "mine" / "federation.toml").read_text()
    assert text.startswith("# ")
    assert "--set" in text
    assert "FEDQUEUE_" in text


def test_commands_of_the_readme_are_complete(
    call: CommandLine, init: Callable[[str], tuple[object, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signatures are required by default, so neither the coordinator nor a worker starts without keys."""
    init("mine")
    folder = tmp_path / "mine"
    monkeypatch.chdir(folder)
    text = (folder / "README.md").read_text()
    commands = [line.split() for line in text.splitlines() if line.startswith("    ") and "fedqueue" in line]
    enroll, coordinator, worker = commands[1:]
    assert commands[0] == ["fedqueue", "run", "federation.toml"]
    assert coordinator[:3] == ["fedqueue", "coordinator", "federation.toml"]
    assert call(*enroll[1:])[0] == 0
    name, settings = worker[worker.index("--client") + 1], [worker[worker.index("--set") + 1]]
    config = load_config(folder / worker[1], settings, environment={})
    assert load_coordinator_identity(folder / "keys", config.name)
    assert load_site_identity(folder / config.security.keys, config.name, "session").clients == [name]

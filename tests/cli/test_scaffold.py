"""`fedqueue init`: the written files load and train, with `--private` too; existing files are not overwritten."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedqueue.config.client import Client
from fedqueue.config.loading import load_config
from fedqueue.config.policy_file import read_policy
from fedqueue.protocol.coordinator_identity import load_coordinator_identity
from fedqueue.protocol.keeper_identity import load_keeper_identity
from fedqueue.protocol.site_identity import load_site_identity
from fedqueue.task import Progress, load_task
from fedqueue.tensors.manifest import Manifest
from fedqueue_coordinator.operator.scaffold import SCAFFOLD_FILENAMES
from fedqueue_worker.policy import Policy
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


def test_private_scaffold_has_keepers_and_noise(call: CommandLine, tmp_path: Path) -> None:
    code, out, err = call("init", "--private", "mine")
    assert (code, err) == (0, "")
    assert out == "Try it:  fedqueue run mine/federation.toml\n"
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == sorted(SCAFFOLD_FILENAMES)
    config = load_config(tmp_path / "mine/federation.toml", environment={})
    assert len(config.secure.keepers) == 2
    assert config.secure.min_cohort == 3
    assert config.privacy.examples.epsilon == 8.0


def test_private_scaffold_pays_for_its_jobs(call: CommandLine) -> None:
    call("init", "--private", "mine")
    code, out, _ = call("privacy", "mine/federation.toml")
    assert code == 0
    assert "10 jobs of each client, if all are equally fast: ε = 8.00" in out


def test_commands_of_the_private_readme_are_complete(
    call: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call("init", "--private", "mine")
    folder = tmp_path / "mine"
    monkeypatch.chdir(folder)
    lines = [line.strip() for line in (folder / "README.md").read_text().splitlines()]
    commands = [line.split() for line in lines if line.startswith("fedqueue")]
    _, _, keygen, *enroll, coordinator, keeper, worker = commands
    assert coordinator[:3] == ["fedqueue", "coordinator", "federation.toml"]
    assert call(*keygen[1:])[0] == 0
    assert call("keygen", "audit-office", "--output", "keeper-keys")[0] == 0
    for name in ("university", "audit-office"):
        (folder / f"{name}.pub").write_bytes((folder / f"keeper-keys/{name}.pub").read_bytes())
    for command in enroll:
        assert call(*command[1:])[0] == 0
    settings = worker[worker.index("--set") + 1]
    config = load_config(folder / worker[1], [settings], environment={})
    site = load_site_identity(folder / config.security.keys, config.name, "session")
    site.require_keepers(config.secure.keepers)
    shutil.copytree("keys/keeper-sites/university", keeper[keeper.index("--keys") + 1], dirs_exist_ok=True)
    identity = load_keeper_identity(folder / "keeper-keys", config.name, "university")
    assert all(identity.knows(client) for client in config.clients.ids)


def test_policy_of_the_private_readme_is_valid(call: CommandLine, tmp_path: Path) -> None:
    call("init", "--private", "mine")
    lines = [line.strip() for line in (tmp_path / "mine/README.md").read_text().splitlines()]
    start = lines.index('keepers = ["university", "audit-office"]')
    (tmp_path / "policy.toml").write_text("\n".join(lines[start : start + 4]))
    policy = read_policy(Policy, tmp_path / "policy.toml")
    assert (policy.min_cohort, policy.max_epsilon, policy.delta) == (3, 8.0, 5e-4)


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

"""`fedqueue init`: a starting point that loads, trains and is never written over somebody's work."""

from __future__ import annotations

import sys

import pytest
import torch

from fedqueue.config.loading import load_config
from fedqueue.task import Client, load_task
from fedqueue.tensors.frame import Manifest
from fedqueue_coordinator.cli import main as cli
from fedqueue_coordinator.operator.scaffold import SCAFFOLD_FILENAMES


@pytest.fixture
def init(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(folder):
        monkeypatch.setattr(sys, "argv", ["fedqueue", "init", str(folder)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    yield run
    sys.modules.pop("fedqueue_task_task", None)


def test_three_files_are_written_and_the_next_command_is_shown(init, tmp_path):
    code, out, err = init("mine")
    assert (code, err) == (0, "")
    assert out == "Try it:  fedqueue run mine/federation.toml\n"
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == sorted(SCAFFOLD_FILENAMES)


def test_what_is_written_loads_and_learns(init, tmp_path):
    init("deep/er/mine")
    path = tmp_path / "deep/er/mine/federation.toml"
    config = load_config(path, environment={})
    task = load_task(config.task.entrypoint, config.task.options, path.parent)
    torch.manual_seed(0)
    model = task.model()
    Manifest.from_module(model)
    shares = [task.train_data(config.clients.client(c)) for c in config.clients.ids]
    assert not torch.equal(shares[0].tensors[0], shares[1].tensors[0]), "each client has data of its own"
    before = task.evaluate(model, task.test_data())
    for share in shares:
        assert task.fit(model, share, config.training, lambda: None).num_examples == len(share)
    after = task.evaluate(model, task.test_data())
    assert after["loss"] < before["loss"]
    assert after["accuracy"] > 0.85
    assert set(config.stop.target) <= set(after)


def test_client_of_its_own_data_works_too(init, tmp_path):
    init("mine")
    task = load_task("task.py:MyTask", {}, tmp_path / "mine")
    assert len(task.train_data(Client("guest")))


@pytest.mark.parametrize("name", SCAFFOLD_FILENAMES)
def test_folder_that_holds_one_of_the_files_is_left_as_it_is(init, tmp_path, name):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("precious")
    code, out, err = init("mine")
    assert (code, out) == (2, "")
    assert err == f"fedqueue: DIR = 'mine': already holds {name}; choose a new folder\n"
    assert [(p.name, p.read_text()) for p in (tmp_path / "mine").iterdir()] == [(name, "precious")]


def test_folder_with_other_files_is_fine(init, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert init(".")[0] == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_every_option_in_the_configuration_is_explained_or_plain(init, tmp_path):
    init("mine")
    text = (tmp_path / "mine" / "federation.toml").read_text()
    assert text.startswith("# ")
    assert "--set" in text
    assert "FEDQUEUE_" in text

"""`fedqueue`: help, versions, and mistakes that are one line and an exit code."""

from __future__ import annotations

import importlib
import sys
from importlib import metadata

import pytest

import fedqueue
from fedqueue.terminal import main as run_app
from fedqueue_coordinator.cli import main as cli
from fedqueue_worker import cli as worker_cli

COMMANDS = ("run", "coordinator", "status", "runs", "export", "audit", "init")
CONFIG = '[task]\nentrypoint = "task.py:Absent"\n[stop]\nversions = 1\n'


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Exit code, stdout and stderr of the command line with these arguments, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("fedqueue_coordinator.operator.run_locations.DEFAULT_URL", f"unix://{tmp_path}/none.sock")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fedqueue", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return ended.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "federation.toml"
    path.write_text(CONFIG)
    return path


# Help


def test_help_lists_every_command(call):
    code, out, _ = call("--help")
    assert code == 0
    for command in COMMANDS:
        assert f" {command} " in out


def test_no_command_is_help_and_a_usage_error(call):
    code, out, err = call()
    assert code == 2
    assert "Usage: " in out + err


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("run", ["CONFIG.toml", "--workers", "--set", "--output", "--seed", "--quiet", "Ctrl-C"]),
        ("coordinator", ["CONFIG.toml", "--redis", "--run", "--set", "--output", "SIGTERM"]),
        ("status", ["--redis", "--run", "--json"]),
        ("runs", ["--redis", "--json"]),
        ("export", ["RUN", "--version", "--output", "--redis", "safetensors"]),
        ("audit", ["RUN", "--redis"]),
        ("init", ["DIR", "task.py"]),
    ],
)
def test_help_of_each_command_names_its_options(call, command, words):
    code, out, _ = call(command, "--help")
    assert code == 0
    for word in words:
        assert word in out


def test_every_command_is_covered_here():
    assert {c.name or c.callback.__name__ for c in cli.app.registered_commands} >= set(COMMANDS)


def test_version_is_the_packages(call):
    assert call("--version") == (0, f"fedqueue {fedqueue.__version__}\n", "")
    assert metadata.version("fedqueue") == fedqueue.__version__


@pytest.mark.parametrize("name", ["fedqueue", "fedqueue-worker"])
def test_installed_command_is_the_modules_main(name):
    [script] = [e for e in metadata.entry_points(group="console_scripts") if e.name == name]
    assert script.load() in (cli.main, worker_cli.main)


@pytest.mark.parametrize("package", ["fedqueue_coordinator", "fedqueue_worker"])
def test_package_can_be_run_as_a_module(monkeypatch, capsys, package):
    monkeypatch.setattr(sys, "argv", [package, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.reload(importlib.import_module(f"{package}.__main__"))
    assert not ended.value.code
    assert "Usage: " in capsys.readouterr().out


# Mistakes


@pytest.mark.parametrize("command", ["run", "coordinator"])
@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("clients.cuont=3", "fedqueue: clients.cuont = 3: unknown key; did you mean 'count'?\n"),
        ("clients.count=0", "fedqueue: clients.count = 0: input should be greater than or equal to 1\n"),
        ("aggregation.mode=fedsum", "fedqueue: aggregation.mode = 'fedsum': input should be 'fedasync', 'fedbuff'"),
        ("name=a b", "fedqueue: name = 'a b': 1 to 64 letters, digits, '_' and '-', the first a letter or digit\n"),
        (
            "stop.versions=0",
            "fedqueue: stop = '…': at least one of versions, updates, seconds and target must be",
        ),
    ],
)
def test_bad_configuration_is_one_line_and_exit_code_2(call, path, command, override, line):
    code, out, err = call(command, path, "--set", override)
    assert (code, out) == (2, "")
    assert err.startswith(line)
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["run", "coordinator"])
def test_missing_file_is_one_line_and_exit_code_2(call, command):
    code, _, err = call(command, "absent.toml")
    assert (code, err) == (2, "fedqueue: CONFIG = 'absent.toml': cannot be read: No such file or directory\n")


def test_missing_task_is_one_line_and_exit_code_2(call, path, tmp_path):
    code, _, err = call("run", path, "--quiet")
    assert (code, err) == (2, f"fedqueue: task.entrypoint: there is no file {tmp_path / 'task.py'}\n")


def test_bad_option_of_the_task_is_one_line_and_exit_code_2(call, path, tmp_path):
    (tmp_path / "task.py").write_text(
        "from fedqueue import Task\nclass Absent(Task):\n"
        "    def __init__(self, depth=1):\n        if depth > 9: raise ValueError('too deep')\n"
    )
    code, _, err = call("run", path, "--quiet", "--set", "task.options.depth=10")
    assert code == 2
    assert err.endswith("ValueError: too deep\n")
    assert err.count("\n") == 1


def test_coordinator_without_a_server_says_how_to_name_one(call, path):
    code, _, err = call("coordinator", path)
    assert (code, err) == (2, "fedqueue: redis.url = '': is required: set it, or pass --redis URL\n")


@pytest.mark.parametrize("arguments", [["run", "--bogus"], ["walk"], ["run", "a", "b"], ["export", "run"], ["init"]])
def test_wrong_usage_is_exit_code_2(call, arguments):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert "Usage: " in err


@pytest.mark.parametrize("workers", ["0", "-1", "many"])
def test_number_of_workers_is_at_least_one(call, path, workers):
    code, _, err = call("run", path, "--workers", workers)
    assert code == 2
    assert "--workers" in err


def test_given_server_that_does_not_answer_is_exit_code_1(call, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDQUEUE_REDIS__URL", f"unix://u:hunter2@{tmp_path}/none.sock")
    for command in ("status", "runs"):
        code, _, err = call(command)
        assert (code, err.count("\n")) == (1, 1)
        assert err.startswith("fedqueue: no Redis answers: ")
        assert "hunter2" not in err


def test_errors_go_through_the_same_door_in_both_programs():
    assert cli.run_app is worker_cli.run_app is run_app

"""`fedqueue`: help, versions, and usage errors, which are one line and an exit code."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.core import TyperGroup, TyperOption

import fedqueue
from fedqueue.exit_codes import run_app
from fedqueue_coordinator.cli import main as cli
from fedqueue_keeper import cli as keeper_cli
from fedqueue_worker import cli as worker_cli
from tests.support.command_line import CommandLine

COMMANDS = (
    "run", "coordinator", "worker", "list", "status", "dashboard", "track", "export", "audit", "remove", "compare",
    "leak", "privacy", "describe", "acl", "certs", "enroll", "keygen", "revoke", "init",
)  # fmt: skip
CONFIG = '[task]\nentrypoint = "task.py:Absent"\n[stop]\nversions = 1\n'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "federation.toml"
    path.write_text(CONFIG)
    return path


# Help


def test_help_lists_every_command(call: CommandLine) -> None:
    code, out, _ = call("--help")
    assert code == 0
    for command in COMMANDS:
        assert f" {command} " in out


def test_missing_command_shows_help_and_is_a_usage_error(call: CommandLine) -> None:
    code, out, err = call()
    assert code == 2
    assert "Usage: " in out + err


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            "run",
            ["CONFIG.toml", "--workers", "--set", "--seed", "--verbose", "--quiet", "Ctrl-C", "Examples:"],
        ),
        ("coordinator", ["CONFIG.toml", "--redis", "--url", "--run", "--set", "--output", "--verbose", "SIGTERM"]),
        ("status", ["--redis", "--url", "--run", "--json"]),
        ("list", ["--redis", "--url", "--json"]),
        ("export", ["RUN", "--version", "--output", "--redis", "safetensors"]),
        ("audit", ["RUN", "--redis"]),
        ("remove", ["RUN", "--redis", "--output", "--yes", "egress"]),
        ("compare", ["--strategies", "--variant", "--tune", "--speeds", "Examples:"]),
        ("privacy", ["CONFIG.toml", "--rows", "--max-epsilon", "--json", "--set", "Examples:"]),
        ("leak", ["CONFIG.toml|RUN|DIR", "--output", "--at-most", "--updates", "--references", "--set", "Examples:"]),
        ("acl", ["--shared-worker", "--dir-per-user", "--print-urls"]),
        ("certs", ["DIR", "--host", "--days"]),
        ("enroll", ["CLIENT", "--config", "--rotate", "--public"]),
        ("revoke", ["CLIENT", "--previous"]),
        ("init", ["DIR", "task.py", "--private"]),
        ("dashboard", ["RUN|DIR", "--address", "--password-file", "--certificate", "--redis"]),
        ("leak", ["--at-most", "--also", "--references"]),
    ],
)
def test_help_of_each_command_names_its_options(call: CommandLine, command: str, words: list[str]) -> None:
    code, out, _ = call(command, "--help")
    assert code == 0
    for word in words:
        assert word in out


def test_help_of_every_command_is_tested() -> None:
    group = typer.main.get_command(cli.app)
    assert isinstance(group, TyperGroup)
    assert set(group.commands) == set(COMMANDS)


def options_of(command: Any) -> Any:
    """Return the names and the help text of each option, except those that typer adds."""
    group = typer.main.get_command(cli.app)
    assert isinstance(group, TyperGroup)
    made = group.commands[command]
    return {tuple(p.opts): p.help for p in made.params if isinstance(p, TyperOption) and p.opts[0].startswith("-")}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_help_text(command: str) -> None:
    assert all(text and text.endswith((".", ")")) for text in options_of(command).values()), options_of(command)


@pytest.mark.parametrize(
    "command", ["coordinator", "list", "status", "dashboard", "track", "export", "audit", "remove"]
)
def test_server_option_has_three_names(command: str) -> None:
    assert ("--redis", "--url", "-u") in options_of(command)


def test_main_help_shows_examples_and_shell_completion(call: CommandLine) -> None:
    _, out, _ = call("--help")
    assert "Examples:" in out
    assert "--install-completion" in out


@pytest.mark.parametrize("program", ["fedqueue", "fedqueue-worker"])
def test_shell_completion_is_offered(
    program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command is that of `eval "$(fedqueue --show-completion bash)"`."""
    monkeypatch.setattr(sys, "argv", [program])
    monkeypatch.setenv(f"_{program.upper().replace('-', '_')}_COMPLETE", "source_bash")
    with pytest.raises(SystemExit) as ended:
        (cli if program == "fedqueue" else worker_cli).main()
    assert not ended.value.code
    assert f"complete -o default -F _{program.replace('-', '_')}_completion {program}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("former", "present"),
    [
        (["runs"], "fedqueue list"),
        (["enroll", "--all", "f.toml"], "fedqueue enroll --config"),
        (["enroll", "--all=f.toml"], "fedqueue enroll --config"),
        (["compare", "f.toml", "--modes", "fedavg"], "fedqueue compare --strategies"),
        (["acl", "r", "--pool"], "fedqueue acl --shared-worker"),
        (["acl", "r", "--split"], "fedqueue acl --dir-per-user"),
        (["acl", "r", "--show"], "fedqueue acl --print-urls"),
    ],
)
def test_former_name_is_an_error_that_gives_the_current_name(
    call: CommandLine, former: list[str], present: str
) -> None:
    code, out, err = call(*former)
    assert (code, out) == (2, "")
    assert f"is now `{present}`" in err


# The worker's program


def start(*arguments: Any) -> Any:
    return subprocess.run(
        [sys.executable, "-m", "fedqueue_coordinator", *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_worker_command_starts_the_workers_own_program(tmp_path: Path) -> None:
    done = start("worker", "--help")
    assert done.returncode == 0, done.stderr
    assert "Usage: fedqueue-worker" in done.stdout
    assert "--max-jobs" in done.stdout


@pytest.mark.slow
def test_worker_command_passes_arguments_and_exit_code_on(tmp_path: Path) -> None:
    done = start("worker", str(tmp_path / "absent.toml"), "--partition", "auto", "-v")
    assert done.returncode == 2
    assert "absent.toml': cannot be read" in done.stderr


def test_worker_command_without_a_worker_says_what_to_install(
    call: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, out, err = call("worker", "federation.toml")
    assert (code, out) == (1, "")
    assert err == (
        "fedqueue: the worker is not installed on this machine: install it with `pip install fedqueue`\n"
    )  # fmt: skip


# Verbose and quiet


def test_verbose_and_quiet_exclude_each_other(call: CommandLine, path: Path) -> None:
    code, _, err = call("coordinator", path, "-v", "-q")
    assert code == 2
    assert "not together with --verbose" in err


def test_version_option_prints_the_version_of_the_package(call: CommandLine) -> None:
    assert call("--version") == (0, f"fedqueue {fedqueue.__version__}\n", "")
    assert metadata.version("fedqueue") == fedqueue.__version__


@pytest.mark.parametrize("name", ["fedqueue", "fedqueue-worker", "fedqueue-keeper"])
def test_installed_command_calls_main_of_the_module(name: str) -> None:
    [script] = [e for e in metadata.entry_points(group="console_scripts") if e.name == name]
    assert script.load() in (cli.main, worker_cli.main, keeper_cli.main)


@pytest.mark.parametrize("package", ["fedqueue_coordinator", "fedqueue_worker", "fedqueue_keeper"])
def test_package_can_be_run_as_a_module(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], package: str
) -> None:
    monkeypatch.setattr(sys, "argv", [package, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.reload(importlib.import_module(f"{package}.__main__"))
    assert not ended.value.code
    assert "Usage: " in capsys.readouterr().out


# Errors


@pytest.mark.parametrize("command", ["run", "coordinator"])
@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("clients.cuont=3", "fedqueue: clients.cuont = 3: unknown key; did you mean 'count'?\n"),
        ("clients.count=0", "fedqueue: clients.count = 0: must be greater than or equal to 1\n"),
        (
            "aggregation.strategy=fedsum",
            "fedqueue: aggregation.strategy = 'fedsum': unknown strategy; write 'fedasync', 'fedbuff'",
        ),
        (
            "name=a b",
            "fedqueue: name = 'a b': must be 1 to 64 letters, digits, '_' and '-', the first a letter or digit\n",
        ),
        (
            "stop.versions=off",
            "fedqueue: stop: no limit is set; set at least one of versions, updates, seconds and target",
        ),
    ],
)
def test_bad_configuration_is_one_line_and_exit_code_2(
    call: CommandLine, path: Path, command: str, override: str, line: str
) -> None:
    code, out, err = call(command, path, "--set", override)
    assert (code, out) == (2, "")
    assert err.startswith(line)
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["run", "coordinator"])
def test_missing_file_is_one_line_and_exit_code_2(call: CommandLine, command: str) -> None:
    code, _, err = call(command, "absent.toml")
    assert (code, err) == (2, "fedqueue: CONFIG = 'absent.toml': cannot be read: No such file or directory\n")


def test_missing_task_is_one_line_and_exit_code_2(call: CommandLine, path: Path, tmp_path: Path) -> None:
    code, _, err = call("run", path, "--quiet")
    assert (code, err) == (2, f"fedqueue: task.entrypoint: there is no file {tmp_path / 'task.py'}\n")


def test_bad_option_of_the_task_is_one_line_and_exit_code_2(call: CommandLine, path: Path, tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(
        "from fedqueue import Task\nclass Absent(Task):\n"
        "    def __init__(self, depth=1):\n        if depth > 9: raise ValueError('too deep')\n"
    )
    code, _, err = call("run", path, "--quiet", "--set", "task.options.depth=10")
    assert code == 2
    assert err.endswith("ValueError: too deep\n")
    assert err.count("\n") == 1


def test_coordinator_without_a_server_says_how_to_name_one(call: CommandLine, path: Path) -> None:
    code, _, err = call("coordinator", path)
    assert (code, err) == (2, "fedqueue: redis.url: missing; set it, or pass --redis URL\n")


@pytest.mark.parametrize("arguments", [["run", "--bogus"], ["walk"], ["run", "a", "b"], ["export", "run"], ["init"]])
def test_wrong_usage_is_exit_code_2(call: CommandLine, arguments: list[str]) -> None:
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert "Usage: " in err


@pytest.mark.parametrize("workers", ["0", "-1", "many"])
def test_number_of_workers_is_at_least_one(call: CommandLine, path: Path, workers: str) -> None:
    code, _, err = call("run", path, "--workers", workers)
    assert code == 2
    assert "--workers" in err


def test_unreachable_given_server_is_exit_code_1(
    call: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDQUEUE_REDIS__URL", f"unix://u:hunter2@{tmp_path}/none.sock")
    for command in ("status", "list"):
        code, _, err = call(command)
        assert (code, err.count("\n")) == (1, 1)
        assert err.startswith("fedqueue: no Redis answers: ")
        assert "hunter2" not in err


def test_both_programs_handle_errors_with_the_same_function() -> None:
    assert vars(cli)["run_app"] is vars(worker_cli)["run_app"] is run_app


def test_configuration_in_a_pipe_is_refused(call: CommandLine, folder: Path) -> None:
    os.mkfifo(folder / "f.toml")
    code, _, err = call("run", folder / "f.toml")
    assert code == 2
    assert "save it as a file" in err


def test_coordinator_needs_the_public_key_of_each_keeper(call: CommandLine, tmp_path: Path) -> None:
    path = tmp_path / "federation.toml"
    path.write_text(
        'task = { entrypoint = "task.py:T" }\nstop = { versions = 1 }\nsecure = { keepers = ["north", "south"] }\n'
    )
    keys = tmp_path / "keys"
    assert call("enroll", "--config", str(path), "--keys", str(keys))[0] == 0
    (keys / "keepers" / "south.pub").unlink()
    code, _, err = call("coordinator", str(path), "-u", "redis://127.0.0.1:1", "--set", f"security.keys='{keys}'")
    assert code == 2
    assert "keepers/south.pub': no valid public key of this keeper of the run; ask the keeper's operator" in err

"""`fedqueue-worker`: options, and one-line errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedqueue.config.loading import parse_config
from fedqueue.errors import ConfigurationError
from fedqueue_coordinator.operator.embedded_server import EmbeddedServer
from fedqueue_worker import cli
from fedqueue_worker.cli import choose_candidates
from tests.support.command_line import CommandLine

CONFIG = """
name = "sites"
[task]
entrypoint = "task.py:Absent"
[clients]
count = 4
[stop]
versions = 1
"""
IDS = ["client-0", "client-1", "client-2", "client-3"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "federation.toml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """`fedqueue-worker` in this process."""
    return CommandLine("fedqueue-worker", cli.main, monkeypatch, capsys)


def candidates(clients: tuple[Any, ...] = (), partitions: tuple[Any, ...] = ()) -> list[list[str]]:
    config = parse_config({"task": {"entrypoint": "t:T"}, "stop": {"versions": 1}, "clients": {"count": 4}})
    return choose_candidates(config, list(clients), list(partitions))


@pytest.mark.parametrize(
    ("clients", "partitions", "expected"),
    [
        ((), (), [IDS]),
        ((), ("auto",), [IDS]),
        ((), ("auto", "auto"), [IDS, IDS]),
        ((), ("0/4",), [["client-0"]]),
        ((), ("3/4", "1/4"), [["client-3"], ["client-1"]]),
        (("client-2",), (), [["client-2"]]),
        (("client-2", "guest"), (), [["client-2"], ["guest"]]),
        (("guest",), ("auto",), [["guest"], IDS]),
    ],
)
def test_options_choose_the_candidates(
    clients: tuple[Any, ...], partitions: tuple[Any, ...], expected: list[list[str]]
) -> None:
    assert candidates(clients, partitions) == expected


@pytest.mark.parametrize("partition", ["4/4", "-1/4", "0/3", "0", "0/", "/4", "a/4", "0/4/4", "", "Auto", "1.0/4"])
def test_invalid_partition_error_shows_the_expected_form(partition: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        candidates((), (partition,))
    assert (
        str(caught.value) == f"--partition = {partition!r}: no such partition; write 'auto', or I/4 with I from 0 to 3"
    )


@pytest.mark.parametrize("client", ["", "two words", "../x", "c" * 65])
def test_client_with_an_invalid_name_is_an_error(client: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^--client = .*: must be 1 to 64 letters"):
        candidates((client,))


def test_help_names_every_option_and_shows_examples(call: CommandLine) -> None:
    code, out, _ = call("--help")
    assert code == 0
    for option in (
        "--client", "--partition", "--redis", "--url", "--run", "--policy", "--processes", "--logs", "--max-jobs",
        "--burst", "--verbose", "--quiet", "--set", "--install-completion", "[task]", "Usage: fedqueue-worker",
        "Examples:",
    ):  # fmt: skip
        assert option in out
    assert "--once" not in out


@pytest.mark.parametrize("short", ["-u", "-b", "-v", "-q", "-s"])
def test_help_names_short_options(call: CommandLine, short: str) -> None:
    assert f" {short} " in call("--help")[1]


def test_error_for_the_former_option_once_names_max_jobs(call: CommandLine, path: Path) -> None:
    code, _, err = call(path, "--once")
    assert code == 2
    assert "use --max-jobs 1 instead" in err


def test_verbose_and_quiet_exclude_each_other(call: CommandLine, path: Path) -> None:
    code, _, err = call(path, "-v", "-q")
    assert code == 2
    assert "not together with --verbose" in err


@pytest.mark.parametrize("jobs", ["0", "-1", "all"])
def test_max_jobs_is_at_least_one(call: CommandLine, path: Path, jobs: str) -> None:
    code, _, err = call(path, "--max-jobs", jobs)
    assert code == 2
    assert "--max-jobs" in err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--partition", "9/4"],
            "fedqueue: --partition = '9/4': no such partition; write 'auto', or I/4 with I from 0 to 3",
        ),
        ([], "fedqueue: redis.url: missing; set it, or pass --redis URL"),
        (["--redis", "http://x"], "fedqueue: redis.url = 'http://…': unknown scheme; write one of redis://"),
        (["--url", "http://x"], "fedqueue: redis.url = 'http://…': unknown scheme; write one of redis://"),
        (["-u", "http://x"], "fedqueue: redis.url = 'http://…': unknown scheme; write one of redis://"),
        (["--set", "clients.cuont=3"], "fedqueue: clients.cuont = 3: unknown key; did you mean 'count'?"),
        (["--set", "nonsense"], "fedqueue: override = 'nonsense': no key or no value; write section.key=value"),
        (["--run", "a b"], "fedqueue: name = 'a b': must be 1 to 64 letters"),
    ],
)
def test_invalid_input_is_one_line_and_exit_code_2(
    call: CommandLine, path: Path, arguments: list[Any], line: str
) -> None:
    code, _, err = call(path, *arguments)
    assert code == 2
    assert err.startswith(line)
    assert err.count("\n") == 1


def test_missing_file_is_one_line_and_exit_code_2(call: CommandLine, tmp_path: Path) -> None:
    code, _, err = call(tmp_path / "absent.toml")
    assert (code, err.count("\n")) == (2, 1)
    assert "absent.toml': cannot be read: No such file or directory" in err


@pytest.mark.parametrize("arguments", [[], ["--bogus"], ["a.toml", "b.toml"]])
def test_wrong_usage_is_exit_code_2(call: CommandLine, arguments: list[Any]) -> None:
    assert call(*arguments)[0] == 2


def test_unreachable_server_is_one_line_and_exit_code_1(
    call: CommandLine, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedqueue.transport import connection

    monkeypatch.setattr(connection, "RETRIES", 0)
    monkeypatch.setattr(connection.connect, "__defaults__", (0, None))
    monkeypatch.setenv("FEDQUEUE_REDIS__URL", f"unix://u:hunter2@{tmp_path}/none.sock")
    monkeypatch.chdir(tmp_path)
    code, _, err = call(path, "--set", "security.signatures=off")
    assert (code, err.count("\n")) == (1, 1)
    assert "no Redis at unix://u@" in err
    assert "hunter2" not in err


@pytest.mark.server
def test_missing_task_is_one_line_and_exit_code_2(
    call: CommandLine, path: Path, server: EmbeddedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = call(path, "--redis", server.url, "--set", "security.signatures=off")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("fedqueue: task.entrypoint: there is no file")

"""`fedqueue-worker`: what it accepts, and that each mistake is one line."""

from __future__ import annotations

import sys

import pytest

from fedqueue.config.loading import parse_config
from fedqueue.errors import ConfigurationError
from fedqueue_worker import cli
from fedqueue_worker.cli import choose_candidates

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
def path(tmp_path):
    path = tmp_path / "federation.toml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def call(monkeypatch, capsys):
    """Exit code and stderr of the command line with these arguments."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fedqueue-worker", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return ended.value.code or 0, captured.err, captured.out

    return run


def candidates(clients=(), partitions=()):
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
def test_options_say_which_clients_may_be_served(clients, partitions, expected):
    assert candidates(clients, partitions) == expected


@pytest.mark.parametrize("partition", ["4/4", "-1/4", "0/3", "0", "0/", "/4", "a/4", "0/4/4", "", "Auto", "1.0/4"])
def test_partition_that_is_none_is_an_error_that_shows_the_form(partition):
    with pytest.raises(ConfigurationError) as caught:
        candidates((), (partition,))
    assert str(caught.value) == f"--partition = {partition!r}: 'auto', or I/4 with I from 0 to 3"


@pytest.mark.parametrize("client", ["", "two words", "../x", "c" * 65])
def test_client_with_a_bad_name_is_an_error(client):
    with pytest.raises(ConfigurationError, match=r"^--client = .*: 1 to 64 letters"):
        candidates((client,))


def test_help_is_shown(call):
    code, _, out = call("--help")
    assert code == 0
    for option in ("--client", "--partition", "--redis", "--run", "--once", "--set", "[task]"):
        assert option in out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--partition", "9/4"], "fedqueue: --partition = '9/4': 'auto', or I/4 with I from 0 to 3"),
        ([], "fedqueue: redis.url = '': is required: set it, or pass --redis URL"),
        (["--redis", "http://x"], "fedqueue: redis.url = 'http://…': one of redis://"),
        (["--set", "clients.cuont=3"], "fedqueue: clients.cuont = 3: unknown key; did you mean 'count'?"),
        (["--set", "nonsense"], "fedqueue: --set = 'nonsense': expected section.key=value"),
        (["--run", "a b"], "fedqueue: name = 'a b': 1 to 64 letters"),
    ],
)
def test_mistake_is_one_line_and_exit_code_2(call, path, arguments, line):
    code, err, _ = call(path, *arguments)
    assert code == 2
    assert err.startswith(line)
    assert err.count("\n") == 1


def test_missing_file_is_one_line_and_exit_code_2(call, tmp_path):
    code, err, _ = call(tmp_path / "absent.toml")
    assert (code, err.count("\n")) == (2, 1)
    assert "absent.toml': cannot be read: No such file or directory" in err


@pytest.mark.parametrize("arguments", [[], ["--bogus"], ["a.toml", "b.toml"]])
def test_wrong_usage_is_exit_code_2(call, arguments):
    assert call(*arguments)[0] == 2


def test_server_that_does_not_answer_is_one_line_and_exit_code_1(call, path, tmp_path, monkeypatch):
    from fedqueue.transport import connection

    monkeypatch.setattr(connection, "RETRIES", 0)
    monkeypatch.setattr(connection.connect, "__defaults__", (0, None))
    monkeypatch.setenv("FEDQUEUE_REDIS__URL", f"unix://u:hunter2@{tmp_path}/none.sock")
    monkeypatch.chdir(tmp_path)
    code, err, _ = call(path, "--set", "security.signatures=off")
    assert (code, err.count("\n")) == (1, 1)
    assert "no Redis at unix://u@" in err
    assert "hunter2" not in err


@pytest.mark.server
def test_missing_task_is_one_line_and_exit_code_2(call, path, server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, err, _ = call(path, "--redis", server.url, "--set", "security.signatures=off")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("fedqueue: task.entrypoint: there is no file")

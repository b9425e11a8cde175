"""Passwords and keys do not leak into the files, the output or the messages of a run."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import redis

from fedqueue.config.loading import load_config
from fedqueue.config.redis import RedisConfig
from fedqueue.errors import ConfigurationError
from fedqueue.protocol.key_files import SigningKey
from fedqueue_coordinator.operator.embedded_server import EmbeddedServer
from tests.support import toy_task

PASSWORD = "planted-s3cret-%-of-redis"
TASK = toy_task.__file__


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "federation.toml"
    path.write_text(f'[task]\nentrypoint = "{TASK}:ToyTask"\n[stop]\nversions = 2\n[clients]\ncount = 2\n')
    return path


def test_password_file_is_read_for_a_url_from_any_source(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text(PASSWORD + "\n")
    known = RedisConfig(url="redis://worker@host:1/0", password_file=str(file))
    assert known.address() == "redis://worker:planted-s3cret-%25-of-redis@host:1/0"
    assert known.address("unix:///tmp/x.sock") == "unix://:planted-s3cret-%25-of-redis@/tmp/x.sock"
    assert PASSWORD not in repr(known)
    assert RedisConfig(password_file=str(file)).address() is None
    with pytest.raises(ConfigurationError, match=r"redis.password_file = .*: the URL holds a password too"):
        RedisConfig(url="redis://u:p@host", password_file=str(file)).address()
    with pytest.raises(ConfigurationError, match=r"redis.password_file = .*cannot be read"):
        RedisConfig(url="redis://host", password_file=str(tmp_path / "none")).address()


@pytest.mark.parametrize("url", ["redis://:{}@host", "rediss://user:{}@host/0", "sentinel://:{}@a,b/main"])
def test_password_on_a_command_line_is_refused_and_not_repeated(path: Path, url: str) -> None:
    for call in (
        lambda: RedisConfig().address(url.format(PASSWORD)),
        lambda: load_config(path, [f"redis.url={url.format(PASSWORD)}"], {}),
    ):
        with pytest.raises(ConfigurationError, match=r"FEDQUEUE_REDIS__URL or redis\.password_file") as caught:
            call()
        assert PASSWORD not in str(caught.value)


@pytest.mark.parametrize(
    "environment",
    [
        {"FEDQUEUE_REDIS__URLL": f"redis://:{PASSWORD}@host"},
        {"FEDQUEUE_REDIS__URL": f"redis://:{PASSWORD}@host", "FEDQUEUE_REDIS__URL__X": "1"},
    ],
)
def test_error_in_a_setting_does_not_show_a_password(path: Path, environment: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_config(path, (), environment)
    assert PASSWORD not in str(caught.value)


def test_warning_about_a_variable_does_not_show_its_value(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert not load_config(path, (), {"FEDQUEUE_REDIS_URL": f"redis://:{PASSWORD}@host"}).redis.url
    assert "FEDQUEUE_REDIS__URL" in caplog.text
    assert PASSWORD not in caplog.text


def test_private_key_is_not_in_its_repr() -> None:
    key = SigningKey.generate()
    assert "PRIVATE" not in repr(key) + str(vars(key))


@pytest.mark.slow
@pytest.mark.server
def test_run_writes_prints_and_sends_no_secret(path: Path, tmp_path: Path) -> None:
    """Runs against a server with a password; reads process arguments during the run, and files afterwards."""
    server = EmbeddedServer(tmp_path / "redis")
    try:
        admin = redis.Redis(unix_socket_path=server.url.removeprefix("unix://"))
        admin.config_set("requirepass", PASSWORD)
        url = f"unix://:{PASSWORD.replace('%', '%25')}@{server.url.removeprefix('unix://')}"
        command = [sys.executable, "-m", "fedqueue_coordinator", "run", str(path), "--workers", "2", "--output", "out"]
        with (tmp_path / "printed").open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=tmp_path,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "FEDQUEUE_REDIS__URL": url},
            )
        titles, keys = b"", set()
        while process.poll() is None:
            for title in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    line = title.read_bytes()
                except OSError:
                    continue
                titles += line if str(path).encode() in line else b""
            keys |= {f.read_text() for f in (tmp_path / "out" / "unfinished" / "keys").rglob("*.key") if f.is_file()}
            time.sleep(0.2)
        assert process.wait() == 0, (tmp_path / "printed").read_text()
        admin = redis.Redis(unix_socket_path=server.url.removeprefix("unix://"), password=PASSWORD)
        sent = repr([(k, admin.dump(k)) for k in admin.scan_iter()]).encode()
    finally:
        server.stop()
    assert titles.count(b"fedqueue_worker") >= 2
    assert len(keys) == 3, "the coordinator and the two clients should have a key each"
    written = b"".join(f.read_bytes() for f in sorted(tmp_path.rglob("*")) if f.is_file())  # including the egress log
    assert list(tmp_path.rglob("egress/*.jsonl"))
    aof = b"".join(f.read_bytes() for f in (tmp_path / "redis").rglob("*") if f.is_file())
    secrets = [PASSWORD, PASSWORD.replace("%", "%25"), *(line for key in keys for line in key.splitlines()[1:2])]
    secrets += [base64.b64decode(key.splitlines()[1])[-32:].hex() for key in keys]
    for where, data in (
        ("files", written),
        ("Redis", sent + aof),
        ("arguments", titles),
        ("output", (tmp_path / "printed").read_bytes()),
    ):
        for secret in secrets:
            assert secret.encode() not in data, where
    assert not list((tmp_path / "out").rglob("*.key")), "the keys of the run were not deleted at its end"

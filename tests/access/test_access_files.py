"""`fedqueue acl`: the files that the command writes, keeps and removes, and its output."""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedqueue.errors import ConfigurationError
from fedqueue_coordinator.cli.main import app
from fedqueue_coordinator.operator.access.acl import chosen_parties, write_access, write_access_folders

SERVER = "redis://redis.example.org:6380"


def write(folder: Path, *clients: str, server: str = SERVER) -> dict[str, str]:
    return write_access(folder, "digits", clients, server, shared_worker=False)


def test_each_user_gets_a_url_with_a_password_of_its_own(tmp_path: Path) -> None:
    urls = write(tmp_path / "a", "north", "site.example.org")
    assert set(urls) == {"coordinator", "viewer", "admin", "worker-north", "worker-site.example.org"}
    for user, url in urls.items():
        assert url.startswith(f"redis://{user}:")
        assert url.endswith("@redis.example.org:6380")
        assert (tmp_path / "a" / f"{user}.url").read_text() == url + "\n"
    assert len({url.split(":")[2] for url in urls.values()}) == len(urls)


def test_urls_of_others_in_the_folder_stay(tmp_path: Path) -> None:
    (tmp_path / "redis.url").write_text("of another program")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "redis.password").write_text("mine")
    write(tmp_path, "north", "south")
    write(tmp_path, "north")
    assert (tmp_path / "redis.url").exists()
    assert not (tmp_path / "worker-south.url").exists()
    write_access_folders(tmp_path, "digits", ["north"], shared_worker=True)
    assert (tmp_path / "site" / "redis.password").read_text() == "mine"


def test_acl_file_has_password_digests_and_no_default_user(tmp_path: Path) -> None:
    urls = write(tmp_path, "north")
    first, *lines = (tmp_path / "users.acl").read_text().splitlines()
    assert first == "user default reset off ~* &* +@all"
    for line in lines:
        _, user, reset, on, digest, *_ = line.split()
        password = urls[user].split(":")[2].partition("@")[0]
        assert (reset, on) == ("reset", "on")
        assert digest == "#" + hashlib.sha256(password.encode()).hexdigest()


def test_rewriting_acls_keeps_passwords_and_drops_old_clients(tmp_path: Path) -> None:
    before = write(tmp_path, "north", "south")
    after = write(tmp_path, "north", "east", server="rediss://redis.example.org")
    assert after["worker-north"] == before["worker-north"].replace("redis://", "rediss://").removesuffix(":6380")
    assert {path.stem for path in tmp_path.glob("*.url")} == set(after)
    assert "worker-south" not in (tmp_path / "users.acl").read_text()


def test_deleted_password_file_gets_a_new_password(tmp_path: Path) -> None:
    before = write(tmp_path, "north")
    (tmp_path / "worker-north.url").unlink()
    after = write(tmp_path, "north")
    assert after["worker-north"] != before["worker-north"]
    assert after["viewer"] == before["viewer"]


def test_readable_secret_files_are_replaced_by_private_ones(tmp_path: Path) -> None:
    write(tmp_path, "north")
    for path in tmp_path.iterdir():
        path.chmod(0o644)
    write(tmp_path, "north")
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}


def passwords(folder: Path) -> dict[str, str]:
    return {path.parent.name: path.read_text().strip() for path in folder.glob("*/redis.password")}


def test_user_folders_share_no_secret(tmp_path: Path) -> None:
    assert write_access_folders(tmp_path, "digits", ["north"], shared_worker=True) == [
        "coordinator", "viewer", "worker", "worker-north", "admin",
    ]  # fmt: skip
    made = passwords(tmp_path)
    assert set(made) == {"coordinator", "viewer", "worker", "worker-north", "server"}
    assert len(set(made.values())) == len(made)
    assert all(len(password) >= 40 for password in made.values())
    rules = (tmp_path / "server" / "users.acl").read_text()
    for folder, password in made.items():
        user = "admin" if folder == "server" else folder
        assert f"user {user} reset on #{hashlib.sha256(password.encode()).hexdigest()} " in rules
        assert password not in rules
        mode = stat.S_IMODE((tmp_path / folder / "redis.password").stat().st_mode)
        assert mode == (0o644 if user == "admin" else 0o600), "the server's own container runs as another user"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()].count("users.acl") == 1


def test_rewriting_folders_keeps_passwords_drops_old_users(tmp_path: Path) -> None:
    write_access_folders(tmp_path, "first", ["north", "south"], shared_worker=True)
    before = passwords(tmp_path)
    write_access_folders(tmp_path, "second", ["north"], shared_worker=True)
    assert passwords(tmp_path) == {user: word for user, word in before.items() if user != "worker-south"}
    rules = (tmp_path / "server" / "users.acl").read_text()
    assert "fedqueue:{second}:" in rules
    assert "first" not in rules


def test_command_writes_folders_for_volumes(tmp_path: Path) -> None:
    arguments = ["acl", "digits", "--client", "north", "--output", str(tmp_path), "--shared-worker", "--dir-per-user"]
    said = CliRunner().invoke(app, arguments)
    assert said.exit_code == 0, said.output
    assert not [password for password in passwords(tmp_path).values() if password in said.output]
    assert "worker" in passwords(tmp_path)


@pytest.mark.parametrize("server", ["http://h", "h:6379", "redis://u:hunter2@h", "redis://", "sentinel://h/s", ""])
def test_invalid_server_url_is_refused_without_credentials(tmp_path: Path, server: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^--server") as caught:
        write(tmp_path / "x", "north", server=server)
    assert "hunter2" not in str(caught.value)
    assert not (tmp_path / "x").exists()


def test_acl_clients_come_from_configuration_or_command_line(tmp_path: Path) -> None:
    path = tmp_path / "f.toml"
    path.write_text('name = "r"\n[task]\nentrypoint = "t.py:T"\n[clients]\ncount = 2\n[stop]\nversions = 1\n')
    assert chosen_parties(str(path), [], [], []) == ("r", ["client-0", "client-1"], [])
    assert chosen_parties(str(path), ["north"], [], ["name=other"]) == ("other", ["north"], [])
    assert chosen_parties("r", ["north"], ["audit"], []) == ("r", ["north"], ["audit"])


@pytest.mark.parametrize(
    ("run", "clients", "key"),
    [("r", [], "--client"), ("r", ["a b"], "--client"), ("r*", ["a"], "RUN"), ("", ["a"], "RUN")],
)
def test_invalid_names_are_errors_that_name_the_key(run: str, clients: list[Any], key: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{key}"):
        chosen_parties(run, clients, [], [])


def test_passwords_are_printed_only_on_request(tmp_path: Path) -> None:
    arguments = ["acl", "digits", "--client", "north", "--output", str(tmp_path)]
    quiet = CliRunner().invoke(app, arguments)
    secrets = [path.read_text().strip() for path in tmp_path.glob("*.url")]
    assert quiet.exit_code == 0
    assert not [secret for secret in secrets if secret.split(":")[2].partition("@")[0] in quiet.output]
    loud = CliRunner().invoke(app, [*arguments, "--print-urls"])
    assert set(loud.output.splitlines()[1:]) == set(secrets)

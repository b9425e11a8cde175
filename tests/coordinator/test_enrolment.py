"""Enrollment: the key files that enrolling, rotating and revoking a client write."""

from __future__ import annotations

import datetime
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedqueue.errors import ConfigurationError, NotEnrolled
from fedqueue.protocol.coordinator_identity import load_coordinator_identity
from fedqueue.protocol.key_files import SigningKey, read_public_keys, read_signing_key, write_public_keys
from fedqueue.protocol.site_identity import load_site_identity
from fedqueue_coordinator.cli.main import app
from fedqueue_coordinator.operator.access.acl import write_access_folders
from fedqueue_coordinator.operator.access.certificates import write_certificates
from fedqueue_coordinator.operator.access.enrolment import KEEPER, enroll, enroll_missing, generate_key, revoke


def ids(path: Any) -> Any:
    return [key.id for key in read_public_keys(path)]


def test_site_gets_only_its_key_and_coordinators_public_key(tmp_path: Path) -> None:
    site = enroll(tmp_path, "north")
    assert sorted(f.name for f in site.iterdir()) == ["coordinator.pub", "north.key"]
    assert (site / "north.key").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "coordinator.key").stat().st_mode & 0o777 == 0o600
    assert ids(tmp_path / "clients" / "north.pub") == [read_signing_key(site / "north.key").public.id]
    assert ids(site / "coordinator.pub") == [read_signing_key(tmp_path / "coordinator.key").public.id]
    assert load_site_identity(site, "run", "session").clients == ["north"]


def test_enrolling_more_sites_keeps_the_coordinators_key(tmp_path: Path) -> None:
    enroll(tmp_path, "north")
    before = (tmp_path / "coordinator.key").read_bytes()
    assert enroll_missing(tmp_path, ["north", "south"]) == ["south"]
    assert enroll_missing(tmp_path, ["north", "south"]) == []
    assert (tmp_path / "coordinator.key").read_bytes() == before


def test_rotation_keeps_only_the_previous_key(tmp_path: Path) -> None:
    keys = [read_signing_key(enroll(tmp_path, "north", rotate=i > 0) / "north.key").public.id for i in range(3)]
    assert ids(tmp_path / "clients" / "north.pub") == [keys[2], keys[1]]
    revoke(tmp_path, "north", previous=True)
    assert ids(tmp_path / "clients" / "north.pub") == [keys[2]]


def test_rotated_key_is_valid_before_the_site_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker signs with a new key once the file exists. A crash during enrollment leaves no client without a key."""
    known, save = [], SigningKey.save
    public_file = tmp_path / "clients" / "c0.pub"

    def saved(self: Any, path: Any) -> None:
        known.append(public_file.exists() and self.public in read_public_keys(public_file))
        save(self, path)

    enroll_missing(tmp_path, [])  # the coordinator's own key
    monkeypatch.setattr(SigningKey, "save", saved)
    enroll(tmp_path, "c0")
    enroll(tmp_path, "c0", rotate=True)
    assert known == [False, True]


def test_key_made_by_the_site_needs_no_private_copy(tmp_path: Path) -> None:
    own = SigningKey.generate()
    write_public_keys(tmp_path / "sent.pub", [own.public])
    site = enroll(tmp_path / "keys", "north", public=tmp_path / "sent.pub")
    assert [f.name for f in site.iterdir()] == ["coordinator.pub"]
    assert ids(tmp_path / "keys" / "clients" / "north.pub") == [own.public.id]


def test_revoked_client_returns_only_when_enrolled_by_name(tmp_path: Path) -> None:
    enroll(tmp_path, "north")
    revoke(tmp_path, "north")
    identity = load_coordinator_identity(tmp_path, "run")
    with pytest.raises(NotEnrolled, match="client north was revoked"):
        identity.open("update", "north", [], b"")
    assert enroll_missing(tmp_path, ["north"]) == []
    enroll(tmp_path, "north")
    assert identity.is_enrolled("north")


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda f: enroll(f, "north"), "CLIENT = 'north': is already enrolled; pass --rotate for a new key"),
        (lambda f: enroll(f, "south", rotate=True), "CLIENT = 'south': is not enrolled; leave out --rotate"),
        (lambda f: enroll(f, "../x"), "CLIENT = '../x': must be 1 to 64 letters"),
        (
            lambda f: enroll(f, "coordinator"),
            "CLIENT = 'coordinator': is the name of the coordinator's own keys; choose another name",
        ),
        (lambda f: revoke(f, "south"), "CLIENT = 'south': is not enrolled"),
        (
            lambda f: load_coordinator_identity(f / "no", "run"),
            "holds no coordinator.key; `fedqueue enroll` makes keys for all",
        ),
        (lambda f: load_site_identity(f, "run", "s"), "holds no CLIENT.key"),
        (
            lambda f: read_public_keys(f / "coordinator.key"),
            "not a public key; write lines `ed25519 BASE64` of 32-byte keys",
        ),
    ],
)
def test_enrollment_error_names_the_problem_and_the_remedy(
    tmp_path: Path, act: Callable[..., Any], message: str
) -> None:
    enroll(tmp_path, "north")
    with pytest.raises(ConfigurationError) as caught:
        act(tmp_path)
    assert message in str(caught.value)


def test_damaged_public_key_affects_its_client_only(tmp_path: Path) -> None:
    enroll(tmp_path, "north")
    identity = load_coordinator_identity(tmp_path, "run")
    (tmp_path / "clients" / "north.pub").write_text("ed25519 nonsense\n")
    with pytest.raises(NotEnrolled):
        identity.open("update", "north", [], b"")


def test_key_files_have_fixed_modes_under_any_umask(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    before = os.umask(0)
    try:
        enroll(keys, "north")
        write_access_folders(tmp_path / "access", "toy", ["north"], shared_worker=False)
        write_certificates(tmp_path / "certs", ["localhost"], ["north"], 1)
    finally:
        os.umask(before)
    made = [*tmp_path.rglob("*")]
    assert len(made) > 20
    assert [path for path in made if path.stat().st_mode & 0o022] == []


@pytest.mark.parametrize("place", ["coordinator.pub", ".", "clients", "sites/north", "sites/north/coordinator.pub"])
def test_public_keys_that_anybody_may_replace_are_refused(tmp_path: Path, place: str) -> None:
    site = enroll(tmp_path, "north")
    opened = tmp_path / place
    opened.chmod(opened.stat().st_mode | 0o002)
    load = load_site_identity if "sites" in place else load_coordinator_identity
    arguments = (site, "run", "session") if "sites" in place else (tmp_path, "run")
    with pytest.raises(ConfigurationError, match=r"any user of this machine may write there.*chmod go-w"):
        load(*arguments)


def test_client_whose_key_anybody_may_replace_is_refused(tmp_path: Path) -> None:
    enroll(tmp_path, "north")
    (tmp_path / "clients" / "north.pub").chmod(0o666)
    with pytest.raises(NotEnrolled, match="any user of this machine may write there"):
        load_coordinator_identity(tmp_path, "run").open("update", "north", [], b"")


def test_folder_with_the_sticky_bit_may_have_keys(tmp_path: Path) -> None:
    site = enroll(tmp_path, "north")
    site.chmod(0o1777)
    assert load_site_identity(site, "run", "session").clients == ["north"]


@pytest.mark.parametrize("foreign", ["server.key", "north.pem", "ca.pem", "ca.key"])
@pytest.mark.parametrize("own_authority", [True, False])
def test_certs_replace_no_file_from_elsewhere(tmp_path: Path, foreign: str, own_authority: bool) -> None:
    if own_authority:
        write_certificates(tmp_path, ["localhost"], ["south"], 1)
        (tmp_path / foreign).with_suffix(".pem").unlink(missing_ok=True)
    (tmp_path / foreign).write_text("mine")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigurationError, match="did not make there"):
        write_certificates(tmp_path, ["localhost"], ["north"], 1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_certs_renew_what_their_own_authority_issued(tmp_path: Path) -> None:
    write_certificates(tmp_path, ["localhost"], ["north"], 1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_certificates(tmp_path, ["localhost"], ["north"], 1)
    same = [name for name, data in before.items() if (tmp_path / name).read_bytes() == data]
    assert sorted(same) == ["ca.key", "ca.pem"]


def test_certs_of_an_expired_authority_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_certificates(tmp_path, ["localhost"], ["north"], 1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    today = datetime.datetime.now(datetime.UTC)

    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return today + datetime.timedelta(days=2)

    monkeypatch.setattr(datetime, "datetime", Later)
    with pytest.raises(ConfigurationError, match=f"a CA that expired on {today + datetime.timedelta(days=1):%Y-%m-%d}"):
        write_certificates(tmp_path, ["localhost"], ["north"], 30)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", ["ca", "server", "../x", "a/b", ""])
def test_certs_refuse_a_client_name_of_another_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigurationError, match="--client"):
        write_certificates(tmp_path, ["localhost"], [name], 1)
    assert list(tmp_path.iterdir()) == []


def test_keys_of_a_local_run_outlive_their_files(tmp_path: Path) -> None:
    enroll(tmp_path, "north")
    identities = [load_coordinator_identity(tmp_path, "run", revocable) for revocable in (True, False)]
    assert [identity.is_enrolled("north") for identity in identities] == [True, True]
    shutil.rmtree(tmp_path / "clients")
    assert [identity.is_enrolled("north") for identity in identities] == [False, True]


# Keepers


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_keeper_gets_its_key_and_the_clients_it_counts(tmp_path: Path) -> None:
    enroll(tmp_path, "north")
    own = enroll(tmp_path, "university", role=KEEPER)
    assert own == tmp_path / "keeper-sites" / "university"
    assert names(own) == ["clients/north.pub", "coordinator.pub", "university.key"]
    assert (own / "university.key").stat().st_mode & 0o777 == 0o600
    assert ids(tmp_path / "keepers" / "university.pub") == [read_signing_key(own / "university.key").public.id]
    assert ids(own / "clients" / "north.pub") == ids(tmp_path / "clients" / "north.pub")


def test_sites_get_the_keepers_whichever_is_enrolled_first(tmp_path: Path) -> None:
    first = enroll(tmp_path, "north")
    keeper = enroll(tmp_path, "university", role=KEEPER)
    second = enroll(tmp_path, "south")
    for site in (first, second):
        assert ids(site / "keepers" / "university.pub") == ids(tmp_path / "keepers" / "university.pub")
    assert names(keeper / "clients") == ["north.pub", "south.pub"]
    assert names(second) == ["coordinator.pub", "keepers/university.pub", "south.key"]
    assert load_site_identity(second, "run", "session").clients == ["south"]


def test_folder_that_all_sites_share_gets_the_keepers(tmp_path: Path) -> None:
    enroll_missing(tmp_path / "keys", ["c0", "c1"], tmp_path / "shared")
    assert enroll_missing(tmp_path / "keys", ["university"], role=KEEPER) == ["university"]
    assert not (tmp_path / "shared" / "keepers").exists()
    assert enroll_missing(tmp_path / "keys", ["c0", "c1"], tmp_path / "shared") == []
    assert names(tmp_path / "shared" / "keepers") == ["university.pub"]


def test_rotated_client_is_counted_under_both_keys(tmp_path: Path) -> None:
    enroll(tmp_path, "north")
    keeper = enroll(tmp_path, "university", role=KEEPER)
    enroll(tmp_path, "north", rotate=True)
    assert ids(keeper / "clients" / "north.pub") == ids(tmp_path / "clients" / "north.pub")
    assert len(ids(keeper / "clients" / "north.pub")) == 2
    revoke(tmp_path, "north", previous=True)
    assert ids(keeper / "clients" / "north.pub") == ids(tmp_path / "clients" / "north.pub")
    revoke(tmp_path, "north")
    assert names(keeper / "clients") == []


def test_rotated_or_revoked_keeper_changes_at_every_site(tmp_path: Path) -> None:
    site = enroll(tmp_path, "north")
    enroll(tmp_path, "university", role=KEEPER)
    enroll(tmp_path, "university", rotate=True, role=KEEPER)
    assert len(ids(site / "keepers" / "university.pub")) == 2
    revoke(tmp_path, "university", previous=True, role=KEEPER)
    assert ids(site / "keepers" / "university.pub") == ids(tmp_path / "keepers" / "university.pub")
    revoke(tmp_path, "university", role=KEEPER)
    assert names(site) == ["coordinator.pub", "north.key"]
    assert names(tmp_path / "keepers") == []
    assert enroll_missing(tmp_path, ["university"], role=KEEPER) == [], "a revoked keeper returns by name only"


def test_keys_that_a_site_has_pinned_itself_stay(tmp_path: Path) -> None:
    site = enroll(tmp_path, "north")
    write_public_keys(site / "keepers" / "own-choice.pub", [SigningKey.generate().public])
    enroll(tmp_path, "university", role=KEEPER)
    assert names(site / "keepers") == ["own-choice.pub", "university.pub"]


def test_client_and_keeper_of_one_name_have_two_keys(tmp_path: Path) -> None:
    enroll(tmp_path, "north")
    enroll(tmp_path, "north", role=KEEPER)
    revoke(tmp_path, "north")
    assert names(tmp_path / "keepers") == ["north.pub"]
    assert not load_coordinator_identity(tmp_path, "run").is_enrolled("north")


def test_rotated_coordinators_key_reaches_keepers(tmp_path: Path) -> None:
    keeper = enroll(tmp_path, "university", role=KEEPER)
    enroll(tmp_path, "coordinator", rotate=True)
    assert len(ids(keeper / "coordinator.pub")) == 2
    with pytest.raises(
        ConfigurationError, match=r"--keeper = 'coordinator': is the name of the coordinator's own keys"
    ):
        enroll(tmp_path, "coordinator", rotate=True, role=KEEPER)


def test_key_made_by_its_owner_never_leaves_its_machine(tmp_path: Path) -> None:
    sent = generate_key(tmp_path / "own", "university")
    assert (tmp_path / "own" / "university.key").stat().st_mode & 0o777 == 0o600
    folder = enroll(tmp_path / "keys", "university", public=sent, role=KEEPER)
    assert names(folder) == ["coordinator.pub"]
    assert ids(tmp_path / "keys" / "keepers" / "university.pub") == [
        read_signing_key(tmp_path / "own" / "university.key").public.id
    ]
    with pytest.raises(ConfigurationError, match=r"university\.key exists; choose another folder"):
        generate_key(tmp_path / "own", "university")
    with pytest.raises(ConfigurationError, match=r"NAME = '\.\./x': must be"):
        generate_key(tmp_path / "own", "../x")


# Commands


def test_commands_of_keepers_say_what_to_do_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def said(*words: str) -> str:
        answer = CliRunner().invoke(app, [*words])
        assert answer.exit_code == 0, answer.output
        return answer.output

    key = said("keygen", "university", "--output", "mine")
    assert key.startswith("university: send mine/university.pub to the operator; key ")
    told = said("enroll", "--keeper", "university", "--public", "mine/university.pub")
    assert "university: give keys/keeper-sites/university to the keeper" in told
    assert "university: give keys/keepers/university.pub to every site" in told
    assert key.split()[-1] == told.split("\n")[0].split()[-1], "both name the same key"
    assert said("enroll", "north").startswith("north: give keys/sites/north to the site, and keep no copy; key ")
    assert said("revoke", "--keeper", "university") == "university: all keys revoked\n"


def test_configuration_enrolls_its_keepers_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("f.toml").write_text(
        '[task]\nentrypoint = "t.py:T"\n[clients]\ncount = 4\n[secure]\nkeepers = ["a", "b"]\n[stop]\nversions = 1\n'
    )
    answer = CliRunner().invoke(app, ["enroll", "--config", "f.toml"])
    assert answer.output.splitlines() == [
        "enrolled 2 keepers: a, b",
        "enrolled 4 clients: client-0, client-1, client-2, client-3",
    ]
    assert names(Path("keys/sites/client-0")) == ["client-0.key", "coordinator.pub", "keepers/a.pub", "keepers/b.pub"]
    assert len(names(Path("keys/keeper-sites/b/clients"))) == 4


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["enroll"], "CLIENT: missing"),
        (["enroll", "north", "--keeper", "a", "--public", "x.pub"], "CLIENT = 'north a': more than one with --public"),
        (["enroll", "--keeper", "a", "--keeper", "b", "--site", "x"], "'a b': more than one with --site and --keeper"),
        (["enroll", "--keeper", "a", "--config", "f.toml"], "not together with CLIENT, --keeper, --rotate or --public"),
        (["revoke"], "CLIENT: missing; name a client, or --keeper NAME"),
        (["revoke", "north", "--keeper", "a"], "CLIENT = 'north': not together with --keeper"),
        (["revoke", "--keeper", "a"], "--keeper = 'a': is not enrolled; keys/keepers has the enrolled keepers"),
    ],
)
def test_mistaken_command_names_the_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], problem: str
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = CliRunner().invoke(app, words)
    assert isinstance(answer.exception, ConfigurationError)
    assert problem in str(answer.exception)

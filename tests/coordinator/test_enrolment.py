"""Enrollment: the key files that enrolling, rotating and revoking a client write."""

from __future__ import annotations

import pytest

from fedqueue.errors import ConfigurationError, NotEnrolled
from fedqueue.protocol.coordinator_identity import load_coordinator_identity
from fedqueue.protocol.key_files import SigningKey, read_public_keys, read_signing_key, write_public_keys
from fedqueue.protocol.site_identity import load_site_identity
from fedqueue_coordinator.operator.access.enrolment import enroll, enroll_missing, revoke


def ids(path):
    return [key.id for key in read_public_keys(path)]


def test_site_gets_only_its_key_and_coordinators_public_key(tmp_path):
    site = enroll(tmp_path, "north")
    assert sorted(f.name for f in site.iterdir()) == ["coordinator.pub", "north.key"]
    assert (site / "north.key").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "coordinator.key").stat().st_mode & 0o777 == 0o600
    assert ids(tmp_path / "clients" / "north.pub") == [read_signing_key(site / "north.key").public.id]
    assert ids(site / "coordinator.pub") == [read_signing_key(tmp_path / "coordinator.key").public.id]
    assert load_site_identity(site, "run", "session").clients == ["north"]


def test_enrolling_more_sites_keeps_the_coordinators_key(tmp_path):
    enroll(tmp_path, "north")
    before = (tmp_path / "coordinator.key").read_bytes()
    assert enroll_missing(tmp_path, ["north", "south"]) == ["south"]
    assert enroll_missing(tmp_path, ["north", "south"]) == []
    assert (tmp_path / "coordinator.key").read_bytes() == before


def test_rotation_keeps_only_the_previous_key(tmp_path):
    keys = [read_signing_key(enroll(tmp_path, "north", rotate=i > 0) / "north.key").public.id for i in range(3)]
    assert ids(tmp_path / "clients" / "north.pub") == [keys[2], keys[1]]
    revoke(tmp_path, "north", previous=True)
    assert ids(tmp_path / "clients" / "north.pub") == [keys[2]]


def test_rotated_key_is_valid_before_the_site_has_it(tmp_path, monkeypatch):
    """A worker signs with a new key once the file exists. A crash during enrollment leaves no client without a key."""
    known, save = [], SigningKey.save
    public_file = tmp_path / "clients" / "c0.pub"

    def saved(self, path):
        known.append(public_file.exists() and self.public in read_public_keys(public_file))
        save(self, path)

    enroll_missing(tmp_path, [])  # the coordinator's own key
    monkeypatch.setattr(SigningKey, "save", saved)
    enroll(tmp_path, "c0")
    enroll(tmp_path, "c0", rotate=True)
    assert known == [False, True]


def test_key_made_by_the_site_needs_no_private_copy(tmp_path):
    own = SigningKey.generate()
    write_public_keys(tmp_path / "sent.pub", [own.public])
    site = enroll(tmp_path / "keys", "north", public=tmp_path / "sent.pub")
    assert [f.name for f in site.iterdir()] == ["coordinator.pub"]
    assert ids(tmp_path / "keys" / "clients" / "north.pub") == [own.public.id]


def test_revoked_client_returns_only_when_enrolled_by_name(tmp_path):
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
def test_enrollment_error_names_the_problem_and_the_remedy(tmp_path, act, message):
    enroll(tmp_path, "north")
    with pytest.raises(ConfigurationError) as caught:
        act(tmp_path)
    assert message in str(caught.value)


def test_damaged_public_key_affects_its_client_only(tmp_path):
    enroll(tmp_path, "north")
    identity = load_coordinator_identity(tmp_path, "run")
    (tmp_path / "clients" / "north.pub").write_text("ed25519 nonsense\n")
    with pytest.raises(NotEnrolled):
        identity.open("update", "north", [], b"")

"""Which sites the coordinator believes: the files that enrolling, rotating and revoking leave."""

from __future__ import annotations

import pytest

from fedqueue.errors import ConfigurationError, NotEnrolled
from fedqueue.protocol.coordinator_identity import load_coordinator_identity
from fedqueue.protocol.key_files import SigningKey, read_public_keys, read_signing_key, write_public_keys
from fedqueue.protocol.site_identity import load_site_identity
from fedqueue_coordinator.operator.access.enrolment import enroll, enroll_missing, revoke


def ids(path):
    return [key.id for key in read_public_keys(path)]


def test_site_gets_its_key_and_the_coordinators_public_one_and_nothing_else(tmp_path):
    site = enroll(tmp_path, "north")
    assert sorted(f.name for f in site.iterdir()) == ["coordinator.pub", "north.key"]
    assert (site / "north.key").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "coordinator.key").stat().st_mode & 0o777 == 0o600
    assert ids(tmp_path / "clients" / "north.pub") == [read_signing_key(site / "north.key").public.id]
    assert ids(site / "coordinator.pub") == [read_signing_key(tmp_path / "coordinator.key").public.id]
    assert load_site_identity(site, "run", "session").clients == ["north"]


def test_coordinators_key_stays_when_more_sites_are_enrolled(tmp_path):
    enroll(tmp_path, "north")
    before = (tmp_path / "coordinator.key").read_bytes()
    assert enroll_missing(tmp_path, ["north", "south"]) == ["south"]
    assert enroll_missing(tmp_path, ["north", "south"]) == []
    assert (tmp_path / "coordinator.key").read_bytes() == before


def test_rotation_keeps_the_former_key_and_no_older_one(tmp_path):
    keys = [read_signing_key(enroll(tmp_path, "north", rotate=i > 0) / "north.key").public.id for i in range(3)]
    assert ids(tmp_path / "clients" / "north.pub") == [keys[2], keys[1]]
    revoke(tmp_path, "north", previous=True)
    assert ids(tmp_path / "clients" / "north.pub") == [keys[2]]


def test_new_key_counts_before_the_site_has_it_and_a_first_one_not_before(tmp_path, monkeypatch):
    """A worker signs with a new key as soon as it lies there; a death in between leaves nobody enrolled without one."""
    known, save = [], SigningKey.save
    place = tmp_path / "clients" / "c0.pub"

    def saved(self, path):
        known.append(place.exists() and self.public in read_public_keys(place))
        save(self, path)

    enroll_missing(tmp_path, [])  # the coordinator's own key
    monkeypatch.setattr(SigningKey, "save", saved)
    enroll(tmp_path, "c0")
    enroll(tmp_path, "c0", rotate=True)
    assert known == [False, True]


def test_key_that_a_site_made_itself_is_taken_and_no_private_one_is_made(tmp_path):
    own = SigningKey.generate()
    write_public_keys(tmp_path / "sent.pub", [own.public])
    site = enroll(tmp_path / "keys", "north", public=tmp_path / "sent.pub")
    assert [f.name for f in site.iterdir()] == ["coordinator.pub"]
    assert ids(tmp_path / "keys" / "clients" / "north.pub") == [own.public.id]


def test_revoked_client_stays_out_when_all_are_enrolled_and_comes_back_by_name(tmp_path):
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
        (lambda f: enroll(f, "north"), "CLIENT = 'north': is enrolled already: --rotate makes a new key"),
        (lambda f: enroll(f, "south", rotate=True), "CLIENT = 'south': is not enrolled yet: leave out --rotate"),
        (lambda f: enroll(f, "../x"), "CLIENT = '../x': 1 to 64 letters"),
        (lambda f: enroll(f, "coordinator"), "CLIENT = 'coordinator': another name"),
        (lambda f: revoke(f, "south"), "CLIENT = 'south': is not enrolled"),
        (
            lambda f: load_coordinator_identity(f / "no", "run"),
            "holds no coordinator.key; `fedqueue enroll` makes keys",
        ),
        (lambda f: load_site_identity(f, "run", "s"), "holds no CLIENT.key"),
        (lambda f: read_public_keys(f / "coordinator.key"), "expected lines `ed25519 BASE64` of 32-byte keys"),
    ],
)
def test_mistake_names_what_is_wrong_and_what_to_do(tmp_path, act, message):
    enroll(tmp_path, "north")
    with pytest.raises(ConfigurationError) as caught:
        act(tmp_path)
    assert message in str(caught.value)


def test_damaged_public_key_is_not_the_end_of_everybody_elses_run(tmp_path):
    enroll(tmp_path, "north")
    identity = load_coordinator_identity(tmp_path, "run")
    (tmp_path / "clients" / "north.pub").write_text("ed25519 nonsense\n")
    with pytest.raises(NotEnrolled):
        identity.open("update", "north", [], b"")

"""`fedqueue enroll`, `revoke` and `keygen`: the folders of keys by which the parties verify each other.

`fedqueue.protocol.coordinator_identity` reads the coordinator's folder. Each site and each keeper has a folder of its
own, KEYS/sites/CLIENT and KEYS/keeper-sites/KEEPER by default:

    CLIENT.key      secret                        KEEPER.key         secret
    coordinator.pub                               coordinator.pub
    keepers/*.pub   the keepers that it trusts    clients/*.pub      the clients that it counts

A site or a keeper may instead make its key pair itself and send the operator the public key. What is enrolled is copied
to all folders of others that are still in KEYS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from fedqueue.config.names import ClientId
from fedqueue.errors import ConfigurationError
from fedqueue.protocol.key_files import (
    CLIENTS,
    COORDINATOR,
    COORDINATOR_KEY,
    COORDINATOR_PUBLIC,
    KEEPERS,
    KEY_SUFFIX,
    PUBLIC_SUFFIX,
    REVOKED,
    PublicKey,
    SigningKey,
    read_public_keys,
    read_signing_key,
    write_public_keys,
)

SITES, KEEPER_SITES = "sites", "keeper-sites"
ACCEPTED_KEYS = 2
"""Public keys that are valid at the same time after a rotation: the new one and the previous one."""


@dataclass(frozen=True)
class Role:
    """What is enrolled: how errors name it, and where its keys are in the coordinator's folder."""

    argument: str
    noun: str
    enrolled: str
    """The folder of the public keys."""
    revoked: str
    """The folder of the public keys that are no longer accepted."""
    sites: str
    """The folder with a folder for each owner of such a key."""


CLIENT = Role("CLIENT", "client", CLIENTS, REVOKED, SITES)
KEEPER = Role("--keeper", "keeper", KEEPERS, f"{REVOKED}/{KEEPERS}", KEEPER_SITES)


def coordinator_key(folder: Path) -> PublicKey:
    """Return the coordinator's public key; generates the key pair if the folder has no key."""
    path = folder / COORDINATOR_KEY
    if not path.exists():
        SigningKey.generate().save(path)
    public = read_signing_key(path).public
    if not (folder / COORDINATOR_PUBLIC).exists():
        write_public_keys(folder / COORDINATOR_PUBLIC, [public])
    return public


def rotate_coordinator(folder: Path, site: Path | None = None) -> Path:
    """Generate a new key for the coordinator; returns the path of coordinator.pub, with the new and the previous key.

    Writes coordinator.pub to the folder `site` too, or else to the folder of each site and keeper in `folder`. A
    running coordinator keeps its key; the next coordinator that takes the lead uses the new one.
    """
    coordinator_key(folder)
    new = SigningKey.generate()
    _publish(folder, [new.public, *read_public_keys(folder / COORDINATOR_PUBLIC)][:ACCEPTED_KEYS], site)
    new.save(folder / COORDINATOR_KEY)
    return folder / COORDINATOR_PUBLIC


def _publish(folder: Path, keys: Sequence[PublicKey], site: Path | None = None) -> None:
    for target in (folder, *([site] if site else [*_folders(folder, CLIENT), *_folders(folder, KEEPER)])):
        write_public_keys(target / COORDINATOR_PUBLIC, keys)


def _folders(folder: Path, role: Role) -> list[Path]:
    """The folders of sites, or of keepers, that are still in `folder`."""
    base = folder / role.sites
    return [path for path in (base, *sorted(base.glob("*"))) if (path / COORDINATOR_PUBLIC).exists()]


def enroll(
    folder: Path,
    name: str,
    site: Path | None = None,
    rotate: bool = False,
    public: Path | None = None,
    role: Role = CLIENT,
) -> Path:
    """Generate the key pair of a client or keeper, or accept the public key in `public`; returns its owner's folder.

    With `rotate`, it gets a new key, and its previous key stays valid until it is revoked or the key is rotated again.
    The client `coordinator` with `rotate` is the coordinator itself: see `rotate_coordinator`.

    Raises ConfigurationError for an invalid name, for one that is already enrolled, and, with `rotate`, for one that is
    not enrolled.
    """
    if name == COORDINATOR and role is CLIENT and rotate and not public:
        return rotate_coordinator(folder, site)
    site = _enroll(folder, name, site, rotate, public, role)
    _distribute(folder, role)
    _copy_keys(folder, _other(role), site)
    return site


def _enroll(folder: Path, name: str, site: Path | None, rotate: bool, public: Path | None, role: Role) -> Path:
    _check_name(name, role)
    enrolled = folder / role.enrolled / f"{name}{PUBLIC_SUFFIX}"
    if enrolled.exists() != rotate:
        problem = "is not enrolled" if rotate else "is already enrolled"
        hint = "leave out --rotate" if rotate else "pass --rotate for a new key"
        raise ConfigurationError(role.argument, name, problem, hint)
    coordinator_key(folder)
    site = site or folder / role.sites / name
    before = read_public_keys(enrolled) if rotate else []
    key = None
    if public:
        new = read_public_keys(public, "--public")[:1]
    else:
        key = SigningKey.generate()
        new = [key.public]
    write_public_keys(site / COORDINATOR_PUBLIC, read_public_keys(folder / COORDINATOR_PUBLIC))
    if key and not rotate:  # before it is enrolled, so that an enrolled client always has a key
        key.save(site / f"{name}{KEY_SUFFIX}")
    write_public_keys(enrolled, [*new, *before][:ACCEPTED_KEYS])
    if key and rotate:  # after its public key is known: a worker signs with its new key at once
        key.save(site / f"{name}{KEY_SUFFIX}")
    return site


def _distribute(folder: Path, role: Role) -> None:
    """Copy the public keys of this role to all folders of the other one in `folder`."""
    for target in _folders(folder, _other(role)):
        _copy_keys(folder, role, target)


def _other(role: Role) -> Role:
    return KEEPER if role is CLIENT else CLIENT


def _copy_keys(folder: Path, role: Role, target: Path) -> None:
    """Write the enrolled public keys of this role to `target`, and delete revoked ones there."""
    for path in (folder / role.revoked).glob(f"*{PUBLIC_SUFFIX}"):
        if not (folder / role.enrolled / path.name).exists():
            (target / role.enrolled / path.name).unlink(missing_ok=True)
    for path in (folder / role.enrolled).glob(f"*{PUBLIC_SUFFIX}"):
        copy, keys = target / role.enrolled / path.name, read_public_keys(path)
        if not copy.exists() or read_public_keys(copy) != keys:
            write_public_keys(copy, keys)


def enroll_missing(folder: Path, names: Sequence[str], site: Path | None = None, role: Role = CLIENT) -> list[str]:
    """Enroll each of `names` that is neither enrolled nor revoked; returns those.

    The folder `site`, which all of them share, gets the present keys of the other role too: for clients, of keepers.
    """
    coordinator_key(folder)
    missing = [
        name
        for name in names
        if not any((folder / kind / f"{name}{PUBLIC_SUFFIX}").exists() for kind in (role.enrolled, role.revoked))
    ]
    for name in missing:
        _enroll(folder, name, site, False, None, role)
    _distribute(folder, role)
    for target in [site] if site else [folder / role.sites / name for name in missing]:
        _copy_keys(folder, _other(role), target)
    return missing


def revoke(folder: Path, name: str, previous: bool = False, role: Role = CLIENT) -> None:
    """Revoke the keys of a client or keeper, or with `previous` only the key before the last rotation.

    Takes effect immediately where `folder` is used. For the client `coordinator`, only the previous key can be revoked.
    Raises ConfigurationError if the name is not enrolled.
    """
    if name == COORDINATOR and role is CLIENT and previous:
        _publish(folder, [coordinator_key(folder)])
        return
    _check_name(name, role)
    enrolled = folder / role.enrolled / f"{name}{PUBLIC_SUFFIX}"
    if not enrolled.exists():
        hint = f"{folder / role.enrolled} has the enrolled {role.noun}s"
        raise ConfigurationError(role.argument, name, "is not enrolled", hint)
    keys = read_public_keys(enrolled)
    if previous:
        write_public_keys(enrolled, keys[:1])
    else:
        write_public_keys(folder / role.revoked / enrolled.name, keys)
        enrolled.unlink()
    _distribute(folder, role)


def generate_key(folder: Path, name: str) -> Path:
    """Generate the key pair NAME.key and NAME.pub in `folder`; returns the path of the public key.

    Raises ConfigurationError for an invalid name, and if the folder has a key of this name.
    """
    _check_name(name, Role("NAME", "name", "", "", ""))
    private = folder / f"{name}{KEY_SUFFIX}"
    if private.exists():
        raise ConfigurationError("NAME", name, f"{private} exists", "choose another folder, or move the key")
    key = SigningKey.generate()
    key.save(private)
    write_public_keys(folder / f"{name}{PUBLIC_SUFFIX}", [key.public])
    return folder / f"{name}{PUBLIC_SUFFIX}"


def _check_name(name: str, role: Role) -> None:
    try:
        TypeAdapter(ClientId).validate_python(name)
    except ValidationError as error:
        raise ConfigurationError(role.argument, name, error.errors()[0]["msg"].removeprefix("Value error, ")) from None
    if name == COORDINATOR:
        raise ConfigurationError(
            role.argument, name, "is the name of the coordinator's own keys", "choose another name"
        )

"""`fedqueue enroll` and `fedqueue revoke`: write the folder of keys by which coordinator and sites verify each other.

`fedqueue.protocol.coordinator_identity` reads the folder. The files for a site are in a folder of their own,
KEYS/sites/CLIENT by default: CLIENT.key, which is secret, and coordinator.pub. A site may instead make its key pair
itself and send the operator the public key.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from fedqueue.config.names import ClientId
from fedqueue.errors import ConfigurationError
from fedqueue.protocol.key_files import (
    CLIENTS,
    COORDINATOR,
    COORDINATOR_KEY,
    COORDINATOR_PUBLIC,
    KEY_SUFFIX,
    REVOKED,
    PublicKey,
    SigningKey,
    read_public_keys,
    read_signing_key,
    write_public_keys,
)

SITES = "sites"
ACCEPTED_KEYS = 2
"""Public keys that are valid at the same time after a rotation: the new one and the previous one."""


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

    Writes coordinator.pub to the folder `site` too, or else to each site's folder in `folder`. A running coordinator
    keeps its key; the next coordinator that takes the lead uses the new one.
    """
    coordinator_key(folder)
    new = SigningKey.generate()
    _publish(folder, [new.public, *read_public_keys(folder / COORDINATOR_PUBLIC)][:ACCEPTED_KEYS], site)
    new.save(folder / COORDINATOR_KEY)
    return folder / COORDINATOR_PUBLIC


def _publish(folder: Path, keys: Sequence[PublicKey], site: Path | None = None) -> None:
    for target in (folder, *([site] if site else sorted((folder / SITES).glob("*")))):
        write_public_keys(target / COORDINATOR_PUBLIC, keys)


def enroll(
    folder: Path, client: str, site: Path | None = None, rotate: bool = False, public: Path | None = None
) -> Path:
    """Generate the client's key pair, or accept the public key in the file `public`; returns the site's folder.

    With `rotate`, the client gets a new key, and its previous key stays valid until it is revoked or the key is rotated
    again. The client `coordinator` with `rotate` is the coordinator itself: see `rotate_coordinator`.

    Raises ConfigurationError for an invalid name, for a client that is already enrolled, and, with `rotate`, for a
    client that is not enrolled.
    """
    if client == COORDINATOR and rotate and not public:
        return rotate_coordinator(folder, site)
    _check_name(client)
    enrolled = folder / CLIENTS / f"{client}.pub"
    if enrolled.exists() != rotate:
        problem = "is not enrolled" if rotate else "is already enrolled"
        hint = "leave out --rotate" if rotate else "pass --rotate for a new key"
        raise ConfigurationError("CLIENT", client, problem, hint)
    coordinator_key(folder)
    site = site or folder / SITES / client
    before = read_public_keys(enrolled) if rotate else []
    key = None
    if public:
        new = read_public_keys(public, "--public")[:1]
    else:
        key = SigningKey.generate()
        new = [key.public]
    write_public_keys(site / COORDINATOR_PUBLIC, read_public_keys(folder / COORDINATOR_PUBLIC))
    if key and not rotate:  # before the client is enrolled, so that an enrolled client always has a key
        key.save(site / f"{client}{KEY_SUFFIX}")
    write_public_keys(enrolled, [*new, *before][:ACCEPTED_KEYS])
    if key and rotate:  # after its public key is known: a worker signs with its new key at once
        key.save(site / f"{client}{KEY_SUFFIX}")
    return site


def enroll_missing(folder: Path, clients: Sequence[str], site: Path | None = None) -> list[str]:
    """Enroll each of `clients` that is neither enrolled nor revoked; returns those."""
    coordinator_key(folder)
    missing = [
        client
        for client in clients
        if not any((folder / kind / f"{client}.pub").exists() for kind in (CLIENTS, REVOKED))
    ]
    for client in missing:
        enroll(folder, client, site)
    return missing


def revoke(folder: Path, client: str, previous: bool = False) -> None:
    """Revoke the client's keys, or with `previous` only the key before the last rotation; takes effect immediately.

    For the client `coordinator`, only the previous key can be revoked. Raises ConfigurationError if the client is not
    enrolled.
    """
    if client == COORDINATOR and previous:
        _publish(folder, [coordinator_key(folder)])
        return
    _check_name(client)
    enrolled = folder / CLIENTS / f"{client}.pub"
    if not enrolled.exists():
        raise ConfigurationError("CLIENT", client, "is not enrolled", f"{folder / CLIENTS} has the enrolled clients")
    keys = read_public_keys(enrolled)
    if previous:
        write_public_keys(enrolled, keys[:1])
        return
    write_public_keys(folder / REVOKED / enrolled.name, keys)
    enrolled.unlink()


def _check_name(client: str) -> None:
    try:
        TypeAdapter(ClientId).validate_python(client)
    except ValidationError as error:
        raise ConfigurationError("CLIENT", client, error.errors()[0]["msg"].removeprefix("Value error, ")) from None
    if client == COORDINATOR:
        raise ConfigurationError("CLIENT", client, "is the name of the coordinator's own keys", "choose another name")

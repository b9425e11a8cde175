"""`fedqueue enroll` and `fedqueue revoke`: which sites the coordinator believes.

The folder itself is read in `fedqueue.protocol.coordinator_identity`.

What a site needs lies in a folder of its own, `KEYS/sites/CLIENT` unless another one is named: `CLIENT.key`, which is
secret, and `coordinator.pub`. A site that would rather make its key itself sends a public one instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from fedqueue.config.sections import ClientId
from fedqueue.errors import ConfigurationError
from fedqueue.protocol.coordinator_identity import CLIENTS, COORDINATOR_KEY, REVOKED
from fedqueue.protocol.key_files import PublicKey, SigningKey, read_public_keys, read_signing_key, write_public_keys
from fedqueue.protocol.site_identity import COORDINATOR, COORDINATOR_PUBLIC, KEY_SUFFIX

SITES = "sites"
KEPT = 2  # public keys per client: the present one, and the one before it


def coordinator_key(folder: Path) -> PublicKey:
    """The coordinator's public key; a pair is made where there is none."""
    path = folder / COORDINATOR_KEY
    if not path.exists():
        SigningKey.generate().save(path)
    public = read_signing_key(path).public
    if not (folder / COORDINATOR_PUBLIC).exists():
        write_public_keys(folder / COORDINATOR_PUBLIC, [public])
    return public


def rotate_coordinator(folder: Path, site: Path | None = None) -> Path:
    """Give the coordinator a new key; returns the file for the sites, in which the one before it counts too.

    It is written to `site` as well, or to each site's folder that lies in `folder`. A coordinator that runs keeps the
    key that it has: the next one to lead takes the new one.
    """
    coordinator_key(folder)
    new = SigningKey.generate()
    _publish(folder, [new.public, *read_public_keys(folder / COORDINATOR_PUBLIC)][:KEPT], site)
    new.save(folder / COORDINATOR_KEY)
    return folder / COORDINATOR_PUBLIC


def _publish(folder: Path, keys: Sequence[PublicKey], site: Path | None = None) -> None:
    for place in (folder, *([site] if site else sorted((folder / SITES).glob("*")))):
        write_public_keys(place / COORDINATOR_PUBLIC, keys)


def enroll(
    folder: Path, client: str, site: Path | None = None, rotate: bool = False, public: Path | None = None
) -> Path:
    """Make or replace the client's key pair, or take over the public key in `public`; returns the site's folder.

    The client `coordinator`, with `rotate`, is the coordinator itself: see `rotate_coordinator`.

    With `rotate` the key before it counts too, until it is revoked or replaced once more. Raises ConfigurationError for
    a bad name, for a client that is enrolled already, and with `rotate` for one that is not.
    """
    if client == COORDINATOR and rotate and not public:
        return rotate_coordinator(folder, site)
    _check_name(client)
    place = folder / CLIENTS / f"{client}.pub"
    if place.exists() != rotate:
        accepted = (
            "is not enrolled yet: leave out --rotate" if rotate else "is enrolled already: --rotate makes a new key"
        )
        raise ConfigurationError("CLIENT", client, accepted)
    coordinator_key(folder)
    site = site or folder / SITES / client
    before = read_public_keys(place) if rotate else []
    key = None
    if public:
        new = read_public_keys(public, "--public")[:1]
    else:
        key = SigningKey.generate()
        new = [key.public]
    write_public_keys(site / COORDINATOR_PUBLIC, read_public_keys(folder / COORDINATOR_PUBLIC))
    if key and not rotate:  # whoever is enrolled has a key
        key.save(site / f"{client}{KEY_SUFFIX}")
    write_public_keys(place, [*new, *before][:KEPT])
    if key and rotate:  # a worker signs with its new key at once, so it is known before
        key.save(site / f"{client}{KEY_SUFFIX}")
    return site


def enroll_missing(folder: Path, clients: Sequence[str], site: Path | None = None) -> list[str]:
    """Enroll those that are not yet; returns them. One that was revoked stays out."""
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
    """From now on nothing counts that the client signs, or with `previous` nothing that its former key signed.

    Of the coordinator itself only the former key can be revoked. Raises ConfigurationError where the client is not
    enrolled.
    """
    if client == COORDINATOR and previous:
        _publish(folder, [coordinator_key(folder)])
        return
    _check_name(client)
    place = folder / CLIENTS / f"{client}.pub"
    if not place.exists():
        raise ConfigurationError("CLIENT", client, "is not enrolled")
    keys = read_public_keys(place)
    if previous:
        write_public_keys(place, keys[:1])
        return
    write_public_keys(folder / REVOKED / place.name, keys)
    place.unlink()


def _check_name(client: str) -> None:
    try:
        TypeAdapter(ClientId).validate_python(client)
    except ValidationError as error:
        raise ConfigurationError("CLIENT", client, error.errors()[0]["msg"].removeprefix("Value error, ")) from None
    if client == COORDINATOR:
        raise ConfigurationError("CLIENT", client, "another name: files of this one hold the coordinator's own keys")

"""What a coordinator signs, and whom it believes: the clients whose public keys lie in its folder.

    KEYS/coordinator.key      its own private key        KEYS/clients/CLIENT.pub    public keys, the newest first
    KEYS/coordinator.pub      the public one, for sites  KEYS/revoked/CLIENT.pub    what a revoked client had

A client's file is looked at again with each thing that the client says: enrolling, rotating and revoking need no
restart.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedqueue.errors import ConfigurationError, NotEnrolled, SignatureError, StoreError
from fedqueue.identity import PublicKey, SigningKey, read_public_keys, read_signing_key
from fedqueue.keys import CLIENT_ID
from fedqueue.messages import Order, read
from fedqueue.signing import (
    CHARTER,
    EVALUATED,
    ORDER,
    VERSION,
    Charter,
    Scope,
    Seal,
    VersionRecord,
    digest_of,
    seal,
    unseal,
)
from fedqueue.store import BlobBuffer, RunInfo

if TYPE_CHECKING:
    from fedqueue.frame import Manifest  # which imports torch

COORDINATOR_KEY = "coordinator.key"
CLIENTS, REVOKED = "clients", "revoked"

_Stamp = tuple[int, int, int]


class Authority:
    """One coordinator's own key, and the folder with those of its clients."""

    def __init__(self, run: str, key: SigningKey, folder: Path) -> None:
        self._run, self._key, self._folder = run, key, folder
        self._scope = Scope(run)
        self._term = 0
        self._known: dict[str, tuple[_Stamp, list[PublicKey]]] = {}

    # What the run is

    def begin(self, config: bytes, manifest: Manifest, epoch: int, floor: int) -> bytes:
        """The charter of a run that starts, or starts again, under an instance that nobody could know before."""
        return self._charter(secrets.token_hex(16), epoch, floor, digest_of(config), digest_of(manifest.pack()))

    def resume(self, info: RunInfo) -> bytes:
        """The charter of the next term of the run in `info`; raises SignatureError where its own is not this key's."""
        sealed = unseal(info.charter, [self._key.public], CHARTER, Scope(self._run), [], "this coordinator")
        charter = read(Charter, sealed.body)
        self._term = max(self._term, charter.term)
        if (info.config_digest, digest_of(info.manifest)) != (charter.config, charter.manifest):
            raise SignatureError("configuration or manifest in Redis are not those that the coordinator signed")
        return self._charter(charter.instance, charter.epoch, info.version, charter.config, charter.manifest)

    def _charter(self, instance: str, epoch: int, floor: int, config: str, manifest: str) -> bytes:
        self._term += 1
        self._scope = Scope(self._run, instance, epoch)
        charter = Charter(
            instance=instance, epoch=epoch, term=self._term, floor=floor, config=config, manifest=manifest
        )
        return seal(self._key, CHARTER, Scope(self._run), [], charter.pack())

    # Versions, orders, evaluations: its own word, which comes back to it after a crash

    def seal_version(self, version: int, model: BlobBuffer, state: BlobBuffer, job_number: int) -> bytes:
        record = VersionRecord(model=digest_of(model), state=digest_of(state), job_number=job_number)
        return seal(self._key, VERSION, self._scope, [version], record.pack())

    def check_version(self, version: int, data: bytes, model: BlobBuffer, state: bytes | None = None) -> int:
        """How many jobs had been given out when that version was committed.

        Raises SignatureError unless model, and the server optimizer's state where it is given, are what was signed.
        """
        sealed = unseal(data, [self._key.public], VERSION, self._scope, [version], "this coordinator")
        record = read(VersionRecord, sealed.body)
        if digest_of(model) != record.model:
            raise SignatureError(f"the model in Redis is not version {version} as this coordinator signed it")
        if state is not None and digest_of(state) != record.state:
            raise SignatureError(f"the optimizer's state in Redis is not that of version {version} as it was signed")
        return record.job_number

    def seal_order(self, order: Order) -> bytes:
        return seal(self._key, ORDER, self._scope, [], order.pack())

    def open_order(self, data: bytes) -> Order:
        """An order of its own; raises SignatureError for any other."""
        return read(Order, unseal(data, [self._key.public], ORDER, self._scope, [], "this coordinator").body)

    def seal_evaluation(self, body: bytes) -> bytes:
        return seal(self._key, EVALUATED, self._scope, [], body)

    def open_evaluation(self, data: bytes) -> bytes:
        return unseal(data, [self._key.public], EVALUATED, self._scope, [], "this coordinator").body

    # Clients

    def open(self, kind: str, client: str, about: Sequence[str | int], data: bytes) -> Seal:
        """What the client said; raises NotEnrolled where it has no key here, SignatureError where it did not say it."""
        return unseal(data, self._keys_of(client), kind, self._scope, [client, *about], f"client {client}")

    def is_enrolled(self, client: str) -> bool:
        try:
            return bool(self._keys_of(client))
        except NotEnrolled:
            return False

    def _keys_of(self, client: str) -> list[PublicKey]:
        if not CLIENT_ID.fullmatch(client):
            raise NotEnrolled("no client of such a name is enrolled")
        path = self._folder / CLIENTS / f"{client}.pub"
        try:
            at = path.stat()
        except OSError:
            revoked = (self._folder / REVOKED / path.name).exists()
            raise NotEnrolled(f"client {client} {'was revoked' if revoked else 'is not enrolled'}") from None
        stamp = (at.st_mtime_ns, at.st_size, at.st_ino)
        known = self._known.get(client)
        if known is None or known[0] != stamp:
            try:
                known = self._known[client] = stamp, read_public_keys(path)
            except ConfigurationError as error:  # not a reason to end everybody else's run
                raise NotEnrolled(str(error)) from None
        return known[1]


def load_authority(folder: Path, run: str) -> Authority:
    """Raises ConfigurationError where the folder has no key of a coordinator."""
    if not (folder / COORDINATOR_KEY).exists():
        raise ConfigurationError(
            "security.keys", str(folder), f"holds no {COORDINATOR_KEY}; `fedqueue enroll` makes keys for all, and "
            'security.signatures = "off" does without (then whoever writes to Redis is believed)',
        )  # fmt: skip
    return Authority(run, read_signing_key(folder / COORDINATOR_KEY), folder)


def require_signed(authority: Authority | None, info: RunInfo) -> None:
    """Raises StoreError where a run that was begun with signatures is to go on without them, or the other way round."""
    if bool(info.charter) != (authority is not None):
        was = "with" if info.charter else "without"
        raise StoreError(f"run {info.run!r} was begun {was} signatures (security.signatures), and has to go on so")

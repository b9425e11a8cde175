"""What a coordinator signs, and whom it believes: the clients whose public keys lie in its folder.

    KEYS/coordinator.key      its own private key        KEYS/clients/CLIENT.pub    public keys, the newest first
    KEYS/coordinator.pub      the public one, for sites  KEYS/revoked/CLIENT.pub    what a revoked client had
                              (and the one before it)

A client's file is looked at again with each thing that the client says: enrolling, rotating and revoking need no
restart.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedqueue.errors import ConfigurationError, NotEnrolled, SignatureError, StoreError
from fedqueue.protocol.key_files import KeyFile, PublicKey, SigningKey, read_public_keys, read_signing_key
from fedqueue.protocol.keys import CLIENT_ID
from fedqueue.protocol.messages import Order, read
from fedqueue.protocol.signed_envelope import (
    EVALUATED,
    NO_HISTORY,
    ORDER,
    RUN_DESCRIPTOR,
    VERSION,
    RunDescriptor,
    Scope,
    SignedEnvelope,
    VersionRecord,
    digest_of,
    history_of,
    longer_history,
    open_envelope,
    packed,
    sign_envelope,
)
from fedqueue.protocol.site_identity import COORDINATOR_PUBLIC
from fedqueue.transport.store import BlobBuffer, RunInfo

if TYPE_CHECKING:
    from fedqueue.tensors.frame import Manifest  # which imports torch

COORDINATOR_KEY = "coordinator.key"
CLIENTS, REVOKED = "clients", "revoked"


class CoordinatorIdentity:
    """One coordinator's own key, and the folder with those of its clients."""

    def __init__(self, run: str, key: SigningKey, folder: Path) -> None:
        self._run, self._key, self._folder = run, key, folder
        self._scope = Scope(run)
        public = folder / COORDINATOR_PUBLIC
        self._former = KeyFile(public, read_public_keys) if public.exists() else None
        self._term = 0
        self._history = NO_HISTORY
        self._known: dict[str, KeyFile[list[PublicKey]]] = {}

    # What the run is

    def begin(self, config: bytes, manifest: Manifest, epoch: int, floor: int) -> bytes:
        """The run descriptor of a run that starts, or starts again, under an instance that nobody could know before."""
        self._history = NO_HISTORY
        return self._descriptor(secrets.token_hex(16), epoch, floor, digest_of(config), digest_of(manifest.pack()))

    def resume(self, info: RunInfo) -> bytes:
        """The run descriptor of the next term of the run in `info`.

        Raises SignatureError where the present descriptor was not signed with this key.
        """
        descriptor = read(RunDescriptor, self._own(RUN_DESCRIPTOR, Scope(self._run), [], info.descriptor))
        self._term = max(self._term, descriptor.term)
        if (info.config_digest, digest_of(info.manifest)) != (descriptor.config, descriptor.manifest):
            raise SignatureError("configuration or manifest in Redis are not those that the coordinator signed")
        return self._descriptor(
            descriptor.instance, descriptor.epoch, info.version, descriptor.config, descriptor.manifest
        )

    def _descriptor(self, instance: str, epoch: int, floor: int, config: str, manifest: str) -> bytes:
        self._term += 1
        self._scope = Scope(self._run, instance, epoch)
        descriptor = RunDescriptor(
            instance=instance, epoch=epoch, term=self._term, floor=floor, config=config, manifest=manifest
        )
        return sign_envelope(self._key, RUN_DESCRIPTOR, Scope(self._run), [], descriptor.pack())

    # Versions, orders, evaluations: its own word, which comes back to it after a crash

    def sign_version(
        self,
        version: int,
        model: BlobBuffer,
        state: BlobBuffer,
        job_number: int,
        records: Sequence[bytes],
        totals: bytes,
    ) -> bytes:
        """The seal of a version; `records`, in the ledger since the last seal, join its history and all later ones.

        Records and totals are as they lie in Redis.
        """
        for record in records:
            self._history = longer_history(self._history, record)
        what = VersionRecord(
            model=digest_of(model), state=digest_of(state), job_number=job_number, history=self._history,
            totals=digest_of(totals),
        )  # fmt: skip
        return sign_envelope(self._key, VERSION, self._scope, [version], what.pack())

    def remember(self, ledger: Iterable[Mapping[str, Any]]) -> None:
        """Go on from the history in a ledger that is this coordinator's own."""
        self._history = history_of(ledger)

    def check_history(
        self, version: int, signed: VersionRecord, ledger: Iterable[Mapping[str, Any]], totals: Mapping[str, Any]
    ) -> None:
        """Go on from the history in Redis; raises SignatureError unless it was signed with `version`."""
        history = history_of(ledger)
        if history != signed.history:
            raise SignatureError(f"the ledger in Redis is not the history of version {version} as it was signed")
        if digest_of(packed(totals)) != signed.totals:
            raise SignatureError(f"the totals in Redis are not those of version {version} as they were signed")
        self._history = history

    def tells(self, ledger: Iterable[Mapping[str, Any]]) -> bool:
        """Whether the versions in a ledger are those that this coordinator made, or went on from."""
        return history_of(ledger) == self._history

    def check_version(self, version: int, data: bytes, model: BlobBuffer, state: bytes | None = None) -> VersionRecord:
        """What was signed of that version.

        Raises SignatureError unless model, and the server optimizer's state where it is given, are what was signed.
        """
        record = read(VersionRecord, self._own(VERSION, self._scope, [version], data))
        if digest_of(model) != record.model:
            raise SignatureError(f"the model in Redis is not version {version} as this coordinator signed it")
        if state is not None and digest_of(state) != record.state:
            raise SignatureError(f"the optimizer's state in Redis is not that of version {version} as it was signed")
        return record

    def sign_order(self, order: Order) -> bytes:
        return sign_envelope(self._key, ORDER, self._scope, [], order.pack())

    def open_order(self, data: bytes) -> Order:
        """An order of its own; raises SignatureError for any other."""
        return read(Order, self._own(ORDER, self._scope, [], data))

    def sign_evaluation(self, body: bytes) -> bytes:
        return sign_envelope(self._key, EVALUATED, self._scope, [], body)

    def open_evaluation(self, data: bytes) -> bytes:
        return self._own(EVALUATED, self._scope, [], data)

    def _own(self, kind: str, scope: Scope, about: Sequence[str | int], data: bytes) -> bytes:
        """What this coordinator said itself, or the one before its key was rotated."""
        former = self._former.keys if self._former else []
        return open_envelope(data, [self._key.public, *former], kind, scope, about, "this coordinator").body

    # Clients

    def open(self, kind: str, client: str, about: Sequence[str | int], data: bytes) -> SignedEnvelope:
        """What the client said; raises NotEnrolled where it has no key here, SignatureError where it did not say it."""
        return open_envelope(data, self._keys_of(client), kind, self._scope, [client, *about], f"client {client}")

    def is_enrolled(self, client: str) -> bool:
        try:
            return bool(self._keys_of(client))
        except NotEnrolled:
            return False

    def _keys_of(self, client: str) -> list[PublicKey]:
        known = self._known.get(client)
        if known is None or not known.exists():
            known = self._known[client] = self._file_of(client)
        return known.keys

    def _file_of(self, client: str) -> KeyFile[list[PublicKey]]:
        if not CLIENT_ID.fullmatch(client):
            raise NotEnrolled("no client of such a name is enrolled")
        path = self._folder / CLIENTS / f"{client}.pub"
        if not path.exists():
            revoked = (self._folder / REVOKED / path.name).exists()
            raise NotEnrolled(f"client {client} {'was revoked' if revoked else 'is not enrolled'}")
        try:
            return KeyFile(path, read_public_keys)
        except ConfigurationError as error:  # not a reason to end everybody else's run
            raise NotEnrolled(str(error)) from None


def load_coordinator_identity(folder: Path, run: str) -> CoordinatorIdentity:
    """Raises ConfigurationError where the folder has no key of a coordinator."""
    if not (folder / COORDINATOR_KEY).exists():
        raise ConfigurationError(
            "security.keys", str(folder), f"holds no {COORDINATOR_KEY}; `fedqueue enroll` makes keys for all, and "
            'security.signatures = "off" does without (then whoever writes to Redis is believed)',
        )  # fmt: skip
    return CoordinatorIdentity(run, read_signing_key(folder / COORDINATOR_KEY), folder)


def require_signed(identity: CoordinatorIdentity | None, info: RunInfo) -> None:
    """Raises StoreError where a run that was begun with signatures is to go on without them, or the other way round."""
    if bool(info.descriptor) != (identity is not None):
        was = "with" if info.descriptor else "without"
        raise StoreError(f"run {info.run!r} was begun {was} signatures (security.signatures), and has to go on so")

"""The coordinator's identity: signs with its own key, and verifies clients by the public keys in its folder.

KEYS/coordinator.key      its own private key        KEYS/clients/CLIENT.pub    public keys, the newest first
KEYS/coordinator.pub      the public one, for sites  KEYS/keepers/KEEPER.pub    those of keepers
                          (and the previous one)     KEYS/revoked/CLIENT.pub    keys of a revoked client
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedqueue.errors import ConfigurationError, SignatureError, StoreError
from fedqueue.protocol.key_files import (
    CLIENTS,
    COORDINATOR_KEY,
    COORDINATOR_PUBLIC,
    KEEPERS,
    REVOKED,
    KeyFile,
    SigningKey,
    read_signing_key,
    read_trusted_keys,
    require_safe,
)
from fedqueue.protocol.ledger_chain import NO_HISTORY, history_of, longer_history
from fedqueue.protocol.messages import Cohort, Order, read
from fedqueue.protocol.msgpack import pack_record
from fedqueue.protocol.roster import Roster
from fedqueue.protocol.run_info import RunInfo
from fedqueue.protocol.signed_envelope import (
    ANSWER,
    COHORT,
    EVALUATED,
    ORDER,
    QUESTION,
    RUN_DESCRIPTOR,
    VERSION,
    Digestible,
    RunDescriptor,
    Scope,
    SignedEnvelope,
    VersionRecord,
    digest_of,
    open_envelope,
    sign_envelope,
)


class CoordinatorIdentity:
    """A coordinator's private key, and the folder with its clients' public keys."""

    def __init__(self, run: str, key: SigningKey, folder: Path, revocable: bool = True) -> None:
        """Read the present keys of all clients at once where keys are not `revocable`: the files may be deleted."""
        self._run, self._key, self._folder = run, key, folder
        self._scope = Scope(run)
        public = folder / COORDINATOR_PUBLIC
        self._former = KeyFile(public, read_trusted_keys) if public.exists() else None
        self._term = 0
        self.newest_model = ""
        """The digest of the version that was signed or checked last, as workers get it."""
        self._history = NO_HISTORY
        self._clients = Roster(folder / CLIENTS, folder / REVOKED, "client", revocable)
        self._keepers = Roster(folder / KEEPERS, folder / REVOKED / KEEPERS, "keeper", revocable)

    @property
    def scope(self) -> Scope:
        """The scope of the signatures of the present epoch."""
        return self._scope

    # What the run is

    def begin(
        self, config: bytes, manifest: bytes, epoch: int, first_version: int, frozen: Digestible | None = None
    ) -> bytes:
        """The signed descriptor of a run that starts or restarts, with a new random instance.

        `config` is the configuration's text, `manifest` the packed manifest, and `frozen` the frozen tensors, if there
        are any; `first_version` is the version that the epoch starts from.
        """
        self._history = NO_HISTORY
        contents = digest_of(config), digest_of(manifest), _digest_of_frozen(frozen)
        return self._descriptor(secrets.token_hex(16), epoch, first_version, *contents)

    def resume(self, info: RunInfo, frozen: Digestible | None = None) -> bytes:
        """The signed descriptor of the next term of the run in `info`, whose frozen tensors in Redis are `frozen`.

        Raises SignatureError if this coordinator did not sign the present descriptor, or if configuration, manifest or
        frozen tensors differ from it.
        """
        descriptor = read(RunDescriptor, self._own(RUN_DESCRIPTOR, Scope(self._run), [], info.descriptor))
        self._term = max(self._term, descriptor.term)
        if (info.config_digest, digest_of(info.manifest)) != (descriptor.config, descriptor.manifest):
            raise SignatureError("configuration or manifest in Redis are not those that the coordinator signed")
        if _digest_of_frozen(frozen) != descriptor.frozen:
            raise SignatureError("the frozen tensors in Redis are not those that the coordinator signed")
        return self._descriptor(
            descriptor.instance, descriptor.epoch, info.version,
            descriptor.config, descriptor.manifest, descriptor.frozen,
        )  # fmt: skip

    def _descriptor(
        self, instance: str, epoch: int, first_version: int, config: str, manifest: str, frozen: str
    ) -> bytes:
        self._term += 1
        self._scope = Scope(self._run, instance, epoch)
        descriptor = RunDescriptor(
            instance=instance,
            epoch=epoch,
            term=self._term,
            first_version=first_version,
            config=config,
            manifest=manifest,
            frozen=frozen,
        )
        return sign_envelope(self._key, RUN_DESCRIPTOR, Scope(self._run), [], descriptor.pack())

    # Versions, orders, evaluations: signed here, and read back after a crash

    def sign_version(
        self,
        version: int,
        model: Digestible,
        state: Digestible,
        job_number: int,
        records: Sequence[bytes],
        totals: bytes,
    ) -> bytes:
        """The signed `VersionRecord` of a version; `records`, those since the last version, extend the history.

        Records and totals are packed, as they are stored in Redis.
        """
        for record in records:
            self._history = longer_history(self._history, record)
        self.newest_model = digest_of(model)
        what = VersionRecord(
            model=self.newest_model, state=digest_of(state), job_number=job_number, history=self._history,
            totals=digest_of(totals),
        )  # fmt: skip
        return sign_envelope(self._key, VERSION, self._scope, [version], what.pack())

    def remember(self, ledger: Iterable[Mapping[str, Any]]) -> None:
        """Continue the history of a ledger that this coordinator wrote itself."""
        self._history = history_of(ledger)

    def check_history(
        self, version: int, signed: VersionRecord, ledger: Iterable[Mapping[str, Any]], totals: Mapping[str, Any]
    ) -> None:
        """Continue the history in Redis; raises SignatureError unless history and totals were signed with `version`."""
        history = history_of(ledger)
        if history != signed.history:
            raise SignatureError(f"the ledger in Redis is not the history of version {version} as it was signed")
        if digest_of(pack_record(totals)) != signed.totals:
            raise SignatureError(f"the totals in Redis are not those of version {version} as they were signed")
        self._history = history

    def matches_history(self, ledger: Iterable[Mapping[str, Any]]) -> bool:
        """Whether the ledger's version records are exactly those that this coordinator has signed or continued."""
        return history_of(ledger) == self._history

    def check_version(self, version: int, data: bytes, model: Digestible, state: bytes | None = None) -> VersionRecord:
        """The `VersionRecord` in the envelope `data`.

        Raises SignatureError unless `model` (encoded, as stored) and, if given, the server optimizer's `state` match.
        """
        record = read(VersionRecord, self._own(VERSION, self._scope, [version], data))
        if digest_of(model) != record.model:
            raise SignatureError(f"the model in Redis is not version {version} as this coordinator signed it")
        if state is not None and digest_of(state) != record.state:
            raise SignatureError(f"the optimizer's state in Redis is not the one signed with version {version}")
        return record

    def sign_order(self, order: Order) -> bytes:
        """The signed envelope of an order, for the present epoch."""
        return sign_envelope(self._key, ORDER, self._scope, [], order.pack())

    def open_order(self, data: bytes) -> Order:
        """The order in the envelope; raises SignatureError unless this coordinator signed it."""
        return read(Order, self._own(ORDER, self._scope, [], data))

    def sign_evaluation(self, body: bytes) -> bytes:
        """The signed envelope of a packed `Evaluation`, for the present epoch."""
        return sign_envelope(self._key, EVALUATED, self._scope, [], body)

    def open_evaluation(self, data: bytes) -> bytes:
        """The packed `Evaluation` in the envelope; raises SignatureError unless this coordinator signed it."""
        return self._own(EVALUATED, self._scope, [], data)

    def _own(self, kind: str, scope: Scope, about: Sequence[str | int], data: bytes) -> bytes:
        """The body of an envelope that this coordinator signed, with its present key or one in `coordinator.pub`."""
        former = self._former.keys if self._former else []
        return open_envelope(data, [self._key.public, *former], kind, scope, about, "this coordinator").body

    # Clients

    def open(self, kind: str, client: str, about: Sequence[str | int], data: bytes) -> SignedEnvelope:
        """The client's envelope; raises NotEnrolled for a client without a key, SignatureError if it is not valid."""
        return open_envelope(
            data, self._clients.keys_of(client), kind, self._scope, [client, *about], f"client {client}"
        )

    def sign_question(self, body: bytes) -> bytes:
        """The signed envelope of a packed `Question`, which belongs to no instance of the run."""
        return sign_envelope(self._key, QUESTION, Scope(self._run), [], body)

    def open_answer(self, client: str, instance: str, about: Sequence[str | int], data: bytes) -> bytes:
        """The body of a client's envelope for that question; raises as `open`."""
        scope = Scope(self._run, instance)
        keys = self._clients.keys_of(client)
        return open_envelope(data, keys, ANSWER, scope, [client, *about], f"client {client}").body

    def is_enrolled(self, client: str) -> bool:
        """Whether the client has a public key here that is not revoked."""
        return self._clients.has(client)

    # Keepers

    def sign_cohort(self, cohort: Cohort) -> bytes:
        """The signed envelope of a cohort, for the present epoch."""
        return sign_envelope(self._key, COHORT, self._scope, [], cohort.pack())

    def open_cohort(self, data: bytes) -> Cohort:
        """The cohort in the envelope; raises SignatureError unless this coordinator signed it."""
        return read(Cohort, self._own(COHORT, self._scope, [], data))

    def require_keepers(self, keepers: Iterable[str]) -> None:
        """Raise ConfigurationError unless this coordinator has the public key of each of these keepers."""
        self._keepers.require(keepers, "ask the keeper's operator for it, and enroll it: `fedqueue enroll --keeper`")

    def open_keeper(self, kind: str, keeper: str, data: bytes) -> bytes:
        """The body of a keeper's envelope; raises NotEnrolled without a key of it, SignatureError if it is invalid."""
        keys = self._keepers.keys_of(keeper)
        return open_envelope(data, keys, kind, self._scope, [keeper], f"keeper {keeper}").body


def _digest_of_frozen(frozen: Digestible | None) -> Any:
    return "" if frozen is None else digest_of(frozen)


def load_coordinator_identity(folder: Path, run: str, revocable: bool = True) -> CoordinatorIdentity:
    """The coordinator's identity out of its key folder.

    Raises ConfigurationError if the folder has no coordinator key, or if any user may write to it.
    """
    if not (folder / COORDINATOR_KEY).exists():
        raise ConfigurationError(
            "security.keys", str(folder), f"holds no {COORDINATOR_KEY}", "`fedqueue enroll` makes keys for all, or set "
            'security.signatures = "off" to trust everyone who can write to Redis',
        )  # fmt: skip
    require_safe(folder / CLIENTS / COORDINATOR_PUBLIC)  # a new file there would enroll a client
    return CoordinatorIdentity(run, read_signing_key(folder / COORDINATOR_KEY), folder, revocable)


def require_signed(identity: CoordinatorIdentity | None, info: RunInfo) -> None:
    """Raise StoreError if the run was started with signatures and this coordinator has none, or the reverse."""
    if bool(info.descriptor) != (identity is not None):
        was = "with" if info.descriptor else "without"
        raise StoreError(
            f"run {info.run!r} was started {was} signatures: security.signatures cannot change in a run; set it back"
        )

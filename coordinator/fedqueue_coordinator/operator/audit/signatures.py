"""Verifies that the data of a run in Redis is the data that its coordinator signed.

This needs only the coordinator's public key, so sites can verify a run as well as the operator.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedqueue.config.loading import parse_config
from fedqueue.errors import BlobMissing, SignatureError, StoreError, WireError
from fedqueue.protocol.key_files import COORDINATOR_PUBLIC, PublicKey, read_trusted_keys
from fedqueue.protocol.ledger_chain import history_of
from fedqueue.protocol.messages import Order, read
from fedqueue.protocol.msgpack import pack_record
from fedqueue.protocol.run_info import RunInfo
from fedqueue.protocol.signed_envelope import (
    ORDER,
    RUN_DESCRIPTOR,
    VERSION,
    RunDescriptor,
    Scope,
    VersionRecord,
    digest_of,
    open_envelope,
)
from fedqueue.tensors.blobs import BlobBuffer
from fedqueue.tensors.codec import downlink_codec, update_codec
from fedqueue.tensors.manifest import Manifest
from fedqueue.transport.store import Store
from fedqueue_coordinator.service.coordinator_store import CoordinatorStore

LedgerRecord = Mapping[str, Any]
SIGNER = "the coordinator"
"""The signer's name in error messages."""


@dataclass(frozen=True)
class Signatures:
    """The result of a verification."""

    checked: Mapping[str, int]
    """Kind of signed data → how many were verified, with or without success."""
    problems: Sequence[str]
    unchecked: str
    """What could not be verified, and why."""


def verify_signatures(store: CoordinatorStore, info: RunInfo, ledger: Iterable[LedgerRecord], keys: Path) -> Signatures:
    """Verify run descriptor, versions, history, totals, open orders and kept payloads of a run.

    `info` and `ledger` are of the same moment. `keys` is the folder with the coordinator's public key. Raises
    BlobMissing if the newest version was replaced since that moment; the caller retries.
    """
    if not info.descriptor:
        return Signatures({}, [], "the run is not signed (security.signatures)")
    if not (keys / COORDINATOR_PUBLIC).exists():
        return Signatures({}, [], f"no {COORDINATOR_PUBLIC} in {keys}; pass its folder with --keys")
    public = read_trusted_keys(keys / COORDINATOR_PUBLIC, "--keys")
    return _Verification(store, info, list(ledger), public).result()


def verify_model(
    store: Store, info: RunInfo, version: int, model: BlobBuffer, keys: Path,
    state: bytes | None = None, frozen: BlobBuffer | None = None,
) -> str:  # fmt: skip
    """Verify `model`, the stored bytes of `version`, the frozen tensors and `state`, the server's state, if given.

    Returns an empty string, or why it could not be verified. Raises SignatureError if the model or the state is not
    the one that the coordinator signed.
    """
    if not info.descriptor:
        return "the run is not signed"
    if not (keys / COORDINATOR_PUBLIC).exists():
        return f"no {COORDINATOR_PUBLIC} in {keys}"
    public = read_trusted_keys(keys / COORDINATOR_PUBLIC, "--keys")
    descriptor = read_descriptor(info, public)
    if frozen is not None:
        _require_frozen(descriptor, frozen)
    signed = _signed_version(store, _scope(info, descriptor), public, version, model)
    if state is not None:
        _require_state(version, signed, state)
    return ""


def read_descriptor(info: RunInfo, public: Sequence[PublicKey]) -> RunDescriptor:
    """Verify the run descriptor and return it.

    Raises SignatureError unless the digests of configuration and manifest in Redis are those in the descriptor.
    """
    descriptor = read(
        RunDescriptor, open_envelope(info.descriptor, public, RUN_DESCRIPTOR, Scope(info.run), [], SIGNER).body
    )
    if info.config_digest != descriptor.config:
        raise SignatureError("the configuration in Redis is not the one in the run descriptor")
    if digest_of(info.manifest) != descriptor.manifest:
        raise SignatureError("the manifest in Redis is not the one in the run descriptor")
    return descriptor


def _scope(info: RunInfo, descriptor: RunDescriptor) -> Scope:
    return Scope(info.run, descriptor.instance, descriptor.epoch)


def _require_frozen(descriptor: RunDescriptor, frozen: BlobBuffer) -> None:
    if digest_of(frozen) != descriptor.frozen:
        raise SignatureError("the frozen tensors in Redis are not those that the coordinator signed")


def _signed_version(
    store: Store, scope: Scope, public: Sequence[PublicKey], version: int, model: BlobBuffer
) -> VersionRecord:
    envelope = store.read_version_signature(version, model.nbytes)
    signed = read(VersionRecord, open_envelope(envelope, public, VERSION, scope, [version], SIGNER).body)
    if digest_of(model) != signed.model:
        raise SignatureError(f"the model in Redis is not version {version} as it was signed")
    return signed


def _require_state(version: int, signed: VersionRecord, state: bytes | None) -> None:
    if state is None or digest_of(state) != signed.state:
        raise SignatureError(f"the optimizer's state in Redis is not that of version {version} as it was signed")


class _Verification:
    def __init__(
        self, store: CoordinatorStore, info: RunInfo, ledger: Sequence[LedgerRecord], public: Sequence[PublicKey]
    ) -> None:
        self._store, self._info, self._ledger, self._public = store, info, ledger, public
        config, manifest = parse_config(info.config), Manifest.unpack(info.manifest)
        self._uplink = update_codec(config, manifest)
        self._downlink = downlink_codec(config.compression, manifest)
        self._scope = Scope(info.run)
        self._checked: dict[str, int] = {}
        self._problems: list[str] = []
        self._unchecked = ["ledger records other than versions", "messages of clients before they are merged"]

    def result(self) -> Signatures:
        self._try("descriptor", self._descriptor)
        if not self._problems:  # without a valid descriptor, the scope of the other signatures is unknown
            for version in self._store.stored_versions():
                if version == self._info.version:
                    self._try("version", self._head, version)
                else:
                    with contextlib.suppress(BlobMissing):  # deleted since it was listed
                        self._try("version", self._version, version)
            for job in self._store.jobs():
                self._try("order", self._order, job.job, job.client, job.order)
            self._payloads()
        return Signatures(self._checked, self._problems, "; ".join(self._unchecked))

    def _try(self, kind: str, check: Callable[..., object], *of: object) -> None:
        try:
            check(*of)
        except BlobMissing:
            raise
        except (WireError, StoreError) as error:
            self._problems.append(str(error))
        self._checked[kind] = self._checked.get(kind, 0) + 1

    def _descriptor(self) -> None:
        descriptor = read_descriptor(self._info, self._public)
        self._scope = _scope(self._info, descriptor)
        if (frozen := self._store.read_frozen(self._downlink.manifest.frozen_nbytes)) is not None:
            _require_frozen(descriptor, frozen)

    def _version(self, version: int) -> VersionRecord:
        wire = self._store.read_wire(version, self._downlink)
        return _signed_version(self._store, self._scope, self._public, version, wire)

    def _head(self, version: int) -> None:
        """Verify the newest version, and the history, totals and state that were signed with it."""
        signed = self._version(version)
        if history_of(self._ledger) != signed.history:
            self._problems.append(f"the ledger is not the history of version {version} as it was signed")
        if digest_of(pack_record(self._info.totals)) != signed.totals:
            self._problems.append(f"the totals are not those of version {version} as they were signed")
        self._checked["history"] = self._checked["totals"] = 1
        if self._info.state == "running":
            self._state(version, signed)
        else:
            self._unchecked.append("the server's state, which is deleted at the end")

    def _state(self, version: int, signed: VersionRecord) -> None:
        state: bytes | None = None
        with contextlib.suppress(StoreError):
            state = self._store.read_optimizer_state(version)
        if self._store.info().version != version:  # the state read may belong to another version, or be incomplete
            raise BlobMissing(self._store.keys.state(version))
        _require_state(version, signed, state)

    def _order(self, job: str, client: str, data: bytes) -> None:
        order = read(Order, open_envelope(data, self._public, ORDER, self._scope, [], SIGNER).body)
        if (order.job, order.client) != (job, client):
            raise SignatureError(f"the record of {client}'s job {job} has the order of {order.client}, job {order.job}")

    def _payloads(self) -> None:
        """Verify the merged payloads that were kept; their digests are in the history."""
        lines = [line for record in self._ledger for line in record.get("merged", ()) if line.get("digest")]
        for line in lines:
            prefix = self._store.keys.kept_payload(line["job"], line["attempt"])
            try:
                wire = np.empty(self._store.blob_size(prefix, self._uplink), np.uint8)
                self._store.read_blob(prefix, wire)
            except StoreError:  # not kept, or not completely
                continue
            self._checked["payload"] = self._checked.get("payload", 0) + 1
            if digest_of(wire) != line["digest"]:
                self._problems.append(f"the payload of job {line['job']} is not the one that was merged")
        if len(lines) > self._checked.get("payload", 0):
            self._unchecked.append("payloads, which were not kept (ledger.keep_payloads)")

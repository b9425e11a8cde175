"""What `fedqueue audit` makes of signatures: is what lies in Redis what the run's coordinator signed?

It needs the coordinator's public key and nothing secret, so a site can ask as well as the operator.
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
from fedqueue.protocol.key_files import PublicKey, read_public_keys
from fedqueue.protocol.messages import Order, read
from fedqueue.protocol.signed_envelope import (
    ORDER,
    RUN_DESCRIPTOR,
    VERSION,
    RunDescriptor,
    Scope,
    VersionRecord,
    digest_of,
    history_of,
    open_envelope,
    packed,
)
from fedqueue.protocol.site_identity import COORDINATOR_PUBLIC
from fedqueue.tensors.codec import downward, upward
from fedqueue.tensors.frame import Manifest
from fedqueue.transport.store import BlobBuffer, RunInfo, Store
from fedqueue_coordinator.service.coordinator_store import CoordinatorStore

LedgerRecord = Mapping[str, Any]
WHO = "the coordinator"


@dataclass(frozen=True)
class Signatures:
    """`checked` counts by kind what holds or is among the `problems`; `unchecked` says what could not be verified."""

    checked: Mapping[str, int]
    problems: Sequence[str]
    unchecked: str


def verify_signatures(store: CoordinatorStore, info: RunInfo, ledger: Iterable[LedgerRecord], keys: Path) -> Signatures:
    """Verify run descriptor, versions, history, totals, open orders and kept payloads of the run at `info`.

    `ledger` is of that moment. Raises BlobMissing where the head was replaced meanwhile.
    """
    if not info.descriptor:
        return Signatures({}, [], "the run is not signed (security.signatures)")
    if not (keys / COORDINATOR_PUBLIC).exists():
        return Signatures({}, [], f"no {COORDINATOR_PUBLIC} in {keys}: --keys names the folder that has it")
    public = read_public_keys(keys / COORDINATOR_PUBLIC, "--keys")
    return _Verification(store, info, list(ledger), public).result()


def verify_model(
    store: Store, info: RunInfo, version: int, model: BlobBuffer, keys: Path, state: bytes | None = None
) -> str:
    """Raises SignatureError unless `model`, as it is stored, is that version as the coordinator signed it.

    With `state`, unless that is the server's state as it was signed, too. Returns why it could not be verified; an
    empty string where it was.
    """
    if not info.descriptor:
        return "the run is not signed"
    if not (keys / COORDINATOR_PUBLIC).exists():
        return f"no {COORDINATOR_PUBLIC} in {keys}"
    public = read_public_keys(keys / COORDINATOR_PUBLIC, "--keys")
    signed = _signed_version(store, descriptor_scope(info, public), public, version, model)
    if state is not None:
        _require_state(version, signed, state)
    return ""


def descriptor_scope(info: RunInfo, public: Sequence[PublicKey]) -> Scope:
    """The scope of the run's signatures, from its descriptor.

    Raises SignatureError unless configuration and manifest in Redis are the ones that the descriptor names.
    """
    descriptor = read(
        RunDescriptor, open_envelope(info.descriptor, public, RUN_DESCRIPTOR, Scope(info.run), [], WHO).body
    )
    if info.config_digest != descriptor.config:
        raise SignatureError("the configuration in Redis is not the one that the run descriptor names")
    if digest_of(info.manifest) != descriptor.manifest:
        raise SignatureError("the manifest in Redis is not the one that the run descriptor names")
    return Scope(info.run, descriptor.instance, descriptor.epoch)


def _signed_version(
    store: Store, scope: Scope, public: Sequence[PublicKey], version: int, model: BlobBuffer
) -> VersionRecord:
    envelope = store.read_version_signature(version, model.nbytes)
    signed = read(VersionRecord, open_envelope(envelope, public, VERSION, scope, [version], WHO).body)
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
        compression, manifest = parse_config(info.config).compression, Manifest.unpack(info.manifest)
        self._up, self._down = upward(compression, manifest), downward(compression, manifest)
        self._scope = Scope(info.run)
        self._checked: dict[str, int] = {}
        self._problems: list[str] = []
        self._unchecked = ["records of the ledger that are no versions", "what clients say until it is merged"]

    def result(self) -> Signatures:
        self._try("descriptor", self._descriptor)
        if not self._problems:  # else nobody knows what the rest has to be about
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
        self._scope = descriptor_scope(self._info, self._public)

    def _version(self, version: int) -> VersionRecord:
        wire = self._store.read_wire(version, self._down)
        return _signed_version(self._store, self._scope, self._public, version, wire)

    def _head(self, version: int) -> None:
        """The newest version, and all that was signed with it."""
        signed = self._version(version)
        if history_of(self._ledger) != signed.history:
            self._problems.append(f"the ledger is not the history of version {version} as it was signed")
        if digest_of(packed(self._info.totals)) != signed.totals:
            self._problems.append(f"the totals are not those of version {version} as they were signed")
        self._checked["history"] = self._checked["totals"] = 1
        if self._info.state == "running":
            self._state(version, signed)
        else:
            self._unchecked.append("the server optimizer's state, deleted at the end")

    def _state(self, version: int, signed: VersionRecord) -> None:
        state: bytes | None = None
        with contextlib.suppress(StoreError):
            state = self._store.read_optimizer_state(version)
        if self._store.info().version != version:  # then that was of another one, or half gone
            raise BlobMissing(self._store.keys.state(version))
        _require_state(version, signed, state)

    def _order(self, job: str, client: str, data: bytes) -> None:
        order = read(Order, open_envelope(data, self._public, ORDER, self._scope, [], WHO).body)
        if (order.job, order.client) != (job, client):
            raise SignatureError(f"the record of {client}'s job {job} holds the order of {order.job} of {order.client}")

    def _payloads(self) -> None:
        """Merged payloads that were kept: their digests are in the history."""
        lines = [line for record in self._ledger for line in record.get("merged", ()) if line.get("digest")]
        for line in lines:
            prefix = self._store.keys.kept_payload(line["job"], line["attempt"])
            try:
                wire = np.empty(self._store.blob_size(prefix, self._up), np.uint8)
                self._store.read_blob(prefix, wire)
            except StoreError:  # not kept, or not all of it
                continue
            self._checked["payload"] = self._checked.get("payload", 0) + 1
            if digest_of(wire) != line["digest"]:
                self._problems.append(f"the payload of job {line['job']} is not the one that was merged")
        if len(lines) > self._checked.get("payload", 0):
            self._unchecked.append("payloads that were not kept (ledger.keep_payloads)")

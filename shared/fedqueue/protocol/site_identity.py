"""The site's identity: signs for its clients, and accepts nothing about a run that its coordinator has not signed.

Redis is untrusted transport: it can withhold messages but not forge them. It cannot make this site train on another
model, with other settings, or on an old version that is presented as new.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fedqueue.errors import ConfigurationError, SignatureError
from fedqueue.protocol.key_files import (
    COORDINATOR,
    COORDINATOR_PUBLIC,
    KEY_SUFFIX,
    KeyFile,
    PublicKey,
    SigningKey,
    read_signing_key,
    read_trusted_keys,
)
from fedqueue.protocol.messages import read
from fedqueue.protocol.run_info import RunInfo
from fedqueue.protocol.signed_envelope import (
    ORDER,
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


class SiteIdentity:
    """The keys of the clients that one worker serves, the coordinator's public keys, and the newest version seen."""

    def __init__(
        self,
        run: str,
        keys: Mapping[str, KeyFile[SigningKey]],
        coordinator: KeyFile[list[PublicKey]],
        session: str,
    ) -> None:
        """`session` names this worker process: its messages are valid until another process serves the client."""
        self._run, self._keys, self._coordinator, self._session = run, dict(keys), coordinator, session
        self._descriptor: RunDescriptor | None = None
        self._seen = 0  # the newest version
        self.broken = ""
        """Why this run can no longer be trusted; empty while it can."""

    @property
    def clients(self) -> list[str]:
        """The clients whose private key is in the key folder."""
        return sorted(self._keys)

    def key_of(self, client: str) -> str:
        """The id of the client's present key; empty for a client without a key here."""
        return self._keys[client].keys.public.id if client in self._keys else ""

    @property
    def scope(self) -> Scope:
        """The scope of this run's signatures; raises SignatureError before `enter`."""
        if self._descriptor is None:
            raise SignatureError("the run descriptor has not been read yet")
        return Scope(self._run, self._descriptor.instance, self._descriptor.epoch)

    def enter(self, info: RunInfo) -> None:
        """Verify the run's descriptor, and follow it into a later term or epoch.

        Raises SignatureError if the coordinator did not sign the descriptor, if configuration or manifest in Redis
        differ from its digests, and if it belongs to an earlier epoch or term, or to another run of this name.
        """
        try:
            descriptor = read(RunDescriptor, self._open(RUN_DESCRIPTOR, Scope(self._run), [], info.descriptor).body)
            for name, there, signed in (
                ("configuration", info.config_digest, descriptor.config),
                ("manifest", digest_of(info.manifest), descriptor.manifest),
            ):
                if there != signed:
                    raise SignatureError(f"the {name} in Redis is not the one that the coordinator signed")
            self._follow(descriptor)
        except SignatureError as error:
            self.broken = str(error)
            raise

    def _follow(self, descriptor: RunDescriptor) -> None:
        known = self._descriptor
        if known and descriptor.epoch < known.epoch:
            raise SignatureError(f"the run went back from epoch {known.epoch} to {descriptor.epoch}")
        if known and descriptor.epoch == known.epoch and descriptor.instance != known.instance:
            raise SignatureError("another run of this name has replaced this one: restart the worker to serve it")
        if known and descriptor.epoch == known.epoch and descriptor.term < known.term:
            raise SignatureError(f"the run went back from term {known.term} to {descriptor.term}")
        if known and descriptor.frozen != known.frozen:
            raise SignatureError("the run has other frozen tensors than before: restart the worker to fetch them")
        if known is None or descriptor.epoch > known.epoch or descriptor.term > known.term:
            self._seen = descriptor.first_version  # may be older than seen: Redis may have lost newer versions
        self._descriptor = descriptor

    def order(self, data: bytes) -> bytes:
        """The packed order in the envelope; raises SignatureError unless the coordinator signed it for this epoch."""
        return self._open(ORDER, self.scope, [], data).body

    def goes_back(self, version: int) -> bool:
        """Whether this site has seen a newer version; a new term, which `enter` reads, may explain that."""
        return version < self._seen

    def check_version(self, version: int, model: Digestible, data: bytes) -> None:
        """Raise SignatureError unless `model` (uint8, as stored) is that version, and no newer one has been seen."""
        if self.goes_back(version):
            raise SignatureError(f"version {version} is offered as the newest, but {self._seen} was seen before")
        envelope = self._open(VERSION, self.scope, [version], data)
        if digest_of(model) != read(VersionRecord, envelope.body).model:
            raise SignatureError(f"the model in Redis is not version {version} as the coordinator signed it")
        self._seen = version

    def check_frozen(self, frozen: Digestible) -> None:
        """Raise SignatureError unless these are the run's frozen tensors, as the coordinator signed them."""
        if self._descriptor is None or digest_of(frozen) != self._descriptor.frozen:
            raise SignatureError("the frozen tensors in Redis are not those that the coordinator signed")

    def sign(self, kind: str, client: str, about: Sequence[str | int], body: bytes) -> bytes:
        """The signed envelope of `body`; raises ConfigurationError for a client without a key here."""
        if client not in self._keys:
            known = ", ".join(self.clients) or "no client"
            raise ConfigurationError(
                "security.keys", client, f"the folder has keys of {known} only", "add the key of this client"
            )
        return sign_envelope(self._keys[client].keys, kind, self.scope, [client, *about], body, self._session)

    def _open(self, kind: str, scope: Scope, about: Sequence[str | int], data: bytes) -> SignedEnvelope:
        return open_envelope(data, self._coordinator.keys, kind, scope, about, "the coordinator")


def load_site_identity(folder: Path, run: str, session: str) -> SiteIdentity:
    """The site's identity out of its key folder: `coordinator.pub`, and `CLIENT.key` for each client.

    A replaced file takes effect with the next message. Raises ConfigurationError if a file is missing or invalid.
    """
    files = [path for path in sorted(folder.glob(f"*{KEY_SUFFIX}")) if path.stem != COORDINATOR]
    keys = {path.stem: KeyFile(path, read_signing_key) for path in files}
    if not keys:
        raise ConfigurationError(
            "security.keys", str(folder), "holds no CLIENT.key", "the operator's `fedqueue enroll CLIENT` creates "
            "this folder, or set security.signatures = \"off\" to trust everyone who can write to Redis",
        )  # fmt: skip
    return SiteIdentity(run, keys, KeyFile(folder / COORDINATOR_PUBLIC, read_trusted_keys), session)

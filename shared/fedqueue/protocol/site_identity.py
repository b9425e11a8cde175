"""What a site signs, and what it believes: nothing of a run that its coordinator has not signed.

Redis is a postbox to it. Whoever owns that postbox can keep things back; it cannot make this site train on another
model, with other settings, or on an old version that is passed off as new.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fedqueue.errors import ConfigurationError, SignatureError
from fedqueue.protocol.key_files import KeyFile, PublicKey, SigningKey, read_public_keys, read_signing_key
from fedqueue.protocol.messages import read
from fedqueue.protocol.signed_envelope import (
    ORDER,
    RUN_DESCRIPTOR,
    VERSION,
    RunDescriptor,
    Scope,
    SignedEnvelope,
    VersionRecord,
    digest_of,
    open_envelope,
    sign_envelope,
)
from fedqueue.transport.store import BlobBuffer, RunInfo

COORDINATOR = "coordinator"  # no client has this name; its private key may lie beside a site's, on one machine
COORDINATOR_PUBLIC = f"{COORDINATOR}.pub"
KEY_SUFFIX = ".key"


class SiteIdentity:
    """The keys of the clients that one worker serves, those of its coordinator, and how far it has seen the run go."""

    def __init__(
        self,
        run: str,
        keys: Mapping[str, KeyFile[SigningKey]],
        coordinator: KeyFile[list[PublicKey]],
        session: str,
    ) -> None:
        """`session` names this worker process: what it says counts until another process serves the client."""
        self._run, self._keys, self._coordinator, self._session = run, dict(keys), coordinator, session
        self._descriptor: RunDescriptor | None = None
        self._seen = 0  # the highest version
        self.broken = ""
        """Why this run is not believed any more; empty while it is."""

    @property
    def clients(self) -> list[str]:
        """Those for which there is a key here."""
        return sorted(self._keys)

    def key_of(self, client: str) -> str:
        """The id of the client's present key; empty where it is not here."""
        return self._keys[client].keys.public.id if client in self._keys else ""

    @property
    def scope(self) -> Scope:
        """Raises SignatureError before `enter`."""
        if self._descriptor is None:
            raise SignatureError("the run descriptor has not been read yet")
        return Scope(self._run, self._descriptor.instance, self._descriptor.epoch)

    def enter(self, info: RunInfo) -> None:
        """Take the run for what its run descriptor says, or go on with it in a later epoch.

        Raises SignatureError where the run descriptor is not the coordinator's, where configuration or manifest in
        Redis are not the ones that it names, and where it is of an earlier epoch or another run than this site knows.
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
            raise SignatureError("another run of this name has taken its place: start the worker anew to serve it")
        if known and descriptor.epoch == known.epoch and descriptor.term < known.term:
            raise SignatureError(f"the run went back from term {known.term} to {descriptor.term}")
        if known is None or descriptor.epoch > known.epoch or descriptor.term > known.term:
            self._seen = descriptor.floor  # a new term may go on from before what Redis lost
        self._descriptor = descriptor

    def order(self, data: bytes) -> bytes:
        """The packed order; raises SignatureError unless the coordinator gave it, in this epoch of this run."""
        return self._open(ORDER, self.scope, [], data).body

    def goes_back(self, version: int) -> bool:
        """Whether this site has seen a newer version: then `enter` says whether a new term explains it."""
        return version < self._seen

    def check_version(self, version: int, model: BlobBuffer, data: bytes) -> None:
        """Raises SignatureError unless `model` (uint8, the whole frame) is that version, and none older than seen."""
        if self.goes_back(version):
            raise SignatureError(f"version {version} is offered as the newest, but {self._seen} was there before")
        envelope = self._open(VERSION, self.scope, [version], data)
        if digest_of(model) != read(VersionRecord, envelope.body).model:
            raise SignatureError(f"the model in Redis is not version {version} as the coordinator signed it")
        self._seen = version

    def sign(self, kind: str, client: str, about: Sequence[str | int], body: bytes) -> bytes:
        """`body` signed in the client's name; raises ConfigurationError where its key is not here."""
        if client not in self._keys:
            known = ", ".join(self.clients) or "nobody"
            raise ConfigurationError("security.keys", client, f"no key of this client is here, only of {known}")
        return sign_envelope(self._keys[client].keys, kind, self.scope, [client, *about], body, self._session)

    def _open(self, kind: str, scope: Scope, about: Sequence[str | int], data: bytes) -> SignedEnvelope:
        return open_envelope(data, self._coordinator.keys, kind, scope, about, "the coordinator")


def load_site_identity(folder: Path, run: str, session: str) -> SiteIdentity:
    """The trust of a site out of its key folder: `coordinator.pub`, and `CLIENT.key` for each client.

    A file that is replaced counts from the next thing on that is said or heard.

    Raises ConfigurationError where one is missing or cannot be read.
    """
    files = [path for path in sorted(folder.glob(f"*{KEY_SUFFIX}")) if path.stem != COORDINATOR]
    keys = {path.stem: KeyFile(path, read_signing_key) for path in files}
    if not keys:
        raise ConfigurationError(
            "security.keys", str(folder), "holds no CLIENT.key; the operator's `fedqueue enroll CLIENT` makes this "
            "folder, and security.signatures = \"off\" does without (then whoever writes to Redis is believed)",
        )  # fmt: skip
    return SiteIdentity(run, keys, KeyFile(folder / COORDINATOR_PUBLIC, read_public_keys), session)

"""The site's identity: signs for its clients, and accepts nothing about a run that its coordinator has not signed.

Redis is untrusted transport: it can withhold messages but not forge them. It cannot make this site train on another
model, with other settings, or on an old version that is presented as new.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from fedqueue.errors import ConfigurationError, SignatureError
from fedqueue.protocol.followed_run import FollowedRun
from fedqueue.protocol.key_files import (
    COORDINATOR,
    COORDINATOR_PUBLIC,
    KEEPERS,
    KEY_SUFFIX,
    REVOKED,
    KeyFile,
    PublicKey,
    SigningKey,
    read_signing_key,
    read_trusted_keys,
)
from fedqueue.protocol.messages import KeeperKey, read
from fedqueue.protocol.roster import Roster
from fedqueue.protocol.run_info import RunInfo
from fedqueue.protocol.signed_envelope import (
    ANSWER,
    KEEPER,
    ORDER,
    QUESTION,
    VERSION,
    Digestible,
    Scope,
    VersionRecord,
    digest_of,
    open_envelope,
    sign_envelope,
)


class SiteIdentity:
    """The keys of the clients that one worker serves, those of coordinator and keepers, and the newest version seen."""

    def __init__(
        self,
        run: str,
        keys: Mapping[str, KeyFile[SigningKey]],
        coordinator: KeyFile[list[PublicKey]],
        session: str,
        keepers: Roster,
    ) -> None:
        """`session` names this worker process: its messages are valid until another process serves the client.

        `keepers` are those whose public keys this site has.
        """
        self._keys, self._session, self._keepers = dict(keys), session, keepers
        self._followed = FollowedRun(run, coordinator)
        self._seen = 0  # the newest version

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
        return self._followed.scope

    @property
    def broken(self) -> str:
        """Why this run can no longer be trusted; empty while it can."""
        return self._followed.broken

    def enter(self, info: RunInfo) -> None:
        """Verify the run's descriptor, and follow it into a later term or epoch; raises as `FollowedRun.enter`."""
        descriptor, is_later = self._followed.enter(info)
        if is_later:
            self._seen = descriptor.first_version  # may be older than seen: Redis may have lost newer versions

    def order(self, data: bytes) -> bytes:
        """The packed order in the envelope; raises SignatureError unless the coordinator signed it for this epoch."""
        return self._followed.open(ORDER, [], data)

    def question(self, data: bytes) -> bytes:
        """The packed question in the envelope; raises SignatureError unless the coordinator signed it for this run."""
        return self._followed.open_before(QUESTION, data)

    def goes_back(self, version: int) -> bool:
        """Whether this site has seen a newer version; a new term, which `enter` reads, may explain that."""
        return version < self._seen

    def check_version(self, version: int, model: Digestible, data: bytes) -> str:
        """The digest of `model` (uint8, as stored).

        Raises SignatureError unless it is that version, and no newer one has been seen.
        """
        if self.goes_back(version):
            raise SignatureError(f"version {version} is offered as the newest, but {self._seen} was seen before")
        record = read(VersionRecord, self._followed.open(VERSION, [version], data))
        if digest_of(model) != record.model:
            raise SignatureError(f"the model in Redis is not version {version} as the coordinator signed it")
        self._seen = version
        return record.model

    def require_keepers(self, keepers: Iterable[str]) -> None:
        """Raise ConfigurationError unless this site has the public key of each of these keepers."""
        hint = "ask the keeper's operator for it: masks protect an update only where a site knows its keepers"
        self._keepers.require(keepers, hint)

    def keeper_key(self, keeper: str, component: int, data: bytes) -> bytes:
        """The public encryption key of a keeper, out of what Redis has of it.

        Raises SignatureError unless the keeper signed it for this run instance and this component.
        """
        keys = self._keepers.keys_of(keeper)
        try:
            envelope = open_envelope(data, keys, KEEPER, self.scope, [keeper], f"keeper {keeper}")
        except SignatureError:
            raise SignatureError(
                f"the encryption key in Redis is not that of keeper {keeper} for this run: it is not signed with a key "
                f"in this site's {KEEPERS}/{keeper}.pub; compare that file with the keeper's operator"
            ) from None
        stated = read(KeeperKey, envelope.body)
        if stated.component != component:
            raise SignatureError(f"keeper {keeper} states its key for component {stated.component}, not {component}")
        return stated.public

    def check_frozen(self, frozen: Digestible) -> None:
        """Raise SignatureError unless these are the run's frozen tensors, as the coordinator signed them."""
        descriptor = self._followed.descriptor
        if descriptor is None or digest_of(frozen) != descriptor.frozen:
            raise SignatureError("the frozen tensors in Redis are not those that the coordinator signed")

    def sign(self, kind: str, client: str, about: Sequence[str | int], body: bytes) -> bytes:
        """The signed envelope of `body`; raises ConfigurationError for a client without a key here."""
        return self._signed(kind, self.scope, client, about, body)

    def sign_answer(self, client: str, instance: str, about: Sequence[str | int], body: bytes) -> bytes:
        """The signed envelope of a piece of an answer to the question of that instance; raises as `sign`."""
        return self._signed(ANSWER, Scope(self._followed.run, instance), client, about, body)

    def _signed(self, kind: str, scope: Scope, client: str, about: Sequence[str | int], body: bytes) -> bytes:
        if client not in self._keys:
            known = ", ".join(self.clients) or "no client"
            raise ConfigurationError(
                "security.keys", client, f"the folder has keys of {known} only", "add the key of this client"
            )
        return sign_envelope(self._keys[client].keys, kind, scope, [client, *about], body, self._session)


def load_site_identity(folder: Path, run: str, session: str) -> SiteIdentity:
    """The site's identity out of its key folder: `coordinator.pub`, `CLIENT.key` for each client, `keepers/KEEPER.pub`.

    A replaced file takes effect with the next message. Raises ConfigurationError if a file is missing or invalid.
    """
    files = [path for path in sorted(folder.glob(f"*{KEY_SUFFIX}")) if path.stem != COORDINATOR]
    keys = {path.stem: KeyFile(path, read_signing_key) for path in files}
    if not keys:
        raise ConfigurationError(
            "security.keys", str(folder), "holds no CLIENT.key", "the operator's `fedqueue enroll CLIENT` creates "
            "this folder, or set security.signatures = \"off\" to trust everyone who can write to Redis",
        )  # fmt: skip
    coordinator = KeyFile(folder / COORDINATOR_PUBLIC, read_trusted_keys)
    return SiteIdentity(run, keys, coordinator, session, Roster(folder / KEEPERS, folder / REVOKED, "keeper"))

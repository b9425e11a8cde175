"""A keeper's identity: signs its answers, and trusts neither Redis nor the coordinator's word about the clients.

KEYS/KEEPER.key        its own private key        KEYS/clients/CLIENT.pub    its own copy of the clients' keys
KEYS/coordinator.pub   the coordinator's          KEYS/revoked/CLIENT.pub    keys of a revoked client
"""

from __future__ import annotations

from pathlib import Path

from fedqueue.errors import ConfigurationError, NotEnrolled, SignatureError
from fedqueue.protocol.followed_run import FollowedRun
from fedqueue.protocol.key_files import (
    CLIENTS,
    COORDINATOR_PUBLIC,
    KEY_SUFFIX,
    REVOKED,
    KeyFile,
    PublicKey,
    SigningKey,
    read_signing_key,
    read_trusted_keys,
    require_safe,
)
from fedqueue.protocol.messages import Offer
from fedqueue.protocol.roster import Roster
from fedqueue.protocol.run_info import RunInfo
from fedqueue.protocol.signed_envelope import (
    COHORT,
    KEEPER,
    UPDATE,
    RunDescriptor,
    Scope,
    open_envelope,
    sign_envelope,
)


class KeeperIdentity:
    """A keeper's private key, the coordinator's public keys, and the keeper's own roster of clients."""

    def __init__(
        self, run: str, name: str, key: KeyFile[SigningKey], coordinator: KeyFile[list[PublicKey]], clients: Roster
    ) -> None:
        self.name = name
        self._key, self._clients = key, clients
        self._followed = FollowedRun(run, coordinator)

    @property
    def scope(self) -> Scope:
        """The scope of this run's signatures; raises SignatureError before `enter`."""
        return self._followed.scope

    def enter(self, info: RunInfo) -> RunDescriptor:
        """The run's descriptor, verified and followed into a later term or epoch; raises as `FollowedRun.enter`."""
        descriptor, _ = self._followed.enter(info)
        return descriptor

    def knows(self, client: str) -> bool:
        """Whether the client is on the keeper's own roster."""
        return self._clients.has(client)

    def open_update(self, offer: Offer) -> bytes:
        """The header in an offer.

        Raises NotEnrolled for a client that is not on the keeper's own roster, and SignatureError unless the client
        signed the header for this run, job, attempt and base. The envelope must be encoded as clients encode it: other
        bytes of the same header would name the same update a second time.
        """
        if not self.knows(offer.client):
            raise NotEnrolled(f"client {offer.client} is not on the roster of keeper {self.name}, its folder {CLIENTS}")
        keys = self._clients.keys_of(offer.client)
        about: list[str | int] = [offer.client, offer.job, offer.attempt, offer.base]
        envelope = open_envelope(offer.header, keys, UPDATE, self.scope, about, f"client {offer.client}")
        if envelope.pack() != offer.header:
            raise SignatureError(f"the header has other bytes than client {offer.client} sent: it was encoded again")
        return envelope.body

    def open_cohort(self, data: bytes) -> bytes:
        """The packed `Cohort` in the envelope; raises SignatureError unless the coordinator signed it for this run."""
        return self._followed.open(COHORT, [], data)

    def sign(self, kind: str, body: bytes) -> bytes:
        """The signed envelope of an answer; raises SignatureError before `enter`."""
        return sign_envelope(self._key.keys, kind, self.scope, [self.name], body)

    def is_own(self, data: bytes) -> bool:
        """Whether `data` is the statement of an encryption key that this keeper has signed for this run instance."""
        try:
            open_envelope(data, [self._key.keys.public], KEEPER, self.scope, [self.name], "this keeper")
        except SignatureError:
            return False
        return True


def load_keeper_identity(folder: Path, run: str, name: str) -> KeeperIdentity:
    """The keeper's identity out of its key folder.

    A replaced file takes effect with the next message. Raises ConfigurationError if a file is missing or invalid, if
    any user of the machine may write there, and for a roster without a client.
    """
    key = folder / f"{name}{KEY_SUFFIX}"
    if not key.exists():
        raise ConfigurationError(
            "security.keys", str(folder), f"holds no {key.name}", "the operator's `fedqueue enroll --keeper` creates "
            "this folder"
        )  # fmt: skip
    require_safe(folder / CLIENTS / COORDINATOR_PUBLIC)  # a new file there would add a client
    if not any((folder / CLIENTS).glob("*.pub")):
        raise ConfigurationError(
            "security.keys", str(folder), "holds no clients/CLIENT.pub", "put the public key of each client there: "
            "this keeper takes part only for clients on its own roster"
        )  # fmt: skip
    coordinator = KeyFile(folder / COORDINATOR_PUBLIC, read_trusted_keys)
    roster = Roster(folder / CLIENTS, folder / REVOKED)
    return KeeperIdentity(run, name, KeyFile(key, read_signing_key), coordinator, roster)

"""A roster: the public keys of clients, or of keepers, in a folder with one file for each.

    FOLDER/NAME.pub    public keys, the newest first        REVOKED/NAME.pub    keys of one that was revoked

A file is checked for changes at each message of its owner, so enrolling, rotating and revoking need no restart.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fedqueue.config.names import CLIENT_ID
from fedqueue.errors import ConfigurationError, NotEnrolled
from fedqueue.protocol.key_files import KeyFile, PublicKey, read_trusted_keys


class Roster:
    """Those whose messages are accepted: each has a file of public keys."""

    def __init__(self, folder: Path, revoked: Path, what: str = "client", revocable: bool = True) -> None:
        """Read all present keys at once where keys are not `revocable`: the files may be deleted.

        `what` names the party in errors.
        """
        self._folder, self._revoked, self._what, self._revocable = folder, revoked, what, revocable
        self._known: dict[str, KeyFile[list[PublicKey]]] = {}
        if not revocable:
            for path in folder.glob("*.pub"):
                self.keys_of(path.stem)

    def has(self, name: str) -> bool:
        """Whether there is a public key of `name` that is not revoked."""
        try:
            return bool(self.keys_of(name))
        except NotEnrolled:
            return False

    def require(self, names: Iterable[str], hint: str) -> None:
        """Raise ConfigurationError unless there is a public key of each of `names`; `hint` says how to get one."""
        for name in names:
            if not self.has(name):
                file = f"{self._folder.name}/{name}.pub"
                problem = f"no valid public key of this {self._what} of the run"
                raise ConfigurationError("security.keys", file, problem, hint)

    def keys_of(self, name: str) -> list[PublicKey]:
        """The public keys of `name`; raises NotEnrolled for one without a valid file."""
        known = self._known.get(name)
        if known is None or (self._revocable and not known.exists()):
            known = self._known[name] = self._file_of(name)
        return known.keys

    def _file_of(self, name: str) -> KeyFile[list[PublicKey]]:
        if not CLIENT_ID.fullmatch(name):
            raise NotEnrolled(f"no {self._what} of this name is enrolled")
        path = self._folder / f"{name}.pub"
        if not path.exists():
            was = "was revoked" if (self._revoked / path.name).exists() else "is not enrolled"
            option = "" if self._what == "client" else f" --{self._what}"
            raise NotEnrolled(f"{self._what} {name} {was}; `fedqueue enroll{option}` makes its key")
        try:
            return KeyFile(path, read_trusted_keys)
        except ConfigurationError as error:  # one broken file must not end the run
            raise NotEnrolled(str(error)) from None

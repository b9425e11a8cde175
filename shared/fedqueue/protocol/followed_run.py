"""A run as a party follows it that trusts nothing about it but its coordinator's signature: a site, or a keeper.

Redis is untrusted transport: it can withhold messages but not forge them.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedqueue.errors import SignatureError
from fedqueue.protocol.key_files import KeyFile, PublicKey
from fedqueue.protocol.messages import read
from fedqueue.protocol.run_info import RunInfo
from fedqueue.protocol.signed_envelope import RUN_DESCRIPTOR, RunDescriptor, Scope, digest_of, open_envelope


class FollowedRun:
    """The newest signed description of a run, which `enter` verifies and never lets go back."""

    def __init__(self, run: str, coordinator: KeyFile[list[PublicKey]]) -> None:
        self.run, self._coordinator = run, coordinator
        self.descriptor: RunDescriptor | None = None
        self.broken = ""
        """Why this run can no longer be trusted; empty while it can."""

    @property
    def scope(self) -> Scope:
        """The scope of this run's signatures; raises SignatureError before `enter`."""
        if self.descriptor is None:
            raise SignatureError("the run descriptor has not been read yet")
        return Scope(self.run, self.descriptor.instance, self.descriptor.epoch)

    def enter(self, info: RunInfo) -> tuple[RunDescriptor, bool]:
        """Verify the run's descriptor, and follow it; returns it, and whether it is of a later term or epoch.

        Raises SignatureError if the coordinator did not sign the descriptor, if configuration or manifest in Redis
        differ from its digests, if they are others than before in this epoch, and if it belongs to an earlier epoch or
        term, or to another run of this name.
        """
        try:
            descriptor = read(RunDescriptor, self._open(RUN_DESCRIPTOR, Scope(self.run), [], info.descriptor))
            for name, there, signed in (
                ("configuration", info.config_digest, descriptor.config),
                ("manifest", digest_of(info.manifest), descriptor.manifest),
            ):
                if there != signed:
                    raise SignatureError(f"the {name} in Redis is not the one that the coordinator signed")
            return self._follow(descriptor)
        except SignatureError as error:
            self.broken = str(error)
            raise

    def _follow(self, descriptor: RunDescriptor) -> tuple[RunDescriptor, bool]:
        known = self.descriptor
        if known and descriptor.epoch < known.epoch:
            raise SignatureError(f"the run went back from epoch {known.epoch} to {descriptor.epoch}")
        if known and descriptor.epoch == known.epoch and descriptor.instance != known.instance:
            raise SignatureError("another run of this name has replaced this one: restart this process to serve it")
        if known and descriptor.epoch == known.epoch and descriptor.term < known.term:
            raise SignatureError(f"the run went back from term {known.term} to {descriptor.term}")
        if known and descriptor.instance == known.instance and _contents(descriptor) != _contents(known):
            raise SignatureError("the coordinator has signed another configuration or manifest for the same run")
        if known and descriptor.frozen != known.frozen:
            raise SignatureError("the run has other frozen tensors than before: restart this process to fetch them")
        self.descriptor = descriptor
        return descriptor, known is None or descriptor.epoch > known.epoch or descriptor.term > known.term

    def open(self, kind: str, about: Sequence[str | int], data: bytes) -> bytes:
        """The body of an envelope that the coordinator signed for this run; raises SignatureError for any other."""
        return self._open(kind, self.scope, about, data)

    def open_before(self, kind: str, data: bytes) -> bytes:
        """The body of an envelope that the coordinator signed for no instance of the run; raises as `open`."""
        return self._open(kind, Scope(self.run), [], data)

    def _open(self, kind: str, scope: Scope, about: Sequence[str | int], data: bytes) -> bytes:
        return open_envelope(data, self._coordinator.keys, kind, scope, about, "the coordinator").body


def _contents(descriptor: RunDescriptor) -> tuple[str, str]:
    return descriptor.config, descriptor.manifest

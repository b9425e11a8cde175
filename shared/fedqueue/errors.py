"""Every error that fedqueue raises on purpose.

    FedqueueError
    ├── ConfigurationError      a key of the configuration is unknown or has a value that is not accepted
    ├── TaskError               the user's task cannot be found, imported or used
    ├── WireError               bytes from another process are not what the protocol allows
    │   ├── ManifestMismatch    a model differs from the run's model
    │   └── SignatureError      a signature is missing, does not hold, or is not by whom it has to be
    │       ├── NotEnrolled     the coordinator keeps no key of that client
    │       └── Superseded      a worker process said it that another one has followed
    ├── PolicyRefusal           a job asks for more than its site agrees to
    ├── StoreError              Redis holds something else than expected
    │   ├── RunNotFound         no run of that name
    │   ├── RunExists           a run of that name is already there
    │   ├── RunLost             Redis has lost the run, and so has the disk
    │   ├── BlobMissing         a chunk of a version or a payload is gone
    │   └── Fenced              another coordinator leads the run by now
    ├── ServerUnavailable       the Redis server cannot be reached or refuses us
    ├── ClientTaken             another worker serves that client, or every partition is taken
    ├── JobClosed               the job a worker trains for is no longer its own
    └── RunFailed               the run ended without a usable result

The command line turns ConfigurationError and TaskError into exit code 2, all others into 1.
"""

from __future__ import annotations

from pathlib import Path


class FedqueueError(Exception):
    """The root of the tree above; catching it catches everything fedqueue raises on purpose."""


class ConfigurationError(FedqueueError):
    """Names the `key`, the `value` it has, and what is `accepted`."""

    def __init__(self, key: str, value: object, accepted: str) -> None:
        self.key, self.value, self.accepted = key, value, accepted
        super().__init__(f"{key} = {value!r}: {accepted}")


class TaskError(FedqueueError):
    """The task's entry point cannot be found, imported, constructed or used."""


class WireError(FedqueueError):
    """Bytes that the protocol does not allow; nothing of them has been used."""


class ManifestMismatch(WireError):
    """A model or a frame differs from the manifest of the run."""


class SignatureError(WireError):
    """What was said is not, or cannot be shown to be, what the named party said: nothing of it is used."""


class NotEnrolled(SignatureError):
    """The coordinator keeps no public key of that client: it never was enrolled, or it was revoked."""


class Superseded(SignatureError):
    """Its client did say it, but by a worker process in whose place another one serves the client by now."""


class PolicyRefusal(FedqueueError):
    """The job is refused before any of it is done: the message says what it asks for and what the policy allows."""


class StoreError(FedqueueError):
    """Redis holds something else than this version of fedqueue expects."""


class RunNotFound(StoreError):
    def __init__(self, run: str) -> None:
        self.run = run
        super().__init__(f"no run named {run!r} on this server; `fedqueue runs` lists those there are")


class RunExists(StoreError):
    def __init__(self, run: str, why: str) -> None:
        self.run = run
        super().__init__(f"run {run!r} {why}; choose another name with --run, or delete its output folder")


class RunLost(StoreError):
    def __init__(self, run: str, checkpoint: Path) -> None:
        self.run = run
        super().__init__(
            f"Redis has lost run {run!r}, and there is no checkpoint {checkpoint} to go on from; "
            "start it again to begin with version 0"
        )


class BlobMissing(StoreError):
    def __init__(self, key: str) -> None:
        self.key = key
        super().__init__(f"{key} is not in Redis: the version or payload was deleted or never finished")


class Fenced(StoreError):
    """This coordinator lost the lead; what it was about to write has not been written."""


class ServerUnavailable(FedqueueError):
    """Redis cannot be reached, or refuses this user."""


class ClientTaken(FedqueueError):
    """Another worker serves that client, or no partition is free."""


class JobClosed(FedqueueError):
    """The lease of the job is over, or another attempt holds it: the work on it is dropped."""


class RunFailed(FedqueueError):
    """The run ended without reaching what it was to reach, and cannot go on."""

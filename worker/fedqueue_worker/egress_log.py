"""What left this site: one line of JSON for each post, for its data officer to read. Never a row, never a parameter.

The line is written before the post: nothing leaves that is not in the log, and where the log cannot be written, nothing
leaves. A post that Redis then refused (the job was over) gets a second line.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedqueue.errors import ConfigurationError
from fedqueue.protocol.messages import Ending, Registration, Update
from fedqueue.protocol.signed_envelope import digest_of
from fedqueue.transport.store import BlobBuffer
from fedqueue.transport.worker_store import Claim


def _utc() -> datetime:
    return datetime.now(UTC)


class EgressLog:
    """Appends to `path`; None: nowhere."""

    def __init__(self, path: Path | None, run: str = "", clock: Callable[[], datetime] = _utc) -> None:
        self._path, self._run, self._clock = path, run, clock

    def registers(self, registration: Registration) -> None:
        """The number of examples is to be told."""
        self._append("registration", client=registration.client, examples=registration.examples)

    def posts(self, claim: Claim, update: Update, payload: BlobBuffer) -> None:
        """An update is to be posted: its size and SHA-256, the names of its metrics, from which version."""
        if self._path is not None:
            self._append(
                "update", **_job(claim), bytes=payload.nbytes, sha256=update.digest or digest_of(payload),
                examples=update.examples, metrics=sorted(update.metrics), seconds=round(update.seconds, 3),
            )  # fmt: skip

    def ends(self, claim: Claim, ending: Ending) -> None:
        """A job is to end without an update: the text is what the coordinator gets to read."""
        self._append(ending.reason, **_job(claim), bytes=len(ending.error.encode()), text=ending.error)

    def was_refused(self, claim: Claim, reason: str) -> None:
        """Redis did not take the post of the line before, and deleted its payload."""
        self._append("not taken", **_job(claim), reason=reason)

    def _append(self, what: str, **fields: Any) -> None:
        if self._path is None:
            return
        line = {"at": self._clock().isoformat(timespec="milliseconds"), "what": what, "run": self._run, **fields}
        with self._path.open("ab", buffering=0) as file:
            whole = f"{json.dumps(line)}\n".encode()
            if file.write(whole) != len(whole):
                raise OSError(f"{self._path}: no room for a whole line")


def _job(claim: Claim) -> dict[str, Any]:
    return {"client": claim.client, "job": claim.job, "attempt": claim.attempt, "version": claim.version}


SILENT = EgressLog(None)


def open_egress_log(folder: str, run: str, token: str) -> EgressLog:
    """The outbox of one worker process: `FOLDER/RUN-TOKEN.jsonl`; an empty folder's name: none.

    Raises ConfigurationError where it cannot be written.
    """
    if not folder:
        return SILENT
    path = Path(folder) / f"{run}-{token[:12]}.jsonl"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o640)
    except OSError as error:
        accepted = f"what leaves this site cannot be logged there ({error.strerror}); name another folder, or none"
        raise ConfigurationError("security.outbox", folder, accepted) from None
    return EgressLog(path, run)

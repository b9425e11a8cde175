"""The log of what left this site: one line of JSON for each post, without any row or parameter.

A site's data officer reads it. The line is written before the post, so nothing leaves without a line; where the log
cannot be written, nothing leaves. A post that Redis then refuses, because the job was closed, gets a second line.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedqueue.errors import ConfigurationError
from fedqueue.protocol.messages import Ending, MaskedUpdate, Registration, Unavailable, Update
from fedqueue.protocol.signed_envelope import digest_of
from fedqueue.tensors.blobs import BlobBuffer
from fedqueue.transport.worker_store import Claim


def _utc() -> datetime:
    return datetime.now(UTC)


class EgressLog:
    """Appends lines to the file `path`; None switches the log off."""

    def __init__(self, path: Path | None, run: str = "", clock: Callable[[], datetime] = _utc) -> None:
        self._path, self._run, self._clock = path, run, clock

    def log_registration(self, registration: Registration) -> None:
        """Log a registration. Call this before the client's number of examples is sent."""
        self._append("registration", client=registration.client, examples=registration.examples)

    def log_unavailable(self, unavailable: Unavailable) -> None:
        """Log the report that a client's data cannot be loaded. Call this before the report is sent."""
        size = len(unavailable.error.encode())
        self._append("unavailable", client=unavailable.client, bytes=size, text=unavailable.error)

    def log_answer(self, client: str, part: int, answer: bytes, refusal: str, **about: Any) -> None:
        """Log an answer to `fedqueue describe`: its part, bytes, and what it is about. Call this before it is sent."""
        text = {"text": refusal} if refusal else about
        self._append("statistics", client=client, part=part, bytes=len(answer), **text)

    def log_update(self, claim: Claim, update: Update, payload: BlobBuffer) -> None:
        """Log an update: bytes, SHA-256, names of metrics, seconds, base version. Call this before the post.

        For a masked update the line also names the keepers, all of whom would have to help to read it.
        """
        if self._path is not None:
            masked_for = [seed.keeper for seed in update.seeds] if isinstance(update, MaskedUpdate) else None
            self._append(
                "update", **_job(claim), bytes=payload.nbytes, sha256=update.digest or digest_of(payload),
                examples=update.examples, metrics=sorted(update.metrics), seconds=round(update.seconds, 3),
                **({"masked_for": masked_for} if masked_for else {}),
            )  # fmt: skip

    def log_ending(self, claim: Claim, ending: Ending) -> None:
        """Log an ending without an update, with the text that the coordinator receives. Call this before the post."""
        self._append(ending.reason, **_job(claim), bytes=len(ending.error.encode()), text=ending.error)

    def log_refused_post(self, claim: Claim, reason: str) -> None:
        """Log that Redis refused the post of the previous line and deleted its payload."""
        self._append("not taken", **_job(claim), reason=reason)

    def _append(self, what: str, **fields: Any) -> None:
        if self._path is None:
            return
        line = {"at": self._clock().isoformat(timespec="milliseconds"), "what": what, "run": self._run, **fields}
        self._path.parent.mkdir(parents=True, exist_ok=True)  # it may have been deleted during the run
        with self._path.open("ab", buffering=0) as file:
            whole = f"{json.dumps(line)}\n".encode()
            if file.write(whole) != len(whole):
                raise OSError(
                    f"{self._path}: the disk is full; free space, because no update leaves without a line here"
                )


def _job(claim: Claim) -> dict[str, Any]:
    return {"client": claim.client, "job": claim.job, "attempt": claim.attempt, "version": claim.version}


NO_EGRESS_LOG = EgressLog(None)


def open_egress_log(folder: str | None, run: str, token: str) -> EgressLog:
    """Open the log of one worker process, `FOLDER/RUN-TOKEN.jsonl`; without a `folder` nothing is logged.

    Raises ConfigurationError where the file cannot be written.
    """
    if not folder:
        return NO_EGRESS_LOG
    path = Path(folder) / f"{run}-{token[:12]}.jsonl"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o640)
    except OSError as error:
        problem, hint = f"cannot be written ({error.strerror})", "name another folder, or 'off' for no log"
        raise ConfigurationError("security.egress_log", folder, problem, hint) from None
    return EgressLog(path, run)

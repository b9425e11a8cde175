"""Results of posting an update or an ending."""

from __future__ import annotations

from enum import StrEnum


class PostResult(StrEnum):
    """What `post.lua` answers, and `claim.lua` counts: accepted, or the reason for the refusal.

    A refusal is counted in the client's site record as `refused:VALUE`.
    """

    ACCEPTED = ""
    CLOSED = "closed"
    """The job is not open."""
    OTHER_ATTEMPT = "attempt"
    """The job is open for another attempt."""
    REPLAYED = "replayed"
    """This attempt has already posted; its first post remains in the stream."""
    PAYLOAD_MISSING = "payload"
    """A chunk of the payload is not stored."""
    OLD_EPOCH = "old_epoch"
    """The job was claimed in an earlier epoch of the run."""


REFUSALS = tuple(result for result in PostResult if result is not PostResult.ACCEPTED)
"""The reasons why the script rejects a claim or a post before anything is stored."""

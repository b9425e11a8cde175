"""The hash chain over a ledger's version records, which a coordinator signs with each version.

h(0) = SHA-256 of no bytes        h(v) = SHA-256(hex of h(v − 1), packed record of version v)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from fedqueue.protocol.msgpack import pack_record

NO_HISTORY = hashlib.sha256(b"").hexdigest()
"""The digest of a chain without records."""


def longer_history(history: str, record: bytes) -> str:
    """The digest of the chain `history` after one more record, given as `pack_record` packs it."""
    return hashlib.sha256(history.encode() + record).hexdigest()


def history_of(ledger: Iterable[Mapping[str, Any]]) -> str:
    """The digest of the chain of the ledger's version records, in order; other records are skipped."""
    history = NO_HISTORY
    for record in ledger:
        if record["kind"] == "version":
            history = longer_history(history, pack_record(record))
    return history

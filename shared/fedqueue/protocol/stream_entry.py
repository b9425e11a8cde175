"""One entry of a stream of updates, as a worker wrote it: parsed, and not verified."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class StreamEntry:
    """One entry of a client's stream; the stream determines the client, the worker claims job, attempt and base."""

    id: str
    """Its position in the stream and the stream's client: `POSITION@CLIENT`."""
    kind: str  # "update", "ended", "joined", "left", "unavailable" or "evaluated"
    body: bytes
    client: str = ""
    job: str = ""
    attempt: int = 0
    base: int = -1

    @classmethod
    def from_fields(cls, client: str, raw: tuple[bytes, Mapping[bytes, bytes]]) -> StreamEntry:
        """An entry of the client's stream, out of its position and its fields as Redis returns them.

        A missing or malformed field gets its default. Only the client's own worker can write to that stream.
        """
        fields = {k.decode("latin-1"): v for k, v in raw[1].items()}

        def text(name: str) -> str:
            return fields.get(name, b"").decode("utf-8", "replace")

        def number(name: str, default: int) -> int:
            try:
                return int(fields[name])
            except (KeyError, ValueError):
                return default

        return cls(
            f"{raw[0].decode()}@{client}", text("kind"), fields.get("body", b""), client, text("job"),
            number("attempt", 0), number("base", -1),
        )  # fmt: skip


def split_entry_id(entry: str) -> tuple[str, str]:
    """The position in the stream and the stream's client, out of an entry's `id`."""
    position, _, client = entry.partition("@")
    return position, client

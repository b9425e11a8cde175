"""One entry of a stream of updates, as it lies there: nothing of it is believed yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class StreamEntry:
    """One entry of a stream of updates. Its client is the stream's; of job and base it says what the worker said."""

    id: str  # place in its stream@client
    kind: str  # "update", "ended", "joined", "left" or "evaluated"
    body: bytes
    client: str = ""
    job: str = ""
    attempt: int = 0
    base: int = -1

    @classmethod
    def from_fields(cls, client: str, raw: tuple[bytes, Mapping[bytes, bytes]]) -> StreamEntry:
        """An entry of the stream of `client`, which nobody else can write to; its `id` names the stream too."""
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

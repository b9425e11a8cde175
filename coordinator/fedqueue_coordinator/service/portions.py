"""Portions of stream entries: which entries are handled and acknowledged together, and how their events are logged.

A hundred thousand clients may join at about the same time. Their entries are taken in bounded portions, so that an
update between them waits for one portion at most.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import structlog

from fedqueue.protocol.stream_entry import StreamEntry
from fedqueue_coordinator.core.events import (
    ClientJoined,
    ClientLeft,
    ClientUnavailable,
    Evaluated,
    Event,
    InvalidEntry,
    JobEnded,
)
from fedqueue_coordinator.core.waiting import names

log = structlog.get_logger("fedqueue.coordinator")

TOGETHER = 256  # entries of one portion: other clients of the server wait while one script acknowledges them
FEW = 10  # events of a kind that have a line each in the log; more of them have one line together
PRESENCE = frozenset({"joined", "left", "unavailable"})  # kinds of entries that tell whether a client is alive


def portions(entries: Iterable[StreamEntry]) -> Iterator[list[StreamEntry]]:
    """Divide the entries, in their order, into portions that are handled and acknowledged together.

    Neighbouring entries about the presence of clients form a portion of at most TOGETHER entries, one of each client:
    whether a client's later entry is valid depends on its earlier one, which must be acknowledged before. Any other
    entry is a portion of its own.
    """
    portion: dict[str, StreamEntry] = {}  # by client
    for entry in entries:
        presence = entry.kind in PRESENCE
        if portion and (not presence or entry.client in portion or len(portion) >= TOGETHER):
            yield list(portion.values())
            portion = {}
        if presence:
            portion[entry.client] = entry
        else:
            yield [entry]
    if portion:
        yield list(portion.values())


def log_events(events: Iterable[Event]) -> None:
    """Log the events of a portion: a line each, or one for all of a kind where there are more than FEW."""
    found: defaultdict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)  # message for one, for many → fields
    for event in events:
        match event:
            case ClientJoined(client, examples):
                told = {} if examples == 0 else {"examples": examples}  # 0: their number is hidden
                found["client joined", "clients joined"].append({"client": client, **told})
            case ClientLeft(client):
                found["client left", "clients left"].append({"client": client})
            case ClientUnavailable(_, client, error):
                found["client unavailable", "clients unavailable"].append({"client": client, "error": error})
            case InvalidEntry(entry, reason, detail):
                fields = {"client": entry.client, "entry": entry.id, "reason": str(reason), "error": detail}
                found["ignoring invalid stream entry", "ignoring invalid stream entries"].append(fields)
            case JobEnded(client=client, reason=reason, error=detail) if detail:
                log.info("job ended without an update", client=client, reason=str(reason), error=detail)
            case Evaluated(version, _, error) if error:
                log.info("evaluation failed", version=version, error=error)
    for (one, many), lines in found.items():
        _log(log.info, one, many, lines)


def log_gone(revoked: Iterable[str], expired: Iterable[str]) -> None:
    """Log the clients that are revoked, and those whose lease has ended, as `log_events` does."""
    for one, many, clients in (
        ("client was revoked; it gets no further job", "clients were revoked; they get no further job", revoked),
        ("lease of client expired", "leases of clients expired", expired),
    ):
        _log(log.warning, one, many, [{"client": client} for client in clients])


def _log(write: Callable[..., None], one: str, many: str, lines: Sequence[Mapping[str, Any]]) -> None:
    """Log the message `one` with each of `lines`, or the message `many` once where there are more than FEW.

    Each line has a field `client`. Of the field `error`, the one line for all has the first.
    """
    if len(lines) <= FEW:
        for line in lines:
            write(one, **line)
    else:
        error = {"first_error": lines[0]["error"]} if "error" in lines[0] else {}
        write(many, count=len(lines), clients=names(line["client"] for line in lines), **error)

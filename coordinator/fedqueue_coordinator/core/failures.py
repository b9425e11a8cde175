"""Failures of clients by kind: what an operator is told once, however often it happens and to however many clients.

The kind of a failure is what happened and its text, apart from the parts that differ from client to client: numbers
and the client's name. The coordinator collects them while a run lasts; the summary reads them from the ledger.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from fedqueue.exception_text import one_line
from fedqueue.protocol.messages import NO_EXAMPLES, SITE_POLICY
from fedqueue_coordinator.core.reasons import AbandonReason, RejectionReason

MAX_KINDS = 50
"""Kinds that are told apart; a further one counts as OTHER, because a text may be different each time."""
OTHER = "other failures; see the ledger"
MAX_TEXT = 400
"""Characters of a failure's text that are shown."""
_VARYING = re.compile(r"0x[0-9a-f]+|\d+")
_ABANDONED = {
    AbandonReason.FAILED: "training failed",
    AbandonReason.REFUSED: "job refused by its site",
    AbandonReason.LAPSED: "job lapsed",
    AbandonReason.LATE: "job taken back (late)",
    AbandonReason.FORGED: "report of a job's end not valid (forged)",
    AbandonReason.FOREIGN: "report of a job's end not valid (foreign)",
    AbandonReason.SUPERSEDED: "report of a job's end not valid (superseded)",
}
"""Endings that are failures → what they are called. The others are the normal course of a run."""
_DEFAULT_TEXTS = {
    AbandonReason.LAPSED: "its worker was silent for dispatch.lease_seconds, or its training made no progress for "
    "dispatch.stall_seconds",
    AbandonReason.LATE: "the round was closed before its update arrived",
}
UNAVAILABLE = "cannot load its data"
EVALUATION_FAILED = "evaluation failed"
NOT_FINITE = "metric not finite"
NO_PART = "takes no part"
SET_ASIDE = "set aside"
MILD = {f"update rejected ({reason})" for reason in (RejectionReason.STALE, RejectionReason.LATE)} | {
    _ABANDONED[AbandonReason.LATE],
    NOT_FINITE,
}
"""What is not shown in quiet mode: an update that was only too late or too old, and a metric that is not finite."""


def what_is_missing(error: str) -> str:
    """What an `Unavailable` client does not do, by its error: take part, or load its data."""
    return NO_PART if error.startswith(SITE_POLICY) else UNAVAILABLE


@dataclass
class FailureKind:
    """All failures of one kind; `client` and `text` are those of the first."""

    what: str
    client: str
    text: str
    count: int = 0
    clients: set[str] = field(default_factory=set)

    @property
    def mild(self) -> bool:
        """Whether the update was only too late or too old."""
        return self.what in MILD

    @property
    def line(self) -> str:
        """Client, what happened and why, in one line."""
        return ": ".join(part for part in (self.client, self.what, self.text) if part)


class Failures:
    """Counts failures by kind, and remembers the last one of each client."""

    def __init__(self) -> None:
        self.kinds: dict[tuple[str, str], FailureKind] = {}
        """In the order of their first occurrence."""
        self.last: dict[str, FailureKind] = {}
        """Client → the kind of its last failure, being set aside left out."""
        self.counts: dict[str, int] = {}
        """Client → its failures, being set aside left out."""

    @classmethod
    def from_ledger(cls, ledger: Iterable[Mapping[str, Any]]) -> Self:
        """Collect the failures that the records of a ledger describe."""
        failures = cls()
        for record in ledger:
            match record["kind"]:
                case "rejected":
                    failures.rejected(record.get("client", ""), record["reason"], record.get("detail", ""))
                case "abandoned":
                    failures.abandoned(record.get("client", ""), record["reason"], record.get("error", ""))
                case "unavailable":
                    failures.unavailable(record["client"], record["error"])
                case "evaluation":
                    failures.evaluated(record["version"], record["metrics"], record.get("error", ""))
                case "version":
                    for line in record["merged"]:
                        failures.trained(line["client"], line.get("base", 0), line.get("metrics", {}))
        return failures

    def rejected(self, client: str, reason: str, detail: str) -> None:
        """Count an update that is not merged; the end of the run is no failure."""
        if reason != RejectionReason.RUN_ENDED:
            self._add(client, f"update rejected ({reason})", detail)

    def abandoned(self, client: str, reason: str, error: str) -> None:
        """Count a job that ended without an update, if that is a failure."""
        what = _ABANDONED.get(AbandonReason(reason))
        if what:
            self._add(client, what, error or _DEFAULT_TEXTS.get(AbandonReason(reason), ""))

    def unavailable(self, client: str, error: str) -> None:
        """Count a client whose data cannot be loaded, that has no examples, or that its site's policy leaves out."""
        if error == NO_EXAMPLES:
            self._add(client, NO_PART, "it has no examples")
        else:
            self._add(client, what_is_missing(error), error)

    def evaluated(self, version: int, metrics: Mapping[str, float], error: str) -> None:
        """Count a central evaluation that failed, and each of its metrics that is not finite."""
        if error:
            self._count("", EVALUATION_FAILED, f"version {version}: {error}")
        self._not_finite("", "evaluate", version, metrics)

    def trained(self, client: str, version: int, metrics: Mapping[str, float]) -> None:
        """Count each metric of a training from `version` that is not finite."""
        self._not_finite(client, "fit", version, metrics)

    def set_aside(self, client: str) -> None:
        """Count a client that gets no further job."""
        last = self.last.get(client)
        because = f"{last.what}: {last.text}" if last else "it failed too often"
        self._count(client, SET_ASIDE, f"it gets no further job, because of {self.counts.get(client, 0)} failures; "
                    f"the last one: {because}")  # fmt: skip

    @property
    def most_frequent(self) -> FailureKind | None:
        """The kind of a client's failures that occurred most often, or None."""
        kinds = [kind for kind in self.kinds.values() if kind.what not in (SET_ASIDE, EVALUATION_FAILED, NOT_FINITE)]
        return max(kinds, key=lambda kind: kind.count, default=None)

    def _not_finite(self, client: str, method: str, version: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            if not math.isfinite(value):
                self._count(client, NOT_FINITE, f"{method} returned {name} {value} at version {version}")

    def _add(self, client: str, what: str, text: str) -> None:
        self.last[client] = self._count(client, what, text)
        self.counts[client] = self.counts.get(client, 0) + 1

    def _count(self, client: str, what: str, text: str) -> FailureKind:
        shown = one_line(text, MAX_TEXT)
        key = (what, kind_of(client, shown))
        if key not in self.kinds and len(self.kinds) >= MAX_KINDS:
            key, what, shown = (OTHER, ""), OTHER, ""
        kind = self.kinds.setdefault(key, FailureKind(what, client, shown))
        kind.count += 1
        kind.clients.add(client)
        return kind


def kind_of(client: str, text: str) -> str:
    """Return `text` without what differs from client to client: its name, and numbers."""
    return _VARYING.sub("#", text.replace(client, "#") if client else text)

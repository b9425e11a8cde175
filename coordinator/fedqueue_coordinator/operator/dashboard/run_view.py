"""What the page shows of a run, folded from the records of its ledger: bounded memory, however long the run is.

`RunView.add` takes the records in their order. `RunView.shown` returns plain data, which the page draws.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from fedqueue.privacy.gaussian_dp import ClientBudget
from fedqueue_coordinator.operator.dashboard.thinned_curve import ThinnedCurve

MOST_EVENTS = 100
"""Newest rejections, failures and the like that are shown with their text."""
MOST_METRICS = 24
RECENT = 32
"""Newest updates of a client that its usual duration and norm are taken from."""
SLOW = 3.0
"""A client is slow if a job takes it more than this multiple of the median client's time."""
LONG = 4.0
"""A client's updates stand out if their length differs from the median client's by more than this factor."""
RARE = 4
"""A client with fewer updates than the median one's divided by this has longer ones by itself, because the model has
hardly learned from its data: LONG squared counts for it."""
WINDOW = 64
"""Newest updates that the length of an update is compared with: lengths shrink while a run converges."""
BEHIND = 10
"""A client without any update is watched once the median client has this number."""
FEW = 3
"""Updates that are too few to judge a client by."""
MOST_STALENESS = 20
"""The last column of the histogram has this staleness, and all larger ones."""


@dataclass
class ClientView:
    """What the ledger tells about one client."""

    merged: int = 0
    examples: int | None = None
    last: float | None = None
    """When its newest update was merged, on the run's clock."""
    share: float | None = None
    staleness: deque[int] = field(default_factory=lambda: deque(maxlen=RECENT))
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    norms: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    relative_norms: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    """Norms of its updates beside the median client's at the time when they were merged."""
    rejected: Counter[str] = field(default_factory=Counter)
    abandoned: Counter[str] = field(default_factory=Counter)
    problem: str = ""
    """Text of its newest rejection or failure, until an update is merged."""
    squares: int = 0
    """Its account in a run with [privacy.clients]: the sum of the squares of its loads."""


OF_THE_RECORD = ("kind", "version", "cohort", "seconds", "loads")
"""Fields of a `spend` record that say nothing about the whole run."""


class RunView:
    """A run, from the records of its ledger."""

    def __init__(self) -> None:
        self.version = 0
        self.updates = 0
        self.seconds = 0.0
        self.last_version_at: float | None = None
        self.clients: dict[str, ClientView] = {}
        self.rejected: Counter[str] = Counter()
        self.abandoned: Counter[str] = Counter()
        self.events: deque[dict[str, Any]] = deque(maxlen=MOST_EVENTS)
        self.privacy: dict[str, Any] = {}
        self.keepers: Counter[str] = Counter()
        self.smallest_cohort: int | None = None
        self._versions, self._arrivals, self._buffered_staleness = ThinnedCurve(), ThinnedCurve(), ThinnedCurve()
        self._staleness: Counter[int] = Counter()
        self._metrics: dict[str, ThinnedCurve] = {}
        self._epsilon = ThinnedCurve()
        self._newest: dict[str, float] = {}
        self._newest_norms: dict[str, tuple[int, float]] = {}
        """Number and norm of each client's newest update among the last WINDOW ones, oldest first."""

    def add(self, record: Mapping[str, Any]) -> None:
        """Take the ledger's next record; one of an unknown kind changes nothing."""
        self.seconds = max(self.seconds, float(record.get("seconds") or 0.0))
        match record.get("kind"):
            case "version":
                self._add_version(record)
            case "spend":
                self._add_spending(record)
            case "evaluation":
                self._add_evaluation(record)
            case "rejected":
                self._add_failure(record, "rejected", str(record.get("reason")), str(record.get("detail", "")))
            case "abandoned":
                self._add_failure(record, "abandoned", str(record.get("reason")), str(record.get("error", "")))
            case "unavailable":
                self._add_failure(record, "unavailable", "no data", str(record.get("error", "")))
            case "epoch":
                self._tell(record, "", "epoch", f"Redis had lost the run: it went on from version {record['version']}")

    def _add_version(self, record: Mapping[str, Any]) -> None:
        merged: Sequence[Mapping[str, Any]] = record["merged"]
        self.version, self.updates = record["version"], self.updates + len(merged)
        self.last_version_at = float(record.get("seconds") or 0.0)
        usual_norm = self._usual_norm(merged)
        for line in merged:
            self._staleness[min(int(line["staleness"]), MOST_STALENESS)] += 1
            client = self._client(line["client"])
            client.merged += 1
            client.examples, client.last, client.problem = line.get("examples"), line.get("at"), ""
            client.share = line.get("share")
            client.staleness.append(int(line["staleness"]))
            client.seconds.append(float(line.get("training_seconds") or 0.0))
            if (norm := line.get("norm")) is not None and math.isfinite(norm):
                client.norms.append(float(norm))
                # An update from before the window has the length of another phase of the run.
                if usual_norm and int(line["staleness"]) * len(merged) <= WINDOW:
                    client.relative_norms.append(float(norm) / usual_norm)
        self._versions.add(self.last_version_at, self.version)
        self._arrivals.add(self.last_version_at, self.updates)
        if merged:
            mean = sum(line["staleness"] for line in merged) / len(merged)
            self._buffered_staleness.add(self.version, mean)
        if masks := record.get("masks"):
            self.keepers.update(masks.keys())
            clients = len({line["client"] for line in merged})
            self.smallest_cohort = min(clients, self.smallest_cohort or clients)

    def _add_spending(self, record: Mapping[str, Any]) -> None:
        self.privacy = {name: value for name, value in record.items() if name not in OF_THE_RECORD}
        for name, load in record["loads"].items():
            self._client(name).squares += load**2
        self._epsilon.add(record["version"], float(record["epsilon_max"]))

    def _usual_norm(self, merged: Sequence[Mapping[str, Any]]) -> float:
        """Take a version's norms, and return the median client's; 0 if fewer than three clients tell."""
        for line in merged:
            if (norm := line.get("norm")) is not None and math.isfinite(norm):
                self._newest_norms.pop(line["client"], None)
                self._newest_norms[line["client"]] = self.updates, float(norm)
        while self._newest_norms:
            oldest = next(iter(self._newest_norms))
            if self._newest_norms[oldest][0] > self.updates - WINDOW:
                break
            del self._newest_norms[oldest]
        norms = [norm for _, norm in self._newest_norms.values()]
        return statistics.median(norms) if len(norms) >= FEW else 0.0

    def _add_evaluation(self, record: Mapping[str, Any]) -> None:
        if error := record.get("error"):
            self._tell(record, "", "evaluation failed", str(error))
            return
        self._newest = {name: float(value) for name, value in record["metrics"].items()}
        for name, value in self._newest.items():
            if name in self._metrics or len(self._metrics) < MOST_METRICS:
                self._metrics.setdefault(name, ThinnedCurve()).add(record["version"], value)

    def _add_failure(self, record: Mapping[str, Any], what: str, reason: str, text: str) -> None:
        name = str(record.get("client", ""))
        if what == "rejected":
            self.rejected[reason] += 1
        else:
            self.abandoned[reason] += 1
        if reason != "run_ended":  # of which no site is the cause
            counts = self._client(name).rejected if what == "rejected" else self._client(name).abandoned
            counts[reason] += 1
            self._client(name).problem = f"{what}: {reason}" + (f": {text}" if text else "")
            self._tell(record, name, f"{what}: {reason}", text)

    def _tell(self, record: Mapping[str, Any], client: str, what: str, text: str) -> None:
        self.events.append({
            "at": round(float(record.get("seconds") or 0.0), 3), "version": record.get("version"),
            "client": client, "what": what, "text": text,
        })  # fmt: skip

    def _client(self, name: str) -> ClientView:
        return self.clients.setdefault(name, ClientView())

    # What is shown

    def shown(self, configured: Iterable[str] = ()) -> dict[str, Any]:
        """Everything the page draws from the ledger; `configured` clients are shown before their first update, too."""
        for name in configured:
            self._client(name)
        usual_seconds = self._usual_seconds()
        usual_merged = statistics.median(view.merged for view in self.clients.values()) if self.clients else 0.0
        return {
            "version": self.version,
            "updates": self.updates,
            "seconds": round(self.seconds, 3),
            "last_version_at": self.last_version_at,
            "metrics": {name: curve.points for name, curve in self._metrics.items()},
            "newest_metrics": self._newest,
            "versions": self._versions.points,
            "arrivals": self._arrivals.points,
            "buffer_staleness": self._buffered_staleness.points,
            "staleness": [self._staleness[i] for i in range(max(self._staleness, default=-1) + 1)],
            "rejected": dict(self.rejected),
            "abandoned": dict(self.abandoned),
            "events": list(self.events)[::-1],
            "privacy": self.privacy,
            "epsilon": self._epsilon.points,
            "keepers": dict(self.keepers),
            "smallest_cohort": self.smallest_cohort,
            "clients": [
                self._shown_client(name, view, usual_seconds, usual_merged)
                for name, view in sorted(self.clients.items())
            ],
        }

    def _epsilon_of(self, view: ClientView) -> float | None:
        spent = self.privacy
        if not spent:
            return None
        return epsilon_of_account(spent["noise_multiplier"], spent["weight_levels"], spent["delta"], view.squares)

    def _usual_seconds(self) -> float:
        """The median client's seconds for a job; 0 if fewer than three clients tell."""
        seconds = [statistics.median(view.seconds) for view in self.clients.values() if len(view.seconds) >= FEW]
        return statistics.median(seconds) if len(seconds) >= FEW else 0.0

    def _shown_client(self, name: str, view: ClientView, usual_seconds: float, usual_merged: float) -> dict[str, Any]:
        seconds = statistics.median(view.seconds) if view.seconds else None
        norm = statistics.median(view.norms) if view.norms else None
        relative = statistics.median(view.relative_norms) if view.relative_norms else None
        notes = []
        if seconds and usual_seconds and len(view.seconds) >= FEW and seconds > SLOW * usual_seconds:
            notes.append(f"slow: a job takes {seconds / usual_seconds:.1f} times as long as at the median site")
        bar = LONG if view.merged * RARE >= usual_merged else LONG**2
        if relative is not None and len(view.relative_norms) >= FEW and not 1 / bar < relative < bar:
            notes.append(f"outlier: its updates are {relative:.2g} times as long as those of the median site")
        if not view.merged and usual_merged >= BEHIND:
            notes.append(f"no update of it was merged yet, and the median site has {usual_merged:g}")
        return {
            "name": name,
            "merged": view.merged,
            "examples": view.examples,
            "last": view.last,
            "share": view.share,
            "staleness": round(statistics.fmean(view.staleness), 2) if view.staleness else None,
            "seconds": seconds,
            "norm": norm,
            "relative_norm": relative,
            "rejected": dict(view.rejected),
            "abandoned": dict(view.abandoned),
            "problem": view.problem,
            "notes": notes,
            "epsilon": self._epsilon_of(view),
        }


@lru_cache(maxsize=100_000)  # most accounts are the same from one look to the next
def epsilon_of_account(noise_multiplier: float, weight_levels: int, delta: float, squares: int) -> float:
    """ε of a client whose loads have this sum of squares."""
    return ClientBudget(noise_multiplier, weight_levels, delta).epsilon(squares)

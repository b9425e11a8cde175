"""One measured leak, the limits for it, and leak.json."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fedqueue.errors import ConfigurationError

ATTACKS = {
    "labels": "class shares read from the last layer's bias: correlation with the true shares",
    "rows": "rows read out of the first layer: share with a correlation above 0.95",
    "optimisation": "rows found by optimisation, in updates of few rows: share with a correlation above 0.95",
    "membership": "was a row trained on in this update: AUC (0.5 is a guess)",
    "membership_tpr": "the same: members found at 1 % false alarms",
    "model": "was a row trained on at all, told from the model alone (RMIA): AUC (0.5 is a guess)",
    "model_tpr": "the same: members found at 1 % false alarms",
    "lira": "the same question by LiRA, which compares with many models: AUC (0.5 is a guess)",
    "lira_tpr": "the same: members found at 1 % false alarms",
    "canaries": "canary rows: the ε that the noise has at least, with 95 % confidence; control: without canaries",
    "canaries_estimate": "the same: the ε of a Gaussian mechanism whose canaries stand out as much; an estimate",
    "canary_clients": "canary clients: the ε that one keeper's noise has at least; control: without canaries",
    "canary_clients_estimate": "the same: the ε of a Gaussian mechanism whose canaries stand out as much; an estimate",
}
"""Name of an attack → what its value is."""
NOTHING = "none"
"""The protection of an update as it is posted in float32."""
UNBOUNDED = ("canaries", "canaries_estimate", "canary_clients", "canary_clients_estimate")
"""Attacks whose value is an ε; every other value is at most 1."""
ROW_NOISE = "noise for rows"
"""The protection of an update of a run with [privacy.examples]."""
CLIENT_NOISE = "noise for clients"
"""The protection of a sum in a run with [privacy.clients]."""
FORMAT = 1


@dataclass(frozen=True)
class Measurement:
    """What one attack reached in one view, with one protection."""

    attack: str
    view: str
    """"outsider" (the last model), "participant" (all models) or "coordinator" (what arrives from clients)."""
    protection: str
    value: float | None = None
    """None where the attack is not applicable."""
    control: float | None = None
    """What the same attack reaches on rows that were never trained on; for `labels`, with the classes shuffled."""
    interval: tuple[float, float] | None = None
    """95 % bootstrap interval of the value."""
    rows: int = 0
    """Rows that the attack was tried on, summed over updates."""
    updates: int = 0
    """Updates, sums or models that were attacked."""
    seconds: float = 0.0
    not_applicable: str = ""
    configured: bool = True
    """Whether this is what the run does, and no protection to compare with."""

    @property
    def excess(self) -> float | None:
        """How far the value is above its control."""
        return None if self.value is None or self.control is None else self.value - self.control


def parse_limits(texts: Iterable[str], key: str) -> dict[str, float]:
    """Return attack → limit from ATTACK=NUMBER texts; raises ConfigurationError."""
    limits = {}
    for text in texts:
        name, equals, number = text.partition("=")
        try:
            limits[name] = float(number)
        except ValueError:
            equals = ""
        largest = math.inf if name in UNBOUNDED else 1.0
        if not equals or name not in ATTACKS or not 0 <= limits[name] <= largest:
            raise ConfigurationError(key, text, "no limit", f"write ATTACK=NUMBER, 0 to 1, with {', '.join(ATTACKS)}")
    return limits


def above(measurements: Iterable[Measurement], limits: Mapping[Any, float]) -> list[str]:
    """Return a line for each measurement of what the run does whose value is above its control by more than its limit.

    A limit is broken as well where its attack gave no number that could be compared, or was not tried.
    """
    found = list(measurements)
    tried = {m.attack for m in found}
    lines = [f"{name}: not tried, at most {limit:g} is allowed" for name, limit in limits.items() if name not in tried]
    for m in found:
        limit = limits.get(m.attack)
        if limit is None or not m.configured or m.not_applicable:
            continue
        if m.excess is None or not math.isfinite(m.excess):
            lines.append(f"{m.attack}: not measured, at most {limit:g} is allowed")
        elif m.excess > limit:
            lines.append(
                f"{m.attack}: {m.value:.3f} for the {m.view}, {m.excess:.3f} above its control; "
                f"at most {limit:g} is allowed"
            )
    return lines


def leak_record(about: Mapping[str, Any], measurements: Sequence[Measurement]) -> dict[str, Any]:
    """Return the content of leak.json: what was measured, the attacks in words, and every measurement."""
    return {"format": FORMAT, **about, "attacks": ATTACKS, "measurements": [asdict(m) for m in measurements]}


def table_rows(measurements: Iterable[Measurement]) -> list[tuple[str, ...]]:
    """Return (attack, view, protection, value, interval, control, rows, seconds) in words, for a table."""
    rows: list[tuple[str, ...]] = []
    for m in measurements:
        value, interval, control = "–", "", ""
        if m.value is not None and m.control is not None:
            value, control = f"{m.value:.3f}", f"{m.control:.3f}"
            interval = f"{m.interval[0]:.3f} to {m.interval[1]:.3f}" if m.interval else ""
        elif m.not_applicable:
            interval = f"not applicable: {m.not_applicable}"
        rows.append((m.attack, m.view, m.protection, value, interval, control, str(m.rows), f"{m.seconds:.1f}"))
    return rows


COLUMNS = ("attack", "view", "protection", "value", "95 % interval", "control", "rows", "s")

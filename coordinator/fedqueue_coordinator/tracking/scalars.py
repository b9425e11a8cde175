"""The numbers that every tracker shows of a run, by the names that it shows them under."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fedqueue_coordinator.tracking.hooks import RunProgress


def version_scalars(record: Mapping[str, Any], before: RunProgress, now: RunProgress) -> dict[str, float]:
    """Describe a version by its ledger record; the rate is that since `before`, the version that was shown last.

    `privacy/…` are the numbers that the record has under `privacy`, such as the ε that was spent.
    """
    merged = record["merged"]
    scalars = {"run/updates": float(now.updates)}
    if now.seconds > before.seconds:
        scalars["run/versions_per_second"] = (now.version - before.version) / (now.seconds - before.seconds)
    if merged:
        scalars["buffer/staleness_mean"] = sum(line["staleness"] for line in merged) / len(merged)
        scalars["buffer/clients"] = float(len({line["client"] for line in merged}))
    spent = record.get("privacy")
    if isinstance(spent, Mapping):
        scalars |= {f"privacy/{name}": float(value) for name, value in spent.items() if isinstance(value, int | float)}
    return scalars | rejections(now)


def rejections(now: RunProgress) -> dict[str, float]:
    """The rejected updates so far, by reason."""
    return {f"rejected/{reason}": float(count) for reason, count in now.rejected.items()}


def central(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics of a central evaluation."""
    return {f"central/{name}": float(value) for name, value in metrics.items()}


def by_updates(scalars: Mapping[str, float]) -> dict[str, float]:
    """The same numbers under the names of their curves over merged updates, for a tracker with one axis."""
    return {f"{name}_by_updates": value for name, value in scalars.items()}


def parameters(config: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """The configuration as keys with their sections, such as `training.batch_size`, and plain values."""
    for name, value in config.items():
        key = f"{above}.{name}" if above else name
        if isinstance(value, Mapping):
            yield from parameters(value, key)
        else:
            yield key, value

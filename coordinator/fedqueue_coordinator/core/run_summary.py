"""Computes the run summary from its ledger, so the numbers in `summary.json` agree with the ledger by construction."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedqueue.privacy.gaussian_dp import ClientBudget
from fedqueue_coordinator.core.failures import FailureKind, Failures

if TYPE_CHECKING:
    import torch

    from fedqueue.tensors.frame import Frame


NO_WORKER = "no worker registered it"
NO_UPDATE_IN_TIME = "it got no job, or the run ended before its first update was merged"


@dataclass(frozen=True)
class RunResult:
    """The end of a run: its model, which is the version that reached the target or else the newest, and its ledger.

    >>> import torch
    >>> import fedqueue
    >>> class Mean(fedqueue.Task):
    ...     def model(self):
    ...         return torch.nn.Linear(1, 1)
    ...     def train_data(self, client):
    ...         return torch.utils.data.TensorDataset(torch.ones(32, 1), torch.full((32, 1), 3.0))
    ...     def test_data(self):
    ...         return torch.ones(1, 1)
    ...     def loss(self, model, batch):
    ...         return torch.nn.functional.mse_loss(model(batch[0]), batch[1])
    ...     def evaluate(self, model, data):
    ...         return {"error": abs(3.0 - float(model(data).detach()))}
    >>> result = fedqueue.simulate(Mean, clients=2, versions=3)
    >>> [point["version"] for point in result.history], result.stopped_because
    ([0, 1, 2, 3], 'versions: 3 of 3')
    >>> Mean().model().load_state_dict(result.state_dict())
    <All keys matched successfully>
    """

    version: int
    model: Frame
    stopped_because: str
    failed: bool
    ledger: list[dict[str, Any]]
    """One record for each version, rejected update, abandoned job and evaluation."""
    refused: dict[str, int]
    """Reason → posts that Redis refused."""
    jobs_dispatched: int
    folder: Path | None = None
    """Where the run left its files."""
    registered: frozenset[str] = frozenset()
    """The clients that a worker registered."""
    seconds: float = 0.0
    """When the run stopped, on the run's clock."""
    resumable: bool = False
    """Whether the run failed for a reason outside of it, so that it may be resumed."""

    @property
    def history(self) -> list[dict[str, Any]]:
        """The central evaluations in order: `version`, `seconds` since the start, and each metric by its name.

        A metric may be NaN or infinite. Evaluations that failed are in `ledger` only.
        """
        return history_of(self.ledger)

    @property
    def ledger_path(self) -> Path | None:
        """The ledger's file, one JSON record a line; None for a run that has no folder."""
        return self.folder / "ledger.jsonl" if self.folder else None

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The model's tensors by their own names, dtypes and shapes, as `load_state_dict` takes them."""
        return self.model.state_dict()


def history_of(ledger: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The central evaluations among the records of a ledger, without those that failed."""
    return [
        {"version": r["version"], "seconds": round(r["seconds"], 3), **r["metrics"]} for r in evaluations_of(ledger)
    ]


def evaluations_of(ledger: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The records of the central evaluations that did not fail."""
    return [r for r in ledger if r["kind"] == "evaluation" and not r.get("error")]


def main_metric(metrics: Iterable[str], target: Iterable[str] = ()) -> str:
    """Return the metric that a picture shows first: that of the target, else `accuracy`, else the first one."""
    names = list(metrics)
    return next((name for name in (*target, "accuracy") if name in names), names[0])


def summarize(
    run: str,
    strategy: str,
    seed: int,
    stopped_because: str,
    ledger: Iterable[Mapping[str, Any]],
    refused: Mapping[str, int],
    configured: Collection[str] = (),
    registered: Collection[str] = (),
    seconds: float = 0.0,
) -> dict[str, Any]:
    """Summarize a run that stopped after `seconds` of its clock, or at the time of its last record if that is later.

    `configured` are the clients of its configuration, `registered` those that a worker registered. `metrics` in the
    summary are those of the newest evaluation that did not fail, of version `metrics_version`. `keepers` is each
    keeper with the number of cohorts that it released, and `smallest_cohort` the fewest clients of one.
    `client_epsilon` is what each client has spent of the budget of `[privacy.clients]`.
    """
    records = list(ledger)
    merged = [line for r in records if r["kind"] == "version" for line in r["merged"]]
    evaluations = evaluations_of(records)
    rejected = Counter(r["reason"] for r in records if r["kind"] == "rejected")
    abandoned = Counter(r["reason"] for r in records if r["kind"] == "abandoned")
    cohorts = [r for r in records if r["kind"] == "version" and r.get("masks")]
    staleness = [line["staleness"] for line in merged]
    clients = Counter(line["client"] for line in merged)
    seconds = max([seconds, *(r["seconds"] for r in records)])
    failures = Failures.from_ledger(records)
    return {
        "run": run,
        "strategy": strategy,
        "seed": seed,
        "versions": sum(r["kind"] == "version" for r in records),
        "updates_merged": len(merged),
        "updates_rejected": dict(sorted(rejected.items())),
        "jobs_abandoned": sum(abandoned.values()),
        "abandoned_because": dict(sorted(abandoned.items())),
        "posts_refused": {reason: count for reason, count in refused.items() if count},
        "seconds": round(seconds, 3),
        "updates_per_second": round(len(merged) / seconds, 3) if seconds else 0.0,
        "staleness": {
            "mean": round(sum(staleness) / len(staleness), 4) if staleness else 0.0,
            "max": max(staleness, default=0),
            "histogram": {str(tau): n for tau, n in sorted(Counter(staleness).items())},
        },
        "clients": dict(sorted(clients.items())),
        "shares": {client: round(count / len(merged), 4) for client, count in sorted(clients.items())},
        "clients_without_update": {
            client: _why_without_update(client, failures, registered)
            for client in sorted({*configured, *registered, *failures.last} - clients.keys() - {""})
        },
        "keepers": dict(sorted(Counter(keeper for r in cohorts for keeper in r["masks"]).items())),
        "smallest_cohort": min((len({line["client"] for line in r["merged"]}) for r in cohorts), default=None),
        "client_epsilon": {client: round(spent, 6) for client, spent in spent_by_client(records).items()},
        "failures": [_failure(kind) for kind in failures.kinds.values()],
        "metrics": evaluations[-1]["metrics"] if evaluations else {},
        "metrics_version": evaluations[-1]["version"] if evaluations else None,
        "evaluations_failed": sum(bool(r.get("error")) for r in records if r["kind"] == "evaluation"),
        "history": history_of(evaluations),
        "stopped_because": stopped_because,
    }


def describe_masking(summary: Mapping[str, Any]) -> str:
    """Say which keepers released how many cohorts, and what such a run does without; empty for one without keepers."""
    if not summary.get("keepers"):
        return ""
    released = ", ".join(f"{keeper} {count}" for keeper, count in summary["keepers"].items())
    least = summary["smallest_cohort"]
    return (
        f"updates were masked: cohorts of at least {least} clients, released by keepers: {released}; robust rules, "
        "limits on norms and compression of updates are not available"
    )


def describe_client_privacy(summary: Mapping[str, Any]) -> str:
    """Say what the clients have spent, and what ε does not cover; empty for a run without client privacy."""
    spent = sorted(summary.get("client_epsilon", {}).values())
    if not spent:
        return ""
    return (
        f"privacy of clients: the most that one has spent is ε = {spent[-1]:.3f}, the least {spent[0]:.3f}, the "
        f"median {statistics.median(spent):.3f}; not covered: who trained when, durations, failures, bytes, registered "
        "examples"
    )


def summarize_failures(ledger: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return `what`, `text` and client of the first failure of each kind, and how many failures and clients it has."""
    return [_failure(kind) for kind in Failures.from_ledger(ledger).kinds.values()]


def _why_without_update(client: str, failures: Failures, registered: Collection[str]) -> str:
    last = failures.last.get(client)
    if last is not None:
        count = failures.counts[client]
        return ": ".join(part for part in (last.what, last.text) if part) + (
            f" ({count} failures)" if count > 1 else ""
        )
    return NO_UPDATE_IN_TIME if client in registered else NO_WORKER


def _failure(kind: FailureKind) -> dict[str, Any]:
    counts = {"count": kind.count, "clients": len(kind.clients)}
    return {"what": kind.what, "text": kind.text, "first": kind.client, **counts}


def spent_by_client(ledger: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Client → the ε that it has spent by the records of the cohorts; empty for a run without client privacy."""
    accounts: dict[str, int] = {}
    budget = None
    for record in ledger:
        if record["kind"] == "spend":
            budget = ClientBudget(record["noise_multiplier"], record["weight_levels"], record["delta"])
            for client, load in record["loads"].items():
                accounts[client] = accounts.get(client, 0) + load**2
    return {client: budget.epsilon(accounts[client]) for client in sorted(accounts)} if budget else {}

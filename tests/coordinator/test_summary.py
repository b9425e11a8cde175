"""The summary of a run compared with its ledger."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from fedqueue_coordinator.core.run_summary import describe_masking, main_metric, summarize
from tests.support.federation_run import start

LAPSED = "its worker was silent for dispatch.lease_seconds, or its training made no progress for dispatch.stall_seconds"


def merged(client: Any, staleness: Any) -> dict[str, Any]:
    return {"client": client, "staleness": staleness}


LEDGER = [
    {"kind": "evaluation", "version": 0, "seconds": 0.1234, "metrics": {"loss": 2.3}},
    {"kind": "version", "version": 1, "seconds": 1.0, "merged": [merged("b", 0), merged("a", 0)]},
    {"kind": "rejected", "seconds": 1.1, "reason": "stale"},
    {"kind": "rejected", "seconds": 1.2, "reason": "non_finite"},
    {"kind": "rejected", "seconds": 1.3, "reason": "stale"},
    {"kind": "abandoned", "seconds": 1.4, "reason": "lapsed"},
    {"kind": "abandoned", "seconds": 1.4, "reason": "run_ended"},
    {"kind": "version", "version": 2, "seconds": 2.0, "merged": [merged("b", 3), merged("b", 1)]},
    {"kind": "epoch", "epoch": 1, "version": 2, "seconds": 2.0},
    {"kind": "evaluation", "version": 2, "seconds": 2.5, "metrics": {"loss": 0.5, "accuracy": 0.9}},
    {"kind": "evaluation", "version": 2, "seconds": 2.5, "metrics": {}, "error": "OSError: stale"},
]


def test_summary_matches_results_by_hand() -> None:
    assert summarize("run", "fedbuff", 7, "versions: 2 of 2", LEDGER, {"closed": 2, "replayed": 0}) == {
        "run": "run",
        "strategy": "fedbuff",
        "seed": 7,
        "versions": 2,
        "updates_merged": 4,
        "updates_rejected": {"non_finite": 1, "stale": 2},
        "jobs_abandoned": 2,
        "abandoned_because": {"lapsed": 1, "run_ended": 1},
        "posts_refused": {"closed": 2},
        "seconds": 2.5,
        "updates_per_second": 1.6,
        "staleness": {"mean": 1.0, "max": 3, "histogram": {"0": 2, "1": 1, "3": 1}},
        "clients": {"a": 1, "b": 3},
        "shares": {"a": 0.25, "b": 0.75},
        "clients_without_update": {},
        "keepers": {},
        "smallest_cohort": None,
        "client_epsilon": {},
        "failures": [
            {"what": "update rejected (stale)", "text": "", "first": "", "count": 2, "clients": 1},
            {"what": "update rejected (non_finite)", "text": "", "first": "", "count": 1, "clients": 1},
            {"what": "job lapsed", "text": LAPSED, "first": "", "count": 1, "clients": 1},
            {"what": "evaluation failed", "text": "version 2: OSError: stale", "first": "", "count": 1, "clients": 1},
        ],
        "metrics": {"loss": 0.5, "accuracy": 0.9},
        "metrics_version": 2,
        "evaluations_failed": 1,
        "history": [
            {"version": 0, "seconds": 0.123, "loss": 2.3},
            {"version": 2, "seconds": 2.5, "loss": 0.5, "accuracy": 0.9},
        ],
        "stopped_because": "versions: 2 of 2",
    }


def test_summary_of_an_empty_run() -> None:
    summary = summarize("run", "fedasync", 0, "interrupted", [], {})
    assert (summary["versions"], summary["updates_merged"], summary["updates_per_second"]) == (0, 0, 0.0)
    assert summary["staleness"] == {"mean": 0.0, "max": 0, "histogram": {}}
    assert (summary["metrics"], summary["history"], summary["clients"]) == ({}, [], {})


def test_summary_reads_the_ledger_once() -> None:
    assert summarize("run", "fedbuff", 0, "", iter(LEDGER), {}) == summarize("run", "fedbuff", 0, "", LEDGER, {})


def test_summary_counts_match_the_federations_counts() -> None:
    run = start("c0", "c1", "c2", aggregation={"strategy": "fedbuff", "buffer_size": 2})
    for round_ in range(5):
        run.now += 1.0
        run.post("c0", 1.0, base=0)
        run.post("c1", 1.0)
        run.post("c2", float("nan") if round_ == 0 else 1.0)
        run.tick(30)
    run.lapse("c0")
    run.end("c1")
    run.stop()
    summary = summarize("run", "fedbuff", 0, "", run.ledger, {})
    federation = run.federation
    assert summary["versions"] == federation.version
    assert summary["updates_merged"] == federation.run_counters.updates
    assert summary["clients"] == federation.run_counters.merged_by
    assert summary["updates_rejected"] == federation.rejected
    assert summary["abandoned_because"] == federation.abandoned
    assert summary["staleness"]["histogram"] == {
        str(tau): n for tau, n in sorted(Counter(line["staleness"] for line in run.merged).items())
    }
    assert summary["updates_merged"] + sum(summary["updates_rejected"].values()) + summary["jobs_abandoned"] == len(
        run.endings
    )


def test_summary_without_a_record_ends_when_the_run_stopped() -> None:
    assert summarize("run", "fedbuff", 7, "seconds: 3", [], {}, seconds=11.04)["seconds"] == 11.04
    assert summarize("run", "fedbuff", 7, "versions: 2 of 2", LEDGER, {}, seconds=0.5)["seconds"] == 2.5


@pytest.mark.parametrize(
    ("metrics", "target", "first"),
    [
        (["loss", "accuracy"], (), "accuracy"),
        (["mse", "loss"], (), "mse"),
        (["loss", "accuracy", "auc"], ("f1", "auc"), "auc"),
    ],
)
def test_pictures_show_the_metric_of_the_target_first(metrics: list[str], target: tuple[Any, ...], first: str) -> None:
    assert main_metric(metrics, target) == first


def test_summary_counts_what_each_keeper_released() -> None:
    masks = {"university": {"digest": "", "answer": b""}, "audit": {"digest": "", "answer": b""}}
    ledger = [
        {"kind": "version", "version": v, "seconds": 1.0, "masks": masks, "merged": [merged(c, 0) for c in clients]}
        for v, clients in enumerate(("abc", "aabcd"), 1)
    ]
    summary = summarize("run", "fedbuff", 7, "versions: 2 of 2", ledger, {})
    assert (summary["keepers"], summary["smallest_cohort"]) == ({"audit": 2, "university": 2}, 3)
    said = describe_masking(summary)
    assert said.startswith(
        "updates were masked: cohorts of at least 3 clients, released by keepers: audit 2, university 2; robust rules"
    )
    assert describe_masking(summarize("run", "fedbuff", 7, "versions: 2 of 2", LEDGER, {})) == ""

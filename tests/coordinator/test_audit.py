"""An audit finds each kind of wrong ledger, and reports no problem for a correct one."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
import torch

from fedqueue.errors import RunNotFound
from fedqueue.tensors.frame import Frame
from fedqueue_coordinator.operator.audit.audit import audit, ok
from fedqueue_coordinator.operator.audit.audit_input import AuditInput, read_audit_input
from fedqueue_coordinator.operator.audit.replay import Replay, replay
from fedqueue_coordinator.operator.audit.signatures import Signatures
from fedqueue_coordinator.operator.reports.audit import show_audit
from fedqueue_coordinator.service.coordinator_store import CoordinatorStore
from tests.support.builders import MANIFEST, make_config, make_frame


def job(number: int, epoch: int = 0) -> str:
    return f"run-{f'e{epoch}-' if epoch else ''}{number:08d}"


def version(number: int, *jobs: str, token: int = 1) -> dict[str, Any]:
    merged = [{"job": j, "client": "c", "attempt": 1, "base": number - 1} for j in jobs]
    return {"kind": "version", "version": number, "seconds": float(number), "merged": merged, "token": token}


def lost(name: str) -> dict[str, Any]:
    return {"kind": "abandoned", "job": name, "client": "c", "reason": "lapsed", "error": ""}


RIGHT = AuditInput(
    run="run",
    ledger=[
        version(1, job(1), job(2)),
        lost(job(3)),
        version(2, job(4), token=2),
        {"kind": "rejected", "job": job(5), "client": "c", "reason": "stale"},
        {"kind": "evaluation", "version": 2, "metrics": {}},
    ],
    dispatched=7,
    unfinished={job(6): "posted", job(7): "open"},
    posted_entries=[job(6)],
    head=2,
    replay=None,
)


def problems(audit_input: AuditInput) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for check in audit(audit_input):
        found.setdefault(check.name, []).extend(check.problems)
    return found


def test_correct_ledger_passes_the_audit() -> None:
    assert ok(audit(RIGHT)), problems(RIGHT)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("I1", lambda b: b.ledger.append(lost(job(4))), "job run-00000004 ended 2 times"),
        ("I1", lambda b: b.unfinished.update({job(3): "open"}), "job run-00000003 has ended and is still open"),
        ("I1", lambda b: b.unfinished.pop(job(7)), "job run-00000007 was dispatched and has vanished"),
        ("I2", lambda b: b.ledger.append(version(3, job(1))), "job run-00000001 was merged 2 times"),
        ("I2", lambda b: b.posted_entries.append(job(2)), "job run-00000002 has ended, and an entry of it waits"),
        ("I2", lambda b: b.posted_entries.clear(), "job run-00000006 is posted, but no entry of it waits"),
        ("I3", lambda b: b.ledger.pop(0), "version 2 follows 0"),
        ("I3", lambda b: b.ledger.pop(2), "the head is 2, the ledger's last version 1"),
        ("I4", lambda b: b.ledger[0].update(token=3), "version 2 of epoch 0: token 2 after 3"),
    ],
)
def test_each_violation_is_found_and_named(name: str, change: Callable[..., Any], says: str) -> None:
    audit_input = deepcopy(RIGHT)
    change(audit_input)
    assert says in problems(audit_input)[name]


def test_audit_counts_jobs_from_the_start_of_an_epoch() -> None:
    ledger = [version(1, job(1)), lost(job(2))]
    epoch = {"kind": "epoch", "epoch": 1, "version": 1, "job_number": 2, "seconds": 1.0}
    audit_input = replace(
        RIGHT, ledger=[*ledger, epoch, version(2, job(3, 1), token=1)], dispatched=3, unfinished={}, posted_entries=[]
    )
    assert ok(audit(audit_input)), problems(audit_input)
    assert (
        "job run-e1-00000003 was dispatched and has vanished"
        in problems(replace(audit_input, ledger=[*ledger, epoch]))["I1"]
    )


def test_rejected_entry_without_a_job_ends_no_job() -> None:
    refused = {"kind": "rejected", "job": "", "client": "c", "reason": "forged"}  # for example a registration
    audit_input = replace(RIGHT, ledger=[*RIGHT.ledger, refused, refused])
    assert ok(audit(audit_input)), problems(audit_input)


def test_rejected_forgery_does_not_end_the_job() -> None:
    forged = {"kind": "rejected", "job": job(1), "client": "c", "reason": "unknown_job"}
    assert ok(audit(replace(RIGHT, ledger=[*RIGHT.ledger, forged])))


@pytest.fixture
def run() -> tuple[Any, ...]:
    """Return two versions of FedAsync over the small model: configuration, ledger, payloads and the last model."""
    config = make_config(aggregation={"strategy": "fedasync", "alpha": 0.5, "mixing": "model"})
    payloads = {job(n): make_frame([float(n), -1.0], mean=n, variance=2.0, steps=n) for n in (1, 2)}
    lines = [
        {"job": job(1), "client": "c", "attempt": 1, "base": 0, "staleness": 0, "examples": 10, "weight": 0.5},
        {"job": job(2), "client": "c", "attempt": 1, "base": 0, "staleness": 1, "examples": 10, "weight": 2**-1.5},
    ]
    ledger = [{"kind": "version", "version": n, "merged": [lines[n - 1]]} for n in (1, 2)]
    first = np.array([3.0, 5.0])
    x1 = first + 0.5 * np.array([1.0, -1.0])
    x2 = x1 + lines[1]["weight"] * (first + np.array([2.0, -1.0]) - x1)
    return config, ledger, payloads, make_frame(first.tolist()), x2


def replayed(
    run: tuple[Any, ...],
    ledger: list[dict[str, Any]] | None = None,
    payloads: dict[str, Any] | None = None,
    end: Frame | None = None,
) -> Replay:
    config, recorded, kept, first, _ = run

    def read(name: Any, attempt: Any) -> Any:
        return (payloads or kept)[name].buffer

    if end is None:
        end = first.copy()
        replay(config, recorded, end, lambda n, a: kept[n].buffer, end)
    return replay(config, ledger or recorded, first.copy(), read, end)


def test_replay_matches_the_formula_and_is_deterministic(run: tuple[Any, ...]) -> None:
    config, ledger, kept, first, expected = run
    end = first.copy()
    replay(config, ledger, end, lambda n, a: kept[n].buffer, end)
    torch.testing.assert_close(end.parameters, torch.tensor(expected, dtype=torch.float32))
    assert replayed(run).problems == []
    assert replayed(run).updates == 2


def test_replay_detects_a_changed_payload_weight_or_model(run: tuple[Any, ...]) -> None:
    _, ledger, kept, _, _ = run
    other = {**kept, job(2): make_frame([2.0, -1.0001], mean=2, variance=2.0, steps=2)}
    assert "the model differs from the replay" in replayed(run, payloads=other).problems[0]
    wrong = deepcopy(ledger)
    wrong[1]["merged"][0]["weight"] = 0.5
    assert "the ledger says 0.5" in replayed(run, ledger=wrong).problems[0]
    assert replayed(run, end=Frame(MANIFEST)).problems


def test_audit_of_an_unknown_run_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fedqueue_coordinator.operator.audit.audit_input.reachable_servers", lambda url: [])
    with pytest.raises(RunNotFound):
        read_audit_input("nothing", "")


def test_audit_reads_the_results_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl").write_text("\n".join(json.dumps(r) for r in [version(1, job(1)), lost(job(2))]))
    (tmp_path / "summary.json").write_text(json.dumps({"run": "run", "jobs_dispatched": 3, "versions": 1}))
    audit_input = read_audit_input(str(tmp_path), "")
    assert problems(audit_input)["I1"] == ["job run-00000003 was dispatched and has vanished"]


def test_audit_does_not_run_code_named_in_redis(fake_client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Redis writer must not choose the code that an auditor imports. Here the named file does not exist."""
    config = make_config(aggregation={"strategy": "nowhere.to_be:found"}, ledger={"keep_payloads": True})
    store = CoordinatorStore(fake_client, config.name, "me")
    assert store.lead(60)
    store.create(config.model_dump_json(), MANIFEST, 0, config.clients.ids)
    store.publish(0, make_frame().buffer, np.empty(0, np.uint8), [], {}, [])
    monkeypatch.setattr("fedqueue_coordinator.operator.audit.audit_input.reachable_servers", lambda url: [fake_client])
    (replayed_,) = [check for check in audit(read_audit_input(config.name, "")) if "same bits" in check.invariant]
    assert "audit the folder of the run's results" in replayed_.skipped


def test_what_was_not_checked_is_said_with_its_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    show_audit("run", audit(replace(RIGHT, posted_entries=None, signatures=Signatures({"version": 2}, [], "orders"))))
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "holds; not checked: the streams, which" in shown
    assert "holds; not checked: orders" in shown
    assert "same bits not checked: payloads were not kept" in shown
    assert "5 of 6 checks done, 2 of these in part, 1 not done: no violations" in shown

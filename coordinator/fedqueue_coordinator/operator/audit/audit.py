"""The checks of `fedqueue audit`: I1 to I4, S5 and S7 of PROTOCOL.md, and the coordinator's signatures (S)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fedqueue.protocol.keys import job_without_tag
from fedqueue_coordinator.operator.audit.audit_input import AuditInput, LedgerRecord
from fedqueue_coordinator.operator.audit.signatures import Signatures

UNSIGNED = "results in a folder are not signed: audit the run while it is in Redis"


@dataclass(frozen=True)
class Check:
    """The result of one check: `problems` is empty if the invariant holds as far as it was checked."""

    name: str
    """The invariant's number in PROTOCOL.md, or S for the coordinator's signatures."""
    invariant: str
    problems: Sequence[str]
    skipped: str = ""
    """What was not checked, or, without `checked`, why; empty if everything was."""
    checked: bool = True
    """False if nothing of it could be checked."""


def audit(audit_input: AuditInput) -> list[Check]:
    """Run every check; a check that lacks its input says so in `skipped`."""
    endings = list(_endings(audit_input.ledger))
    open_, waiting = audit_input.unfinished, audit_input.posted_entries or ()
    times = Counter(job for job, _ in endings)
    merged = Counter(job for job, ending in endings if ending == "merged")
    return [
        Check(
            "I1", "every job ends in exactly one of merged, rejected, abandoned",
            [
                *(f"job {job} ended {n} times" for job, n in times.items() if n > 1),
                *(f"job {job} has ended and is still {open_[job]}" for job in times if job in open_),
                *_missing_jobs(audit_input, set(times)),
            ],
        ),
        Check(
            "I2", "an update is merged at most once, and no acknowledged entry is still in a stream",
            [
                *(f"job {job} was merged {n} times" for job, n in merged.items() if n > 1),
                *(f"job {job} has ended, and an entry of it waits" for job in waiting if job in times),
                *_missing_entries(audit_input),
            ],
            "" if audit_input.posted_entries is not None else "the streams, which the end of a run deletes",
        ),
        Check("I3", "versions rise by one from 1 to the head", _version_gaps(audit_input)),
        _replay_check(audit_input),
        Check("I4",
            "one coordinator commits at a time: fencing tokens never decrease",
            _falling_tokens(audit_input.ledger),
        ),
        _signature_check(audit_input.signatures),
        *_masked_checks(audit_input),
    ]  # fmt: skip


def _endings(ledger: Iterable[LedgerRecord]) -> Iterable[tuple[str, str]]:
    """Yield (job, "merged" | "abandoned" | "rejected") for each ending in the ledger.

    A rejected entry that names no job, or a job that was not open, ends no job.
    """
    for record in ledger:
        if record["kind"] == "version":
            yield from ((line["job"], "merged") for line in record["merged"])
        elif record["kind"] == "abandoned" or (
            record["kind"] == "rejected" and record["job"] and record["reason"] != "unknown_job"
        ):
            yield record["job"], record["kind"]


def _missing_jobs(audit_input: AuditInput, ended: set[str]) -> list[str]:
    """Report each assigned job number that has neither an ending nor a record in Redis."""
    known = {job_without_tag(job) for job in ended | set(audit_input.unfinished)}
    problems = []
    epochs = [(0, 0), *((r["epoch"], r["job_number"]) for r in audit_input.ledger if r["kind"] == "epoch")]
    ends = [*(start for _, start in epochs[1:]), audit_input.dispatched]
    for (epoch, start), end in zip(epochs, ends, strict=True):
        mark = f"e{epoch}-" if epoch else ""
        for number in range(start + 1, end + 1):
            job = f"{audit_input.run}-{mark}{number:08d}"
            if job not in known:
                problems.append(f"job {job} was dispatched and has vanished")
    return problems


def _missing_entries(audit_input: AuditInput) -> list[str]:
    if audit_input.posted_entries is None:
        return []
    waiting = set(audit_input.posted_entries)
    return [
        f"job {job} is posted, but no entry of it waits"
        for job, state in audit_input.unfinished.items()
        if state == "posted" and job not in waiting
    ]


def _version_gaps(audit_input: AuditInput) -> list[str]:
    versions = [r["version"] for r in audit_input.ledger if r["kind"] == "version"]
    problems = [f"version {b} follows {a}" for a, b in zip([0, *versions], versions, strict=False) if b != a + 1]
    if (versions[-1] if versions else 0) != audit_input.head:
        problems.append(f"the head is {audit_input.head}, the ledger's last version {versions[-1] if versions else 0}")
    return problems


def _replay_check(audit_input: AuditInput) -> Check:
    invariant = "replaying the ledger from version 0 with the same payloads gives the same bits"
    if audit_input.own_code:
        why = "the aggregation is code of your own: audit the folder of the run's results"
        return Check("I3", invariant, [], why, checked=False)
    if audit_input.replay is None:
        why = "payloads were not kept; set ledger.keep_payloads = true before a run to keep them"
        return Check("I3", invariant, [], why, checked=False)
    return Check("I3", f"{invariant} ({audit_input.replay.updates} updates)", audit_input.replay.problems)


def _signature_check(signatures: Signatures | None) -> Check:
    invariant = "the data in Redis is the data that the coordinator signed"
    if signatures is None:
        return Check("S", invariant, [], UNSIGNED, checked=False)
    counts = ", ".join(f"{kind} {count}" for kind, count in signatures.checked.items())
    invariant = f"{invariant} ({counts})" if counts else invariant
    return Check("S", invariant, signatures.problems, signatures.unchecked, checked=bool(counts))


def _masked_checks(audit_input: AuditInput) -> list[Check]:
    """Return the checks of a run with keepers."""
    crowds = "each version is the sum of a crowd, and no update is in two of them"
    signed = "the keepers have signed the masks of each version's cohort"
    masked = audit_input.masked
    if masked is None:
        if not any("cohort" in record for record in audit_input.ledger):
            return []
        why = "the run's configuration was not kept; set ledger.keep_payloads = true before a run to keep it"
        return [Check("S5", crowds, [], why, checked=False), Check("S7", signed, [], UNSIGNED, checked=False)]
    if not masked.answers:
        answers = Check("S7", signed, [], masked.unchecked, checked=False)
    else:
        answers = Check("S7", f"{signed} ({masked.answers} answers)", masked.answer_problems, masked.unchecked)
    checks = [Check("S5", f"{crowds} ({masked.versions} versions)", masked.crowd_problems), answers]
    if any("privacy" in record for record in audit_input.ledger) or masked.budget_problems:
        budgets = "each client's loads and ε follow from the weights, and keep to its budget"
        checks.append(Check("S8", f"{budgets} ({masked.versions} versions)", masked.budget_problems))
    return checks


def _falling_tokens(ledger: Iterable[LedgerRecord]) -> list[str]:
    problems, last, epoch = [], 0, 0
    for record in ledger:
        if record["kind"] == "epoch":
            epoch, last = record["epoch"], 0  # a new epoch begins on an empty Redis, which restarts the tokens
        elif record["kind"] == "version":
            if record["token"] < last:
                problems.append(f"version {record['version']} of epoch {epoch}: token {record['token']} after {last}")
            last = max(last, record["token"])
    return problems


def ok(checks: Iterable[Check]) -> bool:
    """Return whether no check found a violation."""
    return not any(check.problems for check in checks)

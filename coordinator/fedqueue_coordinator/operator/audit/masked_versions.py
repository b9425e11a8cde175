"""Checks the versions of a run with keepers: each is the sum of a crowd, once, and its keepers have signed the masks.

The crowds need the ledger and the configuration only. What a keeper signed names the run's instance, which only Redis
has, and needs the keepers' public keys.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedqueue.config.schema import Config
from fedqueue.errors import ConfigurationError, SignatureError, WireError
from fedqueue.privacy.gaussian_dp import client_budget
from fedqueue.protocol.key_files import KEEPERS, read_trusted_keys
from fedqueue.protocol.messages import Cohort, Masked, read
from fedqueue.protocol.signed_envelope import MASKED, Scope, digest_of, open_envelope
from fedqueue.secure.cohort import cohort_id, crowd_problem
from fedqueue.secure.ring import level

LedgerRecord = Mapping[str, Any]


@dataclass(frozen=True)
class MaskedVersions:
    """The result of both checks."""

    versions: int
    """Versions whose crowds were checked."""
    crowd_problems: Sequence[str]
    answers: int
    """Keepers' answers that were verified, with or without success."""
    answer_problems: Sequence[str]
    budget_problems: Sequence[str] = ()
    """Of client privacy: loads, μ and ε that do not follow from the weights, and budgets that were exceeded."""
    unchecked: str = ""
    """Why answers could not be verified, or not all."""


def check_masked_versions(
    config: Config, ledger: Iterable[LedgerRecord], scope: Scope | None = None, keys: Path | None = None
) -> MaskedVersions:
    """Check every version in `ledger`; `scope` is that of the run's present epoch, `keys` the folder of public keys.

    Without them no answer of a keeper is verified.
    """
    ledger = list(ledger)
    records = [record for record in ledger if record["kind"] in ("version", "epoch")]
    versions = [record for record in records if record["kind"] == "version"]
    crowds = [*_crowd_problems(config, versions), *_repeated(versions)]
    budgets = list(_budget_problems(config, ledger))
    if scope is None or keys is None:
        return MaskedVersions(len(versions), crowds, 0, [], budgets, "results in a folder are not signed")
    last = max((i for i, record in enumerate(records) if record["kind"] == "epoch"), default=-1)
    own, former = records[last + 1 :], len(versions) - len(records[last + 1 :])
    notes = [f"{former} versions of earlier epochs, whose instances are gone"] if former else []
    answers, problems = 0, []
    for keeper in config.secure.keepers:
        path = keys / KEEPERS / f"{keeper}.pub"
        try:
            public = read_trusted_keys(path)
        except (ConfigurationError, OSError):
            notes.append(f"the answers of {keeper}: no {KEEPERS}/{keeper}.pub in {keys}")
            continue
        for record in own:
            answers += 1
            try:
                signed = base64.b64decode(record["masks"][keeper]["answer"], validate=True)
                envelope = open_envelope(signed, public, MASKED, scope, [keeper], f"keeper {keeper}")
                _require_answer(record, keeper, read(Masked, envelope.body), scope)
            except (KeyError, TypeError, binascii.Error):
                problems.append(f"version {record['version']}: no answer of keeper {keeper}")
            except WireError as error:
                problems.append(f"version {record['version']}: {error}")
    return MaskedVersions(len(versions), crowds, answers, problems, budgets, "; ".join(notes))


def _crowd_problems(config: Config, versions: Sequence[LedgerRecord]) -> Iterator[str]:
    secure = config.secure
    for record in versions:
        version, merged = record["version"], record["merged"]
        if "masks" not in record or any("level" not in line for line in merged):
            yield f"version {version} was not made by keepers"
            continue
        weights = [(line["client"], line["level"]) for line in merged]
        if problem := crowd_problem(weights, secure.min_cohort, secure.weight_levels):
            yield f"version {version} is no sum of a crowd: {problem}"
        for line in merged:
            staleness = version - 1 - line["base"]
            if staleness < 0 or not 1 <= line["level"] <= level(staleness, config):
                yield f"version {version}: job {line['job']} has level {line['level']}, and its base is {line['base']}"
            if line["weight"] != line["level"] / secure.weight_levels:
                yield f"version {version}: job {line['job']} has weight {line['weight']} and level {line['level']}"
        if set(record["masks"]) != set(secure.keepers):
            yield f"version {version} was unmasked by {', '.join(record['masks'])}, not by all of the run's keepers"


def _budget_problems(config: Config, ledger: Iterable[LedgerRecord]) -> Iterator[str]:
    """What the records of a run with client privacy say about budgets, recomputed from the weights.

    Each cohort is charged once, before the version that it may become, and each version has been charged.
    """
    if not config.privacy.clients.on:
        return
    budget, most = client_budget(config.privacy.clients, config.secure.weight_levels)
    accounts: Counter[str] = Counter()
    charged: dict[str, Mapping[str, int]] = {}  # digest of a cohort for the coming version → its loads
    for record in ledger:
        if record["kind"] == "spend":
            what, loads = f"a cohort for version {record['version']}", record["loads"]
            if record["cohort"] in charged:
                yield f"{what} was charged twice"
                continue
            charged[record["cohort"]] = loads
            accounts.update({client: load**2 for client, load in loads.items()})
            for client in sorted(loads):
                if accounts[client] > most:
                    spent, limit = budget.epsilon(accounts[client]), budget.epsilon(most)
                    yield f"{what} brings {client} to ε = {spent:.3f}, above its budget of {limit:.3f}"
            told = record
        elif record["kind"] == "version":
            what, told = f"version {record['version']}", record.get("privacy", {})
            members = tuple((line.get("offer", ""), line.get("level", 0)) for line in record["merged"])
            loads = _loads(record["merged"])
            if charged.get(_digest(record["version"] - 1, members)) != loads:
                yield f"{what} was not charged before it was made"
            charged.clear()
        else:
            continue
        worst = max(accounts.values(), default=0)
        expected = {
            "noise_multiplier": budget.noise_multiplier, "weight_levels": budget.weight_levels, "delta": budget.delta,
            "loads": dict(loads), "mu_max": budget.mu(worst), "epsilon_max": budget.epsilon(worst),
        }  # fmt: skip
        for name, value in expected.items():
            if not _agrees(told.get(name), value):
                yield f"{what}: its record says {name} = {told.get(name)}, and its weights give {value}"


def _loads(merged: Iterable[LedgerRecord]) -> Counter[str]:
    """Client → the sum of the weights of its updates."""
    loads: Counter[str] = Counter()
    for line in merged:
        loads[line["client"]] += line.get("level", 0)
    return loads


def _digest(version: int, members: tuple[tuple[str, int], ...]) -> str:
    """The digest by which a cohort is charged; empty for members that no cohort can have."""
    try:
        return digest_of(Cohort(version=version, members=members).pack())
    except ValidationError:
        return ""


def _agrees(told: Any, value: Any) -> bool:
    if isinstance(told, float) and isinstance(value, float):
        return math.isclose(told, value, rel_tol=1e-6)
    return bool(told == value)


def _repeated(versions: Sequence[LedgerRecord]) -> Iterator[str]:
    first: dict[str, int] = {}
    for record in versions:
        for line in record["merged"]:
            before = first.setdefault(line.get("offer", line["job"]), record["version"])
            if before != record["version"]:
                yield f"the update of job {line['job']} is in the versions {before} and {record['version']}"


def _require_answer(record: LedgerRecord, keeper: str, answer: Masked, scope: Scope) -> None:
    """Raise SignatureError unless the keeper signed the digest of the masks of just this cohort."""
    members = tuple((line["offer"], line["level"]) for line in record["merged"])
    cohort = Cohort(version=record["version"] - 1, members=members)
    if not answer.cohort == record["cohort"] == cohort_id(scope, cohort):
        raise SignatureError(f"keeper {keeper} has released another cohort than the updates of this version")
    if answer.digest != record["masks"][keeper]["digest"]:
        raise SignatureError(f"keeper {keeper} has released other masks than the ledger names")

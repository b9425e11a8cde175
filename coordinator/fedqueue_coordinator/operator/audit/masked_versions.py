"""Checks the versions of a run with keepers: each is the sum of a crowd, once, and its keepers have signed the masks.

The crowds need the ledger and the configuration only. What a keeper signed names the run's instance, which only Redis
has, and needs the keepers' public keys.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedqueue.config.schema import Config
from fedqueue.errors import ConfigurationError, SignatureError, WireError
from fedqueue.protocol.key_files import KEEPERS, read_trusted_keys
from fedqueue.protocol.messages import Cohort, Masked, read
from fedqueue.protocol.signed_envelope import MASKED, Scope, open_envelope
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
    unchecked: str = ""
    """Why answers could not be verified, or not all."""


def check_masked_versions(
    config: Config, ledger: Iterable[LedgerRecord], scope: Scope | None = None, keys: Path | None = None
) -> MaskedVersions:
    """Check every version in `ledger`; `scope` is that of the run's present epoch, `keys` the folder of public keys.

    Without them no answer of a keeper is verified.
    """
    records = [record for record in ledger if record["kind"] in ("version", "epoch")]
    versions = [record for record in records if record["kind"] == "version"]
    crowds = [*_crowd_problems(config, versions), *_repeated(versions)]
    if scope is None or keys is None:
        return MaskedVersions(len(versions), crowds, 0, [], "results in a folder are not signed")
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
    return MaskedVersions(len(versions), crowds, answers, problems, "; ".join(notes))


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

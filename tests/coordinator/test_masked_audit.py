"""The audit of a run with keepers: crowds, cohorts, the keepers' signatures, and the replay from kept masks."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from fedqueue.protocol.key_files import KEEPERS, SigningKey, write_public_keys
from fedqueue_coordinator.operator.audit.audit import Check, audit, ok
from fedqueue_coordinator.operator.audit.audit_input import read_result_folder, read_run_in_redis
from fedqueue_coordinator.operator.audit.masked_versions import check_masked_versions
from fedqueue_coordinator.operator.audit.replay import replay_folder
from fedqueue_coordinator.operator.results import write_results
from fedqueue_coordinator.service.coordinator_store import CoordinatorStore
from fedqueue_coordinator.service.replay_archive import REPLAY_FOLDER
from tests.support.masked_service import KEEPER_NAMES, MaskedSites, lead_masked, make_keys, masked_service_config

Ledger = list[dict[str, Any]]


class MaskedResult:
    """A finished run in Redis, and its results in a folder."""

    def __init__(self, client: redis.Redis, folder: Path, monkeypatch: pytest.MonkeyPatch, **sections: Any) -> None:
        monkeypatch.setattr("fedqueue_coordinator.operator.reports.run.draw_report", lambda *_: None)
        self.keys, self.folder = folder / "keys", folder / "run"
        make_keys(self.keys)
        self.config = masked_service_config(**{"secure": {"weight_levels": 8}, **sections})
        sites = MaskedSites(client, self.config, self.keys)
        result, _ = lead_masked(client, sites, self.keys, self.folder, [])
        write_results(self.folder, self.config, result)
        self.ledger = result.ledger
        self.store = CoordinatorStore(client, self.config.name, "audit")

    @property
    def versions(self) -> Ledger:
        return [record for record in self.ledger if record["kind"] == "version"]

    def changed(self, change: Callable[[Ledger], None]) -> list[str]:
        """The problems of crowds after a change of the versions' records."""
        ledger = copy.deepcopy(self.versions)
        change(ledger)
        return list(check_masked_versions(self.config, ledger).crowd_problems)


@pytest.fixture
def run(fake_client: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MaskedResult:
    return MaskedResult(fake_client, tmp_path, monkeypatch)


def check_of(checks: list[Check], name: str) -> Check:
    return next(check for check in checks if check.name == name)


def test_masked_run_in_redis_passes_every_check(run: MaskedResult) -> None:
    checks = audit(read_run_in_redis(run.store, run.keys))
    assert ok(checks), [check.problems for check in checks]
    assert all(check.checked for check in checks)
    assert "(2 versions)" in check_of(checks, "S5").invariant
    assert "(4 answers)" in check_of(checks, "S7").invariant
    assert any("6 updates" in check.invariant for check in checks)


def test_masked_results_are_replayed_from_kept_masks(run: MaskedResult) -> None:
    checks = audit(read_result_folder(run.folder))
    assert ok(checks), [check.problems for check in checks]
    assert check_of(checks, "S5").checked
    assert not check_of(checks, "S7").checked


def test_run_with_hidden_examples_is_replayed_bit_for_bit(
    fake_client: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = MaskedResult(
        fake_client, tmp_path, monkeypatch, secure={"max_examples": 12, "examples": "hidden"},
        aggregation={"strategy": "fedavg", "cohort_size": 3, "running_statistics": "frozen"},
    )  # fmt: skip
    assert {line["examples"] for record in run.versions for line in record["merged"]} == {0}
    for checks in audit(read_run_in_redis(run.store, run.keys)), audit(read_result_folder(run.folder)):
        assert ok(checks), [check.problems for check in checks]
        assert any("6 updates" in check.invariant for check in checks)


def test_audit_without_the_configuration_says_so(run: MaskedResult) -> None:
    shutil.rmtree(run.folder / REPLAY_FOLDER)
    checks = audit(read_result_folder(run.folder))
    assert ok(checks)
    assert not check_of(checks, "S5").checked
    assert "configuration" in check_of(checks, "S5").skipped
    assert not check_of(checks, "S7").checked
    assert "in Redis" in check_of(checks, "S7").skipped


def test_replay_finds_masks_that_were_changed(run: MaskedResult) -> None:
    (path, *_) = sorted((run.folder / REPLAY_FOLDER).glob("masks.*.north.bin"))
    masks = np.fromfile(path, np.uint32)
    masks[0] += 2**20
    masks.tofile(path)
    problems = replay_folder(run.folder / REPLAY_FOLDER, run.ledger).problems
    assert any("masks of keeper north" in problem for problem in problems)
    assert any("differs from the replay" in problem for problem in problems)


def test_replay_names_masks_that_are_missing(run: MaskedResult) -> None:
    for path in (run.folder / REPLAY_FOLDER).glob("masks.*"):
        path.unlink()
    (problem,) = replay_folder(run.folder / REPLAY_FOLDER, run.ledger).problems
    assert "version 1" in problem


def raise_level(ledger: Ledger) -> None:
    ledger[1]["merged"][0].update(base=0, staleness=1, level=8)


def one_client(ledger: Ledger) -> None:
    for line in ledger[0]["merged"]:
        line["client"] = "a"


def repeat_update(ledger: Ledger) -> None:
    ledger[1]["merged"][0]["offer"] = ledger[0]["merged"][0]["offer"]


def lose_keeper(ledger: Ledger) -> None:
    del ledger[0]["masks"]["south"]


def change_weight(ledger: Ledger) -> None:
    ledger[0]["merged"][0]["weight"] = 0.5


def lose_levels(ledger: Ledger) -> None:
    del ledger[0]["merged"][0]["level"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (raise_level, "has level 8, and its base is 0"),
        (one_client, "no sum of a crowd"),
        (repeat_update, "is in the versions 1 and 2"),
        (lose_keeper, "was unmasked by north"),
        (change_weight, "has weight 0.5"),
        (lose_levels, "was not made by keepers"),
    ],
)
def test_crowd_that_was_violated_is_found(run: MaskedResult, change: Callable[[Ledger], None], problem: str) -> None:
    assert run.changed(lambda ledger: None) == []
    assert any(problem in found for found in run.changed(change))


def test_answer_of_another_keeper_is_found(run: MaskedResult) -> None:
    key = SigningKey.generate()
    write_public_keys(run.keys / KEEPERS / "south.pub", [key.public])
    check = check_of(audit(read_run_in_redis(run.store, run.keys)), "S7")
    assert len(check.problems) == 2
    assert "keeper south" in check.problems[0]


def test_answers_are_unchecked_without_a_public_key(run: MaskedResult) -> None:
    shutil.rmtree(run.keys / KEEPERS)
    check = check_of(audit(read_run_in_redis(run.store, run.keys)), "S7")
    assert not check.checked
    assert all(name in check.skipped for name in KEEPER_NAMES)

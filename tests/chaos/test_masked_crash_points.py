"""A run with keepers over a real store: versions, what stays in Redis, and coordinators and keepers that die."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from fedqueue_coordinator.core.run_counters import RunCounters
from fedqueue_coordinator.core.run_summary import RunResult
from fedqueue_coordinator.operator.audit.replay import replay_folder
from fedqueue_coordinator.service.replay_archive import REPLAY_FOLDER
from tests.support.masked_service import (
    KEEPER_NAMES,
    MaskedSites,
    lead_masked,
    make_coordinator,
    make_keys,
    masked_service_config,
)
from tests.support.mortal_coordinator import Script


def run_masked(client: redis.Redis, folder: Path, *deaths: Any, **sections: Any) -> tuple[RunResult, int, MaskedSites]:
    folder.mkdir(parents=True)
    make_keys(folder / "keys")
    sites = MaskedSites(client, masked_service_config(**sections), folder / "keys")
    result, died = lead_masked(client, sites, folder / "keys", folder / "run", list(deaths))
    return result, died, sites


def versions(result: RunResult) -> list[dict[str, Any]]:
    return [record for record in result.ledger if record["kind"] == "version"]


def test_masked_run_makes_versions_over_redis(fake_client: redis.Redis, tmp_path: Path) -> None:
    result, _, sites = run_masked(fake_client, tmp_path / "whole")
    assert [len(record["merged"]) for record in versions(result)] == [3, 3]
    numbers = [int(line["job"].split("-")[-2]) for record in versions(result) for line in record["merged"]]
    total = np.zeros(sites.manifest.parameters)
    for number in numbers:
        total += np.random.default_rng(number).normal(size=sites.manifest.floats).astype(np.float32) / 3
    start = sites_start(sites)
    np.testing.assert_allclose(result.model.parameters, start + total, atol=1e-4)


def sites_start(sites: MaskedSites) -> Any:
    from fedqueue.training import set_seed
    from fedqueue_coordinator.core.federation import initial_model
    from tests.support.small_task import SmallTask

    set_seed(sites.config.seed)
    return initial_model(sites.config, SmallTask(batch_norm=False).model()).parameters.numpy()


def test_ended_masked_run_leaves_no_asks_answers_or_cohort(fake_client: redis.Redis, tmp_path: Path) -> None:
    _, _, sites = run_masked(fake_client, tmp_path / "whole")
    keys = sites.store.keys
    for keeper in KEEPER_NAMES:
        assert not fake_client.exists(keys.asks(keeper), keys.says(keeper))
    assert not fake_client.exists(keys.cohort)
    assert not list(fake_client.scan_iter(f"{keys.mask_prefix}*"))
    kept = list(fake_client.scan_iter(f"{keys.kept_mask_prefix}*"))
    assert len(kept) == 2 * 2  # versions and keepers


@pytest.mark.parametrize(
    "points",
    [
        ("before propose.lua", "after propose.lua", "before propose", "after propose"),
        ("before commit.lua", "after commit.lua", "after load"),
    ],
)
def test_death_of_a_coordinator_changes_no_bit(
    fake_client: redis.Redis, tmp_path: Path, points: tuple[str, ...]
) -> None:
    counted = Script()
    whole, _, _ = run_masked(fake_client, tmp_path / "whole", counted)
    deaths = 0
    for point in points:
        for passage in range(1, counted.passed[point] + 1):
            fake_client.flushall()
            result, died, _ = run_masked(fake_client, tmp_path / f"{point} {passage}", Script(point, passage))
            assert died == 1
            assert np.array_equal(result.model.buffer, whole.model.buffer), (point, passage)
            again = replay_folder(tmp_path / f"{point} {passage}" / "run" / REPLAY_FOLDER, result.ledger)
            assert (again.updates, again.problems) == (6, [])
            deaths += 1
    assert deaths >= 6


@pytest.mark.parametrize(
    "point", ["before propose.lua", "after propose.lua", "after propose", "before commit.lua", "after commit.lua"]
)
def test_death_of_a_coordinator_charges_no_client_twice(fake_client: redis.Redis, tmp_path: Path, point: str) -> None:
    noise = {"clip_norm": 5.0, "noise_multiplier": 1.0, "max_participations": 2, "delta": 1e-3}
    result, died, sites = run_masked(fake_client, tmp_path / "run", Script(point, 1), privacy={"clients": noise})
    assert died == 1
    spent: Counter[str] = Counter()
    for record in versions(result):
        spent.update({client: load**2 for client, load in record["privacy"]["loads"].items()})
    assert spent.total() == 6
    assert RunCounters.from_ledger({}, result.ledger, 10).accounts == spent
    assert len([record for record in result.ledger if record["kind"] == "spend"]) == 2
    for keeper in sites.keepers:
        assert {client: keeper.log.account(client) for client in spent} == spent
    again = replay_folder(tmp_path / "run" / "run" / REPLAY_FOLDER, result.ledger)
    assert (again.updates, again.problems) == (6, [])


def test_keeper_that_was_away_is_asked_all_the_same(fake_client: redis.Redis, tmp_path: Path) -> None:
    make_keys(tmp_path / "keys")
    sites = MaskedSites(fake_client, masked_service_config(), tmp_path / "keys")
    said: list[str] = []

    def follow(point: str) -> None:
        if point != "before receive":
            return
        said.append(coordinator.federation.waiting_for(1e6) if sites.keepers[1].away else "")
        sites.keepers[1].away = 3 < len(said) < 12
        if len(said) == 12:
            sites.keepers[1].restart()

    coordinator = make_coordinator(fake_client, sites, tmp_path / "keys", tmp_path, follow)
    result = coordinator.run()
    assert result
    assert result.version == 2
    assert any("waiting for keeper south" in text for text in said)


def test_run_says_which_keeper_has_not_joined_it(fake_client: redis.Redis, tmp_path: Path) -> None:
    make_keys(tmp_path / "keys")
    sites = MaskedSites(fake_client, masked_service_config(), tmp_path / "keys")
    sites.keepers[1].away = True
    said: list[str] = []

    def follow(point: str) -> None:
        if point != "before receive":
            return
        said.append(coordinator.federation.waiting_for(1e6))
        if len(said) == 6:  # an encryption key of a former instance of the run is of no use
            fake_client.copy(sites.store.keys.keeper("north"), sites.store.keys.keeper("south"))
        sites.posts = len(said) >= 12
        sites.keepers[1].away = not sites.posts

    coordinator = make_coordinator(fake_client, sites, tmp_path / "keys", tmp_path, follow)
    assert coordinator.run()
    assert all("waiting for keeper south, which has not joined the run" in text for text in said[1:12])
    assert not any("joined the run" in text for text in said[14:])


def test_keeper_that_loses_its_file_costs_its_updates_only(fake_client: redis.Redis, tmp_path: Path) -> None:
    make_keys(tmp_path / "keys")
    sites = MaskedSites(fake_client, masked_service_config(), tmp_path / "keys")
    rounds = 0

    def follow(point: str) -> None:
        nonlocal rounds
        rounds += point == "before receive"
        if point == "before receive" and rounds == 4:
            sites.keepers[0].lose_file()

    result = make_coordinator(fake_client, sites, tmp_path / "keys", tmp_path, follow).run()
    assert result
    assert result.version == 2
    reasons = Counter(record["reason"] for record in result.ledger if record["kind"] == "rejected")
    assert reasons["keeper_lost"] >= 1
    assert set(reasons) <= {"keeper_lost", "run_ended"}

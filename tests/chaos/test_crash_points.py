"""A run whose coordinator dies at any step ends with the same bits as a run whose coordinator never dies.

The tests are exhaustive: every named point, at each of its passages. Only commands to Redis leave a trace, so points
before and after each command cover every instant at which a coordinator can die.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from fedqueue import transport
from fedqueue.config.schema import Config
from fedqueue.protocol.keys import job_without_tag
from fedqueue_coordinator.core.run_summary import RunResult
from fedqueue_coordinator.operator.audit.audit import audit, ok
from fedqueue_coordinator.operator.audit.audit_input import read_audit_input
from fedqueue_coordinator.operator.results import write_results
from tests.support.chaos import crash_points
from tests.support.mortal_coordinator import Script
from tests.support.scripted_run import run_to_the_end, scripted_config

MODES: dict[str, dict[str, Any]] = {
    "fedbuff": {
        "aggregation": {"strategy": "fedbuff", "buffer_size": 3},
        "server_optimizer": {"name": "adam", "learning_rate": 0.1},
        "stop": {"versions": 2},
    },
    "fedasync": {"aggregation": {"strategy": "fedasync"}, "stop": {"versions": 3}},
    "fedavg": {"aggregation": {"strategy": "fedavg"}, "stop": {"versions": 2}},
}
FURTHER: dict[str, dict[str, Any]] = {
    "fadas": {"aggregation": {"strategy": "fadas", "buffer_size": 3}},
    "ca2fl": {"aggregation": {"strategy": "ca2fl", "buffer_size": 2, "strategy_options": {"cache_clients": 2}}},
    "robust": {
        "aggregation": {"strategy": "fedbuff", "buffer_size": 3, "robust": {"rule": "geometric_median"}},
        "server_optimizer": {"schedule": {"name": "exponentiallr", "schedule_options": {"gamma": 0.5}}},
    },
    "filtered": {
        "aggregation": {
            "strategy": "fedasync",
            "mixing": "delta",
            "filter": {"norm_factor": 1.2, "min_cosine": -0.9, "warmup": 1, "strikes": 2, "quarantine_seconds": 2},
        }
    },
}
MAY_DIFFER = {"seconds", "at", "token", "client", "share"}  # times, leaders, and which idle client trained the job


def essence(result: RunResult) -> tuple[bytes, list[Any]]:
    """The bits of the model, and the ledger without the fields that may differ."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            kept = {k: plain(v) for k, v in value.items() if k not in MAY_DIFFER}
            return kept | {"job": job_without_tag(kept["job"])} if "job" in kept else kept
        return [plain(v) for v in value] if isinstance(value, list) else value

    # Leave out jobs that the end of the run closes: how many were open does not affect the model.
    return result.model.buffer.tobytes(), [plain(r) for r in result.ledger if r.get("reason") != "run_ended"]


def audited(result: RunResult, config: Config, folder: Path) -> None:
    write_results_without_picture(folder, config, result)
    checks = audit(read_audit_input(str(folder), ""))
    assert ok(checks), checks


def write_results_without_picture(folder: Path, config: Config, result: RunResult) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedqueue_coordinator.operator.reports.run.draw_report", lambda *_: None)
        write_results(folder, config, result)


def check_every_death(client: redis.Redis, folder: Path, config: Config, names: Any = None, together: int = 1) -> int:
    """Kill a coordinator at each passage of each point (or of those in `names`); return the number of deaths."""
    counted = Script()
    uninterrupted, _ = run_to_the_end(client, config, folder / "whole", [counted], together)
    expected = essence(uninterrupted)
    audited(uninterrupted, config, folder / "whole")
    deaths = 0
    for point, times in counted.passed.items():
        for passage in range(1, times + 1) if names is None or point in names else ():
            client.flushall()
            place = folder / f"{point} {passage}".replace(" ", "-")
            result, died = run_to_the_end(client, config, place, [Script(point, passage)], together)
            assert died == 1
            assert essence(result) == expected, f"killed {point}, passage {passage}"
            audited(result, config, place)
            deaths += 1
    return deaths


@pytest.mark.parametrize("mode", [pytest.param("fedbuff", marks=pytest.mark.slow), "fedasync", "fedavg"])
def test_crash_at_any_point_of_a_commit_changes_no_bit(fake_client: redis.Redis, tmp_path: Path, mode: str) -> None:
    config = scripted_config(**MODES[mode])
    names = {"between blobs", "before commit.lua", "after commit.lua", "after load"}
    assert check_every_death(fake_client, tmp_path, config, names) >= 10


def test_crash_with_uncommitted_versions_changes_no_bit(fake_client: redis.Redis, tmp_path: Path) -> None:
    """Three updates are posted at once: two make the two versions, and the third is handed back."""
    config = scripted_config(**{**MODES["fedasync"], "stop": {"versions": 2}})
    counted = Script()
    whole, _ = run_to_the_end(fake_client, config, tmp_path / "whole", [counted], together=3)
    assert counted.passed["before commit.lua"] == 2, "one commit for version 0, one for both versions"
    for point, passage in (("after load", 2), ("between blobs", 2), ("before commit.lua", 2), ("after commit.lua", 2)):
        fake_client.flushall()
        result, died = run_to_the_end(fake_client, config, tmp_path / point, [Script(point, passage)], together=3)
        assert died == 1
        audited(result, config, tmp_path / point)
        model, records = essence(result)
        assert model == essence(whole)[0]
        assert versions_in(records) == versions_in(essence(whole)[1])


def versions_in(records: list[Any]) -> list[Any]:
    return [record for record in records if record["kind"] == "version"]


def test_crash_among_batched_updates_loses_none(fake_client: redis.Redis, tmp_path: Path) -> None:
    """A later job's base depends on when its worker claims the job, so the audit replays each result instead."""
    config = scripted_config(**{**MODES["fedasync"], "stop": {"versions": 6}})
    counted = Script()
    run_to_the_end(fake_client, config, tmp_path / "counted", [counted], together=3)
    for passage in range(2, counted.passed["before commit.lua"] + 1):
        fake_client.flushall()
        place = tmp_path / str(passage)
        result, died = run_to_the_end(fake_client, config, place, [Script("before commit.lua", passage)], together=3)
        assert (died, result.version) == (1, 6)
        audited(result, config, place)


@pytest.mark.parametrize("mode", FURTHER)
def test_aggregation_state_survives_a_crash_around_a_commit(
    fake_client: redis.Redis, tmp_path: Path, mode: str
) -> None:
    config = scripted_config(**{**FURTHER[mode], "stop": {"versions": 2}})
    assert check_every_death(fake_client, tmp_path, config, {"before commit.lua", "after commit.lua"}) >= 4


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.timeout(300)
@pytest.mark.parametrize("mode", MODES)
def test_crash_at_any_passage_of_any_point_changes_no_bit(
    server_client: redis.Redis, tmp_path: Path, mode: str
) -> None:
    assert check_every_death(server_client, tmp_path, scripted_config(**MODES[mode])) >= 80


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.timeout(300)
def test_two_crashes_in_a_row_change_no_bit(server_client: redis.Redis, tmp_path: Path) -> None:
    config = scripted_config(**MODES["fedbuff"])
    expected = essence(run_to_the_end(server_client, config, tmp_path / "whole", [])[0])
    deaths = [("before commit.lua", 2), ("after commit.lua", 1), ("after dispatch.lua", 4), ("after load", 2)]
    for first, second in itertools.product(deaths, deaths):
        server_client.flushall()
        place = tmp_path / f"{first} {second}"
        result, died = run_to_the_end(server_client, config, place, [Script(*first), Script(*second)])
        assert died == 2
        assert essence(result) == expected, (first, second)
        audited(result, config, place)


def test_a_run_passes_every_point_that_the_service_names(fake_client: redis.Redis, tmp_path: Path) -> None:
    counted = Script()
    run_to_the_end(fake_client, scripted_config(**MODES["fedbuff"]), tmp_path, [counted])
    assert set(crash_points.SERVICE) <= set(counted.passed)


def test_bits_differ_where_an_update_is_missing(fake_client: redis.Redis, tmp_path: Path) -> None:
    """The comparison can fail: a shorter run has a different model."""
    whole, _ = run_to_the_end(fake_client, scripted_config(**MODES["fedasync"]), tmp_path / "a", [])
    fake_client.flushall()
    fewer = scripted_config(aggregation={"strategy": "fedasync"}, stop={"versions": 2})
    short, _ = run_to_the_end(fake_client, fewer, tmp_path, [])
    assert not np.array_equal(whole.model.buffer, short.model.buffer)


def test_every_point_around_a_script_names_one() -> None:
    scripts = {path.name for path in (Path(transport.__file__).parent / "scripts").glob("*.lua")}
    assert {point.split()[1] for point in crash_points.STORE if point.endswith(".lua")} <= scripts

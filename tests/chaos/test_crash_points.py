"""A coordinator that dies at any step leaves a run whose end has the same bits as that of one that never died.

Exhaustive: every named point, at every one of its passages. What a coordinator does between two commands to Redis
leaves no trace, so the points around the commands are all the instants that there are.
"""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import crash_points
import numpy as np
import pytest
import redis
from scripted_run import Killed, make_config, run_to_the_end

from fedqueue.config.loading import Config
from fedqueue.protocol.keys import job_without_tag
from fedqueue_coordinator.operator.audit.audit import audit, ok, read_audit_input
from fedqueue_coordinator.operator.results import write_results
from fedqueue_coordinator.service.coordinator import RunResult

MODES: dict[str, dict[str, Any]] = {
    "fedbuff": {
        "aggregation": {"mode": "fedbuff", "buffer_size": 3},
        "server_optimizer": {"name": "adam", "learning_rate": 0.1},
        "stop": {"versions": 2},
    },
    "fedasync": {"aggregation": {"mode": "fedasync"}, "stop": {"versions": 3}},
    "fedavg": {"aggregation": {"mode": "fedavg"}, "stop": {"versions": 2}},
}
FURTHER: dict[str, dict[str, Any]] = {
    "fadas": {"aggregation": {"mode": "fadas", "buffer_size": 3}},
    "ca2fl": {"aggregation": {"mode": "ca2fl", "buffer_size": 2, "options": {"cache_clients": 2}}},
    "robust": {
        "aggregation": {"mode": "fedbuff", "buffer_size": 3, "robust": {"rule": "geometric_median"}},
        "server_optimizer": {"schedule": {"name": "exponentiallr", "options": {"gamma": 0.5}}},
    },
    "filtered": {
        "aggregation": {
            "mode": "fedasync",
            "mixing": "delta",
            "filter": {"norm_factor": 1.2, "min_cosine": -0.9, "warmup": 1, "strikes": 2, "quarantine_seconds": 2},
        }
    },
}
MAY_DIFFER = {"seconds", "at", "token", "client", "share"}  # time, leaders, and who among equals trained the job


class Script:
    """Counts the passages of each point; at the n-th passage of one of them the coordinator dies."""

    def __init__(self, point: str = "", passage: int = 0) -> None:
        self.passed: Counter[str] = Counter()
        self._point, self._passage = point, passage

    def __call__(self, point: str) -> None:
        self.passed[point] += 1
        if point == self._point and self.passed[point] == self._passage:
            raise Killed(point)


def essence(result: RunResult) -> tuple[bytes, list[Any]]:
    """The bits of the model, and the ledger without what may differ."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            kept = {k: plain(v) for k, v in value.items() if k not in MAY_DIFFER}
            return kept | {"job": job_without_tag(kept["job"])} if "job" in kept else kept
        return [plain(v) for v in value] if isinstance(value, list) else value

    # Jobs that the end of the run closes: how many were open by then is not part of what was learnt.
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
    """Die at each passage of each point (or of those in `names`); returns how many deaths there were."""
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


@pytest.mark.parametrize("mode", MODES)
def test_coordinator_killed_at_any_point_of_a_commit_changes_no_bit(fake_client, tmp_path, mode):
    config = make_config(**MODES[mode])
    names = {"between blobs", "before commit.lua", "after commit.lua", "after load"}
    assert check_every_death(fake_client, tmp_path, config, names) >= 10


def test_coordinator_killed_while_versions_wait_for_one_commit_changes_no_bit_of_them(fake_client, tmp_path):
    """Two of the three updates that are posted at once make the two versions; the third is handed back."""
    config = make_config(**{**MODES["fedasync"], "stop": {"versions": 2}})
    counted = Script()
    whole, _ = run_to_the_end(fake_client, config, tmp_path / "whole", [counted], together=3)
    assert counted.passed["before commit.lua"] == 2, "version 0, then both"
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


def test_run_of_several_updates_at_once_is_whole_wherever_its_coordinator_is_killed(fake_client, tmp_path):
    """Which base a later job has depends on when its worker claims it; the audit replays whatever came of it."""
    config = make_config(**{**MODES["fedasync"], "stop": {"versions": 6}})
    counted = Script()
    run_to_the_end(fake_client, config, tmp_path / "counted", [counted], together=3)
    for passage in range(2, counted.passed["before commit.lua"] + 1):
        fake_client.flushall()
        place = tmp_path / str(passage)
        result, died = run_to_the_end(fake_client, config, place, [Script("before commit.lua", passage)], together=3)
        assert (died, result.version) == (1, 6)
        audited(result, config, place)


@pytest.mark.parametrize("mode", FURTHER)
def test_what_an_aggregation_remembers_survives_a_coordinator_killed_around_a_commit(fake_client, tmp_path, mode):
    config = make_config(**{**FURTHER[mode], "stop": {"versions": 2}})
    assert check_every_death(fake_client, tmp_path, config, {"before commit.lua", "after commit.lua"}) >= 4


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.timeout(300)
@pytest.mark.parametrize("mode", MODES)
def test_coordinator_killed_at_any_passage_of_any_point_changes_no_bit(server_client, tmp_path, mode):
    assert check_every_death(server_client, tmp_path, make_config(**MODES[mode])) >= 80


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.timeout(300)
def test_two_coordinators_killed_one_after_the_other_change_no_bit(server_client, tmp_path):
    config = make_config(**MODES["fedbuff"])
    expected = essence(run_to_the_end(server_client, config, tmp_path / "whole", [])[0])
    deaths = [("before commit.lua", 2), ("after commit.lua", 1), ("after dispatch.lua", 4), ("after load", 2)]
    for first, second in itertools.product(deaths, deaths):
        server_client.flushall()
        place = tmp_path / f"{first} {second}"
        result, died = run_to_the_end(server_client, config, place, [Script(*first), Script(*second)])
        assert died == 2
        assert essence(result) == expected, (first, second)
        audited(result, config, place)


def test_a_run_passes_every_point_that_the_service_names(fake_client, tmp_path):
    counted = Script()
    run_to_the_end(fake_client, make_config(**MODES["fedbuff"]), tmp_path, [counted])
    assert set(crash_points.SERVICE) <= set(counted.passed)


def test_bits_differ_where_an_update_is_missing(fake_client, tmp_path):
    """The comparison can fail: a run of another length is another model."""
    whole, _ = run_to_the_end(fake_client, make_config(**MODES["fedasync"]), tmp_path / "a", [])
    fake_client.flushall()
    fewer = make_config(aggregation={"mode": "fedasync"}, stop={"versions": 2})
    short, _ = run_to_the_end(fake_client, fewer, tmp_path, [])
    assert not np.array_equal(whole.model.buffer, short.model.buffer)

"""The short form of each benchmark works; nothing about time is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.server, pytest.mark.timeout(600)]

live = pytest.mark.benchmark
"""Starts whole federations, which takes ten seconds to a minute."""

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(script: Any, *options: Any) -> Any:
    command = [sys.executable, str(BENCHMARKS / script), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@live
def test_startup_measures_a_run_and_the_commands(tmp_path: Path) -> None:
    shown = run("startup.py", "--quick", "--json", str(tmp_path / "figures.json"))
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["run"][0]["workers"] == 2
    assert 0 < figures["run"][0]["worker_mib"][0] < figures["run"][0]["all_mib"][0]
    assert [row["command"] for row in figures["commands"]] == ["--help", "list", "status"]
    assert all(row["seconds"][0] > 0 for row in figures["commands"])
    assert "| `fedqueue run` to the first merged update, 2 workers |" in shown


@live
def test_missing_peers_are_skipped_with_the_reason(tmp_path: Path) -> None:
    shown = run("beside_peers.py", "--quick", "--json", str(tmp_path / "figures.json"))
    figures = json.loads((tmp_path / "figures.json").read_text())
    (measured,) = figures["sizes"]["fedqueue fedbuff"]["100000"]
    assert measured["rate"] > 0
    assert min(measured["server"], measured["client"], measured["redis"]) > 0
    assert set(figures["skipped"]) == {name for name in figures["skipped"] if not name.startswith("fedqueue")}
    assert "Flower FedAvg (SuperLink): skipped: not" in shown


@live
def test_encodings_are_measured_in_bytes_speed_and_accuracy(tmp_path: Path) -> None:
    shown = run("compression.py", "--quick", "--json", str(tmp_path / "rows.json"))
    rows = json.loads((tmp_path / "rows.json").read_text())
    whole, small = rows["digits"]
    assert (whole["uplink"], whole["downlink"]) == (1.0, 1.0)
    assert small["both"] < 0.3
    encodings = {row["compression"]["uplink"] for row in rows["speed"]}
    assert encodings == {"float16", "bfloat16", "int8", "topk", "randomk", "float32"}
    assert shown.count("|---|") >= 2


@live
def test_relay_and_fedqueue_move_the_same_bytes(tmp_path: Path) -> None:
    shown = run("relay.py", "--quick", "--json", str(tmp_path / "rows.json"))
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["ratios"] == [row["fedqueue"][0] / row["relay"][0]]
    assert 0 < row["fedqueue"][0] < row["relay"][0]
    assert shown.count("| 0.1 MB | fedasync |") == 2


@live
def test_cost_of_an_update_is_told_step_by_step(tmp_path: Path) -> None:
    shown = run("control.py", "--quick", "--json", str(tmp_path / "rows.json"))
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert sum(row["shares"].values()) == pytest.approx(1)
    assert all(share > 0 for share in row["shares"].values())
    assert "| open the job and put it into its queue |" in shown


@live
@pytest.mark.parametrize("watched", ["--metrics", "--watched"])
def test_cost_of_watching_is_measured_in_pairs(watched: str, tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    shown = run("control.py", "--quick", watched, "--json", str(tmp_path / "rows.json"))
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert len(row["without"]) == len(row["with"]) == 1
    assert shown.count("| fedasync |") == 3


def test_merging_is_measured_for_every_encoding(tmp_path: Path) -> None:
    run("merge.py", "--quick", "--json", str(tmp_path / "rows.json"))
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["encoding"] for row in rows] == ["float32", "float16", "bfloat16", "int8", "topk", "randomk"]
    assert all(min(row["over_triad"] + row["over_float32"]) > 0 for row in rows)


def test_the_steps_of_secure_aggregation_are_measured(tmp_path: Path) -> None:
    run("secure_kernels.py", "--quick", "--json", str(tmp_path / "rows.json"))
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["step"].partition(":")[0] for row in rows] == [
        "site", "site", "coordinator", "keeper", "coordinator", "coordinator",
    ]  # fmt: skip
    assert all(min(row["ns"] + row["triads"]) > 0 for row in rows)


@live
def test_growth_is_measured_in_all_directions_and_drawn(tmp_path: Path) -> None:
    picture = tmp_path / "scale.png"
    shown = run("scale.py", "--quick", "--json", str(tmp_path / "rows.json"), "--picture", str(picture))
    record = json.loads((tmp_path / "rows.json").read_text())
    assert [row["clients"] for row in record["clients"]] == [10]
    assert [row["workers"] for row in record["workers"]] == [2]
    (idle,) = record["idle"]
    assert min(idle["joins_per_second"], idle["per_second_while_joining"]) > 0
    assert 0 < idle["takeover_seconds"] < 60
    assert record["versions"][-1]["version"] >= 40
    assert record["soak"][-1]["coordinator_bytes"] > 0
    assert picture.stat().st_size > 10_000
    assert "- coordinator: " in shown


@live
def test_peak_memory_is_told_in_models(tmp_path: Path) -> None:
    run("size.py", "--quick", "--json", str(tmp_path / "rows.json"))
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["updates"] >= 5
    assert row["coordinator"] > 0


@live
def test_keepers_are_measured_by_role(tmp_path: Path) -> None:
    shown = run("secure.py", "--quick", "--json", str(tmp_path / "rows.json"))
    without, one = json.loads((tmp_path / "rows.json").read_text())
    assert (without["keepers"], one["keepers"]) == (0, 1)
    assert (without["keeper_peak"], without["keeper_ms"]) == (0, 0)
    assert one["keeper_peak"] > 0
    assert min(one["moved"], without["moved"]) > 100_000
    assert shown.count("| 0.1 MB | 1 |") == 2


def test_round_of_masks_is_measured_and_attacked(tmp_path: Path) -> None:
    shown = run("secure_peers.py", "--quick", "--json", str(tmp_path / "rows.json"))
    record = json.loads((tmp_path / "rows.json").read_text())
    (row,) = record["sizes"]["1000"]["fedqueue, 2 keepers"]
    assert min(row["clients"], row["server"], row["keepers"]) > 0
    assert row["error"] < 1e-3
    assert row["tried"] == dict.fromkeys(row["tried"], False)
    assert set(record["skipped"]) >= {"APPFL", "Flower SecAgg+, masks with 9 others"}
    assert "| fedqueue: a keeper also releases the sum without one client | no |" in shown


@live
def test_cost_of_client_privacy_is_measured_in_pairs(tmp_path: Path) -> None:
    shown = run("privacy.py", "--quick", "--json", str(tmp_path / "rows.json"))
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["ratios"] == [row["with"][0] / row["without"][0]]
    assert min(row["keeper_ms_without"], row["keeper_ms_with"]) > 0
    assert "| 0.1 MB | 1 |" in shown


def test_accuracy_under_client_privacy_is_measured(tmp_path: Path) -> None:
    shown = run("privacy_utility.py", "--quick", "--json", str(tmp_path / "cells.json"))
    ((cell, found),) = json.loads((tmp_path / "cells.json").read_text()).items()
    assert cell == "hospitals, 4 clients; clients; 8; 0"
    assert 0.3 < found["accuracy"] < 1
    assert found["versions"] == 20
    assert "| hospitals, 4 clients |" in shown


@live
def test_signatures_are_measured_beside_a_run_without(tmp_path: Path) -> None:
    assert "| 0.1 MB |" in run("signing.py", "--quick", "--json", str(tmp_path / "rows.json"))


@live
def test_site_on_a_breaking_line_delivers_at_its_first_attempt(tmp_path: Path) -> None:
    """Each transfer takes longer than the stall, and each break but the first one longer than the lease."""
    run("slow_line.py", "--quick", "--json", str(tmp_path / "rows.json"))
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert (row["attempt"], row["lapsed"], row["breaks"]) == (1, [], 3)
    assert row["seconds"] > 30
    assert max(row["down_bytes"], row["up_bytes"]) < 1.7 * 6e6, "more than the missing pieces were sent again"


def test_cost_of_row_privacy_is_measured() -> None:
    shown = run("row_privacy.py", "--quick")
    row = next(line for line in shown.splitlines() if line.startswith("| 8 |"))
    accuracy = float(row.split("|")[3])
    assert 0.7 < accuracy < 1.0

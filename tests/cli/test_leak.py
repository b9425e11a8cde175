"""`fedqueue leak`: a rehearsal, a run with kept payloads, limits, and what is missing in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.command_line import CommandLine

ROOT = Path(__file__).parents[2]
CONFIG = f"""
name = "leaky"
[task]
entrypoint = "{ROOT}/tests/support/leaking_task.py:LeakingTask"
[clients]
count = 4
[training]
batch_size = 1
local_steps = 1
learning_rate = 0.1
device = "cpu"
[aggregation]
strategy = "fedbuff"
buffer_size = 2
[stop]
updates = 32
"""


@pytest.fixture
def config(folder: Path) -> Path:
    path = folder / "federation.toml"
    path.write_text(CONFIG)
    return path


def values(path: Path, view: str = "coordinator") -> tuple[dict[tuple[str, str], dict[str, Any]], dict[str, Any]]:
    record = json.loads((path / "leak.json").read_text())
    return {(m["attack"], m["protection"]): m for m in record["measurements"] if m["view"] == view}, record


@pytest.mark.slow
def test_rehearsal_reads_single_rows_even_out_of_sums(call: CommandLine, config: Path, folder: Path) -> None:
    code, out, err = call("leak", config, "-o", folder / "out", "--references", "2")
    assert code == 0, err
    found, record = values(folder / "out")
    assert (record["kind"], record["updates_attacked"]) == ("rehearsal", 32)
    assert found["rows", "none"]["value"] == 1.0
    assert found["rows", "if only sums of 4 were seen"]["value"] > 0.8
    assert found["rows", "none"]["control"] < 0.05
    assert found["labels", "none"]["value"] > 0.8
    assert found["labels", "if only sums of 8 were seen"]["value"] < found["labels", "none"]["value"] - 0.2
    assert {"labels", "rows", "membership", "membership_tpr"} == {
        a for a, _ in values(folder / "out", "participant")[0]
    }
    assert {"model", "model_tpr"} == {attack for attack, _ in values(folder / "out", "outsider")[0]}
    assert (folder / "out" / "leak.png").stat().st_size > 10_000
    assert "if only sums of 8 were seen" in out
    assert "training reference model 2 of 2" in err


@pytest.mark.slow
def test_model_that_overfits_betrays_its_rows(call: CommandLine, config: Path, folder: Path) -> None:
    sets = ["training.batch_size=40", "training.local_steps=off", "training.local_epochs=40", "stop.updates=24"]
    options = [word for one in sets for word in ("--set", one)]
    assert call("leak", config, "-o", folder / "out", "--updates", "8", *options)[0] == 0
    model = values(folder / "out", "outsider")[0]["model", "none"]
    assert model["value"] > 0.6
    assert model["control"] == pytest.approx(0.5, abs=0.05)


@pytest.mark.slow
def test_limit_that_is_broken_is_exit_code_1_with_the_number(call: CommandLine, config: Path, folder: Path) -> None:
    code, _, err = call("leak", config, "-o", "out", "--references", "0", "--at-most", "rows=0.01", "--updates", "8")
    assert code == 1
    assert "fedqueue: --at-most: rows: 1.000 for the coordinator, " in err
    assert "at most 0.01 is allowed" in err
    assert call("leak", config, "-o", "out", "--references", "0", "--at-most", "rows=1", "--updates", "8")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nowhere"], "fedqueue: RUN = 'nowhere': no run with results under runs/"),
        (["federation.toml", "--references", "3"], "fedqueue: --references = 3: not even"),
        (["federation.toml", "--at-most", "rows"], "fedqueue: --at-most = 'rows': no limit"),
        (["federation.toml", "--set", "stop.updates=4"], "fedqueue: the run merged fewer than 8 updates"),
        (["absent.toml"], "fedqueue: CONFIG = 'absent.toml': cannot be read"),
    ],
)
def test_wrong_input_is_one_line(call: CommandLine, config: Path, arguments: list[str], line: str) -> None:
    code, _, err = call("leak", *arguments)
    assert code in (1, 2)
    assert err.splitlines()[-1].startswith(line), err


def test_run_without_payloads_names_the_key_that_keeps_them(call: CommandLine, folder: Path) -> None:
    results = folder / "runs" / "old"
    results.mkdir(parents=True)
    for name in ("ledger.jsonl", "summary.json"):
        (results / name).write_text("{}")
    code, _, err = call("leak", "old")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("fedqueue: ledger.keep_payloads = False: runs/old has no payloads to attack; set it to true")


@pytest.mark.slow
@pytest.mark.server
def test_run_with_kept_payloads_is_attacked_afterwards(call: CommandLine, config: Path, folder: Path) -> None:
    assert call("run", config, "-q", "--set", "ledger.keep_payloads=true")[0] == 0
    code, _, err = call("leak", "leaky", "--references", "0", "--updates", "16")
    assert code == 0, err
    found, record = values(folder / "runs" / "leaky")
    assert (record["kind"], record["updates_attacked"]) == ("run", 16)
    assert found["rows", "none"]["value"] == 1.0
    assert call("leak", "leaky", "--set", "seed=2")[0] == 2
    config.write_text(CONFIG + "\n[task.options]\ntest = false\n")
    assert call("run", config, "-q", "--set", "ledger.keep_payloads=true", "--overwrite")[0] == 0
    code, _, err = call("leak", "leaky")
    assert code == 2
    assert "rehearse instead, which holds out a quarter of each client's rows: fedqueue leak " in err


KEEPERS = ["--set", "secure.keepers=['university', 'audit-office']", "--set", "aggregation.buffer_size=3"]


def test_with_keepers_the_coordinator_sees_no_more_than_all(call: CommandLine, config: Path, folder: Path) -> None:
    code, _, err = call("leak", config, "-o", folder / "out", "--references", "0", *KEEPERS)
    assert code == 0, err
    found, record = values(folder / "out")
    (protection,) = {protection for _, protection in found}
    assert protection == "keepers: sums over 3 clients or more"
    assert all(m["configured"] for m in found.values())
    assert found["labels", protection]["value"] < 0.8
    shared = values(folder / "out", "participant")[0]
    for attack in ("labels", "rows", "membership"):
        assert found[attack, protection]["value"] == pytest.approx(shared[attack, "none"]["value"], abs=0.02)
    assert record["updates_attacked"] == 32


@pytest.mark.slow
@pytest.mark.server
def test_run_with_keepers_is_attacked_by_its_sums(call: CommandLine, config: Path, folder: Path) -> None:
    assert call("run", config, "-q", "--set", "ledger.keep_payloads=true", *KEEPERS)[0] == 0
    code, _, err = call("leak", "leaky", "--references", "0", "--updates", "16")
    assert code == 0, err
    assert {protection for _, protection in values(folder / "runs" / "leaky")[0]} == {
        "keepers: sums over 3 clients or more"
    }

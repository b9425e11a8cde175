"""Commands that read a folder of results of which a file is cut, empty or missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.support.command_line import CommandLine

LEDGER: list[dict[str, Any]] = [
    {"kind": "version", "version": v, "seconds": 1.0, "merged": [], "token": 1} for v in (1, 2)
]


@pytest.fixture
def results(folder: Path) -> Path:
    """Return a folder of complete results of two versions."""
    path = folder / "runs" / "toy"
    path.mkdir(parents=True)
    summary = {"run": "toy", "versions": 2, "model_version": 2, "jobs_dispatched": 0, "metrics": {}, "failures": []}
    (path / "summary.json").write_text(json.dumps(summary))
    (path / "ledger.jsonl").write_text("".join(json.dumps(record) + "\n" for record in LEDGER))
    save_file({"weight": torch.zeros(64)}, path / "model.safetensors")
    return path


def cut(path: Path, left: int) -> None:
    path.write_bytes(path.read_bytes()[:left])


def test_whole_results_are_read(call: CommandLine, results: Path) -> None:
    for command in (["audit", results], ["export", "toy", "-o", "m"], ["status", "--run", "toy"], ["list"]):
        assert call(*command)[0] == 0


@pytest.mark.parametrize("left", [-5, 100, 3])
def test_audit_names_the_cut_line_of_the_ledger(call: CommandLine, results: Path, left: int) -> None:
    cut(results / "ledger.jsonl", left)
    code, _, err = call("audit", results)
    assert code == 1
    assert f"ledger.jsonl, line {1 if left == 3 else 2} is no JSON" in err
    assert "restore it from a backup" in err


@pytest.mark.parametrize("text", ["", json.dumps(LEDGER[0]) + "\n"])
def test_audit_finds_whole_lines_that_are_missing(call: CommandLine, results: Path, text: str) -> None:
    (results / "ledger.jsonl").write_text(text)
    code, out, _ = call("audit", results)
    assert code == 1
    assert "the head is 2" in out


@pytest.mark.parametrize("line", ["[]", "1", "{}", '"x"'])
def test_audit_names_a_line_that_is_no_record(call: CommandLine, results: Path, line: str) -> None:
    (results / "ledger.jsonl").write_text(line)
    assert "ledger.jsonl, line 1" in call("audit", results)[2]


@pytest.mark.parametrize("content", [b"", b'{"run": "to', b"[]", b"\xff\xfe", b"{}"])
def test_damaged_summary_is_named(call: CommandLine, results: Path, content: bytes) -> None:
    (results / "summary.json").write_bytes(content)
    for command in (["audit", results], ["export", "toy", "-o", "m"], ["status", "--run", "toy"]):
        code, _, err = call(*command)
        assert code == 1
        assert "summary.json" in err


def test_list_shows_the_other_runs_beside_a_damaged_one(call: CommandLine, results: Path) -> None:
    (results.parent / "bad").mkdir()
    (results.parent / "bad" / "summary.json").touch()
    code, out, err = call("list", "--json")
    assert code == 0
    assert {row["run"]: (row["state"], row["version"]) for row in json.loads(out)} == {
        "bad": ("damaged", None),
        "toy": ("ended", 2),
    }
    assert "bad/summary.json is no JSON" in err


@pytest.mark.parametrize("left", [0, 7, 60, -1])
def test_export_of_a_cut_model_writes_nothing(call: CommandLine, results: Path, left: int) -> None:
    cut(results / "model.safetensors", left)
    code, _, err = call("export", "toy", "-o", "m.safetensors")
    assert code == 1
    assert "model.safetensors cannot be read" in err
    assert not Path("m.safetensors").exists()


@pytest.mark.parametrize("name", ["summary.json", "ledger.jsonl"])
def test_missing_result_file_is_named(call: CommandLine, results: Path, name: str) -> None:
    (results / name).unlink()
    code, _, err = call("audit", results)
    assert code == 1
    assert name in err or "no run" in err


def test_damaged_replay_is_named(call: CommandLine, results: Path) -> None:
    (results / "replay").mkdir()
    (results / "replay" / "config.json").write_text("{")
    code, _, err = call("audit", results)
    assert code == 1
    assert "replay has a damaged file" in err

"""Hooks of a run on this machine, in the coordinator's process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import fedqueue
from tests.support.programs import Program, read_results
from tests.tracking.test_feed import Recorder, without_token

pytestmark = [pytest.mark.slow, pytest.mark.server, pytest.mark.timeout(600)]

HOOKS = """
import json, os, sys
from fedqueue import RunHooks

class Log(RunHooks):
    def __init__(self, path):
        self.lines = open(path, "w")
    def on_version(self, record):
        print(json.dumps(["version", record["version"], self.progress.updates]), file=self.lines)
    def on_evaluation(self, version, metrics):
        print(json.dumps(["evaluation", version, self.progress.updates]), file=self.lines)
    def on_end(self, summary):
        print(json.dumps(["end", summary["folder"], self.progress.updates]), file=self.lines, flush=True)

class Raises(RunHooks):
    def on_evaluation(self, version, metrics):
        raise OSError("no space left")

class Hangs(RunHooks):
    def on_version(self, record):
        os.dup2(os.pipe()[0], 0)
        sys.stdin.buffer.readline()  # as a question on the terminal; Python needs the lock of it when it ends
"""
TRACKERS = """
[trackers]
use = ["hooks.py:Log", "hooks.py:Raises", "hooks.py:Hangs"]
options = { "hooks.py:Log" = { path = "calls.jsonl" } }
end_seconds = 0.5
"""


def test_run_is_followed_and_survives_its_hooks(config: Path, start: Callable[..., Program], tmp_path: Path) -> None:
    (tmp_path / "hooks.py").write_text(HOOKS)
    config.write_text(config.read_text() + TRACKERS)
    program = start("fedqueue_coordinator", "run", config, "--workers", 2, "--output", "out")
    assert program.wait() == 0, program.text
    _, ledger = read_results(tmp_path / "out")
    merged, expected = 0, []
    updates = {0: 0}
    for record in ledger:
        if record["kind"] == "version":
            merged += len(record["merged"])
            updates[record["version"]] = merged
            expected.append(["version", record["version"], merged])
        elif record["kind"] == "evaluation":
            expected.append(["evaluation", record["version"], updates[record["version"]]])
    calls = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    assert calls == [*expected, ["end", "out", merged]]
    for text in (program.text, (tmp_path / "out" / "coordinator.log").read_text()):
        assert text.count("tracker failed and is left out; the run is not affected") == 1
        assert "OSError: no space left; in on_evaluation (hooks.py:" in text
        assert "tracker did not come to its end within trackers.end_seconds, and is left out" in text


def test_hooks_of_a_script_follow_its_run(config: Path, tmp_path: Path) -> None:
    hooks = Recorder()
    result = fedqueue.run(config, workers=2, versions=3, folder=tmp_path / "out", hooks=[hooks])
    assert hooks.of("version") == [without_token(r) for r in result.ledger if r["kind"] == "version"]
    assert [version for version, _ in hooks.of("evaluation")] == [point["version"] for point in result.history]
    [summary] = hooks.of("end")
    assert (summary["complete"], summary["folder"]) == (True, str(tmp_path / "out"))
    assert summary["versions"] == result.version == 3

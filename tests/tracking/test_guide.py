"""The class of the how-to guide, run as a reader would run it."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

import fedqueue
from fedqueue.config.loading import parse_config
from fedqueue_coordinator.tracking.registry import make_trackers
from tests.tracking.test_feed import Line

GUIDE = (Path(__file__).parents[2] / "docs" / "how-to" / "trackers.md").read_text(encoding="utf-8")
OWN = GUIDE.partition("## Your own in ten lines")[2]
CODE, TOML = (re.findall(rf"```{language}\n(.*?)```", OWN, re.DOTALL)[0] for language in ("python", "toml"))


def test_own_tracker_of_the_guide_has_ten_lines() -> None:
    assert len([line for line in CODE.splitlines() if line.strip()]) <= 10


def test_own_tracker_of_the_guide_writes_a_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hooks.py").write_text(CODE)
    trackers = tomllib.loads(TOML)["trackers"]
    config = parse_config({"task": {"entrypoint": "task.py:T"}, "stop": {"versions": 2}, "trackers": trackers})
    [(_, hooks)] = make_trackers(config.located(tmp_path))
    result = fedqueue.simulate(Line, clients=2, aggregation={"buffer_size": 2}, versions=2, hooks=[hooks])
    lines = [json.loads(line) for line in (tmp_path / "digits.jsonl").read_text().splitlines()]
    assert lines == [
        {"version": point["version"], "updates": 2 * point["version"], "offset": point["offset"]}
        for point in result.history
    ]

"""The short form of a benchmark runs, and its figures are there; what they are is not asked here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.timeout(600)
def test_quick_benchmark_of_the_encodings_prints_both_tables_and_writes_them(tmp_path):
    file = tmp_path / "rows.json"
    command = [sys.executable, str(BENCHMARKS / "compression.py"), "--quick", "--json", str(file)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    rows = json.loads(file.read_text())
    whole, small = rows["digits"]
    assert (whole["up"], whole["down"]) == (1.0, 1.0)
    assert small["both"] < 0.3
    assert {row["compression"]["up"] for row in rows["speed"]} == {
        "float16", "bfloat16", "int8", "topk", "randomk", "float32",
    }  # fmt: skip
    assert ended.stdout.count("|---|") >= 2

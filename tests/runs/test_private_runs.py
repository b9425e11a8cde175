"""`fedqueue run` with noise for rows: budgets that end, what leaves, and what the operator sees."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.programs import Program, read_results

pytestmark = [pytest.mark.slow, pytest.mark.server, pytest.mark.timeout(600)]

HOSPITALS = Path(__file__).parents[2] / "examples" / "hospitals" / "federation.toml"
NOISE = ("--set", "privacy.examples.max_grad_norm=1.0", "--set", "privacy.examples.delta=1e-4")


def test_run_ends_when_every_budget_is_used_up(start: Callable[..., Program], tmp_path: Path) -> None:
    program = start(
        "fedqueue_coordinator", "run", HOSPITALS, "--output", "out", *NOISE, "--set", "training.local_steps=3",
        "--set", "privacy.examples.epsilon=3", "--set", "privacy.examples.jobs=3",
    )  # fmt: skip
    assert program.wait() == 0, program.text
    summary, ledger = read_results(tmp_path / "out")
    assert summary["stopped_because"].startswith("no site trains further jobs: ")
    assert summary["privacy"].startswith("rows: noise for ε = 3 in 3 jobs of a client, norm 1, δ = 0.0001")
    assert summary["privacy"] in program.text
    assert summary["complete"]
    merged = [line for record in ledger if record["kind"] == "version" for line in record["merged"]]
    assert {line["client"] for line in merged} == {"cleveland", "hungary", "switzerland", "va"}
    assert not [line for line in merged if line.get("metrics")], "metrics of rows"
    logs = "".join(path.read_text() for path in (tmp_path / "out" / "logs").glob("worker-*.log"))
    assert logs.count("has spent ε = 3.000 at δ = 0.0001 in 3 jobs") == 4
    assert not (tmp_path / "out" / "unfinished").exists()


def test_site_leaves_its_client_out_of_a_run_without_noise(start: Callable[..., Program], tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text("max_epsilon = 8.0\ndelta = 1e-4\n")
    program = start(
        "fedqueue_coordinator", "run", HOSPITALS, "--output", "out", "--set", "security.policy=policy.toml",
    )  # fmt: skip
    assert program.wait() == 1, program.text
    assert "this site's policy: max_epsilon: the job adds no noise, and this site allows at most ε = 8" in program.text

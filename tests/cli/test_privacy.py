"""`fedqueue privacy`: what rows would spend, before a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedqueue.privacy.accountant import epsilon_of, step_rdp
from tests.support.command_line import CommandLine

ROOT = Path(__file__).parents[2]
CONFIG = f"""
name = "toy"
[task]
entrypoint = "{ROOT}/tests/support/toy_task.py:ToyTask"
[clients]
names = ["north", "south"]
[training]
batch_size = 24
[stop]
versions = 20
"""
ON = """
[privacy.examples]
max_grad_norm = 1.0
noise_multiplier = 1.5
delta = 1e-4
"""
BUDGET = ON.replace("noise_multiplier = 1.5", "epsilon = 3.0\njobs = 40")


def written(folder: Path, text: str) -> Path:
    path = folder / "federation.toml"
    path.write_text(text)
    return path


def test_table_has_every_client_with_its_own_figures(call: CommandLine, folder: Path) -> None:
    code, out, _ = call("privacy", written(folder, CONFIG + ON), "--json", "--rows", "south=240")
    north, south = json.loads(out)["clients"]
    assert code == 0
    assert (north["client"], north["rows"], north["sampling_rate"]) == ("north", 96, 0.25)  # counted by the task
    assert (south["client"], south["rows"], south["sampling_rate"]) == ("south", 240, 0.1)
    for cost, rate, steps in ((north, 0.25, 4), (south, 0.1, 10)):
        assert cost["steps_per_job"] == steps
        for jobs in (1, 10, 100):
            expected = epsilon_of(jobs * steps * step_rdp(rate, 1.5), 1e-4)
            assert cost["epsilon_after"][str(jobs)] == pytest.approx(expected)
        most = cost["jobs_within_budget"]
        assert epsilon_of(most * steps * step_rdp(rate, 1.5), 1e-4) <= 8.0
        assert epsilon_of((most + 1) * steps * step_rdp(rate, 1.5), 1e-4) > 8.0


def test_verdict_says_what_the_run_will_cost(call: CommandLine, folder: Path) -> None:
    _, out, _ = call("privacy", written(folder, CONFIG + ON), "--rows", "96")
    assert "[stop] asks for about 40 jobs of each client" in out
    assert "for north, a guarantee that is weak" in out
    assert "not covered: how many rows a client has" in out
    _, out, _ = call("privacy", written(folder, CONFIG + BUDGET), "--rows", "5000")
    assert "ε = 3.00 for north, a guarantee that is moderate" in out
    assert "too large" not in out or "δ" in out


def test_delta_that_is_too_large_for_the_rows_is_told(call: CommandLine, folder: Path) -> None:
    path = written(folder, CONFIG + ON.replace("1e-4", "1e-2"))
    _, out, _ = call("privacy", path, "--rows", "north=50", "--rows", "south=5")
    assert "δ = 0.01 is too large for north" in out
    assert "at most 0.002" in out


def test_epsilon_shows_the_noise_that_keeps_to_it(call: CommandLine, folder: Path) -> None:
    _, out, _ = call("privacy", written(folder, CONFIG + BUDGET), "--rows", "300", "--json")
    for cost in json.loads(out)["clients"]:
        assert cost["jobs_within_budget"] == 40
        noise = cost["noise_multiplier"]
        assert epsilon_of(40 * 13 * step_rdp(24 / 300, noise), 1e-4) == pytest.approx(3.0, abs=2e-3)


@pytest.mark.parametrize(
    ("text", "options", "problem"),
    [
        (CONFIG, [], "privacy.examples: is off"),
        (CONFIG + ON, ["--rows", "west=5"], "--rows = 'west=5': no number of rows, or no client"),
        (CONFIG + ON, ["--rows", "0"], "--rows = '0': no number of rows"),
        (CONFIG + BUDGET.replace("3.0", "1e-6"), ["--rows", "9"], "privacy.examples.epsilon = 1e-06: no noise"),
    ],
)
def test_mistake_is_one_line(call: CommandLine, folder: Path, text: str, options: list[str], problem: str) -> None:
    code, _, err = call("privacy", written(folder, text), *options)
    assert code == 2
    assert problem in err
    assert err.count("\n") == 1


# Clients

CLIENTS = """
[secure]
keepers = ["university", "office"]
min_cohort = 2
[aggregation]
strategy = "fedbuff"
buffer_size = 2
running_statistics = "frozen"
[privacy.clients]
clip_norm = 1.0
epsilon = 8.0
max_participations = 20
delta = 1e-5
"""


def test_noise_and_versions_of_clients_are_shown(call: CommandLine, folder: Path) -> None:
    """z = √P / μ, and μ(8, 1e-5) = 1.666 by the accountant of dp-accounting."""
    code, out, _ = call("privacy", written(folder, CONFIG + CLIENTS), "--json")
    assert code == 0
    cost = json.loads(out)["privacy_of_clients"]
    assert cost["noise_multiplier"] == pytest.approx(20**0.5 / 1.666, rel=1e-3)
    assert (cost["participations"], cost["versions"]) == (20, 20)
    assert cost["epsilon"] == pytest.approx(8.0, rel=1e-6)
    assert cost["epsilon_of_one"] < 2


def test_verdict_warns_where_noise_drowns_the_clients(call: CommandLine, folder: Path) -> None:
    _, out, _ = call("privacy", written(folder, CONFIG + CLIENTS))
    assert out.startswith("toy: differential privacy of clients\n")
    assert "expect no learning: with 2 clients per version the noise" in out
    assert "use [privacy.examples]" in out
    assert "not covered for clients: who trained when" in out


def test_rows_and_clients_are_shown_together(call: CommandLine, folder: Path) -> None:
    text = CONFIG + CLIENTS + BUDGET
    _, out, _ = call("privacy", written(folder, text), "--rows", "96")
    assert "differential privacy of rows" in out
    assert "clients, δ = 1e-05: noise multiplier" in out

"""Runs with client privacy: they end once the budgets are used up, and their records say what was spent."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from fedqueue import Client, Task
from fedqueue.config.loading import parse_config
from fedqueue.errors import ConfigurationError
from fedqueue.privacy.gaussian_dp import gaussian_epsilon
from fedqueue_coordinator.core.run_counters import RunCounters
from fedqueue_coordinator.core.run_summary import RunResult, describe_client_privacy, spent_by_client, summarize
from fedqueue_coordinator.operator.audit.masked_versions import check_masked_versions
from fedqueue_coordinator.simulation.virtual_clock import ClientDatasets, Simulation, TimingModel
from tests.support.builders import same_bits
from tests.support.masked_federation import start_masked
from tests.support.toy_task import points

PRIVACY = {"clip_norm": 1.0, "noise_multiplier": 0.5, "max_participations": 3, "delta": 1e-3}


class PointsTask(Task):
    def __init__(self, diverges: bool = False) -> None:
        self.diverges = diverges

    def model(self) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))

    def train_data(self, client: Client) -> Any:
        rows = points(60, seed=1 + (client.partition or 0))
        if self.diverges and client.id == "client-0":
            return TensorDataset(rows.tensors[0] * float("nan"), rows.tensors[1])
        return rows

    def test_data(self) -> TensorDataset:
        return points(200, seed=0)


def settings(privacy: dict[str, Any] | None = None, keepers: int = 2, **sections: Any) -> dict[str, Any]:
    return {
        "task": {"entrypoint": "task.py:PointsTask"}, "clients": {"count": 6},
        "training": {"device": "cpu", "batch_size": 15, "learning_rate": 0.1}, "aggregation": {"buffer_size": 4},
        "secure": {"keepers": ["one", "two"][:keepers]}, "privacy": {"clients": privacy or PRIVACY},
        "stop": {"versions": 30}, **sections,
    }  # fmt: skip


def simulate(task: Task, privacy: dict[str, Any] | None = None, **sections: Any) -> RunResult:
    return Simulation(parse_config(settings(privacy, **sections)), ClientDatasets(task), TimingModel()).run()


def versions(result: RunResult) -> list[dict[str, Any]]:
    return [dict(record) for record in result.ledger if record["kind"] == "version"]


def test_run_ends_once_too_few_clients_have_budget_left() -> None:
    result = simulate(PointsTask())
    assert not result.failed
    assert "clients are used up, and a version needs 3 clients" in result.stopped_because
    spent: Counter[str] = Counter()
    for record in versions(result):
        loads: Counter[str] = Counter()
        for line in record["merged"]:
            loads[line["client"]] += line["level"]
        assert record["privacy"]["loads"] == loads
        assert max(loads.values()) <= 8
        spent.update({client: load**2 for client, load in loads.items()})
        assert record["privacy"]["mu_max"] == pytest.approx((max(spent.values()) ** 0.5) / (0.5 * 8))
        assert record["privacy"]["epsilon_max"] == pytest.approx(gaussian_epsilon(record["privacy"]["mu_max"], 1e-3))
    assert max(spent.values()) <= 3 * 64
    assert sum(account > 2 * 64 for account in spent.values()) >= 4


def test_run_may_end_with_the_first_used_up_budget() -> None:
    result = simulate(PointsTask(), {**PRIVACY, "on_budget": "stop"})
    assert not result.failed
    assert result.stopped_because.endswith("is used up (privacy.clients.on_budget)")
    spent = RunCounters.from_ledger({}, result.ledger, 10).accounts
    assert any(account > 2 * 64 for account in spent.values())
    before_last = [record for record in result.ledger if record["kind"] in ("spend", "version")][:-2]
    assert all(account <= 2 * 64 for account in RunCounters.from_ledger({}, before_last, 10).accounts.values())
    assert result.version == len(versions(result))


def test_stop_at_a_budget_needs_a_budget() -> None:
    with pytest.raises(ConfigurationError, match="on_budget has no effect without noise"):
        parse_config({**settings(), "privacy": {"clients": {"on_budget": "stop"}}})


def test_client_without_budget_gets_no_job() -> None:
    """Behind a barrier no job is under way when a version is made: three rounds of all clients, and no job more."""
    result = simulate(PointsTask(), aggregation={"buffer_size": 6, "barrier": True})
    assert not result.failed
    assert (result.version, result.jobs_dispatched) == (3, 18)
    assert "the privacy budgets of 6 of 6 clients are used up" in result.stopped_because


def test_no_keeper_has_to_refuse_a_budget() -> None:
    """The coordinator's own account is that of the keepers."""
    reasons = Counter(r.get("reason") for r in simulate(PointsTask()).ledger if r["kind"] == "rejected")
    assert set(reasons) <= {"budget", "run_ended"}
    details = [r["detail"] for r in simulate(PointsTask()).ledger if r.get("reason") == "budget"]
    assert [detail for detail in details if "keeper" in detail] == []


def test_cohort_that_becomes_no_version_is_charged() -> None:
    """The keepers have released its sum, whatever the coordinator makes of it."""
    run = start_masked(
        *"abcdef", buffer_size=3, min_cohort=3, privacy={"clients": {**PRIVACY, "max_participations": 9}}
    )
    run.post_masked("a", 1.0, lie=2**31 - 1)
    for client in "bc":
        run.post_masked(client, 1.0)
    assert run.federation.version == 0
    [spend] = [record for record in run.ledger if record["kind"] == "spend"]
    assert (spend["version"], spend["loads"]) == (1, {"a": 1, "b": 1, "c": 1})
    for client in "def":
        run.post_masked(client, 1.0)
    assert run.federation.version == 1
    assert RunCounters.from_ledger({}, run.ledger, 10).accounts == dict.fromkeys("abcdef", 1)
    assert set(spent_by_client(run.ledger)) == set("abcdef")
    summary = summarize("run", "fedbuff", 0, "", run.ledger, {})
    assert set(summary["client_epsilon"]) == set("abcdef")


def test_accounts_are_restored_from_the_ledger() -> None:
    result = simulate(PointsTask())
    restored = RunCounters.from_ledger({}, result.ledger, 10)
    spent: Counter[str] = Counter()
    for record in versions(result):
        spent.update({client: load**2 for client, load in record["privacy"]["loads"].items()})
    assert restored.accounts == spent


def audited(ledger: list[dict[str, Any]]) -> list[str]:
    return list(check_masked_versions(parse_config(settings()), ledger).budget_problems)


def test_audit_recomputes_what_was_spent() -> None:
    ledger = [dict(record) for record in simulate(PointsTask()).ledger if record["kind"] in ("version", "spend")]
    assert audited(ledger) == []
    assert "above its budget of" in audited([*ledger, ledger[0] | {"version": len(ledger) // 2 + 1}])[0]
    for name, lie in (("epsilon_max", 0.1), ("loads", {}), ("noise_multiplier", 9.0)):
        changed = copy.deepcopy(ledger)
        changed[3]["privacy"][name] = lie
        [problem] = audited(changed)
        assert problem.startswith(f"version 2: its record says {name} = {lie}")
    del changed[1]["privacy"]
    assert any("version 1: its record says loads = None" in problem for problem in audited(changed))


def test_audit_misses_a_version_that_was_not_charged() -> None:
    ledger = [record for record in simulate(PointsTask()).ledger if record["kind"] in ("version", "spend")]
    assert audited(ledger[1:])[0] == "version 1 was not charged before it was made"
    assert audited([ledger[0], ledger[0], *ledger[1:]])[0] == "a cohort for version 1 was charged twice"


def test_summary_says_what_each_client_has_spent() -> None:
    result = simulate(PointsTask())
    summary = summarize("run", "fedbuff", 0, result.stopped_because, result.ledger, {})
    worst = versions(result)[-1]["privacy"]["epsilon_max"]
    assert max(summary["client_epsilon"].values()) == pytest.approx(worst, abs=1e-6)
    assert len(summary["client_epsilon"]) == 6
    said = describe_client_privacy(summary)
    assert f"the most that one has spent is ε = {worst:.3f}" in said
    assert "not covered: who trained when" in said
    assert describe_client_privacy(summarize("run", "fedbuff", 0, "", [], {})) == ""


@pytest.mark.parametrize(
    ("privacy", "said"),
    [
        (PRIVACY, "clients: noise multiplier 0.5, at most 3 fresh updates of a client, norm 1, δ = 0.001"),
        ({"clip_norm": 2.0, "delta": 0.1, "epsilon": 8.0, "noise_multiplier": 1.5}, "1.5, at most ε = 8 of a client"),
        ({"clip_norm": 2.0, "delta": 0.1, "epsilon": 8.0, "max_participations": 3}, "noise for ε = 8 in 3 fresh"),
    ],
)
def test_sentence_of_a_run_names_its_noise(privacy: dict[str, Any], said: str) -> None:
    assert said in parse_config(settings(privacy)).privacy.sentence


def test_update_that_is_not_finite_counts_as_zero(capsys: pytest.CaptureFixture[str]) -> None:
    result = simulate(PointsTask(diverges=True), {**PRIVACY, "max_participations": 20}, stop={"versions": 4})
    merged = [line["client"] for record in versions(result) for line in record["merged"]]
    assert "client-0" in merged
    assert [
        record
        for record in result.ledger
        if record["kind"] == "abandoned" and record["client"] == "client-0" and record["reason"] == "failed"
    ] == []
    assert torch.isfinite(result.model.parameters).all()
    assert "the update counts as zero, and only this log says so" in capsys.readouterr().out


def test_private_simulation_can_be_repeated() -> None:
    first, second = simulate(PointsTask()), simulate(PointsTask())
    assert same_bits(first.model, second.model)
    assert not same_bits(first.model, simulate(PointsTask(), {**PRIVACY, "noise_multiplier": 0.51}).model)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"keepers": 0}, "is on without keepers, who add the noise"),
        ({"privacy": {**PRIVACY, "epsilon": 1.0}}, "sets noise_multiplier, epsilon, max_participations of"),
        ({"privacy": {"clip_norm": 1.0, "delta": 1e-5}}, "sets none of noise_multiplier"),
        ({"privacy": {k: v for k, v in PRIVACY.items() if k != "delta"}}, "delta is missing"),
        ({"privacy": {k: v for k, v in PRIVACY.items() if k != "clip_norm"}}, "clip_norm is missing"),
        ({"secure": {"keepers": ["one"], "clip_norm": 3.0}}, "secure.clip_norm cannot be set beside"),
        (
            {"aggregation": {"strategy": "fedavg"}, "secure": {"keepers": ["one"], "max_examples": 9}},
            "strategy cannot be 'fedavg' with",
        ),
    ],
)
def test_settings_that_would_protect_less_are_refused(changed: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem):
        parse_config(settings(**changed))

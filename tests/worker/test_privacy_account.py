"""A site's account of spent privacy: charged before training, over restarts and runs, and what it refuses."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch

from fedqueue import Client, Progress, Task, TrainResult
from fedqueue.config.privacy import ExamplePrivacyConfig
from fedqueue.config.training import TrainingConfig
from fedqueue.errors import BudgetSpent, ConfigurationError, LoadFailed, PolicyRefusal
from fedqueue.privacy.accountant import epsilon_of, step_rdp
from fedqueue.privacy.spending import Charge
from fedqueue.protocol.messages import Ending, Update, read
from fedqueue_worker.egress_log import NO_EGRESS_LOG
from fedqueue_worker.job_runner import JobRunner
from fedqueue_worker.policy import ALLOW_ALL, Policy, load_policy
from fedqueue_worker.privacy_account import PrivacyAccount
from fedqueue_worker.process import Worker, new_token
from tests.support.sample_run import SampleRun
from tests.support.small_task import SmallTask
from tests.support.training_site import TrainingSite

DELTA = 1e-5
PRIVACY = ExamplePrivacyConfig(max_grad_norm=1.0, noise_multiplier=2.0, delta=DELTA)
CHARGE = Charge(0.1, 2.0, 10)


def cost(jobs: int) -> float:
    return epsilon_of(10 * jobs * step_rdp(0.1, 2.0), DELTA)


def limited(epsilon: float) -> Policy:
    return Policy(max_epsilon=epsilon, delta=DELTA)


@pytest.fixture(autouse=True)
def logs() -> Iterator[Any]:
    with structlog.testing.capture_logs() as captured:
        yield captured


def test_account_outlives_its_process_and_adds_up_over_runs(tmp_path: Path) -> None:
    for run in ("first", "first", "second"):
        PrivacyAccount(tmp_path, "north", ALLOW_ALL).charge(run, CHARGE, PRIVACY)
    account = PrivacyAccount(tmp_path, "north", ALLOW_ALL)
    assert account.spending.epsilon(DELTA) == cost(3)
    assert account.spending.of_run("first").epsilon(DELTA) == cost(2)
    record = json.loads((tmp_path / "privacy-north.json").read_text())
    assert (record["client"], record["epsilon"], record["delta"]) == ("north", cost(3), DELTA)
    assert stat.S_IMODE((tmp_path / "privacy-north.json").stat().st_mode) == 0o600
    assert PrivacyAccount(tmp_path, "south", ALLOW_ALL).spending.jobs == 0


def test_processes_of_a_site_see_each_others_charges(tmp_path: Path) -> None:
    first, second = (PrivacyAccount(tmp_path, "north", limited(cost(3))) for _ in range(2))
    first.charge("a", CHARGE, PRIVACY)
    second.charge("b", CHARGE, PRIVACY)
    first.charge("a", CHARGE, PRIVACY)
    with pytest.raises(BudgetSpent):
        second.charge("b", CHARGE, PRIVACY)


def test_job_beyond_the_budget_is_refused_with_the_figures(tmp_path: Path) -> None:
    account = PrivacyAccount(tmp_path, "north", limited(cost(2)))
    account.charge("r", CHARGE, PRIVACY)
    account.charge("r", CHARGE, PRIVACY)
    line = (
        rf"^max_epsilon: the job would bring north to ε = {cost(3):.3f} at δ = 1e-05, and this site allows at most "
        rf"{cost(2):g} \({cost(2):.3f} spent in 2 jobs\)$"
    )
    for step in (account.charge, account.require_affordable):
        with pytest.raises(BudgetSpent, match=line):
            step("r", CHARGE, PRIVACY)
    assert PrivacyAccount(tmp_path, "north", ALLOW_ALL).spending.jobs == 2, "a refused job costs nothing"


def test_epsilon_of_a_run_counts_that_run_only(tmp_path: Path) -> None:
    privacy = ExamplePrivacyConfig(max_grad_norm=1.0, epsilon=cost(2), jobs=2, delta=DELTA)
    account = PrivacyAccount(tmp_path, "north", ALLOW_ALL)
    account.charge("other", CHARGE, PRIVACY)
    account.charge("r", CHARGE, privacy)
    account.charge("r", CHARGE, privacy)
    with pytest.raises(BudgetSpent, match=r"privacy.examples.epsilon: .* run 'r' allows at most"):
        account.charge("r", CHARGE, privacy)


def test_summary_names_all_spending_and_that_of_the_run(tmp_path: Path) -> None:
    account = PrivacyAccount(tmp_path, "north", limited(8.0))
    account.charge("a", CHARGE, PRIVACY)
    account.charge("b", CHARGE, PRIVACY)
    assert account.summary("b", PRIVACY) == (
        f"north has spent ε = {cost(2):.3f} of 8 at δ = 1e-05 in 2 jobs, and {cost(1):.3f} in the 1 of this run "
        "(privacy-north.json)"
    )


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 2}', '{"format":1,"client":"north","epsilon":1.0}'])
def test_damaged_account_is_an_error_and_stays_as_it_is(tmp_path: Path, text: str) -> None:
    path = tmp_path / "privacy-north.json"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=r"no privacy account can be read .*damaged.*restore it from a backup"):
        PrivacyAccount(tmp_path, "north", ALLOW_ALL)
    assert path.read_text() == text


def test_account_of_another_client_is_an_error(tmp_path: Path) -> None:
    PrivacyAccount(tmp_path, "north", ALLOW_ALL).charge("r", CHARGE, PRIVACY)
    (tmp_path / "privacy-north.json").rename(tmp_path / "privacy-south.json")
    with pytest.raises(ConfigurationError, match="is the account of north"):
        PrivacyAccount(tmp_path, "south", ALLOW_ALL)


def test_account_deleted_while_a_worker_runs_stops_its_jobs(tmp_path: Path) -> None:
    account = PrivacyAccount(tmp_path, "north", ALLOW_ALL)
    account.charge("r", CHARGE, PRIVACY)
    (tmp_path / "privacy-north.json").unlink()
    with pytest.raises(PolicyRefusal, match="lists 0 jobs, and listed 1 before"):
        account.charge("r", CHARGE, PRIVACY)


def test_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=r"privacy.folder = .*cannot be written"):
        PrivacyAccount(tmp_path / "file" / "accounts", "north", ALLOW_ALL)


def test_charge_is_on_the_disk_when_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(handle: int) -> None:
        steps.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    def replaced(path: Path, target: Path) -> Path:
        steps.append("replace")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    PrivacyAccount(tmp_path, "north", ALLOW_ALL).charge("r", CHARGE, PRIVACY)
    assert steps == ["file", "replace", "folder"]


# Jobs


class Rows(Task):
    """The default training, which a test may interrupt."""

    def __init__(self, account: Path) -> None:
        self.fault: BaseException | None = None
        self.spent_at_start: list[int] = []
        self.account = account

    def fit(self, model: torch.nn.Module, data: Any, config: TrainingConfig, progress: Progress) -> TrainResult:
        self.spent_at_start.append(json.loads(self.account.read_text())["spent"][0]["jobs"])
        if self.fault:
            raise self.fault
        fit = super().fit(model, data, config, progress)
        return TrainResult(fit.num_examples, {"mean_age": 61.25})


class PrivateSite(TrainingSite):
    def __init__(self, run: SampleRun, folder: Path, policy: Policy = ALLOW_ALL) -> None:
        super().__init__(run)
        self.folder, self.policy = folder, policy
        self.rows = Rows(folder / "privacy-c0.json")
        self.privacy: ExamplePrivacyConfig | None = PRIVACY
        self.restart()

    def restart(self) -> None:
        """A new process of the site: its memory is empty."""
        torch.manual_seed(0)
        module = torch.nn.Linear(3, 2)
        self.runner = JobRunner(
            self.store, self.rows, module, self.heartbeat, 60, True, {}, self.policy, NO_EGRESS_LOG,
            privacy_folder=self.folder,
        )  # fmt: skip
        self.runner.load(Client("c0"), torch.utils.data.TensorDataset(torch.randn(20, 3), torch.ones(20).long()))

    def train(self, number: int = 1, **callbacks: Any) -> Any:
        self.run.dispatch(number)
        order = self.run.order(number).model_copy(update={"privacy": self.privacy, "seed": 1})
        self.runner.train(order.model_dump(), **callbacks)
        return self.run.coordinator.receive(0.001)

    @property
    def jobs(self) -> int:
        return PrivacyAccount(self.folder, "c0", ALLOW_ALL).spending.jobs


@pytest.fixture
def run(fake_client: Any) -> SampleRun:
    return SampleRun(fake_client, batch_norm=False)


def test_job_is_charged_before_it_trains(run: SampleRun, tmp_path: Path) -> None:
    site = PrivateSite(run, tmp_path)
    [entry] = site.train()
    assert entry.kind == "update"
    assert site.rows.spent_at_start == [1]
    [spent] = PrivacyAccount(tmp_path, "c0", ALLOW_ALL).spending.entries
    assert (spent.run, spent.sampling_rate, spent.noise_multiplier, spent.steps) == ("sample", 1.0, 2.0, 1)


@pytest.mark.parametrize("fault", [RuntimeError("the disk failed"), KeyboardInterrupt(), MemoryError()])
def test_job_that_breaks_off_stays_charged(run: SampleRun, tmp_path: Path, fault: BaseException) -> None:
    site = PrivateSite(run, tmp_path)
    site.rows.fault = fault
    site.train()
    assert site.jobs == 1
    site.restart()
    site.rows.fault = None
    site.train(2)
    assert site.jobs == 2


def test_jobs_of_one_seed_have_noise_of_their_own(run: SampleRun, tmp_path: Path) -> None:
    """One base, one seed, the same rows: equal noise would show what differs, and the coordinator knows the seed."""
    site = PrivateSite(run, tmp_path)
    deltas = [run.posted_frame(entry).parameters.clone() for number in (1, 2) for entry in site.train(number)]
    assert not torch.equal(*deltas)


def test_metrics_of_rows_stay_at_the_site(run: SampleRun, tmp_path: Path) -> None:
    [entry] = PrivateSite(run, tmp_path).train()
    header = read(Update, entry.body)
    assert (header.metrics, header.examples) == ({}, 20)
    assert b"61.25" not in entry.body


def test_text_of_an_exception_stays_at_the_site(run: SampleRun, tmp_path: Path, logs: Any) -> None:
    site = PrivateSite(run, tmp_path)
    site.rows.fault = ValueError("row 7: Ada Lovelace, born 1815")
    [entry] = site.train()
    ending = read(Ending, entry.body)
    assert (ending.reason, ending.final) == ("failed", False)
    assert ending.error == "ValueError: its text stays at the site, whose rows are protected"
    assert any("Ada" in str(line.get("error")) for line in logs), "the site's own log has it"


def test_used_up_budget_ends_the_jobs_of_the_client(run: SampleRun, tmp_path: Path) -> None:
    one_job = epsilon_of(step_rdp(1.0, 2.0), DELTA)
    site = PrivateSite(run, tmp_path, limited(one_job * 1.01))
    [first] = site.train()
    site.restart()
    [second] = site.train(2)
    ending = read(Ending, second.body)
    assert first.kind == "update"
    assert (ending.reason, ending.final) == ("refused", True)
    assert f"max_epsilon: the job would bring c0 to ε = {epsilon_of(2 * step_rdp(1.0, 2.0), DELTA):.3f}" in ending.error
    assert site.rows.spent_at_start == [1]
    assert site.jobs == 1


@pytest.mark.parametrize(
    ("policy", "line"),
    [
        (limited(8.0), "max_epsilon: the job adds no noise, and this site allows at most ε = 8; the coordinator's "
         "configuration needs [privacy.examples]"),
        (Policy(require=["privacy.examples"]), "require: the job adds no noise, which this site requires; the "
         "coordinator's configuration needs [privacy.examples]"),
    ],
)  # fmt: skip
def test_order_without_noise_is_refused(run: SampleRun, tmp_path: Path, policy: Policy, line: str) -> None:
    site = PrivateSite(run, tmp_path, policy)
    site.privacy = None
    [entry] = site.train()
    ending = read(Ending, entry.body)
    assert (ending.reason, ending.error) == ("refused", line)
    assert site.rows.spent_at_start == []
    site.privacy = PRIVACY
    [entry] = site.train(2)
    assert entry.kind == "update"


def test_no_job_trains_that_cannot_be_charged(run: SampleRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    site = PrivateSite(run, tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    [entry] = site.train()
    ending = read(Ending, entry.body)
    assert (ending.reason, ending.final) == ("refused", False)
    assert "cannot be written (No space left on device), and no job trains uncharged" in ending.error
    assert site.rows.spent_at_start == []


def test_unprotected_job_opens_no_account(run: SampleRun, tmp_path: Path) -> None:
    site = PrivateSite(run, tmp_path / "none")
    site.rows.account = tmp_path / "elsewhere.json"
    site.rows.account.write_text('{"spent": [{"jobs": 0}]}')
    site.privacy = None
    [entry] = site.train()
    assert entry.kind == "update"
    assert read(Update, entry.body).metrics["mean_age"] == 61.25
    assert not (tmp_path / "none").exists()
    assert site.runner.privacy_spent() == []


# Joining a run


class TwentyRows(SmallTask):
    def __init__(self, batch_norm: bool = False) -> None:
        super().__init__(batch_norm)
        self.loaded = 0

    def train_data(self, client: Client) -> Any:
        self.loaded += 1
        return torch.utils.data.TensorDataset(torch.randn(20, 3), torch.ones(20).long())


def joining(client: Any, folder: Path, policy: Policy, noise: bool = True, task: Task | None = None) -> Worker:
    """A worker of client-0 of a run that is under way."""
    examples = PRIVACY.model_dump() if noise else {}
    privacy = {"examples": examples, "folder": str(folder)}
    run = SampleRun(client, batch_norm=isinstance(task, TwentyRows) and task._batch_norm, privacy=privacy)
    return Worker(run.config, task or TwentyRows(), run.worker(new_token()), policy)


@pytest.mark.usefixtures("process_restored")
def test_used_up_client_takes_no_part(fake_client: Any, tmp_path: Path) -> None:
    worker = joining(fake_client, tmp_path, limited(cost(1)))
    PrivacyAccount(tmp_path, "client-0", ALLOW_ALL).charge("before", CHARGE, PRIVACY)
    with pytest.raises(LoadFailed, match=r"client-0: this site's policy: max_epsilon: the job would bring client-0"):
        worker.run([["client-0"]])


@pytest.mark.usefixtures("process_restored")
def test_run_without_noise_is_declined_unread(fake_client: Any, tmp_path: Path) -> None:
    task = TwentyRows()
    with pytest.raises(LoadFailed, match=r"client-0: this site's policy: max_epsilon: the job adds no noise"):
        joining(fake_client, tmp_path, limited(8.0), noise=False, task=task).run([["client-0"]])
    assert task.loaded == 0


@pytest.mark.usefixtures("process_restored")
def test_damaged_account_ends_the_worker(fake_client: Any, tmp_path: Path) -> None:
    (tmp_path / "privacy-client-0.json").write_text("{")
    with pytest.raises(ConfigurationError, match="no privacy account can be read there"):
        joining(fake_client, tmp_path, ALLOW_ALL).run([["client-0"]])


@pytest.mark.usefixtures("process_restored")
def test_model_that_mixes_rows_ends_the_worker(fake_client: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"the model has BatchNorm1d \(1\)"):
        joining(fake_client, tmp_path, ALLOW_ALL, task=TwentyRows(batch_norm=True)).run([["client-0"]])


@pytest.mark.usefixtures("process_restored")
def test_last_lines_say_what_was_spent(fake_client: Any, tmp_path: Path) -> None:
    worker = joining(fake_client, tmp_path, limited(8.0))
    worker.run([["client-0"]], burst=True)
    assert worker.privacy_spent == [
        "client-0 has spent ε = 0.000 of 8 at δ = 1e-05 in 0 jobs, and 0.000 in the 0 of this run "
        "(privacy-client-0.json)"
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("max_epsilon = 8.0", "policy.toml: max_epsilon has no meaning without delta; set delta"),
        ("delta = 1e-5", "policy.toml: delta has no meaning without max_epsilon; set max_epsilon"),
        ("max_epsilon = 8.0\ndelta = 1.5", "policy.toml: delta = 1.5: must be less than 1"),
        ("max_epsilon = 0.0\ndelta = 1e-5", "policy.toml: max_epsilon = 0.0: must be greater than 0"),
    ],
)
def test_incomplete_budget_in_a_policy_is_an_error(tmp_path: Path, text: str, line: str) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        load_policy(path)
    assert str(caught.value) == line

"""A site's policy, and the egress log of the data that left the site."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import structlog

from fedqueue import Client
from fedqueue.config.secure import SecureConfig
from fedqueue.config.training import TrainingConfig
from fedqueue.errors import ConfigurationError, PolicyRefusal
from fedqueue.protocol.messages import Ending, Registration, Update, read
from fedqueue.protocol.signed_envelope import digest_of
from fedqueue_worker.egress_log import EgressLog, open_egress_log
from fedqueue_worker.job_runner import JobRunner
from fedqueue_worker.policy import ALLOW_ALL, NoPart, Policy, load_policy
from tests.support.sample_run import SampleRun
from tests.support.training_site import Doubling, TrainingSite


@pytest.fixture(autouse=True)
def logs() -> Iterator[Any]:
    with structlog.testing.capture_logs() as captured:
        yield captured


def policy(tmp_path: Path, text: Any) -> Any:
    path = tmp_path / "policy.toml"
    path.write_text(text)
    return load_policy(path)


@pytest.mark.parametrize(
    ("terms", "training", "examples", "refused"),
    [
        ("max_epochs = 5", {"local_epochs": 5}, 100, ""),
        ("max_epochs = 5", {"local_epochs": 6}, 100, "max_epochs: the job asks for 6, this site allows at most 5"),
        ("max_epochs = 2", {"local_steps": 20, "batch_size": 10}, 100, ""),  # ten batches per pass
        ("max_epochs = 2", {"local_steps": 21, "batch_size": 10}, 100, "max_epochs: the job asks for 3, .* at most 2"),
        ("max_steps = 20", {"local_epochs": 2, "batch_size": 10}, 100, ""),
        ("max_steps = 20", {"local_epochs": 2, "batch_size": 10}, 101, "max_steps: the job asks for 22, .* at most 20"),
        ("max_steps = 20", {"local_steps": 21}, 5, "max_steps: the job asks for 21, this site allows at most 20"),
        ("min_examples = 50", {}, 50, ""),
        ("min_examples = 50", {}, 49, "min_examples: the client has 49, this site requires 50"),
        ('require = ["proximal_mu"]', {"proximal_mu": 0.1}, 1, ""),
        ('require = ["proximal_mu"]', {}, 1, "require: the job sets no proximal_mu"),
        ('require = ["clip_norm"]', {}, 1, "require: the job sets no clip_norm"),
        ("", {"local_epochs": 10**6}, 1, ""),
    ],
)  # fmt: skip
def test_refusal_names_the_request_and_the_limit(
    tmp_path: Path, terms: str, training: dict[str, Any], examples: int, refused: str
) -> None:
    site_policy = policy(tmp_path, terms)
    if not refused:
        site_policy.check_job(TrainingConfig(**training), examples)
        return
    with pytest.raises(PolicyRefusal, match=refused):
        site_policy.check_job(TrainingConfig(**training), examples)


def test_only_allowed_entrypoints_may_run() -> None:
    Policy(entrypoints=["task.py:A"]).check_task("task.py:A")
    ALLOW_ALL.check_task("any.py:Thing")
    with pytest.raises(PolicyRefusal, match=r"task 'task.py:B' is not allowed here; allowed entrypoints: task.py:A"):
        Policy(entrypoints=["task.py:A"]).check_task("task.py:B")


TWO = {"keepers": ("north", "south"), "min_cohort": 4}


@pytest.mark.parametrize(
    ("terms", "secure", "refused"),
    [
        ("", {}, ""),
        ('keepers = ["south", "east", "north"]', TWO, ""),
        ("min_keepers = 2", TWO, ""),
        ("min_cohort = 4", TWO, ""),
        ('keepers = ["north"]', {}, "keepers: the run has no keepers, so its coordinator would see"),
        ("min_keepers = 1", {}, "min_keepers: the run has no keepers"),
        ("min_cohort = 2", {}, "min_cohort: the run has no keepers"),
        ('keepers = ["north", "east"]', TWO, "keepers: the run has keeper south; this site accepts north, east"),
        ("keepers = []", TWO, "keepers: the run has keeper north; this site accepts none"),
        ("min_keepers = 3", TWO, r"min_keepers: the run has 2 \(north, south\), this site requires 3"),
        ("min_cohort = 5", TWO, "min_cohort: the run hides an update among 4 clients, this site requires 5"),
    ],
)
def test_a_run_with_too_little_secure_aggregation_is_refused(
    tmp_path: Path, terms: str, secure: dict[str, Any], refused: str
) -> None:
    site_policy = policy(tmp_path, terms)
    if not refused:
        site_policy.check_secure(SecureConfig(**secure))
        return
    with pytest.raises(NoPart, match=refused):
        site_policy.check_secure(SecureConfig(**secure))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("max_epoch = 5", "policy.toml: max_epoch = 5: unknown key; known keys: entrypoints, max_epochs"),
        ("max_epochs = 0", "policy.toml: max_epochs = 0: must be greater than or equal to 1"),
        ('max_epochs = "5"', "policy.toml: max_epochs = '5': must be a valid integer"),
        ("metrics = 'loss'", "policy.toml: metrics = 'loss': must be a valid list"),
        ("max_epochs", "is not TOML"),
    ],
)
def test_invalid_policy_is_an_error_that_names_the_key(tmp_path: Path, text: str, line: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        policy(tmp_path, text)
    assert line in str(caught.value)


class Counted(Doubling):
    def num_examples(self, data: Any) -> int:
        return 10


class AgreedSite(TrainingSite):
    def __init__(self, run: SampleRun, agreed: Any, egress_log: Any) -> None:
        super().__init__(run)
        self.task = Counted()
        self.runner = JobRunner(self.store, self.task, run.module, self.heartbeat, 60, True, {}, agreed, egress_log)
        self.runner.load(Client("c0"), "the rows of c0")


def lines(path: Any) -> Any:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_job_beyond_a_limit_is_refused_untrained(fake_run: SampleRun, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    site = AgreedSite(fake_run, Policy(min_examples=11), EgressLog(path, "sample"))
    [entry] = site.train()
    ending = read(Ending, entry.body)
    assert (entry.kind, ending.reason) == ("ended", "refused")
    assert ending.error == "min_examples: the client has 10, this site requires 11"
    assert site.task.seen == []
    [line] = lines(path)
    assert (line["what"], line["text"]) == ("refused", ending.error)


def test_withheld_metrics_neither_leave_nor_are_logged(fake_run: SampleRun, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    site = AgreedSite(
        fake_run, Policy(metrics=["loss"]), EgressLog(path, "sample", lambda: datetime(2026, 1, 2, tzinfo=UTC))
    )
    site.task.metrics = {"loss": 0.5, "patients_with_x": 3.0}
    [entry] = site.train()
    assert read(Update, entry.body).metrics == {"loss": 0.5}
    assert lines(path) == [
        {
            "at": "2026-01-02T00:00:00.000+00:00", "what": "update", "run": "sample", "client": "c0",
            "job": "sample-00000001", "attempt": 1, "version": 0, "bytes": fake_run.manifest.nbytes,
            "sha256": digest_of(fake_run.posted_frame(entry).buffer), "examples": 10, "metrics": ["loss"],
            "seconds": lines(path)[0]["seconds"],
        }
    ]  # fmt: skip


def test_refused_post_gets_a_second_line(fake_run: SampleRun, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    site = AgreedSite(fake_run, ALLOW_ALL, EgressLog(path, "sample"))
    site.task.during = lambda progress: fake_run.client.delete(fake_run.keys.job("sample-00000001"))
    assert site.train() == []
    assert [(line["what"], line.get("reason")) for line in lines(path)] == [("update", None), ("not taken", "closed")]


def test_deleted_folder_of_the_egress_log_is_made_again(tmp_path: Path) -> None:
    log = open_egress_log(str(tmp_path / "egress"), "sample", "t")
    shutil.rmtree(tmp_path / "egress")
    log.log_registration(Registration(client="c0", examples=5))
    assert '"client": "c0"' in (tmp_path / "egress" / "sample-t.jsonl").read_text()


def test_no_update_leaves_if_the_egress_log_is_not_writable(fake_run: SampleRun) -> None:
    site = AgreedSite(fake_run, ALLOW_ALL, EgressLog(Path("/dev/null/x/out.jsonl"), "sample"))
    with pytest.raises(NotADirectoryError):
        site.train()
    assert fake_run.updates() == []
    with pytest.raises(ConfigurationError, match=r"security.egress_log = .*cannot be written"):
        open_egress_log("/dev/null/x", "sample", "token")

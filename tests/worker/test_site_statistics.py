"""Sites answer `fedqueue describe` over Redis: once, under their policy, and only what their coordinator has signed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from fedqueue import Client, Task
from fedqueue.errors import ConfigurationError, FedqueueError, RunExists
from fedqueue.protocol.coordinator_identity import load_coordinator_identity
from fedqueue.protocol.messages import AnswerPiece, Question
from fedqueue.protocol.site_identity import load_site_identity
from fedqueue.statistics.pooled import Statistics
from fedqueue.transport.store import Store
from fedqueue.transport.worker_store import WorkerStore
from fedqueue_coordinator.operator.access.enrolment import enroll
from fedqueue_coordinator.operator.describe import describe_here
from fedqueue_coordinator.operator.embedded_server import EmbeddedServer
from fedqueue_coordinator.service.statistics_exchange import StatisticsExchange
from fedqueue_worker.egress_log import EgressLog
from fedqueue_worker.policy import Policy, load_policy
from fedqueue_worker.retrying_store import RetryingStore
from fedqueue_worker.site_statistics import SiteStatistics
from tests.support.builders import make_config

RUN = "described"
CLIENTS = ("north", "south")


class Rows(Task):
    """Has 60 rows at north and 50 at south; `extra` more come to each."""

    def __init__(self) -> None:
        self.extra = 0

    def table(self, client: Client) -> dict[str, Any]:
        rows = (60 if client.id == "north" else 50) + self.extra
        values = np.random.default_rng(len(client.id)).normal(50, 10, 60)[:rows] if not self.extra else np.arange(rows)
        return {"x": values, "large": np.array(["yes", "no"])[(np.arange(rows) % 3 == 0).astype(int)]}


class Federation:
    """Two sites and an operator on one fake Redis; the sites look for a question whenever the operator sleeps."""

    def __init__(self, client: redis.Redis, folder: Path, signed: bool = True) -> None:
        self.redis, self.folder, self.signed = client, folder, signed
        self.task = Rows()
        self.policies = dict.fromkeys(CLIENTS, Policy())
        self.absent: set[str] = set()
        self.before_looking: Callable[[], object] = lambda: None
        self.now = 0.0
        if signed:
            for name in CLIENTS:
                enroll(folder / "keys", name)
        self.config = make_config(name=RUN, clients={"names": CLIENTS})

    def identity(self, client: str) -> Any:
        return load_site_identity(self.folder / "keys" / "sites" / client, RUN, f"worker-{client}")

    def site(self, client: str) -> SiteStatistics:
        store = WorkerStore(self.redis, RUN, f"worker-{client}", self.identity(client) if self.signed else None)
        statistics = {"folder": str(self.folder / f"kept-{client}")}
        config = make_config(name=RUN, clients={"names": CLIENTS}, statistics=statistics)
        log = EgressLog(self.folder / f"{client}.jsonl", RUN)
        return SiteStatistics(config, self.task, RetryingStore(store, lambda: False), self.policies[client], log)

    def describe(self, **settings: Any) -> Statistics:
        sites = {client: self.site(client) for client in CLIENTS if client not in self.absent}

        def sleep(seconds: float) -> None:
            self.now += 1.0
            self.before_looking()
            for client, site in sites.items():
                site.answer_if_asked([[client]], lambda: False)

        identity = load_coordinator_identity(self.folder / "keys", RUN) if self.signed else None
        store = Store(self.redis, RUN)
        exchange = StatisticsExchange(store, identity, CLIENTS, 5, clock=lambda: self.now, sleep=sleep)
        return exchange.describe(make_config(name=RUN, clients={"names": CLIENTS}, statistics=settings))

    def lines(self, client: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / f"{client}.jsonl").read_text().splitlines()]


@pytest.fixture
def federation(fake_client: redis.Redis, tmp_path: Path) -> Federation:
    return Federation(fake_client, tmp_path)


def test_answers_over_redis_are_those_of_one_machine(federation: Federation) -> None:
    assert federation.describe() == describe_here(federation.config, Rows())
    assert federation.redis.keys("*") == []


def test_an_unsigned_run_is_described_too(fake_client: redis.Redis, tmp_path: Path) -> None:
    assert Federation(fake_client, tmp_path, signed=False).describe().rows == 110


def test_large_answers_come_in_pieces(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedqueue.transport.worker_store.PIECE_BYTES", 50)
    monkeypatch.setattr("fedqueue.transport.worker_store.MAX_PIECES", 60)
    assert federation.describe() == describe_here(federation.config, Rows())


# Policy


def test_a_policy_chooses_statistics_and_minimum(federation: Federation) -> None:
    federation.policies["south"] = Policy(statistics=["count", "mean"], min_count=40)
    found = federation.describe()
    assert found.kept_back == {"south": ("variance", "histogram", "categories")}
    assert found.min_count == {"north": 10, "south": 40}
    assert found.numbers("x").mean == describe_here(federation.config, Rows()).numbers("x").mean
    assert found.numbers("x").sites["south"].variance is None


@pytest.mark.parametrize(
    ("policy", "why"),
    [
        (Policy(statistics=[]), "statistics: this site describes no data"),
        (Policy(min_keepers=2), "min_keepers: this site requires keepers"),
        (Policy(max_epsilon=1.0, delta=1e-5), "max_epsilon: this site requires noise"),
        (Policy(require=["privacy.examples"]), "require: this site requires noise"),
    ],
)
def test_a_policy_refuses_in_one_line(federation: Federation, policy: Policy, why: str) -> None:
    federation.policies["south"] = policy
    found = federation.describe()
    assert found.refused["south"].startswith(why)
    assert set(found.sites) == {"north"}
    assert federation.lines("south")[0]["text"] == found.refused["south"]


@pytest.mark.parametrize("text", ['statistics = ["variance", "count"]', 'statistics = ["mean"]', 'statistics = ["x"]'])
def test_a_policy_that_cannot_be_followed_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "policy.toml").write_text(text)
    with pytest.raises(ConfigurationError, match="statistics"):
        load_policy(tmp_path / "policy.toml")


def test_each_answer_has_a_line_in_the_egress_log(federation: Federation) -> None:
    federation.describe()
    first, second = federation.lines("north")
    assert (first["what"], first["part"], second["part"]) == ("statistics", 1, 2)
    assert first["columns"] == ["x", "large"]
    assert first["bytes"] > 100


def test_nothing_leaves_without_a_line(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []

    def full(*args: Any, **fields: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(EgressLog, "log_answer", full)
    monkeypatch.setattr(WorkerStore, "answer", lambda *args: sent.append(args))
    with pytest.raises(OSError, match="disk full"):
        federation.describe()
    assert sent == []


# Once in a run


def test_an_answer_is_kept_and_repeated(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    before = federation.describe()
    kept = federation.folder / "kept-north" / RUN / "north.json"
    assert kept.stat().st_mode & 0o777 == 0o600
    monkeypatch.setattr("fedqueue.statistics.site_answers.SiteTable.first_answer", None)
    assert federation.describe() == before


def test_changed_data_is_not_described_again(federation: Federation) -> None:
    federation.describe()
    federation.task.extra = 1
    with pytest.raises(FedqueueError, match="the data has changed since it was described in this run"):
        federation.describe()


def test_other_edges_are_refused(federation: Federation) -> None:
    before = federation.describe(bins=64)
    found = federation.describe(bins=65)
    assert found.refused["north"].startswith("the histograms were given on other edges")
    assert found.numbers("x").mean == before.numbers("x").mean
    assert found.numbers("x").quantiles == {}


def test_another_minimum_is_refused(federation: Federation) -> None:
    federation.describe()
    with pytest.raises(FedqueueError, match="described with min_count 10 in this run, not 9"):
        federation.describe(min_count=9)


# What is not believed


def test_a_question_of_somebody_else_is_ignored(federation: Federation) -> None:
    question = Question(run=RUN, instance="0" * 32, part=1, min_count=1)
    other = federation.folder / "other"
    enroll(other, "north")
    forged = load_coordinator_identity(other, RUN).sign_question(question.pack())
    keys = Store(federation.redis, RUN).keys
    for data in (question.pack(), forged):
        federation.redis.set(keys.question, data)
        federation.site("north").answer_if_asked([["north"]], lambda: False)
    assert not federation.redis.exists(keys.answer("north"))
    assert not (federation.folder / "north.jsonl").exists()


def answered(federation: Federation, signer: str, client: str, instance: str = "") -> Callable[[], None]:
    """Put an answer of `client` there that `signer` has signed, as soon as there is a question; "" for no signature."""

    def put() -> None:
        keys = Store(federation.redis, RUN).keys
        site = WorkerStore(federation.redis, RUN, "w", federation.identity("north"))
        question = site.question()
        assert question is not None
        body = AnswerPiece(client=client, part=question.part, piece=0, pieces=1, body=b'{"rows": 1, "min_count": 1}')
        if signer:
            identity = federation.identity(signer)
            identity._keys["south"] = identity._keys[signer]  # signs for another client with its own key
            about = [question.part, 0]
            data = identity.sign_answer("south", instance or question.instance, about, body.pack())
        else:
            data = body.pack()
        federation.redis.hset(keys.answer("south"), f"{question.part}:0", data)

    return put


@pytest.mark.parametrize(
    ("signer", "client", "instance"),
    [("north", "south", ""), ("", "south", ""), ("south", "south", "f" * 32), ("south", "north", "")],
    ids=["another key", "no signature", "another question", "another client"],
)
def test_an_answer_that_is_not_the_sites_own_is_refused(
    federation: Federation, signer: str, client: str, instance: str
) -> None:
    federation.absent = {"south"}
    federation.before_looking = answered(federation, signer, client, instance)
    found = federation.describe()
    assert found.refused["south"].startswith("its answer is not valid: ")
    assert set(found.sites) == {"north"}


@pytest.mark.parametrize(
    ("data", "problem"),
    [(b"x" * 70_000, "a piece of 70000 bytes"), (b"\x01", "answer is not signed")],
)
def test_a_damaged_answer_is_named(federation: Federation, data: bytes, problem: str) -> None:
    federation.absent = {"south"}
    keys = Store(federation.redis, RUN).keys
    federation.before_looking = lambda: federation.redis.hset(keys.answer("south"), "1:0", data)
    assert problem in federation.describe().refused["south"]


def test_a_site_that_does_not_answer_is_named(federation: Federation) -> None:
    federation.absent = {"south"}
    assert federation.describe().refused == {"south": "no answer in 5 s: is its fedqueue-worker running?"}


def test_a_run_that_has_begun_is_not_described(federation: Federation) -> None:
    federation.redis.hset(Store(federation.redis, RUN).keys.config, "config", "{}")
    with pytest.raises(RunExists, match="workers describe their data only before it begins"):
        federation.describe()


# With processes


@pytest.fixture
def worker(server: EmbeddedServer, server_client: redis.Redis, tmp_path: Path) -> Iterator[Path]:
    """A configuration whose worker process serves both clients; returns its path."""
    (tmp_path / "rows.py").write_text(
        "import numpy as np\nfrom fedqueue import Task\nclass Rows(Task):\n    def table(self, client):\n"
        "        return {'x': np.arange(100.0) + len(client.id)}\n"
    )
    config = tmp_path / "federation.toml"
    config.write_text(
        f'name = "{RUN}"\n[task]\nentrypoint = "rows.py:Rows"\n[clients]\nnames = ["a", "bb"]\n[stop]\nversions = 1\n'
        '[security]\nsignatures = "off"\n'
    )
    command = [
        sys.executable,
        "-m",
        "fedqueue_worker",
        str(config),
        "--redis",
        server.url,
        "--client",
        "a",
        "--client",
        "bb",
    ]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL) as process:
        yield config
        process.terminate()


@pytest.mark.slow
@pytest.mark.server
def test_waiting_workers_answer_the_command(server: EmbeddedServer, worker: Path) -> None:
    command = [sys.executable, "-m", "fedqueue_coordinator", "describe", str(worker), "--redis", server.url, "--json"]
    done = subprocess.run(command, cwd=worker.parent, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.strip()) == (0, "fedqueue: waiting for a and bb")
    found = json.loads(done.stdout)
    assert (found["rows"], found["columns"]["x"]["mean"]) == (200, 51.0)

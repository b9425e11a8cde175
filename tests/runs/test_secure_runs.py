"""Runs with keepers, as a user starts them: on one machine, and in parts with keys, users and rights of their own."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedqueue.protocol.key_files import read_public_keys
from fedqueue.transport.store import Store
from fedqueue_coordinator.operator.access.enrolment import KEEPER, enroll, generate_key
from tests.support.acl_server import AclServer
from tests.support.ledger_checks import check_agreement
from tests.support.programs import Program, descendants, read_results
from tests.support.waiting import alive, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.server, pytest.mark.timeout(600)]

KEEPERS = ["university", "audit-office"]
SECURE = ["--set", f"secure.keepers={json.dumps(KEEPERS)}", "--set", "aggregation.running_statistics=frozen"]
SECURE += ["--set", "aggregation.buffer_size=3"]


def keeper_pids(program: Program) -> dict[str, int]:
    """Return keeper → its process, of a local run."""
    found = {}
    for pid in descendants(program.pid):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        if "fedqueue_keeper" in words:
            found[words[words.index("fedqueue_keeper") + 1]] = pid
    return found


# On one machine


def test_local_run_makes_keys_and_starts_keepers(config: Path, start: Callable[..., Program], tmp_path: Path) -> None:
    hidden = ["--set", "secure.examples=hidden"]
    program = start("fedqueue_coordinator", "run", config, "--workers", 2, "--output", "out", *SECURE, *hidden)
    offspring = wait_until(
        lambda: found if len(found := descendants(program.pid)) >= 6 else [], "a server, two workers, two keepers"
    )
    assert program.wait() == 0, program.text
    summary, ledger = read_results(tmp_path / "out")
    check_agreement(summary, ledger)
    assert summary["stopped_because"] == "versions: 12 of 12"
    assert summary["metrics"]["accuracy"] > 0.6
    assert summary["keepers"] == dict.fromkeys(sorted(KEEPERS), 12)
    assert summary["smallest_cohort"] >= 3
    assert program.text.count("keepers and coordinator on one machine: this protects nobody") == 1
    assert "clients, released by keepers: audit-office 12, university 12; robust rules" in program.text
    assert not any(map(alive, offspring))
    assert not (tmp_path / "out" / "unfinished").exists(), "keys and the keepers' files are deleted with the run"
    for record in ledger:
        for line in record.get("merged", ()):
            assert "norm" not in line
            assert line["metrics"] == {}
            assert line["examples"] == 0


def test_keeper_that_dies_fails_a_local_run_that_resumes(
    config: Path, start: Callable[..., Program], tmp_path: Path
) -> None:
    program = start(
        "fedqueue_coordinator", "run", config, "--output", "out", *SECURE, "--set", "stop.versions=400",
        "--set", "task.options.batch_seconds=0.02", "--set", "checkpoint.every_seconds=0.2",
    )  # fmt: skip
    log = tmp_path / "out" / "logs" / "keeper-university.log"
    wait_until(lambda: log.exists() and log.read_text().count("released cohort") >= 3, "three cohorts are released")
    os.kill(keeper_pids(program)["university"], signal.SIGKILL)
    assert program.wait() == 1, program.text
    assert re.search(r"keeper university \(pid \d+\) ended with exit status -9", program.text)
    assert "the run failed: keeper university has ended, without which no version can be made; see" in program.text
    before = read_results(tmp_path / "out")[0]["versions"] if (tmp_path / "out" / "summary.json").exists() else 0
    resumed = start("fedqueue_coordinator", "run", "--resume", "out", "--set", f"stop.versions={before + 8}")
    assert resumed.wait() == 0, resumed.text
    summary, ledger = read_results(tmp_path / "out")
    check_agreement(summary, ledger)
    assert summary["versions"] >= before + 8


# In parts


CONFIG = """
name = "parts"
[task]
entrypoint = "{task}:ToyTask"
[clients]
names = ["north", "south", "east"]
min_available = 3
[aggregation]
buffer_size = 3
running_statistics = "frozen"
[secure]
keepers = ["university", "audit-office"]
[stop]
versions = 6
"""
CLIENTS = ["north", "south", "east"]


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """Write a configuration, and a folder for each party that has only what is its own."""
    from tests.support import toy_task

    (tmp_path / "federation.toml").write_text(CONFIG.format(task=toy_task.__file__))
    keys = tmp_path / "keys"
    for keeper in KEEPERS:  # each makes its own key
        sent = generate_key(tmp_path / keeper, keeper)
        enroll(keys, keeper, public=sent, role=KEEPER)
    for client in CLIENTS:
        shutil.copytree(enroll(keys, client), tmp_path / client)
    for keeper in KEEPERS:
        shutil.copytree(keys / "keeper-sites" / keeper, tmp_path / keeper, dirs_exist_ok=True)
    shutil.rmtree(keys / "sites")
    shutil.rmtree(keys / "keeper-sites")
    return tmp_path


def test_parts_with_users_and_keys_of_their_own_train_together(parts: Path, fork: Callable[..., Program]) -> None:
    server = AclServer(parts, "parts", CLIENTS, keepers=KEEPERS)
    try:
        keepers = [
            fork(
                "fedqueue_keeper", keeper, "federation.toml", "--keys", keeper,
                FEDQUEUE_REDIS__URL=server.urls[f"keeper-{keeper}"],
            )
            for keeper in KEEPERS
        ]  # fmt: skip
        (parts / "policy.toml").write_text(
            'keepers = ["university", "audit-office"]\nmin_keepers = 2\nmin_cohort = 3\n'
        )
        workers = [
            fork(
                "fedqueue_worker", "federation.toml", "--client", client, "--policy", "policy.toml",
                FEDQUEUE_REDIS__URL=server.urls[f"worker-{client}"], FEDQUEUE_SECURITY__KEYS=str(parts / client),
            )
            for client in CLIENTS
        ]  # fmt: skip
        coordinator = fork(
            "fedqueue_coordinator", "coordinator", "federation.toml", "--output", "out",
            FEDQUEUE_REDIS__URL=server.urls["coordinator"],
        )  # fmt: skip
        assert coordinator.wait() == 0, coordinator.text
        for part in (*workers, *keepers):
            assert part.wait(30) == 0, part.text
        assert server.denied() == []
    finally:
        server.stop()
    summary, ledger = read_results(parts / "out")
    check_agreement(summary, ledger)
    assert summary["keepers"] == dict.fromkeys(sorted(KEEPERS), 6)
    egress = [json.loads(line) for path in (parts / "egress").glob("*.jsonl") for line in path.read_text().splitlines()]
    masked = [line["masked_for"] for line in egress if line["what"] == "update"]
    assert masked
    assert all(line == KEEPERS for line in masked)


def test_run_waits_for_an_absent_keeper_and_says_so(parts: Path, fork: Callable[..., Program]) -> None:
    server = AclServer(parts, "parts", CLIENTS, keepers=KEEPERS)
    try:

        def keeper(name: str) -> Program:
            url = server.urls[f"keeper-{name}"]
            return fork("fedqueue_keeper", name, "federation.toml", "--keys", name, FEDQUEUE_REDIS__URL=url)

        there, absent = keeper("university"), keeper("audit-office")
        coordinator = fork(
            "fedqueue_coordinator", "coordinator", "federation.toml", "--output", "out",
            "--set", "stop.versions=60", "--set", "task.options.batch_seconds=0.02",
            FEDQUEUE_REDIS__URL=server.urls["coordinator"],
        )  # fmt: skip
        for client in CLIENTS:
            fork(
                "fedqueue_worker", "federation.toml", "--client", client, "--set", "task.options.batch_seconds=0.02",
                FEDQUEUE_REDIS__URL=server.urls[f"worker-{client}"], FEDQUEUE_SECURITY__KEYS=str(parts / client),
            )  # fmt: skip
        wait_until(lambda: "released cohort" in absent.text, "a cohort is released")
        absent.send(signal.SIGTERM)
        assert absent.wait(30) == 0, absent.text
        viewer = Store(server.user("viewer"), "parts")
        said: Any = wait_until(lambda: "audit-office" in (text := viewer.waiting()) and text, "the leader says so")
        assert said.startswith("waiting for keeper audit-office, which has not answered for ")
        wait_until(lambda: "waiting for keeper audit-office" in coordinator.text, "its progress says so, too")
        keeper("audit-office")
        assert coordinator.wait() == 0, coordinator.text
        assert there.wait(30) == 0
        assert server.denied() == []
    finally:
        server.stop()


def test_site_without_the_keepers_key_trains_nothing(parts: Path, fork: Callable[..., Program]) -> None:
    """A keeper's key that is replaced in Redis, or that the site does not pin, masks no update."""
    assert [key.id for key in read_public_keys(parts / "north" / "keepers" / "university.pub")]
    (parts / "north" / "keepers" / "university.pub").unlink()
    server = AclServer(parts, "parts", CLIENTS, keepers=KEEPERS)
    try:
        for name in KEEPERS:
            url = server.urls[f"keeper-{name}"]
            fork("fedqueue_keeper", name, "federation.toml", "--keys", name, FEDQUEUE_REDIS__URL=url)
        fork(
            "fedqueue_coordinator", "coordinator", "federation.toml", "--output", "out",
            FEDQUEUE_REDIS__URL=server.urls["coordinator"],
        )  # fmt: skip
        worker = fork(
            "fedqueue_worker", "federation.toml", "--client", "north",
            FEDQUEUE_REDIS__URL=server.urls["worker-north"], FEDQUEUE_SECURITY__KEYS=str(parts / "north"),
        )  # fmt: skip
        assert worker.wait(60) == 2
        problem = "security.keys = 'keepers/university.pub': no valid public key of this keeper of the run"
        assert problem in worker.text
    finally:
        server.stop()

"""`fedqueue-keeper` as an organisation runs it: its words, its exit codes, and a kill at any moment."""

from __future__ import annotations

import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from fedqueue.protocol.keys import Keys
from fedqueue.protocol.messages import KeeperKey, Opened, read
from fedqueue.protocol.signed_envelope import KEEPER, MASKED, OPENED
from fedqueue.secure.keeper import Release
from fedqueue_coordinator.operator.embedded_server import EmbeddedServer
from fedqueue_keeper import cli
from fedqueue_keeper.keeper_store import KeeperStore
from tests.support.masked_run import RUN, MaskedRun
from tests.support.programs import Program
from tests.support.waiting import wait_until

CONFIG = f"""
name = "{RUN}"
task = {{ entrypoint = "task.py:Task" }}
stop = {{ versions = 1 }}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "federation.toml").write_text(CONFIG)
    return tmp_path


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["fedqueue-keeper", *words])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    streams = sys.stdout, sys.stderr
    try:
        cli.main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
    finally:
        sys.stdout, sys.stderr = streams
        for number, handler in handlers.items():
            signal.signal(number, handler)
    output = capsys.readouterr()
    return code, output.out + output.err


def test_missing_keys_are_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(folder / "federation.toml")
    code, text = call(monkeypatch, capsys, "k0", config, "--redis", "redis://127.0.0.1:1", "--keys", str(folder))
    assert code == 2
    assert "holds no k0.key; the operator's `fedqueue enroll --keeper` creates this folder" in text


def test_empty_roster_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    MaskedRun(folder)
    for path in (folder / "clients").iterdir():
        path.unlink()
    config = str(folder / "federation.toml")
    code, text = call(monkeypatch, capsys, "k0", config, "--redis", "redis://127.0.0.1:1", "--keys", str(folder))
    assert code == 2
    assert "holds no clients/CLIENT.pub; put the public key of each client there" in text


@pytest.mark.parametrize(
    ("policy", "problem"),
    [
        ("min_cohort = 1", "keeper.toml: min_cohort = 1: must be greater than or equal to 2"),
        ("min_cohorts = 5", "keeper.toml: min_cohorts = 5: unknown key; known keys: min_cohort"),
        ("min_cohort = ", "is not TOML"),
    ],
)
def test_policy_that_cannot_be_used_is_named(
    folder: Path,
    server: EmbeddedServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    policy: str,
    problem: str,
) -> None:
    MaskedRun(folder)
    (folder / "keeper.toml").write_text(policy)
    config = str(folder / "federation.toml")
    code, text = call(monkeypatch, capsys, "k0", config, "--redis", server.url, "--keys", str(folder))
    assert code == 2
    assert problem in text


class Organisation:
    """A keeper's organisation on a real server, with its process."""

    def __init__(self, folder: Path, url: str, client: redis.Redis) -> None:
        self.folder, self.url, self.client = folder, url, client
        self.run, self.keys = MaskedRun(folder), Keys(RUN)
        self.store = KeeperStore(client, RUN)

    def start(self) -> Program:
        words = ("k0", "federation.toml", "--redis", self.url, "--keys", self.folder, "--state", self.folder / "state")
        return Program("fedqueue_keeper", *words, folder=self.folder, cold=False)

    def use_published_key(self) -> None:
        data = wait_until(lambda: self.store.published_key("k0"), "the keeper has published its key")
        self.run.publics["k0"] = read(KeeperKey, self.run.coordinator.open_keeper(KEEPER, "k0", data)).public

    def ask(self, kind: str, body: bytes) -> None:
        self.client.xadd(self.keys.asks("k0"), {"kind": kind, "body": body})

    def answers(self, kind: str) -> list[bytes]:
        entries: Any = self.client.xrange(self.keys.says("k0"))
        bodies = [fields[b"body"] for _, fields in entries if fields[b"kind"] == kind.encode()]
        return [self.run.coordinator.open_keeper(kind, "k0", body) for body in bodies]


def _is_ready(keeper: Program) -> bool:
    return "ready" in keeper.text


@pytest.fixture
def organisation(folder: Path, server: EmbeddedServer, server_client: redis.Redis) -> Organisation:
    return Organisation(folder, server.url, server_client)


@pytest.mark.slow
@pytest.mark.server
def test_keeper_serves_the_run_to_its_end(organisation: Organisation) -> None:
    keeper = organisation.start()
    wait_until(lambda: "waiting for a coordinator to start the run" in keeper.text, "the keeper waits")
    organisation.run.write(organisation.client)
    organisation.use_published_key()
    updates = [organisation.run.post(client) for client in "abc"]
    for update in updates:
        organisation.ask("offer", update.offer.pack())
    organisation.ask("cohort", organisation.run.propose(0, updates))
    wait_until(lambda: organisation.answers(MASKED), "the masks are released")
    opened = [offer for body in organisation.answers(OPENED) for offer in read(Opened, body).offers]
    assert [offer.refusal for offer in opened] == ["", "", ""]
    organisation.run.write(organisation.client, state="ended")
    assert keeper.wait() == 0
    assert "released cohort of 3 clients for version 1" in keeper.text
    assert keeper.text.splitlines()[-1] == "fedqueue-keeper: the run has ended: test"
    assert not list((organisation.folder / "state").rglob("*.sqlite*"))


@pytest.mark.slow
@pytest.mark.server
def test_keeper_that_is_told_to_stop_keeps_its_file(organisation: Organisation) -> None:
    organisation.run.write(organisation.client)
    keeper = organisation.start()
    organisation.use_published_key()
    second = organisation.start()
    assert second.wait() == 2
    assert "another keeper process uses this file; end that process" in second.text
    keeper.send(signal.SIGTERM)
    assert keeper.wait() == 0
    assert len(list((organisation.folder / "state").rglob("*.sqlite"))) == 1


@pytest.mark.slow
@pytest.mark.server
def test_killed_keeper_answers_with_the_same_bytes(organisation: Organisation) -> None:
    """The process is killed ten times, each time somewhat later after it has published its key."""
    run = organisation.run
    run.write(organisation.client)
    keeper = organisation.start()
    organisation.use_published_key()
    updates = [run.post(client, vector=7) for client in "abcd"]
    cohort = run.cohort(0, updates)
    masks = set()
    for i in range(10):
        if i == 0:
            for update in updates:
                organisation.ask("offer", update.offer.pack())
            organisation.ask("cohort", run.coordinator.sign_cohort(cohort))
        else:
            keeper = organisation.start()
            wait_until(partial(_is_ready, keeper), "the keeper is ready")
        time.sleep(0.004 * i)
        keeper.send(signal.SIGKILL)
        keeper.wait()
        masks.add(organisation.client.get(f"{organisation.keys.mask(run.id(cohort), 'k0')}:0"))
    organisation.client.delete(organisation.keys.says("k0"))
    keeper = organisation.start()
    wait_until(lambda: organisation.answers(MASKED), "the masks are released")
    mask: Any = organisation.client.get(f"{organisation.keys.mask(run.id(cohort), 'k0')}:0")
    assert masks - {None} == {mask}
    for update in updates:
        run.running["k1"].offer(update.offer)
    other = run.running["k1"].release(run.coordinator.sign_cohort(cohort))
    assert isinstance(other, Release)
    total = run.unmask(updates, run.weights(0, updates), [other])
    total -= np.frombuffer(mask, np.int32)
    assert np.abs(total - 7 * 8 * 4).max() <= 2 * 420
    keeper.send(signal.SIGTERM)
    assert keeper.wait() == 0

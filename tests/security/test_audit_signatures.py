"""`fedqueue audit` verifies the coordinator's signatures, and reports anything that is not verified."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import msgpack
import pytest
import redis
from typer.testing import CliRunner

from fedqueue.errors import SignatureError
from fedqueue_coordinator.cli.main import app
from fedqueue_coordinator.operator.audit.audit import Check, audit, ok
from fedqueue_coordinator.operator.audit.audit_input import read_run_in_redis
from fedqueue_coordinator.operator.embedded_server import EmbeddedServer
from fedqueue_coordinator.service.coordinator_store import CoordinatorStore
from tests.support.scene import RUN, Scene


@pytest.fixture
def scene(fake_client: redis.Redis, tmp_path: Path) -> Scene:
    """Return a run with two versions, kept payloads and a queued order."""
    scene = Scene(fake_client, tmp_path, ledger={"keep_payloads": True})
    site = scene.site("c0")
    scene.play(site.join, site.post, site.post)
    assert scene.version == 2
    return scene


def verdict(scene: Scene, keys: str = "keys") -> Check:
    checks = audit(read_run_in_redis(CoordinatorStore(scene.redis, RUN, owner="audit"), scene.folder / keys))
    (signed,) = [check for check in checks if check.name == "S"]
    return signed


def test_unchanged_signed_data_passes_and_is_counted(scene: Scene) -> None:
    signed = verdict(scene)
    assert signed.problems == []
    assert signed.invariant.endswith("(descriptor 1, version 2, history 1, totals 1, order 1, payload 2)")
    assert signed.skipped == "ledger records other than versions; messages of clients before they are merged"


def test_site_can_audit_with_the_public_key_alone(scene: Scene) -> None:
    (scene.key_folder / "coordinator.key").unlink()
    assert verdict(scene, "keys/sites/c0").problems == []


def change_model(scene: Scene, version: int = 2) -> None:
    scene.redis.setrange(f"{scene.keys.model(version)}:0", 3, b"x")


def change_ledger(scene: Scene) -> None:
    records = scene.store.ledger()
    records[0]["merged"][0]["client"] = "c1"
    scene.redis.delete(scene.keys.ledger)
    for record in records:
        scene.redis.xadd(scene.keys.ledger, {"record": msgpack.packb(record)})


def change_order(scene: Scene) -> None:
    [job] = cast(set[bytes], scene.redis.smembers(scene.keys.jobs))
    scene.redis.hset(scene.keys.job(job.decode()), "order", b"x")


def change_payload(scene: Scene) -> None:
    line = scene.store.ledger()[0]["merged"][0]
    scene.redis.setrange(f"{scene.keys.kept_payload(line['job'], line['attempt'])}:0", 0, b"x")


CHANGES: dict[str, tuple[Callable[[Scene], object], str]] = {
    "descriptor": (lambda s: s.redis.hset(s.keys.config, "descriptor", b"x"), "descriptor is not signed"),
    "configuration": (
        lambda s: s.redis.hset(s.keys.config, "config", s.config.model_copy(update={"seed": 9}).model_dump_json()),
        "the configuration in Redis is not the one in the run descriptor",
    ),
    "the head": (change_model, "the model in Redis is not version 2 as it was signed"),
    "an older version": (lambda s: change_model(s, 0), "the model in Redis is not version 0 as it was signed"),
    "state": (lambda s: s.redis.setrange(f"{s.keys.state(2)}:0", 9, b"x"), "the optimizer's state in Redis is not"),
    "history": (change_ledger, "the ledger is not the history of version 2 as it was signed"),
    "totals": (
        lambda s: s.redis.hset(s.keys.head, "totals", msgpack.packb({**s.store.info().totals, "updates": 7})),
        "the totals are not those of version 2 as they were signed",
    ),
    "an order": (change_order, "order is not signed"),
    "a payload": (change_payload, "is not the one that was merged"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_each_change_is_detected_and_named(scene: Scene, what: str) -> None:
    change, says = CHANGES[what]
    change(scene)
    problems = verdict(scene).problems
    assert len(problems) == 1
    assert says in problems[0]


def test_audit_without_the_public_key_says_unverified(scene: Scene) -> None:
    signed = verdict(scene, "nowhere")
    assert signed.problems == []
    assert "no coordinator.pub in" in signed.skipped
    assert "--keys" in signed.skipped


def test_audit_reports_missing_signatures_and_payloads(fake_client: redis.Redis, tmp_path: Path) -> None:
    for signed, says in ((False, "the run is not signed"), (True, "payloads, which were not kept")):
        fake_client.flushall()
        scene = Scene(fake_client, tmp_path / str(signed), signed=signed)
        site = scene.site("c0")
        scene.play(site.join, site.post)
        assert says in verdict(scene).skipped


def test_audit_command_exits_with_1_on_a_change(
    server: EmbeddedServer, server_client: redis.Redis, tmp_path: Path
) -> None:
    scene = Scene(server_client, tmp_path)
    site = scene.site("c0")
    scene.play(site.join, site.post)
    words = ["audit", RUN, "--redis", server.url, "--keys", str(scene.key_folder)]
    assert CliRunner().invoke(app, words).exit_code == 0
    change_model(scene, 1)
    said = CliRunner().invoke(app, words)
    assert said.exit_code == 1
    assert "S: the model in Redis is not version 1 as it was signed" in said.output


def test_model_changed_in_redis_is_not_exported(
    server: EmbeddedServer, server_client: redis.Redis, tmp_path: Path
) -> None:
    scene = Scene(server_client, tmp_path)
    site = scene.site("c0")
    scene.play(site.join, site.post)
    output = tmp_path / "model.safetensors"
    words = ["export", RUN, "--redis", server.url, "--output", str(output)]
    there = [*words, "--keys", str(scene.key_folder)]
    said = CliRunner().invoke(app, there)
    assert said.output == f"version 1 of {RUN} is in {output}\n"
    said = CliRunner().invoke(app, [*words, "--keys", str(tmp_path)])
    assert f"(not verified: no coordinator.pub in {tmp_path})" in said.output
    output.unlink()
    change_model(scene, 1)
    with pytest.raises(SignatureError, match="not version 1 as it was signed"):
        CliRunner().invoke(app, there, catch_exceptions=False)
    assert not output.exists()


def test_correct_run_passes_the_whole_audit(scene: Scene) -> None:
    assert ok(audit(read_run_in_redis(CoordinatorStore(scene.redis, RUN, owner="audit"), scene.key_folder)))

"""`fedqueue audit` verifies what a run's coordinator signed, and says what it could not verify."""

from __future__ import annotations

import msgpack
import pytest
from scene import RUN, Scene
from typer.testing import CliRunner

from fedqueue.errors import SignatureError
from fedqueue_coordinator.cli.main import app
from fedqueue_coordinator.operator.audit.audit import _books_of_store, audit, ok
from fedqueue_coordinator.service.coordinator_store import CoordinatorStore


@pytest.fixture
def scene(fake_client, tmp_path):
    """Two versions with their payloads kept, and an order that waits."""
    scene = Scene(fake_client, tmp_path, ledger={"keep_payloads": True})
    site = scene.site("c0")
    scene.play(site.join, site.post, site.post)
    assert scene.version == 2
    return scene


def verdict(scene: Scene, keys: str = "keys"):
    checks = audit(_books_of_store(CoordinatorStore(scene.redis, RUN, owner="audit"), scene.folder / keys))
    (signed,) = [check for check in checks if check.name == "S"]
    return signed


def test_what_is_as_it_was_signed_passes_and_is_counted(scene):
    signed = verdict(scene)
    assert signed.problems == []
    assert signed.says.endswith("(descriptor 1, version 2, history 1, totals 1, order 1, payload 2)")
    assert signed.skipped == (
        "not verified: records of the ledger that are no versions; what clients say until it is merged"
    )


def test_site_can_ask_with_the_public_key_alone(scene):
    (scene.key_folder / "coordinator.key").unlink()
    assert verdict(scene, "keys/sites/c0").problems == []


def change_model(scene, version=2):
    scene.redis.setrange(f"{scene.keys.model(version)}:0", 3, b"x")


def change_ledger(scene):
    records = scene.store.ledger()
    records[0]["merged"][0]["client"] = "c1"
    scene.redis.delete(scene.keys.ledger)
    for record in records:
        scene.redis.xadd(scene.keys.ledger, {"record": msgpack.packb(record)})


def change_order(scene):
    [job] = scene.redis.smembers(scene.keys.jobs)
    scene.redis.hset(scene.keys.job(job.decode()), "order", b"x")


def change_payload(scene):
    line = scene.store.ledger()[0]["merged"][0]
    scene.redis.setrange(f"{scene.keys.kept_payload(line['job'], line['attempt'])}:0", 0, b"x")


CHANGES = {
    "descriptor": (lambda s: s.redis.hset(s.keys.config, "descriptor", b"x"), "descriptor is not signed"),
    "configuration": (
        lambda s: s.redis.hset(s.keys.config, "config", s.config.model_copy(update={"seed": 9}).model_dump_json()),
        "the configuration in Redis is not the one that the run descriptor names",
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
def test_each_change_is_found_and_named(scene, what):
    change, says = CHANGES[what]
    change(scene)
    problems = verdict(scene).problems
    assert len(problems) == 1
    assert says in problems[0]


def test_without_the_public_key_it_says_that_nothing_was_verified(scene):
    signed = verdict(scene, "nowhere")
    assert signed.problems == []
    assert "no coordinator.pub in" in signed.skipped
    assert "--keys" in signed.skipped


def test_run_without_signatures_and_payloads_that_were_not_kept_are_said_to_be_so(fake_client, tmp_path):
    for signed, says in ((False, "the run is not signed"), (True, "payloads that were not kept")):
        fake_client.flushall()
        scene = Scene(fake_client, tmp_path / str(signed), signed=signed)
        site = scene.site("c0")
        scene.play(site.join, site.post)
        assert says in verdict(scene).skipped


def test_command_takes_the_folder_of_the_keys_and_ends_with_1_on_a_change(server, server_client, tmp_path):
    scene = Scene(server_client, tmp_path)
    site = scene.site("c0")
    scene.play(site.join, site.post)
    words = ["audit", RUN, "--redis", server.url, "--keys", str(scene.key_folder)]
    assert CliRunner().invoke(app, words).exit_code == 0
    change_model(scene, 1)
    said = CliRunner().invoke(app, words)
    assert said.exit_code == 1
    assert "S: the model in Redis is not version 1 as it was signed" in said.output


def test_model_that_was_changed_in_redis_is_not_exported(server, server_client, tmp_path):
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


def test_right_books_are_ok_as_a_whole(scene):
    assert ok(audit(_books_of_store(CoordinatorStore(scene.redis, RUN, owner="audit"), scene.key_folder)))

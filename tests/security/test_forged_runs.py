"""Sites and coordinators refuse changes to a run by an attacker who controls Redis."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import redis
import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from fedqueue.errors import NotEnrolled, SignatureError, StoreError, WireError
from fedqueue.protocol.key_files import SigningKey
from fedqueue.protocol.messages import Order, read
from fedqueue.protocol.signed_envelope import ORDER, SignedEnvelope, sign_envelope
from fedqueue.transport.rq_jobs import Serializer, TrainingJob
from fedqueue_coordinator.operator.access.enrolment import enroll, revoke
from tests.support.redis_commands import stored, stored_field
from tests.support.scene import RUN, Scene, Site


@pytest.fixture
def scene(fake_client: redis.Redis, tmp_path: Path) -> Scene:
    return Scene(fake_client, tmp_path)


@pytest.fixture
def site(scene: Scene) -> Site:
    """Return a site that has trained two versions and has a third job queued."""
    site = scene.site("c0")
    scene.play(site.join, site.post, site.post)
    assert scene.version == 2
    return site


# Models


def test_model_changed_in_redis_is_not_trained(scene: Scene, site: Site) -> None:
    scene.redis.set(f"{scene.keys.model(2)}:0", site.payload(666.0).tobytes())
    with pytest.raises(SignatureError, match="is not version 2 as the coordinator signed it"):
        site.fetch()


def test_model_without_a_signature_is_not_trained(scene: Scene, site: Site) -> None:
    scene.redis.delete(f"{scene.keys.model(2)}:1")
    with pytest.raises(SignatureError, match="not signed"):
        site.fetch()


def test_old_model_under_a_new_number_is_not_trained(fake_client: redis.Redis, tmp_path: Path) -> None:
    scene = Scene(fake_client, tmp_path)
    site = scene.site("c0")
    kept: list[Any] = []

    def keep() -> None:
        kept.extend(scene.redis.get(f"{scene.keys.model(1)}:{i}") for i in range(2))

    scene.play(site.join, site.post, keep, site.post)
    for i in range(2):
        scene.redis.set(f"{scene.keys.model(2)}:{i}", kept[i])
    with pytest.raises(SignatureError, match="signed by the coordinator in another context"):
        site.fetch()


def set_back_after_two_versions(client: redis.Redis, folder: Path) -> tuple[Any, ...]:
    """Let a site download version 2, then restore Redis to its state at version 1."""
    scene = Scene(client, folder)
    site, kept = scene.site("c0"), {}

    def keep() -> None:
        kept.update(scene.snapshot())

    scene.play(site.join, site.post, keep, site.post)
    site.fetch()
    scene.roll_back(kept)
    return scene, site


def test_head_reset_to_an_old_version_is_not_trained(fake_client: redis.Redis, tmp_path: Path) -> None:
    """Version and signature are genuine, but the site has seen a newer version from the same leader."""
    _, site = set_back_after_two_versions(fake_client, tmp_path)
    with pytest.raises(SignatureError, match="version 1 is offered as the newest, but 2 was seen before"):
        site.fetch()


def test_site_follows_a_run_restored_from_a_checkpoint(fake_client: redis.Redis, tmp_path: Path) -> None:
    """Redis lost its last second of writes. The next leader signs, in a new term, a start from an older version."""
    scene, site = set_back_after_two_versions(fake_client, tmp_path)
    scene.redis.hset(scene.keys.leader, "expires", 0)
    scene.play(site.post)
    assert scene.version == 2
    assert scene.reasons() == []


def test_descriptor_of_an_earlier_term_is_refused(scene: Scene, site: Site) -> None:
    old = scene.redis.hget(scene.keys.config, "descriptor")
    scene.play()
    site.identity.enter(site.store.info())
    scene.redis.hset(scene.keys.config, "descriptor", old)
    with pytest.raises(SignatureError, match="went back from term 2 to 1"):
        site.identity.enter(site.store.info())
    assert site.identity.broken


def test_unsigned_configuration_in_redis_is_refused(scene: Scene, site: Site) -> None:
    config = json.loads(stored_field(scene.redis, scene.keys.config, "config"))
    config["dispatch"]["lease_seconds"] = 1e9
    scene.redis.hset(scene.keys.config, "config", json.dumps(config))
    with pytest.raises(SignatureError, match="the configuration in Redis is not the one"):
        scene.site("c1").identity.enter(site.store.info())
    with pytest.raises(SignatureError, match="configuration or manifest"):
        scene.play()


def test_run_of_another_coordinator_is_not_served(fake_client: redis.Redis, tmp_path: Path) -> None:
    ours, theirs = Scene(fake_client, tmp_path / "ours"), Scene(fake_client, tmp_path / "theirs")
    theirs.play()
    with pytest.raises(SignatureError, match="not a key of the coordinator"):
        ours.site("c0").join()


def test_unsigned_run_is_not_served_by_a_site_with_keys(fake_client: redis.Redis, tmp_path: Path) -> None:
    Scene(fake_client, tmp_path / "a", signed=False).play()
    with pytest.raises(SignatureError, match="descriptor is not signed"):
        Scene(fake_client, tmp_path / "b").site("c0").join()


# Jobs


def test_order_of_the_coordinator_is_accepted(scene: Scene, site: Site) -> None:
    order = site.store.open_order(site.order())
    assert (order.client, order.job) == ("c0", site.job)
    in_queue = TrainingJob.fetch(site.job, connection=scene.redis, serializer=Serializer)
    assert in_queue.kwargs["order"] == site.order()


@pytest.mark.parametrize("how", ["plain", "settings", "another key"])
def test_forged_job_is_not_started(scene: Scene, site: Site, how: str) -> None:
    envelope = site.order()
    order = read(Order, read(SignedEnvelope, envelope).body)
    evil = order.model_copy(update={"training": order.training.model_copy(update={"learning_rate": 1e6})})
    orders: dict[str, Any] = {
        "plain": evil.model_dump(),
        "settings": read(SignedEnvelope, envelope).model_copy(update={"body": evil.pack()}).pack(),
        "another key": sign_envelope(SigningKey.generate(), ORDER, site.identity.scope, [], evil.pack()),
    }
    with pytest.raises(SignatureError):
        site.store.open_order(orders[how])


def test_job_of_an_earlier_namesake_run_is_not_started(scene: Scene, site: Site) -> None:
    old = site.order()
    scene.redis.flushall()
    again = scene.site("c0")
    scene.play(again.join)
    with pytest.raises(SignatureError, match="in another context"):
        again.store.open_order(old)


def test_successor_does_not_sign_a_planted_order(scene: Scene, site: Site) -> None:
    """A new leader enqueues unstarted jobs again, and must not sign an order that was changed in Redis."""
    job = site.job
    order = read(Order, read(SignedEnvelope, site.order()).body)
    evil = order.model_copy(update={"training": order.training.model_copy(update={"learning_rate": 1e6})})
    scene.redis.hset(scene.keys.job(job), "order", evil.pack())
    queue = f"rq:queue:{scene.keys.queue('c0')}"
    scene.redis.delete(queue, f"rq:job:{job}")
    scene.play()
    assert scene.redis.lrange(queue, 0, -1) == []


# Rotation of the coordinator's key during the run


def test_coordinator_key_rotates_without_restarting_sites(scene: Scene, site: Site) -> None:
    """Signatures of the previous key stay valid until the coordinator and the sites drop that key."""
    enroll(scene.key_folder, "coordinator", rotate=True)
    scene.play(site.post)  # trained from a version that the previous key signed
    assert (scene.version, scene.reasons()) == (3, [])
    revoke(scene.key_folder, "coordinator", previous=True)
    other = scene.site("c1")
    scene.play(site.post, other.join, other.post)
    assert (scene.version, scene.reasons()) == (5, [])


def test_revoked_coordinator_key_is_rejected(scene: Scene, site: Site) -> None:
    former = (scene.key_folder / "coordinator.key").read_bytes()
    enroll(scene.key_folder, "coordinator", rotate=True)
    scene.play(site.post)
    revoke(scene.key_folder, "coordinator", previous=True)
    (scene.key_folder / "coordinator.key").write_bytes(former)
    scene.play()  # a thief of the key, who controls Redis, leads
    with pytest.raises(SignatureError, match="not a key of the coordinator"):
        site.identity.enter(site.store.info())
    key = load_pem_private_key(former, None)
    assert isinstance(key, Ed25519PrivateKey)
    evil = SigningKey(key)
    with pytest.raises(SignatureError, match="not a key of the coordinator"):
        site.store.open_order(sign_envelope(evil, ORDER, site.identity.scope, [], b"x"))


def test_site_without_the_new_coordinator_key_refuses_the_run(scene: Scene, site: Site) -> None:
    (scene.key_folder / "sites" / "c0").rename(scene.folder / "c0")  # on the site's own machine
    away = scene.site("c0", folder=scene.folder / "c0")
    away.identity.enter(away.store.info())
    enroll(scene.key_folder, "coordinator", rotate=True)
    scene.play()
    with pytest.raises(SignatureError, match="not a key of the coordinator"):
        away.identity.enter(away.store.info())
    shutil.copy(scene.key_folder / "coordinator.pub", scene.folder / "c0")
    away.identity.enter(away.store.info())


# Takeovers


@pytest.mark.parametrize("what", ["model", "state"])
def test_successor_refuses_a_changed_run(scene: Scene, site: Site, what: str) -> None:
    key = getattr(scene.keys, what)(2)
    poisoned = np.frombuffer(stored(scene.redis, f"{key}:0"), np.uint8).copy()
    poisoned[-1] ^= 1
    scene.redis.set(f"{key}:0", poisoned.tobytes())
    with pytest.raises(SignatureError, match="is not"):
        scene.play()
    assert scene.version == 2


def rewrite_ledger(scene: Scene, change: Callable[..., Any]) -> None:
    """Rewrite the ledger with `change` applied to its records."""
    records = scene.store.ledger()
    change(records)
    scene.redis.delete(scene.keys.ledger)
    for record in records:
        scene.redis.xadd(scene.keys.ledger, {"record": msgpack.packb(record)})


CHANGES = {
    "a norm, which the limit is taken from": lambda ledger: ledger[0]["merged"][0].update(norm=1e9),
    "who contributed": lambda ledger: ledger[0]["merged"][0].update(client="c1"),
    "a version taken out": lambda ledger: ledger.pop(0),
    "a version put in": lambda ledger: ledger.append({**ledger[-1], "version": 3}),
    "two versions exchanged": lambda ledger: ledger.reverse(),
}


@pytest.mark.parametrize("what", CHANGES)
def test_successor_refuses_a_changed_history(scene: Scene, site: Site, what: str) -> None:
    rewrite_ledger(scene, CHANGES[what])
    with pytest.raises(SignatureError, match="is not the history of version 2 as it was signed"):
        scene.play()


def test_successor_accepts_an_identical_rewritten_ledger(scene: Scene, site: Site) -> None:
    rewrite_ledger(scene, lambda ledger: None)
    scene.play(site.post)
    assert scene.version == 3


def test_successor_refuses_changed_totals(scene: Scene, site: Site) -> None:
    totals = {**scene.store.info().totals, "updates": 10**6}
    scene.redis.hset(scene.keys.head, "totals", msgpack.packb(totals))
    with pytest.raises(SignatureError, match="totals in Redis are not those of version 2"):
        scene.play()


def test_coordinator_detects_a_changed_history_at_the_end(fake_client: redis.Redis, tmp_path: Path) -> None:
    scene = Scene(fake_client, tmp_path, stop={"versions": 2})
    site = scene.site("c0")

    def change() -> None:
        rewrite_ledger(scene, CHANGES["who contributed"])
        site.post()

    with structlog.testing.capture_logs() as logs:
        scene.play(site.join, site.post, change)
    problem = "the ledger in Redis does not match the committed versions: run `fedqueue audit`"
    assert [line["event"] for line in logs if line["log_level"] == "error"] == [problem]
    assert scene.store.info().stopped_because == problem


def test_history_is_verified_across_takeovers_and_epochs(fake_client: redis.Redis, tmp_path: Path) -> None:
    """Redis loses everything, the checkpoint restores the ledger, and a successor verifies both epochs' versions."""
    scene = Scene(fake_client, tmp_path, checkpoint={"every_seconds": 0.001})
    site = scene.site("c0")
    scene.play(site.join, site.post, site.post)
    scene.redis.flushall()
    again = scene.site("c0", "again")
    scene.play(again.join, again.post)
    reached = scene.version
    assert scene.store.info().epoch == 1
    scene.play(again.post)
    assert scene.version == reached + 1


def test_successor_keeps_the_norm_limit_on_a_real_server(server_client: redis.Redis, tmp_path: Path) -> None:
    scene = Scene(server_client, tmp_path, admission={"norm_quantile": 0.5, "norm_slack": 2.0, "norm_window": 12})
    site = scene.site("c0")
    first = scene.play(site.join, *(partial(site.post, float(n)) for n in range(1, 16)))
    second = scene.play(partial(site.post, 30.0), partial(site.post, 16.0))
    norms = [line["norm"] for r in scene.store.ledger() if r["kind"] == "version" for line in r["merged"]]
    assert len(norms) == 16
    assert list(first.federation._norms._accepted) == norms[3:15]
    assert list(second.federation._norms._accepted) == norms[4:16]
    assert scene.reasons() == ["too_large"], "30 exceeds twice the median of 4 … 15, and 16 does not"


def test_signed_run_does_not_continue_unsigned(scene: Scene, site: Site) -> None:
    scene.signed = False
    with pytest.raises(StoreError, match="was started with signatures"):
        scene.play()


def test_job_names_are_unique_after_a_counter_reset(scene: Scene, site: Site) -> None:
    """A reused job name would allow a second merge of an update that is merged already."""
    scene.redis.hset(scene.keys.head, "job_number", 0)
    before = {line["job"] for record in scene.store.ledger() for line in record.get("merged", ())}
    scene.play(site.post, site.post)
    merged = [line["job"] for record in scene.store.ledger() for line in record.get("merged", ())]
    assert len(merged) == len(set(merged)) == 4
    assert before < set(merged)


def test_client_names_cannot_escape_the_key_folder(scene: Scene, site: Site) -> None:
    (scene.key_folder / "evil.pub").write_text((scene.key_folder / "clients" / "c0.pub").read_text())
    for name in ("../evil", "..", "a/b", "", "c0\x00"):
        with pytest.raises(NotEnrolled):
            scene.identity().open("update", name, [], b"")
    revoke(scene.key_folder, "c1")
    assert not scene.identity().is_enrolled("c1")


def test_unsigned_worker_rejects_a_signed_order(scene: Scene, site: Site) -> None:
    scene.signed = False
    order = scene.site("c0").store.open_order(site.order())
    assert order.run == RUN
    with pytest.raises(WireError):
        scene.site("c0").store.open_order(b"\xc1")

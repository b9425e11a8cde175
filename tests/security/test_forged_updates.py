"""Reports forged in other clients' names are refused; the attacker controls Redis, or has a client key."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgpack
import pytest
import redis
import torch

from fedqueue.errors import ConfigurationError, SignatureError
from fedqueue.protocol.key_files import SigningKey
from fedqueue.protocol.messages import Ending, Registration, read
from fedqueue.protocol.signed_envelope import JOINED, LEFT, UPDATE, Scope, SignedEnvelope, open_envelope, sign_envelope
from fedqueue.transport.worker_store import WorkerStore
from fedqueue_coordinator.operator.access.enrolment import enroll, revoke
from fedqueue_worker.heartbeat import Heartbeat
from tests.support.builders import EXAMPLES
from tests.support.scene import RUN, Scene
from tests.support.small_task import SmallTask


@pytest.fixture
def scene(fake_client: redis.Redis, tmp_path: Path) -> Scene:
    return Scene(fake_client, tmp_path)


def change_entry(scene: Scene, change: Any) -> None:
    """Replace the unread stream entry by one with `change` applied to the fields."""
    [(name, fields)] = scene.entries()
    scene.redis.xdel(scene.keys.updates("c0"), name)
    scene.redis.xadd(scene.keys.updates("c0"), change(dict(fields)))


def resealed(body: bytes, **changes: Any) -> bytes:
    """Return the envelope with a changed body and the old signature."""
    envelope = read(SignedEnvelope, body)
    fields = {**msgpack.unpackb(envelope.body), **changes}
    return envelope.model_copy(update={"body": msgpack.packb(fields)}).pack()


def test_signed_update_is_merged_and_its_digest_recorded(scene: Scene) -> None:
    site = scene.site("c0")
    scene.play(site.join, site.post)
    assert scene.version == 1
    assert scene.reasons() == []
    [line] = scene.store.ledger()[-1]["merged"]
    assert len(line["digest"]) == 64


def test_unsigned_update_does_not_penalize_the_named_client(scene: Scene) -> None:
    site, thief = scene.site("c0"), WorkerStore(scene.redis, RUN, "thief")

    def forge() -> None:
        claim = thief.claim(site.job, 3600, "c0")
        assert thief.post(claim, site.update(), site.payload(1e6)) == ""

    rounds = scene.config.admission.max_rejections + 2
    leader = scene.play(site.join, *[forge] * rounds, site.post)
    assert scene.reasons() == ["forged"] * rounds
    assert scene.version == 1, "forgeries in its name excluded the client"
    assert leader.federation.stopped is None


@pytest.mark.parametrize(
    "change",
    [
        lambda fields: {**fields, b"body": resealed(fields[b"body"], examples=1)},
        lambda fields: {**fields, b"body": resealed(fields[b"body"], metrics={"loss": 0.0})},
        lambda fields: {**fields, b"body": resealed(fields[b"body"], digest="0" * 64)},
        lambda fields: {**fields, b"attempt": b"2"},
        lambda fields: {**fields, b"base": b"0"},
    ],
    ids=["examples", "metrics", "digest", "attempt", "base"],
)
def test_header_changed_in_transit_is_rejected(scene: Scene, change: Callable[..., Any]) -> None:
    site = scene.site("c0")

    def tamper() -> None:
        site.post()
        change_entry(scene, change)

    scene.play(site.join, site.post, tamper)
    assert scene.reasons() == ["forged"]
    assert scene.version == 1


def test_entry_put_back_unchanged_is_merged(scene: Scene) -> None:
    """Control: an entry that is moved without a change stays valid."""
    site = scene.site("c0")

    def move() -> None:
        site.post()
        change_entry(scene, dict)

    scene.play(site.join, site.post, move)
    assert scene.reasons() == []
    assert scene.version == 2


def test_payload_changed_in_redis_is_rejected_as_tampered(scene: Scene) -> None:
    site = scene.site("c0")

    def tamper() -> None:
        site.post()
        claim = site.claims[-1]
        scene.redis.set(f"{scene.keys.payload(claim.job, claim.attempt)}:0", site.payload(7.0).tobytes())

    rounds = scene.config.admission.max_rejections + 2
    scene.play(site.join, *[tamper] * rounds, site.post)
    assert scene.reasons() == ["tampered"] * rounds
    assert scene.version == 1


def test_update_of_an_older_job_is_invalid_for_a_newer_job(scene: Scene) -> None:
    site = scene.site("c0")
    kept: dict[str, dict[Any, Any]] = {}

    def first() -> None:
        site.post(5.0)
        [(_, kept["fields"])] = scene.entries()

    def replay() -> None:
        claim = site.fetch()
        scene.redis.set(f"{scene.keys.payload(claim.job, claim.attempt)}:0", site.payload(5.0).tobytes())
        fields = {**kept["fields"], b"job": claim.job.encode(), b"base": str(claim.version).encode()}
        scene.redis.xadd(scene.keys.updates("c0"), fields)

    scene.play(site.join, first, replay)
    assert scene.version == 1
    assert scene.reasons() == ["forged"]


def test_update_of_an_earlier_namesake_run_is_ignored(scene: Scene, tmp_path: Path) -> None:
    """The two runs differ only in the instance: name, epoch, job, attempt, base and payload are equal."""
    site = scene.site("c0")
    kept: dict[str, dict[Any, Any]] = {}

    def first() -> None:
        site.post(5.0)
        [(_, kept["fields"])] = scene.entries()

    scene.play(site.join, first)
    scene.redis.flushall()
    (tmp_path / "checkpoint.safetensors").unlink(missing_ok=True)
    again = scene.site("c0")

    def replay() -> None:
        claim = again.fetch()
        assert claim.job.encode() == kept["fields"][b"job"]
        scene.redis.set(f"{scene.keys.payload(claim.job, claim.attempt)}:0", site.payload(5.0).tobytes())
        scene.redis.xadd(scene.keys.updates("c0"), kept["fields"])

    scene.play(again.join, replay)
    assert scene.version == 0
    assert scene.reasons() == ["forged"]


def test_clients_key_cannot_sign_for_another_client(scene: Scene) -> None:
    site, other = scene.site("c0"), scene.site("c1")

    def forge() -> None:
        other.identity._keys["c0"] = other.identity._keys["c1"]  # c1 signs in the name of c0
        claim = other.store.claim(site.job, 3600, "c0")
        assert other.store.post(claim, site.update(), site.payload(9.0)) == ""

    scene.play(site.join, other.join, forge)
    assert scene.reasons() == ["forged"]
    assert scene.version == 0


def test_client_that_is_not_enrolled_gets_no_job(scene: Scene) -> None:
    key = SigningKey.generate()

    def intrude() -> None:
        instance = scene.site("c0").identity
        instance.enter(scene.store.info())
        registration = Registration(client="mallory", examples=EXAMPLES).pack()
        body = sign_envelope(key, JOINED, instance.scope, ["mallory"], registration, "session")
        scene.redis.sadd(scene.keys.clients, "mallory")
        scene.redis.xadd(scene.keys.updates("mallory"), {"kind": "joined", "body": body})

    leader = scene.play(intrude)
    assert leader.federation.clients == {}
    assert scene.reasons() == ["foreign"]
    assert scene.store.open_jobs() == 0


def test_client_cannot_register_examples_for_another_client(scene: Scene) -> None:
    """Too small a number would make the coordinator reject honest updates and exclude the client."""
    site = scene.site("c0")

    def lie() -> None:
        body = Registration(client="c0", examples=1).pack()
        scene.redis.hset(scene.keys.site("c0"), "registration", body)
        scene.redis.xadd(scene.keys.updates("c0"), {"kind": "joined", "body": body})

    scene.play(site.join, lie, site.post)
    assert (scene.version, scene.reasons()) == (1, ["forged"])
    scene.redis.hset(scene.keys.site("c0"), "registration", Registration(client="c0", examples=1).pack())
    leader = scene.play()
    assert leader.federation.clients == {}, "the successor accepted a forged registration"


def test_replayed_registration_of_an_old_worker_is_ignored(scene: Scene) -> None:
    first, second = scene.site("c0", "first"), scene.site("c0", "second")
    kept: dict[str, dict[Any, Any]] = {}

    def join_first() -> None:
        first.join(examples=3)
        kept["joined"] = scene.entries()[-1][1]

    def leave() -> None:
        first.leave()
        kept["left"] = scene.entries()[-1][1]

    def replay() -> None:
        for name in ("joined", "left"):
            scene.redis.xadd(scene.keys.updates("c0"), kept[name])

    leader = scene.play(join_first, leave, second.join, replay)
    assert dict(leader.federation.clients) == {"c0": EXAMPLES}
    assert scene.reasons() == ["returned", "superseded", "superseded"], (
        "the first worker's own leave is valid, the replays are not"
    )


def test_leave_message_of_a_superseded_worker_is_ignored(scene: Scene) -> None:
    """The first worker was away for longer than its lease, and exits after a second one took over its client."""
    first, second = scene.site("c0", "first"), scene.site("c0", "second")

    def restore_federation() -> None:
        scene.redis.hset(scene.keys.site("c0"), "alive", 0)
        second.join()

    def leave() -> None:
        body = first.identity.sign(LEFT, "c0", [], b"")
        scene.redis.xadd(scene.keys.updates("c0"), {"kind": "left", "body": body})

    leader = scene.play(first.join, restore_federation, leave, second.post)
    assert scene.reasons() == ["superseded"]
    assert dict(leader.federation.clients) == {"c0": EXAMPLES}
    assert scene.version == 1


def test_forged_endings_do_not_exclude_a_client(scene: Scene) -> None:
    site = scene.site("c0")
    thief = WorkerStore(scene.redis, RUN, "thief")
    rounds = scene.config.dispatch.max_client_failures + 2

    def end() -> None:
        claim = thief.claim(site.job, 3600, "c0")
        assert thief.end(claim, Ending(reason="failed", error="a lie")) == ""

    scene.play(site.join, *[end] * rounds, site.post)
    assert scene.reasons() == ["forged"] * rounds
    assert scene.version == 1


class FailedTest(SmallTask):
    """The accuracy of every model is 0."""

    def test_data(self) -> str:
        return "test data"

    def evaluate(self, model: torch.nn.Module, data: str) -> dict[str, float]:
        return {"accuracy": 0.0}


def test_forged_evaluation_does_not_stop_the_run(fake_client: redis.Redis, tmp_path: Path) -> None:
    scene = Scene(fake_client, tmp_path, stop={"target": {"accuracy": 0.9}})
    scene.task = FailedTest(batch_norm=False)
    site = scene.site("c0")

    def lie() -> None:
        body = msgpack.packb({"version": 0, "metrics": {"accuracy": 1.0}, "error": ""})
        scene.redis.xadd(scene.keys.updates(""), {"kind": "evaluated", "body": body})

    leader = scene.play(site.join, lie, site.post)
    assert leader.federation.stopped is None
    assert (scene.version, scene.reasons()) == (1, ["forged"])


# Rotation and revocation during the run


def test_revoked_client_is_refused_and_the_others_continue(scene: Scene) -> None:
    site, other = scene.site("c0"), scene.site("c1")

    def then_revoke() -> None:
        site.post()
        revoke(scene.key_folder, "c0")

    leader = scene.play(site.join, other.join, other.post, then_revoke, other.post)
    assert scene.version == 2
    assert set(scene.reasons()) == {"foreign"}
    record = next(r for r in scene.store.ledger() if r["kind"] == "rejected")
    assert "was revoked" in record["detail"]
    leader = scene.play()
    assert set(leader.federation.clients) == {"c1"}


def test_rotation_accepts_both_keys_until_one_is_revoked(scene: Scene, tmp_path: Path) -> None:
    old = scene.site("c0", "old")
    new_folder = tmp_path / "new"
    later = []

    def rotate() -> None:
        enroll(scene.key_folder, "c0", new_folder, rotate=True)
        old.post()  # an update signed with the previous key

    def renewed() -> None:
        old.leave()
        later.append(scene.site("c0", "new", new_folder))
        later[0].join()

    def post_renewed() -> None:
        later[0].post()

    def stolen() -> None:
        revoke(scene.key_folder, "c0", previous=True)
        claim = old.store.claim(old.job, 3600, "c0")
        assert old.store.post(claim, old.update(), old.payload(9.0)) == ""

    scene.play(old.join, old.post, rotate, renewed, post_renewed, stolen, post_renewed)
    assert scene.version == 4
    assert scene.reasons() == ["forged"]


def test_worker_uses_its_new_key_without_a_restart(scene: Scene) -> None:
    site = scene.site("c0")

    def rotate() -> None:
        enroll(scene.key_folder, "c0", rotate=True)  # writes the new key into the folder that the site reads
        site.post()

    def revoke_former() -> None:
        revoke(scene.key_folder, "c0", previous=True)
        site.post()

    scene.play(site.join, site.post, rotate, revoke_former)
    assert (scene.version, scene.reasons()) == (3, [])


def test_worker_with_a_new_key_registers_again(scene: Scene) -> None:
    site = scene.site("c0")
    ends: list[Any] = []

    def join() -> None:
        site.join()
        heartbeat.register(Registration(client="c0", examples=EXAMPLES))

    def rotate() -> None:
        enroll(scene.key_folder, "c0", rotate=True)
        heartbeat.beat()
        heartbeat.beat()
        assert len(scene.entries()) == 1, "the worker did not register exactly once"

    heartbeat = Heartbeat(site.store, ["c0"], 3600, 3600, ends.append)
    scene.play(join, site.post, rotate, site.post)
    revoke(scene.key_folder, "c0", previous=True)
    leader = scene.play(site.post)
    assert dict(leader.federation.clients) == {"c0": EXAMPLES}
    assert (scene.version, scene.reasons(), ends) == (3, [], [])


def test_half_written_key_file_leaves_the_old_key_in_use(scene: Scene) -> None:
    site = scene.site("c0")
    path = scene.key_folder / "sites" / "c0" / "c0.key"

    def damage() -> None:
        path.write_bytes(path.read_bytes()[:40])
        site.post()

    scene.play(site.join, damage)
    assert (scene.version, scene.reasons()) == (1, [])


def test_successor_does_not_merge_updates_of_a_revoked_client(fake_client: redis.Redis, tmp_path: Path) -> None:
    """Recovery verifies unacknowledged entries again."""
    scene = Scene(fake_client, tmp_path, aggregation={"strategy": "fedbuff", "buffer_size": 2})
    site, other = scene.site("c0"), scene.site("c1")
    scene.play(site.join, other.join, site.post)
    assert scene.version == 0
    revoke(scene.key_folder, "c0")
    scene.play(other.post)
    assert (scene.version, scene.reasons()) == (0, ["foreign"])


def test_signed_run_has_the_same_bits_after_a_takeover(fake_client: redis.Redis, tmp_path: Path) -> None:
    models = []
    for name, cut in (("whole", None), ("cut", 3)):
        fake_client.flushall()
        scene = Scene(fake_client, tmp_path / name, aggregation={"strategy": "fedbuff", "buffer_size": 2})
        (tmp_path / name).mkdir(exist_ok=True)
        sites = scene.site("c0"), scene.site("c1")
        posts = [partial(sites[i % 2].post, 0.1 * (i + 1)) for i in range(6)]
        scene.play(*(site.join for site in sites), *posts[:cut])
        if cut:
            scene.play(*posts[cut:])
        assert scene.version == 3
        models.append(scene.model())
    assert models[0] == models[1]


# The signed statement


def test_signature_covers_every_field_of_its_statement(tmp_path: Path) -> None:
    key = SigningKey.generate()
    scope = Scope("run", "instance", 1)
    data = sign_envelope(key, UPDATE, scope, ["c0", "job", 1, 2], b"body", "session")
    assert open_envelope(data, [key.public], UPDATE, scope, ["c0", "job", 1, 2], "c0").body == b"body"
    others: list[tuple[str, Scope, list[str | int]]] = [
        ("ended", scope, ["c0", "job", 1, 2]),
        (UPDATE, Scope("other", "instance", 1), ["c0", "job", 1, 2]),
        (UPDATE, Scope("run", "other", 1), ["c0", "job", 1, 2]),
        (UPDATE, Scope("run", "instance", 2), ["c0", "job", 1, 2]),
        (UPDATE, scope, ["c1", "job", 1, 2]),
        (UPDATE, scope, ["c0", "job2", 1, 2]),
        (UPDATE, scope, ["c0", "job", 2, 2]),
        (UPDATE, scope, ["c0", "job", 1, 3]),
    ]
    for kind, where, about in others:
        with pytest.raises(SignatureError, match="the signature is invalid"):
            open_envelope(data, [key.public], kind, where, about, "c0")
    for field, value in (("body", b"bodY"), ("session", "sessioN")):
        changed = read(SignedEnvelope, data).model_copy(update={field: value}).pack()
        with pytest.raises(SignatureError, match="the signature is invalid"):
            open_envelope(changed, [key.public], UPDATE, scope, ["c0", "job", 1, 2], "c0")


def test_private_key_readable_by_others_is_refused(scene: Scene) -> None:
    path = scene.key_folder / "coordinator.key"
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o640)
    with pytest.raises(ConfigurationError, match="others may read"):
        scene.identity()

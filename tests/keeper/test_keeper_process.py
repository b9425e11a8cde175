"""The process follows its run, answers each ask, and continues after restarts, outages and lost data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import redis

from fedqueue.errors import ConfigurationError, SignatureError, StoreError
from fedqueue.protocol.key_files import CLIENTS, KEEPERS, SigningKey, write_public_keys
from fedqueue.protocol.messages import KeeperKey, Masked, MaskRefused, Opened, read
from fedqueue.protocol.signed_envelope import KEEPER, MASK_REFUSED, MASKED, OPENED, digest_of
from fedqueue.secure.keeper import OwnBudget
from fedqueue.tensors import blobs
from fedqueue_keeper.keeper_store import KeeperStore
from fedqueue_keeper.policy import KeeperPolicy, load_keeper_policy
from fedqueue_keeper.process import LOOK_SECONDS, KeeperProcess
from tests.support.masked_run import RUN, MaskedRun, Posted

KINDS: dict[str, Any] = {OPENED: Opened, MASKED: Masked, MASK_REFUSED: MaskRefused}


class Site:
    """A keeper's machine: starts its process, which takes single steps, with a clock that a test moves."""

    def __init__(self, run: MaskedRun, client: redis.Redis, name: str = "k0") -> None:
        self.run, self.client, self.name = run, client, name
        self.store = KeeperStore(client, RUN)
        self.keys = self.store.keys
        self.now = 0.0
        self.process = self.start()

    def start(self, policy: KeeperPolicy | None = None) -> KeeperProcess:
        self.process = KeeperProcess(
            self.store, self.run.identity(self.name, entered=False), self.run.folder / "state",
            policy or KeeperPolicy(), lambda: self.now, self.sleep,
        )  # fmt: skip
        return self.process

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def step(self) -> str:
        """Look at the run, and answer what was asked."""
        self.now += LOOK_SECONDS
        return self.process.step()

    def restart(self) -> None:
        self.process.close()
        self.start()
        self.step()

    def ask(self, kind: str, body: bytes) -> None:
        self.client.xadd(self.keys.asks(self.name), {"kind": kind, "body": body})

    def offer(self, *posted: Posted) -> None:
        for update in posted:
            self.ask("offer", update.offer.pack())

    def said(self) -> list[Any]:
        """The answers since the last call, verified with the keeper's public key."""
        stream = self.keys.says(self.name)
        entries: Any = self.client.xrange(stream)
        found: list[Any] = []
        for entry, fields in entries:
            kind = fields[b"kind"].decode()
            answer: Any = read(KINDS[kind], self.run.coordinator.open_keeper(kind, self.name, fields[b"body"]))
            found += answer.offers if kind == OPENED else [answer]
            self.client.xdel(stream, entry)
        return found

    def mask(self, masked: Masked) -> np.ndarray[Any, np.dtype[np.uint8]]:
        into = np.empty(masked.nbytes, np.uint8)
        self.store.read_blob(self.keys.mask(masked.cohort, self.name), into)
        assert digest_of(into) == masked.digest
        return into

    def use_published_key(self) -> KeeperKey:
        """Let clients encrypt to the key that the process has published."""
        statement = read(KeeperKey, self.run.coordinator.open_keeper(KEEPER, self.name, self.published()))
        self.run.publics[self.name] = statement.public
        return statement

    def published(self) -> bytes:
        return self.store.published_key(self.name)

    @property
    def files(self) -> list[Path]:
        return sorted((self.run.folder / "state" / self.name).glob("*.sqlite"))


@pytest.fixture
def run(tmp_path: Path) -> MaskedRun:
    return MaskedRun(tmp_path)


@pytest.fixture
def site(run: MaskedRun, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr("fedqueue_keeper.process.LOOK_SECONDS", 0.001)  # no read waits
    site = Site(run, redis_client)
    yield site
    site.process.close()


@pytest.fixture
def serving(site: Site) -> Site:
    site.run.write(site.client)
    site.step()
    site.use_published_key()
    return site


def posted(run: MaskedRun, clients: str = "abcd", base: int = 0) -> list[Posted]:
    return [run.post(client, base, vector=3 + i) for i, client in enumerate(clients)]


def released(site: Site, version: int = 0, clients: str = "abcd") -> tuple[Masked, bytes]:
    """Offer updates, and have them released; returns the answer and the signed cohort."""
    updates = posted(site.run, clients)
    site.offer(*updates)
    signed = site.run.propose(version, updates)
    site.ask("cohort", signed)
    site.step()
    *opened, masked = site.said()
    assert [answer.refusal for answer in opened] == [""] * len(clients)
    assert isinstance(masked, Masked)
    return masked, signed


# Answers


def test_keeper_publishes_its_key_with_its_component(site: Site) -> None:
    site.run.write(site.client)
    site.step()
    assert site.use_published_key().component == 0


def test_keeper_opens_offers_and_releases_a_mask(serving: Site) -> None:
    masked, _ = released(serving)
    assert (masked.nbytes, masked.chunks) == (24, 1)
    assert serving.mask(masked).any()
    assert serving.client.ttl(f"{serving.keys.mask(masked.cohort, 'k0')}:0") > 0


def test_answer_wakes_the_coordinator(serving: Site) -> None:
    heard: Any = serving.client.pubsub()  # type: ignore[no-untyped-call]
    heard.subscribe(serving.keys.wakeup)
    heard.get_message(timeout=1)
    released(serving)
    assert heard.get_message(timeout=1)["data"] == serving.keys.says("k0").encode()
    heard.close()


def test_large_mask_is_stored_in_chunks(serving: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobs, "CHUNK", 10)
    masked, signed = released(serving)
    assert masked.chunks == 3
    whole = serving.mask(masked).tobytes()
    monkeypatch.undo()
    monkeypatch.setattr("fedqueue_keeper.process.LOOK_SECONDS", 0.001)
    serving.ask("cohort", signed)
    serving.step()
    assert serving.mask(serving.said()[0]).tobytes() == whole


def test_one_signature_answers_offers_read_together(serving: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    first, *others = posted(serving.run)
    monkeypatch.setattr(serving.process, "_sleep", lambda seconds: serving.offer(*others))
    serving.offer(first)
    serving.step()
    stream: Any = serving.client.xrange(serving.keys.says(serving.name))
    assert len(stream) == 1
    assert [opened.header for opened in serving.said()] == [update.header for update in (first, *others)]


def test_cohort_does_not_wait_for_offers(serving: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving.process, "_sleep", lambda seconds: pytest.fail("it waited"))
    released(serving)


def test_refused_update_and_cohort_are_answered(serving: Site) -> None:
    updates = posted(serving.run)
    stranger = serving.run.post("e")
    (serving.run.folder / CLIENTS / "e.pub").unlink()
    serving.offer(*updates, stranger)
    serving.ask("cohort", serving.run.propose(0, updates[:2]))
    serving.step()
    *opened, refused = serving.said()
    assert [answer.refusal for answer in opened] == ["", "", "", "", "foreign"]
    assert (refused.reason, refused.cohort) == ("crowd", serving.run.id(serving.run.cohort(0, updates[:2])))


@pytest.mark.parametrize(
    ("kind", "body"),
    [("offer", b"no offer"), ("cohort", b"no cohort"), ("unheard", b""), ("", b""), ("cohort", msgpack.packb({}))],
)
def test_senseless_ask_is_passed_over(serving: Site, kind: str, body: bytes) -> None:
    serving.ask(kind, body)
    serving.client.xadd(serving.keys.asks("k0"), {"other": "fields"})
    released(serving)


def test_no_secret_is_in_redis_or_in_the_log(serving: Site, capsys: pytest.CaptureFixture[str]) -> None:
    stranger = serving.run.post("e")
    (serving.run.folder / CLIENTS / "e.pub").unlink()
    serving.offer(stranger, *posted(serving.run))
    serving.step()
    served: Any = serving.process._served
    secrets = [held.seed for held in served.keeper._held.values()]
    assert len(secrets) == 4
    secrets += [served.log.secret, served.log.key.to_bytes()[:64], served.log.key.to_bytes()[64:]]
    serving.ask("cohort", serving.run.propose(0, posted(serving.run)))  # refused: unknown
    serving.step()
    serving.said()
    released(serving)
    client: Any = serving.client
    stored = b"".join(client.execute_command("DUMP", key) for key in client.execute_command("KEYS", "*"))
    stored += b"".join(
        value for key in (serving.keys.says("k0"), serving.keys.asks("k0"))
        for _, fields in client.xrange(key) for value in fields.values()
    )  # fmt: skip
    shown = capsys.readouterr().out
    assert "refused a cohort" in shown
    for secret in secrets:
        assert secret not in stored
        assert secret.hex() not in shown + repr(serving.process.__dict__) + repr(served)
        assert repr(secret)[2:-1] not in shown + repr(serving.process.__dict__) + repr(served)


# Restarts


def test_restarted_keeper_answers_all_again_with_the_same_bytes(serving: Site) -> None:
    masked, _ = released(serving)
    before = serving.mask(masked).tobytes()
    serving.client.delete(f"{serving.keys.mask(masked.cohort, 'k0')}:0")
    key = serving.published()
    serving.restart()
    *opened, again = serving.said()
    assert [answer.refusal for answer in opened] == ["spent"] * 4
    assert again == masked
    assert serving.mask(again).tobytes() == before
    assert serving.published() == key


def test_keeper_that_lost_its_file_says_so(serving: Site) -> None:
    updates = posted(serving.run)
    former = serving.published()
    serving.process.close()
    serving.files[0].unlink()
    serving.start()
    serving.offer(*updates)
    serving.step()
    assert [answer.refusal for answer in serving.said()] == ["keeper_lost"] * 4
    assert serving.published() != former


def test_outage_makes_the_keeper_answer_all_again(serving: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    updates = posted(serving.run)
    serving.offer(*updates)
    serving.step()
    serving.client.delete(serving.keys.says("k0"))  # the server lost them
    steps: Any = iter([redis.ConnectionError("away"), "", "the run has ended: test"])
    whole = serving.process.step

    def step() -> str:
        outcome = next(steps)
        if isinstance(outcome, Exception):
            raise outcome
        serving.now += LOOK_SECONDS
        return outcome or whole()

    monkeypatch.setattr(serving.process, "step", step)
    assert serving.process.run() == "the run has ended: test"
    assert len(serving.said()) == 4


def test_lost_key_is_published_again(serving: Site) -> None:
    key = serving.published()
    serving.client.flushall()
    serving.run.write(serving.client)
    serving.step()
    assert serving.published() == key


def test_key_of_a_later_process_ends_the_former(serving: Site) -> None:
    theirs = serving.run.folder / "another"
    other = Site(serving.run, serving.client)
    other.process = KeeperProcess(
        other.store, serving.run.identity("k0", entered=False), theirs, KeeperPolicy(), lambda: other.now, other.sleep
    )
    other.step()
    with pytest.raises(StoreError, match="another process of keeper k0 has published a key"):
        serving.step()
    other.process.close()


def test_rotated_signing_key_signs_the_encryption_key_again(serving: Site) -> None:
    former = read(KeeperKey, serving.run.coordinator.open_keeper(KEEPER, "k0", serving.published()))
    new = SigningKey.generate()
    new.save(serving.run.folder / "k0.key")
    write_public_keys(serving.run.folder / KEEPERS / "k0.pub", [new.public])
    serving.step()
    assert read(KeeperKey, serving.run.coordinator.open_keeper(KEEPER, "k0", serving.published())) == former
    released(serving)


def test_key_by_somebody_else_is_replaced(serving: Site) -> None:
    key = serving.published()
    for planted in (b"", b"nonsense", serving.run.sites["a"].sign(KEEPER, "a", [], b"x")):
        serving.client.set(serving.keys.keeper("k0"), planted)
        serving.step()
        assert serving.published() == key


# The life of the run


def test_keeper_waits_for_the_run_to_start(site: Site) -> None:
    assert site.step() == ""
    assert site.files == []
    site.run.write(site.client)
    site.step()
    assert len(site.files) == 1


def test_end_of_the_run_deletes_the_key(serving: Site) -> None:
    released(serving)
    serving.run.write(serving.client, state="ended")
    assert serving.step() == "the run has ended: test"
    assert serving.files == []
    serving.start()
    assert serving.step() == "the run has ended: test"


def test_run_that_ended_while_the_keeper_was_away_loses_its_key(serving: Site) -> None:
    serving.process.close()
    serving.run.write(serving.client, state="ended")
    serving.start()
    serving.step()
    assert serving.files == []


def test_missing_run_keeps_the_key(serving: Site) -> None:
    key = serving.published()
    serving.client.flushall()
    assert serving.step() == ""
    serving.run.write(serving.client)
    serving.step()
    assert serving.published() == key


def test_new_leader_is_answered_again(serving: Site) -> None:
    updates = posted(serving.run)
    serving.offer(*updates)
    serving.step()
    assert len(serving.said()) == 4
    serving.run.next_term()
    serving.run.write(serving.client)
    serving.step()
    assert len(serving.said()) == 4


def test_version_goes_back_with_the_next_leader(serving: Site) -> None:
    released(serving, version=5)
    updates = posted(serving.run)
    serving.offer(*updates)
    serving.run.next_term(version=4)
    serving.run.write(serving.client)
    serving.ask("cohort", serving.run.propose(4, updates))
    serving.step()
    assert isinstance(serving.said()[-1], Masked)


def test_next_epoch_has_another_key(serving: Site) -> None:
    former, file = serving.published(), serving.files
    serving.run.begin(epoch=1)
    serving.run.write(serving.client)
    serving.step()
    assert serving.published() != former
    assert len(serving.files) == 1
    assert serving.files != file
    serving.run.enter()
    serving.use_published_key()
    released(serving)


def test_ask_of_the_next_epoch_is_not_refused(serving: Site) -> None:
    """The offer arrives between two looks at the run: the keeper looks before it calls the update foreign."""
    serving.run.begin(epoch=1)
    serving.run.enter()
    serving.run.write(serving.client)
    serving.offer(serving.run.post("a"))
    serving.process.step()  # without a look
    assert [answer.refusal for answer in serving.said()] == ["keeper_lost"]


# What it does not serve


def signed_again(run: MaskedRun, config: dict[str, Any]) -> None:
    """The coordinator signs another configuration for the same run instance, which no honest one does."""
    run.config_text = json.dumps(config).encode()
    descriptor = run.coordinator._descriptor(
        run.scope.instance, 0, 0, digest_of(run.config_text), digest_of(run.manifest), ""
    )
    run._described(descriptor, 0)


def test_changed_configuration_is_not_followed(serving: Site) -> None:
    config = json.loads(serving.run.config_text)
    config["secure"]["min_cohort"] = 2
    signed_again(serving.run, config)
    serving.run.write(serving.client)
    with pytest.raises(SignatureError, match="has signed another configuration or manifest for the same run"):
        serving.step()


def test_changed_configuration_opens_no_update_after_a_restart(serving: Site) -> None:
    """A restarted keeper cannot know the former configuration, but clients have bound their seeds to it."""
    updates = posted(serving.run)
    config = json.loads(serving.run.config_text)
    config["secure"]["min_cohort"] = 2
    signed_again(serving.run, config)
    serving.run.write(serving.client)
    serving.process.close()
    serving.start()
    serving.offer(*updates)
    serving.step()
    assert [answer.refusal for answer in serving.said()] == ["unmaskable"] * 4


def test_replayed_epoch_gets_a_key_that_opens_nothing(serving: Site) -> None:
    """Redis shows a keeper that starts again the former epoch: the key that its updates were masked for is gone."""
    former, updates = serving.run.info, posted(serving.run)
    serving.run.begin(epoch=1)
    serving.run.write(serving.client)
    serving.step()
    serving.process.close()
    serving.run.info = former
    serving.run.write(serving.client)
    serving.start()
    serving.step()
    assert [serving.process._keeper.offer(update.offer).refusal for update in updates] == ["keeper_lost"] * 4


def test_epoch_that_goes_back_is_not_followed(serving: Site) -> None:
    former = serving.run.info
    serving.run.begin(epoch=1)
    serving.run.write(serving.client)
    serving.step()
    serving.run.info = former
    serving.run.write(serving.client)
    with pytest.raises(SignatureError, match="went back from epoch 1 to 0"):
        serving.step()


def test_unsigned_run_is_not_served(site: Site) -> None:
    site.run.write(site.client)
    site.client.hdel(site.keys.config, "descriptor")
    with pytest.raises(ConfigurationError, match="keepers serve signed runs only"):
        site.step()


def test_run_of_another_coordinator_is_not_served(site: Site, tmp_path: Path) -> None:
    other = MaskedRun(tmp_path / "other")
    other.write(site.client)
    with pytest.raises(SignatureError):
        site.step()


def test_run_with_other_keepers_is_not_served(run: MaskedRun, redis_client: redis.Redis) -> None:
    SigningKey.generate().save(run.folder / "k7.key")
    run.write(redis_client)
    site = Site(run, redis_client, "k7")
    with pytest.raises(ConfigurationError, match="has the keepers k0, k1; pass one of the names"):
        site.step()


def test_run_with_smaller_crowds_than_allowed_is_not_served(site: Site) -> None:
    site.run.write(site.client)
    site.start(KeeperPolicy(min_cohort=4))
    with pytest.raises(ConfigurationError, match=r"min_cohort = 4: run 'masked' has secure.min_cohort = 3"):
        site.step()
    site.start(KeeperPolicy(min_cohort=3))
    assert site.step() == ""


def test_run_without_noise_is_not_served_under_a_budget(site: Site) -> None:
    site.run.write(site.client)
    site.start(KeeperPolicy(max_epsilon=8, delta=1e-5))
    with pytest.raises(ConfigurationError, match=r"max_epsilon = 8.*run 'masked' has no \[privacy.clients\]"):
        site.step()


def test_policy_with_half_a_budget_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keeper.toml"
    path.write_text("max_epsilon = 8\n")
    with pytest.raises(ConfigurationError, match="max_epsilon and delta belong together"):
        load_keeper_policy(path)
    path.write_text("max_epsilon = 8\ndelta = 1e-5\n")
    assert load_keeper_policy(path).own_budget == OwnBudget(8.0, 1e-5)


def test_clients_off_the_roster_are_named(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    (site.run.folder / CLIENTS / "e.pub").unlink()
    site.run.write(site.client)
    site.step()
    assert "clients are not on this keeper's roster" in capsys.readouterr().out

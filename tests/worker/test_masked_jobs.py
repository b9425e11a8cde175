"""A job of a run with keepers, from its order to the masked update that only the keepers' masks make readable."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import redis
import torch

from fedqueue import Client, Progress
from fedqueue.errors import ConfigurationError
from fedqueue.protocol.keeper_identity import load_keeper_identity
from fedqueue.protocol.key_files import KEEPERS, SigningKey, write_public_keys
from fedqueue.protocol.messages import Ending, KeeperKey, MaskedUpdate, Offer, Order, read
from fedqueue.protocol.signed_envelope import KEEPER, UPDATE, digest_of, unverified_body
from fedqueue.protocol.site_identity import load_site_identity
from fedqueue.protocol.stream_entry import StreamEntry
from fedqueue.secure.keeper import Keeper
from fedqueue.secure.masked_update import Attempt, Masking
from fedqueue.secure.masks import MaskStream
from fedqueue.secure.ring import Ring
from fedqueue.tensors.frame import Frame
from fedqueue.transport.worker_store import WorkerStore
from fedqueue_worker.egress_log import EgressLog
from fedqueue_worker.heartbeat import Heartbeat
from fedqueue_worker.job_runner import KEYS_SECONDS, JobRunner
from fedqueue_worker.policy import ALLOW_ALL, Policy
from tests.support.masked_run import RUN, MaskedRun
from tests.support.sample_run import SampleRun
from tests.support.training_site import Doubling

pytestmark = pytest.mark.usefixtures("logs")
CLIENT = "a"


class MaskedSite:
    """The worker of client a, on a signed run with keepers k0 and k1, whose encryption keys are published."""

    def __init__(self, client: redis.Redis, folder: Path, **secure: Any) -> None:
        self.parties = MaskedRun(folder, parameters=8, **secure)
        sections = {name: self.parties.config.model_dump()[name] for name in ("clients", "aggregation", "secure")}
        self.run = SampleRun(client, RUN, keys=folder, batch_norm=False, **sections)
        site = folder / "site"
        site.mkdir()
        for name in ("a.key", "coordinator.pub"):
            shutil.copy(folder / name, site)
        shutil.copytree(folder / KEEPERS, site / KEEPERS)
        self.identity = load_site_identity(site, RUN, "session")
        self.store = WorkerStore(client, RUN, "session", self.identity)
        self.identity.enter(self.store.info())
        assert self.store.join([CLIENT], 60) == CLIENT
        self.task = Doubling()
        self.log = folder / "egress.jsonl"
        self.ring = Ring(10.0, 4, 8, 2, 8)
        self.now = 0.0
        self.runner = self.new_runner()
        for component, keeper in enumerate(self.parties.keepers):
            self.publish(keeper, component)

    def new_runner(self, policy: Policy = ALLOW_ALL) -> JobRunner:
        heartbeat = Heartbeat(self.store, [CLIENT], 60, 60, lambda reason: None)
        runner = JobRunner(
            self.store, self.task, self.run.module, heartbeat, 60, True, {}, policy, EgressLog(self.log, RUN),
            masking=Masking(self.parties.config, self.run.manifest), clock=lambda: self.now,
        )  # fmt: skip
        runner.load(Client(CLIENT), "the rows of a")
        return runner

    def publish(self, keeper: str, component: int, key: SigningKey | None = None) -> None:
        """Store the keeper's encryption key, signed by it, or by another key."""
        identity = load_keeper_identity(self.parties.folder, RUN, keeper)
        identity.enter(self.store.info())
        if key:
            identity._key._keys = key
        body = KeeperKey(public=self.parties.keys[keeper].public, component=component).pack()
        self.run.client.set(self.key(keeper), identity.sign(KEEPER, body))

    def key(self, keeper: str) -> str:
        return self.run.keys.keeper(keeper)

    def train(self, number: int = 1) -> StreamEntry:
        order = self.order(number)
        self.run.dispatch_order(order, number)
        self.runner.train(self.run.coordinator.pack_order(order))
        return self.run.coordinator.unacknowledged()[-1]

    def order(self, number: int = 1) -> Order:
        return self.run.order(number, CLIENT)

    def keeper(self, name: str) -> Keeper:
        identity = load_keeper_identity(self.parties.folder, RUN, name)
        identity.enter(self.store.info())
        return self.parties.start(name, scope=self.identity.scope, verifier=identity)

    def payload(self, entry: StreamEntry) -> npt.NDArray[np.uint32]:
        words = np.empty(8, np.uint32)
        self.run.coordinator.read_blob(self.run.keys.payload(entry.job, entry.attempt), words.view(np.uint8))
        return words

    def seeds(self, entry: StreamEntry) -> list[bytes]:
        """What the keepers find in the envelopes."""
        offer = Offer(client=CLIENT, job=entry.job, attempt=entry.attempt, base=entry.base, header=entry.body)
        found = []
        for name in self.parties.keepers:
            keeper = self.keeper(name)
            assert keeper.offer(offer).refusal == ""
            [held] = keeper._held.values()
            found.append(held.seed)
        return found

    def unmasked(self, entry: StreamEntry) -> list[int]:
        """The quantized delta, once all masks are taken off."""
        return self.without_masks(self.payload(entry), entry)

    def without_masks(self, payload: npt.NDArray[np.uint32], entry: StreamEntry) -> list[int]:
        words = payload.copy()
        for seed in self.seeds(entry):
            mask = np.empty(8, np.uint32)
            MaskStream(seed).next_into(mask)
            words -= mask
        return words.view(np.int32).tolist()  # type: ignore[no-any-return]


@pytest.fixture
def site(fake_client: redis.Redis, tmp_path: Path) -> MaskedSite:
    return MaskedSite(fake_client, tmp_path)


def header(entry: StreamEntry) -> MaskedUpdate:
    return read(MaskedUpdate, unverified_body(entry.body))


def test_the_keepers_masks_make_the_update_readable(site: MaskedSite) -> None:
    unmasked = np.array(site.unmasked(site.train())) * site.ring.scale
    assert unmasked == pytest.approx(np.full(8, 0.25), abs=site.ring.scale)


def test_one_keeper_less_leaves_random_words(site: MaskedSite) -> None:
    entry = site.train()
    assert len({len(site.seeds(entry)), len(set(site.seeds(entry)))}) == 1, "each component has a seed of its own"
    for seed in site.seeds(entry):
        mask = np.empty(8, np.uint32)
        MaskStream(seed).next_into(mask)
        still = (site.payload(entry) - mask).view(np.int32).astype(np.int64)
        assert np.abs(still).max() > site.ring.levels


def test_the_header_tells_no_metric_and_the_base_models_digest(site: MaskedSite) -> None:
    entry = site.train()
    told = header(entry)
    assert (told.encoding, told.nbytes, told.chunks, told.examples) == ("ring32", 32, 1, 10)
    assert told.metrics == {}
    assert told.digest == digest_of(site.payload(entry).view(np.uint8))
    assert told.model == digest_of(site.run.payload(0.0))
    assert [(seed.component, seed.keeper) for seed in told.seeds] == [(0, "k0"), (1, "k1")]
    assert site.identity.sign(UPDATE, CLIENT, [entry.job, 1, 0], told.pack()) == entry.body


def test_the_same_job_is_rounded_the_same_and_masked_anew(site: MaskedSite) -> None:
    first, second = site.train(1), site.train(2)
    assert site.payload(first).tolist() != site.payload(second).tolist()
    assert site.unmasked(first) != site.unmasked(second), "another seed rounds otherwise"
    masking = Masking(site.parties.config, site.run.manifest)
    plain = []
    for _ in range(2):
        frame = Frame(site.run.manifest)
        frame.parameters.fill_(0.25)
        update, payload = masking.mask(
            site.run.update(frame.buffer), frame, site.order(1),
            Attempt(site.identity.scope, 1, 0, header(first).model), [k.public for k in site.parties.keys.values()],
        )  # fmt: skip
        body = site.identity.sign(UPDATE, CLIENT, [first.job, 1, 0], update.pack())
        plain.append(site.without_masks(payload.view(np.uint32), replace(first, body=body)))
    assert plain[0] == plain[1] == site.unmasked(first)


def test_a_repeated_post_sends_the_same_bytes(site: MaskedSite, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[bytes, bytes]] = []
    post = site.store.post

    def lost_answer(claim: Any, update: Any, payload: Any, *others: Any) -> Any:
        sent.append((update.pack(), bytes(payload)))
        answer = post(claim, update, payload, *others)
        if len(sent) == 1:
            raise redis.ConnectionError("the answer is lost")
        return answer

    monkeypatch.setattr(site.store, "post", lost_answer)
    monkeypatch.setattr("fedqueue.transport.retry.time.sleep", lambda seconds: None)
    entry = site.train()
    assert sent[0] == sent[1]
    assert np.array(site.unmasked(entry)) * site.ring.scale == pytest.approx(np.full(8, 0.25), abs=site.ring.scale)


def test_examples_scale_the_clipped_delta(fake_client: redis.Redis, tmp_path: Path) -> None:
    site = MaskedSite(fake_client, tmp_path, max_examples=40)
    config = site.parties.config
    aggregation = config.aggregation.model_copy(update={"weight_by_examples": True})
    site.parties.config = config.model_copy(update={"aggregation": aggregation})
    site.runner = site.new_runner()
    unmasked = np.array(site.unmasked(site.train())) * site.ring.scale
    assert unmasked == pytest.approx(np.full(8, 0.25 * 10 / 40), abs=site.ring.scale)


def test_hidden_examples_leave_the_site_in_no_message(fake_client: redis.Redis, tmp_path: Path) -> None:
    site = MaskedSite(fake_client, tmp_path, examples="hidden")
    entry = site.train()
    [line] = [json.loads(line) for line in site.log.read_text().splitlines()]
    assert header(entry).examples == line["examples"] == 0


@pytest.mark.parametrize(
    ("rule", "policy"), [("min_examples", Policy(min_examples=99)), ("max_batch_size", Policy(max_batch_size=1))]
)
def test_refusal_tells_no_hidden_number_of_examples(
    fake_client: redis.Redis, tmp_path: Path, rule: str, policy: Policy
) -> None:
    site = MaskedSite(fake_client, tmp_path, examples="hidden")
    site.runner = site.new_runner(policy)
    ending = read(Ending, unverified_body(site.train().body))
    assert ending.reason == "refused"
    assert ending.error == f"{rule}: the numbers stay at the site, whose number of examples is hidden"


@pytest.mark.parametrize("told", ["told", "hidden"])
def test_failure_of_the_task_may_not_quote_a_hidden_number(fake_client: redis.Redis, tmp_path: Path, told: str) -> None:
    site = MaskedSite(fake_client, tmp_path, examples=told)

    def fail(progress: Progress) -> None:
        raise ValueError("found 1234 rows")

    site.task.during = fail
    ending = read(Ending, unverified_body(site.train().body))
    assert ("1234" in ending.error, "ValueError" in ending.error) == (told == "told", True)


def test_update_without_hidden_examples_stays_at_the_site(fake_client: redis.Redis, tmp_path: Path) -> None:
    site = MaskedSite(fake_client, tmp_path, examples="hidden")
    site.task.fit = lambda *_: 0  # type: ignore[method-assign,assignment]
    entry = site.train()
    assert entry.kind == "ended"
    assert "the training has used no examples" in read(Ending, unverified_body(entry.body)).error


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_update_that_is_not_finite_stays_at_the_site(site: MaskedSite, bad: float) -> None:
    def diverge(progress: Progress) -> None:
        with torch.no_grad():
            site.run.module.get_parameter("weight")[1, 1] = bad

    site.task.during = diverge
    entry = site.train()
    ending = read(Ending, unverified_body(entry.body))
    assert (entry.kind, ending.reason) == ("ended", "failed")
    assert "the training has made weight NaN or infinite, so nothing is sent: lower training.learning_rate" in (
        ending.error
    )
    assert not [name for name in site.run.names() if name.startswith("payload")]


# Keepers' keys


def after_first_sleep(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> list[float]:
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            act()

    monkeypatch.setattr("fedqueue_worker.job_runner.time.sleep", sleep)
    return slept


def test_a_job_waits_for_a_keepers_key_before_it_trains(
    site: MaskedSite, logs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    site.run.client.delete(site.key("k1"))
    trained: list[int] = []

    def publish() -> None:
        trained.append(len(site.task.seen))
        site.publish("k1", 1)

    slept = after_first_sleep(monkeypatch, publish)
    entry = site.train()
    assert entry.kind == "update"
    assert len(slept) == 2
    assert trained == [0], "the key was missing before the training"
    waits = [line for line in logs if line["event"].startswith("waiting for a keeper's key")]
    assert [line["keeper"] for line in waits] == ["k1"]


def test_a_job_that_is_closed_waits_no_longer(site: MaskedSite, monkeypatch: pytest.MonkeyPatch) -> None:
    site.run.client.delete(site.key("k1"))
    after_first_sleep(monkeypatch, lambda: setattr(site.runner._heartbeat, "_lost", True))
    order = site.order()
    site.run.dispatch_order(order, 1)
    site.runner.train(site.run.coordinator.pack_order(order))
    assert site.run.updates() == []
    assert site.task.seen == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda site: site.publish("k1", 1, SigningKey.generate()), "is not that of keeper k1 for this run"),
        (lambda site: site.publish("k1", 0), "keeper k1 states its key for component 0, not 1"),
        (
            lambda site: site.run.client.set(
                site.run.keys.keeper("k1"), site.run.client.get(site.run.keys.keeper("k0"))
            ),
            "is not that of keeper k1 for this run",
        ),
        (lambda site: site.run.client.set(site.key("k1"), b"\xc0"), "is not that of keeper k1 for this run"),
        (
            lambda site: (site.parties.folder / "site" / KEEPERS / "k1.pub").unlink(),
            "keeper k1 is not enrolled",
        ),
    ],
)
def test_a_key_that_is_not_the_keepers_own_is_refused(
    site: MaskedSite, change: Callable[[MaskedSite], object], problem: str
) -> None:
    change(site)
    entry = site.train()
    ending = read(Ending, unverified_body(entry.body))
    assert (entry.kind, ending.reason) == ("ended", "refused")
    assert problem in ending.error
    assert site.task.seen == []


def test_keepers_keys_are_looked_up_once_a_second(site: MaskedSite) -> None:
    site.train()
    site.publish("k0", 0, SigningKey.generate())  # not the keeper's own, so a look refuses it
    assert site.train(2).kind == "update"
    site.now += KEYS_SECONDS
    assert site.train(3).kind == "ended"


def test_a_site_needs_the_public_key_of_each_keeper(site: MaskedSite) -> None:
    site.identity.require_keepers(["k0", "k1"])
    with pytest.raises(ConfigurationError, match=r"security.keys = 'keepers/k2.pub': no valid public key .*; ask the"):
        site.identity.require_keepers(["k0", "k2"])
    write_public_keys(site.parties.folder / "site" / KEEPERS / "k2.pub", [SigningKey.generate().public])
    site.identity.require_keepers(["k0", "k2"])


def test_the_egress_log_says_for_whom_an_update_is_masked(site: MaskedSite) -> None:
    entry = site.train()
    [line] = [json.loads(line) for line in site.log.read_text().splitlines()]
    assert (line["what"], line["masked_for"], line["metrics"]) == ("update", ["k0", "k1"], [])
    assert (line["bytes"], line["sha256"]) == (32, header(entry).digest)


def test_no_log_and_no_key_in_redis_has_a_seed(site: MaskedSite, logs: list[Any]) -> None:
    entry = site.train()
    everywhere = repr(site.run.contents()) + repr(logs) + site.log.read_text()
    for seed in site.seeds(entry):
        assert repr(seed)[2:-1] not in everywhere
        assert seed.hex() not in everywhere


def test_masked_update_passes_the_span_of_its_order_on(site: MaskedSite) -> None:
    span = "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"
    order = site.order().model_copy(update={"traceparent": span})
    site.run.dispatch_order(order, 1)
    site.runner.train(site.run.coordinator.pack_order(order))
    assert header(site.run.coordinator.unacknowledged()[-1]).traceparent == span

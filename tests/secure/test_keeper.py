"""A keeper refuses, by name, whatever would tell more than sums over crowds, and answers once and alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from fedqueue.config.secure import MAX_MEMBERS
from fedqueue.errors import SignatureError, WireError
from fedqueue.protocol.key_files import CLIENTS, SigningKey, write_public_keys
from fedqueue.protocol.messages import Cohort, MaskRefused
from fedqueue.protocol.signed_envelope import MASK_REFUSED
from fedqueue.secure.keeper import Keeper, MemoryLog, Release
from fedqueue.secure.masks import new_seed
from fedqueue.secure.seed_envelope import KeeperPrivateKey
from tests.support.masked_run import MODEL, MaskedRun, Posted, words

OTHER_MODEL = "0" * 64


@pytest.fixture
def run(tmp_path: Path) -> MaskedRun:
    return MaskedRun(tmp_path, min_cohort=3)


@pytest.fixture
def keeper(run: MaskedRun) -> Keeper:
    return run.running["k0"]


def offered(
    run: MaskedRun, clients: str = "abcd", base: int = 0, to: Keeper | None = None, **changed: Any
) -> list[Posted]:
    """Post one update of each client, and offer it to one keeper or to all."""
    posted = [run.post(client, base, vector=3 + i, **changed) for i, client in enumerate(clients)]
    for keeper in [to] if to else run.running.values():
        for update in posted:
            assert keeper.offer(update.offer).refusal == ""
    return posted


def refusal(keeper: Keeper, signed: bytes) -> MaskRefused:
    answer = keeper.release(signed)
    assert isinstance(answer, MaskRefused), "the masks were released"
    return answer


def released(keeper: Keeper, signed: bytes) -> Release:
    answer = keeper.release(signed)
    assert isinstance(answer, Release), answer
    return answer


# What it is for


def test_masks_of_all_keepers_leave_the_weighted_sum(run: MaskedRun) -> None:
    posted = offered(run, "abc", base=3) + offered(run, "de", base=0)
    signed, weights = run.propose(3, posted), run.weights(3, posted)
    answers = [released(keeper, signed) for keeper in run.running.values()]
    total = run.unmask(posted, weights, answers)
    exact = sum(weight * value for weight, value in zip(weights, [3, 4, 5, 3, 4], strict=True))
    assert weights == [8, 8, 8, 4, 4]
    assert np.abs(total.astype(int) - exact).max() <= 2 * 420  # two dithers
    assert (answers[0].clients, answers[0].updates, answers[0].nbytes) == (5, 5, 24)


def test_with_one_level_of_weights_the_sum_is_exact(tmp_path: Path) -> None:
    run = MaskedRun(tmp_path, weight_levels=1)
    posted = offered(run, "abcd")
    answers = [released(keeper, run.propose(0, posted)) for keeper in run.running.values()]
    assert run.unmask(posted, [1, 1, 1, 1], answers).tolist() == [3 + 4 + 5 + 6] * 6


def test_one_keeper_short_the_sum_looks_random(run: MaskedRun) -> None:
    posted = offered(run)
    total = run.unmask(posted, run.weights(0, posted), [released(run.running["k0"], run.propose(0, posted))])
    assert np.abs(total.astype(float)).max() > 2**24  # six words below that: once in 2⁴² runs


# The same answer


def test_same_cohort_gets_the_same_bytes(run: MaskedRun, keeper: Keeper) -> None:
    signed = run.propose(0, offered(run))
    assert words(released(keeper, signed)).tobytes() == words(released(keeper, signed)).tobytes()


def test_restarted_keeper_gives_the_same_bytes(run: MaskedRun, keeper: Keeper) -> None:
    posted = offered(run)
    signed = run.propose(0, posted)
    first = words(released(keeper, signed))
    restarted = run.start("k0")
    assert refusal(restarted, signed).reason == "unknown"
    assert [restarted.offer(update.offer).refusal for update in posted] == ["spent"] * 4
    assert words(released(restarted, signed)).tobytes() == first.tobytes()


def test_repeated_offer_changes_nothing(run: MaskedRun, keeper: Keeper) -> None:
    posted = offered(run)
    again = offered(run)[0]
    assert keeper.offer(posted[0].offer) == keeper.offer(posted[0].offer)
    released(keeper, run.propose(0, posted))
    assert keeper.offer(posted[0].offer).refusal == "spent"
    assert keeper.offer(again.offer).refusal == ""


def test_refused_cohort_leaves_its_updates_for_another(run: MaskedRun, keeper: Keeper) -> None:
    posted = offered(run)
    assert refusal(keeper, run.propose(0, posted[:2])).reason == "crowd"
    released(keeper, run.propose(0, posted))


# Offers


def test_update_of_a_client_off_the_roster_is_foreign(run: MaskedRun, keeper: Keeper) -> None:
    update = run.post("a")
    (run.folder / CLIENTS / "a.pub").unlink()
    assert keeper.offer(update.offer).refusal == "foreign"


def test_update_signed_by_another_key_is_foreign(run: MaskedRun, keeper: Keeper) -> None:
    update = run.post("a")
    write_public_keys(run.folder / CLIENTS / "a.pub", [SigningKey.generate().public])
    assert keeper.offer(update.offer).refusal == "foreign"


@pytest.mark.parametrize("changed", [{"client": "b"}, {"job": "masked-00000099"}, {"attempt": 2}, {"base": 1}])
def test_offer_of_other_fields_than_signed_is_foreign(run: MaskedRun, keeper: Keeper, changed: dict[str, Any]) -> None:
    offer = run.post("a").offer.model_copy(update=changed)
    assert keeper.offer(offer).refusal == "foreign"


def test_update_of_another_instance_is_foreign(run: MaskedRun, keeper: Keeper) -> None:
    run.sites["a"].enter(run.begin(epoch=1))
    assert keeper.offer(run.post("a").offer).refusal == "foreign"


def test_header_encoded_in_another_way_is_foreign(run: MaskedRun, keeper: Keeper) -> None:
    """Other bytes of the same signed header would have another digest, under which its mask could be released again."""
    update = run.post("a")
    fields = msgpack.unpackb(update.offer.header)
    for encoded in (msgpack.packb(dict(reversed(fields.items()))), b"\xde\x00\x04" + update.offer.header[1:]):
        assert msgpack.unpackb(encoded) == fields
        assert keeper.offer(update.offer.model_copy(update={"header": encoded})).refusal == "foreign"


@pytest.mark.parametrize(
    "fields", [{"encoding": "float32"}, {"nbytes": 20}, {"seeds": ()}], ids=["encoding", "nbytes", "no seeds"]
)
def test_header_of_another_shape_is_unmaskable(run: MaskedRun, keeper: Keeper, fields: dict[str, Any]) -> None:
    update = run.post("a")
    body = {**msgpack.unpackb(msgpack.unpackb(update.offer.header)["body"]), **fields}
    header = run.sites["a"].sign("update", "a", [update.offer.job, 1, 0], msgpack.packb(body))
    assert keeper.offer(update.offer.model_copy(update={"header": header})).refusal == "unmaskable"


def test_seeds_in_another_order_are_unmaskable(run: MaskedRun, keeper: Keeper) -> None:
    update = run.post("a")
    body = msgpack.unpackb(msgpack.unpackb(update.offer.header)["body"])
    body["seeds"].reverse()
    header = run.sites["a"].sign("update", "a", [update.offer.job, 1, 0], msgpack.packb(body))
    assert keeper.offer(update.offer.model_copy(update={"header": header})).refusal == "unmaskable"


@pytest.mark.parametrize("moved", ["client", "job", "attempt", "base", "model", "payload", "component"])
def test_seed_moved_from_elsewhere_is_unmaskable(run: MaskedRun, keeper: Keeper, moved: str) -> None:
    honest: dict[str, Any] = {
        "client": "a", "job": "masked-00000050", "attempt": 1, "base": 0, "model": MODEL, "payload": "1" * 64,
        "component": 0,
    }  # fmt: skip
    foreign: dict[str, Any] = {
        "client": "b", "job": "masked-00000051", "attempt": 2, "base": 1, "model": OTHER_MODEL, "payload": "2" * 64,
        "component": 1,
    }  # fmt: skip
    seeds = [new_seed(), new_seed()]
    for fields, refused in ((honest, ""), ({**honest, moved: foreign[moved]}, "unmaskable")):
        taken = run.seal(seeds[0], **fields)
        taken = taken.model_copy(update={"component": 0, "keeper": "k0", "key": keeper.key.id})
        own = run.seal(seeds[1], **{**honest, "component": 1})
        where = {name: honest[name] for name in ("job", "attempt", "model")}
        payload = np.zeros(6, np.uint32)
        update = run.sign("a", 0, payload, seeds, sealed=[taken, own], digest=honest["payload"], **where)
        assert keeper.offer(update.offer).refusal == refused


def test_seed_that_another_update_has_is_unmaskable(run: MaskedRun, keeper: Keeper) -> None:
    seeds = [new_seed(), new_seed()]
    first, second = (run.sign("a", 0, np.zeros(6, np.uint32), seeds) for _ in range(2))
    assert keeper.offer(first.offer).refusal == ""
    assert keeper.offer(second.offer).refusal == "unmaskable"


def test_short_seed_is_unmaskable(run: MaskedRun, keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError):
        run.sign("a", 0, np.zeros(6, np.uint32), [b"weak", b"seed"])
    monkeypatch.setattr("fedqueue.secure.seed_envelope.SEED_BYTES", 4)  # at the client only
    weak = run.sign("a", 0, np.zeros(6, np.uint32), [b"weak", b"seed"])
    monkeypatch.undo()
    assert keeper.offer(weak.offer).refusal == "unmaskable"


def test_update_for_a_lost_key_says_so(run: MaskedRun) -> None:
    update = run.post("a")
    successor = run.start("k0", key=KeeperPrivateKey.generate(), log=MemoryLog())
    assert successor.offer(update.offer).refusal == "keeper_lost"


# Cohorts


def test_cohort_of_another_signer_gets_no_answer(run: MaskedRun, keeper: Keeper) -> None:
    cohort = run.cohort(0, offered(run))
    for forged in (cohort.pack(), run.sites["a"].sign("cohort", "a", [], cohort.pack())):
        with pytest.raises(SignatureError):
            keeper.release(forged)


def test_cohort_of_another_instance_gets_no_answer(run: MaskedRun, keeper: Keeper) -> None:
    posted = offered(run)
    run.begin(epoch=1)
    with pytest.raises(SignatureError):
        keeper.release(run.propose(0, posted))


def test_signed_bytes_that_are_no_cohort_raise(run: MaskedRun, keeper: Keeper) -> None:
    class Nonsense(Cohort):
        def pack(self) -> bytes:
            return b"nonsense"

    with pytest.raises(WireError):
        keeper.release(run.coordinator.sign_cohort(Nonsense(version=0, members=(("0" * 64, 1),))))


def test_update_that_was_not_offered_is_unknown(run: MaskedRun, keeper: Keeper) -> None:
    posted, other = offered(run), run.post("e")
    answer = refusal(keeper, run.propose(0, [*posted, other]))
    assert (answer.reason, answer.headers) == ("unknown", (other.header,))


def test_version_before_a_released_one_is_refused(run: MaskedRun, keeper: Keeper) -> None:
    first, second = offered(run), offered(run)
    released(keeper, run.propose(5, first))
    assert refusal(keeper, run.propose(4, second)).reason == "version"
    assert refusal(run.start("k0"), run.propose(4, second)).reason == "unknown"
    restarted = run.start("k0")
    for update in second:
        restarted.offer(update.offer)
    assert refusal(restarted, run.propose(4, second)).reason == "version"
    released(restarted, run.propose(5, second))


def test_version_may_go_back_with_a_new_term(run: MaskedRun, keeper: Keeper) -> None:
    first, second = offered(run), offered(run)
    released(keeper, run.propose(5, first))
    keeper.begin_term(2, 4)
    assert refusal(keeper, run.propose(3, second)).reason == "version"
    released(keeper, run.propose(4, second))


@pytest.mark.parametrize(("version", "weights"), [(3, [8, 8, 8, 8]), (3, [4, 4, 5, 4])])
def test_weights_above_those_of_the_staleness_are_refused(
    run: MaskedRun, keeper: Keeper, version: int, weights: list[int]
) -> None:
    posted = offered(run)
    answer = refusal(keeper, run.propose(version, posted, weights))
    right = run.weights(version, posted)
    assert answer.reason == "weight"
    assert answer.headers == tuple(p.header for p, w, r in zip(posted, weights, right, strict=True) if w > r)


def test_base_after_the_version_is_refused(run: MaskedRun, keeper: Keeper) -> None:
    posted = offered(run, base=2)
    assert refusal(keeper, run.propose(1, posted, [8, 8, 8, 8])).reason == "weight"


def test_cohort_of_too_few_clients_is_refused(run: MaskedRun, keeper: Keeper) -> None:
    posted = offered(run, "ab", base=3) + offered(run, "ab", base=0)
    assert refusal(keeper, run.propose(3, posted)).reason == "crowd"


def test_client_that_outweighs_the_others_is_refused(run: MaskedRun, keeper: Keeper) -> None:
    posted = offered(run, "a", base=15) + offered(run, "bc", base=0)
    assert run.weights(15, posted) == [8, 2, 2]
    assert refusal(keeper, run.propose(15, posted)).reason == "crowd"


def test_two_fresh_updates_of_a_client_are_refused(run: MaskedRun, keeper: Keeper) -> None:
    posted = offered(run, "aabcd")
    assert refusal(keeper, run.propose(0, posted)).reason == "crowd"


def test_keeper_asks_for_its_own_larger_crowd(run: MaskedRun) -> None:
    keeper = run.start("k0", min_cohort=4)
    posted = offered(run, "abcd", to=keeper)
    assert refusal(keeper, run.propose(0, posted[:3])).reason == "crowd"
    released(keeper, run.propose(0, posted))


def test_smaller_crowd_of_its_own_changes_nothing(run: MaskedRun) -> None:
    keeper = run.start("k0", min_cohort=1)
    posted = offered(run, "abcd", to=keeper)
    assert refusal(keeper, run.propose(0, posted[:2])).reason == "crowd"


def test_two_models_of_one_base_are_refused(run: MaskedRun, keeper: Keeper) -> None:
    posted = offered(run, "abcd")
    odd = offered(run, "e", model=OTHER_MODEL)
    answer = refusal(keeper, run.propose(0, posted + odd))
    assert (answer.reason, answer.headers) == ("model", (odd[0].header,))


def test_model_of_a_base_stays_the_released_one(run: MaskedRun, keeper: Keeper) -> None:
    first, held, odd = offered(run), offered(run, "e", model=OTHER_MODEL), run.post("d", model=OTHER_MODEL)
    released(keeper, run.propose(0, first))
    assert keeper.offer(odd.offer).refusal == "model"
    honest = offered(run, "abc")
    assert refusal(keeper, run.propose(0, honest + held)).headers == (held[0].header,)
    assert run.start("k0").offer(odd.offer).refusal == "model"


def test_update_in_two_cohorts_is_refused(run: MaskedRun, keeper: Keeper) -> None:
    posted = offered(run, "abcde")
    released(keeper, run.propose(0, posted))
    for version, members in ((0, posted[:-1]), (0, posted[::-1]), (1, posted)):
        answer = refusal(keeper, run.propose(version, members))
        assert (answer.reason, set(answer.headers)) == ("spent", {update.header for update in members})


def test_update_twice_in_a_cohort_is_refused(run: MaskedRun, keeper: Keeper) -> None:
    posted = offered(run, "abcde", base=0)
    answer = refusal(keeper, run.propose(8, [*posted, posted[0]]))
    assert (answer.reason, answer.headers) == ("spent", (posted[0].header,))


def test_cohort_that_could_overflow_is_refused(tmp_path: Path) -> None:
    run = MaskedRun(tmp_path, buffer_size=3)
    posted = offered(run, "abcde")
    answer = refusal(run.running["k0"], run.propose(0, posted))
    assert (answer.reason, answer.headers) == ("size", ())


# What it holds


def test_keeper_forgets_what_no_cohort_can_have(run: MaskedRun, keeper: Keeper) -> None:
    old, first = offered(run, "e", base=0), offered(run, "abcd", base=150)
    released(keeper, run.propose(150, first))
    second = offered(run, "abcd", base=151)
    released(keeper, run.propose(151, second))
    assert refusal(keeper, run.propose(151, old + first)).headers == tuple(u.header for u in old + first)
    released(keeper, run.propose(151, second))


def test_repr_shows_no_secret(run: MaskedRun, keeper: Keeper) -> None:
    posted = offered(run)
    answer = released(keeper, run.propose(0, posted))
    shown = repr([answer, keeper, keeper.key, list(keeper._held.values()), run.logs["k0"]])
    seeds = [held.seed for held in keeper._held.values()]
    for secret in (*seeds, keeper._secret, answer._dither_seed, keeper.key.to_bytes()[:16]):
        assert repr(secret)[2:-1] not in shown
        assert secret.hex() not in shown


def test_largest_cohort_and_its_refusal_can_be_sent(run: MaskedRun, keeper: Keeper) -> None:
    """Each of the members has a refusal of its own name, and the answer stays below the size of a message."""
    members = tuple((f"{i:064x}", 8) for i in range(MAX_MEMBERS))
    signed = run.coordinator.sign_cohort(Cohort(version=2**53 - 1, members=members))
    answer = refusal(keeper, signed)
    assert (answer.reason, len(answer.headers)) == ("unknown", MAX_MEMBERS)
    longest = answer.model_copy(update={"detail": "\N{GREEK SMALL LETTER TAU}" * 500})
    assert run.coordinator.open_keeper(MASK_REFUSED, "k0", run.identities["k0"].sign(MASK_REFUSED, longest.pack()))

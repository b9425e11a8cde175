"""The path of masked updates through the state machine: openings, cohorts, weights, refusals, and recovery."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from fedqueue_coordinator.core.events import Close, Commit, Dispatch, KeepersAbsent, Load, Offer, Stop, Unmask
from tests.support.builders import make_config, of_kind
from tests.support.masked_federation import KEEPERS, MaskedRun, start_masked

CLOSE = 1e-4  # of the parameters, which are of size 1: rounding to units of the ring


def posted(run: MaskedRun, *clients: str) -> None:
    for number, client in enumerate(clients, 1):
        run.post_masked(client, float(number))


def kinds(actions: Sequence[object]) -> list[str]:
    return [type(action).__name__ for action in actions]


# The path of a masked update


def test_masked_update_is_offered_before_it_is_loaded() -> None:
    run = start_masked("c0", "c1", "c2")
    run.silent = set(KEEPERS)
    assert kinds(run.post_masked("c0", 1.0)) == ["Dispatch", "Offer"]
    (offer,) = run.offers
    assert run.opens("north", offer) == []
    assert kinds(run.opens("south", offer)) == ["Load"]


def test_masks_are_asked_for_once_the_cohort_is_full() -> None:
    run = start_masked("c0", "c1", "c2")
    run.silent = set(KEEPERS)
    posted(run, "c0", "c1", "c2")
    asked = [action for offer in run.offers for k in KEEPERS for action in run.opens(k, offer)]
    assert kinds(asked) == ["Load", "Load", "Load", "Unmask"]
    assert run.releases("south") == []
    assert of_kind(run.releases("north"), Commit)


def test_version_is_the_mean_of_the_masked_deltas() -> None:
    run = start_masked("c0", "c1", "c2")
    for client, delta in zip(("c0", "c1", "c2"), ([1.0, -2.0], [0.5, 0.25], [3.0, 0.0]), strict=True):
        run.post_masked(client, delta)
    np.testing.assert_allclose(run.federation.model.parameters, [1.5, -0.58333], atol=CLOSE)
    assert run.federation.version == 1


def test_stale_updates_weigh_less_by_whole_levels() -> None:
    run = start_masked("c0", "c1", "c2", "c3", secure={"weight_levels": 8}, aggregation={"max_staleness": 9})
    posted(run, "c0", "c1", "c2")
    run.post_masked("c0", 4.0, base=0)  # τ = 1: 8 / √2 = 5.66, so 6 levels
    run.post_masked("c1", 0.0)
    before = run.x
    run.post_masked("c2", 0.0)
    lines = run.merged[3:]
    assert [(line["level"], line["weight"]) for line in lines] == [(6, 0.75), (8, 1.0), (8, 1.0)]
    assert run.x - before == pytest.approx(4.0 * 0.75 / 3, abs=1e-3)


def test_version_record_names_cohort_levels_and_masks_only() -> None:
    run = start_masked("c0", "c1", "c2")
    posted(run, "c0", "c1", "c2")
    (record,) = [r for r in run.ledger if r["kind"] == "version"]
    assert record["cohort"]
    assert list(record["masks"]) == list(KEEPERS)
    line = record["merged"][0]
    assert "norm" not in line
    assert line["metrics"] == {}
    assert [entry["offer"] for entry in record["merged"]] == [offer for offer, _ in run.proposed[0].members]


def test_no_update_is_added_while_a_cohort_is_under_way() -> None:
    run = start_masked("c0", "c1", "c2", "c3")
    run.silent = {"south"}
    posted(run, "c0", "c1", "c2")
    for offer in run.offers:
        run.opens("south", offer)
    run.post_masked("c3", 1.0)
    assert not of_kind(run.opens("south", run.offer_of("c3")), Load)
    assert kinds(run.releases("south"))[-2:] == ["Commit", "Load"]


# Crowds


def test_a_client_has_one_fresh_update_in_a_version() -> None:
    run = start_masked("c0", "c1", "c2")
    for _ in range(2):
        run.post_masked("c0", 1.0)
    run.post_masked("c1", 1.0)
    assert run.federation.version == 0
    run.post_masked("c2", 1.0)
    assert [line["client"] for line in run.merged] == ["c0", "c1", "c2"]


def test_client_that_is_ahead_gets_no_job() -> None:
    run = start_masked("c0", "c1", "c2")
    run.post_masked("c0", 1.0)
    assert run.has_job("c0")
    run.post_masked("c0", 1.0)
    assert not run.has_job("c0")
    posted(run, "c1", "c2")
    assert run.has_job("c0")
    assert run.federation.buffered == 1


def test_full_buffer_waits_for_a_crowd() -> None:
    staleness = {"function": "polynomial", "a": 2.0}  # τ = 1: 8 / 4 = 2 levels
    run = start_masked(
        "c0", "c1", "c2", min_cohort=3, secure={"weight_levels": 8}, aggregation={"staleness": staleness}
    )
    posted(run, "c0", "c1", "c2")
    run.post_masked("c1", 1.0)
    for client in ("c0", "c0", "c2", "c2", "c0", "c2", "c0"):
        run.post_masked(client, 1.0, base=0)
        assert run.federation.version == 1
    run.post_masked("c2", 1.0, base=0)
    assert sum(line["level"] for line in run.merged[3:]) == 3 * 8
    assert run.federation.version == 2


def test_cohort_closes_below_its_size_if_no_client_is_left() -> None:
    run = start_masked("c0", "c1", "c2", min_cohort=2)
    posted(run, "c0", "c1")
    run.vanish("c2")
    run.lapse("c2")
    for client in ("c0", "c1"):
        run.post_masked(client, 1.0)  # waits: its client is in the cohort
    assert run.federation.version == 0
    assert of_kind(run.tick(), Commit)
    assert len(run.ledger[-1]["merged"]) == 2


def test_cohort_that_is_no_crowd_is_levelled_down() -> None:
    """Three clients are all there are, and weigh 6, 6 and 5: more than one part in three."""
    run = start_masked("c0", "c1", "c2", min_cohort=3, secure={"weight_levels": 8})
    for _ in range(2):
        posted(run, "c0", "c1", "c2")
    for client, base in (("c0", 1), ("c1", 1), ("c2", 0)):
        run.post_masked(client, 3.0, base=base)
    for client in ("c0", "c1", "c2"):
        run.post_masked(client, 1.0)  # does not fit beside the first, so its client is held
    assert run.federation.version == 2
    before = run.x
    run.tick()
    assert [line["level"] for line in run.merged[6:]] == [5, 5, 5, 6, 6, 6]  # those that waited make one more
    assert run.x - before == pytest.approx(3.0 * 5 / 8 + 1.0 * 6 / 8, abs=1e-3)


def test_member_without_weight_left_waits_for_the_next_version() -> None:
    """With s(τ) = 1 / (1 + τ): two members of c0 weigh 4 each, and that of c1 weighs 2."""
    staleness = {"function": "polynomial", "a": 1.0}
    run = start_masked("c0", "c1", buffer_size=2, secure={"weight_levels": 8}, aggregation={"staleness": staleness})
    for _ in range(3):
        posted(run, "c0", "c1")
    for client, base in (("c0", 2), ("c0", 2), ("c1", 0), ("c0", 3), ("c1", 3)):
        run.post_masked(client, 1.0, base=base)
    assert (run.federation.version, run.federation.buffered) == (3, 3)
    run.tick()
    assert [(line["client"], line["level"]) for line in run.merged[6:8]] == [("c0", 2), ("c1", 2)]
    assert (run.federation.version, run.federation.buffered) == (4, 3)
    assert run.rejections == []


def test_run_without_a_crowd_says_what_it_waits_for() -> None:
    run = start_masked("c0", "c1", min_cohort=3)
    for _ in range(2):
        posted(run, "c0", "c1")
    run.tick()
    assert "updates of 2 clients, of 3 at least" in run.federation.waiting_for(run.now)
    assert run.federation.version == 0


def test_too_few_clients_for_a_crowd_are_a_dead_end() -> None:
    run = start_masked("c0", "c1", "c2", "c3", min_cohort=3)
    assert run.federation.dead_end({"c3"}) == ""
    assert "secure.min_cohort" in run.federation.dead_end({"c2", "c3"})


# Keepers that are away


def test_jobs_are_given_until_concurrency_waits_for_a_keeper() -> None:
    run = start_masked(*(f"c{i}" for i in range(9)), dispatch={"concurrency": 2})
    run.silent = {"north"}
    for _ in range(9):
        working = [client for client in run.alive if run.has_job(client)]
        if not working:
            break
        run.post_masked(working[0], 1.0)
    assert len(run.offers) == 5  # with three that wait no job is given; two had one by then
    for offer in run.offers:
        run.opens("north", offer)
    run.releases("north")
    assert run.federation.version == 1
    assert any(run.has_job(client) for client in run.alive)


def test_run_names_the_keeper_that_it_waits_for() -> None:
    run = start_masked("c0", "c1", "c2")
    run.silent = {"north"}
    run.post_masked("c0", 1.0)
    assert run.federation.waiting_for(4.0) == ""
    assert "waiting for keeper north" in run.federation.waiting_for(60.0)


def test_run_names_a_keeper_that_has_not_joined() -> None:
    run = start_masked("c0", "c1", "c2", secure={"wait_seconds": 30})
    run.tell(KeepersAbsent(frozenset({"south"})))
    assert run.federation.waiting_for(4.0) == ""
    assert run.federation.waiting_for(7.0) == "waiting for keeper south, which has not joined the run for 7 s"
    run.tell(KeepersAbsent(frozenset()))
    assert run.federation.waiting_for(60.0) == ""
    run.tell(KeepersAbsent(frozenset({"south"})))
    (stop,) = of_kind(run.tick(30.0), Stop)
    assert (stop.failed, stop.because.startswith("keeper south did not join the run for 30 s")) == (True, True)


def test_run_ends_if_a_keeper_is_away_for_too_long() -> None:
    run = start_masked("c0", "c1", "c2", secure={"wait_seconds": 30})
    run.silent = {"north"}
    run.post_masked("c0", 1.0)
    assert run.federation.next_deadline() == 30.0
    assert not of_kind(run.tick(29.0), Stop)
    (stop,) = of_kind(run.tick(1.0), Stop)
    assert stop.failed
    assert "keeper north" in stop.because
    assert run.rejections == ["run_ended"]


# Refusals


@pytest.mark.parametrize(
    ("refusal", "reason"),
    [("unmaskable", "unmaskable"), ("keeper_lost", "keeper_lost"), ("foreign", "foreign"), ("model", "wrong_base"),
     ("spent", "spent")],
)  # fmt: skip
def test_update_that_a_keeper_cannot_open_is_rejected(refusal: str, reason: str) -> None:
    run = start_masked("c0", "c1", "c2")
    run.silent = set(KEEPERS)
    run.post_masked("c0", 1.0)
    (close,) = of_kind(run.opens("south", run.offers[0], refusal), Close)
    assert (close.record["reason"], close.record["client"]) == (reason, "c0")
    assert "south" in close.record["detail"]
    assert run.opens("north", run.offers[0]) == []


def refused_cohort(buffer_size: int = 3) -> MaskedRun:
    """A run whose cohort of c0, c1 and c2 is under way, and awaits both keepers."""
    run = start_masked("c0", "c1", "c2", "c3", buffer_size=buffer_size)
    run.silent = set(KEEPERS)
    posted(run, "c0", "c1", "c2")
    for offer in run.offers:
        for keeper in KEEPERS:
            run.opens(keeper, offer)
    return run


def test_cohort_is_proposed_again_without_spent_members() -> None:
    run = refused_cohort()
    assert run.refuses("north", "spent", [run.offer_of("c1")]) == []
    actions = run.refuses("south", "spent", [run.offer_of("c1")])
    assert run.rejections == ["spent"]
    assert len(of_kind(actions, Load)) == 2  # the sum is begun again
    run.silent = set()
    run.post_masked("c3", 7.0)
    assert [line["client"] for line in run.merged] == ["c0", "c2", "c3"]
    assert run.x == pytest.approx((1 + 3 + 7) / 3, abs=1e-3)


@pytest.mark.parametrize("first", KEEPERS)
def test_members_are_spent_if_only_one_keeper_refuses(first: str) -> None:
    """Else the next cohort would be refused by the one keeper and released by the other, and so on for ever."""
    run = refused_cohort()
    (other,) = set(KEEPERS) - {first}
    run.releases(other)
    assert run.rejections == []
    run.refuses(first, "unknown", [run.offer_of("c1")])
    assert sorted(run.rejections) == ["keeper_lost", "spent", "spent"]
    assert (run.federation.version, run.federation.buffered) == (0, 0)


def test_answer_to_a_cohort_that_was_refused_is_ignored() -> None:
    run = refused_cohort()
    for keeper in KEEPERS:
        run.refuses(keeper, "spent", [run.offer_of("c1")])
    assert run.releases("south") == []
    assert run.federation.version == 0


def test_refusal_of_the_whole_cohort_ends_the_run() -> None:
    run = start_masked("c0", "c1", "c2")
    run.silent = {"south"}
    posted(run, "c0", "c1", "c2")
    for offer in run.offers:
        run.opens("south", offer)
    (stop,) = of_kind(run.refuses("south", "crowd"), Stop)
    assert (stop.failed, "keeper south" in stop.because, "crowd" in stop.because) == (True, True, True)
    assert run.rejections == ["run_ended"] * 3


def test_keeper_that_lost_its_key_expels_members() -> None:
    run = start_masked("c0", "c1", "c2")
    posted(run, "c0", "c1")
    run.opens("north", run.offer_of("c0"), "keeper_lost")
    assert (run.rejections, run.federation.buffered) == (["keeper_lost"], 1)


def test_sum_that_is_too_long_is_rejected_without_blame() -> None:
    run = start_masked("c0", "c1", "c2")
    run.added_to_masks = 2**30
    posted(run, "c0", "c1", "c2")
    assert run.rejections == ["cohort_norm"] * 3
    assert (run.federation.version, run.x) == (0, 0.0)
    assert all(run.has_job(client) for client in ("c0", "c1", "c2"))
    run.added_to_masks = 0
    posted(run, "c0", "c1", "c2")
    assert run.x == pytest.approx(2.0, abs=1e-3)


def test_update_from_another_model_than_its_base_is_rejected() -> None:
    run = start_masked("c0", "c1")
    run.federation.published(0, "a" * 64)
    run.post_masked("c0", 1.0)
    run.post_masked("c1", 1.0, model="a" * 64)
    assert run.rejections == ["wrong_base"]
    assert len(run.offers) == 1


def test_update_for_other_keepers_is_rejected() -> None:
    run = start_masked("c0", "c1")
    body = start_masked("c0", "c1", secure={"keepers": ["north", "east"]})
    body.post_masked("c0", 1.0)
    (offer,) = of_kind(body.actions, Offer)
    run.post("c0", None, body=offer.arrived.body)
    assert run.rejections == ["unmaskable"]


def test_unreadable_masked_payload_lets_the_next_one_in() -> None:
    run = start_masked("c0", "c1", "c2", "c3")
    run.silent = {"north"}
    posted(run, "c0", "c1", "c2", "c3")
    del run.masked[next(job for job, client in run.jobs.items() if client == "c1" and job in run.posted)]
    for offer in run.offers:
        run.opens("north", offer)
    assert run.rejections == ["unreadable"]
    assert len(run.proposed[-1].members) == 3


# The end, and recovery


def test_waiting_masked_updates_are_rejected_at_the_end() -> None:
    run = start_masked("c0", "c1", "c2", "c3")
    run.silent = {"south"}
    posted(run, "c0", "c1", "c2", "c3")
    for client in ("c0", "c1", "c2"):
        run.opens("south", run.offer_of(client))
    run.stop()
    assert run.rejections == ["run_ended"] * 4
    assert run.jobs == {}
    assert run.unacknowledged == {}


def killed_mid_unmask(**sections: Any) -> MaskedRun:
    """A run whose coordinator dies after it has proposed a cohort of c0, c1 and c2; c3's update waits."""
    run = start_masked("c0", "c1", "c2", "c3", **sections)
    run.silent = {"south"}
    posted(run, "c0", "c1", "c2")
    for offer in list(run.offers):
        run.opens("south", offer)
    run.post_masked("c3", 9.0)
    return run


def test_successor_finishes_exactly_the_proposed_cohort() -> None:
    run = killed_mid_unmask()
    proposed = run.cohort
    run.restart()
    assert run.proposed[-1] == proposed
    run.releases("south")
    assert [line["client"] for line in run.merged] == ["c0", "c1", "c2"]
    assert run.x == pytest.approx(2.0, abs=1e-3)


def test_successor_makes_the_bits_of_the_coordinator_before_it() -> None:
    undisturbed = killed_mid_unmask(secure={"weight_levels": 8})
    undisturbed.releases("south")
    run = killed_mid_unmask(secure={"weight_levels": 8})
    run.restart()
    run.releases("south")
    assert run.federation.model.parameters.equal(undisturbed.federation.model.parameters)


def test_proposed_cohort_survives_members_that_are_spent() -> None:
    run = killed_mid_unmask()
    run.silent = set(KEEPERS)
    run.restart()
    for offer in run.offers[-4:]:
        for keeper in KEEPERS:
            run.opens(keeper, offer, "spent" if offer != run.offer_of("c3") else "")
    assert run.rejections == []
    for keeper in KEEPERS:
        run.releases(keeper)
    assert len(run.merged) == 3


def test_proposed_cohort_that_lacks_a_member_is_given_up() -> None:
    run = killed_mid_unmask()
    run.unacknowledged.pop(next(iter(run.unacknowledged)))  # Redis has lost the first entry
    run.silent = set()
    run.restart()
    assert run.federation.version == 0
    run.tick()
    assert [line["client"] for line in run.merged] == ["c1", "c2", "c3"]


def test_members_that_are_spent_end_with_a_cohort_given_up() -> None:
    run = killed_mid_unmask()
    run.unacknowledged.pop(next(iter(run.unacknowledged)))
    run.silent = set(KEEPERS)
    run.restart()
    for offer in (run.offer_of("c1"), run.offer_of("c2")):
        run.opens("north", offer, "spent")  # north has released the cohort
    run.tick()
    assert run.rejections == ["spent"] * 2
    assert run.federation.buffered == 0


def test_answers_count_that_came_before_a_cohort_was_given_up() -> None:
    run = killed_mid_unmask()
    run.unacknowledged.pop(next(iter(run.unacknowledged)))
    run.silent = set(KEEPERS)
    run.restart()
    for offer in run.offers[-3:]:
        for keeper in KEEPERS:
            run.opens(keeper, offer)  # the payloads of c1 and c2 are loaded by now
    run.tick()
    assert [offer for offer, _ in run.proposed[-1].members] == [run.offer_of(client) for client in ("c1", "c2", "c3")]


def test_proposed_cohort_of_an_earlier_version_is_ignored() -> None:
    run = killed_mid_unmask()
    run.releases("south")
    run.silent = set()
    run.restart()  # the commit has not deleted the cohort from this store
    posted(run, "c0", "c1")
    assert run.federation.version == 2


def test_config_without_keepers_asks_none() -> None:
    assert not make_config().secure.on


def test_dispatch_goes_before_the_offer() -> None:
    run = start_masked("c0", "c1", "c2")
    run.silent = set(KEEPERS)
    actions = run.post_masked("c0", 1.0)
    assert isinstance(actions[0], Dispatch)
    assert not of_kind(actions, Unmask)

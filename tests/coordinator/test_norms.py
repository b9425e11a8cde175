"""How large an update may be."""

from __future__ import annotations

import math

import pytest
from builders import make_config, start

from fedqueue_coordinator.core.admission import Inadmissible
from fedqueue_coordinator.core.dispatch import Backoff
from fedqueue_coordinator.core.events import UpdateArrived
from fedqueue_coordinator.core.federation import Federation
from fedqueue_coordinator.core.norm_limit import FEWEST, NormLimit


def limit(accepted=(), **admission):
    return NormLimit(make_config(admission=admission).admission, accepted)


def test_without_settings_no_norm_is_too_large():
    assert limit().limit == math.inf


def test_fixed_limit_is_the_largest_norm_that_is_merged():
    run = start("c0", admission={"max_norm": 5.0})
    run.post("c0", [3.0, 4.0])  # norm 5
    run.tick(60)
    run.post("c0", [3.0, 4.001])
    assert run.rejections == ["too_large"]
    assert run.federation.version == 1
    assert "at most 5 is merged" in run.ledger[-1]["detail"]


def test_quantile_is_of_the_accepted_norms_and_used_once_there_are_enough():
    norms = [float(n) for n in range(1, FEWEST + 1)]
    some = limit(norms[:-1], norm_quantile=0.5, norm_slack=2.0)
    assert some.limit == math.inf
    some.accept(norms[-1])
    assert some.limit == 2.0 * 6.0, "the median of 1…10, the upper one of the two in the middle"
    with pytest.raises(Inadmissible) as caught:
        some.check(12.1)
    assert caught.value.reason == "too_large"
    assert some.limit == 12.0, "what is rejected does not move the limit"


def test_the_smaller_of_both_limits_counts_and_old_norms_are_forgotten():
    assert limit([10.0] * 10, norm_quantile=1.0, norm_slack=3.0, max_norm=7.0).limit == 7.0
    assert limit([100.0] * 10 + [1.0] * 10, norm_quantile=1.0, norm_slack=1.0, norm_window=10).limit == 1.0


def test_poisoner_is_set_aside_and_the_run_goes_on():
    run = start("good", "bad", admission={"norm_quantile": 0.5, "norm_slack": 3.0, "max_rejections": 2})
    for _ in range(FEWEST):
        run.post("good", 1.0)
        run.tick(60)
    for _ in range(5):
        if run.has_job("bad"):
            run.post("bad", 1e6)
        run.tick(1e6)
        run.post("good", 1.0)
    assert run.rejections == ["too_large"] * 3  # its next job was given away before the second was read
    assert not run.has_job("bad")
    assert run.federation.version == FEWEST + 5
    assert run.federation.stopped is None


@pytest.mark.parametrize("reason", ["forged", "foreign"])
def test_what_others_may_have_done_is_not_held_against_a_client(reason):
    run = start("c0", admission={"max_rejections": 1})
    for _ in range(3):
        arrived = UpdateArrived("9-9", run.job_of("c0"), 1, "c0", 0, b"", (reason, "a lie"))
        run.posted.add(arrived.job)
        run.tell(arrived)
        assert not run.has_job("c0"), "it rests, so that whoever does this cannot keep everybody busy"
        run.tick(60)
    assert run.rejections == [reason] * 3
    run.post("c0", 1.0)
    assert run.federation.version == 1
    backoff = Backoff(1.0, 3, 3)
    backoff.pause("c0", 0.0)
    assert (backoff.allows("c0"), backoff.rested(1.0), backoff.set_aside("c0")) == (False, ["c0"], False)


def test_job_that_the_site_refuses_makes_the_client_back_off():
    run = start("c0", "c1", dispatch={"backoff_seconds": 10.0, "max_client_failures": 2})
    run.end("c0", "refused", "max_epochs: the job asks for 9, at most 5 are agreed to")
    assert run.federation.abandoned["refused"] == 1
    assert not run.has_job("c0")
    run.tick(11)
    run.end("c0", "refused")
    run.tick(1e9)
    assert not run.has_job("c0"), "after so many it is not asked any more"
    assert run.federation.stopped is None


def test_successor_goes_on_with_the_limit_of_its_predecessor():
    run = start("c0", admission={"norm_quantile": 0.5, "norm_slack": 2.0})
    for i in range(FEWEST):
        run.post("c0", [float(i + 1), 0.0])
        run.tick(60)
    norms = [line["norm"] for line in run.merged]
    successor = Federation(run.config, run.federation.model.copy(), run.federation.version, norms=norms)
    assert successor._norms.limit == run.federation._norms.limit == 12.0

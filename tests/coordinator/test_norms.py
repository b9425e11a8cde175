"""The limit on an update's norm."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest

from fedqueue_coordinator.core.admission import Inadmissible
from fedqueue_coordinator.core.backoff import Backoff
from fedqueue_coordinator.core.federation import Federation
from fedqueue_coordinator.core.outliers import MIN_NORMS_FOR_QUANTILE, NormLimit
from fedqueue_coordinator.core.reasons import RejectionReason
from tests.support.builders import make_config
from tests.support.federation_run import make_arrived, start


def limit(accepted: Iterable[float] = (), **admission: Any) -> NormLimit:
    return NormLimit(make_config(admission=admission).admission, accepted)


def test_default_settings_reject_no_norm() -> None:
    assert limit().limit == math.inf


def test_fixed_limit_is_the_largest_norm_that_is_merged() -> None:
    run = start("c0", admission={"max_norm": 5.0})
    run.post("c0", [3.0, 4.0])  # norm 5
    run.tick(60)
    run.post("c0", [3.0, 4.001])
    assert run.rejections == ["too_large"]
    assert run.federation.version == 1
    assert "at most 5 is merged" in run.ledger[-1]["detail"]


def test_quantile_of_norms_applies_once_enough_are_accepted() -> None:
    norms = [float(n) for n in range(1, MIN_NORMS_FOR_QUANTILE + 1)]
    some = limit(norms[:-1], norm_quantile=0.5, norm_slack=2.0)
    assert some.limit == math.inf
    some.accept(norms[-1])
    assert some.limit == 2.0 * 6.0, "the limit is not twice the upper median of 1…10"
    with pytest.raises(Inadmissible) as caught:
        some.check(12.1)
    assert caught.value.reason == "too_large"
    assert some.limit == 12.0, "a rejected update moved the limit"


def test_smaller_norm_limit_applies_and_old_norms_expire() -> None:
    assert limit([10.0] * 10, norm_quantile=1.0, norm_slack=3.0, max_norm=7.0).limit == 7.0
    assert limit([100.0] * 10 + [1.0] * 10, norm_quantile=1.0, norm_slack=1.0, norm_window=10).limit == 1.0


def test_poisoning_client_is_excluded_and_the_run_continues() -> None:
    run = start("good", "bad", admission={"norm_quantile": 0.5, "norm_slack": 3.0, "max_rejections": 2})
    for _ in range(MIN_NORMS_FOR_QUANTILE):
        run.post("good", 1.0)
        run.tick(60)
    for _ in range(5):
        if run.has_job("bad"):
            run.post("bad", 1e6)
        run.tick(1e6)
        run.post("good", 1.0)
    assert run.rejections == ["too_large"] * 3  # the client got its next job before the second payload was read
    assert not run.has_job("bad")
    assert run.federation.version == MIN_NORMS_FOR_QUANTILE + 5
    assert run.federation.stopped is None


@pytest.mark.parametrize("reason", [RejectionReason.FORGED, RejectionReason.FOREIGN])
def test_forgeable_faults_do_not_exclude_a_client(reason: RejectionReason) -> None:
    run = start("c0", admission={"max_rejections": 1})
    for _ in range(3):
        arrived = make_arrived("9-9", run.job_of("c0"), "c0", 0, b"", (reason, "a lie"))
        run.posted.add(arrived.job)
        run.tell(arrived)
        assert not run.has_job("c0"), "the client got no backoff, so a forger can keep it busy"
        run.tick(60)
    assert run.rejections == [reason] * 3
    run.post("c0", 1.0)
    assert run.federation.version == 1
    backoff = Backoff(1.0, 3, 3)
    backoff.pause("c0", 0.0)
    assert (backoff.allows("c0"), backoff.rested(1.0), backoff.set_aside("c0")) == (False, ["c0"], False)


def test_job_refused_by_the_site_causes_backoff() -> None:
    run = start("c0", "c1", dispatch={"backoff_seconds": 10.0, "max_client_failures": 2})
    run.end("c0", "refused", "max_epochs: the job asks for 9, at most 5 are agreed to")
    assert run.federation.abandoned["refused"] == 1
    assert not run.has_job("c0")
    run.tick(11)
    run.end("c0", "refused")
    run.tick(1e9)
    assert not run.has_job("c0"), "the client was not excluded after the maximum number of failures"
    assert run.federation.stopped is None


def test_successor_keeps_the_norm_limit() -> None:
    run = start("c0", admission={"norm_quantile": 0.5, "norm_slack": 2.0})
    for i in range(MIN_NORMS_FOR_QUANTILE):
        run.post("c0", [float(i + 1), 0.0])
        run.tick(60)
    norms = [line["norm"] for line in run.merged]
    successor = Federation(run.config, run.federation.model.copy(), run.federation.version, norms=norms)
    assert successor._norms.limit == run.federation._norms.limit == 12.0

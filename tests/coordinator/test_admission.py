"""Admission: each reason for rejecting an update, tested on a header alone and in a run."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fedqueue.protocol.msgpack import pack
from fedqueue.tensors.codec import Codec
from fedqueue_coordinator.core.admission import Inadmissible, admit_delta, admit_header
from fedqueue_coordinator.core.events import Acknowledge, Close, Dispatch, Load, Stop
from fedqueue_coordinator.core.reasons import RejectionReason
from tests.support.builders import EXAMPLES, MANIFEST, make_frame, make_header, of_kind, same_bits
from tests.support.federation_run import make_arrived, start

VERSION, MAX_STALENESS = 5, 3


def verdict(base: int = VERSION, body: bytes | None = None, **header: Any) -> RejectionReason | str:
    """Return the reason for rejecting a header at version 5, of a client with 10 examples; "" if it is admitted."""
    event = make_arrived("1-0", "run-00000001", "c0", base, make_header(**header) if body is None else body)
    try:
        admit_header(event, Codec(MANIFEST), VERSION, MAX_STALENESS, EXAMPLES)
    except Inadmissible as inadmissible:
        return inadmissible.reason
    return ""


# The header


@pytest.mark.parametrize("base", [5, 4, 2])
def test_update_at_the_maximum_staleness_is_admitted(base: int) -> None:
    assert verdict(base) == ""


@pytest.mark.parametrize("base", [1, 0])
def test_update_beyond_the_maximum_staleness_is_rejected(base: int) -> None:
    assert verdict(base) == RejectionReason.STALE


@pytest.mark.parametrize("base", [6, -1])
def test_nonexistent_base_is_rejected(base: int) -> None:
    assert verdict(base) == RejectionReason.WRONG_BASE


@pytest.mark.parametrize("examples", [1, EXAMPLES])
def test_registered_number_of_examples_is_admitted(examples: int) -> None:
    assert verdict(examples=examples) == ""


def test_more_examples_than_registered_are_rejected() -> None:
    assert verdict(examples=EXAMPLES + 1) == RejectionReason.TOO_MANY_EXAMPLES


def test_update_from_zero_examples_is_rejected() -> None:
    assert verdict(examples=0) == RejectionReason.NO_EXAMPLES


@pytest.mark.parametrize("nbytes", [0, MANIFEST.nbytes - 8, MANIFEST.nbytes + 8, 2**52])
def test_wrong_payload_size_is_rejected(nbytes: int) -> None:
    assert verdict(nbytes=nbytes) == RejectionReason.WRONG_SIZE


@pytest.mark.parametrize("chunks", [0, 2, 2**20])
def test_wrong_number_of_chunks_is_rejected(chunks: int) -> None:
    assert verdict(chunks=chunks) == RejectionReason.WRONG_SIZE


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",  # never used in msgpack
        pack([1, 2]),
        pack({"examples": 10}),
        pack({"examples": 10, "nbytes": 24, "chunks": 1, "seconds": 0.5, "extra": 1}),
        pack({"examples": -1, "nbytes": 24, "chunks": 1, "seconds": 0.5}),
        pack({"examples": 10.0, "nbytes": 24, "chunks": 1, "seconds": 0.5}),
        pack({"examples": 10, "nbytes": 24, "chunks": 1, "seconds": math.nan}),
        pack({"examples": 10, "nbytes": 24, "chunks": 1, "seconds": 0.5, "encoding": "pickle"}),
        b"\x80\x04]\x94.",  # a pickle
        make_header() + b"\x00",
        bytes(65 * 1024),
    ],
)
def test_header_outside_the_protocol_is_malformed(body: bytes) -> None:
    assert verdict(body=body) == RejectionReason.MALFORMED


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_update_whose_loss_is_not_finite_is_admitted(loss: float) -> None:
    assert verdict(metrics={"loss": loss}) == ""


# The payload


def test_norm_of_an_admitted_update_is_that_of_its_parameters() -> None:
    assert admit_delta(make_frame([3.0, -4.0], mean=100.0, variance=100.0), make_frame()) == pytest.approx(5.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("index", range(4))
def test_non_finite_value_is_found_at_any_position(index: int, value: float) -> None:
    """A value whose square overflows is treated as non-finite, because no training produces such a value."""
    frame = make_frame()
    frame.floats[index] = value
    with pytest.raises(Inadmissible, match=RejectionReason.NON_FINITE):
        admit_delta(frame, make_frame())


def test_infinities_of_both_signs_do_not_cancel() -> None:
    with pytest.raises(Inadmissible, match=RejectionReason.NON_FINITE):
        admit_delta(make_frame([math.inf, -math.inf]), make_frame())


# In a run: a rejected update is not merged, the ledger has the reason, and the run continues

NOT_FINITE = make_frame([1.0, math.nan])
BAD_BUFFER = make_frame(1.0, variance=math.inf)
BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "malformed": ("malformed", {"update": 1.0, "body": b"\xc1"}),
    "wrong base": ("wrong_base", {"update": 1.0, "base": 99}),
    "wrong size": ("wrong_size", {"update": 1.0, "nbytes": 1}),
    "no examples": ("no_examples", {"update": 1.0, "examples": 0}),
    "too many examples": ("too_many_examples", {"update": 1.0, "examples": EXAMPLES + 1}),
    "not a number": ("non_finite", {"update": NOT_FINITE}),
    "infinite": ("non_finite", {"update": math.inf}),
    "minus infinite": ("non_finite", {"update": -math.inf}),
    "buffer not finite": ("non_finite", {"update": BAD_BUFFER}),
    "unreadable": ("unreadable", {"update": None}),
}
MODES = {
    "fedasync": {"strategy": "fedasync"},
    "fedbuff": {"strategy": "fedbuff", "buffer_size": 2},
    "fedavg": {"strategy": "fedavg", "cohort_size": 2},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fault", BAD)
def test_bad_update_is_rejected_and_the_run_continues(fault: str, mode: str) -> None:
    reason, posted = BAD[fault]
    run = start("c0", "c1", clients={"count": 2}, aggregation=MODES[mode])
    job = run.job_of("c0")
    actions = run.post("c0", **posted)
    (close,) = of_kind(actions, Close)
    assert (close.job, close.record["kind"], close.record["reason"]) == (job, "rejected", reason)
    assert close.record["detail"]
    assert run.endings == {job: reason}
    assert run.federation.rejected == {reason: 1}
    assert (run.federation.version, run.federation.buffered) == (0, 0)
    assert same_bits(run.federation.model, make_frame())
    assert not run.unacknowledged
    run.tick(60)
    for client in ("c0", "c1"):
        if run.has_job(client):
            run.post(client, 2.0)
    assert run.federation.version >= 1
    assert math.isfinite(run.x)
    assert run.x > 0
    assert {line["job"] for line in run.merged}.isdisjoint({job})


@pytest.mark.parametrize("fault", ["malformed", "wrong size", "too many examples"])
def test_payload_of_a_rejected_header_is_never_requested(fault: str) -> None:
    run = start("c0")
    assert not of_kind(run.post("c0", **BAD[fault][1]), Load)


def test_rejection_leaves_the_buffer_as_it_was() -> None:
    run = start("c0", "c1", "c2", aggregation={"strategy": "fedbuff", "buffer_size": 2})
    run.post("c0", 2.0)
    run.post("c1", NOT_FINITE)
    assert run.federation.buffered == 1
    run.post("c2", 4.0)
    assert run.x == 3.0


def test_stale_client_gets_a_new_job_without_backoff() -> None:
    aggregation = {"strategy": "fedasync", "mixing": "delta", "max_staleness": 1}
    run = start("c0", "c1", aggregation=aggregation, admission={"max_rejections": 1})
    for _ in range(2):
        run.post("c1", 1.0)
    for _ in range(3):
        actions = run.post("c0", 1.0, base=0)
        assert [d.client for d in of_kind(actions, Dispatch)] == ["c0"]
    assert run.rejections == ["stale"] * 3
    assert run.federation.version == 2
    assert run.federation.next_deadline() is None


def test_update_without_an_open_job_changes_no_slot() -> None:
    run = start("c0", "c1")
    before = dict(run.federation.open_jobs)
    for job, client in (("run-99999999", "c0"), (run.job_of("c1"), "c0"), (run.job_of("c0"), "stranger")):
        (note,) = run.tell(make_arrived("9-0", job, client, 0, make_header()))
        assert isinstance(note, Acknowledge)
        assert note.record is not None
        assert (note.record["reason"], note.record["job"], note.entry) == ("unknown_job", job, "9-0")
    assert run.federation.open_jobs == before
    assert run.federation.rejected == {"unknown_job": 3}


@pytest.mark.parametrize("buffer_size", [1, 2])
def test_second_update_of_the_same_job_is_not_merged(buffer_size: int) -> None:
    """The first update may be in the buffer, or merged already."""
    run = start("c0", aggregation={"strategy": "fedbuff", "buffer_size": buffer_size})
    job = run.job_of("c0")
    run.post("c0", 1.0)
    x, buffered = run.x, run.federation.buffered
    run.tell(make_arrived("9-0", job, "c0", 0, make_header()))
    assert run.rejections == ["unknown_job"]
    assert (run.x, run.federation.buffered) == (x, buffered)


def test_update_after_leaving_must_match_the_registration() -> None:
    run = start("c0", aggregation={"strategy": "fedasync"})
    job = run.job_of("c0")
    run.alive.clear()
    run.restart()  # the successor has the job and the registration, but no live client
    run.tell(make_arrived("9-0", job, "c0", 0, make_header(examples=EXAMPLES + 1)))
    assert run.rejections == ["too_many_examples"]


def test_update_after_the_end_is_acknowledged_and_not_merged() -> None:
    run = start("c0", "c1")
    job = run.job_of("c0")
    run.stop()
    assert run.tell(make_arrived("9-0", job, "c0", 0, make_header())) == [Acknowledge("9-0", None)]
    assert run.endings[job] == "run_ended"
    assert (run.federation.version, run.x) == (0, 0.0)


def test_buffered_updates_are_rejected_when_the_run_ends() -> None:
    run = start("c0", "c1", aggregation={"strategy": "fedbuff", "buffer_size": 3})
    run.post("c0", 1.0)
    run.stop()
    assert run.rejections == ["run_ended"]
    assert (run.federation.version, run.x) == (0, 0.0)


# A client whose updates are rejected

BACKOFF = {"backoff_seconds": 1.0, "max_client_failures": 3}


def test_backoff_doubles_with_each_rejection() -> None:
    run = start("c0", "c1", dispatch=BACKOFF, admission={"max_rejections": 3})
    run.post("c0", NOT_FINITE)
    assert run.has_job("c0")  # the client got a new job when its update arrived, before the payload was read
    run.post("c0", NOT_FINITE)
    assert not run.has_job("c0")
    run.tick(1.0)
    assert not run.has_job("c0")  # 2 seconds since the second failure
    run.tick(1.0)
    assert run.has_job("c0")


@pytest.mark.parametrize("fault", BAD)
def test_client_is_excluded_after_repeated_rejections(fault: str) -> None:
    _, posted = BAD[fault]
    run = start("c0", "c1", dispatch=BACKOFF, admission={"max_rejections": 3})
    for _ in range(10):
        if run.has_job("c0"):
            run.post("c0", **posted)
        run.tick(60)
    assert sum(run.federation.rejected.values()) == 3 + 1  # the next job preceded the third verdict
    assert run.federation.stopped is None
    run.tick(1e9)
    assert not run.has_job("c0")
    run.post("c1", 1.0)
    assert run.has_job("c1")
    assert run.federation.version == 1


def test_merged_update_clears_earlier_failures() -> None:
    run = start("c0", dispatch={"backoff_seconds": 1.0}, admission={"max_rejections": 2})
    for _ in range(5):
        run.post("c0", NOT_FINITE)
        run.tick(60)
        run.post("c0", 1.0)
        run.tick(60)
    assert run.federation.stopped is None
    assert run.federation.version == 5


def test_excluded_client_is_selected_again_after_a_success() -> None:
    """The client got a job before the update that excluded it was read; the update of that job is merged."""
    run = start("c0", "c1", admission={"max_rejections": 1})
    run.post("c0", NOT_FINITE)
    assert run.has_job("c0")
    run.post("c0", 1.0)
    assert run.federation.version == 1
    assert run.has_job("c0")


def test_run_fails_when_every_client_is_excluded() -> None:
    run = start("c0", "c1", dispatch=BACKOFF, admission={"max_rejections": 3})
    for client in ("c0", "c1") * 5:
        if run.has_job(client):
            run.post(client, NOT_FINITE)
        run.tick(60)
    (stop,) = of_kind(run.actions, Stop)
    assert stop == run.federation.stopped
    assert stop.failed
    assert "set aside" in stop.because
    assert run.federation.rejected["non_finite"] >= 6
    assert not run.jobs
    assert run.federation.version == 0

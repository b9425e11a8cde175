"""What may be merged, and each reason why not: as a verdict on one update, and with a run around it that goes on."""

from __future__ import annotations

import math

import pytest
from builders import EXAMPLES, MANIFEST, make_frame, make_header, of_kind, same_bits, start

from fedqueue.protocol.messages import pack
from fedqueue.tensors.codec import Codec
from fedqueue_coordinator.core import admission
from fedqueue_coordinator.core.admission import Inadmissible, admit_frame, admit_header
from fedqueue_coordinator.core.events import Acknowledge, Close, Dispatch, Load, Stop, UpdateArrived

VERSION, MAX_STALENESS = 5, 3


def verdict(base=VERSION, body=None, **header):
    """The header's verdict at version 5, for a client of 10 examples: "" where it is admitted."""
    event = UpdateArrived("1-0", "run-00000001", 1, "c0", base, make_header(**header) if body is None else body)
    try:
        admit_header(event, Codec(MANIFEST), VERSION, MAX_STALENESS, EXAMPLES)
    except Inadmissible as inadmissible:
        return inadmissible.reason
    return ""


# The header


@pytest.mark.parametrize("base", [5, 4, 2])
def test_update_up_to_the_greatest_staleness_is_admitted(base):
    assert verdict(base) == ""


@pytest.mark.parametrize("base", [1, 0])
def test_staler_update_is_stale(base):
    assert verdict(base) == admission.STALE


@pytest.mark.parametrize("base", [6, -1])
def test_base_that_does_not_exist_is_wrong(base):
    assert verdict(base) == admission.WRONG_BASE


@pytest.mark.parametrize("examples", [1, EXAMPLES])
def test_as_many_examples_as_registered_are_admitted(examples):
    assert verdict(examples=examples) == ""


def test_more_examples_than_registered_are_too_many():
    assert verdict(examples=EXAMPLES + 1) == admission.TOO_MANY_EXAMPLES


def test_training_on_nothing_is_no_update():
    assert verdict(examples=0) == admission.NO_EXAMPLES


@pytest.mark.parametrize("nbytes", [0, MANIFEST.nbytes - 8, MANIFEST.nbytes + 8, 2**52])
def test_payload_of_another_size_is_wrong(nbytes):
    assert verdict(nbytes=nbytes) == admission.WRONG_SIZE


@pytest.mark.parametrize("chunks", [0, 2, 2**20])
def test_another_number_of_chunks_is_wrong(chunks):
    assert verdict(chunks=chunks) == admission.WRONG_SIZE


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
        pack({"examples": 10, "nbytes": 24, "chunks": 1, "seconds": 0.5, "metrics": {"loss": math.inf}}),
        pack({"examples": 10, "nbytes": 24, "chunks": 1, "seconds": 0.5, "encoding": "pickle"}),
        b"\x80\x04]\x94.",  # a pickle
        make_header() + b"\x00",
        bytes(65 * 1024),
    ],
)
def test_header_that_is_not_one_of_this_protocol_is_malformed(body):
    assert verdict(body=body) == admission.MALFORMED


# The payload


def test_norm_of_an_admitted_update_is_that_of_its_parameters():
    assert admit_frame(make_frame([3.0, -4.0], mean=100.0, variance=100.0)) == pytest.approx(5.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("place", range(4))
def test_value_that_is_not_finite_is_found_wherever_it_is(place, value):
    """Also one whose square overflows: no training leads there."""
    frame = make_frame()
    frame.floats[place] = value
    with pytest.raises(Inadmissible, match=admission.NON_FINITE):
        admit_frame(frame)


def test_infinities_of_both_signs_do_not_cancel():
    with pytest.raises(Inadmissible, match=admission.NON_FINITE):
        admit_frame(make_frame([math.inf, -math.inf]))


# In a run: nothing is merged, the reason is written down, and the run goes on

NOT_FINITE = make_frame([1.0, math.nan])
BAD_BUFFER = make_frame(1.0, variance=math.inf)
BAD = {
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
    "fedasync": {"mode": "fedasync"},
    "fedbuff": {"mode": "fedbuff", "buffer_size": 2},
    "fedavg": {"mode": "fedavg", "cohort_size": 2},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fault", BAD)
def test_bad_update_is_rejected_with_its_reason_and_the_run_goes_on(fault, mode):
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
def test_payload_of_a_bad_header_is_never_asked_for(fault):
    run = start("c0")
    assert not of_kind(run.post("c0", **BAD[fault][1]), Load)


def test_rejection_leaves_the_buffer_as_it_was():
    run = start("c0", "c1", "c2", aggregation={"mode": "fedbuff", "buffer_size": 2})
    run.post("c0", 2.0)
    run.post("c1", NOT_FINITE)
    assert run.federation.buffered == 1
    run.post("c2", 4.0)
    assert run.x == 3.0


def test_stale_update_is_rejected_and_its_client_gets_a_fresh_job_without_a_rest():
    aggregation = {"mode": "fedasync", "mixing": "delta", "max_staleness": 1}
    run = start("c0", "c1", aggregation=aggregation, admission={"max_rejections": 1})
    for _ in range(2):
        run.post("c1", 1.0)
    for _ in range(3):
        actions = run.post("c0", 1.0, base=0)
        assert [d.client for d in of_kind(actions, Dispatch)] == ["c0"]
    assert run.rejections == ["stale"] * 3
    assert run.federation.version == 2
    assert run.federation.next_deadline() is None


def test_update_of_no_open_job_is_noted_and_changes_no_slot():
    run = start("c0", "c1")
    before = dict(run.federation.open_jobs)
    for job, client in (("run-99999999", "c0"), (run.job_of("c1"), "c0"), (run.job_of("c0"), "stranger")):
        (note,) = run.tell(UpdateArrived("9-0", job, 1, client, 0, make_header()))
        assert isinstance(note, Acknowledge)
        assert (note.record["reason"], note.record["job"], note.entry) == ("unknown_job", job, "9-0")
    assert run.federation.open_jobs == before
    assert run.federation.rejected == {"unknown_job": 3}


@pytest.mark.parametrize("buffer_size", [1, 2])
def test_second_update_of_the_same_job_is_not_merged(buffer_size):
    """Whether the first one is still in the buffer or merged already."""
    run = start("c0", aggregation={"mode": "fedbuff", "buffer_size": buffer_size})
    job = run.job_of("c0")
    run.post("c0", 1.0)
    x, buffered = run.x, run.federation.buffered
    run.tell(UpdateArrived("9-0", job, 1, "c0", 0, make_header()))
    assert run.rejections == ["unknown_job"]
    assert (run.x, run.federation.buffered) == (x, buffered)


def test_update_of_a_client_that_left_is_held_to_what_it_had_registered():
    run = start("c0", aggregation={"mode": "fedasync"})
    job = run.job_of("c0")
    run.alive.clear()
    run.restart()  # the successor knows the job and the registration, and sees no client
    run.tell(UpdateArrived("9-0", job, 1, "c0", 0, make_header(examples=EXAMPLES + 1)))
    assert run.rejections == ["too_many_examples"]


def test_update_after_the_end_is_acknowledged_and_not_merged():
    run = start("c0", "c1")
    job = run.job_of("c0")
    run.stop()
    assert run.tell(UpdateArrived("9-0", job, 1, "c0", 0, make_header())) == [Acknowledge("9-0", None)]
    assert run.endings[job] == "run_ended"
    assert (run.federation.version, run.x) == (0, 0.0)


def test_buffered_updates_are_rejected_when_the_run_ends():
    run = start("c0", "c1", aggregation={"mode": "fedbuff", "buffer_size": 3})
    run.post("c0", 1.0)
    run.stop()
    assert run.rejections == ["run_ended"]
    assert (run.federation.version, run.x) == (0, 0.0)


# A client whose updates are rejected

BACKOFF = {"backoff_seconds": 1.0, "max_client_failures": 3}


def test_rejected_client_rests_twice_as_long_each_time():
    run = start("c0", "c1", dispatch=BACKOFF, admission={"max_rejections": 3})
    run.post("c0", NOT_FINITE)
    assert run.has_job("c0")  # its slot was free, and given away, before the payload was read
    run.post("c0", NOT_FINITE)
    assert not run.has_job("c0")
    run.tick(1.0)
    assert not run.has_job("c0")  # 2 seconds since the second failure
    run.tick(1.0)
    assert run.has_job("c0")


@pytest.mark.parametrize("fault", BAD)
def test_client_whose_every_update_is_rejected_is_set_aside(fault):
    _, posted = BAD[fault]
    run = start("c0", "c1", dispatch=BACKOFF, admission={"max_rejections": 3})
    for _ in range(10):
        if run.has_job("c0"):
            run.post("c0", **posted)
        run.tick(60)
    assert sum(run.federation.rejected.values()) == 3 + 1  # its next job was given away before the third was read
    assert run.federation.stopped is None
    run.tick(1e9)
    assert not run.has_job("c0")
    run.post("c1", 1.0)
    assert run.has_job("c1")
    assert run.federation.version == 1


def test_merged_update_clears_the_failures_before_it():
    run = start("c0", dispatch={"backoff_seconds": 1.0}, admission={"max_rejections": 2})
    for _ in range(5):
        run.post("c0", NOT_FINITE)
        run.tick(60)
        run.post("c0", 1.0)
        run.tick(60)
    assert run.federation.stopped is None
    assert run.federation.version == 5


def test_client_that_does_well_after_it_was_set_aside_is_asked_again():
    """It was given a job before the update that set it aside was read; that job's update is merged."""
    run = start("c0", "c1", admission={"max_rejections": 1})
    run.post("c0", NOT_FINITE)
    assert run.has_job("c0")
    run.post("c0", 1.0)
    assert run.federation.version == 1
    assert run.has_job("c0")


def test_run_stops_as_failed_when_every_client_is_set_aside():
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

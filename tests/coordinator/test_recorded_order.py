"""Merges a recorded arrival order, and compares every version and every ledger record with the recorded ones.

`recorded/arrivals.json` holds the order of events, `recorded/updates.npz` the updates, and `recorded/expected.json` the
SHA-256 of the model at each version and the ledger records, for each aggregation. A change of the code that changes
one bit of a model, or one field of the ledger, fails here.

Every parameter of an update is a power of two, so its product with a weight is exact: fused and separate multiply-add
instructions give the same float32 sums on every processor.

Recording the present behavior again, after a change that is meant to alter it:
`python -m tests.coordinator.test_recorded_order`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedqueue.tensors.frame import Frame
from fedqueue.tensors.manifest import BUFFER, COUNTER, PARAMETER, Manifest, TensorSpec
from fedqueue_coordinator.core.events import Dispatch
from tests.support.builders import make_config, make_header, of_kind
from tests.support.federation_run import Run

RECORDED = Path(__file__).parent / "recorded"
PARAMETERS, BUFFERS, COUNTERS, UPDATES = 61, 4, 2, 12
MANIFEST = Manifest(
    (
        TensorSpec("weight", "float32", (PARAMETERS,), 0, PARAMETERS, PARAMETER),
        TensorSpec("running_var", "float32", (BUFFERS,), PARAMETERS, BUFFERS, BUFFER),
        TensorSpec("steps", "int64", (COUNTERS,), 0, COUNTERS, COUNTER),
    )
)
POLYNOMIAL = {"function": "polynomial", "a": 1.0}
HINGE = {"function": "hinge", "a": 1.0, "b": 1.0}
AGGREGATIONS: dict[str, dict[str, Any]] = {
    "fedasync": {"strategy": "fedasync", "alpha": 0.5, "mixing": "model", "staleness": POLYNOMIAL},
    "fedasync_delta": {"strategy": "fedasync", "alpha": 0.5, "mixing": "delta", "staleness": HINGE},
    "fedbuff_polynomial": {"strategy": "fedbuff", "buffer_size": 2, "staleness": POLYNOMIAL},
    "fedbuff_hinge": {"strategy": "fedbuff", "buffer_size": 2, "staleness": HINGE, "weight_by_examples": True},
    "fedbuff_drift": {"strategy": "fedbuff", "buffer_size": 2, "staleness": POLYNOMIAL, "running_statistics": "drift"},
    "fedavg": {"strategy": "fedavg", "cohort_size": 2},
    "fadas": {"strategy": "fadas", "buffer_size": 2, "strategy_options": {"betas": [0.5, 0.75], "learning_rate": 0.5}},
    "ca2fl": {"strategy": "ca2fl", "buffer_size": 2, "strategy_options": {"cache_clients": 2}},
    "trimmed_mean": {
        "strategy": "fedbuff", "buffer_size": 3, "staleness": HINGE, "robust": {"rule": "trimmed_mean", "byzantine": 1},
    },
    "multi_krum": {
        "strategy": "fedbuff", "buffer_size": 4, "staleness": POLYNOMIAL,
        "robust": {"rule": "multi_krum", "byzantine": 0, "keep": 2},
    },
}  # fmt: skip


def read_updates() -> list[Frame]:
    """Return the recorded updates, each as a frame of its own."""
    with np.load(RECORDED / "updates.npz") as arrays:
        floats, counters = arrays["floats"], arrays["counters"]
    frames = []
    for values, counts in zip(floats, counters, strict=True):
        frame = Frame(MANIFEST)
        frame.floats[:] = frame.floats.new_tensor(values)
        frame.counters[:] = frame.counters.new_tensor(counts)
        frames.append(frame)
    return frames


def merge_recorded_order(name: str) -> dict[str, Any]:
    """Drive a federation through the recorded events; return the entry of `expected.json` for this aggregation."""
    aggregation = AGGREGATIONS[name]
    barrier = aggregation["strategy"] == "fedavg"
    config = make_config(
        aggregation=aggregation,
        dispatch={"backoff_seconds": 4.0, **({"over_selection": 1.5} if barrier else {})},
        seed=7,
    )
    model = Frame(MANIFEST)
    model.floats[:] = 1.0
    run = Run(config, model)
    updates = read_updates()
    script = json.loads((RECORDED / "arrivals.json").read_text(encoding="utf-8"))
    for step in script["barrier" if barrier else "free"]:
        perform(run, step, updates)
    run.stop()
    digests = {
        str(version): hashlib.sha256(frame.buffer.tobytes()).hexdigest() for version, frame in run.versions.items()
    }
    dispatched = [[action.job, action.number, action.client] for action in of_kind(run.actions, Dispatch)]
    state = hashlib.sha256(run.federation.optimizer_state).hexdigest()
    return {"models": digests, "state": state, "dispatched": dispatched, "ledger": json.loads(json.dumps(run.ledger))}


def perform(run: Run, step: dict[str, Any], updates: list[Frame]) -> None:
    """Carry out one recorded step; skip a step of a client without an open job."""
    client = step.get("client", "")
    if step["do"] in ("post", "fail", "return", "lapse") and not run.has_job(client):
        return
    match step["do"]:
        case "join":
            run.join(client, examples=step["examples"])
        case "leave":
            run.leave(client)
        case "wait":
            run.tick(step["seconds"])
        case "fail":
            run.end(client, "failed", "ValueError: recorded")
        case "return":
            run.end(client, "returned")
        case "lapse":
            run.lapse(client)
        case "post":
            run.now += 0.25
            base = max(0, run.federation.version - step["behind"])
            body = make_header(examples=step["examples"], nbytes=MANIFEST.nbytes)
            run.post(client, updates[step["update"]], base=base, body=body)


@pytest.mark.parametrize("name", sorted(AGGREGATIONS))
def test_recorded_order_gives_the_recorded_versions_and_ledger(name: str) -> None:
    expected = json.loads((RECORDED / "expected.json").read_text(encoding="utf-8"))[name]
    found = merge_recorded_order(name)
    assert found["models"] == expected["models"]
    assert found["dispatched"] == expected["dispatched"]
    assert found["ledger"] == expected["ledger"]
    assert found["state"] == expected["state"]


@pytest.mark.parametrize("name", sorted(AGGREGATIONS))
def test_recorded_order_covers_every_kind_of_ending(name: str) -> None:
    """The recording has every kind of ending, so a change to any of them fails the test above."""
    ledger = json.loads((RECORDED / "expected.json").read_text(encoding="utf-8"))[name]["ledger"]
    merged = [update for record in ledger if record["kind"] == "version" for update in record["merged"]]
    reasons = {record["reason"] for record in ledger if record["kind"] != "version"}
    assert sum(record["kind"] == "version" for record in ledger) >= 2
    assert reasons >= {"too_many_examples", "lapsed", "failed"}
    assert any(update["staleness"] > 0 for update in merged) or name == "fedavg"


def record() -> None:
    """Write `expected.json` from the current behavior of the code."""
    expected = {name: merge_recorded_order(name) for name in sorted(AGGREGATIONS)}
    text = json.dumps(expected).replace('{"kind"', '\n{"kind"').replace('"models"', '\n"models"')  # one record per line
    (RECORDED / "expected.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    record()

"""A reader of the ledger continues where it stopped, and notices a ledger that is not the same any more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from fedqueue.protocol.msgpack import pack_record
from fedqueue.transport.ledger_tail import LedgerReplaced, LedgerTail
from fedqueue.transport.store import Store
from tests.support.sample_run import SampleRun


def append(run: SampleRun, versions: Sequence[int]) -> list[dict[str, Any]]:
    """Append a record for each version, as a commit does; return what `ledger` has of them."""
    records = [{"kind": "version", "version": version, "merged": []} for version in versions]
    for record in records:
        run.client.xadd(run.keys.ledger, {"record": pack_record(record)})
    return records


def tail_of(run: SampleRun) -> LedgerTail:
    return LedgerTail(Store(run.client, run.name))


def test_each_read_returns_what_was_appended_since_the_last(run: SampleRun) -> None:
    tail = tail_of(run)
    assert tail.read() == []
    assert append(run, [1, 2]) == tail.read()
    assert tail.read() == []
    assert append(run, [3]) == tail.read()
    assert tail.read() == []


def test_long_ledger_is_read_in_portions_without_gaps(run: SampleRun) -> None:
    records, tail = append(run, range(1, 8)), tail_of(run)
    portions = [tail.read(3) for _ in range(4)]
    assert [len(portion) for portion in portions] == [3, 3, 1, 0]
    assert [record for portion in portions for record in portion] == records == Store(run.client, run.name).ledger()


def _milliseconds(run: SampleRun) -> int:
    seconds, micros = run.client.time()
    return int(seconds) * 1000 + int(micros) // 1000


@pytest.mark.parametrize("afterwards", [[], [1, 2, 3]], ids=["deleted", "written back"])
def test_replaced_ledger_is_named_at_the_next_read(run: SampleRun, afterwards: list[int]) -> None:
    tail = tail_of(run)
    append(run, [1, 2])
    tail.read()
    last = run.client.xinfo_stream(run.keys.ledger)["last-generated-id"]
    run.client.delete(run.keys.ledger)
    while _milliseconds(run) <= int(last.split(b"-")[0]):
        pass  # a record of the same millisecond would get the id of the one that is gone
    append(run, afterwards)
    with pytest.raises(LedgerReplaced, match="'sample' is no longer the one"):
        tail.read()
    assert [record["version"] for record in tail_of(run).read()] == afterwards

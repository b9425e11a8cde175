"""For any bytes, every decoder of external bytes raises only its listed errors, in bounded time and memory.

`make fuzz` searches for bytes that break a bound, guided by coverage; its findings are in tests/corpus.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedqueue.errors import StoreError, WireError
from fedqueue.protocol.msgpack import MAX_DEPTH, MAX_MESSAGE, MAX_RECORD, unpack, unpack_record
from fedqueue.tensors.manifest import MAX_DIMENSIONS, MAX_MANIFEST, Manifest
from fedqueue.transport.store import plain_json
from tests.support.decoders import DECODERS, Decoder, ToShow, check

CORPUS = Path(__file__).parents[1] / "corpus"
FOUND = sorted(path for path in CORPUS.rglob("*") if path.is_file() and path.suffix != ".md")
each_decoder = pytest.mark.parametrize("name", DECODERS)


def changed(seed: bytes) -> st.SearchStrategy[bytes]:
    """Generate the seed with a piece replaced by other bytes."""
    places = st.integers(0, len(seed))
    return st.builds(
        lambda a, b, new: seed[: min(a, b)] + new + seed[max(a, b) :], places, places, st.binary(max_size=12)
    )


@each_decoder
@settings(max_examples=25)
@given(data=st.data())
def test_decoder_keeps_its_bounds_for_any_bytes(name: Any, data: Any) -> None:
    check(name, data.draw(st.binary(max_size=200) | changed(DECODERS[name].seeds[0])))


@each_decoder
def test_seed_of_a_decoder_is_decoded(name: Any) -> None:
    """Fuzzing has to start from valid input, not from input that is refused at the first byte."""
    for seed in DECODERS[name].seeds:
        if name != "job":
            assert DECODERS[name].decode(seed) is not None
        else:
            assert DECODERS[name].decode(seed)[0] == "f"


def test_inputs_that_were_found_once_keep_the_bounds() -> None:
    for path in FOUND:
        check(path.parent.name, path.read_bytes())


BOMBS = {
    "lists in lists": b"\x91" * 60_000 + b"\xc0",
    "maps in maps": b"\x81\xa1a" * 20_000 + b"\xc0",
    "a list said to be long": b"\xdd\xff\xff\xff\xff",
    "a map said to be long": b"\xdf\xff\xff\xff\xff",
    "a text said to be long": b"\xdb\xff\xff\xff\xff",
    "bytes said to be long": b"\xc6\xff\xff\xff\xff",
    "an extension said to be long": b"\xc9\xff\xff\xff\xff\x01",
    "many empty maps": b"\xdc\xff\x00" + b"\x80" * 0xFF00,
    "many empty lists": b"\xdc\xff\x00" + b"\x90" * 0xFF00,
    "many lists side by side": b"\xdc\x7f\x00" + b"\x91\x90" * 0x7F00,
    "zeros": bytes(65_000),
    "open brackets": b"[" * 60_000,
    "open braces": b'{"a":' * 12_000,
    "a long number": b'{"seed":' + b"9" * 60_000 + b"}",
    "a timestamp": b"\xd6\xff\x00\x00\x00\x00",
}


SLOW = {"order", "registration", "ending", "evaluation", "seal", "descriptor", "version"}
"""Messages that are unpacked by the code that unpacks an update."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in DECODERS])
@pytest.mark.parametrize("bomb", BOMBS)
def test_bomb_takes_neither_time_nor_memory(name: Any, bomb: str) -> None:
    check(name, BOMBS[bomb])


@pytest.mark.parametrize("broken", ["raises", "grows", "hangs"])
def test_check_notices_a_decoder_that_breaks_a_bound(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    ticks = iter([0.0, 99.0])
    if broken == "hangs":
        monkeypatch.setattr("time.process_time", lambda: next(ticks))
    decode = {
        "raises": lambda data: 1 // len(data),
        "grows": lambda data: bytes(10 * 2**20),
        "hangs": lambda data: None,
    }
    monkeypatch.setitem(DECODERS, "broken", Decoder(decode[broken], (WireError,), ()))
    with pytest.raises(ToShow, match={"raises": "ZeroDivisionError", "grows": "memory", "hangs": "99"}[broken]):
        check("broken", b"")


# The bounds themselves


def nested(levels: int) -> bytes:
    return b"\x91" * levels + b"\xc0"


def test_nesting_is_bounded() -> None:
    assert unpack(nested(MAX_DEPTH - 1))
    with pytest.raises(WireError, match=f"more than {MAX_DEPTH} levels"):
        unpack(nested(MAX_DEPTH))
    with pytest.raises(WireError, match="levels"):
        unpack(b"\x81\xa1a" * MAX_DEPTH + b"\xc0")


def test_sizes_are_bounded_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(msgpack, "unpackb", lambda *a, **k: pytest.fail("it was decoded"))
    for decode, limit in ((unpack, MAX_MESSAGE), (unpack_record, MAX_RECORD), (Manifest.unpack, MAX_MANIFEST)):
        with pytest.raises(WireError, match=f"at most {limit}"):
            decode(bytes(limit + 1))
    with pytest.raises(StoreError, match=f"at most {MAX_RECORD}"):
        plain_json(b" " * (MAX_RECORD + 1))


def test_record_is_a_map_of_names() -> None:
    assert unpack_record(msgpack.packb({"kind": "version"})) == {"kind": "version"}
    values: tuple[object, ...] = ([], 5, None, {1: 2}, {b"kind": 1})
    for value in values:
        with pytest.raises(WireError, match=r"map of names|map key"):
            unpack_record(msgpack.packb(value))


def test_dimensions_of_a_tensor_are_bounded() -> None:
    """Without a bound, the product of many large dimensions takes very long to compute."""
    dimensions = [1] * MAX_DIMENSIONS
    row = ["w", "float32", dimensions, 0, 1, "parameter", "", [], []]
    assert Manifest.unpack(msgpack.packb([row]))
    dimensions.append(1)
    with pytest.raises(WireError, match="dimensions"):
        Manifest.unpack(msgpack.packb([row]))

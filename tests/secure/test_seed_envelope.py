"""A seed is opened by the keeper that it is encrypted to, for the update that it belongs to, and by nothing else."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedqueue.config.loading import parse_config
from fedqueue.config.schema import Config
from fedqueue.errors import WireError
from fedqueue.protocol.signed_envelope import Scope
from fedqueue.secure.masks import new_seed
from fedqueue.secure.seed_envelope import (
    PRIVATE_BYTES,
    PUBLIC_BYTES,
    SEALED_BYTES,
    KeeperPrivateKey,
    agreed_terms,
    seal_seed,
    seed_info,
)
from tests.support.masked_run import masked_config


def config(**secure: Any) -> Config:
    return masked_config(["k"], "abcde", 3, **secure)


KEY, OTHER_KEY = KeeperPrivateKey.generate(), KeeperPrivateKey.generate()
TERMS, OTHER_TERMS = agreed_terms(config()), agreed_terms(config(min_cohort=2))
FIELDS: tuple[Any, ...] = (Scope("r", "i" * 32, 1), TERMS, "a", "r-1", 1, 2, "0" * 64, "1" * 64, 0, "k", 6)
CHANGED: tuple[Any, ...] = (
    Scope("r", "j" * 32, 1),
    OTHER_TERMS,
    "b",
    "r-2",
    2,
    3,
    "2" * 64,
    "3" * 64,
    1,
    "l",
    7,
)


def test_seed_is_opened_by_its_keeper() -> None:
    seed, info = new_seed(), seed_info(*FIELDS)
    sealed = seal_seed(seed, KEY.public, info)
    assert KEY.open_seed(sealed, info) == seed
    assert (len(KEY.public), len(KEY.to_bytes()), len(sealed)) == (PUBLIC_BYTES, PRIVATE_BYTES, SEALED_BYTES)


def test_two_encryptions_of_a_seed_differ() -> None:
    seed = new_seed()
    assert seal_seed(seed, KEY.public, b"") != seal_seed(seed, KEY.public, b"")


def test_another_keeper_cannot_open_it() -> None:
    sealed = seal_seed(new_seed(), KEY.public, b"info")
    with pytest.raises(WireError, match="not encrypted to this keeper"):
        OTHER_KEY.open_seed(sealed, b"info")


@pytest.mark.parametrize("place", range(len(FIELDS)))
def test_each_field_of_an_update_is_bound(place: int) -> None:
    sealed = seal_seed(new_seed(), KEY.public, seed_info(*FIELDS))
    changed = [*FIELDS[:place], CHANGED[place], *FIELDS[place + 1 :]]
    with pytest.raises(WireError, match="belongs to another update"):
        KEY.open_seed(sealed, seed_info(*changed))


def test_different_updates_have_different_infos() -> None:
    choices = itertools.product(*zip(FIELDS, CHANGED, strict=True))
    infos = [seed_info(*fields) for fields in choices]
    assert len(set(infos)) == 2 ** len(FIELDS)


@given(st.integers(0, SEALED_BYTES - 1), st.integers(1, 255))
def test_no_changed_byte_opens(place: int, change: int) -> None:
    sealed = bytearray(seal_seed(bytes(32), KEY.public, b"info"))
    sealed[place] ^= change
    with pytest.raises(WireError):
        KEY.open_seed(bytes(sealed), b"info")


@given(st.binary(max_size=SEALED_BYTES + 10))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        KEY.open_seed(data, b"")
    with pytest.raises(WireError):
        seal_seed(bytes(32), data, b"")


@pytest.mark.parametrize("public", [bytes(PUBLIC_BYTES), b"\xff" * PUBLIC_BYTES, KEY.public[:1184] + bytes(32)])
def test_bad_public_key_encrypts_nothing(public: bytes) -> None:
    with pytest.raises(WireError):
        seal_seed(bytes(32), public, b"")


def test_private_key_survives_its_bytes() -> None:
    sealed = seal_seed(bytes(range(32)), KEY.public, b"info")
    again = KeeperPrivateKey.from_bytes(KEY.to_bytes())
    assert again.open_seed(sealed, b"info") == bytes(range(32))
    assert (again.public, again.id) == (KEY.public, KEY.id)
    assert KEY.to_bytes().hex() not in repr(KEY)


@pytest.mark.parametrize("size", [0, PRIVATE_BYTES - 1, PRIVATE_BYTES + 1])
def test_private_key_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="not a keeper's private key"):
        KeeperPrivateKey.from_bytes(bytes(size))


@pytest.mark.parametrize(
    "changed",
    [
        {"secure": {"min_cohort": 2}},
        {"secure": {"weight_levels": 4}},
        {"secure": {"clip_norm": 1.0}},
        {"secure": {"keepers": ["k", "l"]}},
        {"aggregation": {"buffer_size": 4}},
        {"aggregation": {"staleness": {"a": 2.0}}},
        {"aggregation": {"strategy": "fadas"}},
    ],
    ids=str,
)
def test_terms_that_keepers_go_by_are_bound(changed: dict[str, Any]) -> None:
    """A coordinator cannot tell sites of crowds of five, and keepers of crowds of two."""
    tree = config().model_dump(exclude_none=True)
    other = parse_config({**tree, **{name: {**tree[name], **part} for name, part in changed.items()}})
    assert agreed_terms(other) != TERMS
    assert agreed_terms(parse_config({**tree, "stop": {"versions": 3}})) == TERMS

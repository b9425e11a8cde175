"""Signatures are those of RFC 8032, and no others are accepted."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from fedqueue.protocol.key_files import PublicKey, SigningKey

SEED, PUBLIC, SIGNATURE = (
    # RFC 8032, section 7.1, test 3; the message is af82
    "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
    "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
    "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
    "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
)


def test_signature_matches_the_test_vector_of_rfc_8032() -> None:
    key = SigningKey(Ed25519PrivateKey.from_private_bytes(bytes.fromhex(SEED)))
    assert key.public.raw.hex() == PUBLIC
    assert key.sign(bytes.fromhex("af82")).hex() == SIGNATURE
    assert key.public.verifies(bytes.fromhex(SIGNATURE), bytes.fromhex("af82"))


@given(seed=st.binary(min_size=32, max_size=32), message=st.binary(max_size=300), place=st.integers(0, 511))
def test_signatures_verify_with_another_implementation(seed: bytes, message: bytes, place: int) -> None:
    key = SigningKey(Ed25519PrivateKey.from_private_bytes(seed))
    signature = key.sign(message)
    Ed25519PublicKey.from_public_bytes(key.public.raw).verify(signature, message)
    assert key.public.verifies(signature, message)
    changed = bytearray(signature + message)
    changed[place % len(changed)] ^= 1 << place % 8
    assert not key.public.verifies(bytes(changed[:64]), bytes(changed[64:]))


def test_bytes_cannot_move_between_signature_and_message() -> None:
    """libsodium concatenates signature and message, and must not verify them with one byte moved between the two."""
    key = SigningKey.generate()
    signature, message = key.sign(b"message"), b"message"
    for edge in (0, 63, 65):
        whole = signature + message
        assert not key.public.verifies(whole[:edge], whole[edge:])


@pytest.mark.parametrize("raw", [b"", bytes(31), bytes(32), bytes(33)])
def test_invalid_public_key_verifies_nothing(raw: bytes) -> None:
    signature = SigningKey.generate().sign(b"message")
    assert not PublicKey.from_raw(raw).verifies(signature, b"message")
    assert not PublicKey.from_raw(raw).verifies(bytes(64), b"message")

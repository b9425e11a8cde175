"""Seeds of masks, encrypted to keepers by HPKE (RFC 9180).

The key encapsulation is the hybrid of ML-KEM-768 and X25519, so that recorded traffic stays secret while either of the
two holds. A keeper has a new key pair in each instance of a run. What a seed belongs to is bound into its encryption:
an encrypted seed that is moved to another update, payload, component, keeper or run cannot be opened.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import (
    AEAD,
    KDF,
    KEM,
    MLKEM768X25519PrivateKey,
    MLKEM768X25519PublicKey,
    Suite,
)

from fedqueue.config.schema import Config
from fedqueue.errors import WireError
from fedqueue.protocol.msgpack import pack
from fedqueue.protocol.signed_envelope import DOMAIN, Scope

SEED_BYTES = 32
MLKEM_PUBLIC, MLKEM_PRIVATE, X25519_BYTES = 1184, 64, 32
PUBLIC_BYTES = MLKEM_PUBLIC + X25519_BYTES
PRIVATE_BYTES = MLKEM_PRIVATE + X25519_BYTES
SEALED_BYTES = 1168  # a ciphertext of ML-KEM, a public key of X25519, the seed, and a tag
_SUITE = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)


class KeeperPrivateKey:
    """A keeper's key pair for one run instance. Neither its repr nor any error contains a part of it."""

    def __init__(self, mlkem: MLKEM768PrivateKey, x25519: X25519PrivateKey) -> None:
        self._mlkem, self._x25519 = mlkem, x25519
        self._key = MLKEM768X25519PrivateKey(mlkem, x25519)
        self.public = mlkem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw()
        """The public key, PUBLIC_BYTES bytes: that of ML-KEM-768, then that of X25519."""
        self.id = key_id(self.public)

    @classmethod
    def generate(cls) -> KeeperPrivateKey:
        """A new random key pair."""
        return cls(MLKEM768PrivateKey.generate(), X25519PrivateKey.generate())

    @classmethod
    def from_bytes(cls, data: bytes) -> KeeperPrivateKey:
        """The inverse of `to_bytes`; raises ValueError for other than PRIVATE_BYTES bytes."""
        if len(data) != PRIVATE_BYTES:
            raise ValueError("not a keeper's private key")
        mlkem = MLKEM768PrivateKey.from_seed_bytes(data[:MLKEM_PRIVATE])
        return cls(mlkem, X25519PrivateKey.from_private_bytes(data[MLKEM_PRIVATE:]))

    def to_bytes(self) -> bytes:
        """The private key, PRIVATE_BYTES bytes: the seed of ML-KEM-768, then the private key of X25519."""
        return self._mlkem.private_bytes_raw() + self._x25519.private_bytes_raw()

    def open_seed(self, sealed: bytes, info: bytes) -> bytes:
        """The seed that was encrypted to this key for `info`; raises WireError for anything else."""
        try:
            seed: bytes = _SUITE.decrypt(sealed, self._key, info)
        except (InvalidTag, ValueError):
            raise WireError("the seed is not encrypted to this keeper, or belongs to another update") from None
        if len(seed) != SEED_BYTES:
            raise WireError(f"the seed has {len(seed)} bytes, not {SEED_BYTES}")
        return seed


def key_id(public: bytes) -> str:
    """The name of a public key: the start of its SHA-256, as that of a signing key."""
    return hashlib.sha256(public).hexdigest()[:16]


def seal_seed(seed: bytes, public: bytes, info: bytes) -> bytes:
    """The seed, SEED_BYTES bytes, encrypted to the keeper's key `public`, which opens it for the same `info` only.

    Raises WireError for bytes that are no public key.
    """
    assert len(seed) == SEED_BYTES, "a seed has 256 bits"
    key = _public_key(public)
    try:
        sealed: bytes = _SUITE.encrypt(seed, key, info)
    except ValueError:  # a point of small order
        raise WireError("nothing can be encrypted to the keeper's public key") from None
    return sealed


def seed_info(
    scope: Scope,
    terms: bytes,
    client: str,
    job: str,
    attempt: int,
    base: int,
    model: str,
    payload: str,
    component: int,
    keeper: str,
    words: int,
) -> bytes:
    """What a seed belongs to, for `seal_seed` and `open_seed`: different fields give different bytes.

    `model` is the digest of the base version, `payload` that of the masked payload of `words` words. `terms` are
    the `agreed_terms` of the run's configuration as this party has it: a coordinator could sign one for sites and
    another for keepers.
    """
    where = [scope.run, scope.instance, scope.epoch, client, job, attempt, base]
    return pack([DOMAIN, "seed", *where, model, payload, component, keeper, words, terms])


def agreed_terms(config: Config) -> bytes:
    """The settings that say which sums are released, and how a client's update enters them.

    They have to be the same at sites and keepers, which make them once for a run.
    """
    aggregation = config.aggregation
    terms: list[Any] = [
        config.secure.model_dump(mode="json", exclude={"wait_seconds"}),
        config.privacy.clients.model_dump(mode="json"),
        config.buffer_size,
        [aggregation.strategy, aggregation.weight_by_examples, aggregation.staleness.model_dump(mode="json")],
    ]
    return pack(terms)


@lru_cache(maxsize=8)  # a worker encrypts to the same three keys in each job
def _public_key(public: bytes) -> MLKEM768X25519PublicKey:
    if len(public) != PUBLIC_BYTES:
        raise WireError(f"a keeper's public key has {PUBLIC_BYTES} bytes, not {len(public)}")
    try:
        mlkem = MLKEM768PublicKey.from_public_bytes(public[:MLKEM_PUBLIC])
        return MLKEM768X25519PublicKey(mlkem, X25519PublicKey.from_public_bytes(public[MLKEM_PUBLIC:]))
    except ValueError:
        raise WireError("not a keeper's public key") from None

"""Who is who: Ed25519 keys (RFC 8032), and the files in which they lie.

libsodium signs and verifies, in half the time of OpenSSL; `cryptography` reads and writes the files.

A private key is a PEM file that nobody but its owner may read. A public key is one line, `ed25519 BASE64`; a file of
public keys holds one or more of them, so that a key can be replaced while what the old one signed is on its way.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import nacl.signing
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from nacl.exceptions import BadSignatureError

from fedqueue.errors import ConfigurationError

ALGORITHM = "ed25519"
PUBLIC_BYTES = 32
MAX_FILE = 64 * 1024  # bytes

T = TypeVar("T")


@dataclass(frozen=True)
class PublicKey:
    """`id` is the start of the key's SHA-256: a name for logs and for choosing among several, not a proof."""

    id: str
    raw: bytes

    @classmethod
    def from_raw(cls, raw: bytes) -> PublicKey:
        return cls(hashlib.sha256(raw).hexdigest()[:16], raw)

    def holds(self, signature: bytes, message: bytes) -> bool:
        """Whether this key's owner signed `message`."""
        try:
            nacl.signing.VerifyKey(self.raw).verify(message, signature)
        except (BadSignatureError, ValueError):
            return False
        return True

    def line(self) -> str:
        return f"{ALGORITHM} {base64.b64encode(self.raw).decode()}\n"


class SigningKey:
    """A private key. It is shown nowhere: neither repr nor an error holds any of it."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public = PublicKey.from_raw(key.public_key().public_bytes_raw())
        self._signer = nacl.signing.SigningKey(key.private_bytes_raw())

    @classmethod
    def generate(cls) -> SigningKey:
        return cls(Ed25519PrivateKey.generate())

    def sign(self, message: bytes) -> bytes:
        """64 bytes; the same message gives the same signature."""
        return self._signer.sign(message).signature

    def save(self, path: Path) -> None:
        """Write it to `path`, mode 0600, in one step; a file that is there is replaced."""
        write_private(path, self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def read_signing_key(path: Path, setting: str = "security.keys") -> SigningKey:
    """The private key in `path`; raises ConfigurationError where it is none, or others may read it."""
    try:
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise ConfigurationError(
                setting, str(path), "others may read this private key: chmod 600 it, or replace it"
            )
        key = load_pem_private_key(path.read_bytes(), None)
    except OSError as error:
        accepted = f"no private key can be read there ({error.strerror}); `fedqueue enroll` makes one"
        raise ConfigurationError(setting, str(path), accepted) from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ConfigurationError(setting, str(path), "is no unencrypted private key in PEM form") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigurationError(setting, str(path), "is no Ed25519 key")
    return SigningKey(key)


def read_public_keys(path: Path, setting: str = "security.keys") -> list[PublicKey]:
    """The public keys in `path`, the newest first; raises ConfigurationError where a line is none."""
    try:
        text = path.read_bytes()[:MAX_FILE].decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(setting, str(path), f"no public key can be read there: {error}") from None
    return [parse_public_key(line, str(path), setting) for line in text.splitlines() if line.strip()]


class KeyFile(Generic[T]):
    """The keys in a file, read anew when it has changed: they can be replaced while a process goes on."""

    def __init__(self, path: Path, read: Callable[[Path], T]) -> None:
        """Raises what `read` raises."""
        self._path, self._read = path, read
        self._name = str(path)  # of which a stat takes a quarter of the time: it is asked for with each message
        self._stamp, self._keys = self._seen(), read(path)

    @property
    def keys(self) -> T:
        """What is there now, or was there last: a file that cannot be read may be one that is being replaced."""
        stamp = self._seen()
        if stamp and stamp != self._stamp:
            with contextlib.suppress(OSError, ConfigurationError):
                self._keys = self._read(self._path) or self._keys
                self._stamp = stamp
        return self._keys

    def exists(self) -> bool:
        return bool(self._seen())

    def _seen(self) -> tuple[int, int, int] | None:
        try:
            at = os.stat(self._name)
        except OSError:
            return None
        return at.st_mtime_ns, at.st_size, at.st_ino


def parse_public_key(line: str, where: str, setting: str = "security.keys") -> PublicKey:
    """The key in a line `ed25519 BASE64`; raises ConfigurationError."""
    algorithm, _, encoded = line.strip().partition(" ")
    try:
        raw = base64.b64decode(encoded, validate=True)
    except ValueError:  # of binascii, and of text that is not ASCII
        raw = b""
    if algorithm != ALGORITHM or len(raw) != PUBLIC_BYTES:
        raise ConfigurationError(setting, where, f"expected lines `{ALGORITHM} BASE64` of {PUBLIC_BYTES}-byte keys")
    return PublicKey.from_raw(raw)


def write_public_keys(path: Path, keys: Iterable[PublicKey]) -> None:
    """Replace `path` by one line per key, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.write_text("".join(key.line() for key in keys), encoding="utf-8")
    new.replace(path)


def write_private(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace `path` in one step by a file that nobody could ever read but by `mode`; folders on the way get 0700."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        os.fchmod(file.fileno(), mode)  # whatever the umask
        file.write(data)
    new.replace(path)

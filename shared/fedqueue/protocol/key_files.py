"""Ed25519 keys (RFC 8032), and the files that contain them.

libsodium signs and verifies, in half the time of OpenSSL; `cryptography` reads and writes the files.

A private key is a PEM file that only its owner may read. A public key is one line, `ed25519 BASE64`. A file of public
keys contains one or more of them, so that messages signed with the previous key stay valid after a rotation.
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
COORDINATOR = "coordinator"  # reserved: no client has this name, so its files may be in the same folder as a site's
COORDINATOR_KEY = f"{COORDINATOR}.key"
COORDINATOR_PUBLIC = f"{COORDINATOR}.pub"
KEY_SUFFIX, PUBLIC_SUFFIX = ".key", ".pub"
CLIENTS, KEEPERS, REVOKED = "clients", "keepers", "revoked"  # folders of public keys, in the coordinator's key folder
MAX_FILE = 64 * 1024  # bytes

T = TypeVar("T")


@dataclass(frozen=True)
class PublicKey:
    """A public key. Its `id`, the start of its SHA-256, names it in logs and selects it among several keys."""

    id: str
    raw: bytes

    @classmethod
    def from_raw(cls, raw: bytes) -> PublicKey:
        """The key with these 32 bytes."""
        return cls(hashlib.sha256(raw).hexdigest()[:16], raw)

    def verifies(self, signature: bytes, message: bytes) -> bool:
        """Whether `signature` is the key owner's signature of `message`."""
        try:
            nacl.signing.VerifyKey(self.raw).verify(message, signature)
        except (BadSignatureError, ValueError):
            return False
        return True

    def line(self) -> str:
        """The key as a line of a file of public keys, with its line break."""
        return f"{ALGORITHM} {base64.b64encode(self.raw).decode()}\n"


class SigningKey:
    """A private key. Neither its repr nor any error contains a part of it."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public = PublicKey.from_raw(key.public_key().public_bytes_raw())
        self._signer = nacl.signing.SigningKey(key.private_bytes_raw())

    @classmethod
    def generate(cls) -> SigningKey:
        """A new random key."""
        return cls(Ed25519PrivateKey.generate())

    def sign(self, message: bytes) -> bytes:
        """The signature of `message`, 64 bytes; it is deterministic."""
        return self._signer.sign(message).signature

    def save(self, path: Path) -> None:
        """Write the key to `path`, mode 0600, atomically; an existing file is replaced."""
        write_private(path, self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def read_signing_key(path: Path, setting: str = "security.keys") -> SigningKey:
    """The private key in `path`; raises ConfigurationError if the file is invalid, or readable by others."""
    try:
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise ConfigurationError(
                setting, str(path), "others may read this private key", "chmod 600 it, or replace it"
            )
        key = load_pem_private_key(path.read_bytes(), None)
    except OSError as error:
        problem = f"no private key can be read there ({error.strerror})"
        raise ConfigurationError(setting, str(path), problem, "`fedqueue enroll` makes one") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ConfigurationError(
            setting, str(path), "not an unencrypted private key in PEM form", "`fedqueue enroll` makes one"
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigurationError(setting, str(path), "not an Ed25519 key", "`fedqueue enroll` makes one")
    return SigningKey(key)


def read_public_keys(path: Path, setting: str = "security.keys") -> list[PublicKey]:
    """The public keys in `path`, the newest first; raises ConfigurationError for an invalid line."""
    try:
        text = path.read_bytes()[:MAX_FILE].decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(setting, str(path), f"no public key can be read there: {error}") from None
    return [parse_public_key(line, str(path), setting) for line in text.splitlines() if line.strip()]


def read_trusted_keys(path: Path, setting: str = "security.keys") -> list[PublicKey]:
    """The public keys in `path`; raises ConfigurationError as `read_public_keys` and `require_safe`."""
    require_safe(path, setting)
    return read_public_keys(path, setting)


class KeyFile(Generic[T]):
    """The keys in a file, which is read again after each change: keys can be rotated without a restart."""

    def __init__(self, path: Path, read: Callable[[Path], T]) -> None:
        """Read the file with `read`; raises what `read` raises."""
        self._path, self._read = path, read
        self._name = str(path)  # stat of a string takes a quarter of the time, and each message needs one
        self._stamp, self._keys = self._seen(), read(path)

    @property
    def keys(self) -> T:
        """The file's present keys; if it cannot be read, perhaps because it is being replaced, the last ones."""
        stamp = self._seen()
        if stamp and stamp != self._stamp:
            with contextlib.suppress(OSError, ConfigurationError):
                self._keys = self._read(self._path) or self._keys
                self._stamp = stamp
        return self._keys

    def exists(self) -> bool:
        """Whether the file is there now."""
        return bool(self._seen())

    def _seen(self) -> tuple[int, int, int] | None:
        try:
            status = os.stat(self._name)
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino


def parse_public_key(line: str, where: str, setting: str = "security.keys") -> PublicKey:
    """The key in a line `ed25519 BASE64`; raises ConfigurationError, which names `where`."""
    algorithm, _, encoded = line.strip().partition(" ")
    try:
        raw = base64.b64decode(encoded, validate=True)
    except ValueError:  # also binascii.Error, and non-ASCII text
        raw = b""
    if algorithm != ALGORITHM or len(raw) != PUBLIC_BYTES:
        raise ConfigurationError(
            setting, where, "not a public key", f"write lines `{ALGORITHM} BASE64` of {PUBLIC_BYTES}-byte keys"
        )
    return PublicKey.from_raw(raw)


def require_safe(path: Path, setting: str = "security.keys") -> None:
    """Raise ConfigurationError if any user of this machine may write the file `path` of public keys, or replace it.

    Such a user could sign in another's name. A folder with the sticky bit is safe: nobody else's file can be replaced
    there. A missing path is safe.
    """
    for place in (path, path.parent):
        with contextlib.suppress(OSError):
            mode = place.stat().st_mode
            if mode & stat.S_IWOTH and not (stat.S_ISDIR(mode) and mode & stat.S_ISVTX):
                problem = "any user of this machine may write there, and so replace a public key"
                raise ConfigurationError(setting, str(place), problem, f"chmod go-w {place}, then compare its keys")


def write_public_keys(path: Path, keys: Iterable[PublicKey]) -> None:
    """Replace `path` atomically by a file with one line per key, mode 0644; missing folders get mode 0755."""
    write_private(path, "".join(key.line() for key in keys).encode(), 0o644, folder_mode=0o755)


def write_private(path: Path, data: bytes, mode: int = 0o600, folder_mode: int = 0o700) -> None:
    """Replace `path` atomically by a file that has `mode` from its creation on; missing folders get `folder_mode`.

    Both modes are independent of the umask.
    """
    make_folder(path.parent, folder_mode)
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        os.fchmod(file.fileno(), mode)  # regardless of the umask
        file.write(data)
    new.replace(path)


def make_folder(folder: Path, mode: int) -> None:
    """Make a folder, and missing ones above it, with `mode`, regardless of the umask."""
    if folder.is_dir():
        return
    make_folder(folder.parent, mode)
    folder.mkdir(exist_ok=True, mode=mode)
    folder.chmod(mode)

"""A keeper's file for one run instance: its private key, the secret of its dithers and noise, and what it has released.

Key and log are one SQLite file. A keeper that loses its log loses its key too: no seed is released a second time.
The file must never be restored from a copy, which would have the key and an older log.

A commit is on disk before it returns. SQLite flushes the file, then clears the head of the rollback journal and flushes
that, because a journal that came back after a power failure would undo the commit. (It deletes the journal only where
it gives up the lock.) A write-ahead log would keep releases in a second file, and is not used.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedqueue.errors import ConfigurationError
from fedqueue.protocol.key_files import make_folder
from fedqueue.protocol.signed_envelope import digest_of
from fedqueue.secure.keeper import Released
from fedqueue.secure.masks import new_seed
from fedqueue.secure.seed_envelope import KeeperPrivateKey

STATE = "--state"
_SCHEMA = """
CREATE TABLE keys (id INTEGER PRIMARY KEY CHECK (id = 0), private BLOB NOT NULL, secret BLOB NOT NULL);
CREATE TABLE cohorts (id TEXT PRIMARY KEY, term INTEGER NOT NULL, version INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE seeds (digest TEXT PRIMARY KEY, version INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE models (base INTEGER PRIMARY KEY, digest TEXT NOT NULL);
CREATE TABLE accounts (client TEXT PRIMARY KEY, squares INTEGER NOT NULL) WITHOUT ROWID;
"""
_SUFFIX = ".sqlite"


class ReleaseLog:
    """The open file; no other process can open it meanwhile."""

    def __init__(self, path: Path) -> None:
        """Open the file, or create it with a new key and secret.

        Raises ConfigurationError if it is in use, damaged, or cannot be written.
        """
        self.path = path
        try:
            make_folder(path.parent, 0o700)
            with contextlib.suppress(FileExistsError):
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
            self._database = self._open()
            private, secret = self._keys()
        except sqlite3.OperationalError as error:
            in_use = "locked" in str(error)
            problem = "another keeper process uses this file" if in_use else f"cannot be used ({error})"
            raise ConfigurationError(
                STATE, str(path), problem, "end that process" if in_use else "free space, or name another folder"
            ) from None
        except (sqlite3.DatabaseError, ValueError) as error:
            raise ConfigurationError(
                STATE, str(path), f"the keeper's file is damaged ({error})", "move it away and start again: updates "
                "that were masked for its key end without being merged"
            ) from None  # fmt: skip
        except OSError as error:
            problem = f"the keeper's file cannot be written ({error.strerror})"
            raise ConfigurationError(STATE, str(path), problem, "name a folder of this keeper's own") from None
        self.key, self.secret = KeeperPrivateKey.from_bytes(private), secret

    def _open(self) -> sqlite3.Connection:
        database = sqlite3.connect(self.path, timeout=0, isolation_level=None)
        database.execute("PRAGMA locking_mode = EXCLUSIVE")
        database.execute("PRAGMA journal_mode = DELETE")
        database.execute("PRAGMA synchronous = FULL")
        return database

    def _keys(self) -> tuple[bytes, bytes]:
        with self._transaction():
            if not self._database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                for statement in _SCHEMA.split(";"):
                    self._database.execute(statement)
                keys = KeeperPrivateKey.generate().to_bytes(), new_seed()
                self._database.execute("INSERT INTO keys VALUES (0, ?, ?)", keys)
        _flush(self.path.parent)
        row: tuple[bytes, bytes] | None = self._database.execute("SELECT private, secret FROM keys").fetchone()
        if row is None:
            raise ValueError("it has no key")
        return row

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN EXCLUSIVE")
        try:
            yield
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")

    def close(self) -> None:
        """Close the file, and let another process open it."""
        self._database.close()

    def delete(self) -> None:
        """Delete the file, and with it the key: seeds that were encrypted to it can never be opened again."""
        self.close()
        _delete(self.path)

    # KeeperLog

    def record(self, released: Released) -> None:
        """Remember a release; it is on disk once this returns."""
        with self._transaction():
            self._database.execute(
                "INSERT INTO cohorts VALUES (?, ?, ?)", (released.cohort, released.term, released.version)
            )
            self._database.executemany(
                "INSERT INTO seeds VALUES (?, ?)", [(seed, released.version) for seed in released.seeds]
            )
            self._database.executemany("INSERT OR IGNORE INTO models VALUES (?, ?)", released.models)
            self._database.executemany(
                "INSERT INTO accounts VALUES (?, ?) "
                "ON CONFLICT (client) DO UPDATE SET squares = squares + excluded.squares",
                [(client, load**2) for client, load in released.loads],
            )

    def has(self, cohort: str) -> bool:
        """Whether the cohort of this id was released."""
        return self._database.execute("SELECT 1 FROM cohorts WHERE id = ?", (cohort,)).fetchone() is not None

    def spent(self, seeds: Sequence[str]) -> dict[str, int]:
        """Those of the digests of seeds that are in a released cohort, with its version."""
        rows = (
            self._database.execute("SELECT digest, version FROM seeds WHERE digest = ?", (seed,)).fetchone()
            for seed in seeds
        )
        return dict(row for row in rows if row is not None)

    def model(self, base: int) -> str:
        """The digest of the model of a base version that was in a released cohort; empty for any other."""
        row = self._database.execute("SELECT digest FROM models WHERE base = ?", (base,)).fetchone()
        return str(row[0]) if row else ""

    def account(self, client: str) -> int:
        """Σ ℓ² over the loads of the client in released cohorts."""
        row = self._database.execute("SELECT squares FROM accounts WHERE client = ?", (client,)).fetchone()
        return int(row[0]) if row else 0

    def newest_version(self, term: int) -> int:
        """The largest version of a cohort that was released in this term of the coordinator; -1 without any."""
        row = self._database.execute("SELECT max(version) FROM cohorts WHERE term = ?", (term,)).fetchone()
        return -1 if row[0] is None else int(row[0])


def log_path(state: Path, keeper: str, run: str, instance: str) -> Path:
    """The file of a run instance, whose text the coordinator chooses: the name has its digest."""
    return state / keeper / f"{run}.{digest_of(instance.encode())[:16]}{_SUFFIX}"


def delete_former_logs(state: Path, keeper: str, run: str, instance: str = "") -> None:
    """Delete the keeper's files of other instances of the run; of all of them without `instance`."""
    name = re.compile(rf"{re.escape(run)}\.[0-9a-f]{{16}}{re.escape(_SUFFIX)}")
    kept = log_path(state, keeper, run, instance) if instance else None
    for path in (state / keeper).glob(f"*{_SUFFIX}"):
        if name.fullmatch(path.name) and path != kept:
            _delete(path)


def _delete(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.with_name(f"{path.name}-journal").unlink(missing_ok=True)  # a journal of a process that died
    _flush(path.parent)


def _flush(folder: Path) -> None:
    """Let the folder's entries survive a power failure."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)

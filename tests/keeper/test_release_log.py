"""A keeper's file has its key and its releases together, and no crash takes back what was released."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fedqueue.errors import ConfigurationError
from fedqueue.secure.keeper import MemoryLog, Released
from fedqueue_keeper.release_log import ReleaseLog, delete_former_logs, log_path

SEEDS = tuple(f"{i:064d}" for i in range(8))
FIRST = Released("a" * 64, 1, 5, SEEDS[:4], ((4, "m" * 64), (5, "n" * 64)), (("a", 8), ("b", 3)))
SECOND = Released("b" * 64, 1, 6, SEEDS[4:6], ((5, "n" * 64), (6, "o" * 64)), (("a", 2), ("c", 1)))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return log_path(tmp_path / "state", "k0", "run", "i" * 32)


def answers(log: ReleaseLog | MemoryLog) -> list[object]:
    """All that a keeper asks of its log."""
    return [
        [log.has(name * 64) for name in "abc"],
        log.spent(SEEDS),
        log.spent([]),
        [log.model(base) for base in range(8)],
        [log.newest_version(term) for term in range(3)],
        [log.account(client) for client in "abcd"],
    ]


def test_log_on_disk_answers_as_one_in_memory(path: Path) -> None:
    on_disk, in_memory = ReleaseLog(path), MemoryLog()
    assert answers(on_disk) == answers(in_memory)
    for released in (FIRST, SECOND):
        on_disk.record(released)
        in_memory.record(released)
        assert answers(on_disk) == answers(in_memory)
    on_disk.close()


def test_log_and_key_survive_a_restart(path: Path) -> None:
    log = ReleaseLog(path)
    log.record(FIRST)
    before = (log.key.to_bytes(), log.secret, answers(log))
    log.close()
    again = ReleaseLog(path)
    assert (again.key.to_bytes(), again.secret, answers(again)) == before
    again.close()


def test_each_instance_has_a_key_and_a_secret_of_its_own(tmp_path: Path) -> None:
    logs = [ReleaseLog(log_path(tmp_path, "k0", "run", instance)) for instance in ("i" * 32, "j" * 32)]
    assert len({log.key.id for log in logs}) == len({log.secret for log in logs}) == 2
    for log in logs:
        log.close()


def test_seed_cannot_be_recorded_twice(path: Path) -> None:
    log = ReleaseLog(path)
    log.record(FIRST)
    with pytest.raises(sqlite3.IntegrityError):
        log.record(Released("c" * 64, 1, 7, SEEDS[3:7], ()))
    assert answers(log)[:2] == [[True, False, False], dict.fromkeys(SEEDS[:4], 5)]
    log.close()


def test_only_the_owner_can_read_it(path: Path) -> None:
    former = os.umask(0)
    try:
        log = ReleaseLog(path)
    finally:
        os.umask(former)
    log.record(FIRST)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == stat.S_IMODE(path.parent.parent.stat().st_mode) == 0o700
    log.close()


def test_key_and_log_are_one_file(path: Path) -> None:
    log = ReleaseLog(path)
    log.record(FIRST)
    journal = path.with_name(f"{path.name}-journal")
    assert set(path.parent.iterdir()) == {path, journal}
    assert journal.read_bytes()[:28] == bytes(28)  # void: it undoes nothing
    copy = path.with_name("copy.sqlite")
    shutil.copy(path, copy)
    log.close()
    assert set(path.parent.iterdir()) == {path, copy}
    alone = ReleaseLog(copy)
    assert answers(alone)[1] == dict.fromkeys(SEEDS[:4], 5)
    alone.close()


def test_second_process_cannot_open_it(path: Path) -> None:
    log = ReleaseLog(path)
    with pytest.raises(ConfigurationError, match="another keeper process uses this file; end that process"):
        ReleaseLog(path)
    log.close()
    ReleaseLog(path).close()


def test_deleted_file_takes_the_key_with_it(path: Path) -> None:
    log = ReleaseLog(path)
    key = log.key.id
    log.delete()
    assert list(path.parent.iterdir()) == []
    again = ReleaseLog(path)
    assert again.key.id != key
    again.close()


@pytest.mark.parametrize("damage", [b"no database at all", b"SQLite format 3\0" + bytes(2000)])
def test_damaged_file_is_named(path: Path, damage: bytes) -> None:
    path.parent.mkdir(parents=True)
    path.write_bytes(damage)
    with pytest.raises(ConfigurationError, match=r"the keeper's file is damaged .*; move it away and start again"):
        ReleaseLog(path)


def test_file_without_a_key_is_damaged(path: Path) -> None:
    ReleaseLog(path).close()
    database = sqlite3.connect(path)
    database.execute("DELETE FROM keys")
    database.commit()
    database.close()
    with pytest.raises(ConfigurationError, match="it has no key"):
        ReleaseLog(path)


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    with pytest.raises(ConfigurationError, match="--state"):
        ReleaseLog(log_path(tmp_path / "state", "k0", "run", "i" * 32))


def test_commit_is_flushed_before_it_returns(path: Path) -> None:
    log = ReleaseLog(path)
    settings = {name: log._database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("synchronous", "journal_mode")}
    assert settings == {"synchronous": 2, "journal_mode": "delete"}  # FULL
    log.close()


def test_files_of_former_instances_are_deleted(tmp_path: Path) -> None:
    places = [("k0", "run", "i" * 32), ("k0", "run", "j" * 32), ("k0", "run-2", "i" * 32), ("k1", "run", "i" * 32)]
    paths = [log_path(tmp_path, *place) for place in places]
    for path in paths:
        ReleaseLog(path).close()
    delete_former_logs(tmp_path, "k0", "run", "j" * 32)
    assert [path.exists() for path in paths] == [False, True, True, True]
    delete_former_logs(tmp_path, "k0", "run")
    assert [path.exists() for path in paths] == [False, False, True, True]


def test_instance_cannot_name_a_place_elsewhere(tmp_path: Path) -> None:
    path = log_path(tmp_path, "k0", "run", "../../../elsewhere")
    assert path.parent == tmp_path / "k0"


WRITER = """
import os, signal, sys
from pathlib import Path
from fedqueue.secure.keeper import Released
from fedqueue_keeper.release_log import ReleaseLog

path, at = Path(sys.argv[1]), int(sys.argv[2])
log = ReleaseLog(path)
print(log.key.id, flush=True)
statements = 0

def trace(statement):
    global statements
    statements += 1
    if statements == at:
        os.kill(os.getpid(), signal.SIGKILL)

log._database.set_trace_callback(trace)
for i in range(4):
    seeds = tuple(f"{i}-{j}" for j in range(3))
    log.record(Released(f"cohort-{i}", 1, i, seeds, ((i, "m"),)))
    print(i, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("at", range(1, 33, 3))
def test_killed_writer_leaves_all_of_a_release_or_nothing(path: Path, at: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WRITER, str(path), str(at)], capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    key, *acknowledged = done.stdout.split()
    log = ReleaseLog(path)
    assert log.key.id == key
    there = [i for i in range(4) if log.has(f"cohort-{i}")]
    assert there[: len(acknowledged)] == [int(i) for i in acknowledged]  # nothing acknowledged is lost
    assert len(there) <= len(acknowledged) + 1
    for i in range(4):
        seeds = [f"{i}-{j}" for j in range(3)]
        assert len(log.spent(seeds)) == (3 if i in there else 0)
        assert log.model(i) == ("m" if i in there else "")
    log.close()

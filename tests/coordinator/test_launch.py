"""A run's folder: whose files are in it, how a run is resumed, and when results replace former ones."""

from __future__ import annotations

import json
import os
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedqueue.errors import ConfigurationError, RunExists, ServerUnavailable, StoreError
from fedqueue.protocol.key_files import write_private
from fedqueue_coordinator.core.run_summary import RunResult
from fedqueue_coordinator.operator import embedded_server
from fedqueue_coordinator.operator.embedded_server import make_socket_folder, remove_left_socket_folders
from fedqueue_coordinator.operator.results import RESULT_FILENAMES, deliver_results
from fedqueue_coordinator.operator.run_folder import Launch, RunFolder, read_launch, require_config
from tests.support.builders import make_config, make_frame

LAUNCH = Launch(Path("/somewhere/federation.toml"), ["training.local_epochs=2"], 3, run="toy")
OTHER = replace(LAUNCH, config=Path("/elsewhere/federation.toml"))
LEADER = replace(LAUNCH, command="coordinator")


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "runs" / "toy")


def begin(folder: RunFolder, launch: Launch = LAUNCH, version: int = 0, **how: bool) -> None:
    """Begin a run that dies at `version`."""
    with folder.opened(launch, **how):
        folder.note(version, 0.0)


def finish(folder: RunFolder, text: str, launch: Launch = LAUNCH, complete: bool = True, **how: bool) -> Path:
    """Run to the end, with results that contain `text`."""
    with folder.opened(launch, **how):
        for name in RESULT_FILENAMES:
            (folder.unfinished / name).write_text(json.dumps({"complete": complete, "text": text}))
        where = folder.publish((*RESULT_FILENAMES, "replay"), complete)
        if complete:
            folder.discard()
        return where


def texts(folder: Path) -> set[str]:
    return {json.loads((folder / name).read_text())["text"] for name in RESULT_FILENAMES if (folder / name).exists()}


# Folders that are not a run's


@pytest.mark.parametrize("name", ["keys/coordinator.key", "logs/mine.log", "egress/old.jsonl", "redis/x.aof", "a.txt"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_folder_with_files_of_others_is_refused_unchanged(folder: RunFolder, name: str, overwrite: bool) -> None:
    (folder.path / name).parent.mkdir(parents=True)
    (folder.path / name).write_text("mine")
    with pytest.raises(ConfigurationError, match=f"no run of fedqueue made.*{name.partition('/')[0]}") as error:
        begin(folder, overwrite=overwrite)
    assert error.value.value == str(folder.path)
    assert "--output" in error.value.hint
    assert [p for p in folder.path.rglob("*") if p.is_file()] == [folder.path / name]


def test_hidden_files_are_no_obstacle(folder: RunFolder) -> None:
    folder.path.mkdir(parents=True)
    (folder.path / ".gitignore").write_text("*")
    (folder.path / "lost+found").mkdir()
    assert finish(folder, "new") == folder.path


def test_foreign_files_in_a_runs_folder_stay(folder: RunFolder) -> None:
    finish(folder, "old")
    mine = [folder.path / name for name in ("keys/coordinator.key", "egress/c.jsonl", "redis/a.aof", "notes.txt")]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    begin(folder, version=3)
    finish(folder, "new", overwrite=True)
    assert texts(folder.path) == {"new"}
    assert {path.read_text() for path in mine} == {"mine"}


@pytest.mark.parametrize("deep", [Path("runs/toy"), Path("runs/toy/deeper")])
def test_folder_that_cannot_be_made_is_one_error(tmp_path: Path, deep: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "toy").write_text("a file in the way")
    with pytest.raises(ConfigurationError, match=r"--output.*cannot be written \((File exists|Not a directory)\)"):
        begin(RunFolder(tmp_path / deep))


def test_folder_that_became_read_only_is_one_error(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(folder, LEADER, version=1)

    def refuse(*arguments: Any, **how: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "write_text", refuse)
    for resume in (True, False):
        with pytest.raises(ConfigurationError, match="Read-only file system"):
            begin(folder, LEADER, shared=True, resume=resume)


# Results


def test_former_results_stay_until_new_ones_are_complete(folder: RunFolder) -> None:
    finish(folder, "old")
    begin(folder)
    assert texts(folder.path) == {"old"}
    assert finish(folder, "failed", complete=False) == folder.unfinished
    assert texts(folder.path) == {"old"}
    assert texts(folder.unfinished) == {"failed"}
    assert finish(folder, "new") == folder.path
    assert texts(folder.path) == {"new"}
    assert not folder.unfinished.exists()


def test_results_of_a_failed_run_are_replaced(folder: RunFolder) -> None:
    assert finish(folder, "interrupted", complete=False) == folder.path
    assert finish(folder, "failed", complete=False) == folder.path
    assert texts(folder.path) == {"failed"}


def test_former_replay_and_report_go_with_their_results(folder: RunFolder) -> None:
    finish(folder, "old")
    (folder.path / "replay").mkdir()
    (folder.path / "replay" / "head.bin").write_bytes(b"old")
    with folder.opened(LAUNCH):
        (folder.unfinished / "summary.json").write_text('{"complete": true, "text": "new"}')
        folder.publish((*RESULT_FILENAMES, "replay"), complete=True)
        folder.discard()
    assert texts(folder.path) == {"new"}
    assert not (folder.path / "replay").exists()


def test_results_of_another_configuration_are_refused(folder: RunFolder) -> None:
    finish(folder, "old")
    with pytest.raises(ConfigurationError, match=r"results of /somewhere/fed.*--overwrite"):
        finish(folder, "new", OTHER)
    compared = RunFolder(folder.path.parent / "compared")
    finish(compared, "table", replace(LAUNCH, command="compare"))
    with pytest.raises(ConfigurationError, match="results of `fedqueue compare"):
        finish(compared, "new")
    assert texts(folder.path) == {"old"}
    finish(folder, "new", OTHER, overwrite=True)
    assert texts(folder.path) == {"new"}


# Unfinished runs


def test_unfinished_run_is_refused_resumed_or_overwritten(folder: RunFolder) -> None:
    begin(folder, version=642)
    (folder.redis / "aof").mkdir(parents=True)
    with pytest.raises(ConfigurationError, match=r"was interrupted at version 642; .*--resume .*, or .* --overwrite"):
        begin(folder)
    with folder.opened(LAUNCH, resume=True):
        assert (folder.redis / "aof").exists()
    begin(folder, overwrite=True)
    assert not folder.redis.exists()


def test_run_that_died_before_version_1_is_no_obstacle(folder: RunFolder) -> None:
    with folder.opened(LAUNCH):
        folder.redis.mkdir()
    begin(folder)
    assert not folder.redis.exists()


def test_run_that_could_not_begin_leaves_nothing(folder: RunFolder) -> None:
    begin(folder)
    assert not folder.path.exists()
    finish(folder, "old")
    begin(folder)
    assert not folder.unfinished.exists()


def test_failed_run_says_so(folder: RunFolder) -> None:
    begin(folder, version=7)
    folder.note_end(7, "failed")
    with pytest.raises(ConfigurationError, match="holds a run that failed at version 7"):
        begin(folder)


def test_version_is_noted_at_most_once_a_second(folder: RunFolder) -> None:
    with folder.opened(LAUNCH):
        for version, now, noted in ((0, 0.0, 0), (1, 0.1, 1), (2, 0.2, 1), (9, 1.2, 9), (10, 1.3, 9)):
            folder.note(version, now)
            assert folder.version() == noted


def test_folder_in_use_is_refused_to_a_second_run(folder: RunFolder) -> None:
    with folder.opened(LAUNCH):
        choices: list[dict[str, Any]] = [{}, {"overwrite": True}, {"resume": True}]
        for how in choices:
            with pytest.raises(RunExists, match=r"'toy' is still active in .*toy; wait"):
                begin(folder, **how)
        with pytest.raises(RunExists):
            begin(folder, LEADER, shared=True)
    begin(folder)


def test_leader_and_standby_share_a_folder(folder: RunFolder) -> None:
    with folder.opened(LEADER, shared=True):
        folder.note(5, 0.0)
        checkpoint = folder.unfinished / "checkpoint.safetensors"
        checkpoint.touch()
        begin(folder, LEADER, shared=True)
        assert checkpoint.exists()
        with pytest.raises(RunExists):
            begin(folder)
    with pytest.raises(ConfigurationError, match=r"`fedqueue coordinator /somewhere/federation.toml --output"):
        begin(folder)
    with pytest.raises(ConfigurationError, match="--overwrite"):
        begin(folder, replace(LEADER, run="other"), shared=True)


# Resuming


def test_unfinished_run_is_resumed_with_its_settings(folder: RunFolder) -> None:
    begin(folder, version=1)
    launch = read_launch(folder.path, ["stop.versions=9", "training.local_epochs = 4"])
    assert launch == replace(LAUNCH, overrides=["training.local_epochs = 4", "stop.versions=9"])


def test_settings_are_kept_only_once_the_run_continues(folder: RunFolder) -> None:
    begin(folder, version=3)
    refused = read_launch(folder.path, ["training.learning_rate=0.5"])
    begin(folder, refused, resume=True)
    assert read_launch(folder.path, []) == LAUNCH
    with folder.opened(refused, resume=True):
        folder.continued(refused)
    assert read_launch(folder.path, []) == refused


def test_ended_run_and_other_folders_cannot_be_resumed(folder: RunFolder) -> None:
    folder.path.mkdir(parents=True)
    with pytest.raises(ConfigurationError, match=r"holds no launch\.json"):
        read_launch(folder.path, [])
    begin(folder, LEADER, version=1)
    with pytest.raises(ConfigurationError, match="start `fedqueue coordinator"):
        read_launch(folder.path, [])
    finish(folder, "done", overwrite=True)
    assert folder.launch() == LAUNCH
    with pytest.raises(ConfigurationError, match="has ended"):
        read_launch(folder.path, [])


# Folders of sockets


def test_socket_folder_avoids_a_long_path(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 110)
    long.mkdir()
    made = Path(make_socket_folder([str(long), "/tmp"]))
    assert made.parent == Path("/tmp")
    assert made.stat().st_mode & 0o777 == 0o700
    made.rmdir()
    with pytest.raises(ServerUnavailable, match="set TMPDIR to a folder that can be written, with a path of at most"):
        make_socket_folder([str(long)])


def test_only_dead_private_socket_folders_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(name: str, *files: str, mode: int = 0o700, age: float = 3600) -> Path:
        path: Path = tmp_path / name
        path.mkdir(mode=mode)
        for file in files:
            (path / file).touch()
        os.utime(path, (path.stat().st_mtime - age,) * 2)
        return path

    live, dead = make("fedqueue-redis-live"), make("fedqueue-redis-dead")
    sockets = []
    for path in (live, dead):
        sockets.append(socket.socket(socket.AF_UNIX))
        monkeypatch.chdir(path)
        sockets[-1].bind("redis.sock")
        os.utime(path, (path.stat().st_mtime - 3600,) * 2)
    sockets[1].close()
    kept = {
        live,
        make("fedqueue-redis-new", age=0),
        make("fedqueue-redis-open", mode=0o755),
        make("fedqueue-redis-file", "redis.sock"),
        make("fedqueue-redis-more", "notes.txt"),
        make("other"),
    }
    make("fedqueue-redis-empty")
    monkeypatch.setattr(embedded_server, "answers", lambda url: "live" in url)
    remove_left_socket_folders(tmp_path)
    assert set(tmp_path.iterdir()) == kept
    sockets[0].close()


# A folder that is deleted, moved or damaged meanwhile


def test_deleted_folder_is_made_again_during_the_run(folder: RunFolder) -> None:
    secret = folder.unfinished / "keys" / "a.key"
    with folder.opened(LAUNCH):
        secret.parent.mkdir()
        write_private(secret, b"secret")
        folder.keep(secret)
        folder.note(1, 0.0)
        shutil.rmtree(folder.path)
        assert folder.note(2, 0.5) == ""
        assert "was deleted, and is made again" in folder.note(2, 2.0)
        assert folder.note(2, 4.0) == ""
        assert (secret.read_bytes(), secret.stat().st_mode & 0o777) == (b"secret", 0o600)
        with pytest.raises(RunExists), RunFolder(folder.path).opened(LAUNCH):
            pass
    assert read_or_none(folder) == LAUNCH


def read_or_none(folder: RunFolder) -> Launch | None:
    return Launch.read(folder.unfinished / "launch.json")


def test_folder_deleted_at_the_end_has_results_and_marker(folder: RunFolder) -> None:
    with folder.opened(LAUNCH):
        shutil.rmtree(folder.path)
        assert folder.reclaim()
        (folder.unfinished / "summary.json").write_text(json.dumps({"text": "new"}))
        folder.publish(RESULT_FILENAMES, True)
        folder.discard()
    assert finish(folder, "next") == folder.path  # the marker is there, so the folder is no stranger's


@pytest.mark.parametrize("ended", [False, True])
def test_folder_of_a_second_run_in_its_place_is_left_to_it(folder: RunFolder, ended: bool) -> None:
    second = RunFolder(folder.path)
    with folder.opened(LAUNCH):
        folder.note(1, 0.0)
        shutil.rmtree(folder.path)
        if ended:
            finish(second, "second")
            assert not folder.reclaim()
        else:
            with second.opened(LAUNCH):
                assert "another run has begun in it" in folder.note(2, 2.0)
                assert folder.note(3, 4.0) == ""
                assert not folder.reclaim()
                assert second.version() == 0


@pytest.mark.parametrize("same_number", [False, True], ids=["new", "same"])
def test_first_run_changes_nothing_of_the_second(
    folder: RunFolder, same_number: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system may give a new folder the number of a deleted one."""
    second = RunFolder(folder.path)
    if same_number:
        monkeypatch.setattr(RunFolder, "_found", lambda self: (1, 1))
    with folder.opened(LAUNCH):
        shutil.rmtree(folder.path)
        with second.opened(OTHER):
            second.note(5, 0.0)
            for part in (second.redis, second.keys):
                part.mkdir()
                (part / "file").touch()
            before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
            assert not folder.reclaim()
            assert not folder.is_own()
            folder.continued(LAUNCH)
            folder.note_end(9, "failed")
            folder.discard_server()
            folder.discard()
            assert (folder.version(), folder.interrupted()) == (0, "")
            assert {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()} == before


def test_results_beside_a_second_run_leave_it_alone(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    second, result = RunFolder(folder.path), RunResult(1, make_frame(), "versions: 1 of 1", False, [], {}, 1)
    with folder.opened(LAUNCH):
        shutil.rmtree(folder.path)
        with second.opened(OTHER):
            second.note(5, 0.0)
            where = deliver_results(folder, make_config(), result, checkpoint_saved=True)[1].folder
            assert where is not None
            assert where.parent == tmp_path
            assert second.interrupted() == "was interrupted at version 5"


@pytest.mark.parametrize("command", ["run", "coordinator"])
def test_results_that_no_disk_takes_can_be_had_later(
    folder: RunFolder, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> Any:
        raise OSError("No space left on device")

    monkeypatch.setattr("fedqueue_coordinator.operator.results.write_results", full)
    result = RunResult(1, make_frame(), "versions: 1 of 1", False, [], {}, 1)
    launch = replace(LAUNCH, command=command)
    with folder.opened(launch):
        folder.note(1, 0.0)
        with pytest.raises(StoreError) as caught:
            deliver_results(folder, make_config(), result, checkpoint_saved=False)
    expected = {
        "run": f"run --resume {folder.path}",
        "coordinator": f"coordinator {LAUNCH.config} --output {folder.path}",
    }
    assert f"free space, then `fedqueue {expected[command]}`" in str(caught.value)
    assert RunFolder(folder.path).version() == 1


def test_deleted_folder_of_the_unfinished_run_is_made_again(folder: RunFolder) -> None:
    finish(folder, "old")
    with folder.opened(LAUNCH):
        shutil.rmtree(folder.unfinished)
        assert folder.reclaim()
        assert folder.is_own()


def test_egress_logs_of_a_removed_run_are_no_obstacle(folder: RunFolder) -> None:
    folder.egress.mkdir(parents=True)
    log = folder.egress / "toy-0123456789ab.jsonl"
    log.write_text("{}")
    begin(folder)
    assert log.read_text() == "{}"


def test_crash_between_two_files_leaves_no_mixed_results(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(folder, "old")
    names = [*RESULT_FILENAMES]
    for crash_at in range(len(names)):
        moved: list[Any] = []

        def replace_or_die(self: Any, target: Any, moved: Any = moved, crash_at: Any = crash_at) -> None:
            if target.parent == folder.path and target.name in names:
                if len(moved) == crash_at:
                    raise KeyboardInterrupt
                moved.append(target.name)
            os.replace(self, target)

        with monkeypatch.context() as patched:
            patched.setattr(Path, "replace", replace_or_die)
            with pytest.raises(KeyboardInterrupt):
                finish(folder, "new", overwrite=True)
        assert not folder.has_complete_results()
        assert not (folder.path / "summary.json").exists()


def test_missing_configuration_is_named_with_the_remedy(folder: RunFolder) -> None:
    begin(folder, version=3)
    with pytest.raises(ConfigurationError, match=r"no longer there.*fedqueue run CONFIG.toml --resume"):
        require_config(read_launch(folder.path, []), folder.path)


def test_moved_configuration_is_taken_from_its_new_place(folder: RunFolder, tmp_path: Path) -> None:
    begin(folder, version=3)
    moved = tmp_path / "moved.toml"
    moved.touch()
    assert read_launch(folder.path, [], moved) == replace(LAUNCH, config=moved)


def test_configuration_inside_a_renamed_folder_is_found(folder: RunFolder) -> None:
    begin(folder, replace(LAUNCH, config=folder.path / "launch.toml"), version=3)
    (folder.path / "launch.toml").touch()
    renamed = folder.path.rename(folder.path.with_name("renamed"))
    assert read_launch(renamed, []).config == renamed / "launch.toml"


def test_run_without_version_blocks_no_other_configuration(folder: RunFolder) -> None:
    with folder.opened(LAUNCH):
        (folder.path / "coordinator.log").touch()
    with folder.opened(OTHER):
        assert folder.launch() == OTHER


def test_begun_run_blocks_another_configuration(folder: RunFolder) -> None:
    begin(folder, version=1)
    with pytest.raises(ConfigurationError, match="has the results of"):
        begin(folder, OTHER)

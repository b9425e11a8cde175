"""The folder of a run's results: which files in it are fedqueue's, and when new results replace the former ones.

    DIR/launch.json      how the results were made: the marker of a folder that fedqueue writes to
    DIR/summary.json …   the results
    DIR/logs, egress     appended by each run, never deleted
    DIR/unfinished/      everything of a run that has no complete results yet: its launch.json, the embedded server's
                         append-only file, the keys and privacy accounts of a local run, the checkpoint, and its own
                         results

Results are written to `unfinished` and renamed into place. `unfinished` is deleted after that, and no other file is.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shlex
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from fedqueue.errors import ConfigurationError, RunExists
from fedqueue.protocol.key_files import write_private
from fedqueue_coordinator.operator.embedded_server import SOCKET_PREFIX, answers

LAUNCH_FILENAME = "launch.json"
UNFINISHED = "unfinished"
EGRESS = "egress"
"""The folder of the sites' logs, to which each run adds files and which no command deletes."""
PROGRESS_FILENAME = "progress.json"
_EGRESS_LOG = re.compile(r".+-[0-9a-f]{12}\.jsonl")
URL_FILE = "redis.url"
SUMMARY_FILENAME = "summary.json"
LOG_FILENAME = "coordinator.log"
LAUNCH_CONFIG_FILENAME, SCRIPT_COPY = "launch.toml", "launch_task.py"
"""The configuration, and the copy of the script, of a run that was started from Python."""
INTERRUPT = "interrupted"
"""Why a run ended that was told to end."""
WRITTEN = ".written"
"""An empty file, to try whether the folder can be written."""
NOTE_SECONDS = 1.0
"""Time between two notes of the version that an unfinished run has reached."""


@dataclass(frozen=True)
class CallerWords:
    """The words in which the caller of a run has named the folder, and can name what to do about it."""

    folder: str
    """The option or argument that names the folder; the key of errors about it."""
    other_folder: str
    """How to choose another folder."""
    overwrite: str
    """How to have what the folder holds replaced."""


COMMAND_LINE = CallerWords("--output", "choose another folder with --output DIR", "--overwrite")
PYTHON = CallerWords("folder", "choose another folder with folder=…", "overwrite=True")


@dataclass(frozen=True)
class Launch:
    """How a run, or a comparison, was started."""

    config: Path
    """Absolute path of the configuration file."""
    overrides: Sequence[str]
    """KEY=VALUE texts, in the order given."""
    workers: int = 0
    """Number of worker processes of a local run."""
    command: str = "run"
    """The command of `fedqueue` that writes to the folder; `run` and `simulate` are also functions of the package."""
    run: str = ""
    """The run's name."""
    origin: str = ""
    """What the results are of: the configuration file, or the task of a run that was started from Python."""
    id: str = field(default="", compare=False)
    """A random name of the unfinished run, by which its process finds out that another run has taken the folder."""

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Read a launch.json; None for a file that is missing or is no launch."""
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{**record, "config": Path(record["config"])})
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def write(self, path: Path) -> None:
        """Replace `path` by this launch; raises OSError."""
        replace_text(path, json.dumps({**asdict(self), "config": str(self.config)}, indent=2) + "\n")

    @property
    def what(self) -> str:
        """The configuration file or task, to compare with another launch's."""
        origin = self.origin or str(self.config)
        return f"`fedqueue compare` with {origin}" if self.command == "compare" else origin


def replace_text(path: Path, text: str) -> None:
    """Write a new file and rename it to `path`, so that `path` is always a whole file; raises OSError."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


class RunFolder:
    """A folder of results, by the layout at the top of this module."""

    def __init__(self, path: Path, words: CallerWords = COMMAND_LINE) -> None:
        self.path, self._words = path, words
        self.unfinished = path / UNFINISHED
        self.redis, self.keys = self.unfinished / "redis", self.unfinished / "keys"
        self.privacy = self.unfinished / "privacy"
        self.logs, self.egress, self.url_file = path / "logs", path / EGRESS, path / URL_FILE
        self._noted: tuple[int, float] = (0, float("-inf"))
        self._kept: dict[Path, tuple[bytes, int]] = {}
        self._lock, self._shared = contextlib.ExitStack(), False
        self._inode: tuple[int, int] | None = None
        self._id = ""  # of the run that has opened the folder
        self._lost = False
        self.has_unfinished_run = False
        """Whether the folder, when it was opened, had a run without complete results that is to be continued."""

    # Before a run

    @contextlib.contextmanager
    def opened(
        self, launch: Launch, overwrite: bool = False, resume: bool = False, shared: bool = False
    ) -> Iterator[None]:
        """Make the folder, or take it over from an earlier run, and keep it from other runs meanwhile.

        Results of an earlier run of the same configuration stay until `publish` replaces them. An unfinished run stays
        with `resume`, is deleted with `overwrite`, and is refused otherwise. With `shared`, other processes may lead
        the same run, and an unfinished run of the same name is resumed.

        Raises ConfigurationError for a folder that cannot be written, that holds files and no launch.json, or that
        holds another configuration's results or an unfinished run; RunExists while another process uses the folder.
        """
        unwritable = _Unwritable(self.path, self._words)
        with unwritable:
            self.path.mkdir(parents=True, exist_ok=True)
        self._id = ""
        try:
            with contextlib.ExitStack() as lock:
                lock.enter_context(self.locked(shared))
                if not resume:
                    self._require_own(launch, overwrite, shared)
                keep = resume or (shared and self._same_run(launch) and not overwrite)
                self.has_unfinished_run = keep and self._begun() is not None
                with unwritable:
                    self._begin(launch, keep)
                self._lock, self._shared, self._inode = lock, shared, self._found()
                self._id = begun.id if (begun := self._begun()) else ""
                self.keep(self.unfinished / LAUNCH_FILENAME)
                yield
        finally:
            self._tidy()

    def _tidy(self) -> None:
        """Leave nothing behind of a run that could not begin, unless another process uses the folder too."""
        if not self.is_own():
            return
        with contextlib.suppress(OSError, RunExists, ConfigurationError), self.locked():
            begun = {entry.name for entry in self.unfinished.iterdir()} - {LAUNCH_FILENAME, WRITTEN}
            others = {entry.name for entry in self.path.iterdir()} - {UNFINISHED}
            if not begun and (LAUNCH_FILENAME in others or not others):
                self.discard()
                if not others:
                    self.path.rmdir()

    @contextlib.contextmanager
    def locked(self, shared: bool = False) -> Iterator[None]:
        """Keep other processes from the folder, or with `shared` those that do not share it too; raises RunExists."""
        with _Unwritable(self.path, self._words):
            descriptor = os.open(self.path, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                try:
                    fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise self.in_use() from None
            if self._server_answers():
                raise self.in_use()
            yield
        finally:
            os.close(descriptor)  # releases the lock

    def _server_answers(self) -> bool:
        """Return whether the embedded server of a run that was killed has not ended yet; it ends by itself."""
        if not self.url_file.exists():
            return False
        url = self.url_file.read_text(encoding="utf-8").strip()
        return SOCKET_PREFIX in url and answers(url)

    def in_use(self) -> RunExists:
        """Make the error for a folder that another process writes to."""
        launch = self.launch()
        hint = f"wait for its end or stop it, or {self._words.other_folder}"
        return RunExists((launch and launch.run) or self.path.name, f"is still active in {self.path}", hint)

    def launch(self) -> Launch | None:
        """Return how the unfinished run was started, or else the one with the results; None in any other folder."""
        return self._begun() or Launch.read(self.path / LAUNCH_FILENAME)

    def _begun(self) -> Launch | None:
        return Launch.read(self.unfinished / LAUNCH_FILENAME)

    def _same_run(self, launch: Launch) -> bool:
        begun = self._begun()
        return begun is not None and (begun.command, begun.run) == (launch.command, launch.run)

    def _require_own(self, launch: Launch, overwrite: bool, shared: bool) -> None:
        former = self.launch()
        if former is None:
            if foreign := sorted(entry.name for entry in self.path.iterdir() if not _harmless(entry)):
                named = ", ".join(foreign[:3]) + (", …" if len(foreign) > 3 else "")
                problem = f"has files that no run of fedqueue made ({named})"
                raise ConfigurationError(self._words.folder, str(self.path), problem, self._words.other_folder)
            return
        if overwrite:
            return
        resumed = shared and self._same_run(launch)
        has_results = (self.path / LAUNCH_FILENAME).exists() or bool(self.version())
        if former.what != launch.what and has_results and not resumed:
            raise ConfigurationError(
                self._words.folder,
                str(self.path),
                f"has the results of {former.what}, not of {launch.what}",
                f"{self._words.other_folder}, or replace them with {self._words.overwrite}",
            )
        if (interrupted := self.interrupted()) and not resumed:
            raise ConfigurationError(
                self._words.folder,
                str(self.path),
                f"holds a run that {interrupted}",
                f"continue it with `fedqueue {self.command_to_resume()}`, or start over with {self._words.overwrite}",
            )

    def interrupted(self) -> str:
        """Say how far the unfinished run came and why it ended; empty if it has no version that could be lost."""
        if not (version := self.version()):
            return ""
        return f"{self._progress().get('ended', 'was interrupted')} at version {version}"

    def command_to_resume(self) -> str:
        """Return the command of `fedqueue`, with its arguments, that continues the unfinished run."""
        launch = self.launch()
        if launch and launch.command == "coordinator":
            ended = " --resume" if "ended" in self._progress() else ""
            return f"coordinator {shlex.quote(str(launch.config))} --output {shlex.quote(str(self.path))}{ended}"
        return f"run --resume {shlex.quote(str(self.path))}"

    def how_to_deliver(self) -> str:
        """Say how results that could not be written can be had of a run that has ended."""
        launch = self.launch()
        if launch is None or launch.command not in ("run", "coordinator"):
            return "run it again"
        return f"`fedqueue {self.command_to_resume()}`, which writes them from what is in Redis"

    def version(self) -> int:
        """Return the version that the unfinished run reached, as far as it was noted."""
        version = self._progress().get("version", 0)
        return version if isinstance(version, int) else 0

    def _begin(self, launch: Launch, keep: bool) -> None:
        if not keep:
            self.discard()
        self.unfinished.mkdir(exist_ok=True)
        begun = self._begun()
        if begun is None or not begun.id:
            replace(begun or launch, id=uuid.uuid4().hex).write(self.unfinished / LAUNCH_FILENAME)
        else:
            replace_text(self.unfinished / WRITTEN, "")  # the folder may have become read-only

    # During a run

    def keep(self, *paths: Path) -> None:
        """Remember small files, which `reclaim` writes again with their modes; a path without a file is forgotten."""
        for path in paths:
            self._kept.pop(path, None)
            if path.is_file():
                self._kept[path] = path.read_bytes(), stat.S_IMODE(path.stat().st_mode)

    def is_own(self) -> bool:
        """Return whether the unfinished run in the folder is the one that this object has opened; True if it has none.

        It is not after the folder was deleted, also where another run has begun in a new one.
        """
        return not self._id or ((begun := self._begun()) is not None and begun.id == self._id)

    def reclaim(self) -> bool:
        """Make the opened folder again if it was deleted; returns whether the folder is still this run's.

        It is not where a folder cannot be made, or where another run has begun in a new one.
        """
        same = self._inode is not None and self._found() == self._inode  # a new folder may get the number of a former
        if same and self.is_own():
            return True
        try:
            if not same:
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock.enter_context(self.locked(self._shared))
            if self._begun() is not None or (not same and self.launch() is not None):
                return self._shared and self.is_own()  # made again by a process that shares it
            for path, (data, mode) in self._kept.items():
                write_private(path, data, mode)
        except (OSError, RunExists, ConfigurationError):
            return False
        self._inode = self._found()
        return True

    def _found(self) -> tuple[int, int] | None:
        with contextlib.suppress(OSError):
            status = self.path.stat()
            return status.st_dev, status.st_ino
        return None

    def continued(self, launch: Launch) -> None:
        """Record the settings with which a resumed run has continued, for the next time."""
        with contextlib.suppress(OSError):
            if self.is_own():
                replace(launch, id=self._id).write(self.unfinished / LAUNCH_FILENAME)
                self.keep(self.unfinished / LAUNCH_FILENAME)

    def note(self, version: int, now: float) -> str:
        """Note the version that the run has reached, at most once a second; `now` is in seconds of any clock.

        Returns a message if the folder was deleted meanwhile.
        """
        noted, at = self._noted
        if noted and now < at + NOTE_SECONDS:
            return ""
        self._noted = version, now
        before = self._inode
        own = self.reclaim()
        if own and version != noted:
            self._write_progress({"version": version})
        if self._inode == before and (own or self._lost):
            return ""
        self._lost = not own
        if own:
            return f"{self.path} was deleted, and is made again: the results will be there, the logs so far are lost"
        why = "another run has begun in it" if self.launch() else "cannot be made again"
        return f"{self.path} was deleted and {why}: the results will be in {tempfile.gettempdir()}"

    def note_end(self, version: int, ended: str) -> None:
        """Note the version and how the run ended: "was interrupted" or "failed"; in a folder of this run only."""
        if self.is_own():
            self._write_progress({"version": version, "ended": ended})

    def _write_progress(self, progress: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):  # a full disk: the note is for a message only
            replace_text(self.unfinished / PROGRESS_FILENAME, json.dumps(progress) + "\n")

    def _progress(self) -> dict[str, Any]:
        if not self.is_own():
            return {}
        try:
            progress = json.loads((self.unfinished / PROGRESS_FILENAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return progress if isinstance(progress, dict) else {}

    # After a run

    def publish(self, names: Iterable[str], complete: bool) -> Path:
        """Put the files `names`, written to `unfinished`, in the place of the former ones; returns their folder.

        summary.json, by which commands find results, is deleted first and put in place last: after a crash in between,
        no command takes former results and new ones together.

        Results that are not `complete` do not replace complete ones and stay in `unfinished`. A former file that the
        new results lack is deleted, because it would not belong to them. Raises OSError.
        """
        if not complete and self.has_complete_results():
            return self.unfinished
        (self.path / SUMMARY_FILENAME).unlink(missing_ok=True)
        for name in sorted(names, key=lambda name: name == SUMMARY_FILENAME):
            new, old = self.unfinished / name, self.path / name
            if old.is_dir():
                shutil.rmtree(self.unfinished / f"former-{name}", ignore_errors=True)
                old.replace(self.unfinished / f"former-{name}")
            if new.exists():
                new.replace(old)
            else:
                old.unlink(missing_ok=True)
        launch = Launch.read(self.unfinished / LAUNCH_FILENAME)
        if launch:
            launch.write(self.path / LAUNCH_FILENAME)
        return self.path

    def has_complete_results(self) -> bool:
        """Return whether the folder has the results of a run that came to its end."""
        try:
            summary = json.loads((self.path / SUMMARY_FILENAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return isinstance(summary, dict) and bool(summary.get("complete", True))

    def discard(self) -> None:
        """Delete everything of the run that is not needed once its results are in their place."""
        if self.is_own():
            shutil.rmtree(self.unfinished, ignore_errors=True)

    def discard_server(self) -> None:
        """Delete the append-only file and the keys of a local run, which its checkpoint or its results outlive."""
        for folder in (self.redis, self.keys) if self.is_own() else ():
            shutil.rmtree(folder, ignore_errors=True)


def read_launch(folder: Path, overrides: Sequence[str], config: Path | None = None) -> Launch:
    """Read the launch of the unfinished run in `folder` and append `overrides`.

    `config` is the place where its configuration file is now, or None if the file has stayed. A file that a run from
    Python wrote into `folder` is found there. Raises ConfigurationError if `folder` contains no run, a run that has
    ended, or one of `fedqueue coordinator`.
    """
    unfinished = RunFolder(folder).unfinished
    launch = Launch.read(unfinished / LAUNCH_FILENAME)
    if launch is None:
        if Launch.read(folder / LAUNCH_FILENAME):
            hint = "leave out --resume to run it again from version 0"
            problem = "the run in this folder has ended and cannot be resumed"
            raise ConfigurationError("--resume", str(folder), problem, hint)
        hint = "pass the folder of a run that `fedqueue run` started"
        raise ConfigurationError("--resume", str(folder), f"holds no {LAUNCH_FILENAME} of a run", hint)
    if launch.command != "run":
        hint = f"start `fedqueue {launch.command} {launch.config} --output {folder}` again"
        raise ConfigurationError("--resume", str(folder), f"holds a run of `fedqueue {launch.command}`", hint)
    if config is None and launch.config.name == LAUNCH_CONFIG_FILENAME:
        config = folder / LAUNCH_CONFIG_FILENAME
    launch = replace(launch, config=config.resolve() if config else launch.config)
    by_key = {text.partition("=")[0].strip(): text for text in [*launch.overrides, *overrides]}
    return replace(launch, overrides=list(by_key.values()))


def require_config(launch: Launch, folder: Path) -> None:
    """Raise ConfigurationError, which says how to resume the run in `folder`, if its configuration file is missing."""
    if not launch.config.exists():
        problem = f"is the configuration of the run in {folder}, and no longer there"
        hint = f"say where the file is now: `fedqueue run CONFIG.toml --resume {shlex.quote(str(folder))}`"
        raise ConfigurationError("CONFIG", str(launch.config), problem, hint)


def _harmless(entry: Path) -> bool:
    """Whether a folder may be used though it has this entry: a hidden one, or egress logs of runs that were removed."""
    if entry.name == EGRESS and entry.is_dir():
        return all(_EGRESS_LOG.fullmatch(log.name) for log in entry.iterdir())
    return entry.name.startswith(".") or entry.name == "lost+found"


class _Unwritable:
    """A context in which an OSError means that the folder `path` cannot be written."""

    def __init__(self, path: Path, words: CallerWords) -> None:
        self._path, self._words = path, words

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            problem = f"cannot be written ({error.strerror})"
            raise ConfigurationError(self._words.folder, str(self._path), problem, self._words.other_folder) from None

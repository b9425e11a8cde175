"""Texts of exceptions that code outside fedqueue raised, and other foreign text: always one that can be sent and shown.

An exception may be a `SystemExit`, its `__str__` may raise, and its message may contain lone surrogates, control
characters or hundreds of lines.
"""

from __future__ import annotations

import errno
import re
import sys
import sysconfig
import traceback
from pathlib import Path

from fedqueue.errors import FedqueueError

MAX_MESSAGE = 500
"""Characters of an exception's message that are kept."""
FRAMES = 3
"""Frames of a traceback that `exception_with_place` names."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_PASSED_ON = re.compile(
    r"Caught \w+ in (?P<where>[^\n]*)\.\nOriginal (?P<traceback>Traceback \(most recent call last\):\n.*)", re.DOTALL
)
"""The text of an exception that `torch._utils.ExceptionWrapper` passes on from another process."""
_FRAME = re.compile(r'^  File "(?P<file>[^"\n]+)", line (?P<line>\d+), in (?P<name>\S+)$', re.MULTILINE)
_SHARED_MEMORY = re.compile(r"(unable to .*</torch_|shared memory).*No space left on device", re.DOTALL)
_LIBRARIES = tuple(
    str(Path(folder))
    for folder in {
        sysconfig.get_path("stdlib"),
        sysconfig.get_path("purelib"),
        sysconfig.get_path("platlib"),
        str(Path(__file__).parent),
        *(path for path in sys.path if path.endswith(("site-packages", "dist-packages"))),
    }
)


def printable(text: str) -> str:
    """`text` without what a terminal acts upon: control characters and lone surrogates become escapes as `\\x1b`.

    Tabs and line ends are kept.

    >>> print(printable("caf\\udce9 \\x1b[31m"))
    caf\\udce9 \\x1b[31m
    """
    encodable = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), encodable)


def one_line(text: str, limit: int = 300) -> str:
    """`text` as a line of at most `limit` characters that can be printed."""
    line = " ".join(printable(text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def exception_text(error: BaseException) -> str:
    """Type and message of any exception, as text that can be encoded in UTF-8.

    Of an exception that a worker process of a DataLoader raised, the message is the original one, without its
    traceback. What to do follows in brackets where the machine's open files or its shared memory are exhausted.

    >>> exception_text(ValueError("no rows")), exception_text(SystemExit(3)), exception_text(KeyboardInterrupt())
    ('ValueError: no rows', 'SystemExit: 3', 'KeyboardInterrupt')
    """
    try:
        message = str(error)
    except BaseException as failed:
        message = f"(its text cannot be made: {type(failed).__name__})"
    kind = type(error).__name__
    hint = _exhausted(error, message)
    if passed_on := _PASSED_ON.match(message):
        message = f"{_original_message(passed_on['traceback'], kind)} (in {passed_on['where']})"
    return printable(f"{kind}: {message[:MAX_MESSAGE]}" if message else kind) + (f" ({hint})" if hint else "")


def exception_with_place(error: BaseException) -> str:
    """`exception_text` and where it was raised: functions with file and line, and no value of a variable.

    The last FRAMES frames are named, the innermost first. The innermost frame of the user's own code comes before
    them where it is another one. An error that fedqueue raises on purpose says itself what was wrong: of its frames,
    only the user's own are named.
    """
    frames = [*traceback.extract_tb(error.__traceback__), *_passed_on_frames(error)]
    frames = [frame for frame in frames if not frame.filename.startswith("<frozen ")]
    if isinstance(error, FedqueueError):
        frames = [frame for frame in frames if _is_users(frame.filename)]
    last = frames[-FRAMES:][::-1]
    own = next((frame for frame in reversed(frames) if _is_users(frame.filename)), None)
    if own is not None and own not in last:
        last = [own, *last[: FRAMES - 1]]
    places = [f"{frame.name} ({frame.filename.rpartition('/')[2]}:{frame.lineno})" for frame in last]
    return exception_text(error) + printable(f"; in {' < '.join(places)}" if places else "")


def _original_message(text: str, kind: str) -> str:
    """The message at the end of a traceback's text, which begins with the exception's type."""
    _, _, behind = text.rpartition('\n  File "')
    lines = behind.splitlines()[1:]
    while lines and lines[0].startswith("    "):  # the source line, and its markers
        del lines[0]
    return "\n".join(lines).strip().removeprefix(f"{kind}: ")


def _passed_on_frames(error: BaseException) -> list[traceback.FrameSummary]:
    """The frames of an exception's text where a worker process of a DataLoader raised it."""
    try:
        passed_on = _PASSED_ON.match(str(error))
    except BaseException:
        return []
    found = _FRAME.finditer(passed_on["traceback"]) if passed_on else ()
    return [traceback.FrameSummary(f["file"], int(f["line"]), f["name"], lookup_line=False) for f in found]


def _exhausted(error: BaseException, message: str) -> str:
    """What to do about an operating system's limit; empty for an exception that does not come from one."""
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.EMFILE or "Too many open files" in message:
        return "this process may open no more files: raise the limit with ulimit -n, or keep fewer open"
    if _SHARED_MEMORY.search(message) or (number == errno.ENOSPC and _in_multiprocessing(error)):
        return (
            "the shared memory, /dev/shm, is full: enlarge it (docker run --shm-size), or load the data without "
            "worker processes (training.loader_workers = 0)"
        )
    return ""


def _in_multiprocessing(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return any("multiprocessing" in Path(frame.filename).parts for frame in frames[-2:])


def _is_users(filename: str) -> bool:
    """Whether the file belongs neither to Python, nor to an installed package, nor to fedqueue."""
    services = {"fedqueue_coordinator", "fedqueue_worker", "fedqueue_keeper"}
    return not filename.startswith((*_LIBRARIES, "<")) and services.isdisjoint(Path(filename).parts)

"""Texts of exceptions that code outside fedqueue raised, and other foreign text: always one that can be sent and shown.

An exception may be a `SystemExit`, its `__str__` may raise, and its message may contain lone surrogates, control
characters or hundreds of lines.
"""

from __future__ import annotations

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

    >>> exception_text(ValueError("no rows")), exception_text(SystemExit(3)), exception_text(KeyboardInterrupt())
    ('ValueError: no rows', 'SystemExit: 3', 'KeyboardInterrupt')
    """
    try:
        message = str(error)
    except BaseException as failed:
        message = f"(its text cannot be made: {type(failed).__name__})"
    kind = type(error).__name__
    return printable(f"{kind}: {message[:MAX_MESSAGE]}" if message else kind)


def exception_with_place(error: BaseException) -> str:
    """`exception_text` and where it was raised: functions with file and line, and no value of a variable.

    The last FRAMES frames are named, the innermost first. The innermost frame of the user's own code comes before
    them where it is another one. An error that fedqueue raises outside of the user's code has no place: its message
    says what is wrong.
    """
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen ")]
    last = frames[-FRAMES:][::-1]
    own = next((frame for frame in reversed(frames) if _is_users(frame.filename)), None)
    if own is None and isinstance(error, FedqueueError):
        return exception_text(error)
    if own is not None and own not in last:
        last = [own, *last[: FRAMES - 1]]
    places = [f"{frame.name} ({frame.filename.rpartition('/')[2]}:{frame.lineno})" for frame in last]
    return exception_text(error) + printable(f"; in {' < '.join(places)}" if places else "")


def _is_users(filename: str) -> bool:
    """Whether the file belongs neither to Python, nor to an installed package, nor to fedqueue."""
    services = {"fedqueue_coordinator", "fedqueue_worker"}
    return not filename.startswith((*_LIBRARIES, "<")) and services.isdisjoint(Path(filename).parts)

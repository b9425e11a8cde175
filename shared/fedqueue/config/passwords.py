"""Where the password of Redis comes from: the environment, or a file; never a command line, which all can see."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

from fedqueue.errors import ConfigurationError


def with_password(url: str, file: str) -> str:
    """`url` with the password in `file`, or as it is where one of them is empty.

    Raises ConfigurationError where the file cannot be read, or the URL holds a password already.
    """
    if not (file and url):
        return url
    try:
        password = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError("redis.password_file", file, f"cannot be read: {error}") from None
    scheme, _, rest = url.partition("://")
    user, _, place = rest.rpartition("@")
    if ":" in user:
        raise ConfigurationError("redis.password_file", file, "the URL holds a password too")
    return f"{scheme}://{user}:{quote(password, safe='')}@{place}"


def refuse_password(option: str, url: str) -> None:
    """Raises ConfigurationError, which does not show it, where a URL on a command line holds a password."""
    if ":" in url.partition("://")[2].rpartition("@")[0]:
        accepted = "no password on a command line, where all can see it: set FEDQUEUE_REDIS__URL or redis.password_file"
        raise ConfigurationError(option, "…", accepted)

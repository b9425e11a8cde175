"""The section `[redis]`: how the Redis server is reached, and where its password comes from.

A password comes from the environment or from a file. It is refused in the arguments of a command, which other users of
the machine can read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated
from urllib.parse import quote

from pydantic import Field

from fedqueue.config.sections import OFF, NonNegative, Section, Text
from fedqueue.config.tls import Tls
from fedqueue.errors import ConfigurationError


class RedisConfig(Section):
    """How the Redis server is reached."""

    # Excluded from dumps, which others can read: the URL may hold a password, and paths are this machine's own.
    url: Annotated[Text | None, OFF] = Field(default=None, exclude=True, repr=False)
    """`redis://…`, `rediss://…` or `unix://…`; where it is left out `fedqueue run` starts an embedded server."""
    ca_file: Annotated[Text | None, OFF] = Field(default=None, exclude=True)
    """`rediss://`: PEM file of the authorities that may sign the server's certificate; `off`: those of the system."""
    cert_file: Annotated[Text | None, OFF] = Field(default=None, exclude=True)
    """`rediss://`: PEM file of this machine's own certificate, for servers that require one."""
    key_file: Annotated[Text | None, OFF] = Field(default=None, exclude=True)
    """`rediss://`: PEM file of the private key of `cert_file`."""
    password_file: Annotated[Text | None, OFF] = Field(default=None, exclude=True)
    """File with the password for `url` or for --redis URL, so that the URL need not hold it."""
    retention_hours: NonNegative = 24.0
    """How long the model, the ledger and the configuration of an ended run stay in Redis."""

    def address(self, given: str = "") -> str | None:
        """The URL `given` on a command line, else `url`, with the password of `password_file`; None without a URL.

        Raises ConfigurationError where `given` holds a password, and where the password file cannot be used.
        """
        refuse_password("--redis", given)
        url = given or self.url
        return with_password(url, self.password_file) if url else None

    @property
    def tls(self) -> Tls:
        """Raises ConfigurationError where only one of `cert_file` and `key_file` is set."""
        return Tls(self.ca_file, self.cert_file, self.key_file)


def with_password(url: str, file: str | None) -> str:
    """`url` with the password in `file`; `url` unchanged without a file.

    Raises ConfigurationError where the file cannot be read, or the URL holds a password already.
    """
    if not file:
        return url
    try:
        password = Path(file).read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError("redis.password_file", file, f"cannot be read: {error}") from None
    scheme, _, rest = url.partition("://")
    user, _, address = rest.rpartition("@")
    if ":" in user:
        hint = "remove the password from the URL, or leave out redis.password_file"
        raise ConfigurationError("redis.password_file", file, "the URL holds a password too", hint)
    return f"{scheme}://{user}:{quote(password, safe='')}@{address}"


def refuse_password(option: str, url: str) -> None:
    """Raises ConfigurationError, which does not show the URL, where a URL holds a password.

    `option` is where the URL was given: on this command line, or for that of each worker process.
    """
    if ":" in url.partition("://")[2].rpartition("@")[0]:
        problem = "its password would be on a command line, which every user of the machine can read"
        raise ConfigurationError(option, "…", problem, "set FEDQUEUE_REDIS__URL or redis.password_file")

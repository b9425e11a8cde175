"""How the Redis server is reached: `[redis]` in the configuration."""

from __future__ import annotations

from pydantic import Field

from fedqueue.config.passwords import refuse_password, with_password
from fedqueue.config.sections import NonNegative, Section
from fedqueue.config.tls import Tls


class RedisConfig(Section):
    url: str = Field(default="", exclude=True, repr=False)  # it may hold a password: a dump for others has it not
    """`redis://…`, `rediss://…` or `unix://…`; empty: `fedqueue run` starts an embedded server."""
    ca_file: str = Field(default="", exclude=True)
    """`rediss://`: PEM file of the authorities that may have signed the server's certificate; empty: the system's."""
    cert_file: str = Field(default="", exclude=True)
    """`rediss://`: PEM file of this machine's own certificate, where the server asks for one."""
    key_file: str = Field(default="", exclude=True)
    """`rediss://`: PEM file of the key of `cert_file`."""
    password_file: str = Field(default="", exclude=True)
    """A file with the password for `url`, or for --redis URL, so that no URL has to hold it."""
    retention_hours: NonNegative = 24.0
    """How long the model, the ledger and the configuration of an ended run stay in Redis."""

    def address(self, given: str = "") -> str:
        """`url`, or the one `given` on a command line, with the password of `password_file` in it.

        Raises ConfigurationError where the given one holds a password: the arguments of a process are for all to see.
        """
        refuse_password("--redis", given)
        return with_password(given or self.url, self.password_file)

    @property
    def tls(self) -> Tls:
        """Raises ConfigurationError where one of `cert_file` and `key_file` lacks the other."""
        return Tls(self.ca_file, self.cert_file, self.key_file)

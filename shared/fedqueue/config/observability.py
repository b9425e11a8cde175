"""Configuration of what a process tells about itself: its metrics and its log."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator

from fedqueue.config.sections import OFF, Section, Text, refuse

LOOPBACK = "127.0.0.1"
HINT = (
    "write 'off' or leave the key out to serve none; a port, such as 9464; or HOST:PORT, such as 0.0.0.0:9464 to "
    "answer other machines too"
)


def host_and_port(address: str) -> tuple[str, int]:
    """Split `PORT`, `HOST:PORT` or `[HOST]:PORT`; the host is loopback where none is named. Raises ValueError."""
    host, _, port = address.rpartition(":")
    if not (port.isdecimal() and port.isascii() and 0 < int(port) < 2**16):
        raise ValueError(f"{address!r} names no port from 1 to 65535")
    if host.startswith("[") and host.endswith("]"):
        host = str(ipaddress.IPv6Address(host[1:-1]))
    elif ":" in host or "/" in host or any(map(str.isspace, host)):
        raise ValueError(f"{address!r} names no host: an IPv6 address stands in brackets, [::1]:9464")
    return host or LOOPBACK, int(port)


def _bindable(address: str) -> str:
    try:
        host_and_port(address)
    except ValueError as error:
        raise refuse(str(error), HINT) from None
    return address


def _text(value: object) -> object:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Address = Annotated[Text, BeforeValidator(_text), AfterValidator(_bindable)]


class ObservabilityConfig(Section):
    """Metrics and log of one process; each machine's own."""

    metrics_address: Annotated[Address | None, OFF] = None
    """Serves metrics for Prometheus at http://ADDRESS/metrics: `HOST:PORT`, or a port of loopback; `off`: serves none.
    `pip install 'fedqueue[metrics]'`."""
    log_format: Literal["text", "json"] = "text"
    """`json`: each line of the log is a JSON object with `timestamp`, `level`, `event`, `run`, and in a job `client`
    and `job`."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The lowest level that is logged; the options `--verbose` and `--quiet` have precedence."""

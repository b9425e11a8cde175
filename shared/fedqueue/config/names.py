"""The names that a configuration may give to runs, clients and keepers, and the prefix of its environment variables."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

ENVIRONMENT_PREFIX = "FEDQUEUE_"
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
CLIENT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def _run_name(name: str) -> str:
    if not RUN_NAME.fullmatch(name):
        raise ValueError("must be 1 to 64 letters, digits, '_' and '-', the first a letter or digit")
    return name


def _client_id(client: str) -> str:
    if not CLIENT_ID.fullmatch(client):
        raise ValueError("must be 1 to 64 letters, digits, '_', '.' and '-', the first a letter or digit")
    return client


RunName = Annotated[str, AfterValidator(_run_name)]
ClientId = Annotated[str, AfterValidator(_client_id)]
KeeperName = ClientId
"""Named as clients are: in files and Redis keys of its own."""

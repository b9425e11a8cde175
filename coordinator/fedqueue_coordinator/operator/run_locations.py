"""Where a run can be found: on a Redis server, or in the folder of results it left."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from fedqueue.config.redis import RedisConfig
from fedqueue.config.sections import ENVIRONMENT_PREFIX
from fedqueue.config.tls import Tls
from fedqueue.errors import ServerUnavailable
from fedqueue.transport.connection import TLS_SCHEMES, connect

RUNS_FOLDER = Path("runs")
DEFAULT_URL = "redis://localhost:6379"


@dataclass(frozen=True)
class RunLocation:
    """A server that answers."""

    url: str
    client: redis.Redis


def servers(url: str) -> list[RunLocation]:
    """The servers to look at: the given one, else that of the environment, those of local runs, the usual port."""
    names = [f"{ENVIRONMENT_PREFIX}REDIS__{key}" for key in ("URL", "PASSWORD_FILE")]
    address, password_file = (os.environ.get(name, "") for name in names)
    given = RedisConfig(url=address, password_file=password_file).address(url)
    local = [f.read_text().strip() for f in sorted(RUNS_FOLDER.glob("*/redis.url"))]
    files = [os.environ.get(f"{ENVIRONMENT_PREFIX}REDIS__{key}", "") for key in ("CA_FILE", "CERT_FILE", "KEY_FILE")]
    tls = Tls(*files)
    places, problems = [], []
    for candidate in dict.fromkeys([given] if given else [*local, DEFAULT_URL]):
        client = connect(candidate, retries=0, tls=tls if candidate.partition(":")[0] in TLS_SCHEMES else None)
        try:
            client.ping()
        except redis.RedisError as error:
            problems.append(str(error))
        else:
            places.append(RunLocation(candidate, client))
    if given and not places:
        raise ServerUnavailable(f"no Redis answers: {problems[0]}")
    return places


def finished_runs() -> dict[str, Path]:
    """Run → folder, for the results under `runs/`."""
    return {f.parent.name: f.parent for f in sorted(RUNS_FOLDER.glob("*/summary.json"))}


def read_summary(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return summary

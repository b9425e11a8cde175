"""How a local run was started, kept beside its results so that `--resume DIR` can start it again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedqueue.errors import ConfigurationError

LAUNCH_FILENAME = "launch.json"


@dataclass(frozen=True)
class Launch:
    config: Path
    """Absolute path of the configuration file."""
    overrides: Sequence[str]
    workers: int


def write_launch(folder: Path, launch: Launch) -> None:
    record = {"config": str(launch.config), "overrides": list(launch.overrides), "workers": launch.workers}
    (folder / LAUNCH_FILENAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_launch(folder: Path, overrides: Sequence[str]) -> Launch:
    """The launch of the run in `folder`, with further `overrides`; raises ConfigurationError where none can go on."""
    try:
        record = json.loads((folder / LAUNCH_FILENAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError("--resume", str(folder), f"holds no {LAUNCH_FILENAME} of a run") from error
    if not ((folder / "redis").exists() or (folder / "checkpoint.safetensors").exists()):
        raise ConfigurationError("--resume", str(folder), "the run there has ended: there is nothing to go on with")
    return Launch(Path(record["config"]), [*record["overrides"], *overrides], record["workers"])

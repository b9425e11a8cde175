"""`fedqueue init`: a starting point that runs as it is."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from fedqueue.errors import ConfigurationError

SCAFFOLD_FILENAMES = ("task.py", "federation.toml", "README.md")


def write_scaffold(folder: Path) -> None:
    """Write FILES into `folder`; raises ConfigurationError, before writing anything, where one is there already."""
    for name in SCAFFOLD_FILENAMES:
        if (folder / name).exists():
            raise ConfigurationError("DIR", str(folder), f"already holds {name}; choose a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    templates = resources.files("fedqueue_coordinator.operator").joinpath("templates")
    for name in SCAFFOLD_FILENAMES:
        text = templates.joinpath(f"{name}.txt").read_text(encoding="utf-8")
        (folder / name).write_text(text, encoding="utf-8")

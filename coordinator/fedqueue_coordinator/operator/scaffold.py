"""Writes the files of `fedqueue init`: an example that runs unchanged."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from fedqueue.errors import ConfigurationError

SCAFFOLD_FILENAMES = ("task.py", "federation.toml", "README.md")
ALWAYS_THE_SAME = "task.py"
"""A task says nothing about privacy: the run's configuration does."""


def write_scaffold(folder: Path, private: bool = False) -> None:
    """Write SCAFFOLD_FILENAMES into `folder`, which is created if needed; `private`: a run with keepers and noise.

    Raises ConfigurationError, before writing anything, if one of the files exists.
    """
    for name in SCAFFOLD_FILENAMES:
        if (folder / name).exists():
            raise ConfigurationError("DIR", str(folder), f"already holds {name}", "choose a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    templates = resources.files("fedqueue_coordinator.operator").joinpath("templates")
    for name in SCAFFOLD_FILENAMES:
        template = f"private_{name}.txt" if private and name != ALWAYS_THE_SAME else f"{name}.txt"
        text = templates.joinpath(template).read_text(encoding="utf-8")
        (folder / name).write_text(text, encoding="utf-8")

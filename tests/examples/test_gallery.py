"""The gallery's commands print the lines of the page; only figures may differ."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "gallery" / "index.md"
SECTION = re.compile(r"<!-- gallery: (\S+) -->\n\n```sh\n(.*?)```\n\n```text\n(.*?)```", re.DOTALL)
SECTIONS = {name: (commands, printed) for name, commands, printed in SECTION.findall(PAGE.read_text(encoding="utf-8"))}


def shape(line: str) -> str:
    """Return `line` without figures and column widths; a missing figure (–) counts as a figure."""
    return " ".join(re.sub(r"\d+(\.\d+)?|–", "#", line).split())


def run(command: str, folder: Path) -> str:
    """Run a command of the page in `folder`; return its output on both streams."""
    program, *words = shlex.split(command)
    assert program == "fedqueue"
    result = subprocess.run(
        [sys.executable, "-m", "fedqueue_coordinator", *words],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=110, check=False,
        env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    return result.stdout


def test_every_section_of_the_page_is_run() -> None:
    assert set(SECTIONS) == {"digits", "hospitals", "own-algorithm", "init", "compare"}


@pytest.mark.parametrize(
    ("line", "other", "same"),
    [
        ("a: loss 0.16 after 5.3 s", "a: loss 1.2 after 10 s", True),
        ("│ fedbuff  │     7.5 │", "│ fedbuff │ – │", True),
        ("stopped by target: accuracy 0.95", "stopped by seconds: 120", False),
    ],
)
def test_shape_ignores_figures_and_nothing_else(line: str, other: str, same: bool) -> None:
    assert (shape(line) == shape(other)) is same


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.parametrize("name", SECTIONS)
def test_gallery_prints_what_the_page_says(name: Any, tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    commands, printed = SECTIONS[name]
    output = "".join(run(command, tmp_path) for command in commands.strip().splitlines())
    shapes = iter(shape(line) for line in output.splitlines())
    for line in printed.strip().splitlines():
        assert shape(line) in shapes, f"not printed, or in a different order: {line}\n\n{output}"

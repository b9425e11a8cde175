"""Writes leak.json and leak.png, and prints the table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedqueue.errors import MissingExtra
from fedqueue.leak.attacks import Gallery
from fedqueue.leak.measurement import ATTACKS, COLUMNS, Measurement, leak_record, table_rows

WIDTH = 150
"""Columns of the table if the output is not a terminal."""


def write_leak(
    folder: Path,
    title: str,
    about: Mapping[str, Any],
    measurements: Sequence[Measurement],
    galleries: Sequence[Gallery],
) -> list[str]:
    """Write leak.json and, where a row can be shown, leak.png to `folder`; return a line about each."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(leak_record(about, measurements), indent=1, ensure_ascii=False)
    (folder / "leak.json").write_text(text + "\n", encoding="utf-8")
    picture = folder / "leak.png"
    picture.unlink(missing_ok=True)
    written = [f"figures: {folder / 'leak.json'}"]
    if not any(gallery.pairs for gallery in galleries):
        return [*written, "no picture: no row could be read out of a first layer"]
    try:
        from fedqueue.leak.picture import draw_leak  # imports matplotlib, which takes long
    except MissingExtra as error:
        return [*written, str(error)]
    draw_leak(picture, title, galleries)
    return [*written, f"picture: {picture}"]


def print_table(
    console: Console, title: str, about: Mapping[str, Any], measurements: Sequence[Measurement], written: Sequence[str]
) -> None:
    """Print a row for each measurement, what the attacks are, and where the files are."""
    if not console.is_terminal:
        console.width = WIDTH
    table = Table(title=title, title_justify="left")
    for name in COLUMNS:
        table.add_column(name, justify="right" if name in ("value", "control", "rows", "s") else "left")
    before = ("", "")
    for m, row in zip(measurements, table_rows(measurements), strict=True):
        if before not in (("", ""), (m.view, m.protection)):
            table.add_section()
        before = (m.view, m.protection)
        table.add_row(*row)
    console.print(table)
    for name in dict.fromkeys(m.attack for m in measurements):
        console.print(f"{name}: {ATTACKS[name]}", soft_wrap=True)
    console.print(
        f"control: the same attack on rows never trained on ({about['control_rows']}); for labels, with the classes "
        "shuffled. A value near its control shows nothing.",
        soft_wrap=True,
    )
    for line in written:
        console.print(line, soft_wrap=True)

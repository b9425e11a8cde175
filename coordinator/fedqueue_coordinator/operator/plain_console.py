"""A console for text that others wrote: names, paths, exceptions."""

from __future__ import annotations

from typing import Any

from rich.console import Console


class PlainConsole(Console):
    """A console that takes no text as markup, and falls silent when its reader has gone."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def on_broken_pipe(self) -> None:
        """Show nothing further. Rich would end the process."""
        self.quiet = True

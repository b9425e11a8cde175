"""Calls a command line in this process, as its console script does."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class CommandLine:
    """One program, such as `fedqueue`: a call returns the exit code, stdout and stderr."""

    program: str
    main: Callable[[], None]
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    def __call__(self, *arguments: object) -> tuple[object, str, str]:
        """Run the program with `arguments`; a traceback fails the test."""
        self.monkeypatch.setattr(sys, "argv", [self.program, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            self.main()
        captured = self.capsys.readouterr()
        assert "Traceback" not in captured.err
        return ended.value.code or 0, captured.out, captured.err

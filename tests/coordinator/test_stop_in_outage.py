"""A coordinator that is told to end while Redis is away."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from fedqueue.errors import ServerUnavailable
from fedqueue_coordinator.operator import lead_run as module
from fedqueue_coordinator.operator.run_folder import INTERRUPT, RunFolder
from tests.support.builders import make_config


class Away:
    """A coordinator whose Redis is away, and that gets a signal while it waits."""

    told = ""

    def __init__(self, *arguments: Any, **how: Any) -> None:
        self.paused, self.interrupted = self.told == "pause", self.told == INTERRUPT

    def run(self, standby: Any) -> None:
        raise ServerUnavailable("stopped while waiting for Redis: it refuses connections")


@pytest.fixture
def lead(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    def run(told: Any) -> Any:
        monkeypatch.setattr(Away, "told", told)
        monkeypatch.setattr(module, "Coordinator", Away)
        monkeypatch.setattr(module, "CoordinatorStore", lambda *arguments: None)
        monkeypatch.setattr(signal, "signal", lambda *arguments: None)
        nothing: Any = None  # `Away` looks at no argument
        return module.lead_run(make_config(), nothing, nothing, None, RunFolder(tmp_path), True, False, False, False)

    return run


def test_sigterm_in_an_outage_is_an_orderly_end(lead: Any) -> None:
    assert lead("pause") is None


def test_ctrl_c_in_an_outage_ends_as_interrupted(lead: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        lead(INTERRUPT)
    assert "stopped while waiting for Redis" in capsys.readouterr().err


def test_outage_that_waiting_cannot_end_is_a_failure(lead: Any) -> None:
    with pytest.raises(ServerUnavailable):
        lead("")

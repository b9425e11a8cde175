"""Every dependency is pinned; insecure code and known vulnerabilities fail `make check`."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.support.script_module import load_script

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CLEAN = {"name": "rq", "version": "3.0.0", "vulns": []}
WEAK = {"name": "rq", "version": "2.0", "vulns": [{"id": "CVE-2026-1", "fix_versions": ["3.0.0"]}]}
UNKNOWN = {"name": "rq", "skip_reason": "Dependency not found"}


@pytest.fixture(scope="module")
def audit() -> Any:
    return load_script(ROOT / ".ci" / "audit.py")


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_dependency_is_pinned_to_one_version() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    pinned = {normal(line.partition("==")[0]) for line in lines}
    assert len(pinned) == len(lines)
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    named = {normal(name) for group in groups for text in group for name in re.findall(r"^[\w.-]+", text)}
    assert named - {"fedqueue"} <= pinned


def test_known_vulnerability_fails_the_check_and_is_named(audit: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit.judge([CLEAN, WEAK]) == 1
    assert "rq 2.0: CVE-2026-1, fixed in 3.0.0" in capsys.readouterr().out


def test_clean_versions_pass_and_skipped_ones_are_counted(audit: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit.judge([CLEAN, UNKNOWN]) == 0
    assert "1 pinned versions, 0 known vulnerabilities; not audited: 1" in capsys.readouterr().out


@pytest.mark.parametrize("dependencies", [[], [UNKNOWN]])
def test_audit_that_could_not_be_made_is_loud_and_does_not_fail(
    audit: Any, capsys: pytest.CaptureFixture[str], dependencies: list[Any]
) -> None:
    assert audit.judge(dependencies) == 0
    assert "SKIPPED: NO DEPENDENCY WAS AUDITED" in capsys.readouterr().err


@pytest.mark.parametrize("said", ["", "Traceback\nConnectionError: no route"])
def test_pip_audit_without_an_answer_is_a_loud_skip(
    audit: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    done = subprocess.CompletedProcess([], 1, "", said)
    monkeypatch.setattr(audit.subprocess, "run", lambda *a, **k: done)
    assert audit.main() == 0
    assert ("no route" if said else "printed nothing") in capsys.readouterr().err


@pytest.mark.slow
def test_insecure_code_fails_the_check(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("import yaml\n\n\ndef read(text):\n    return yaml.load(text)\n")
    command = [sys.executable, "-m", "bandit", "--quiet", "--recursive", "--configfile", str(ROOT / "pyproject.toml")]
    found = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert "yaml_load" in found.stdout
    makefile = (ROOT / "Makefile").read_text()
    assert "bandit --quiet --recursive --configfile pyproject.toml shared coordinator worker" in makefile
    assert ".ci/audit.py" in makefile

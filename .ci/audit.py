"""`make check`: looks the pinned dependencies up among the known vulnerabilities, with pip-audit.

Exits with 1 if a pinned version has a vulnerability. If the vulnerability service cannot be reached, as on a machine
that reaches only a mirror of packages, it says so in capitals and exits with 0.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
SECONDS = 180


def main() -> int:
    command = [
        sys.executable, "-m", "pip_audit", "--requirement", str(CONSTRAINTS), "--no-deps", "--disable-pip",
        "--progress-spinner", "off", "--format", "json", "--timeout", "10",
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
        dependencies = json.loads(done.stdout)["dependencies"]
    except subprocess.TimeoutExpired:
        return skip(f"no answer within {SECONDS} s")
    except (ValueError, KeyError):
        return skip(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "pip-audit printed nothing")
    return judge(dependencies)


def judge(dependencies: Sequence[Mapping[str, Any]]) -> int:
    """Print a line for each vulnerability that pip-audit found; returns the exit code."""
    audited = [d for d in dependencies if "skip_reason" not in d]
    found = [(d["name"], d["version"], v) for d in audited for v in d["vulns"]]
    for name, version, vulnerability in found:
        fixed = ", ".join(vulnerability.get("fix_versions", [])) or "no version yet"
        print(f"{name} {version}: {vulnerability['id']}, fixed in {fixed}")
    if not audited:
        return skip(dependencies[0]["skip_reason"] if dependencies else "pip-audit found no dependency")
    left_out = len(dependencies) - len(audited)
    print(f"pip-audit: {len(audited)} pinned versions, {len(found)} known vulnerabilities; not audited: {left_out}")
    return 1 if found else 0


def skip(because: str) -> int:
    """Say loudly that nothing was audited; returns the exit code 0."""
    print(f"*** SKIPPED: NO DEPENDENCY WAS AUDITED FOR KNOWN VULNERABILITIES: {because}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`make dist`: builds the wheel and the sdist twice, compares the bytes, and leaves them in dist/.

SOURCE_DATE_EPOCH, by default the time of the newest commit, becomes the time of every file in the archives. Exits with
1 if the second build differs from the first: then a file's content depends on the time, the place or the order.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
NO_COMMIT = "1735689600"  # 2025-01-01, where there is no git: an unpacked sdist


def main() -> int:
    epoch = os.environ.get("SOURCE_DATE_EPOCH") or commit_time()
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        built, again = (build(Path(folder), epoch) for folder in (first, second))
        if built != again:
            print(f"the second build differs: {built} is not {again}", file=sys.stderr)
            return 1
        dist = ROOT / "dist"
        shutil.rmtree(dist, ignore_errors=True)
        shutil.copytree(first, dist)
    for name, digest in sorted(built.items()):
        print(f"{digest}  dist/{name}")
    return 0


def build(folder: Path, epoch: str) -> dict[str, str]:
    """Build both archives into `folder`; returns name → SHA-256 in hex."""
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(folder)]
    environment = {**os.environ, "SOURCE_DATE_EPOCH": epoch, "PYTHONHASHSEED": "random"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def commit_time() -> str:
    """Return the time of the newest commit, in seconds since 1970."""
    command = ["git", "log", "-1", "--format=%ct"]  # from PATH: where git is differs between machines
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or NO_COMMIT


if __name__ == "__main__":
    sys.exit(main())

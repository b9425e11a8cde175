"""Runs `make chaos`: injects faults into a federation for minutes, audits it and prints the faults that it survived.

python -m tests.chaos [--seconds 600] [--seed 1] [--keepers 2] [--faults kill_worker,restart_redis]

The exit code is 1 if the federation did not survive.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.support.chaos.faults import FAULTS, KEEPER_FAULTS
from tests.support.chaos.survive import survive


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--faults", default="", help=f"names, by commas (default: all): {', '.join([*FAULTS, *KEEPER_FAULTS])}"
    )
    parser.add_argument("--keepers", type=int, default=0, choices=range(4), help="keepers, which die too (default: 0)")
    parser.add_argument("--folder", type=Path, default=None, help="folder for logs, the server's data and the results")
    given = parser.parse_args()
    known = [*FAULTS, *(KEEPER_FAULTS if given.keepers else ())]
    asked = given.faults.split(",") if given.faults else known
    names = [name for name in known if name in asked or name.partition(":")[0] in asked]
    if not names:
        parser.error(f"--faults {given.faults}: none of {', '.join(known)}")
    if given.folder and given.folder.exists() and any(given.folder.iterdir()):
        parser.error(f"--folder {given.folder}: is not empty")
    folder = given.folder or Path(tempfile.mkdtemp(prefix="fedqueue-chaos-"))
    sys.stdout.write(f"seed {given.seed}, {given.seconds:.0f} s, {len(names)} faults by name, in {folder}\n")
    sys.stdout.flush()
    report = survive(folder, given.seconds, given.seed, names, [f"keeper-{i}" for i in range(given.keepers)])
    sys.stdout.writelines(f"{line}\n" for line in report.lines())
    sys.exit(0 if report.good else 1)


if __name__ == "__main__":
    main()

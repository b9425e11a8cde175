"""Runs `make fuzz`: coverage-guided fuzzing of every decoder, or of the named ones.

    .venv/bin/python -m tests.fuzz --runs 1000000 update manifest

An input that breaks a bound is written to tests/corpus/DECODER/, which a test reads, and ends the run with exit
code 1.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CORPUS = Path(__file__).parents[1] / "corpus"
MOST_BYTES = 70_000  # more than the largest message
GROWTH = 256 * 2**20  # bytes by which the process may grow over all inputs


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=1_000_000, help="inputs for each decoder")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("decoders", nargs="*")
    options = parser.parse_args()
    try:
        import atheris
    except ImportError:
        sys.exit("make fuzz needs atheris, which has wheels for Linux on x86-64 and arm64: pip install -e '.[fuzz]'")
    with atheris.instrument_imports(include=["fedqueue", "fedqueue_coordinator"]):
        from tests.support.decoders import DECODERS
    if len(options.decoders) == 1:  # libFuzzer ends its process, so each decoder has a process of its own
        fuzz(options.decoders[0], options.runs, options.seed)
        return
    began = time.monotonic()
    names = options.decoders or list(DECODERS)
    for name in names:
        command = [sys.executable, "-m", "tests.fuzz", "--runs", str(options.runs), "--seed", str(options.seed), name]
        if code := subprocess.run(command, check=False).returncode:
            sys.exit(f"fuzz: {name} ended with {code}")
    total = options.runs * len(names)
    print(f"fuzz: {total} inputs for {len(names)} decoders in {time.monotonic() - began:.0f} s, none broke a bound")


def fuzz(name: str, runs: int, seed: int) -> None:

    import atheris

    from tests.support.decoders import DECODERS, ToShow, check

    done, started = 0, resident()
    began = time.monotonic()

    def one(data: bytes) -> None:
        nonlocal done
        done += 1
        try:
            check(name, data)
        except ToShow as find:
            place = CORPUS / name / hashlib.sha256(data).hexdigest()[:16]
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)
            print(f"{find}\nits input is {place}", flush=True)
            os._exit(1)
        if done == runs:
            grown = resident() - started
            print(
                f"{name}: {done} inputs in {time.monotonic() - began:.0f} s, grown by {grown / 2**20:.0f} MiB",
                flush=True,
            )
            os._exit(1 if grown > GROWTH else 0)

    with tempfile.TemporaryDirectory() as folder:
        for i, data in enumerate(DECODERS[name].seeds):
            (Path(folder) / f"seed-{i}").write_bytes(data)
        known = [str(CORPUS / name)] if (CORPUS / name).is_dir() else []
        settings = [f"-max_len={MOST_BYTES}", f"-seed={seed}", "-timeout=10", "-rss_limit_mb=4096", "-verbosity=0"]
        atheris.Setup([sys.argv[0], *settings, folder, *known], one)
        atheris.Fuzz()


def resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()

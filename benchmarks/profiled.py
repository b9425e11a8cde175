"""Runs the `fedqueue` command line under a CPU-time profiler, and writes the profile at exit.

python benchmarks/profiled.py FILE coordinator CONFIG.toml …
"""

from __future__ import annotations

import cProfile
import sys
import time

from fedqueue_coordinator.cli.main import main

if __name__ == "__main__":
    out = sys.argv.pop(1)
    profile = cProfile.Profile(time.thread_time)
    profile.enable()
    try:
        main()
    finally:
        profile.disable()
        profile.dump_stats(out)

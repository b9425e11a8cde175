"""Runs a federation of real processes, injects faults into it and supervises it."""

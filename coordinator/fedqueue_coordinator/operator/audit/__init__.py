"""Checks what a run wrote down against the invariants."""

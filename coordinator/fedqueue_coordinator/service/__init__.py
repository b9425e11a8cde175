"""The coordinator as a process over Redis."""

"""Hooks, the trackers built on them, and what feeds them."""

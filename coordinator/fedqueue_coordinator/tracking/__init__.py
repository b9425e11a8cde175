"""Hooks by which a run is followed from outside, and the trackers that are built in."""

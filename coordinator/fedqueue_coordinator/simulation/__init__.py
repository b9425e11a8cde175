"""A federation under a virtual clock."""

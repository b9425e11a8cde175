"""A federation under a virtual clock (`virtual_clock.py`), and comparisons of several (`comparison.py`)."""

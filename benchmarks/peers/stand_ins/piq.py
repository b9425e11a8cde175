"""Stands in for `piq`, which APPFL imports for image metrics that no benchmark computes.

The real `piq` needs torchvision, whose build must match that of torch; importing this stand-in costs no time.
"""

from __future__ import annotations

brisque = total_variation = None

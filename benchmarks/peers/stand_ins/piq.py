"""Stands in for `piq`, which APPFL imports for image metrics that no run here computes.

The real one needs torchvision, whose builds have to match that of torch; an import of this costs APPFL nothing.
"""

from __future__ import annotations

brisque = total_variation = None

"""Rows read out of a first linear layer.

For a unit j that one row x alone has activated, the change of its weights is a multiple of x, and the change of its
bias is that multiple: ΔW_j / Δb_j = x (Phong et al., arXiv 1706.08359, section III; Geiping et al., arXiv 2003.14053,
proposition 3.1). Each unit gives one candidate; rows that share a unit are mixed in it.
"""

from __future__ import annotations

import numpy as np
import torch

from fedqueue.leak.statistics import Numbers

RECOVERED = 0.95
"""A row counts as recovered if its best candidate has a higher correlation with it."""
SMALLEST = 1e-12
"""A unit whose bias changed by less, relative to the largest change, gives no candidate."""


def candidates(weight_delta: torch.Tensor, bias_delta: torch.Tensor) -> torch.Tensor:
    """Return ΔW_j / Δb_j of each unit that changed, float64 (k, features); ΔW is (units, features), Δb is (units,)."""
    weight, bias = weight_delta.double(), bias_delta.double()
    changed = bias.abs() > SMALLEST * bias.abs().max()
    found = weight[changed] / bias[changed, None]
    return found[torch.isfinite(found).all(1)]


def best_matches(found: torch.Tensor, rows: torch.Tensor) -> tuple[Numbers, torch.Tensor]:
    """Return for each row, float (n, features), the correlation with its best candidate, and the candidate's index.

    Without a candidate the correlations are 0. A constant row or candidate has correlation 0 with everything.
    """
    if not len(found):
        return np.zeros(len(rows)), torch.zeros(len(rows), dtype=torch.int64)
    similarity, best = (_centred(rows.double()) @ _centred(found).T).max(1)
    return similarity.numpy(), best


def _centred(vectors: torch.Tensor) -> torch.Tensor:
    centred = vectors - vectors.mean(1, keepdim=True)
    norms = torch.linalg.vector_norm(centred, dim=1, keepdim=True)
    flat = norms <= 1e-9 * torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return torch.where(flat, 0.0, centred / norms.clamp_min(torch.finfo(torch.float64).tiny))

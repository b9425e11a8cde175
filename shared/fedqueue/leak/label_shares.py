"""The class shares of a client, read from the change of the last layer's bias.

The gradient of the cross entropy with respect to the bias of class c is the mean over the batch of p_c − [y = c]. So
the bias of a class rises with the share of the class (Zhao et al., iDLG, arXiv 2001.02610; Wainakh et al., LLG, arXiv
2105.09369).
"""

from __future__ import annotations

import numpy as np
import torch

from fedqueue.leak.statistics import Numbers, correlation

SHUFFLES = 64


def shares(labels: torch.Tensor, classes: int) -> Numbers:
    """Return the share of each class among `labels`, int64 (n,): float64 (classes,)."""
    counted: Numbers = np.bincount(labels.numpy(), minlength=classes).astype(np.float64)
    return counted / len(labels)


def label_correlation(bias_delta: torch.Tensor, true: Numbers) -> float | None:
    """Return the correlation of the bias's change, float (classes,), with the class shares; 0 if nothing changed.

    For two classes it is 1 or −1: whether the larger class was read. None where all shares are equal.
    """
    if np.ptp(true) == 0:
        return None
    return correlation(bias_delta.double().numpy(), true) or 0.0


def shuffled_correlation(bias_delta: torch.Tensor, true: Numbers, seed: int) -> float:
    """Return the mean correlation with the shares in a random order of the classes: what a guess reaches."""
    rng = np.random.default_rng(seed)
    found = [label_correlation(bias_delta, rng.permutation(true)) for _ in range(SHUFFLES)]
    return float(np.mean([value or 0.0 for value in found]))

"""Lengths and distances of long float32 vectors, in float64 and with the same bits whatever the number of threads.

torch may split a sum over threads from 32,768 elements on, and then the last bits depend on how many there are. What
decides about a version must not: a replay on another machine setting would differ. So vectors are taken in blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

BLOCK = 16_384  # elements, below what torch gives to several threads


def blocks(length: int) -> Iterator[slice]:
    """Slices of at most BLOCK elements that cover a vector of that length."""
    return (slice(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK))


def inner_product(a: torch.Tensor, b: torch.Tensor) -> float:
    """⟨a, b⟩ for two vectors of one length; one block of temporary memory."""
    return sum(float((a[part].double() * b[part].double()).sum()) for part in blocks(len(a)))


def squared_distances(vectors: Sequence[torch.Tensor], scales: Sequence[float]) -> torch.Tensor:
    """‖s_i v_i − s_j v_j‖², float64 [K, K]. Temporary memory: K + 1 blocks of float64."""
    count = len(vectors)
    distances = torch.zeros(count, count, dtype=torch.float64)
    for part in blocks(len(vectors[0])):
        rows = [vector[part].double() * scale for vector, scale in zip(vectors, scales, strict=True)]
        for i in range(count):
            for j in range(i):
                difference = rows[i] - rows[j]
                distances[i, j] += (difference * difference).sum()
    return distances + distances.T

"""Inner products and distances of long float32 vectors, in float64, with the same bits for any number of threads.

From 32,768 elements on, torch may split a sum over threads, and the last bits then depend on the number of threads.
A value that decides about a version must not depend on it, or a replay with another number of threads would differ.
So vectors are reduced in blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

BLOCK = 16_384  # elements; torch gives a vector of this length to one thread


def blocks(length: int) -> Iterator[slice]:
    """Yield slices of at most BLOCK elements that cover a vector of `length` elements."""
    return (slice(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK))


def inner_product(a: torch.Tensor, b: torch.Tensor) -> float:
    """⟨a, b⟩ for two vectors of the same length. Temporary memory: a few blocks of float64."""
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

"""Random numbers that nobody can predict who lacks the key: AES-256 in counter mode, and Gaussians made of it.

Noise from a generator such as `torch.normal` or `numpy.random` is no protection: their state follows from a seed of 32
or 64 bits, or from the numbers themselves.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

KEY_BYTES = 32
GRID_BITS = 18
"""`with_noise` rounds to the largest power of two that is at most σ / 2^GRID_BITS."""
PIECE = 2**20
"""Normal deviates that are made at a time."""


class SecretRandom:
    """A stream of random numbers that follows from a secret key and a purpose; streams of other purposes differ."""

    def __init__(self, key: bytes, purpose: str) -> None:
        """`key` has 32 random bytes, which are used for one job and then forgotten."""
        # Here, because most runs need none of it: 8 MB in each worker.
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.ciphers import Cipher
        from cryptography.hazmat.primitives.ciphers.algorithms import AES
        from cryptography.hazmat.primitives.ciphers.modes import CTR
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        if len(key) != KEY_BYTES:
            raise ValueError(f"a key has {KEY_BYTES} bytes, not {len(key)}")
        derived = HKDF(hashes.SHA256(), KEY_BYTES, None, f"fedqueue/1 {purpose}".encode()).derive(key)
        self._cipher = Cipher(AES(derived), CTR(bytes(16))).encryptor()

    def words(self, count: int) -> npt.NDArray[np.uint64]:
        """Return `count` words, uniform in [0, 2⁶⁴)."""
        return np.frombuffer(self._cipher.update(bytes(8 * count)), "<u8")

    def words_into(self, words: npt.NDArray[np.uint64]) -> None:
        """Fill a contiguous array with the next words."""
        data = words.view(np.uint8)
        self._cipher.update_into(bytes(len(data)), data.data)

    def chosen(self, count: int, rate: float) -> npt.NDArray[np.int64]:
        """Return which of `count` rows are included, each independently with probability `rate`, in order."""
        words = self.words(count)
        if rate >= 1.0:
            return np.arange(count)
        return np.flatnonzero(words < np.uint64(int(rate * 2**64)))

    def normals(self, count: int) -> torch.Tensor:
        """Return standard normal deviates, float64 (count,): Box and Muller, 1958, of two words for a pair.

        None lies beyond √(128 · log 2) = 9.4; the tails that are missing have a probability below 10⁻²⁰.
        """
        import torch

        return torch.cat([self._pairs(min(PIECE, count - at)) for at in range(0, count, PIECE)] or [torch.zeros(0)])

    def _pairs(self, count: int) -> torch.Tensor:
        import torch

        half = -(-count // 2)
        uniform = torch.from_numpy((self.words(2 * half).astype(np.float64) + 1.0) * 2.0**-64)  # in (0, 1]
        radius, angle = (-2.0 * uniform[:half].log()).sqrt(), 2 * math.pi * uniform[half:]
        return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count]


def with_noise(values: torch.Tensor, deviation: float, random: SecretRandom) -> torch.Tensor:
    """Return `values`, float64 (n,), plus Gaussian noise of this standard deviation, rounded to a grid.

    A sum of floating-point numbers has low bits that depend on `values` (Mironov, CCS 2012). The grid, a power of two
    near σ / 2¹⁸, is coarser than those bits.
    """
    grid = 2.0 ** (math.floor(math.log2(deviation)) - GRID_BITS)
    noise = random.normals(values.numel()).to(values.device)
    return ((values + deviation * noise) / grid).round() * grid

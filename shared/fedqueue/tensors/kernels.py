"""Compiled loops that decode and add in one pass: into += weight · x, with x in an encoding of `encodings.py`.

A tensor library decodes into a float32 buffer and adds that buffer: two passes, of which the second takes as long as
adding float32. numba compiles these loops at their first use (half a second, 130 MiB of memory), so only a coordinator
with encoded updates pays for it. Each operation is rounded by itself, so the bits are those of float32 arithmetic on
any processor.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic


def _widen(typing: Any, bits: Any) -> Any:
    """Convert the bits of a float16 to float32: numba lacks the type, but the processor has the instruction."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


_half: Any = intrinsic(_widen)


def _float16(into: Any, bits: Any, weight: Any, first: Any) -> None:
    for i in range(into.size):
        x = weight * _half(bits[i])
        into[i] = x if first else into[i] + x


def _bfloat16(into: Any, bits: Any, weight: Any, first: Any) -> None:
    for i in range(into.size):
        x = weight * np.uint32(np.uint32(bits[i]) << np.uint32(16)).view(np.float32)
        into[i] = x if first else into[i] + x


def _int8(into: Any, levels: Any, scales: Any, block: Any, weight: Any, first: Any) -> None:
    for b in range(scales.size):
        # With slices instead of one index, the inner loop is compiled to vector instructions.
        rows, row = into[b * block : (b + 1) * block], levels[b * block : (b + 1) * block]
        for i in range(rows.size):
            x = weight * (scales[b] * np.float32(row[i]))
            rows[i] = x if first else rows[i] + x


def _topk(into: Any, steps: Any, values: Any, weight: Any) -> bool:
    position = np.int64(-1)
    for i in range(steps.size):
        position += steps[i]
        if steps[i] == 0 or position >= into.size:
            return False
        into[position] += weight * values[i]
    return True


def _read_only(dtype: Any) -> Any:
    return types.Array(dtype, 1, "C", readonly=True)


_FLOATS, _NUMBER = types.float32[::1], types.float32
_KERNELS = {
    "float16": (_float16, types.void(_FLOATS, _read_only(types.uint16), _NUMBER, types.boolean)),
    "bfloat16": (_bfloat16, types.void(_FLOATS, _read_only(types.uint16), _NUMBER, types.boolean)),
    "int8": (
        _int8,
        types.void(_FLOATS, _read_only(types.int8), _read_only(_NUMBER), types.int64, _NUMBER, types.boolean),
    ),
    "topk": (_topk, types.boolean(_FLOATS, _read_only(types.uint32), _read_only(_NUMBER), _NUMBER)),
}


@cache
def kernel(name: str) -> Callable[..., Any]:
    """The compiled loop of an encoding, which releases the GIL. With `first`, into = weight · x.

    - `float16`, `bfloat16`: (into, bits uint16, weight, first), into and bits of one length
    - `int8`: (into, levels int8, scales float32, block, weight, first), ⌈n / block⌉ scales for n levels
    - `topk`: (into, steps uint32, values float32, weight) → False at the first repeated index or index beyond `into`;
      the values before it were added
    """
    loop, signature = _KERNELS[name]
    compiled: Callable[..., Any] = numba.njit(signature, nogil=True)(cast(Any, loop))
    return compiled

"""The section `[compression]`: how a model and an update are made smaller on the wire."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedqueue.config.sections import Section

DENSE = ("float32", "float16", "bfloat16", "int8")
SPARSE = ("topk", "randomk")


class CompressionConfig(Section):
    """Parameters only: running statistics and counters travel as they are. docs/compression.md says what to choose."""

    up: Literal["float32", "float16", "bfloat16", "int8", "topk", "randomk"] = "float32"
    """What a worker sends of its delta; `topk` and `randomk` add what they left out to the client's next delta."""
    down: Literal["float32", "float16", "bfloat16", "int8"] = "float32"
    """What a worker gets of the model; the coordinator goes on with its own, in float32."""
    up_lossless: Literal["none", "zstd"] = "none"
    """On top of `up`, and without any loss."""
    down_lossless: Literal["none", "zstd"] = "none"
    """On top of `down`."""
    k: Annotated[float, Field(gt=0, le=1)] = 0.01
    """`topk` and `randomk`: the share of the parameters that an update holds."""
    block: Annotated[int, Field(ge=16, le=65_536)] = 256
    """`int8`: how many parameters share a scale."""

"""The section `[compression]`: how a model and an update are encoded for the network."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedqueue.config.sections import Section

DENSE = ("float32", "float16", "bfloat16", "int8")
SPARSE = ("topk", "randomk")


class CompressionConfig(Section):
    """Encodes parameters only; running statistics and counters are sent unchanged. docs/compression.md compares the
    encodings."""

    uplink: Literal["float32", "float16", "bfloat16", "int8", "topk", "randomk"] = "float32"
    """Encoding of a worker's update; `topk` and `randomk` add what they leave out to the client's next update."""
    downlink: Literal["float32", "float16", "bfloat16", "int8"] = "float32"
    """Encoding of the published model; the coordinator keeps its own parameters in float32."""
    uplink_lossless: Literal["none", "zstd"] = "none"
    """Lossless compression of the encoded update."""
    downlink_lossless: Literal["none", "zstd"] = "none"
    """Lossless compression of the encoded model."""
    topk_ratio: Annotated[float, Field(gt=0, le=1)] = 0.01
    """`topk` and `randomk`: the fraction of the parameters that an update contains."""
    int8_block: Annotated[int, Field(ge=16, le=65_536)] = 256
    """`int8`: the number of consecutive parameters that share a scale."""

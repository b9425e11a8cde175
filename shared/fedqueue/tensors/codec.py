"""What travels in one direction of a run: a frame as bytes of a size that the receiver knows, and back.

    the parameters, encoded (`compression.py`)   padding to 8 bytes
    floating buffers, float32                    padding to 8 bytes
    counters, int64                              … and, where it is asked for, all of it under zstd (`zstd.py`)

With float32 the frame's own buffer travels, and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from fedqueue.config.compression import CompressionConfig
from fedqueue.errors import ManifestMismatch, WireError
from fedqueue.tensors import zstd
from fedqueue.tensors.encodings import ENCODINGS, MOST_INDICES, Bytes, Encoding
from fedqueue.tensors.frame import Delta, Frame, Manifest, Piece, align


@dataclass(frozen=True)
class Codec:
    """An encoding (None: float32), with or without zstd, for the frames of one manifest."""

    manifest: Manifest
    encoding: Encoding | None = None
    zstd: bool = False

    @property
    def name(self) -> str:
        """As the header of an update says it."""
        return (self.encoding.name if self.encoding else "float32") + ("+zstd" if self.zstd else "")

    @property
    def identity(self) -> bool:
        """Whether a frame's buffer travels as it is."""
        return self.encoding is None and not self.zstd

    @property
    def nbytes(self) -> int:
        """Bytes of an encoded frame, before zstd."""
        if self.encoding is None:
            return self.manifest.nbytes
        buffers = self.manifest.floats - self.manifest.parameters
        return align(self.encoding.size(self.manifest.parameters)) + align(4 * buffers) + 8 * self.manifest.counters

    @property
    def largest(self) -> int:
        """The most bytes that may travel."""
        return zstd.bound(self.nbytes) if self.zstd else self.nbytes

    def accepts(self, nbytes: int) -> bool:
        """Whether so many bytes may be a frame: checked before memory is taken for them."""
        return zstd.PREFIX < nbytes <= self.largest if self.zstd else nbytes == self.nbytes

    def encode(self, frame: Frame, seed: int) -> Bytes:
        """`frame` as it travels, uint8; its own buffer where it travels as it is. `seed` ≥ 0 decides what is random."""
        data = frame.buffer
        if self.encoding:
            data = np.zeros(self.nbytes, np.uint8)
            encoded = Encoded(self.manifest, self.encoding, data)
            self.encoding.encode(frame.parameters, encoded.head, seed)
            encoded.buffers.copy_(frame.buffers)
            encoded.counters.copy_(frame.counters)
        return zstd.pack(data, self._width) if self.zstd else data

    def decode(self, wire: Bytes) -> Delta:
        """The inverse of `encode`; what is encoded is decoded piece by piece, when it is asked for.

        Raises WireError for what is not the right number of bytes, before and after zstd.
        """
        if not self.accepts(wire.nbytes):
            raise WireError(f"{self.name}: {wire.nbytes} bytes, expected {self.largest}")
        data = zstd.unpack(wire, self.nbytes, self._width) if self.zstd else wire
        return Encoded(self.manifest, self.encoding, data) if self.encoding else Frame(self.manifest, data)

    def received(self, wire: Bytes) -> Frame:
        """The frame that `wire` is for whoever receives it; it shares no memory with it. Raises as `decode`."""
        frame = self.decode(wire).whole()
        return frame.copy() if self.identity else frame

    @property
    def _width(self) -> int:
        return self.encoding.width if self.encoding else 4


class Encoded:
    """A frame whose parameters are still encoded: `data` uint8 as it was encoded, and views into it.

    `head`: the encoded parameters; `buffers`: float32; `counters`: int64.
    """

    def __init__(self, manifest: Manifest, encoding: Encoding, data: Bytes) -> None:
        self.manifest, self._encoding = manifest, encoding
        size = encoding.size(manifest.parameters)
        start, length = align(size), 4 * (manifest.floats - manifest.parameters)
        self.head = data[:size]
        self.buffers = torch.from_numpy(data[start : start + length].view(np.float32))
        self.counters = torch.from_numpy(data[start + align(length) :].view(np.int64))

    def pieces(self) -> Iterator[Piece]:
        return self._encoding.pieces(self.head, self.manifest.parameters)

    def add_to(self, into: torch.Tensor, weight: float, first: bool) -> None:
        self._encoding.add(self.head, into, weight, first)

    def whole(self) -> Frame:
        frame = Frame(self.manifest)
        for where, values in self.pieces():
            frame.parameters[where] = values
        frame.buffers.copy_(self.buffers)
        frame.counters.copy_(self.counters)
        return frame


def upward(config: CompressionConfig, manifest: Manifest) -> Codec:
    """What workers send; raises ManifestMismatch for more parameters than `topk` can number."""
    if config.up == "topk" and manifest.parameters > MOST_INDICES:
        raise ManifestMismatch(f"model: {manifest.parameters} parameters; compression.up = 'topk' takes {MOST_INDICES}")
    return _codec(config, manifest, config.up, config.up_lossless)


def downward(config: CompressionConfig, manifest: Manifest) -> Codec:
    """What workers fetch."""
    return _codec(config, manifest, config.down, config.down_lossless)


def _codec(config: CompressionConfig, manifest: Manifest, name: str, lossless_name: str) -> Codec:
    return Codec(manifest, ENCODINGS[name](config) if name in ENCODINGS else None, lossless_name == "zstd")

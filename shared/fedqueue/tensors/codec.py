"""Encodes a frame for one direction of a run, into bytes of a size that the receiver knows, and decodes it.

    the parameters, encoded (`encodings.py`)     padding to 8 bytes
    floating buffers, float32                    padding to 8 bytes
    the rest of the frame (`frame.py`)           optionally, all of it under zstd (`zstd.py`)

With float32 the frame's own buffer is sent, without a copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from fedqueue.config.compression import CompressionConfig
from fedqueue.config.schema import Config
from fedqueue.errors import ManifestMismatch, WireError
from fedqueue.tensors import zstd
from fedqueue.tensors.encodings import ENCODINGS, MOST_INDICES, Bytes, Encoding
from fedqueue.tensors.frame import Delta, Frame, Piece, split_tail
from fedqueue.tensors.manifest import SECTIONS, Manifest, align

_NO_FRAME = "ring32: the update is masked, and only the sum of a whole cohort can be decoded"
WHOLE = (*SECTIONS, "changed")
"""The parts of a frame that are not encoded."""


@dataclass(frozen=True)
class Codec:
    """An encoding (None means float32), with or without zstd, for the frames of one manifest."""

    manifest: Manifest
    encoding: Encoding | None = None
    zstd: bool = False

    @property
    def name(self) -> str:
        """The name in the header of an update, such as `int8+zstd`."""
        return (self.encoding.name if self.encoding else "float32") + ("+zstd" if self.zstd else "")

    @property
    def identity(self) -> bool:
        """Whether a frame's buffer is sent unchanged."""
        return self.encoding is None and not self.zstd

    @property
    def nbytes(self) -> int:
        """Bytes of an encoded frame, before zstd."""
        if self.encoding is None:
            return self.manifest.nbytes
        buffers = self.manifest.floats - self.manifest.parameters
        return align(self.encoding.size(self.manifest.parameters)) + align(4 * buffers) + self.manifest.tail_nbytes

    @property
    def largest(self) -> int:
        """Upper bound on the bytes of an encoded frame, with zstd."""
        return zstd.bound(self.nbytes) if self.zstd else self.nbytes

    def accepts(self, nbytes: int) -> bool:
        """Whether an encoded frame may have this size: checked before memory is allocated for it."""
        return zstd.PREFIX < nbytes <= self.largest if self.zstd else nbytes == self.nbytes

    def encode(self, frame: Frame, seed: int) -> Bytes:
        """The encoded frame, uint8; the frame's own buffer if `identity`. `seed` ≥ 0 seeds random choices."""
        data = frame.buffer
        if self.encoding:
            data = np.zeros(self.nbytes, np.uint8)
            encoded = Encoded(self.manifest, self.encoding, data)
            self.encoding.encode(frame.parameters, encoded.head, seed)
            for part in WHOLE:
                getattr(encoded, part).copy_(getattr(frame, part))
        return zstd.pack(data, self._width) if self.zstd else data

    def decode(self, wire: Bytes) -> Delta:
        """The inverse of `encode`; parameters are decoded lazily, piece by piece.

        Raises WireError for a wrong number of bytes, before or after zstd.
        """
        if not self.accepts(wire.nbytes):
            raise WireError(f"{self.name}: {wire.nbytes} bytes, expected {self.largest}")
        data = zstd.unpack(wire, self.nbytes, self._width) if self.zstd else wire
        return Encoded(self.manifest, self.encoding, data) if self.encoding else Frame(self.manifest, data)

    def received(self, wire: Bytes) -> Frame:
        """Decode `wire` into a new frame that shares no memory with it; raises as `decode`, and for invalid bytes."""
        frame = self.decode(wire).whole()
        return frame.copy() if self.identity else frame

    @property
    def _width(self) -> int:
        return self.encoding.width if self.encoding else 4


@dataclass(frozen=True)
class MaskedCodec(Codec):
    """The codec of updates in a run with keepers: little-endian words of 32 bits, one for each parameter.

    The words are the update's plus those of its masks (`fedqueue.secure`), so that they decode to no frame.
    """

    counts_examples: bool = False
    """Whether one more word follows: the number of examples, masked as the others are."""

    @property
    def name(self) -> str:
        """The name in the header of an update."""
        return "ring32"

    @property
    def identity(self) -> bool:
        """As `Codec.identity`: never."""
        return False

    @property
    def nbytes(self) -> int:
        """Bytes of a masked update."""
        return 4 * (self.manifest.parameters + self.counts_examples)

    def encode(self, frame: Frame, seed: int) -> Bytes:
        """Raises WireError: `fedqueue.secure` masks an update."""
        raise WireError(_NO_FRAME)

    def decode(self, wire: Bytes) -> Delta:
        """Raises WireError: a masked update is part of a sum only."""
        raise WireError(_NO_FRAME)


class Encoded:
    """A frame whose parameters are still encoded: the uint8 array `data`, and views into it.

    `head`: the encoded parameters; `buffers`: float32; `doubles`: float64; `counters`: int64; `changed`: uint8.
    """

    def __init__(self, manifest: Manifest, encoding: Encoding, data: Bytes) -> None:
        self.manifest, self._encoding = manifest, encoding
        size = encoding.size(manifest.parameters)
        start, length = align(size), 4 * (manifest.floats - manifest.parameters)
        self.head = data[:size]
        self.buffers = torch.from_numpy(data[start : start + length].view(np.float32))
        self.doubles, self.counters, self.changed = split_tail(manifest, data[start + align(length) :])

    def pieces(self) -> Iterator[Piece]:
        """As `Delta.pieces`."""
        return self._encoding.pieces(self.head, self.manifest.parameters)

    def add_to(self, into: torch.Tensor, weight: float, first: bool) -> None:
        """As `Delta.add_to`."""
        self._encoding.add(self.head, into, weight, first)

    def whole(self) -> Frame:
        """As `Delta.whole`."""
        frame = Frame(self.manifest)
        for where, values in self.pieces():
            frame.parameters[where] = values
        for part in WHOLE:
            getattr(frame, part).copy_(getattr(self, part))
        return frame


def update_codec(config: Config, manifest: Manifest) -> Codec:
    """The codec of the updates of a run, which are masked where it has keepers; raises as `uplink_codec`."""
    if config.secure.on:
        return MaskedCodec(manifest, counts_examples=config.sums_examples)
    return uplink_codec(config.compression, manifest)


def uplink_codec(config: CompressionConfig, manifest: Manifest) -> Codec:
    """The codec of updates that are not masked.

    Raises ManifestMismatch for more parameters than `topk` can index.
    """
    if config.uplink == "topk" and manifest.parameters > MOST_INDICES:
        raise ManifestMismatch(
            f"model: {manifest.parameters} parameters; compression.uplink = 'topk' takes {MOST_INDICES}"
        )
    return _codec(config, manifest, config.uplink, config.uplink_lossless)


def downlink_codec(config: CompressionConfig, manifest: Manifest) -> Codec:
    """The codec of versions."""
    return _codec(config, manifest, config.downlink, config.downlink_lossless)


def _codec(config: CompressionConfig, manifest: Manifest, name: str, lossless_name: str) -> Codec:
    return Codec(manifest, ENCODINGS[name](config) if name in ENCODINGS else None, lossless_name == "zstd")

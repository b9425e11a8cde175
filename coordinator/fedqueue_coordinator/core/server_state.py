"""Packs the server's state, which is committed with each version, as bytes.

Its parts are maps of tensors: the server optimizer's moments, an aggregation's cache, the outlier filter's estimates
and, if published versions are rounded, the exact parameters.
"""

from __future__ import annotations

from collections.abc import Mapping

import safetensors
import safetensors.torch
import torch

from fedqueue.errors import StoreError

State = Mapping[str, torch.Tensor]

OPTIMIZER, AGGREGATION, FILTER = "optimizer", "aggregation", "filter"
MODEL = "model"  # the exact parameters, where published versions are rounded: `compression.downlink`


def save_state(parts: Mapping[str, State]) -> bytes:
    """Pack all tensors as one safetensors file, under the names PART:NAME; b"" without tensors."""
    tensors = {f"{part}:{name}": value for part, state in parts.items() for name, value in state.items()}
    return safetensors.torch.save(tensors) if tensors else b""


def load_state(data: bytes) -> dict[str, dict[str, torch.Tensor]]:
    """Unpack what `save_state` packed, bit for bit; raises StoreError for other bytes."""
    parts: dict[str, dict[str, torch.Tensor]] = {OPTIMIZER: {}, AGGREGATION: {}, FILTER: {}, MODEL: {}}
    try:
        tensors = safetensors.torch.load(data) if data else {}
    except safetensors.SafetensorError as error:
        raise StoreError(f"the server's state cannot be read: {error}") from error
    for name, value in tensors.items():
        part, _, rest = name.partition(":")
        if part not in parts:
            raise StoreError(f"the server's state has a part {part!r}, which this version of fedqueue does not know")
        parts[part][rest] = value
    return parts

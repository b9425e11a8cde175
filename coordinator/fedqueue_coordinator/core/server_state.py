"""What the server remembers from version to version, as bytes that are committed with each version.

Parts such as the server optimizer's moments, an aggregation's cache and a filter's estimates: each a map of tensors.
"""

from __future__ import annotations

from collections.abc import Mapping

import safetensors
import safetensors.torch
import torch

from fedqueue.errors import StoreError

State = Mapping[str, torch.Tensor]

OPTIMIZER, AGGREGATION, FILTER = "optimizer", "aggregation", "filter"
MODEL = "model"  # its exact parameters, where what is published is rounded: `compression.down`


def save_state(parts: Mapping[str, State]) -> bytes:
    """Every part's tensors as one safetensors file, named PART:NAME; b"" where there are none."""
    tensors = {f"{part}:{name}": value for part, state in parts.items() for name, value in state.items()}
    return safetensors.torch.save(tensors) if tensors else b""


def load_state(data: bytes) -> dict[str, dict[str, torch.Tensor]]:
    """The inverse of `save_state`, bit for bit; raises StoreError where `data` is no such state."""
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

"""Times a round of APPFL's masks in one process, and tries what they protect: `appfl_masks.py PARAMETERS`.

Uses the class that masks and the aggregator that APPFL ships, without a network between them. Prints JSON.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import torch
from appfl.algorithm.aggregator import FedAvgAggregator
from appfl.privacy import SecureAggregator
from omegaconf import OmegaConf

CLIENTS, EXAMPLES, SCALE = 10, 100, 0.01
SECRET, CPU = b"one secret of all clients", torch.device("cpu")
NAMES = [f"client-{number}" for number in range(CLIENTS)]
Payload = dict[str, Any]


def masked(name: str, vector: Any, names: list[str], examples: int = EXAMPLES, round_id: int = 1) -> Payload:
    """What APPFL's trainer sends in place of a model."""
    aggregator = SecureAggregator(name, names, SECRET, CPU)
    flat, shapes = aggregator.mask_update({"w": torch.from_numpy(vector)}, round_id)
    return {"type": "masked_update_flat", "flat": flat, "shapes": shapes, "num_examples": examples}


def mean(payloads: dict[str, Payload], weights: str = "equal") -> Any:
    """The mean that APPFL's aggregator makes of masked updates."""
    aggregator = FedAvgAggregator(
        aggregator_configs=OmegaConf.create({"use_secure_agg": True, "client_weights_mode": weights})
    )
    return aggregator.aggregate(payloads)["w"].numpy()


def main(parameters: int) -> Payload:
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    vectors = [(SCALE * rng.standard_normal(parameters)).astype(np.float32) for _ in NAMES]
    begun = time.perf_counter()
    payloads = {name: masked(name, vector, NAMES) for name, vector in zip(NAMES, vectors, strict=True)}
    clients = time.perf_counter() - begun
    found = mean(payloads)
    whole = time.perf_counter() - begun
    expected = np.mean([vector.astype(np.float64) for vector in vectors], axis=0)
    return {
        "round": whole, "clients": clients / CLIENTS, "server": whole - clients,
        "bytes": payloads[NAMES[0]]["flat"].nbytes / parameters, "error": float(np.abs(found - expected).max()),
        "tried": tried(),
    }  # fmt: skip


def tried(parameters: int = 2000) -> dict[str, bool]:
    """What was tried against the code as it is installed, and whether it succeeded."""
    names = NAMES[:CLIENTS]
    direction = np.random.default_rng(1).standard_normal(parameters).astype(np.float32)
    direction *= 30 / np.linalg.norm(direction)
    payload = masked(names[0], direction, names)
    own = SecureAggregator(names[0], names, SECRET, CPU).make_pairwise_mask(parameters, 1)  # by any holder of SECRET
    deviations = float(payload["flat"].numpy() @ direction / np.linalg.norm(direction)) / np.sqrt(CLIENTS - 1)
    zeros = np.zeros(parameters, np.float32)
    unequal = {name: masked(name, zeros, names, examples=10 * (1 + i)) for i, name in enumerate(names)}
    return {
        "any client's secret takes the mask off any update": bool(
            torch.allclose(payload["flat"] - own, torch.from_numpy(direction), atol=1e-5)
        ),
        "a guess of an update of norm 30 is confirmed from one masked vector, at 5 standard deviations": bool(
            deviations > 5
        ),
        "masks stay in the mean where the server weighs by examples": bool(
            np.abs(mean(unequal, "sample_size")).max() > 0.1
        ),
        "the server sees how many examples each client has": _needs_examples(unequal),
    }


def _needs_examples(payloads: dict[str, Payload]) -> bool:
    """Whether the aggregator refuses updates that do not tell them, also with equal weights."""
    silent = {name: {k: v for k, v in payload.items() if k != "num_examples"} for name, payload in payloads.items()}
    try:
        mean(silent)
    except KeyError as error:
        return str(error) == "'num_examples'"
    return False


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]))))

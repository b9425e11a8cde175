"""Times a round of masks in one process, and tries what they protect: `fedqueue_masks.py PARAMETERS KEEPERS`.

Uses the classes of workers, coordinator and keepers, without a network between them, and without signatures, which the
peers' rounds do not have either. Prints JSON.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import torch

from fedqueue.config.schema import Config
from fedqueue.protocol.messages import Cohort, MaskedUpdate, MaskRefused, Offer, Order, Update
from fedqueue.protocol.signed_envelope import Scope
from fedqueue.secure.cohort import offer_digest
from fedqueue.secure.keeper import Keeper, MemoryLog, Unverified
from fedqueue.secure.masked_update import Attempt, Masking
from fedqueue.secure.masks import new_seed
from fedqueue.secure.ring import ring_of
from fedqueue.secure.seed_envelope import KeeperPrivateKey
from fedqueue.tensors.blobs import BlobBuffer
from fedqueue.tensors.frame import Frame
from fedqueue.tensors.manifest import PARAMETER, Manifest, TensorSpec
from fedqueue_coordinator.algorithms.masked_sum import MaskedSum
from fedqueue_coordinator.algorithms.registry import make_aggregator

CLIENTS, EXAMPLES, SCALE, BASE_MODEL = 10, 100, 0.01, "0" * 64
SCOPE = Scope("round", "benchmark")


class Round:
    """A version of ten updates, weighted by examples, whose numbers are hidden."""

    def __init__(self, parameters: int, keepers: int) -> None:
        self.config = Config(
            task={"entrypoint": "task.py:T"}, stop={"versions": 1}, clients={"count": CLIENTS},
            aggregation={"strategy": "fedavg", "cohort_size": CLIENTS},
            secure={
                "keepers": [f"keeper-{number}" for number in range(keepers)], "max_examples": EXAMPLES,
                "examples": "hidden", "clip_norm": 100.0,
            },
        )  # fmt: skip
        self.manifest = Manifest((TensorSpec("w", "float32", (parameters,), 0, parameters, PARAMETER),))
        self.masking, ring = Masking(self.config, self.manifest), ring_of(self.config, self.manifest)
        self.aggregator, self.model = make_aggregator(self.config), Frame(self.manifest)
        self.sum = MaskedSum(self.aggregator.init(self.manifest), ring, self.config)
        self.level = ring.weight_levels
        self.keepers = [
            Keeper(
                name, self.config, parameters, SCOPE, Unverified(), MemoryLog(), KeeperPrivateKey.generate(), new_seed()
            )
            for name in self.config.secure.keepers
        ]

    def mask(self, number: int, vector: Any) -> tuple[MaskedUpdate, BlobBuffer]:
        delta = Frame(self.manifest)
        delta.parameters.copy_(torch.from_numpy(vector))
        client = f"client-{number}"
        order = Order(run="round", job=f"round-{number}", client=client, seed=number, training=self.config.training)
        update = Update(examples=EXAMPLES, nbytes=delta.buffer.nbytes, chunks=1, seconds=0.1)
        keys = [keeper.key.public for keeper in self.keepers]
        return self.masking.mask(update, delta, order, Attempt(SCOPE, 1, 0, BASE_MODEL), keys)


def main(parameters: int, keepers: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    vectors = [(SCALE * rng.standard_normal(parameters)).astype(np.float32) for _ in range(CLIENTS)]
    one = Round(parameters, keepers)
    begun = time.perf_counter()
    masked = [one.mask(number, vector) for number, vector in enumerate(vectors)]
    clients = time.perf_counter() - begun
    offers = [
        Offer(client=f"client-{n}", job=f"round-{n}", attempt=1, base=0, header=header.pack())
        for n, (header, _) in enumerate(masked)
    ]
    at_keepers = time.perf_counter()
    refusals = {keeper.offer(offer).refusal for keeper in one.keepers for offer in offers}
    keeper_seconds = time.perf_counter() - at_keepers
    assert refusals == {""}, refusals
    for header, payload in masked:
        one.sum.add([payload.view(np.uint32)], one.level, header.examples, 0)
    members = tuple((offer_digest(offer), one.level) for offer in offers)
    at_keepers = time.perf_counter()
    cohort = Cohort(version=0, members=members).pack()
    released = [keeper.release(cohort) for keeper in one.keepers]
    words = [_words(release) for release in released]
    keeper_seconds += time.perf_counter() - at_keepers
    for masks in words:
        one.sum.subtract([masks])
    assert not one.sum.problem(), one.sum.problem()
    found = one.sum.finish(one.aggregator, one.model).delta.numpy()
    whole = time.perf_counter() - begun
    expected = np.mean([vector.astype(np.float64) for vector in vectors], axis=0)
    return {
        "round": whole, "clients": clients / CLIENTS, "server": whole - clients - keeper_seconds,
        "keepers": keeper_seconds / keepers, "bytes": masked[0][1].nbytes / parameters,
        "error": float(np.abs(found - expected).max()), "tried": tried(one, members, masked),
    }  # fmt: skip


def _words(release: Any) -> Any:
    assert not isinstance(release, MaskRefused), release
    return np.concatenate([piece.copy() for piece in release.pieces()])


def tried(one: Round, members: Any, masked: list[tuple[MaskedUpdate, BlobBuffer]]) -> dict[str, bool]:
    """What was tried against the code as it is installed, and whether it succeeded."""
    without = Cohort(version=1, members=members[1:]).pack()
    return {
        "a keeper also releases the sum without one client": any(
            not isinstance(keeper.release(without), MaskRefused) for keeper in one.keepers
        ),
        "the coordinator sees how many examples each client has": {header.examples for header, _ in masked} != {0},
    }


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]))))

"""Whoever lacks one component of the masks sees the same bytes for any two inputs of the same weighted sum.

AES is replaced by a table of random words for the one component that the coalition lacks: then the statement is exact.
For other inputs with the same sum, the table is shifted by their difference, which is as likely as the first table.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fedqueue.secure import masks
from fedqueue.secure.keeper import Release
from fedqueue.secure.masks import MASK, MaskStream, add_masks, new_seed
from tests.support.masked_run import MaskedRun, Posted, words

CLIENTS, PARAMETERS = "abcd", 40
WEIGHTS = np.array([8, 8, 4, 4])
BASES = [3, 3, 0, 0]
Table = dict[bytes, npt.NDArray[np.uint32]]


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Table:
    """Seed → the words of its mask, for seeds whose stream is ideal."""
    found: Table = {}

    class Ideal(MaskStream):
        def __init__(self, seed: bytes, use: bytes = MASK) -> None:
            super().__init__(seed, use)
            self.left = found[seed].copy() if use == MASK and seed in found else None

        def next_into(self, into: Any) -> None:
            if self.left is None:
                super().next_into(into)
            else:
                into[:], self.left = self.left[: len(into)], self.left[len(into) :]

    monkeypatch.setattr(masks, "MaskStream", Ideal)
    return found


def inputs(seed: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Two different sets of updates, int32 [4, d], with the same weighted sum."""
    random = np.random.default_rng(seed)
    first = random.integers(-(2**20), 2**20, (4, PARAMETERS)).astype(np.int32)
    moved = random.integers(-(2**18), 2**18, (3, PARAMETERS))
    change = np.stack([moved[0] + moved[1], -moved[0], moved[2], -moved[2] - 2 * moved[1]])
    assert not (WEIGHTS @ change).any()
    return first, (first + change).astype(np.int32)


def views(
    run: MaskedRun, posted: list[Posted], keepers: list[str]
) -> tuple[list[Any], dict[str, npt.NDArray[np.uint32]]]:
    """All that Redis carries once the cohort is released: headers, payloads, answers, and each keeper's mask."""
    answers: list[Any] = []
    released = {}
    signed = run.propose(3, posted)
    for name in keepers:
        keeper = run.start(name, log=run.logs[name])
        answers += [keeper.offer(update.offer) for update in posted]
        answer = keeper.release(signed)
        assert isinstance(answer, Release), answer
        released[name] = words(answer)
    return [[(update.offer, update.payload.tobytes()) for update in posted], signed, answers], released


@pytest.mark.parametrize(("keepers", "lacking"), [(n, k) for n in (1, 2, 3) for k in range(n)])
def test_coalition_without_one_component_sees_the_same_bytes(
    tmp_path: Path, table: Table, keepers: int, lacking: int
) -> None:
    names = [f"k{i}" for i in range(keepers)]
    run = MaskedRun(tmp_path, clients=CLIENTS, keepers=names, parameters=PARAMETERS)
    first, second = inputs(keepers)
    seeds = [[new_seed() for _ in names] for _ in CLIENTS]
    for of_client in seeds:
        table[of_client[lacking]] = np.random.default_rng(of_client[lacking][0]).integers(
            0, 2**32, PARAMETERS, np.uint32
        )
    posted = [
        run.sign(client, base, add_masks(x.copy(), of_client), of_client)
        for client, base, x, of_client in zip(CLIENTS, BASES, first, seeds, strict=True)
    ]
    secret = np.stack([table[of_client[lacking]] for of_client in seeds])
    seen, released = views(run, posted, names)

    for of_client, x, other in zip(seeds, first, second, strict=True):
        table[of_client[lacking]] += (x - other).view(np.uint32)
    again = [
        Posted(update.offer, add_masks(other.copy(), of_client))
        for update, other, of_client in zip(posted, second, seeds, strict=True)
    ]
    for name in names:  # a second world, in which nothing was released yet
        run.logs[name] = type(run.logs[name])()
    seen_again, released_again = views(run, again, names)

    assert seen == seen_again
    assert {name: mask.tobytes() for name, mask in released.items()} == {
        name: mask.tobytes() for name, mask in released_again.items()
    }
    assert not np.array_equal(secret, np.stack([table[of_client[lacking]] for of_client in seeds]))


def test_coalition_sees_another_sum(tmp_path: Path, table: Table) -> None:
    """The comparison above would notice a difference: inputs of another sum give other masks."""
    run = MaskedRun(tmp_path, clients=CLIENTS, keepers=["k0"], parameters=PARAMETERS)
    seeds = [[new_seed()] for _ in CLIENTS]
    masked = [np.full(PARAMETERS, 5, np.uint32) for _ in CLIENTS]
    posted = [
        run.sign(client, base, y, of_client)
        for client, base, y, of_client in zip(CLIENTS, BASES, masked, seeds, strict=True)
    ]
    released = []
    for value in (0, 1):
        table.update({of_client[0]: np.full(PARAMETERS, value, np.uint32) for of_client in seeds})
        run.logs["k0"] = type(run.logs["k0"])()
        released.append(views(run, posted, ["k0"])[1]["k0"].tobytes())
    assert released[0] != released[1]


def test_coalition_with_every_component_has_each_update(tmp_path: Path) -> None:
    """The attack that has to succeed: keepers that all collude with the coordinator hide nothing."""
    run = MaskedRun(tmp_path, clients=CLIENTS, parameters=PARAMETERS)
    first, _ = inputs(7)
    for client, x in zip(CLIENTS, first, strict=True):
        update = run.post(client, vector=x)
        recovered = update.payload.copy()
        for keeper in run.running.values():
            assert keeper.offer(update.offer).refusal == ""
            held = keeper._held[update.header]
            mask = np.empty(PARAMETERS, np.uint32)
            MaskStream(held.seed).next_into(mask)
            recovered -= mask
        assert recovered.view(np.int32).tolist() == x.tolist()

"""Splits one dataset over clients, to emulate a federation with data that lies in one place.

Each function is deterministic in `seed`. It returns one array of indices per client, int64 and sorted; each index is
in exactly one of the arrays. All raise ValueError for fewer examples than the clients need.

>>> from fedqueue import partition
>>> labels = [0, 0, 0, 0, 1, 1, 1, 1]
>>> [len(share) for share in partition.iid(len(labels), clients=3)]
[3, 3, 2]
>>> shares = partition.split("dirichlet", labels, clients=2, alpha=0.5, seed=1)
>>> sorted(int(index) for share in shares for index in share)
[0, 1, 2, 3, 4, 5, 6, 7]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


def iid(examples: int, clients: int, seed: int = 0) -> list[Indices]:
    """Split a random permutation of `examples` indices into shares whose sizes differ by at most one."""
    _check(examples, clients, 1)
    order = np.random.default_rng(seed).permutation(examples)
    return [np.sort(part).astype(np.int64) for part in np.array_split(order, clients)]


def dirichlet(labels: npt.ArrayLike, clients: int, alpha: float, seed: int = 0, minimum: int = 2) -> list[Indices]:
    """Split with label skew: class k goes to the clients in proportions drawn from Dir(α · 1).

    With a small α each client holds few classes; a large α approaches IID (Hsu et al., arXiv 1909.06335). The
    proportions are drawn again until each client has `minimum` examples. Raises ValueError after 1,000 draws.
    """
    label = np.asarray(labels)
    _check(len(label), clients, minimum)
    _check_alpha(alpha)
    rng = np.random.default_rng(seed)
    for _ in range(1000):
        parts: list[list[Indices]] = [[] for _ in range(clients)]
        for value in np.unique(label):
            of_class = rng.permutation(np.flatnonzero(label == value))
            cuts = np.cumsum(rng.dirichlet(np.full(clients, alpha)))[:-1] * len(of_class)
            for part, piece in zip(parts, np.split(of_class, cuts.astype(int)), strict=True):
                part.append(piece)
        shares = [np.sort(np.concatenate(part)).astype(np.int64) for part in parts]
        if min(map(len, shares)) >= minimum:
            return shares
    raise ValueError(
        f"no draw of Dirichlet({alpha}) gave each of {clients} clients {minimum} of {len(label)} examples: "
        "use a larger alpha, fewer clients or a smaller minimum"
    )


def label_shards(labels: npt.ArrayLike, clients: int, shards_per_client: int = 2, seed: int = 0) -> list[Indices]:
    """Split with extreme label skew: sort by label, cut into shards, give each client `shards_per_client` of them.

    McMahan et al., arXiv 1602.05629, §3.
    """
    label = np.asarray(labels)
    if shards_per_client < 1:
        raise ValueError(f"shards_per_client = {shards_per_client}: must be at least 1")
    _check(len(label), clients, shards_per_client)
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(label))  # examples of one class are not in the file's order then
    by_label = shuffled[np.argsort(label[shuffled], kind="stable")]
    shards = np.array_split(by_label, clients * shards_per_client)
    hands = rng.permutation(len(shards)).reshape(clients, shards_per_client)
    return [np.sort(np.concatenate([shards[i] for i in hand])).astype(np.int64) for hand in hands]


def quantity(examples: int, clients: int, alpha: float, seed: int = 0, minimum: int = 2) -> list[Indices]:
    """Split with quantity skew: sizes in proportions drawn from Dir(α · 1), each at least `minimum` examples."""
    _check(examples, clients, minimum)
    _check_alpha(alpha)
    rng = np.random.default_rng(seed)
    free = examples - clients * minimum
    ends = np.floor(np.cumsum(rng.dirichlet(np.full(clients, alpha))) * free + 1e-9).astype(int)
    ends[-1] = free
    sizes = np.diff(ends, prepend=0) + minimum
    order = rng.permutation(examples)
    return [np.sort(part).astype(np.int64) for part in np.split(order, np.cumsum(sizes)[:-1])]


def split(scheme: str, labels: npt.ArrayLike, clients: int, alpha: float = 0.3, seed: int = 0) -> Sequence[Indices]:
    """Split by the scheme of that name: iid, dirichlet, shards or quantity.

    `alpha` applies to dirichlet and quantity. Raises ValueError for any other name.
    """
    label = np.asarray(labels)
    schemes: dict[str, Callable[[], list[Indices]]] = {
        "iid": lambda: iid(len(label), clients, seed),
        "dirichlet": lambda: dirichlet(label, clients, alpha, seed),
        "shards": lambda: label_shards(label, clients, seed=seed),
        "quantity": lambda: quantity(len(label), clients, alpha, seed),
    }
    if scheme not in schemes:
        raise ValueError(f"unknown partition {scheme!r}; known: {', '.join(schemes)}")
    return schemes[scheme]()


def _check(examples: int, clients: int, minimum: int) -> None:
    if clients < 1:
        raise ValueError(f"clients = {clients}: must be at least 1")
    if minimum < 0:
        raise ValueError(f"minimum = {minimum}: must be at least 0")
    if examples < max(1, clients * minimum):
        raise ValueError(f"{examples} examples cannot give each of {clients} clients at least {minimum}")


def _check_alpha(alpha: float) -> None:
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha = {alpha}: must be a finite number above 0")

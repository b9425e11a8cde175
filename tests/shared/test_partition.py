"""Every partition assigns each example to exactly one client, and the seed determines the assignment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, reject
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedqueue import partition

SCHEMES = ("iid", "dirichlet", "shards", "quantity")

clients = st.integers(1, 12)
seeds = st.integers(0, 2**31 - 1)


@st.composite
def labelled(draw: st.DrawFn) -> np.ndarray:
    """Draw int64 labels of shape (n,): 1 to 12 classes, each with 6 to 40 examples, in any order."""
    sizes = draw(st.lists(st.integers(6, 40), min_size=1, max_size=12))
    order = np.random.default_rng(draw(seeds)).permutation(sum(sizes))
    return np.repeat(np.arange(len(sizes)), sizes)[order]


def split_if_possible(scheme: str, labels: np.ndarray, clients: int, alpha: float, seed: int) -> list[np.ndarray]:
    """Return the partition; skip a case whose examples are too few, which must raise the documented error."""
    try:
        return list(partition.split(scheme, labels, clients, alpha, seed))
    except ValueError as error:
        if "cannot give each" in str(error) or "no draw" in str(error):
            reject()
        raise


@pytest.mark.parametrize("scheme", SCHEMES)
@given(labels=labelled(), clients=clients, alpha=st.floats(0.05, 100), seed=seeds)
def test_each_example_is_in_exactly_one_share(
    scheme: str, labels: NDArray[Any], clients: int, alpha: float, seed: int
) -> None:
    shares = split_if_possible(scheme, labels, clients, alpha, seed)
    assert len(shares) == clients
    assert sorted(np.concatenate(shares)) == list(range(len(labels)))


@pytest.mark.parametrize("scheme", SCHEMES)
@given(labels=labelled(), clients=clients, seed=seeds)
def test_shares_are_sorted_int64_indices_and_never_empty(
    scheme: str, labels: NDArray[Any], clients: int, seed: int
) -> None:
    for share in split_if_possible(scheme, labels, clients, 0.5, seed):
        assert share.dtype == np.int64
        assert len(share) > 0
        assert (np.diff(share) > 0).all()


@pytest.mark.parametrize("scheme", SCHEMES)
@given(seed=seeds)
def test_seed_determines_the_shares(scheme: str, seed: int) -> None:
    labels = np.repeat(np.arange(10), 30)
    first, again, other = (partition.split(scheme, labels, 5, 1.0, s) for s in (seed, seed, seed + 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


@given(examples=st.integers(1, 500), clients=clients, seed=seeds)
def test_iid_shares_differ_by_one_example_at_most(examples: int, clients: int, seed: int) -> None:
    if examples < clients:
        with pytest.raises(ValueError, match=f"{examples} examples cannot give each of {clients} clients at least 1"):
            partition.iid(examples, clients, seed)
        return
    sizes = [len(share) for share in partition.iid(examples, clients, seed)]
    assert max(sizes) - min(sizes) <= 1


@given(labels=labelled(), clients=st.integers(1, 6), minimum=st.integers(0, 5), seed=seeds)
def test_dirichlet_gives_each_client_the_minimum(labels: NDArray[Any], clients: int, minimum: int, seed: int) -> None:
    try:
        shares = partition.dirichlet(labels, clients, 1.0, seed, minimum)
    except ValueError:
        return
    assert min(map(len, shares)) >= minimum


@given(
    clients=clients,
    minimum=st.integers(0, 9),
    spare=st.integers(0, 200),
    alpha=st.floats(1e-3, 1e3),
    seed=seeds,
)
def test_quantity_gives_each_client_the_minimum_whatever_alpha(
    clients: int, minimum: int, spare: int, alpha: float, seed: int
) -> None:
    examples = max(1, clients * minimum + spare)
    sizes = [len(share) for share in partition.quantity(examples, clients, alpha, seed, minimum)]
    assert min(sizes) >= minimum
    assert sum(sizes) == examples


@given(seed=seeds)
def test_clients_with_two_shards_have_few_labels(seed: int) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(10), 20))
    shares = partition.label_shards(labels, 10, 2, seed)
    assert [len(share) for share in shares] == [20] * 10
    assert all(len(np.unique(labels[share])) <= 2 for share in shares)


def test_dirichlet_skew_grows_as_alpha_falls() -> None:
    labels = np.repeat(np.arange(10), 100)

    def skew(alpha: float) -> float:
        """Return the mean share of a client's largest class over clients and 20 seeds: 0.1 is no skew, 1.0 total."""
        shares = [share for seed in range(20) for share in partition.dirichlet(labels, 5, alpha, seed)]
        return float(np.mean([np.bincount(labels[share]).max() / len(share) for share in shares]))

    assert skew(100.0) < 0.15 < skew(1.0) < skew(0.3) < skew(0.05)
    assert skew(0.05) > 0.5


def test_quantity_skew_grows_as_alpha_falls() -> None:
    labels = np.tile(np.arange(10), 100)

    def largest(alpha: float) -> float:
        """Return the mean size of the largest of five shares, over twenty seeds."""
        return float(np.mean([max(map(len, partition.quantity(1000, 5, alpha, seed))) for seed in range(20)]))

    assert 200 <= largest(100.0) < largest(1.0) < largest(0.1) <= 1000
    big = max(partition.quantity(1000, 5, 0.3, 0), key=len)
    assert np.bincount(labels[big], minlength=10).max() < 0.2 * len(big)


def test_shards_do_not_depend_on_the_order_of_examples() -> None:
    labels = np.zeros(40, dtype=int)  # one class: only the shuffle can mix them
    shares = partition.label_shards(labels, 4, 1, seed=0)
    assert all(np.ptp(share) > 10 for share in shares)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: partition.split("dirichelt", [0, 1], 2), "unknown partition 'dirichelt'; known: iid, dirichlet"),
        (lambda: partition.iid(3, 4), "3 examples cannot give each of 4 clients at least 1"),
        (lambda: partition.iid(3, 0), "clients = 0: must be at least 1"),
        (lambda: partition.dirichlet([0] * 9, 5, 0.3), "9 examples cannot give each of 5 clients at least 2"),
        (lambda: partition.dirichlet([], 1, 0.3, minimum=0), "0 examples cannot give each of 1 clients"),
        (lambda: partition.dirichlet([0] * 9, 2, 0.0), "alpha = 0.0: must be a finite number above 0"),
        (lambda: partition.dirichlet([0] * 9, 2, float("nan")), "alpha = nan: must be a finite number above 0"),
        (lambda: partition.dirichlet([0] * 9, 2, float("inf")), "alpha = inf: must be a finite number above 0"),
        (lambda: partition.dirichlet([0] * 100, 9, 0.01, minimum=10), "use a larger alpha, fewer clients or a smaller"),
        (lambda: partition.dirichlet([0] * 9, 2, 0.3, minimum=-1), "minimum = -1: must be at least 0"),
        (lambda: partition.quantity(9, 2, -1.0), "alpha = -1.0: must be a finite number above 0"),
        (lambda: partition.quantity(9, 5, 1.0), "9 examples cannot give each of 5 clients at least 2"),
        (lambda: partition.label_shards([0] * 9, 5, 2), "9 examples cannot give each of 5 clients at least 2"),
        (lambda: partition.label_shards([0] * 9, 5, 0), "shards_per_client = 0: must be at least 1"),
    ],
)
def test_impossible_partition_error_names_the_problem(call: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    assert message in str(caught.value)

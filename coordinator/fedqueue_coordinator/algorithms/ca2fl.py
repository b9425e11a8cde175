"""CA²FL: each update is calibrated with its client's previous update (Wang et al., ICLR 2024, algorithm 2).

"Tackling the Data Heterogeneity in Asynchronous Federated Learning with Cached Update Calibration". h_i is the last
delta of client i that was merged into a version (0 before its first), and h = (1/N) Σ h_i over all N clients.
K arrivals make

    Δ̄ = h + (1/K) Σ (Δ_i − h_i)      then      h ← h + (1/N) Σ (Δ_i − h_i),   h_i ← Δ_i

so Δ̄ contains the last delta of each client that is slow or was not among the K.
"""

from __future__ import annotations

import torch

from fedqueue.tensors.frame import Frame
from fedqueue_coordinator.algorithms.aggregator import (
    Accumulator,
    Aggregator,
    Contribution,
    Step,
    accumulate,
    mean_step,
)

MEAN = "mean"  # h
CACHE = "cache/"  # + client: h_i
CACHE_ORDER = "turn/"  # + client: int64, how many entries had been written when this one was


def ca2fl(buffer_size: int, clients: int, cache_clients: int) -> Aggregator:
    """K = `buffer_size`, N = `clients`; the h_i of at most `cache_clients` clients are kept.

    Memory, in float32 vectors as long as the parameters: one for h, at most `cache_clients` for the h_i, and the
    buffer's K updates until their version is made. h and the h_i are the state that is stored with each version, so a
    commit writes 1 + `cache_clients` vectors beside the model. Beyond the bound the h_i of the client that contributed
    longest ago is dropped: it is 0 again, in h too. Raises ValueError for a bound below 1.

    Of two updates of one client within a buffer, the later one becomes its h_i. The paper weighs by neither staleness
    nor examples. Floating buffers and counters are merged as in FedBuff.
    """
    if not isinstance(cache_clients, int) or cache_clients < 1:
        raise ValueError(f"cache_clients must be an integer of at least 1, it is {cache_clients}")

    def add(acc: Accumulator, update: Contribution, model: Frame) -> float:
        accumulate(acc, update, 1.0)
        acc.contributions.append(update)
        if (cached := acc.state.get(CACHE + update.client)) is not None:
            acc.floats[: len(cached)].sub_(cached)
        return 1.0

    def finish(acc: Accumulator, model: Frame) -> Step:
        step = mean_step(acc, model, float(acc.updates))
        if MEAN not in acc.state:
            acc.state[MEAN] = torch.zeros_like(step.delta)
        step.delta.add_(acc.state[MEAN])
        for client, update in {update.client: update for update in acc.contributions}.items():
            _forget(acc.state, client, clients)
            _remember(acc.state, client, update.delta.whole().parameters, clients)
        names = sorted(_cached(acc.state), key=lambda name: int(acc.state[CACHE_ORDER + name]))
        for client in names[: max(0, len(names) - cache_clients)]:
            _forget(acc.state, client, clients)
        return step

    return Aggregator("ca2fl", buffer_size, add, finish)


def _cached(state: dict[str, torch.Tensor]) -> list[str]:
    return [name.removeprefix(CACHE) for name in state if name.startswith(CACHE)]


def _remember(state: dict[str, torch.Tensor], client: str, delta: torch.Tensor, clients: int) -> None:
    last = max((int(state[CACHE_ORDER + name]) for name in _cached(state)), default=0)
    state[CACHE + client] = delta  # the frame's own memory, to which nothing is written after this
    state[CACHE_ORDER + client] = torch.tensor(last + 1)
    state[MEAN].add_(delta, alpha=1 / clients)


def _forget(state: dict[str, torch.Tensor], client: str, clients: int) -> None:
    if (cached := state.pop(CACHE + client, None)) is not None:
        del state[CACHE_ORDER + client]
        state[MEAN].sub_(cached, alpha=1 / clients)

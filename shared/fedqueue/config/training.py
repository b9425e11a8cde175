"""Settings of the local training: `[training]` in the configuration, and a part of each order."""

from __future__ import annotations

from pydantic import Field

from fedqueue.config.sections import Count, NonNegative, Positive, Section


class TrainingConfig(Section):
    """Settings of the local training; they travel with each job."""

    optimizer: str = "sgd"
    """A `torch.optim` optimizer by name: sgd, adam, adamw, adagrad, rmsprop, …"""
    learning_rate: Positive = 0.1
    options: dict[str, float | int | bool] = {}
    """Further keyword arguments of the optimizer, such as momentum or weight_decay."""
    batch_size: Count = 32
    epochs: Count = 1
    """Passes over the client's data per job."""
    steps: int = Field(default=0, ge=0)
    """Batches per job instead of `epochs`; 0: epochs count."""
    proximal_mu: NonNegative = 0.0
    """FedProx: adds μ/2 · ‖x − x_base‖² to the loss (arXiv 1812.06127, eq. 2)."""
    device: str = "auto"
    """A torch device; `auto` takes CUDA where there is one."""
    threads: Count = 1
    """torch threads per worker process; several workers on one machine fight over more."""

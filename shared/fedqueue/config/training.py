"""The section `[training]`: settings of the local training, sent to the workers with each job."""

from __future__ import annotations

from typing import Annotated

from fedqueue.config.sections import OFF, Count, NonNegative, Positive, Section, Text


class TrainingConfig(Section):
    """Settings of the local training; the coordinator sends them to the worker with each job.

    >>> from fedqueue import TrainingConfig
    >>> TrainingConfig(optimizer="adam", learning_rate=0.01, local_epochs=5).batch_size
    32
    """

    optimizer: str = "sgd"
    """The optimizer on the client: the name of a `torch.optim` class in lower case, such as sgd, adam or adamw."""
    learning_rate: Positive = 0.1
    """Learning rate of the client's optimizer."""
    optimizer_options: dict[str, float | int | bool] = {}
    """Further keyword arguments of the client's optimizer, such as momentum or weight_decay."""
    batch_size: Count = 32
    """Examples per local step."""
    local_epochs: Count = 1
    """Passes over the client's data per job; ignored where `local_steps` is set."""
    local_steps: Annotated[Count | None, OFF] = None
    """Batches per job, instead of `local_epochs`."""
    proximal_mu: NonNegative = 0.0
    """FedProx: adds μ/2 · ‖x − x_base‖² to the loss (arXiv 1812.06127, eq. 2); 0 adds nothing."""
    device: Text = "auto"
    """The torch device on the client, such as `cpu` or `cuda:0`; `auto` takes CUDA where it is available."""
    threads: Count = 1
    """torch threads of a worker process; more slow each other down where several workers share a machine."""

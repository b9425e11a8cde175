"""The section `[training]`: settings of the local training. The coordinator sends most of them with each job."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedqueue.config.schedule import Options, ScheduleConfig
from fedqueue.config.sections import OFF, Count, NonNegative, Positive, Section, Text


class TrainingConfig(Section):
    """Settings of the local training. The coordinator sends them with each job, except those of a machine.

    `device`, `threads` and `loader_workers` are a machine's own: each worker reads them from its own configuration.

    >>> from fedqueue import TrainingConfig
    >>> TrainingConfig(optimizer="adam", learning_rate=0.01, local_epochs=5).batch_size
    32
    """

    optimizer: str = "sgd"
    """The optimizer on the client: the name of a `torch.optim` class in lower case, such as sgd, adam or adamw."""
    learning_rate: Positive = 0.1
    """Learning rate of the client's optimizer."""
    optimizer_options: Options = {}
    """Further keyword arguments of the client's optimizer, such as momentum, betas or weight_decay."""
    keep_optimizer_state: bool = False
    """Keeps each client's optimizer state, such as momentum, from job to job in the memory of its worker process;
    `false`: each job begins without it."""
    batch_size: Count = 32
    """Examples per batch."""
    drop_last: bool = False
    """Leaves out the last batch of each pass where it has fewer than `batch_size` examples."""
    local_epochs: Count = 1
    """Passes over the client's data per job; ignored where `local_steps` is set."""
    local_steps: Annotated[Count | None, OFF] = None
    """Batches per job, instead of `local_epochs`."""
    accumulate_batches: Count = 1
    """Batches whose mean gradient makes one step of the optimizer."""
    max_grad_norm: Annotated[Positive | None, OFF] = None
    """Scales a gradient with a larger L2 norm down to this norm before each step of the optimizer."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Mixed precision: the loss is computed under `torch.autocast` with this dtype, and float16 with loss scaling."""
    proximal_mu: NonNegative = 0.0
    """FedProx: adds μ/2 · ‖x − x_base‖² to the loss (arXiv 1812.06127, eq. 2); 0 adds nothing."""
    device: Text = Field(default="auto", exclude=True)
    """The torch device of this machine: of its workers, and of the coordinator's evaluation. Such as `cpu`, `cuda:1`
    or `mps`; `auto` takes the accelerator that torch finds, else the CPU."""
    threads: Count = Field(default=1, exclude=True)
    """torch threads of a worker process; more slow each other down where several workers share a machine."""
    loader_workers: int = Field(default=0, ge=0, exclude=True)
    """Processes that load batches for a job, of `torch.utils.data.DataLoader`; 0: the worker process loads them."""
    schedule: ScheduleConfig = ScheduleConfig()
    """How the learning rate changes over versions: one step of the schedule is one version. A job's learning rate
    follows from its base version."""
    local_schedule: ScheduleConfig = ScheduleConfig()
    """How the learning rate changes within a job: one step of the schedule is one step of the optimizer. It begins at
    the rate of `schedule`."""

    def on_machine(self, local: TrainingConfig) -> TrainingConfig:
        """Return these settings with the device, the threads and the loader workers of `local`."""
        own = {"device": local.device, "threads": local.threads, "loader_workers": local.loader_workers}
        return self.model_copy(update=own)

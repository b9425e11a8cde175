"""What the process that others are forked from imports: clocks that can be shifted, then all that takes long."""

from __future__ import annotations

import importlib

import skewed_time
import torch

skewed_time.install()
for _module in (
    "fedqueue_coordinator.operator.progress_view",
    "fedqueue_coordinator.operator.local_run",
    "fedqueue_coordinator.operator.results",
    "fedqueue_worker.process",
    "coordinator_with_faults",
    "worker_with_skew",
):
    importlib.import_module(_module)
torch.optim.SGD([torch.zeros(1, requires_grad=True)])  # the first use of an optimizer imports much

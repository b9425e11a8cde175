"""Imports of the fork server: first the clocks that tests can shift, then all modules that are slow to import."""

from __future__ import annotations

import importlib

import torch

from tests.support.chaos import skewed_time

skewed_time.install()
for _module in (
    "fedqueue_coordinator.operator.progress_view",
    "fedqueue_coordinator.operator.local_run",
    "fedqueue_coordinator.operator.results",
    "fedqueue_keeper.process",
    "fedqueue_worker.process",
    "tests.support.chaos.coordinator_with_faults",
    "tests.support.chaos.keeper_with_skew",
    "tests.support.chaos.worker_with_skew",
):
    importlib.import_module(_module)
torch.optim.SGD([torch.zeros(1, requires_grad=True)])  # the first use of an optimizer imports many modules

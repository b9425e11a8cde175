"""A run again, in this process: the jobs of its ledger trained from the versions that they had, merged in its order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fedqueue.config.loading import Config
from fedqueue.local_update import compute_update
from fedqueue.task import Task
from fedqueue.tensors.frame import Frame, Manifest
from fedqueue_coordinator.core.dispatch import make_order
from fedqueue_coordinator.core.events import Commit, Dispatch, Load, UpdateArrived, UpdateLoaded
from fedqueue_coordinator.core.federation import Federation


def retrace(config: Config, task: Task, ledger: Sequence[Mapping[str, Any]]) -> Frame:
    """The last version, as the virtual clock's way to train and the state machine come to it."""
    torch.manual_seed(config.seed)
    module = task.model()
    model = Frame(Manifest.from_module(module))
    model.read(module)
    versions = {0: model.copy()}
    federation = Federation(config, model, evaluates=False)
    for line in [line for record in ledger if record["kind"] == "version" for line in record["merged"]]:
        job, client, base = line["job"], line["client"], versions[line["base"]]
        order = make_order(config, Dispatch(job, int(job.split("-")[-2]), client))
        local = Frame(base.manifest)
        data = task.train_data(config.clients.client(client))
        header = compute_update(task, module, data, order, base, local, lambda: None)
        federation.restore_jobs({job: client}, {client: header.examples})
        actions = federation.handle(UpdateArrived("", job, 1, client, line["base"], header.pack()), line["at"])
        (load,) = [action for action in actions if isinstance(action, Load)]
        answer = federation.handle(UpdateLoaded(load, local, base.copy()), line["at"])
        if any(isinstance(action, Commit) for action in answer):
            versions[federation.version] = model.copy()
    return federation.model

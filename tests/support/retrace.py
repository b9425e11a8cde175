"""Repeats a run in this process: trains each job of the ledger from its base version, and merges in ledger order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fedqueue.config.schema import Config
from fedqueue.local_model import LocalModel
from fedqueue.local_update import compute_update, load_data
from fedqueue.protocol.stream_entry import StreamEntry
from fedqueue.task import Task
from fedqueue.tensors.frame import Frame
from fedqueue_coordinator.core.events import Commit, Dispatch, Load, UpdateArrived, UpdateLoaded, make_order
from fedqueue_coordinator.core.federation import Federation
from tests.support.builders import frame_of_module


def retrace(config: Config, task: Task, ledger: Sequence[Mapping[str, Any]]) -> Frame:
    """Compute the last version with the simulation's training and the coordinator's state machine."""
    torch.manual_seed(config.seed)
    module = task.model()
    model = frame_of_module(module)
    local_model = LocalModel(task, module, model.manifest)
    versions = {0: model.copy()}
    federation = Federation(config, model, evaluates=False)
    for line in [line for record in ledger if record["kind"] == "version" for line in record["merged"]]:
        job, client, base = line["job"], line["client"], versions[line["base"]]
        order = make_order(config, Dispatch(job, int(job.split("-")[-2]), client))
        local = Frame(base.manifest)
        data, _ = load_data(task, config.clients.client(client), config.seed)
        progress = local_model.progress(config.clients.client(client), line["base"], lambda: None)
        header = compute_update(task, local_model, data, order, base, local, progress)
        federation.restore_jobs({job: client}, {client: header.examples})
        entry = StreamEntry("", "update", header.pack(), client, job, 1, line["base"])
        actions = federation.handle(UpdateArrived(entry, entry.body), line["at"])
        (load,) = [action for action in actions if isinstance(action, Load)]
        answer = federation.handle(UpdateLoaded(load, local, base.copy()), line["at"])
        if any(isinstance(action, Commit) for action in answer):
            versions[federation.version] = model.copy()
    return federation.model

"""Runs APPFL over gRPC in its own environment: `appfl_peer.py server` and `appfl_peer.py client NUMBER`.

Uses APPFL's documented agents and communicators. PEERS_FAST=1 adds two settings that APPFL does not ship: messages of
16 MB instead of 2 MB, and `gc.freeze()` after the imports, because APPFL collects garbage several times for each
update, and each collection walks all imported objects.
"""

from __future__ import annotations

import gc
import os
import sys
from typing import Any

import work
from appfl.agent import ClientAgent, ServerAgent
from appfl.algorithm.trainer import BaseTrainer
from appfl.comm.grpc import GRPCClientCommunicator, GRPCServerCommunicator, serve
from omegaconf import OmegaConf

FAST = os.environ.get("PEERS_FAST") == "1"
MESSAGE = {"max_message_size": 16 * 1024 * 1024} if FAST else {}
URI = f"127.0.0.1:{os.environ['PEERS_PORT']}"
NBYTES, CLIENTS = int(os.environ["PEERS_BYTES"]), int(os.environ["PEERS_CLIENTS"])
SEED = int(os.environ.get("PEERS_SEED", "0"))
DATA = work.Digits(os.environ["PEERS_DATA"]) if not NBYTES else None


class Server(ServerAgent):
    """Merges as configured, and reports each merged update."""

    def _load_model(self) -> None:
        self.model = work.make_model(NBYTES, SEED)
        self.progress = work.Progress()

    def global_update(self, *arguments: Any, **options: Any) -> Any:
        result = super().global_update(*arguments, **options)
        self.progress.merged(DATA.accuracy(self.model) if DATA else None)
        return result


class Trainer(BaseTrainer):
    def train(self, **options: Any) -> None:
        if DATA:
            work.train(self.model, DATA.client(self.client_id), self.client_id)
        else:
            work.train_at_once(self.model)

    def get_parameters(self) -> Any:
        return self.model.state_dict()


def serve_run(mode: str) -> None:
    """Serve a run with `mode` fedasync or fedbuff.

    APPFL divides alpha by the number of clients, so alpha is set such that the step is the paper's: α·s(τ) or s(τ)/K.
    """
    alpha = work.ALPHA if mode == "fedasync" else 1 / work.BUFFER
    options = {"staleness_fn": "polynomial", "staleness_fn_kwargs": {"a": work.STALENESS}, "alpha": alpha * CLIENTS}
    config = {
        "client_configs": {},
        "server_configs": {
            "num_clients": CLIENTS,
            "scheduler": "AsyncScheduler",
            "aggregator": {"fedasync": "FedAsyncAggregator", "fedbuff": "FedBuffAggregator"}[mode],
            "aggregator_kwargs": options if mode == "fedasync" else {**options, "K": work.BUFFER},
            "num_global_epochs": 10**9,
        },
    }
    agent = Server(server_agent_config=OmegaConf.create(config))
    serve(GRPCServerCommunicator(agent, **MESSAGE), server_uri=URI, **MESSAGE)


def train_for_run(number: int) -> None:
    agent = ClientAgent(client_agent_config=OmegaConf.create({"client_id": str(number), "train_configs": {}}))
    link = GRPCClientCommunicator(client_id=str(number), server_uri=URI, **MESSAGE)
    agent.load_config(link.get_configuration())
    agent.model = work.make_model(NBYTES, SEED)
    agent.trainer = Trainer(model=agent.model, client_id=number)
    agent.load_parameters(link.get_global_model(init_model=True))
    while True:
        agent.train()
        merged, _ = link.update_global_model(agent.get_parameters())
        agent.load_parameters(merged)


if __name__ == "__main__":
    if FAST:
        gc.freeze()
    if sys.argv[1] == "server":
        serve_run(sys.argv[2])
    else:
        train_for_run(int(sys.argv[2]))

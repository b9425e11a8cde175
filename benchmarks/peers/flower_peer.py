"""Defines the ServerApp and the ClientApp that Flower's SuperLink and SuperNodes run.

The strategy is FedAvg, since Flower ships no asynchronous strategy; each round asks all clients. This file and
`work.py` are copied beside a pyproject.toml into a new folder, which `flwr run` packs and sends.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import work
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

NBYTES, CLIENTS = int(os.environ["PEERS_BYTES"]), int(os.environ["PEERS_CLIENTS"])
SEED = int(os.environ.get("PEERS_SEED", "0"))


class Reporting(FedAvg):
    """FedAvg that reports each merged update."""

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        replies = list(replies)
        arrays, metrics = super().aggregate_train(server_round, replies)
        accuracy = None
        if not NBYTES and arrays is not None:
            model = work.make_model(NBYTES, SEED)
            model.load_state_dict(arrays.to_torch_state_dict())
            accuracy = work.Digits(os.environ["PEERS_DATA"]).accuracy(model)
        progress = work.Progress()
        for reply in replies:
            if reply.has_content():
                progress.merged(accuracy)
        return arrays, metrics


server_app = ServerApp()
client_app = ClientApp()


@server_app.main()
def serve_run(grid: Grid, context: Context) -> None:
    strategy = Reporting(
        fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=CLIENTS, min_available_nodes=CLIENTS
    )
    initial = ArrayRecord(work.make_model(NBYTES, SEED).state_dict())
    strategy.start(grid=grid, initial_arrays=initial, num_rounds=10**6)


@client_app.train()
def train_for_run(message: Message, context: Context) -> Message:
    model = work.make_model(NBYTES, SEED)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    if NBYTES:
        work.train_at_once(model)
        examples = 1
    else:
        client = int(context.node_config["partition-id"])
        data = work.Digits(os.environ["PEERS_DATA"]).client(client)
        work.train(model, data, client)
        examples = len(data[1])
    content = {
        "arrays": ArrayRecord(model.state_dict()),
        "metrics": MetricRecord({"num-examples": examples}),
    }
    return Message(content=RecordDict(content), reply_to=message)

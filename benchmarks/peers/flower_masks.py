"""Times a round of SecAgg+ in one process, and tries what its masks protect: `flower_masks.py PARAMETERS SHARES`.

Uses the workflow and the client mod that Flower ships; a message is handed over as an object, without a network. SHARES
is the number of clients that share a client's secrets, its own included: it has masks with all the others of them.
Prints JSON.
"""

from __future__ import annotations

import copy
import json
import logging
import sys
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, RECORD_KEY_STATE, Key, Stage
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from flwr.compat.common import recorddict_compat as compat
from flwr.server.client_manager import SimpleClientManager
from flwr.server.compat.grid_client_proxy import GridClientProxy
from flwr.server.compat.legacy_context import LegacyContext
from flwr.server.strategy import FedAvg
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD
from flwr.server.workflow.constant import Key as WorkflowKey
from flwr.supercore.task_identity import TaskIdentity

CLIENTS, EXAMPLES, SCALE = 10, 100, 0.01
SERVER = 1  # its node, whose tasks send as it


class Round:
    """A grid whose nodes are functions of this process; counts what their messages bring to the server."""

    def __init__(self, parameters: int) -> None:
        rng = np.random.default_rng(0)
        self.vectors = [(SCALE * rng.standard_normal(parameters)).astype(np.float32) for _ in range(CLIENTS)]
        self.contexts = {node: _context(node) for node in range(SERVER + 1, SERVER + 1 + CLIENTS)}
        self.client_seconds = self.copy_seconds = 0.0
        self.bytes_up = 0
        self.examples_seen: set[int] = set()

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return [self._answer(message) for message in messages]

    def _answer(self, message: Message) -> Message:
        node, begun = message.metadata.dst_node_id, time.perf_counter()
        message = copy.deepcopy(message)  # the server sends one object to all nodes, and the mod changes it
        self.copy_seconds += time.perf_counter() - begun
        begun = time.perf_counter()
        reply = secaggplus_mod(message, self.contexts[node], lambda msg, _: self._trained(msg, node))
        self.client_seconds += time.perf_counter() - begun
        told = reply.content.config_records[RECORD_KEY_CONFIGS]
        if Key.MASKED_PARAMETERS in told:
            self.bytes_up += sum(map(len, told[Key.MASKED_PARAMETERS]))
            self.examples_seen.add(compat.recorddict_to_fitres(reply.content, True).num_examples)
        return reply

    def _trained(self, message: Message, node: int) -> Message:
        parameters = ndarrays_to_parameters([self.vectors[node - SERVER - 1]])
        trained = FitRes(Status(Code.OK, ""), parameters, EXAMPLES, {})
        return Message(compat.fitres_to_recorddict(trained, False), reply_to=message)


def _context(node: int) -> Context:
    return Context(run_id=1, node_id=node, node_config={}, state=RecordDict(), run_config={}, series_id=0)


def main(parameters: int, shares: int) -> dict[str, Any]:
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, SERVER
    grid, manager = Round(parameters), SimpleClientManager()
    for node in grid.contexts:
        manager.register(GridClientProxy(node, grid, 1))
    strategy = FedAvg(fraction_fit=1.0, min_fit_clients=CLIENTS, min_available_clients=CLIENTS)
    context = LegacyContext(_context(SERVER), None, strategy, manager)
    context.state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({WorkflowKey.CURRENT_ROUND: 1})
    context.state.array_records[MAIN_PARAMS_RECORD] = ArrayRecord([np.zeros(parameters, np.float32)])
    begun = time.perf_counter()
    SecAggPlusWorkflow(shares, shares // 2 + 1)(grid, context)
    whole = time.perf_counter() - begun - grid.copy_seconds
    (mean,) = parameters_to_ndarrays(
        compat.arrayrecord_to_parameters(context.state.array_records[MAIN_PARAMS_RECORD], keep_input=True)
    )
    expected = np.mean([vector.astype(np.float64) for vector in grid.vectors], axis=0)
    return {
        "round": whole, "clients": grid.client_seconds / CLIENTS, "server": whole - grid.client_seconds,
        "bytes": grid.bytes_up / CLIENTS / parameters, "error": float(np.abs(mean - expected).max()),
        "tried": tried(grid),
    }  # fmt: skip


def tried(grid: Round) -> dict[str, bool]:
    """What was tried against the code as it is installed, and whether it succeeded."""
    seed = np.random.default_rng(1).bytes(32)
    folded = np.bitwise_xor.reduce(np.frombuffer(seed, "<u4")).tobytes()
    (mask,), (same) = (pseudo_rand_gen(s, 2**32, [(1000,)]) for s in (seed, folded))
    return {
        "four bytes make the mask of a secret of 32": bool(np.array_equal(mask, same[0])),
        "a client names both secrets of a node that is called alive and dead": _both_secrets(grid),
        "the server sees how many examples each client has": grid.examples_seen == {EXAMPLES},
    }


def _both_secrets(grid: Round) -> bool:
    """Ask a client of the round that is over, again, for a neighbour that the server calls alive, and dead."""
    node, context = next(iter(grid.contexts.items()))
    state = context.state.config_records[RECORD_KEY_STATE]
    state["current_stage"] = Stage.COLLECT_MASKED_VECTORS
    known = [int(other) for other in state["rd_seed_share_dict:K"]]
    lists = {Key.STAGE: Stage.UNMASK, Key.ACTIVE_NODE_ID_LIST: known, Key.DEAD_NODE_ID_LIST: known}
    message = Message(RecordDict({RECORD_KEY_CONFIGS: ConfigRecord(lists)}), dst_node_id=node, message_type="train")
    told = secaggplus_mod(message, context, lambda msg, _: msg).content.config_records[RECORD_KEY_CONFIGS]
    return list(told[Key.NODE_ID_LIST]) == known + known and len(set(told[Key.SHARE_LIST])) == 2 * len(known)


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]))))

"""fedqueue: asynchronous federated learning over Redis and RQ.

Everything reachable through `fedqueue.__all__` is public; any other module may change without notice.

| for | names |
|---|---|
| a task | `Task`, `Client`, `TrainingConfig`, `TrainResult`, `Progress`, `partition` |
| a configuration | `Config`, `load_config` |
| a run from Python | `run`, `simulate`, `RunResult` |
| what follows a run | `RunHooks`, `RunStart`, `RunProgress` |
| an aggregation algorithm | `Aggregator`, `Contribution`, `Accumulator`, `Step`, `Frame`, `Manifest` |
| its building blocks | `accumulate`, `mean_step`, `fedbuff` |
| errors of what was given | `FedqueueError`, `ConfigurationError`, `TaskError`, `MissingExtra` |
| errors of a run | `RunExists`, `RunNotFound`, `RunFailed`, `ServerUnavailable`, `PolicyRefusal`, `JobClosed` |

`import fedqueue` imports none of these names' modules: each is imported at the first use of a name (PEP 562), so that a
command line that only prints its help does not import torch. The types are in `__init__.pyi`.

The shared package imports no service. The names that `fedqueue_coordinator` defines are therefore looked up by the name
of their module at the time of use. An entry point group would need no such name here, but every installed distribution
could then define what `fedqueue.run` is.
"""

from __future__ import annotations

from importlib import import_module

__version__ = "0.1.0"

_MODULE_OF = {
    "Accumulator": "fedqueue_coordinator.algorithms.aggregator",
    "Aggregator": "fedqueue_coordinator.algorithms.aggregator",
    "Client": "fedqueue.task",
    "Config": "fedqueue.config.schema",
    "ConfigurationError": "fedqueue.errors",
    "Contribution": "fedqueue_coordinator.algorithms.aggregator",
    "FedqueueError": "fedqueue.errors",
    "Frame": "fedqueue.tensors.frame",
    "JobClosed": "fedqueue.errors",
    "Manifest": "fedqueue.tensors.manifest",
    "MissingExtra": "fedqueue.errors",
    "PolicyRefusal": "fedqueue.errors",
    "Progress": "fedqueue.task",
    "RunExists": "fedqueue.errors",
    "RunFailed": "fedqueue.errors",
    "RunHooks": "fedqueue_coordinator.tracking.hooks",
    "RunNotFound": "fedqueue.errors",
    "RunProgress": "fedqueue_coordinator.tracking.hooks",
    "RunResult": "fedqueue_coordinator.core.run_summary",
    "RunStart": "fedqueue_coordinator.tracking.hooks",
    "ServerUnavailable": "fedqueue.errors",
    "Step": "fedqueue_coordinator.algorithms.aggregator",
    "Task": "fedqueue.task",
    "TaskError": "fedqueue.errors",
    "TrainResult": "fedqueue.task",
    "TrainingConfig": "fedqueue.config.training",
    "accumulate": "fedqueue_coordinator.algorithms.aggregator",
    "fedbuff": "fedqueue_coordinator.algorithms.fedbuff",
    "load_config": "fedqueue.config.loading",
    "mean_step": "fedqueue_coordinator.algorithms.aggregator",
    "run": "fedqueue_coordinator.operator.python_api",
    "simulate": "fedqueue_coordinator.operator.python_api",
}

__all__ = [
    "Accumulator",
    "Aggregator",
    "Client",
    "Config",
    "ConfigurationError",
    "Contribution",
    "FedqueueError",
    "Frame",
    "JobClosed",
    "Manifest",
    "MissingExtra",
    "PolicyRefusal",
    "Progress",
    "RunExists",
    "RunFailed",
    "RunHooks",
    "RunNotFound",
    "RunProgress",
    "RunResult",
    "RunStart",
    "ServerUnavailable",
    "Step",
    "Task",
    "TaskError",
    "TrainResult",
    "TrainingConfig",
    "__version__",
    "accumulate",
    "fedbuff",
    "load_config",
    "mean_step",
    "partition",
    "run",
    "simulate",
]


def __getattr__(name: str) -> object:
    if name == "partition":
        return import_module("fedqueue.partition")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'fedqueue' has no attribute {name!r}; it has: {', '.join(__all__)}")
    module = _MODULE_OF[name]
    try:
        value: object = getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "fedqueue_coordinator":
            raise
        from fedqueue.errors import MissingExtra

        raise MissingExtra(f"fedqueue.{name}", "fedqueue_coordinator", "coordinator") from None
    globals()[name] = value  # the next use finds it without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

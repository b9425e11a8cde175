"""The server optimizer: a `torch.optim` optimizer over the flat parameters, with −Δ̄ as gradient.

Reddi et al., "Adaptive Federated Optimization", arXiv 2003.00295. SGD without momentum is x ← x + ηΔ̄, which is computed
directly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from fedqueue.config.aggregation import ServerOptimizerConfig
from fedqueue.errors import ConfigurationError, StoreError
from fedqueue.learning_rates import learning_rates
from fedqueue.tensors.frame import Frame
from fedqueue.training import make_optimizer
from fedqueue_coordinator.algorithms.aggregator import Step


class ServerOptimizer:
    """Changes `model` in place, step by step. Its state can be saved and restored bit for bit."""

    def __init__(self, config: ServerOptimizerConfig, model: Frame, version: int = 0) -> None:
        """`version` is the version of `model`; the schedule of the learning rate continues from it.

        Raises ConfigurationError, as `try_out`.
        """
        try_out(config)
        self._rates = _rates(config, version)
        self._model = model
        self._optimizer: torch.optim.Optimizer | None = None
        if is_plain(config):
            return
        self._parameter = torch.nn.Parameter(model.parameters)  # shares the frame's memory
        self._optimizer = make_optimizer(
            config.name, [self._parameter], config.learning_rate, config.optimizer_options, key="server_optimizer"
        )

    def step(self, step: Step) -> None:
        """Apply one version's step; `step.delta` is overwritten.

        A parameter that is infinite in version 0 stays as it is: no admitted update changes it, and an optimizer would
        make it NaN.
        """
        rate = next(self._rates)
        infinite = self._model.infinite_parameters
        if len(infinite):
            kept = self._model.parameters[infinite]
            step.delta[infinite] = 0.0
        if self._optimizer:
            self._optimizer.param_groups[0]["lr"] = rate
            self._parameter.grad = step.delta.neg_()
            self._optimizer.step()
            self._parameter.grad = None
        else:
            self._model.parameters.add_(step.delta, alpha=rate)
        if len(infinite):
            self._model.parameters[infinite] = kept
        self._model.buffers.copy_(step.buffers)
        if step.doubles is not None and len(step.doubles):
            self._model.doubles.copy_(step.doubles)
        self._model.counters.copy_(step.counters)

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """The optimizer's tensors (momentum, second moments, step count), not copied."""
        state = self._optimizer.state.get(self._parameter, {}) if self._optimizer else {}
        return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Set what `state` returned; raises StoreError for the state of another model or optimizer."""
        for value in state.values():
            if not self._optimizer or value.numel() not in (1, self._parameter.numel()):
                raise StoreError("the server optimizer's state does not fit the model")
        if self._optimizer and state:
            self._optimizer.state[self._parameter] = dict(state)


def is_plain(config: ServerOptimizerConfig) -> bool:
    """Whether the step is x ← x + ηΔ̄: one pass with the same bits as torch's SGD, and no optimizer is imported."""
    return config.name.lower() == "sgd" and not config.optimizer_options


def try_out(config: ServerOptimizerConfig) -> None:
    """Make one step on a throwaway parameter, so that an unsuitable optimizer or schedule is reported before the run.

    Raises ConfigurationError, for example for an optimizer that needs a closure or sparse gradients.
    """
    next(_rates(config))
    if is_plain(config):
        return
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    optimizer = make_optimizer(
        config.name, [parameter], config.learning_rate, config.optimizer_options, key="server_optimizer"
    )
    try:
        optimizer.step()
    except Exception as error:
        problem = f"cannot step with a dense gradient only ({error})"
        hint = "name another optimizer, such as sgd, adam or adagrad"
        raise ConfigurationError("server_optimizer.name", config.name, problem, hint) from error


def _rates(config: ServerOptimizerConfig, version: int = 0) -> Iterator[float]:
    return learning_rates(config.learning_rate, config.schedule, "server_optimizer.schedule", version)

"""Makes the trackers that a configuration names: built-in ones, and the user's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedqueue.config.entrypoint import is_entrypoint
from fedqueue.config.schema import Config
from fedqueue.config.sections import Section
from fedqueue.errors import ConfigurationError, MissingExtra
from fedqueue.exception_text import exception_with_place
from fedqueue_coordinator.algorithms.plugins import load_plugin
from fedqueue_coordinator.tracking.hooks import RunHooks
from fedqueue_coordinator.tracking.mlflow_tracker import MlflowTracker
from fedqueue_coordinator.tracking.tensorboard_tracker import TensorBoardTracker
from fedqueue_coordinator.tracking.wandb_tracker import WandbTracker

TRACKERS: dict[str, Callable[[Any], RunHooks]] = {
    "tensorboard": TensorBoardTracker,
    "mlflow": MlflowTracker,
    "wandb": WandbTracker,
}
PURPOSES = {
    "tensorboard": "the tracker for TensorBoard",
    "mlflow": "the tracker for MLflow",
    "wandb": "the tracker for Weights & Biases",
}


def make_trackers(config: Config, given: Sequence[RunHooks] = ()) -> list[tuple[str, RunHooks]]:
    """Return the hooks of `trackers.use`, then those that a script has given, each with the name that messages use.

    Raises MissingExtra for a tracker whose package is not installed, and ConfigurationError for code that is no
    subclass of RunHooks, or cannot be loaded or constructed.
    """
    return [
        *((name, _configured(name, config)) for name in config.trackers.use),
        *((type(hooks).__name__, _require_hooks("hooks", hooks)) for hooks in given),
    ]


def _configured(name: str, config: Config) -> RunHooks:
    if is_entrypoint(name):
        return make_own(name, config.trackers.options.get(name, {}), config.folder, "trackers.use")
    return make_built_in(name, getattr(config.trackers, name))


def make_built_in(name: str, settings: Section) -> RunHooks:
    """Return the built-in tracker of that name; raises MissingExtra if its package is not installed."""
    if find_spec(name) is None:
        raise MissingExtra(PURPOSES[name], "mlflow-skinny" if name == "mlflow" else name, name)
    return TRACKERS[name](settings)


def make_own(entrypoint: str, options: Mapping[str, Any], folder: Path, key: str) -> RunHooks:
    """Return an instance of the class that `entrypoint` names, relative to `folder`; raises ConfigurationError."""
    made = load_plugin(entrypoint, folder, key)
    try:
        hooks = made(**options)
    except (Exception, SystemExit) as error:
        raise ConfigurationError(key, entrypoint, f"cannot be made: {exception_with_place(error)}") from error
    return _require_hooks(key, hooks, entrypoint)


def _require_hooks(key: str, hooks: Any, name: str = "") -> RunHooks:
    if isinstance(hooks, RunHooks):
        return hooks
    what = hooks.__name__ if isinstance(hooks, type) else type(hooks).__name__
    of = f"makes a {what}, which" if name else f"{what}"
    hint = "pass an instance, not the class" if isinstance(hooks, type) else "derive the class from fedqueue.RunHooks"
    raise ConfigurationError(key, name or None, f"{of} is no fedqueue.RunHooks", hint)

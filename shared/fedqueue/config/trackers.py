"""Configuration of what follows a run: trackers that are built in, and the user's own hooks."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, model_validator

from fedqueue.config.entrypoint import is_entrypoint
from fedqueue.config.sections import Positive, Section, Text, refuse

BUILT_IN = ("tensorboard", "mlflow", "wandb")


def _one_or_more(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


class TensorBoardConfig(Section):
    """TensorBoard's event files: `pip install 'fedqueue[tensorboard]'`."""

    folder: Text = "tensorboard"
    """Each start of a run has a folder FOLDER/RUN/TIME; relative to the working directory."""


class MlflowConfig(Section):
    """MLflow: `pip install 'fedqueue[mlflow]'`."""

    uri: Text = "mlruns"
    """A folder, relative to the working directory, or the URI of a database or a tracking server. Without a password:
    MLflow reads one from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."""
    experiment: Text = "fedqueue"
    """The experiment, which is made where it does not exist."""

    @model_validator(mode="after")
    def _no_password(self) -> MlflowConfig:
        if urlsplit(self.uri).password:
            raise refuse("uri has a password", "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead")
        return self


class WandbConfig(Section):
    """Weights & Biases: `pip install 'fedqueue[wandb]'`."""

    project: Text = "fedqueue"
    """The project."""
    folder: Text = "."
    """Files are written to FOLDER/wandb; relative to the working directory."""
    mode: Literal["offline", "online"] = "offline"
    """`offline`: files only, which `wandb sync` uploads later; `online`: to the server that `wandb login` has named."""


class TrackersConfig(Section):
    """What follows the run from outside, on the coordinator's machine; none of it can hold up or change the run."""

    use: Annotated[tuple[Text, ...], BeforeValidator(_one_or_more)] = ()
    """Trackers: `tensorboard`, `mlflow`, `wandb`, and classes of your own, derived from `fedqueue.RunHooks`, as
    `path/to/hooks.py:Class` relative to the configuration file, or `package.module:Class`. One alone may stand without
    a list."""
    options: dict[Text, dict[str, Any]] = {}
    """For classes of your own: entry point → keyword arguments of the constructor."""
    end_seconds: Positive = 10.0
    """At the end of the run, trackers have this long for what is left, such as uploads; then they are left out."""
    tensorboard: TensorBoardConfig = TensorBoardConfig()
    mlflow: MlflowConfig = MlflowConfig()
    wandb: WandbConfig = WandbConfig()

    @model_validator(mode="after")
    def _known(self) -> TrackersConfig:
        for name in self.use:
            if name not in BUILT_IN and not is_entrypoint(name):
                near = difflib.get_close_matches(name, BUILT_IN, n=1)
                hint = f"did you mean {near[0]!r}?" if near else "or name a class of your own: 'path/to/file.py:Class'"
                raise refuse(f"use names {name!r}, but the trackers are {', '.join(BUILT_IN)}", hint)
        if len(set(self.use)) != len(self.use):
            raise refuse("use names a tracker twice", "name each once")
        if unknown := self.options.keys() - set(self.use):
            raise refuse(
                f"options has {', '.join(sorted(unknown))}, which is not in use",
                "add it to use, or write the options of a built-in tracker under its own name, [trackers.tensorboard]",
            )
        if built_in := self.options.keys() & set(BUILT_IN):
            name = min(built_in)
            raise refuse(f"options has {name!r}, which is built in", f"write its options under [trackers.{name}]")
        return self

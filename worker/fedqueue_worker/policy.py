"""What a site agrees to: a TOML file of its own, which no order of a coordinator can widen.

    entrypoints = ["task.py:Digits"]   # task entry points that may run here; left out: the configuration's own
    max_epochs = 5                     # passes over the data per job, whether they are asked for as epochs or as steps
    max_steps = 2000                   # batches per job
    metrics = ["loss"]                 # names that may leave; left out: all of them; []: none
    min_examples = 50                  # fewer examples are not trained on: an update would say much about each
    require = ["clip_norm"]            # settings of [training] that a job must carry, with a value other than 0

A job that asks for more is refused before anything of it is done. Metrics are left out, which is no reason to refuse.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedqueue.config.training import TrainingConfig
from fedqueue.errors import ConfigurationError, PolicyRefusal
from fedqueue.protocol.messages import Update

Limit = Annotated[int, Field(ge=1)]


class Policy(BaseModel):
    """None: not limited."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    entrypoints: list[str] | None = None
    max_epochs: Limit | None = None
    max_steps: Limit | None = None
    metrics: list[str] | None = None
    min_examples: Limit | None = None
    require: list[str] = []

    def agree_to_task(self, entrypoint: str) -> None:
        """Raises PolicyRefusal unless that task may run here."""
        if self.entrypoints is not None and entrypoint not in self.entrypoints:
            raise PolicyRefusal(f"task {entrypoint!r} may not run here; entrypoints: {', '.join(self.entrypoints)}")

    def agree_to(self, training: TrainingConfig, examples: int) -> None:
        """Raises PolicyRefusal unless a job with these settings, on so many examples, may run here."""
        steps_per_epoch = max(1, -(-examples // training.batch_size))
        steps = training.steps or training.epochs * steps_per_epoch
        epochs = -(-training.steps // steps_per_epoch) if training.steps else training.epochs
        for name, asked, limit in (("max_epochs", epochs, self.max_epochs), ("max_steps", steps, self.max_steps)):
            if limit is not None and asked > limit:
                raise PolicyRefusal(f"{name}: the job asks for {asked}, at most {limit} are agreed to")
        if self.min_examples is not None and examples < self.min_examples:
            raise PolicyRefusal(f"min_examples: there are {examples} here, at least {self.min_examples} are agreed to")
        for name in self.require:
            if not getattr(training, name, None):
                raise PolicyRefusal(f"require: the job sets no {name}, which this site requires")

    def let_out(self, update: Update) -> Update:
        """The header with those metrics that may leave."""
        if self.metrics is None:
            return update
        allowed = {name: value for name, value in update.metrics.items() if name in self.metrics}
        return update.model_copy(update={"metrics": allowed})


ANYTHING = Policy()


def load_policy(path: Path) -> Policy:
    """Raises ConfigurationError that names the key, its value and what is accepted."""
    try:
        return Policy.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigurationError("--policy", str(path), f"cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError("--policy", str(path), f"is not TOML: {error}") from None
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key = ".".join(map(str, problem["loc"]))
        if problem["type"] == "extra_forbidden":
            accepted = f"unknown key; known: {', '.join(Policy.model_fields)}"
        else:
            accepted = problem["msg"][0].lower() + problem["msg"][1:]
        raise ConfigurationError(f"{path.name}: {key}", problem["input"], accepted) from None

"""A site's policy: a TOML file with limits that no order of a coordinator can exceed.

    entrypoints = ["task.py:Digits"]   # task entry points that may run here; left out: the configuration's own
    max_epochs = 5                     # passes over the data per job, whether the job states epochs or steps
    max_steps = 2000                   # batches per job
    max_batch_size = 256               # examples per batch that a job may ask for
    metrics = ["loss"]                 # names of metrics that may leave; left out: all of them; []: no metric
    min_examples = 50                  # no training on fewer examples: an update would reveal much about each
    require = ["clip_norm"]            # settings of [training] that a job must carry, with a value other than 0
    max_leak = { rows = 0.01 }         # what attacks on this site's own update may reach above their control
    keepers = ["university", "court"]  # the only keepers that a run may have
    min_keepers = 2                    # keepers that a run must have
    min_cohort = 5                     # clients that a run must have in every sum
    statistics = ["count", "mean"]     # what `fedqueue describe` may learn; left out: all of it; []: nothing
    min_count = 10                     # rows that each figure of `fedqueue describe` is about, at least
    max_epsilon = 8.0                  # what a client's rows may spend, over all runs; jobs without noise are refused
    delta = 1e-5                       # the δ of max_epsilon

A job beyond a limit is refused before any of its work is done. A metric that may not leave is removed from the update.

`max_leak` is measured before the site registers, with the run's own settings (`fedqueue.leak.rehearsal`). A client
above it is left out. A job with other settings is refused, because nothing was measured for them.

A client is left out of a run whose secure aggregation does not satisfy `keepers`, `min_keepers` and `min_cohort`. Where
one of these is set, a run without secure aggregation does not.
`statistics` names some of count, mean, variance, histogram and categories. A site that requires keepers or noise
describes no data, because the figures would be neither masked nor noised.

`max_epsilon` is checked against the site's own account (`fedqueue_worker.privacy_account`) before each job, whatever
the coordinator says. `require = ["privacy.examples"]` demands noise without a limit.

A `fit` of the task's own is the site's own code, and need not follow [training]. Of the limits on its work, `max_steps`
holds for it too: its calls of `progress()` are counted, or where it makes none the steps of torch's optimizers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedqueue.config.client import Client
from fedqueue.config.names import KeeperName
from fedqueue.config.policy_file import read_policy
from fedqueue.config.privacy import ExamplePrivacyConfig
from fedqueue.config.schema import Config
from fedqueue.config.sections import refuse
from fedqueue.config.secure import SecureConfig
from fedqueue.config.training import TrainingConfig
from fedqueue.errors import BudgetSpent, PolicyRefusal
from fedqueue.privacy.spending import Spending, over_budget
from fedqueue.protocol.messages import Order, Update
from fedqueue.statistics.site_answers import StatisticName
from fedqueue.task import Task

ROW_PRIVACY = "privacy.examples"
"""What `require` names to demand noise."""
Limit = Annotated[int, Field(ge=1)]


class NoPart(PolicyRefusal):
    """The site's policy lets its clients take no part in the run, whatever the job."""


class Policy(BaseModel):
    """The limits of one site; None means no limit."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    entrypoints: list[str] | None = None
    max_epochs: Limit | None = None
    max_steps: Limit | None = None
    max_batch_size: Limit | None = None
    metrics: list[str] | None = None
    min_examples: Limit | None = None
    require: list[str] = []
    keepers: list[KeeperName] | None = None
    min_keepers: Limit | None = None
    min_cohort: Limit | None = None
    max_leak: dict[Literal["labels", "rows", "membership", "membership_tpr"], Annotated[float, Field(ge=0, le=1)]] = {}
    statistics: list[StatisticName] | None = None
    min_count: Limit | None = None
    max_epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    delta: Annotated[float, Field(gt=0, lt=1)] | None = None

    @model_validator(mode="after")
    def _budget_is_complete(self) -> Policy:
        if (self.max_epsilon is None) != (self.delta is None):
            has, lacks = ("delta", "max_epsilon") if self.max_epsilon is None else ("max_epsilon", "delta")
            raise refuse(f"{has} has no meaning without {lacks}", f"set {lacks}")
        return self

    @model_validator(mode="after")
    def _statistics_have_what_they_need(self) -> Policy:
        for name, needed in (("mean", "count"), ("variance", "mean"), ("histogram", "count"), ("categories", "count")):
            if self.statistics and name in self.statistics and needed not in self.statistics:
                raise refuse(f"statistics names {name!r} without {needed!r}", f"add {needed!r}, or leave out {name!r}")
        return self

    def check_description(self) -> None:
        """Raises NoPart where the policy lets no statistics of the site's data out."""
        if self.statistics == []:
            raise NoPart("statistics: this site describes no data")
        for name in ("keepers", "min_keepers", "min_cohort"):
            if getattr(self, name) is not None:
                raise NoPart(f"{name}: this site requires keepers, and statistics leave without masks")
        if self.max_epsilon is not None or ROW_PRIVACY in self.require:
            name = "require" if self.max_epsilon is None else "max_epsilon"
            raise NoPart(f"{name}: this site requires noise, and statistics leave without any")

    def check_task(self, entrypoint: str) -> None:
        """Raises PolicyRefusal where the policy does not allow the task."""
        if self.entrypoints is not None and entrypoint not in self.entrypoints:
            allowed = ", ".join(self.entrypoints)
            raise PolicyRefusal(f"task {entrypoint!r} is not allowed here; allowed entrypoints: {allowed}")

    def check_secure(self, secure: SecureConfig) -> None:
        """Raises NoPart where the policy requires more of secure aggregation than the run has."""
        required = {name: getattr(self, name) for name in ("keepers", "min_keepers", "min_cohort")}
        required = {name: value for name, value in required.items() if value is not None}
        if not required:
            return
        if not secure.on:
            raise NoPart(f"{next(iter(required))}: the run has no keepers, so its coordinator would see each update")
        foreign = [keeper for keeper in secure.keepers if self.keepers is not None and keeper not in self.keepers]
        if foreign:
            accepted = ", ".join(self.keepers or ()) or "none"
            raise NoPart(f"keepers: the run has keeper {foreign[0]}; this site accepts {accepted}")
        if self.min_keepers is not None and len(secure.keepers) < self.min_keepers:
            raise NoPart(
                f"min_keepers: the run has {len(secure.keepers)} ({', '.join(secure.keepers)}), this site requires "
                f"{self.min_keepers}"
            )
        if self.min_cohort is not None and secure.min_cohort < self.min_cohort:
            raise NoPart(
                f"min_cohort: the run hides an update among {secure.min_cohort} clients, this site requires "
                f"{self.min_cohort}"
            )

    def check_job(
        self, training: TrainingConfig, examples: int | None, privacy: ExamplePrivacyConfig | None = None
    ) -> None:
        """Raises PolicyRefusal where the policy does not allow a job with these settings on this number of examples.

        `examples` is None for a stream, whose examples are not known before the training. `privacy` is None for a job
        whose rows are not protected.
        """
        steps, epochs = training.local_steps, None if training.local_steps else training.local_epochs
        if examples is not None:
            steps_per_epoch = max(1, -(-examples // training.batch_size))
            steps = training.local_steps or training.local_epochs * steps_per_epoch
            epochs = -(-steps // steps_per_epoch) if training.local_steps else training.local_epochs
        elif epochs is None and self.max_steps is None and self.max_epochs is not None:
            raise PolicyRefusal("max_epochs: the job asks for steps on a stream, whose passes have no known length")
        asked = {
            "max_epochs": (epochs, self.max_epochs),
            "max_steps": (steps, self.max_steps),
            "max_batch_size": (training.batch_size, self.max_batch_size),
        }
        for name, (number, limit) in asked.items():
            if limit is not None and number is not None and number > limit:
                raise PolicyRefusal(f"{name}: the job asks for {number}, this site allows at most {limit}")
        if self.min_examples is not None and (examples is None or examples < self.min_examples):
            has = "an unknown number" if examples is None else examples
            raise PolicyRefusal(f"min_examples: the client has {has}, this site requires {self.min_examples}")
        self.check_noise(privacy)
        for name in self.require:
            if name != ROW_PRIVACY and not getattr(training, name, None):
                raise PolicyRefusal(f"require: the job sets no {name}, which this site requires")

    def check_noise(self, privacy: ExamplePrivacyConfig | None) -> None:
        """Raises NoPart where rows are not protected (`privacy` is None) and the policy demands it."""
        if privacy is not None:
            return
        hint = "the coordinator's configuration needs [privacy.examples]"
        if self.max_epsilon is not None:
            raise NoPart(
                f"max_epsilon: the job adds no noise, and this site allows at most ε = {self.max_epsilon:g}; {hint}"
            )
        if ROW_PRIVACY in self.require:
            raise NoPart(f"require: the job adds no noise, which this site requires; {hint}")

    def check_spending(self, client: str, before: Spending, after: Spending) -> None:
        """Raises BudgetSpent where a job that leads from `before` to `after` exceeds `max_epsilon`."""
        if self.max_epsilon is not None and self.delta is not None:
            limits = self.max_epsilon, self.delta, "this site allows"
            if why := over_budget("max_epsilon", client, before, after, *limits):
                raise BudgetSpent(why)

    def check_leak(self, config: Config, task: Task, client: Client, data: Any) -> None:
        """Raises NoPart where the client's own update would tell more than `max_leak` allows.

        `config` is the run's; `data` is what the task loaded for the client. Trains a few jobs, none of which leaves.
        Raises PolicyRefusal as `check_job`, and TaskError where the data cannot be divided into rows to train on and
        rows to compare with.
        """
        if not self.max_leak:
            return
        # What is trained here keeps to the limits, too.
        self.check_job(config.training, task.num_examples(data), config.example_privacy)
        from fedqueue.leak.measurement import above
        from fedqueue.leak.rehearsal import rehearse

        lines = above(rehearse(config, task, client, data, compare=False).measurements, self.max_leak)
        if lines:
            raise NoPart(f"max_leak: {'; '.join(lines)}")

    def check_settings(self, order: Order, measured: Config) -> None:
        """Raises PolicyRefusal where `max_leak` was measured with other settings than those of the job.

        `measured` is the run's configuration; settings of a machine are not compared.
        """
        if not self.max_leak:
            return
        asked = {**dict(order.training), ROW_PRIVACY: order.privacy}
        then = {**dict(measured.training.on_machine(order.training)), ROW_PRIVACY: measured.example_privacy}
        for name, value in asked.items():
            if value != then[name]:
                raise PolicyRefusal(f"max_leak: measured with {name} = {then[name]}, the job asks for {value}")

    def check_batches(self, batches: int) -> None:
        """Raises PolicyRefusal where a job has trained on more batches than the policy allows."""
        if self.max_steps is not None and batches > self.max_steps:
            raise PolicyRefusal(f"max_steps: the training made {batches}, this site allows at most {self.max_steps}")

    def without_withheld_metrics(self, update: Update) -> Update:
        """The update's header without the metrics that may not leave this site."""
        if self.metrics is None:
            return update
        allowed = {name: value for name, value in update.metrics.items() if name in self.metrics}
        return update.model_copy(update={"metrics": allowed})


ALLOW_ALL = Policy()


def load_policy(path: Path) -> Policy:
    """Read a policy file; raises ConfigurationError with the key, its value and the accepted values."""
    return read_policy(Policy, path)

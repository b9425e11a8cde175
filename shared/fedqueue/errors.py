"""The errors that fedqueue raises on purpose.

    FedqueueError
    ├── ConfigurationError      a key or an argument is unknown, missing or has a bad value
    ├── TaskError               the user's task cannot be found, imported or used
    │   └── NoExamples          a client has no examples to train on
    ├── MissingExtra            an optional package is not installed
    ├── WireError               bytes from another process are not what the protocol allows
    │   ├── ManifestMismatch    a model differs from the run's model
    │   └── SignatureError      a signature is missing, invalid or by another party
    │       ├── NotEnrolled     the coordinator keeps no key of that client
    │       └── Superseded      the message is from a worker process that has been replaced
    ├── PolicyRefusal           a job asks for more than its site's policy allows
    │   └── BudgetSpent         a job would cost more privacy than its client has left
    ├── StoreError              unexpected data in Redis
    │   ├── RunNotFound         the server has no run of that name
    │   ├── RunExists           a run of that name exists already
    │   ├── RunLost             Redis has lost the run, and there is no checkpoint
    │   ├── BlobMissing         a chunk of a version or of a payload is missing
    │   └── Fenced              another coordinator leads the run now
    ├── ServerUnavailable       the Redis server cannot be reached or refuses this user
    ├── LoadFailed              a worker process could load the data of no client
    ├── ClientTaken             another worker serves that client, or every partition is taken
    ├── JobClosed               a worker's job has been closed or given to another attempt
    └── RunFailed               the run ended without a usable result

The command line turns ConfigurationError and TaskError into exit code 2, all others into 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


class FedqueueError(Exception):
    """The root of the tree above: catching it catches every error that fedqueue raises on purpose.

    >>> import fedqueue
    >>> try:
    ...     fedqueue.load_config("absent.toml")
    ... except fedqueue.FedqueueError as error:
    ...     print(type(error).__name__)
    ConfigurationError
    """


class ConfigurationError(FedqueueError):
    """A key of the configuration, or an argument of a command, is unknown, missing or has a value that is not accepted.

    `key` names it, `value` is its value or None where it has none, `problem` says what is wrong, and `hint` what to do
    (an empty string where the problem says it).

    >>> import fedqueue
    >>> config = {"task": {"entrypoint": "task.py:Mine"}, "stop": {"versions": -1}}
    >>> try:
    ...     fedqueue.simulate(config)
    ... except fedqueue.ConfigurationError as error:
    ...     print(error.key, error.value)
    stop.versions -1
    """

    def __init__(self, key: str, value: object, problem: str, hint: str = "") -> None:
        self.key, self.value, self.problem, self.hint = key, value, problem, hint
        name = key if value is None else f"{key} = {value!r}"
        super().__init__(f"{name}: {problem}; {hint}" if hint else f"{name}: {problem}")


class TaskError(FedqueueError):
    """The task's entry point cannot be found, imported, constructed or used.

    >>> import fedqueue
    >>> try:
    ...     fedqueue.simulate({"task": {"entrypoint": "fedqueue.task:Mine"}, "stop": {"versions": 1}})
    ... except fedqueue.TaskError as error:
    ...     print(error)
    fedqueue.task has no Task named 'Mine'; it has: none
    """


class NoExamples(TaskError):
    """The client has no examples, so it takes no part in the run."""


class MissingExtra(FedqueueError):
    """The feature `what` needs the optional `package`, which `pip install 'fedqueue[extra]'` installs.

    >>> import fedqueue
    >>> print(fedqueue.MissingExtra("report.png", "matplotlib", "plots"))
    report.png needs matplotlib: pip install 'fedqueue[plots]'
    """

    def __init__(self, what: str, package: str, extra: str) -> None:
        self.what, self.package, self.extra = what, package, extra
        super().__init__(f"{what} needs {package}: pip install 'fedqueue[{extra}]'")


class WireError(FedqueueError):
    """Bytes that the protocol does not allow. None of their content has been used."""


class ManifestMismatch(WireError):
    """A model or a frame differs from the manifest of the run."""


class SignatureError(WireError):
    """The signature of a message is missing or invalid, or by another party. The message is ignored."""


class NotEnrolled(SignatureError):
    """The coordinator has no public key of that client, which was never enrolled or has been revoked."""


class Superseded(SignatureError):
    """A valid message from a worker process that has been replaced: another process serves the client now."""


class PolicyRefusal(FedqueueError):
    """A job asks for what the site's policy does not allow. The worker refuses the job before it begins.

    >>> import fedqueue
    >>> class Careful(fedqueue.Task):
    ...     def num_examples(self, data):
    ...         if len(data) < 100:
    ...             raise fedqueue.PolicyRefusal(f"{len(data)} examples: this site trains on 100 or more")
    ...         return len(data)
    >>> Careful().num_examples(range(99))
    Traceback (most recent call last):
    fedqueue.errors.PolicyRefusal: 99 examples: this site trains on 100 or more
    """


class BudgetSpent(PolicyRefusal):
    """A job would cost more privacy than its client has left. The site refuses every further job of the run."""


class StoreError(FedqueueError):
    """Unexpected data in Redis."""


class RunNotFound(StoreError):
    """The Redis server has no run of that name; `run` is the name.

    >>> import fedqueue
    >>> fedqueue.RunNotFound("digits").run
    'digits'
    """

    def __init__(self, run: str) -> None:
        self.run = run
        super().__init__(f"no run named {run!r} on this server; `fedqueue list` lists those there are")


class RunExists(StoreError):
    """A run of that name exists already, so no coordinator can start or resume it now.

    `run` is the name, `problem` says what is in the way, and `hint` what to do.

    >>> import fedqueue
    >>> print(fedqueue.RunExists("digits", "has ended", "choose another name"))
    run 'digits' has ended; choose another name
    """

    def __init__(self, run: str, problem: str, hint: str) -> None:
        self.run, self.problem, self.hint = run, problem, hint
        super().__init__(f"run {run!r} {problem}; {hint}")


class RunLost(StoreError):
    """Redis has lost the run, and this machine has no checkpoint of it."""

    def __init__(self, run: str, checkpoint: Path, cause: str = "") -> None:
        """`cause` says why, where that is known."""
        self.run = run
        super().__init__(
            f"Redis has lost run {run!r}, and there is no checkpoint {checkpoint} to continue from; "
            f"{f'{cause}; then ' if cause else ''}"
            "start it again with the folder that has one, or without a checkpoint to begin with version 0"
        )


class BlobMissing(StoreError):
    """A chunk of a version or of a payload is not in Redis."""

    def __init__(self, key: str) -> None:
        self.key = key
        super().__init__(f"{key} is not stored: the version or payload was deleted, or was never stored completely")


class Fenced(StoreError):
    """Another coordinator leads the run now. What this one was about to write has not been written."""


class ServerUnavailable(FedqueueError):
    """Redis cannot be reached, or refuses this user.

    >>> import tempfile
    >>> import fedqueue
    >>> config = {"task": {"entrypoint": "fedqueue.task:Task"}, "stop": {"versions": 1}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     try:
    ...         fedqueue.run(config, redis={"url": f"unix://{folder}/no.sock"}, folder=folder)
    ...     except fedqueue.ServerUnavailable:
    ...         print("start a server, or leave redis.url empty for an embedded one")
    start a server, or leave redis.url empty for an embedded one
    """


class LoadFailed(FedqueueError):
    """A worker process could load the data of no client, so it has nothing to serve.

    `reasons` is client → type, message and last frames of the exception that the task raised.

    >>> import fedqueue
    >>> print(fedqueue.LoadFailed({"north": "FileNotFoundError: rows.csv"}))
    no client could be loaded: north: FileNotFoundError: rows.csv
    """

    def __init__(self, reasons: Mapping[str, str]) -> None:
        self.reasons = dict(reasons)
        listed = "; ".join(f"{client}: {reason}" for client, reason in self.reasons.items())
        super().__init__(f"no client could be loaded: {listed}")


class ClientTaken(FedqueueError):
    """Another worker serves that client, or no partition is free."""


class JobClosed(FedqueueError):
    """The job's lease has ended, or another attempt owns it. The worker drops its work on the job.

    `progress()` raises JobClosed inside `Task.fit`, which lets it pass.

    >>> import fedqueue
    >>> def progress():
    ...     raise fedqueue.JobClosed("digits-00000001")
    >>> import torch
    >>> data = torch.utils.data.TensorDataset(torch.zeros(4, 1), torch.zeros(4).long())
    >>> fedqueue.Task().fit(torch.nn.Linear(1, 2), data, fedqueue.TrainingConfig(device="cpu"), progress)
    Traceback (most recent call last):
    fedqueue.errors.JobClosed: digits-00000001
    """


class RunFailed(FedqueueError):
    """The run ended without a usable result and cannot continue.

    >>> import fedqueue
    >>> class Broken(fedqueue.Task):
    ...     def model(self):
    ...         import torch
    ...         return torch.nn.Linear(1, 1)
    ...     def train_data(self, client):
    ...         return [1, 2, 3]
    ...     def fit(self, model, data, config, progress):
    ...         raise OSError("the disk is full")
    >>> result = fedqueue.simulate(Broken, clients=1, versions=1)
    >>> if result.failed:
    ...     raise fedqueue.RunFailed(result.stopped_because)
    Traceback (most recent call last):
    fedqueue.errors.RunFailed: ...
    """

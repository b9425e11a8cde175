"""A site's own account of what each client's rows have spent, `privacy-CLIENT.json`.

A job is charged, and the file is on the disk, before its training begins. A crash therefore costs budget, never
privacy: what was charged stays charged, whether an update left or not. The account outlives worker processes and runs.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedqueue.config.privacy import ExamplePrivacyConfig
from fedqueue.errors import BudgetSpent, ConfigurationError, PolicyRefusal
from fedqueue.privacy.spending import Charge, Entry, Spending, over_epsilon_of_run
from fedqueue_worker.policy import Policy

log = structlog.get_logger("fedqueue.worker")

Whole = Annotated[int, Field(ge=1)]


class _EntryRecord(BaseModel):
    """One entry of the file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    run: str
    sampling_rate: Annotated[float, Field(gt=0, le=1)]
    noise_multiplier: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    steps: Whole
    jobs: Whole


class _Record(BaseModel):
    """The file's content."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal[1]
    client: str
    epsilon: float
    delta: float
    spent: list[_EntryRecord]


class PrivacyAccount:
    """The account of one client. Other processes of the site may charge it, too: a lock orders them."""

    def __init__(self, folder: Path, client: str, policy: Policy) -> None:
        """Open the account; raises ConfigurationError where its file is damaged or its folder cannot be written."""
        self.path, self._client, self._policy = folder / f"privacy-{client}.json", client, policy
        self._seen = 0  # jobs that the file contained when this process last read it
        with self._locked():
            self.spending = self._read()

    def require_affordable(self, run: str, charge: Charge, privacy: ExamplePrivacyConfig) -> None:
        """Raises BudgetSpent, which names the figures, where a job of this cost would exceed a budget.

        The budgets are `max_epsilon` of the policy, over all runs, and `epsilon` of the order, over `run`.
        """
        with self._locked():
            self._affordable(self._read(), run, charge, privacy)

    def charge(self, run: str, charge: Charge, privacy: ExamplePrivacyConfig) -> None:
        """Write a job's cost to the disk; the job may train after that. Raises BudgetSpent as `require_affordable`,
        and PolicyRefusal where the account cannot be written.
        """
        with self._locked():
            after = self._affordable(self._read(), run, charge, privacy)
            delta = self._policy.delta or privacy.at_delta
            record = {
                "format": 1, "client": self._client, "epsilon": after.epsilon(delta), "delta": delta,
                "spent": [asdict(entry) for entry in after.entries],
            }  # fmt: skip
            try:
                _write_durably(self.path, json.dumps(record, indent=1) + "\n")
            except OSError as error:
                log.error("privacy account not written", path=str(self.path), error=str(error))
                raise PolicyRefusal(
                    f"the site's privacy account cannot be written ({error.strerror}), and no job trains uncharged"
                ) from None
            self.spending, self._seen = after, after.jobs

    def summary(self, run: str, privacy: ExamplePrivacyConfig) -> str:
        """Return in a line what is spent, in this run and in all."""
        delta = self._policy.delta or privacy.at_delta
        own = self.spending.of_run(run)
        limit = f" of {self._policy.max_epsilon:g}" if self._policy.max_epsilon else ""
        return (
            f"{self._client} has spent ε = {self.spending.epsilon(delta):.3f}{limit} at δ = {delta:g} in "
            f"{self.spending.jobs} jobs, and {own.epsilon(delta):.3f} in the {own.jobs} of this run ({self.path.name})"
        )

    def _affordable(self, before: Spending, run: str, charge: Charge, privacy: ExamplePrivacyConfig) -> Spending:
        after = before.plus(run, charge)
        self._policy.check_spending(self._client, before, after)
        if why := over_epsilon_of_run(run, self._client, before, after, privacy):
            raise BudgetSpent(why)
        return after

    def _read(self) -> Spending:
        try:
            record = _Record.model_validate_json(self.path.read_bytes())
        except FileNotFoundError:
            record = None
        except (OSError, ValidationError) as error:
            reason = error.strerror if isinstance(error, OSError) else "the file is damaged"
            raise ConfigurationError(
                "privacy.folder", str(self.path), f"no privacy account can be read there ({reason})",
                "restore it from a backup: without it, nobody knows what was spent",
            ) from None  # fmt: skip
        if record and record.client != self._client:
            raise ConfigurationError(
                "privacy.folder", str(self.path), f"is the account of {record.client}", "give each client its own file"
            )
        spending = Spending(tuple(Entry(**dict(entry)) for entry in record.spent) if record else ())
        if spending.jobs < self._seen:
            raise PolicyRefusal(
                f"the site's privacy account lists {spending.jobs} jobs, and listed {self._seen} before: it was "
                "replaced or deleted; restore it, then restart the worker"
            )
        self._seen = spending.jobs
        return spending

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        folder = self.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle = os.open(folder / f".{self.path.name}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise ConfigurationError(
                "privacy.folder", str(folder), f"cannot be written ({error.strerror})", "name another folder"
            ) from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def _write_durably(path: Path, text: str) -> None:
    """Replace `path`, mode 0600; when the call returns, the new content survives a loss of power."""
    new = path.with_name(f".{path.name}.new")
    handle = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)

"""What a run waits for, in words, and whether it can go on at all."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

from fedqueue.config.schema import Config
from fedqueue.exception_text import one_line
from fedqueue_coordinator.core.cohorts import Cohorts
from fedqueue_coordinator.core.failures import what_is_missing
from fedqueue_coordinator.core.scheduler import Scheduler

KEEPER_SECONDS = 5.0
"""After which a keeper's answer is said to be awaited."""
NAMED = 5
"""Clients that a message names; the others are counted."""


def waiting_for(
    config: Config, scheduler: Scheduler, unavailable: Mapping[str, str], now: float, cohorts: Cohorts
) -> str:
    """Describe what keeps the run from going on; an empty string if a job is under way or may be dispatched.

    `unavailable` is client → why its data cannot be loaded.
    """
    return (
        _waiting_for_keeper(cohorts, now)
        or _waiting_for_clients(config, scheduler, unavailable, now)
        or _waiting_for_crowd(config, scheduler, cohorts)
    )


def _waiting_for_keeper(cohorts: Cohorts, now: float) -> str:
    if not cohorts.awaited or now - cohorts.awaited[1] < KEEPER_SECONDS:
        return ""
    keeper, since = cohorts.awaited
    missing = "has not answered" if cohorts.has_begun(keeper) else "has not joined the run"
    return f"waiting for keeper {keeper}, which {missing} for {now - since:.0f} s"


def _waiting_for_crowd(config: Config, scheduler: Scheduler, cohorts: Cohorts) -> str:
    if not cohorts.stalled or scheduler.can_train:
        return ""
    absent = [client for client in config.clients.ids if client not in scheduler.clients]
    return f"a version needs updates of other clients ({cohorts.stalled}){_named(absent)}"


def _waiting_for_clients(config: Config, scheduler: Scheduler, unavailable: Mapping[str, str], now: float) -> str:
    if scheduler.started and scheduler.open_jobs:
        return ""
    alive = scheduler.clients
    absent = {*config.clients.ids} - {*alive} - scheduler.without_examples
    missing = [client for client in config.clients.ids if client in absent]
    if not scheduler.started:
        which = f"{_named(missing)}{_reasons(missing, unavailable)}" if alive or unavailable else ""
        return f"{len(alive)} of {config.clients.number} clients alive, waiting for {scheduler.minimum_clients}{which}"
    if not alive:
        return f"no client is alive, waiting for a worker{_named(missing)}{_reasons(missing, unavailable)}"
    if all(map(scheduler.is_set_aside, alive)):
        return f"every client that is alive is set aside, waiting for another one{_named(missing)}"
    rest = scheduler.next_rest
    if rest is not None and rest > now and not scheduler.has_idle:
        return f"the clients rest after failures, until {rest:.1f} s"
    return ""


def dead_end(config: Config, scheduler: Scheduler, gone: Container[str], unavailable: Mapping[str, str]) -> str:
    """Describe why the run can never go on, if no client in `gone` comes back; an empty string if it can.

    `unavailable` is client → why its data cannot be loaded.
    """
    known = dict.fromkeys([*config.clients.ids, *scheduler.registered])
    left = [client for client in known if client not in gone]
    lost = [client for client in known if client in gone]
    if not scheduler.started and len(left) < scheduler.minimum_clients:
        return (
            f"{len(left)} of {len(known)} clients can take part, and {scheduler.minimum_clients} are needed"
            f"{_why(config)}{_named(lost)}{_reasons(lost, unavailable)}"
        )
    if scheduler.started and all(map(scheduler.is_set_aside, left)):
        return f"no client is left that can train{_named(lost)}{_reasons(lost, unavailable)}"
    least = config.secure.min_cohort if config.secure.on else 0
    crowd = len(left) - sum(map(scheduler.is_set_aside, left))
    if crowd < least and not budgets_end(config, scheduler):
        needed = f"{crowd} clients are left that can train, and a version needs {least} (secure.min_cohort)"
        return f"{needed}{_named(lost)}{_reasons(lost, unavailable)}"
    return ""


def budgets_end(config: Config, scheduler: Scheduler) -> str:
    """Describe how used-up privacy budgets leave fewer clients than a version needs; empty while enough are left."""
    if not (config.secure.on and scheduler.declining):
        return ""
    known = {*config.clients.ids, *scheduler.registered}
    if len(known - scheduler.declining) >= config.secure.min_cohort:
        return ""
    return (
        f"the privacy budgets of {len(known & scheduler.declining)} of {len(known)} clients are used up, and a version "
        f"needs {config.secure.min_cohort} clients (secure.min_cohort)"
    )


def names(clients: Iterable[str]) -> str:
    """List up to NAMED clients, and count the others."""
    listed = list(clients)
    more = len(listed) - NAMED
    return ", ".join(listed[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _named(clients: list[str]) -> str:
    return f" (missing: {names(clients)})" if clients else ""


def _why(config: Config) -> str:
    if config.clients.min_available:
        return " (clients.min_available)"
    return f" for each version of {config.aggregation.strategy}" if config.barrier else ""


def _reasons(clients: Iterable[str], unavailable: Mapping[str, str]) -> str:
    known = [client for client in clients if client in unavailable]
    if not known:
        return ""
    error = unavailable[known[0]]
    return f"; {known[0]} {what_is_missing(error)}: {one_line(error)}"

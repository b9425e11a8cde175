"""The scheduler chooses the same clients as its definition, which looks at every idle client for each job."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedqueue.errors import ConfigurationError
from fedqueue_coordinator.core import federation as federation_module
from fedqueue_coordinator.core.idle_pool import IdlePool, Place
from fedqueue_coordinator.core.scheduler import Scheduler
from fedqueue_coordinator.core.selection import SELECTIONS
from fedqueue_coordinator.core.weighted_set import WeightedSet
from tests.support.builders import make_config, make_frame
from tests.support.federation_run import Run
from tests.support.quadratic_scheduler import QuadraticScheduler

CLIENTS = tuple(f"c{i}" for i in range(7))
STEPS = ("join", "join again", "leave", "vanish", "post", "post", "post", "reject", "fail", "return", "lapse", "tick")

steps = st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 6), st.integers(1, 9)), min_size=10, max_size=60)
schedules = st.one_of(
    st.fixed_dictionaries(
        {
            "selection": st.sampled_from(sorted(SELECTIONS)),
            "concurrency": st.integers(1, 5),
            "max_share": st.sampled_from(["off", 0.2, 0.4, 0.75]),
            "share_window": st.integers(2, 5),
            "max_client_failures": st.integers(1, 3),
        }
    ),
    st.fixed_dictionaries(
        {
            "schedule": st.just("fedcompass"),
            "concurrency": st.integers(1, 5),
            "max_share": st.sampled_from(["off", 0.4]),
            "fedcompass": st.just({"min_steps": 1, "max_steps": 6}),
        }
    ),
)
aggregations = st.one_of(
    st.fixed_dictionaries({"strategy": st.just("fedbuff"), "buffer_size": st.integers(1, 3)}),
    st.fixed_dictionaries({"strategy": st.just("fedavg"), "cohort_size": st.integers(1, 3)}),
    st.just({"strategy": "fedasync", "mixing": "delta"}),
)


def begin(scheduler: Any, dispatch: Any, aggregation: Any, seed: Any) -> Any:
    """Start a run whose federation, and that of each successor, has schedulers of this class."""
    config = make_config(
        aggregation=aggregation, dispatch=dispatch, seed=seed, clients={"count": 7, "min_available": 2},
        stop={"versions": 10_000}, admission={"max_rejections": 2},
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(federation_module, "Scheduler", scheduler)
        return Run(config, make_frame())


def take(run: Any, step: Any, client: Any, number: Any) -> None:
    """Let one thing happen; nothing does where the client has no such state."""
    name = CLIENTS[client]
    match step:
        case "join":
            if name not in run.alive:
                run.join(name, examples=number)
        case "join again":
            run.join(name, examples=number)
        case "leave" | "vanish" if name in run.alive:
            run.leave(name) if step == "leave" else run.vanish(name)
        case "tick":
            run.tick(number / 2)
        case _ if run.has_job(name) and not run.federation.stopped:
            match step:
                case "post":
                    run.now += number / 8
                    run.post(name, 0.5, examples=1)
                case "reject":
                    run.post(name, 0.5, examples=0)
                case "fail":
                    run.end(name, "failed")
                case "return":
                    run.end(name, "returned")
                case "lapse":
                    run.lapse(name)


@settings(max_examples=400, deadline=None)
@given(steps=steps, dispatch=schedules, aggregation=aggregations, seed=st.integers(0, 3), crash=st.integers(0, 60))
def test_choices_are_those_of_the_definition(
    steps: Any, dispatch: Any, aggregation: Any, seed: Any, crash: Any
) -> None:
    if dispatch.get("schedule") and aggregation["strategy"] != "fedbuff":
        aggregation = {"strategy": "fedbuff", "buffer_size": 2}
    try:
        runs = [begin(scheduler, dispatch, aggregation, seed) for scheduler in SCHEDULERS]
    except ConfigurationError:
        return  # the share is infeasible in so small a window
    for i, step in enumerate(steps):
        for run, scheduler in zip(runs, SCHEDULERS, strict=True):
            if i == crash:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(federation_module, "Scheduler", scheduler)
                    run.restart()
            take(run, *step)
        real, defined = runs
        assert real.actions == defined.actions
        assert real.ledger == defined.ledger
        idle = [client for client in CLIENTS if client in real.federation._scheduler._idle]
        assert idle == defined.federation._scheduler._idle.clients


SCHEDULERS = (Scheduler, QuadraticScheduler)


# The structures below it

keys = st.tuples(st.integers(0, 3), st.sampled_from("abcdefgh"))


@given(st.lists(st.tuples(st.booleans(), keys, st.integers(0, 5)), max_size=40), keys, st.floats(0, 40))
def test_weighted_set_agrees_with_a_sorted_list(steps: Any, bound: Any, position: Any) -> None:
    ordered: WeightedSet[Any] = WeightedSet()
    weights: dict[Any, Any] = {}
    for adds, key, weight in steps:
        if key in weights:
            ordered.remove(key)
            del weights[key]
        if adds:
            ordered.add(key, weight)
            weights[key] = weight
    held = sorted(weights)
    below = [key for key in held if key < bound]
    sums = [(key, sum(weights[k] for k in held if k <= key)) for key in held]
    assert ordered.first() == (held[0] if held else None)
    assert ordered.last_below(bound) == (below[-1] if below else None)
    assert ordered.weight_below(bound) == sum(weights[key] for key in below)
    assert ordered.at(position) == next((key for key, total in sums if total > position), None)


def test_removing_an_absent_key_is_an_error() -> None:
    ordered: WeightedSet[Any] = WeightedSet()
    ordered.add((1, "a"), 1)
    with pytest.raises(KeyError):
        ordered.remove((1, "b"))


def test_client_that_moves_is_in_the_pool_once() -> None:
    idle = IdlePool()
    for rank in (3, 1, 2):
        idle.put("a", Place(0, rank, 1))
    idle.put("b", Place(0, 2, 1))
    assert len(idle) == 2
    assert idle.first() == ("a", Place(0, 2, 1))
    idle.discard("a")
    idle.discard("a")
    assert "a" not in idle
    assert idle.first() == ("b", Place(0, 2, 1))


def test_draw_follows_the_weights_within_the_lowest_rank() -> None:
    idle = IdlePool()
    for client, place in {"a": (0, 1, 1), "b": (0, 0, 1), "c": (0, 0, 3), "d": (1, 0, 9)}.items():
        idle.put(client, Place(*place))
    assert Counter(idle.drawn(i / 400) for i in range(400)) == {"b": 100, "c": 300}


def test_last_client_is_drawn_if_all_weigh_nothing() -> None:
    idle = IdlePool()
    for client in "bac":
        idle.put(client, Place(0, 0, 0))
    idle.put("d", Place(0, 1, 5))
    assert idle.drawn(0.3) == "c"

"""Every key of a run has its hash tag, and no two keys are equal."""

from __future__ import annotations

import fnmatch
import re

import pytest

from fedqueue.config.names import CLIENT_ID, RUN_NAME
from fedqueue.protocol.keys import Keys, client_tag, job_name, job_without_tag


def all_keys(run: str) -> dict[str, str]:
    keys = Keys(run)
    plain = {n: getattr(keys, n) for n, v in vars(Keys).items() if isinstance(v, property) and n != "pattern"}
    return plain | {
        "job()": keys.job("j-1"),
        "attempt()": keys.attempt("j-1"),
        "site()": keys.site("c"),
        "updates()": keys.updates("c"),
        "model()": keys.model(3),
        "state()": keys.state(3),
        "staged_model()": keys.staged_model(3),
        "staged_state()": keys.staged_state(3),
        "payload()": keys.payload("j-1", 2),
    }


def test_every_key_has_the_hash_tag_and_matches_its_pattern() -> None:
    for key in all_keys("my-run").values():
        assert key.startswith("fedqueue:{my-run}:")
        assert fnmatch.fnmatchcase(key, Keys("my-run").pattern)


def test_all_keys_are_distinct() -> None:
    names = list(all_keys("r").values())
    assert len(set(names)) == len(names)


def test_pattern_of_a_run_matches_no_other_run() -> None:
    for other in ("ru", "runs", "my-run", "run-1"):
        assert not any(fnmatch.fnmatchcase(key, Keys("run").pattern) for key in all_keys(other).values())


def test_keys_built_by_scripts_begin_with_their_prefixes() -> None:
    keys = Keys("r")
    assert keys.model(7) == keys.model_prefix + "7"
    assert keys.state(7) == keys.state_prefix + "7"
    assert keys.payload("j", 2) == keys.payload_prefix + "j:2"
    assert keys.staged_model(4) == keys.model_prefix + "staged:4"
    assert keys.staged_state(4) == keys.state_prefix + "staged:4"
    assert keys.job("j") == keys.job("") + "j"
    assert keys.attempt("j") == keys.attempt("") + "j"
    assert keys.site("c") == keys.site_prefix + "c"
    assert keys.updates("c") == keys.updates_prefix + "c"


def test_each_client_of_each_run_has_its_own_queue() -> None:
    queues = [Keys(run).queue(client) for run in ("a", "b") for client in ("c", "d")]
    assert len(set(queues)) == 4


@pytest.mark.parametrize("name", ["a", "A-1_b", "0", "x" * 64])
def test_valid_run_names_and_client_ids_are_accepted(name: str) -> None:
    assert RUN_NAME.fullmatch(name)
    assert CLIENT_ID.fullmatch(name)


@pytest.mark.parametrize("name", ["", "-a", "_a", ".a", "a b", "a:b", "a{b}", "a*", "ä", "a\n", "x" * 65, "a/b"])
def test_invalid_run_names_are_refused(name: str) -> None:
    assert not RUN_NAME.fullmatch(name)
    assert not CLIENT_ID.fullmatch(name)


def test_client_ids_may_have_dots() -> None:
    assert CLIENT_ID.fullmatch("site.example.org")
    assert not RUN_NAME.fullmatch("site.example.org")


def test_job_names_are_distinct_and_sort_by_number() -> None:
    names = [
        job_name(run, epoch, number, client)
        for run in ("r", "r-1")
        for epoch in (0, 1)
        for number in (1, 2)
        for client in ("a", "b", "x-a")
    ]
    assert len(set(names)) == len(names)
    assert job_name("r", 0, 9, "a") < job_name("r", 0, 10, "b")
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+", name) for name in names), "RQ's alphabet"


@pytest.mark.parametrize("epoch", [0, 3])
def test_tag_ends_a_name_and_can_be_taken_off(epoch: int) -> None:
    job = job_name("my-run", epoch, 42, "site.example.org")
    assert job.endswith("-" + client_tag("my-run", "site.example.org"))
    assert job_without_tag(job) == ("my-run-e3-00000042" if epoch else "my-run-00000042")
    assert job_without_tag("my-run-00000042") == "my-run-00000042"


def test_job_pattern_matches_one_client_of_one_run() -> None:
    jobs = {(run, c): job_name(run, 0, 1, c) for run in ("r", "r-1", "s") for c in ("a", "b", "x-a", "a-00000001")}
    for (run, client), job in jobs.items():
        pattern = f"{run}-*-{client_tag(run, client)}"
        assert [name for name in jobs.values() if fnmatch.fnmatchcase(name, pattern)] == [job]

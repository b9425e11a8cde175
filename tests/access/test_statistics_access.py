"""Rights to questions about the data: a site answers for its own client and for no other."""

from __future__ import annotations

import pytest
import redis

from fedqueue.protocol.keys import Keys
from fedqueue.protocol.messages import Question
from fedqueue.transport.worker_store import WorkerStore
from tests.support.acl_server import AclServer
from tests.support.redis_commands import execute

pytestmark = pytest.mark.server

QUESTION = Question(run="sample", instance="i" * 32, part=1, min_count=10)


def store(server: AclServer, client: str) -> WorkerStore:
    return WorkerStore(server.user(f"worker-{client}"), "sample", f"worker-of-{client}")


def test_a_worker_answers_for_its_own_client_only(guarded: AclServer) -> None:
    keys = Keys("sample")
    operator = guarded.user("coordinator")
    operator.set(keys.question, QUESTION.pack(), ex=60)
    worker = store(guarded, "c0")
    assert worker.question() == QUESTION
    assert worker.take_question(QUESTION, "c0")
    assert not worker.take_question(QUESTION, "c0")
    worker.answer(QUESTION, "c0", b"{}")
    assert operator.hexists(keys.answer("c0"), "1:0")
    guarded.denied()
    for action in (
        lambda: worker.take_question(QUESTION, "c1"),
        lambda: worker.answer(QUESTION, "c1", b"{}"),
        lambda: execute(worker.redis, "SET", keys.question, "forged"),
        lambda: execute(worker.redis, "HGETALL", keys.answer("c1")),
    ):
        with pytest.raises((redis.ResponseError, redis.exceptions.NoPermissionError), match=r"(?i)no permissions"):
            action()
    operator.delete(keys.question, keys.answer("c0"))


def test_a_user_without_the_right_waits_without_a_question(guarded: AclServer) -> None:
    guarded.user("coordinator").set(Keys("sample").question, QUESTION.pack(), ex=60)
    viewer = WorkerStore(guarded.user("viewer"), "sample", "w")
    assert viewer.question() is None

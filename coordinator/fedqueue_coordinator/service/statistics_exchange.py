"""Asks the workers of a run that has not begun about their data, over Redis, and merges their answers.

Two questions follow each other: for counts, sums and ranges, then for histograms on edges common to all sites. Workers
that wait for the run to begin answer them. Nothing of this outlives the description: question and answers are deleted.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection, Sequence
from typing import TypeVar, cast

from pydantic import BaseModel, ValidationError

from fedqueue.config.schema import Config
from fedqueue.errors import FedqueueError, RunExists, WireError
from fedqueue.protocol.coordinator_identity import CoordinatorIdentity
from fedqueue.protocol.messages import MAX_PIECES, AnswerPiece, HistogramRange, Question, read
from fedqueue.protocol.msgpack import MAX_MESSAGE
from fedqueue.statistics.pooled import Statistics, common_bins, merge
from fedqueue.statistics.site_answers import FirstAnswer, SecondAnswer
from fedqueue.transport.store import Store

QUESTION_SECONDS = 60
"""How long a question stays that its asker, who has died, does not renew."""
POLL_SECONDS = 0.1

A = TypeVar("A", bound=BaseModel)


class StatisticsExchange:
    """One description of the data of `clients`, by an asker who waits at most `wait_seconds` for each answer."""

    def __init__(
        self,
        store: Store,
        identity: CoordinatorIdentity | None,
        clients: Sequence[str],
        wait_seconds: float,
        on_waiting: Callable[[Collection[str]], None] = lambda clients: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`on_waiting` is called with the clients that have not answered yet, between two looks."""
        self._store, self._identity, self._clients = store, identity, clients
        self._wait_seconds, self._on_waiting = wait_seconds, on_waiting
        self._clock, self._sleep = clock, sleep
        self._instance = secrets.token_hex(16)
        self.refused: dict[str, str] = {}
        """Client → why it did not answer."""

    def describe(self, config: Config) -> Statistics:
        """Ask both questions, and merge the answers.

        Raises RunExists where a run of this name is in Redis, because its workers answer no more, and FedqueueError
        where no client answered.
        """
        store, settings = self._store, config.statistics
        if store.redis.exists(store.keys.config):
            raise RunExists(
                store.run,
                "is in Redis already, and workers describe their data only before it begins",
                f"describe under another name that the sites' workers wait for, or `fedqueue remove {store.run}` first",
            )
        question = Question(run=store.run, instance=self._instance, part=1, min_count=settings.min_count)
        self._delete_answers()
        try:
            first = self._ask(question, FirstAnswer, self._clients)
            if not first:
                client, why = next(iter(self.refused.items()))
                raise FedqueueError(f"no client described its data; {client}: {why}")
            bins = common_bins(first, settings.bins, settings.bounds)
            ranges = {name: HistogramRange(**of.model_dump()) for name, of in bins.items()}
            second_question = question.model_copy(update={"part": 2, "ranges": ranges})
            second = self._ask(second_question, SecondAnswer, list(first))
        finally:
            store.redis.delete(store.keys.question)
            self._delete_answers()
        for client in [client for client, answer in second.items() if not answer.fits(bins)]:
            self.refused[client] = "its histograms are not those that were asked for"
            del second[client]
        return merge(store.run, first, second, bins, self.refused)

    def _delete_answers(self) -> None:
        for client in self._clients:
            self._store.redis.delete(self._store.keys.answer(client))

    def _ask(self, question: Question, kind: type[A], clients: Sequence[str]) -> dict[str, A]:
        """The answers of these clients; those that refuse, or do not answer in time, are added to `refused`."""
        packed = question.pack()
        signed = self._identity.sign_question(packed) if self._identity else packed
        redis, deadline = self._store.redis, self._clock() + self._wait_seconds
        answers: dict[str, A] = {}
        missing = list(clients)
        while True:
            redis.set(self._store.keys.question, signed, ex=QUESTION_SECONDS)
            for client in list(missing):
                try:
                    found = self._answer_of(question, client, kind)
                except (WireError, ValidationError) as error:
                    problem = error if isinstance(error, WireError) else f"{kind.__name__} of another form"
                    self.refused[client] = f"its answer is not valid: {problem}"
                    missing.remove(client)
                else:
                    if isinstance(found, str):
                        self.refused[client] = found
                    elif found is not None:
                        answers[client] = found
                    if found is not None:
                        missing.remove(client)
            if not missing:
                return answers
            if self._clock() > deadline:
                self.refused.update(
                    dict.fromkeys(missing, f"no answer in {self._wait_seconds:g} s: is its fedqueue-worker running?")
                )
                return answers
            self._on_waiting(missing)
            self._sleep(POLL_SECONDS)

    def _answer_of(self, question: Question, client: str, kind: type[A]) -> A | str | None:
        """The client's answer, why it refuses, or None as long as it has not answered."""
        first = self._piece(question, client, 0)
        if first is None:
            return None
        if first.refusal:
            return first.refusal
        bodies = [first.body]
        for number in range(1, first.pieces):
            piece = self._piece(question, client, number)
            if piece is None or piece.pieces != first.pieces:
                raise WireError(f"piece {number} of {first.pieces} is missing")
            bodies.append(piece.body)
        return kind.model_validate_json(b"".join(bodies))

    def _piece(self, question: Question, client: str, number: int) -> AnswerPiece | None:
        assert number < MAX_PIECES
        redis, key, field = self._store.redis, self._store.keys.answer(client), f"{question.part}:{number}"
        size = redis.hstrlen(key, field)
        if not size:
            return None
        if size > MAX_MESSAGE:
            raise WireError(f"a piece of {size} bytes")
        data = cast(bytes, redis.hget(key, field))
        if self._identity:
            data = self._identity.open_answer(client, question.instance, [question.part, number], data)
        piece = read(AnswerPiece, data)
        if (piece.client, piece.part, piece.piece) != (client, question.part, number):
            raise WireError(f"an answer of client {piece.client} in place of {client}")
        return piece

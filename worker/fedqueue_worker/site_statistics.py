"""Answers `fedqueue describe` for the clients of one worker process, before the run begins and under the site's policy.

A client answers once in a run. Its answer is kept in a file and repeated, and a question that differs from the one that
was answered is refused, and so is any question once the data has changed: two answers that differ by one row tell it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog

from fedqueue.config.schema import Config
from fedqueue.errors import FedqueueError, PolicyRefusal, TaskError, WireError
from fedqueue.exception_text import exception_text, exception_with_place, one_line
from fedqueue.protocol.key_files import write_private
from fedqueue.protocol.messages import Question
from fedqueue.statistics.site_answers import STATISTICS, Bins, SiteTable
from fedqueue.statistics.table import Categories, Column, read_table
from fedqueue.task import Task
from fedqueue_worker.egress_log import EgressLog
from fedqueue_worker.policy import Policy
from fedqueue_worker.retrying_store import RetryingStore

log = structlog.get_logger("fedqueue.worker")

MAX_REFUSAL = 2000  # characters


class SiteStatistics:
    """The tables of a worker's clients, each loaded at the first question about it."""

    def __init__(self, config: Config, task: Task, store: RetryingStore, policy: Policy, egress_log: EgressLog) -> None:
        self._config, self._task, self._store, self._policy, self._egress = config, task, store, policy, egress_log
        self._columns: dict[str, Mapping[str, Column]] = {}
        self._mine: set[str] = set()  # clients that this process has answered for
        self._seen: tuple[str, int] = "", 0  # the question that was looked at last
        self._invalid = ""

    def answer_if_asked(self, candidates: Sequence[Sequence[str]], stopping: Callable[[], bool]) -> None:
        """Answer the present question for one client of each list of candidates that no other process answers for."""
        try:
            question = self._store.question()
        except WireError as error:
            if str(error) != self._invalid:
                self._invalid = str(error)
                log.warning("question about the data ignored; compare the keys with the operator", error=str(error))
            return
        if question is None or (question.instance, question.part) == self._seen:
            return
        for options in candidates:
            for client in sorted(options, key=lambda name: name not in self._mine):
                if stopping():
                    return
                if self._store.take_question(question, client):
                    self._mine.add(client)
                    self._answer(question, client)
                    break
        self._seen = question.instance, question.part

    def _answer(self, question: Question, client: str) -> None:
        body, refusal = b"", ""
        about: dict[str, Any] = {}
        try:
            self._policy.check_description()
            body, about = self._body(question, client)
        except PolicyRefusal as error:
            refusal = str(error)
        except (Exception, SystemExit) as error:
            log.error(
                "data not described",
                client=client,
                error=exception_text(error),
                exc_info=not isinstance(error, FedqueueError) and error,
            )
            refusal = str(error) if isinstance(error, TaskError) else exception_with_place(error)
        refusal = one_line(refusal, MAX_REFUSAL)
        self._egress.log_answer(client, question.part, body, refusal, **about)
        self._store.answer(question, client, body, refusal)
        if refusal:
            log.warning("question about the data refused", client=client, part=question.part, reason=refusal)
        else:
            log.info("data described", client=client, part=question.part, bytes=len(body))

    def _body(self, question: Question, client: str) -> tuple[bytes, dict[str, Any]]:
        """The answer as JSON, and what it is about; raises PolicyRefusal for a question that differs from a former."""
        if client not in self._columns:
            self._columns[client] = read_table(self._task.table(self._config.clients.client(client)))
        columns = self._columns[client]
        allowed = [name for name in STATISTICS if self._policy.statistics is None or name in self._policy.statistics]
        table = SiteTable(columns, max(question.min_count, self._policy.min_count or 1), allowed)
        ranges = {name: of.model_dump() for name, of in sorted(question.ranges.items())}
        asked = {"min_count": table.min_count, "statistics": allowed, "data": _digest(columns)}
        kept = _KeptAnswers(Path(self._config.statistics.folder) / question.run / f"{client}.json")
        about = {"columns": list(columns), "min_count": table.min_count, "statistics": allowed}
        if question.part == 1:
            return kept.answer("first", asked, lambda: table.first_answer().model_dump_json()).encode(), about
        kept.require_first(asked)
        bins = {name: Bins(**of) for name, of in ranges.items()}
        answer = kept.answer(
            "second", {**asked, "ranges": ranges}, lambda: table.second_answer(bins).model_dump_json()
        )  # fmt: skip
        return answer.encode(), about


class _KeptAnswers:
    """What one client answered in one run, in a file that only its user may read."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def _read(self) -> dict[str, Any]:
        try:
            kept = json.loads(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise PolicyRefusal(f"{self._path}, with former answers, cannot be read: {exception_text(error)}") from None
        return kept if isinstance(kept, dict) else {}

    def require_first(self, asked: Mapping[str, Any]) -> None:
        """Raise PolicyRefusal unless the first question was answered with these limits, about this data."""
        self._require_same(self._read().get("first"), asked)

    def answer(self, name: str, asked: Mapping[str, Any], make: Callable[[], str]) -> str:
        """Return the kept answer, or make and keep it; raises PolicyRefusal where another question was answered."""
        kept = self._read()
        if name in kept:
            self._require_same(kept[name], asked)
            text: str = kept[name]["answer"]
            return text
        text = make()
        kept[name] = {"asked": dict(asked), "answer": text}
        write_private(self._path, json.dumps(kept).encode())
        return text

    def _require_same(self, kept: Any, asked: Mapping[str, Any]) -> None:
        if kept is None:
            raise PolicyRefusal("histograms are given only after counts and sums")
        then = kept["asked"]
        if then == dict(asked):
            return
        what = next(name for name in asked if then.get(name) != asked[name])
        words = {
            "data": "the data has changed since it was described in this run, and two answers would tell the rows that "
            "changed",
            "min_count": f"the data was described with min_count {then.get('min_count')} in this run, not "
            f"{asked.get('min_count')}",
            "statistics": "the policy's statistics have changed since the data was described in this run",
            "ranges": "the histograms were given on other edges in this run, and both would tell the rows between them",
        }
        raise PolicyRefusal(
            f"{words[what]}; describe under another name of the run, or the site deletes {self._path.name} in its "
            "statistics folder"
        )


def _digest(columns: Mapping[str, Column]) -> str:
    digest = hashlib.sha256()
    for name, column in sorted(columns.items()):
        names = column.names if isinstance(column, Categories) else ()
        digest.update(json.dumps([name, names, len(column.values)]).encode())
        digest.update(column.values.tobytes())
    return digest.hexdigest()

"""A worker's store whose calls are repeated until Redis answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from fedqueue.protocol.messages import Ending, Order, Question, Unavailable, Update
from fedqueue.protocol.post_result import PostResult
from fedqueue.protocol.run_info import RunInfo
from fedqueue.tensors.blobs import BlobBuffer
from fedqueue.tensors.codec import Codec
from fedqueue.tensors.frame import Frame
from fedqueue.transport.retry import RedisRetry
from fedqueue.transport.transfer import Download, Upload
from fedqueue.transport.worker_store import Claim, WorkerStore, decode_into
from fedqueue.transport.zero_copy import Command, Moved


class RetryingStore:
    """The calls of WorkerStore that are safe to repeat, each repeated through an outage of Redis.

    Every method raises ServerUnavailable where waiting cannot help, or once `given_up()` is true.
    """

    def __init__(self, store: WorkerStore, given_up: Callable[[], bool]) -> None:
        self._store = store
        self._retry = RedisRetry(given_up)
        self.received_bytes = 0
        """Bytes of models that were downloaded."""

    def info(self) -> RunInfo:
        """As `WorkerStore.info`."""
        return self._retry.call(self._store.info)

    def question(self) -> Question | None:
        """As `WorkerStore.question`."""
        return self._retry.call(self._store.question)

    def take_question(self, question: Question, client: str) -> bool:
        """As `WorkerStore.take_question`."""
        return self._retry.call(partial(self._store.take_question, question, client))

    def answer(self, question: Question, client: str, body: bytes, refusal: str = "") -> None:
        """As `WorkerStore.answer`."""
        self._retry.call(partial(self._store.answer, question, client, body, refusal))

    def join(self, candidates: Sequence[str], lease_seconds: float) -> str | None:
        """As `WorkerStore.join`."""
        return self._retry.call(partial(self._store.join, candidates, lease_seconds))

    def report_unavailable(self, unavailable: Unavailable) -> None:
        """As `WorkerStore.report_unavailable`."""
        self._retry.call(partial(self._store.report_unavailable, unavailable))

    def open_order(self, order: bytes | dict[str, Any]) -> Order:
        """As `WorkerStore.open_order`."""
        return self._retry.call(partial(self._store.open_order, order))

    def claim(self, job: str, lease_seconds: float, client: str) -> Claim:
        """As `WorkerStore.claim`."""
        return self._retry.call(partial(self._store.claim, job, lease_seconds, client))

    def fetch_model(
        self, version: int, codec: Codec, into: Frame, moved: Moved, after_piece: Callable[[], None]
    ) -> str:
        """As `WorkerStore.fetch_model`, but an outage costs one piece. Both functions may raise JobClosed.

        Returns the digest of the version as `WorkerStore.verify`. `moved` is called when bytes arrive, and
        `after_piece` after each piece but the last.
        """
        wire = self._retry.call(partial(self._store.memory_for, version, codec, into))
        download = self._store.download(version, wire, moved)
        self._finish(download, after_piece)
        self.received_bytes += wire.nbytes
        digest = self._retry.call(partial(self._store.verify, version, download))
        decode_into(into, codec, wire)
        return digest

    def keeper_keys(self, keepers: Sequence[str]) -> list[bytes | None]:
        """As `WorkerStore.keeper_keys`."""
        return self._retry.call(partial(self._store.keeper_keys, keepers))

    def fetch_frozen(self, nbytes: int, moved: Moved, after_piece: Callable[[], None]) -> BlobBuffer:
        """The model's frozen tensors, of `nbytes` bytes; as `fetch_model`."""
        frozen = np.empty(nbytes, np.uint8)
        self._finish(self._store.download_frozen(frozen, moved), after_piece)
        self.received_bytes += nbytes
        self._store.verify_frozen(frozen)
        return frozen

    def _finish(self, transfer: Download | Upload, after_piece: Callable[[], None]) -> None:
        while self._retry.call(transfer.step):
            after_piece()

    def release_base(self, claim: Claim) -> None:
        """As `WorkerStore.release_base`."""
        self._retry.call(partial(self._store.release_base, claim))

    def post(
        self,
        claim: Claim,
        update: Update,
        payload: BlobBuffer,
        then: Sequence[Command],
        lease_seconds: Callable[[], float],
        moved: Moved,
        after_piece: Callable[[], None],
    ) -> PostResult:
        """As `WorkerStore.upload` and `post`, but an outage costs one piece; `moved` and `after_piece` as above."""
        upload = self._store.upload(claim, payload, lease_seconds, moved)
        self._finish(upload, after_piece)
        return self._retry.call(partial(self._store.post, claim, update, payload, then, upload))

    def end(self, claim: Claim, ending: Ending) -> PostResult:
        """As `WorkerStore.end`."""
        return self._retry.call(partial(self._store.end, claim, ending))

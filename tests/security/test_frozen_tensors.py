"""Frozen tensors are sent once, signed by their digest in the run's descriptor, and verified by every reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
import torch

from fedqueue.errors import BlobMissing, SignatureError
from fedqueue.protocol.coordinator_identity import load_coordinator_identity
from fedqueue.protocol.site_identity import load_site_identity
from fedqueue.tensors.frame import Frame
from fedqueue.tensors.manifest import Manifest
from fedqueue.transport.worker_store import WorkerStore
from fedqueue_coordinator.operator.access.enrolment import enroll_missing
from fedqueue_coordinator.operator.audit.signatures import verify_model, verify_signatures
from fedqueue_coordinator.service.coordinator_store import CoordinatorStore
from tests.support.builders import make_config

RUN = "frozen"


class Published:
    """A signed run with version 0 in Redis, whose model has a frozen bfloat16 layer."""

    def __init__(self, client: Any, folder: Any) -> None:
        self.redis, self.keys = client, folder / "keys"
        enroll_missing(self.keys, ["c0"])
        module = torch.nn.Sequential(torch.nn.Linear(3, 2).bfloat16().requires_grad_(False), torch.nn.Linear(2, 1))
        self.manifest = Manifest.from_module(module)
        self.frame = Frame(self.manifest)
        self.frame.read(module)
        self.identity = load_coordinator_identity(self.keys, RUN)
        self.store = CoordinatorStore(client, RUN, "owner", self.identity)
        assert self.store.lead(3600)
        config = make_config(name=RUN).model_dump_json()
        self.store.create(config, self.manifest, clients=["c0"], frozen=self.frame.frozen)
        self.store.publish(0, self.frame.buffer, np.empty(0, np.uint8), [], {}, [])
        self.site = load_site_identity(self.keys / "sites" / "c0", RUN, "session")
        self.worker = WorkerStore(client, RUN, "session", self.site)

    def tamper(self) -> None:
        self.redis.setrange(f"{self.store.keys.frozen}:0", 3, b"\x7f")


@pytest.fixture
def published(redis_client: redis.Redis, tmp_path: Path) -> Published:
    return Published(redis_client, tmp_path)


def fetch(published: Published) -> Any:
    published.site.enter(published.store.info())
    frozen = np.empty(published.manifest.frozen_nbytes, np.uint8)
    download = published.worker.download_frozen(frozen)
    while download.step():
        pass
    published.worker.verify_frozen(frozen)
    return frozen


def frozen_bytes(published: Published) -> bytes:
    assert published.frame.frozen is not None
    return published.frame.frozen.tobytes()


def test_worker_fetches_the_frozen_tensors_bit_for_bit(published: Published) -> None:
    assert fetch(published).tobytes() == frozen_bytes(published)


def test_worker_refuses_other_frozen_tensors(published: Published) -> None:
    published.tamper()
    with pytest.raises(SignatureError, match="frozen tensors in Redis are not those that the coordinator signed"):
        fetch(published)


def test_worker_reports_missing_frozen_tensors(published: Published) -> None:
    published.redis.delete(f"{published.store.keys.frozen}:0")
    with pytest.raises(BlobMissing):
        fetch(published)


def test_successor_refuses_other_frozen_tensors(published: Published) -> None:
    successor, info = load_coordinator_identity(published.keys, RUN), published.store.info()
    successor.resume(info, published.store.read_frozen(published.manifest.frozen_nbytes))
    published.tamper()
    with pytest.raises(SignatureError, match="frozen tensors in Redis"):
        successor.resume(info, published.store.read_frozen(published.manifest.frozen_nbytes))


def test_descriptor_of_a_later_term_names_the_same_tensors(published: Published) -> None:
    fetch(published)
    info = published.store.info()
    published.store.set_descriptor(published.identity.resume(info, published.frame.frozen))
    assert fetch(published).tobytes() == frozen_bytes(published)


def test_audit_and_export_find_other_frozen_tensors(published: Published) -> None:
    store, info, frozen = published.store, published.store.info(), published.frame.frozen
    assert verify_signatures(store, info, [], published.keys).problems == []
    assert verify_model(store, info, 0, published.frame.buffer, published.keys, frozen=frozen) == ""
    published.tamper()
    [problem] = verify_signatures(store, info, [], published.keys).problems
    assert "frozen tensors in Redis" in problem
    read = store.read_frozen(published.manifest.frozen_nbytes)
    with pytest.raises(SignatureError, match="frozen tensors in Redis"):
        verify_model(store, info, 0, published.frame.buffer, published.keys, frozen=read)

"""Publishes the newest version of a federation: encodes the model and commits it in Redis."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedqueue.tensors.blobs import BlobBuffer
from fedqueue_coordinator.core.events import Commit
from fedqueue_coordinator.core.federation import Federation
from fedqueue_coordinator.service.coordinator_store import CoordinatorStore


def publish_newest(
    store: CoordinatorStore, federation: Federation, commits: Sequence[Commit] = ()
) -> tuple[set[int], BlobBuffer]:
    """Commit the newest version, together with the ledger records and merged updates of `commits`.

    `commits` are those of the versions since the last publication, oldest first. Returns the versions that stay stored,
    and the newest one as it is published. Raises as `CoordinatorStore.publish`.
    """
    wire = federation.downlink.encode(federation.model, federation.version)
    stored = store.publish(
        federation.version,
        wire,
        np.frombuffer(federation.optimizer_state, np.uint8),
        records=[commit.record for commit in commits],
        totals=federation.run_counters.committed(),
        merged=[arrived.entry for commit in commits for arrived in commit.merged],
        keep_payloads=federation.config.ledger.keep_payloads,
        job_number=federation.job_number,
        largest_model=federation.downlink.largest,
        largest_payload=federation.uplink.largest,
        masks=[
            f"{keeper}:{commit.record['cohort']}" for commit in commits for keeper in commit.record.get("masks", ())
        ],
    )
    if federation.config.secure.on and store.identity:
        federation.published(federation.version, store.identity.newest_model)
    return stored, wire

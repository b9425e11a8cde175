"""Checkpoints: the coordinator's copy of a run on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from fedqueue.errors import StoreError
from fedqueue_coordinator.service.checkpoint import Checkpoint, Checkpointer, load_checkpoint, save_checkpoint

CHECKPOINT = Checkpoint(
    run="toy",
    manifest_digest="abc",
    epoch=1,
    version=7,
    job_number=19,
    totals={"updates": 14, "seconds": 2.5, "merged_by": {"client-0": 14}},
    unfinished={"toy-e1-00000019": "client-0"},
    model=np.arange(24, dtype=np.uint8),
    frozen=np.arange(8, dtype=np.uint8),
    optimizer_state=b"\x00\x01",
    ledger=[{"kind": "version", "version": 7, "merged": [{"job": "toy-e1-00000018", "weight": 0.1}]}],
)


def same(a: Checkpoint | None, b: Checkpoint) -> bool:
    assert a is not None
    equal = np.array_equal(a.model, b.model) and np.array_equal(a.frozen, b.frozen)
    arrays = ("model", "frozen")  # `==` of arrays is no bool
    return equal and all(getattr(a, name) == value for name, value in vars(b).items() if name not in arrays)


def test_checkpoint_round_trips(tmp_path: Path) -> None:
    path = tmp_path / "new" / "checkpoint.safetensors"
    save_checkpoint(path, CHECKPOINT)
    assert same(load_checkpoint(path), CHECKPOINT)


def test_empty_checkpoint_round_trips(tmp_path: Path) -> None:
    bare = replace(CHECKPOINT, frozen=np.empty(0, np.uint8), optimizer_state=b"", ledger=[], unfinished={})
    save_checkpoint(tmp_path / "c", bare)
    assert same(load_checkpoint(tmp_path / "c"), bare)


def test_missing_file_reads_as_no_checkpoint(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "none") is None


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\xff" * 100])
def test_invalid_checkpoint_error_names_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"checkpoint\.safetensors"):
        load_checkpoint(path)


def test_safetensors_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"model": np.zeros(3)}, path)
    with pytest.raises(StoreError, match="no checkpoint of this version"):
        load_checkpoint(path)


def test_interrupted_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, CHECKPOINT)

    def die(*arguments: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("fedqueue_coordinator.service.checkpoint.os.fsync", die)
    checkpointer = Checkpointer(path, seconds=10)
    checkpointer.start(replace(CHECKPOINT, version=8), now=10)
    checkpointer.join()
    kept = load_checkpoint(path)
    assert kept is not None
    assert kept.version == 7


def test_checkpoints_are_periodic_and_deleted_at_the_end(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path / "c", seconds=30)
    assert not checkpointer.due(29.9)
    assert checkpointer.due(30)
    checkpointer.start(CHECKPOINT, now=30)
    checkpointer.join()
    assert not checkpointer.due(59.9)
    assert checkpointer.due(60)
    checkpointer.delete()
    assert load_checkpoint(tmp_path / "c") is None
    assert not Checkpointer(tmp_path / "c", seconds=None).due(1e9)


def test_part_of_a_checkpoint_is_not_left_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, CHECKPOINT)

    def fill(arrays: object, new: Path, metadata: object) -> None:
        new.write_bytes(b"a part")
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", fill)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(path, replace(CHECKPOINT, version=8))
    assert list(tmp_path.iterdir()) == [path]
    assert same(load_checkpoint(path), CHECKPOINT)

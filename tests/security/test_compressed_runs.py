"""Signed runs with compression in both directions: workers get rounded versions, and recovery is exact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from numpy.typing import NDArray

from fedqueue.errors import SignatureError, StoreError
from fedqueue.tensors.codec import Encoded, downlink_codec, uplink_codec
from fedqueue.tensors.frame import Frame
from fedqueue_coordinator.core.server_state import MODEL, load_state
from fedqueue_coordinator.operator.audit.audit import audit, ok
from fedqueue_coordinator.operator.audit.audit_input import read_run_in_redis
from fedqueue_coordinator.operator.audit.signatures import verify_model
from fedqueue_coordinator.operator.export import _read_newest
from fedqueue_coordinator.service.coordinator_store import CoordinatorStore
from tests.support.redis_commands import stored
from tests.support.scene import RUN, Scene, Site

SMALL = {
    "uplink": "int8",
    "uplink_lossless": "zstd",
    "downlink": "bfloat16",
    "downlink_lossless": "zstd",
    "int8_block": 16,
}


class Compressed(Scene):
    def __init__(self, client: redis.Redis, folder: Path, **sections: Any) -> None:
        sections = {"compression": SMALL, "ledger": {"keep_payloads": True}, **sections}
        super().__init__(client, folder, **sections)
        self.uplink = uplink_codec(self.config.compression, self.manifest)
        self.downlink = downlink_codec(self.config.compression, self.manifest)

    def wire(self, value: float = 1.0, seed: int = 0) -> NDArray[Any]:
        frame = Frame(self.manifest)
        frame.parameters.copy_(frame.parameters.new_tensor([value / (i + 3) for i in range(8)]))
        return self.uplink.encode(frame, seed)

    def post(self, site: Site, value: float = 1.0, wire: NDArray[Any] | None = None, **fields: Any) -> Frame:
        """Post an update of the site's job."""
        claim = site.store.claim(site.job, 3600, site.client)
        base = Frame(self.manifest)
        site.store.fetch_model(claim.version, self.downlink, base)
        wire = self.wire(value) if wire is None else wire
        header = {"encoding": self.uplink.name, "nbytes": wire.nbytes, **fields}
        assert site.store.post(claim, site.update(**header), wire) == ""
        return base


@pytest.fixture
def scene(redis_client: redis.Redis, tmp_path: Path) -> Compressed:
    return Compressed(redis_client, tmp_path)


def test_workers_get_rounded_models_but_recovery_is_exact(scene: Compressed) -> None:
    site, bases = scene.site("c0"), []
    train = lambda: bases.append(scene.post(site))  # noqa: E731
    model = scene.play(site.join, train, train, train).federation.model
    assert scene.version == 3
    got = Frame(scene.manifest)
    site.store.fetch_model(3, scene.downlink, got)
    exact, rounded = model.parameters.double(), got.parameters.double()
    assert ((exact - rounded).abs() <= exact.abs() * 2.0**-8).all()
    assert (exact != rounded).any()
    assert len({base.parameters.sum().item() for base in bases}) == 3


def test_successor_has_the_same_bits_as_an_uninterrupted_run(fake_client: redis.Redis, tmp_path: Path) -> None:
    models = []
    for breaks in (False, True):
        fake_client.flushall()
        scene = Compressed(fake_client, tmp_path / str(breaks), seed=5)
        site = scene.site("c0")
        steps = [lambda v=v, scene=scene, site=site: scene.post(site, v) for v in (1.0, 0.3, -0.7, 0.01)]
        if breaks:
            scene.play(site.join, *steps[:2])
            models.append(scene.play(*steps[2:]).federation.model)
        else:
            models.append(scene.play(site.join, *steps).federation.model)
        audit_input = read_run_in_redis(CoordinatorStore(fake_client, RUN, owner="audit"), Path("keys"))
        assert audit_input.replay is not None
        assert audit_input.replay.updates == 4
        assert ok(audit(audit_input)), audit_input.replay.problems
    np.testing.assert_array_equal(models[0].buffer, models[1].buffer)


def test_audit_detects_a_head_that_differs_from_its_updates(scene: Compressed) -> None:
    site = scene.site("c0")
    scene.play(site.join, lambda: scene.post(site))
    other = scene.downlink.encode(Frame(scene.manifest), 1)
    scene.redis.set(f"{scene.keys.model(1)}:0", other.tobytes())
    audit_input = read_run_in_redis(CoordinatorStore(scene.redis, RUN, owner="audit"), scene.key_folder)
    assert audit_input.replay is not None
    assert "the model differs" in audit_input.replay.problems[0]


def test_head_is_exported_exactly_and_old_versions_as_published(scene: Compressed) -> None:
    site = scene.site("c0")
    model = scene.play(site.join, lambda: scene.post(site)).federation.model
    store = CoordinatorStore(scene.redis, RUN, owner="export")
    version, wire, state = _read_newest(store, scene.downlink)
    assert version == 1
    assert state is not None
    np.testing.assert_array_equal(wire, store.read_wire(1, scene.downlink))
    np.testing.assert_array_equal(load_state(state)[MODEL]["parameters"], model.parameters)
    assert verify_model(store, store.info(), 1, wire, scene.key_folder, state) == ""
    with pytest.raises(SignatureError, match="optimizer's state"):
        verify_model(store, store.info(), 1, wire, scene.key_folder, state[:-1])
    assert store.read_model(0, scene.downlink).parameters.numel() == 8
    scene.redis.delete(f"{scene.keys.state(1)}:0")
    with pytest.raises(StoreError, match="faster"):
        _read_newest(store, scene.downlink)


def test_changed_exact_model_in_redis_is_refused(scene: Compressed) -> None:
    site = scene.site("c0")
    scene.play(site.join, lambda: scene.post(site))
    key = f"{scene.keys.state(1)}:0"
    state = bytearray(stored(scene.redis, key))
    state[-1] ^= 64
    scene.redis.set(key, bytes(state))
    with pytest.raises(SignatureError, match="optimizer's state"):
        scene.play()


def test_one_version_and_no_payload_stay_in_redis(redis_client: redis.Redis, tmp_path: Path) -> None:
    scene = Compressed(redis_client, tmp_path, ledger={})
    site = scene.site("c0")
    scene.play(site.join, *[lambda v=v: scene.post(site, v) for v in (0.0, 1.0, 1e-3, 5.0)])
    prefix = f"fedqueue:{{{RUN}}}:"
    names = {key.decode().removeprefix(prefix) for key in scene.redis.scan_iter(match=prefix + "*")}
    assert {n for n in names if n.startswith(("model:", "state:", "payload:"))} == {
        "model:4:0",
        "model:4:1",
        "state:4:0",
    }


@pytest.mark.parametrize(
    "aggregation", [{"strategy": "fedasync", "mixing": "delta"}, {"strategy": "fedbuff", "buffer_size": 1}]
)
@pytest.mark.parametrize("up", ["float16", "int8", "topk", "randomk"])
def test_merging_never_decodes_a_whole_update(
    fake_client: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, aggregation: dict[str, Any], up: str
) -> None:
    scene = Compressed(
        fake_client, tmp_path, aggregation=aggregation, compression={"uplink": up, "uplink_lossless": "zstd"}
    )
    site = scene.site("c0")

    def whole(self: Any) -> None:
        raise AssertionError("a float32 temporary as large as the model")

    monkeypatch.setattr(Encoded, "whole", whole)
    scene.play(site.join, lambda: scene.post(site), lambda: scene.post(site))
    assert scene.version == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: {"encoding": "int8"}, "wrong_encoding"),
        (lambda s: {"encoding": "float32"}, "wrong_encoding"),
        (lambda s: {"wire": np.zeros(s.uplink.largest + 1, np.uint8)}, "wrong_size"),
        (lambda s: {"wire": np.zeros(4, np.uint8)}, "wrong_size"),
        (lambda s: {"wire": np.frombuffer(b"\x19" + bytes(24), np.uint8)}, "malformed"),
        (lambda s: {"wire": s.wire(float("nan"))}, "non_finite"),
    ],
)
def test_update_of_another_encoding_is_rejected(
    fake_client: redis.Redis, tmp_path: Path, change: Callable[..., Any], reason: str
) -> None:
    scene = Compressed(fake_client, tmp_path)
    site = scene.site("c0")
    fields = change(scene)
    scene.play(site.join, lambda: scene.post(site, **fields))
    assert scene.reasons() == [reason]
    assert scene.version == 0


def test_topk_positions_out_of_range_are_malformed(fake_client: redis.Redis, tmp_path: Path) -> None:
    scene = Compressed(fake_client, tmp_path, compression={"uplink": "topk", "topk_ratio": 0.25})
    site, bad = scene.site("c0"), scene.wire()
    bad[:8].view(np.uint32)[1] = 99
    scene.play(site.join, lambda: scene.post(site, wire=bad), lambda: scene.post(site))
    assert scene.reasons() == ["malformed"]
    assert scene.version == 1

"""What the updates of one client tell, measured at its own site before it joins a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fedqueue.config.client import Client
from fedqueue.config.schema import Config
from fedqueue.leak.attacks import ENCODINGS, Attacks, Gallery, Seen, encoded
from fedqueue.leak.canaries import canary_measurements
from fedqueue.leak.measurement import NOTHING, ROW_NOISE, Measurement
from fedqueue.leak.row_data import all_of, hold_out, matched, rows_of, rows_of_job
from fedqueue.local_model import LocalModel
from fedqueue.local_update import compute_update
from fedqueue.private_training import check_example_privacy, simulated_key
from fedqueue.protocol.messages import Order
from fedqueue.task import Task, make_model
from fedqueue.tensors.codec import Codec, uplink_codec
from fedqueue.tensors.frame import Frame
from fedqueue.tensors.manifest import Manifest
from fedqueue.training import check_device, check_training, set_seed

JOBS = 8
"""First jobs of a rehearsal: each one starts from version 0, and sees the rows in an order of its own."""


@dataclass(frozen=True)
class Rehearsal:
    """What was measured."""

    measurements: Sequence[Measurement]
    galleries: Sequence[Gallery]
    """For the picture."""
    control: str
    """Where the rows come from that were never trained on."""


def rehearse(
    config: Config, task: Task, client: Client, data: Any, jobs: int = JOBS,
    on_job: Callable[[int], None] = lambda job: None, compare: bool = True,
) -> Rehearsal:  # fmt: skip
    """Train the first job of `client` on `data` `jobs` times, as the run would order it, and attack the updates.

    The rows to compare with are `task.test_data()`, or else a quarter of the client's, which is then not trained on.
    Nothing leaves the process. `on_job` is called before each job. With `compare`, the encodings are measured too.
    Raises TaskError for data that cannot be divided, and what the task raises.
    """
    test = task.test_data()
    trained, held_out = (data, test) if test is not None else hold_out(data, config.seed)
    device = check_device(config.training.device)
    set_seed(config.seed)
    module = make_model(task)
    check_training(config.training, device, module)
    check_example_privacy(config.privacy.examples, task, module)
    manifest = Manifest.from_module(module, config.aggregation)
    base = Frame(manifest)
    base.read(module)
    local_model, codec = LocalModel(task, module, manifest), uplink_codec(config.compression, manifest)
    seen = []
    for number in range(jobs):
        on_job(number)
        order = Order(
            run=config.name, job=f"rehearsal-{number}", client=client.id,
            seed=(config.seed * 1_000_003 + number) % 2**53, training=config.training, privacy=config.example_privacy,
        )  # fmt: skip
        noise_key = simulated_key(config.seed, order)
        local, progress = Frame(manifest), local_model.progress(client, number, lambda: None)
        compute_update(task, local_model, trained, order, base, local, progress, noise_key)
        delta = codec.received(codec.encode(local, order.seed))
        delta.frozen = base.frozen
        seen.append(Seen(base, delta, {client.id: rows_of_job(task, trained, order, noise_key)}))
    seen_rows = [one.trained[client.id] for one in seen]
    rows = rows_of(task, trained, config.seed, all_of(seen_rows))
    control = matched(rows_of(task, held_out, config.seed), rows, config.seed)
    attacks = Attacks(task, module, {client.id: rows}, {client.id: control}, config.seed)
    posted = protection(config, codec)
    measurements = attacks.on_updates(seen, "coordinator", posted)
    galleries = [attacks.gallery("one update", seen, measurements)]
    for name in ENCODINGS if compare and posted == NOTHING else ():
        if arrived := encoded(seen, name, config.seed):
            measurements += attacks.on_updates(arrived, "coordinator", name, configured=False)
    if config.example_privacy and compare:
        measurements += canary_measurements(config.example_privacy, config.training, len(trained), config.seed)
    kind = "test_data()" if test is not None else "a quarter of the client's rows, held out"
    return Rehearsal(measurements, galleries, kind)


def protection(config: Config, codec: Codec) -> str:
    """Return what protects an update of this run as it is posted with this codec; NOTHING if nothing does."""
    encoding = "" if codec.encoding is None else codec.name
    return " and ".join(filter(None, [ROW_NOISE if config.example_privacy else "", encoding])) or NOTHING

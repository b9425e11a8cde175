"""`fedqueue leak`: what could be learned from a run's updates and models, measured by attacks.

A run is read from its ledger and its kept payloads. A configuration is first run under the virtual clock, which leaves
the same two. Both are then attacked alike.
"""

from __future__ import annotations

import tempfile
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedqueue.config.loading import load_config
from fedqueue.config.schema import Config
from fedqueue.errors import ConfigurationError, RunFailed, StoreError, TaskError
from fedqueue.leak.attacks import ENCODINGS, Attacks, Chosen, Gallery, Seen, encoded, mean_update
from fedqueue.leak.canaries import canary_measurements
from fedqueue.leak.client_canaries import client_canary_measurements
from fedqueue.leak.measurement import CLIENT_NOISE, NOTHING, ROW_NOISE, Measurement, above, parse_limits
from fedqueue.leak.rehearsal import protection
from fedqueue.leak.report import print_table, write_leak
from fedqueue.leak.row_data import Indices, Rows, all_of, hold_out, matched, part, rows_of, rows_of_job
from fedqueue.private_training import simulated_key
from fedqueue.protocol.keys import job_without_tag
from fedqueue.task import load_task, prepare_task
from fedqueue.tensors.blobs import BlobBuffer
from fedqueue.tensors.codec import downlink_codec, uplink_codec
from fedqueue.tensors.encodings import Bytes
from fedqueue.tensors.frame import Frame
from fedqueue.training import set_seed
from fedqueue_coordinator.algorithms.masked_sum import MaskedSum
from fedqueue_coordinator.core.events import Dispatch, make_order
from fedqueue_coordinator.core.federation import initial_model
from fedqueue_coordinator.core.run_summary import RunResult
from fedqueue_coordinator.operator.audit.replay import read_archive, replay
from fedqueue_coordinator.operator.plain_console import PlainConsole
from fedqueue_coordinator.operator.run_folder import LAUNCH_FILENAME, Launch
from fedqueue_coordinator.operator.runs import finished_runs, read_ledger
from fedqueue_coordinator.service.replay_archive import REPLAY_FOLDER, masks_file
from fedqueue_coordinator.simulation.virtual_clock import ClientDatasets, Simulation, TimingModel

SUMS = (4, 8)
"""Numbers of updates in a sum that is compared with single updates."""
BLOCK = max(SUMS)
LIRA, OPTIMISATION = "lira", "optimisation"
SLOW = {
    LIRA: "LiRA on the last model, with 64 reference models",
    OPTIMISATION: "rows found by optimisation, in updates of at most four rows",
}
"""Attacks that take long, and have to be asked for."""
FEW_MODELS, LIRA_MODELS = 2, 64
SAID_EVERY = 8  # reference models between two lines about them


@dataclass(frozen=True)
class Recording:
    """What a run left: its configuration, ledger, version 0, last model, payloads, and with keepers their masks."""

    config: Config
    ledger: Sequence[Mapping[str, Any]]
    first: Frame
    head: Frame
    read_payload: Callable[[str, int], BlobBuffer]
    read_masks: Callable[[str, str], BlobBuffer]
    simulated: bool = False
    """Whether the noise of each job is known: with [privacy.examples], it decides which rows were seen."""


class LeakDatasets(ClientDatasets):
    """Each client's data, without rows held out to compare with where the task has no test data."""

    def __init__(self, folder: Path, config: Config) -> None:
        task = load_task(config.task.entrypoint, config.task.options, folder)
        prepare_task(task, config)
        super().__init__(task)
        self.held_out: dict[str, Any] = {}

    def data(self, config: Config, client: str) -> tuple[Any, int | None]:
        if client not in self._data and self.test_data is None:
            data, _ = super().data(config, client)
            trained, self.held_out[client] = hold_out(data, config.seed)
            self._data[client] = trained, self.task.num_examples(trained)
        return super().data(config, client)

    def control(self, client: str) -> Any:
        """Return rows that were never trained on."""
        return self.held_out[client] if self.test_data is None else self.test_data


class HalfDatasets(ClientDatasets):
    """A half of each client's rows, for a reference model; `half` 0 and 1 of one `pair` have no row in common."""

    def __init__(self, whole: LeakDatasets, pair: int, half: int) -> None:
        self.task, self.test_data, self._data = whole.task, None, {}  # no version is evaluated
        self._whole, self._pair, self._half = whole, pair, half
        self.chosen: dict[str, Indices] = {}

    def data(self, config: Config, client: str) -> tuple[Any, int | None]:
        """As `ClientDatasets.data`, of the half."""
        if client not in self._data:
            data, _ = self._whole.data(config, client)
            rng = np.random.default_rng([config.seed, self._pair, zlib.crc32(client.encode())])
            self.chosen[client] = np.sort(rng.permutation(len(data))[self._half :: 2])
            half = part(data, self.chosen[client])
            self._data[client] = half, self.task.num_examples(half)
        return self._data[client]


@dataclass(frozen=True)
class Effort:
    """How much is attacked."""

    updates: int = 32
    references: int | None = None
    """Reference models for the attacks on the last model; None: as many as these need."""
    also: frozenset[str] = frozenset()
    """Attacks of SLOW that are wanted."""

    @property
    def models(self) -> int:
        """Reference models."""
        if self.references is not None:
            return self.references
        return LIRA_MODELS if LIRA in self.also else FEW_MODELS


def measure_leak(
    subject: str, overrides: Sequence[str], output: Path | None, effort: Effort, limits: Sequence[str]
) -> bool:
    """Measure the leak of `subject`, a configuration, a run's name, or the folder of its results.

    Prints the table; writes leak.json and leak.png. Returns whether every limit, ATTACK=NUMBER, holds.
    """
    at_most = parse_limits(limits, "--at-most")
    effort = replace(effort, also=effort.also | {name for name in SLOW for limit in at_most if limit.startswith(name)})
    if effort.models % 2:
        raise ConfigurationError("--references", effort.models, "not even", "reference models come in pairs")
    for name in sorted(effort.also - {*SLOW}):
        raise ConfigurationError("--also", name, "no attack that has to be asked for", f"write {' or '.join(SLOW)}")
    if LIRA in effort.also and not effort.models:
        raise ConfigurationError("--references", 0, "LiRA compares with reference models", f"set it to {LIRA_MODELS}")
    console = PlainConsole(stderr=True)
    started = time.perf_counter()

    def say(text: str) -> None:
        console.print(f"{time.perf_counter() - started:5.1f} s  {text}", soft_wrap=True)

    path = Path(subject)
    rehearsal = path.suffix == ".toml"
    if rehearsal:
        config = load_config(path, overrides)
        folder = output or Path("runs") / f"{config.name}-leak"
        datasets = LeakDatasets(path.resolve().parent, config)
    else:
        run_folder = _folder_of(subject)
        if overrides:
            raise ConfigurationError("--set", overrides[0], "not with a run that has ended", "name a configuration")
        folder = output or run_folder
        config, datasets = _data_of_run(run_folder)
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(config.training.threads)
    with tempfile.TemporaryDirectory() as kept:
        if rehearsal:
            say("simulating the run")
            recording = _simulated(config, datasets, Path(kept))
        else:
            recording = _recorded(run_folder, config)
        measurements, galleries, about = _measure(recording, datasets, effort, say)
    about = {
        "subject": config.name, "kind": "rehearsal" if rehearsal else "run",
        "batch_size": config.training.batch_size, "local_epochs": config.training.local_epochs,
        "local_steps": config.training.local_steps, **about,
    }  # fmt: skip
    title = f"{config.name}: what could be learned"
    written = write_leak(folder, title, about, measurements, galleries)
    print_table(PlainConsole(), title, about, measurements, written)
    broken = above(measurements, at_most)
    for line in broken:
        console.print(f"fedqueue: --at-most: {line}", soft_wrap=True)
    return not broken


def _folder_of(subject: str) -> Path:
    """Return the folder of a run's results. Raises ConfigurationError without it, and without kept payloads."""
    folder = Path(subject) if (Path(subject) / "ledger.jsonl").exists() else finished_runs().get(subject)
    if folder is None:
        raise ConfigurationError(
            "RUN", subject, "no run with results under runs/, and no folder of results",
            "name one (`fedqueue list` shows them), or a configuration: CONFIG.toml",
        )  # fmt: skip
    if not (folder / REPLAY_FOLDER).exists():
        raise ConfigurationError(
            "ledger.keep_payloads", False, f"{folder} has no payloads to attack",
            "set it to true before a run, or rehearse: fedqueue leak CONFIG.toml",
        )  # fmt: skip
    return folder


def _data_of_run(folder: Path) -> tuple[Config, LeakDatasets]:
    """Return the configuration of a run and its task's data. Raises TaskError without rows to compare with."""
    config = read_archive(folder / REPLAY_FOLDER).config
    launch = Launch.read(folder / LAUNCH_FILENAME)
    if launch is None or not launch.config.exists():
        where = launch.config if launch else folder / LAUNCH_FILENAME
        raise ConfigurationError("task.entrypoint", config.task.entrypoint, f"cannot be found: {where} is missing")
    datasets = LeakDatasets(launch.config.parent, config)
    if datasets.test_data is None:
        raise TaskError(
            "leak needs rows that were never trained on, and the task's test_data() returned None; rehearse instead, "
            f"which holds out a quarter of each client's rows: fedqueue leak {launch.config}"
        )
    return config, datasets


def _recorded(folder: Path, config: Config) -> Recording:
    archive = read_archive(folder / REPLAY_FOLDER)
    return Recording(config, read_ledger(folder), archive.first, archive.head, archive.read_payload, archive.read_masks)


def _simulated(config: Config, datasets: ClientDatasets, folder: Path) -> Recording:
    """Run the configuration under the virtual clock; payloads, and with keepers masks, are kept in `folder`."""
    name: Callable[[str, int], Path] = lambda job, attempt: folder / f"{job}.{attempt}.bin"  # noqa: E731

    def keep(job: str, attempt: int, wire: Bytes) -> None:
        wire.tofile(name(job, attempt))

    timing = TimingModel(config.compare.batch_seconds, config.compare.job_seconds, config.compare.jitter)
    simulation = Simulation(
        config, datasets, timing, on_payload=keep,
        on_masks=lambda cohort, keeper, masks: masks.tofile(folder / masks_file(cohort, keeper)),
    )  # fmt: skip
    first = simulation.federation.model.copy()
    result = _completed(simulation)
    return Recording(
        config, result.ledger, first, result.model, lambda job, attempt: np.fromfile(name(job, attempt), np.uint8),
        lambda cohort, keeper: np.fromfile(folder / masks_file(cohort, keeper), np.uint8), simulated=True,
    )  # fmt: skip


def _completed(simulation: Simulation) -> RunResult:
    result = simulation.run()
    if result.failed or not result.version:
        raise RunFailed(f"the rehearsal merged nothing to attack: {result.stopped_because}")
    return result


# Measuring


def _noise(config: Config) -> str:
    """The noise that is in updates or sums, in words."""
    kinds = [(ROW_NOISE, config.example_privacy is not None), (CLIENT_NOISE, config.privacy.clients.on)]
    return ", ".join(name for name, on in kinds if on) or NOTHING


def _measure(
    recording: Recording, datasets: LeakDatasets, effort: Effort, say: Callable[[str], None]
) -> tuple[list[Measurement], list[Gallery], dict[str, Any]]:
    config, task = recording.config, datasets.task
    set_seed(config.seed)
    module = task.model()
    recording.first.frozen = initial_model(config, module).frozen
    blocks = _blocks(recording.ledger, effort.updates)
    if not blocks:
        raise StoreError(f"the run merged fewer than {BLOCK} updates: too few to attack")
    say(f"reading {len(blocks) * BLOCK} updates")
    singles, sums_of_versions, steps = _seen(recording, datasets, blocks)
    every = [one for block in singles for one in block]
    arrived = sums_of_versions if config.secure.on else every
    clients = sorted({client for one in [*arrived, *steps] for client in one.trained})
    rows, control = {}, {}
    for client in clients:
        trained = all_of(one.trained[client] for one in arrived if client in one.trained)
        rows[client] = rows_of(task, datasets.data(config, client)[0], config.seed, trained)
        control[client] = matched(rows_of(task, datasets.control(client), config.seed), rows[client], config.seed)
    attacks, noise = Attacks(task, module, rows, control, config.seed), _noise(config)
    if config.secure.on:
        least = min(len(one.trained) for one in sums_of_versions)
        seen = f"keepers: sums over {least} clients or more"
        if noise != NOTHING:
            seen += f", {noise}"
        say(f"attacking the sums of {len(sums_of_versions)} versions")
        measurements = attacks.on_updates(sums_of_versions, "coordinator", seen)
        galleries = [attacks.gallery("a version's sum", sums_of_versions, measurements)]
    else:
        measurements, galleries = _on_single_updates(recording, attacks, singles, say)
    say("attacking the steps between versions")
    measurements += attacks.on_updates(steps, "participant", noise)
    if OPTIMISATION in effort.also:
        measurements += _by_optimisation(attacks, every or steps, "coordinator" if every else "participant", noise, say)
    if effort.models:
        models = _references(recording, datasets, rows, effort.models, say)
        say("attacking the last model")
        recording.head.frozen = recording.first.frozen
        measurements += attacks.on_model(recording.head, models, LIRA in effort.also, noise)
    if config.example_privacy:
        fewest = min(len(datasets.data(config, client)[0]) for client in clients)
        say("auditing the noise with canaries")
        measurements += canary_measurements(config.example_privacy, config.training, fewest, config.seed)
    if config.privacy.clients.on:
        say("auditing the keepers' noise with canary clients")
        measurements += client_canary_measurements(config, config.seed)
    about = {
        "control_rows": "test_data()" if datasets.test_data is not None else "a quarter of each client's, held out",
        "updates_attacked": len(every) or sum(map(len, blocks)), "reference_models": effort.models,
    }  # fmt: skip
    return measurements, galleries, about


def _by_optimisation(
    attacks: Attacks, seen: Sequence[Seen], view: str, protection: str, say: Callable[[str], None]
) -> list[Measurement]:
    def on_update(seconds: float) -> None:
        say("looking for rows by optimisation" + (f": about {seconds:.0f} s more" if seconds else ""))

    return attacks.by_optimisation(seen, view, protection, on_update)


def _on_single_updates(
    recording: Recording, attacks: Attacks, singles: Sequence[Sequence[Seen]], say: Callable[[str], None]
) -> tuple[list[Measurement], list[Gallery]]:
    """Attack what a coordinator without keepers receives, and what it would see of sums and other encodings."""
    config = recording.config
    every = [one for block in singles for one in block]
    codec = uplink_codec(config.compression, recording.first.manifest)
    posted = protection(config, codec)
    say(f"attacking single updates ({posted})")
    measurements = attacks.on_updates(every, "coordinator", posted)
    galleries = [attacks.gallery("one update", every, measurements)]
    for size in SUMS:
        say(f"attacking sums of {size}")
        sums = [mean_update(block[at : at + size]) for block in singles for at in range(0, BLOCK, size)]
        found = attacks.on_updates(sums, "coordinator", f"if only sums of {size} were seen", configured=False)
        measurements += found
        if size == BLOCK:
            galleries.append(attacks.gallery(f"a sum of {size} updates", sums, found))
    for name in ENCODINGS if posted == NOTHING else ():
        say(f"attacking updates in {name}")
        if arrived := encoded(every, name, config.seed):
            measurements += attacks.on_updates(arrived, "coordinator", name, configured=False)
    return measurements, galleries


def _blocks(ledger: Sequence[Mapping[str, Any]], updates: int) -> list[list[Mapping[str, Any]]]:
    """Return runs of 8 consecutive merged updates, spread evenly over the ledger, with about `updates` in all."""
    merged = [line for record in ledger if record["kind"] == "version" for line in record["merged"]]
    count = len(merged) // BLOCK
    chosen = np.unique(np.linspace(0, count - 1, min(count, max(1, updates // BLOCK))).round().astype(int))
    return [merged[at * BLOCK : (at + 1) * BLOCK] for at in chosen] if count else []


def _seen(
    recording: Recording, datasets: LeakDatasets, blocks: Sequence[Sequence[Mapping[str, Any]]]
) -> tuple[list[list[Seen]], list[Seen], list[Seen]]:
    """Return the updates of each block, the sums of versions, and the steps between the versions that merged them.

    With keepers there are sums and no updates, without them updates and no sums.
    """
    config = recording.config
    chosen = {line["job"] for block in blocks for line in block}
    records = [r for r in recording.ledger if r["kind"] == "version" and any(m["job"] in chosen for m in r["merged"])]
    wanted = {line["base"] for block in blocks for line in block}
    wanted |= {version for record in records for version in (record["version"] - 1, record["version"])}
    versions: dict[int, Frame] = {}
    downlink = downlink_codec(config.compression, recording.first.manifest)

    def keep(version: int, model: Frame) -> None:
        if version in wanted:
            versions[version] = downlink.received(downlink.encode(model, version)).copy()
            versions[version].frozen = model.frozen

    means: dict[int, torch.Tensor] = {}

    def keep_mean(version: int, masked_sum: MaskedSum) -> None:
        if version in wanted:
            means[version] = torch.from_numpy(masked_sum.mean())

    done = replay(
        config, recording.ledger, recording.first.copy(), recording.read_payload, None,
        on_version=keep, read_masks=recording.read_masks, on_sum=keep_mean,
    )  # fmt: skip
    if done.problems:
        raise StoreError(f"the payloads do not fit the ledger: {done.problems[0]}; `fedqueue audit` says more")

    def trained(line: Mapping[str, Any]) -> dict[str, Indices | None]:
        number = int(job_without_tag(line["job"]).rpartition("-")[2])
        data, _ = datasets.data(config, line["client"])
        order = make_order(config, Dispatch(line["job"], number, line["client"]))
        noise_key = simulated_key(config.seed, order) if recording.simulated else b""
        return {line["client"]: rows_of_job(datasets.task, data, order, noise_key)}

    def update(line: Mapping[str, Any]) -> Seen:
        uplink = uplink_codec(config.compression, recording.first.manifest)
        delta = uplink.received(recording.read_payload(line["job"], line["attempt"]))
        return Seen(versions[line["base"]], delta, trained(line))

    steps, sums = [], []
    for record in records:
        before, after = versions[record["version"] - 1], versions[record["version"]].copy()
        after.parameters.sub_(before.parameters)
        rows: dict[str, Indices | None] = {}
        for client, seen in (pair for line in record["merged"] for pair in trained(line).items()):
            rows[client] = all_of([rows.get(client, seen), seen])
        steps.append(Seen(before, after, rows))
        if record["version"] in means:
            mean = before.copy()
            mean.parameters.copy_(means[record["version"]])
            sums.append(Seen(before, mean, rows))
    if config.secure.on:
        return [], sums, steps
    return [[update(line) for line in block] for block in blocks], [], steps


def _references(
    recording: Recording, datasets: LeakDatasets, rows: Mapping[str, Rows], count: int, say: Callable[[str], None]
) -> list[tuple[Frame, Mapping[str, Chosen]]]:
    """Simulate `count` runs, each on a half of every client's rows, up to as many updates as the run merged."""
    merged = sum(len(record["merged"]) for record in recording.ledger if record["kind"] == "version")
    stop = recording.config.stop.model_copy(update={"updates": merged, "versions": None, "target": {}, "seconds": None})
    config = recording.config.model_copy(update={"stop": stop})
    models: list[tuple[Frame, Mapping[str, Chosen]]] = []
    started = time.perf_counter()
    for number in range(count):
        left = (time.perf_counter() - started) / number * (count - number) if number else 0.0
        if number < 2 or number % SAID_EVERY == 0:
            about = f": about {left:.0f} s more" if left else ""
            say(f"training reference model {number + 1} of {count}{about}")
        half = HalfDatasets(datasets, *divmod(number, 2))
        compare = config.compare
        timing = TimingModel(compare.batch_seconds, compare.job_seconds, compare.jitter)
        other = config.model_copy(update={"name": f"{config.name}-reference-{number}"})  # noise of its own
        result = _completed(Simulation(other, half, timing))
        models.append((result.model, {c: np.isin(rows[c].indices, half.chosen.get(c, [])) for c in rows}))
    return models
